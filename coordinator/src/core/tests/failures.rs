//! Members die, hang and come back.

use std::time::Duration;

use musher_proto::{
    ids::{Epoch, Generation, Step},
    message::{Finish, FromWorker, Interrupted, Start, ToWorker},
};

use super::sim::{Move, Sim, heartbeat, job};
use crate::core::{Action, Event, RunEvent, Status, Stopped, reasons::Departure};

fn two_workers() -> Sim {
    let mut sim = Sim::new(job());
    sim.join("a");
    sim.join("b");
    sim
}

fn formed(sim: &Sim) -> Vec<(u64, u32, String, u64)> {
    let formed = sim.events.iter().filter_map(|event| match event {
        RunEvent::GenerationFormed { generation, world_size, donor, applied, .. } => {
            Some((generation.0, *world_size, donor.0.clone(), applied.0))
        }
        _ => None,
    });
    formed.collect()
}

fn starts(sim: &Sim) -> Vec<Start> {
    let forms = sim.actions.iter().filter_map(|action| match action {
        Action::Send { message, .. } => match &message.body {
            ToWorker::Form(form) => Some((message.generation, form.start.clone())),
            _ => None,
        },
        _ => None,
    });
    let mut forms: Vec<_> = forms.collect();
    forms.dedup();
    forms.into_iter().map(|(_, start)| start).collect()
}

#[test]
fn a_member_lost_in_any_phase_costs_a_generation_and_nothing_else() {
    for phase in ["forming", "training", "validating", "saving"] {
        let mut sim = two_workers();
        sim.until(|sim| sim.phase() == phase);
        let b = sim.session_of("b").unwrap();
        sim.kill(b);
        assert_eq!(sim.run().status, Status::Finished(Stopped::EpochLimit), "lost while {phase}");
        let aborted =
            sim.events.iter().filter(|event| matches!(event, RunEvent::GenerationAborted { .. })).count();
        let left = sim.events.iter().filter(|event| matches!(event, RunEvent::WorkerLeft { .. })).count();
        assert_eq!((aborted, left), (1, 1), "lost while {phase}");
        for epoch in 1..=3 {
            let of = |wanted: Epoch| wanted == Epoch(epoch);
            let finished = sim
                .events
                .iter()
                .filter(|e| matches!(e, RunEvent::EpochFinished { epoch, .. } if of(*epoch)));
            let validated =
                sim.events.iter().filter(|e| matches!(e, RunEvent::Validated { epoch, .. } if of(*epoch)));
            assert_eq!((finished.count(), validated.count()), (1, 1), "epoch {epoch}, lost while {phase}");
        }
    }
}

#[test]
fn the_donor_is_whoever_has_the_step_in_flight_and_the_cursor_follows_it() {
    let mut sim = two_workers();
    sim.join("c");
    sim.until(|sim| sim.phase() == "training");
    sim.settle_orders();
    sim.perform(Move::Step(Generation(1)));
    // Ranks 0 and 1, a and b, apply the second step; c does not, and a dies.
    sim.break_step(Generation(1), 2, sim.session_of("a").unwrap());
    sim.until(|sim| formed(sim).len() == 2);
    assert_eq!(formed(&sim)[1], (2, 2, "b".into(), 2));
    let resumed = sim.actions.iter().rev().find_map(|action| match action {
        Action::Send { message, .. } => match message.body {
            ToWorker::Train(train) => Some((train.epoch, train.cursor)),
            _ => None,
        },
        _ => None,
    });
    assert_eq!(resumed, Some((Epoch(1), 6)));
    sim.run();
}

#[test]
fn the_event_names_the_donor_even_if_it_is_not_rank_0() {
    let mut sim = Sim::new(job());
    sim.join("b");
    sim.until(|sim| sim.phase() == "training");
    sim.join("a");
    sim.until(|sim| formed(sim).len() == 2);
    assert_eq!(formed(&sim)[1], (2, 2, "b".into(), 1));
}

#[test]
fn survivors_that_the_break_reached_first_do_not_wait_for_the_dead() {
    let mut sim = two_workers();
    sim.until(|sim| sim.phase() == "training");
    sim.settle_orders();
    let (a, b) = (sim.session_of("a").unwrap(), sim.session_of("b").unwrap());
    sim.kill(b);
    sim.perform(Move::Notice(a));
    sim.perform(Move::ToCore(a));
    let broken = sim.now;
    sim.perform(Move::Close(b));
    sim.until(|sim| formed(sim).len() == 2);
    assert!(sim.now <= broken + Duration::from_secs(3), "{:?}", sim.now - broken);
}

#[test]
fn a_member_that_does_not_leave_an_aborted_generation_is_removed() {
    let mut sim = two_workers();
    sim.until(|sim| sim.phase() == "training");
    let (a, b) = (sim.session_of("a").unwrap(), sim.session_of("b").unwrap());
    let held = sim.workers[&a].state.as_ref().map(|state| state.label.0);
    sim.say(
        a,
        Generation(1),
        FromWorker::Interrupted(Interrupted { held, reason: "broken".into(), waited: None }),
    );
    sim.advance(Duration::from_secs(61));
    let left = sim.events.iter().any(|e| matches!(e, RunEvent::WorkerLeft { worker, departure: Departure::Unresponsive(_), .. } if worker.as_str() == "b"));
    assert!(left && sim.core.status(sim.now).peers.iter().all(|peer| peer.worker.as_str() == "a"));
    assert!(!sim.workers[&b].said.is_empty());
}

#[test]
fn silence_removes_a_worker() {
    let mut sim = two_workers();
    let (a, b) = (sim.session_of("a").unwrap(), sim.session_of("b").unwrap());
    sim.until(|sim| sim.phase() == "training");
    sim.now += Duration::from_secs(5);
    sim.say(a, Generation(0), FromWorker::Progress(heartbeat()));
    assert_eq!(sim.core.next_deadline(), Some(sim.now + Duration::from_secs(5)));
    sim.now += Duration::from_secs(5);
    sim.tell(Event::TimePassed);
    assert!(sim.actions.contains(&Action::CloseSession { session: b }));
    let silent = sim.events.iter().any(|e| matches!(e, RunEvent::WorkerLeft { departure, .. } if departure.to_string().starts_with("it was silent for 10.0 s")));
    assert!(silent && sim.phase() == "waiting for workers");
}

#[test]
fn one_that_was_removed_at_the_very_end_still_hears_of_it() {
    let mut sim = two_workers();
    let (a, b) = (sim.session_of("a").unwrap(), sim.session_of("b").unwrap());
    sim.until(|sim| sim.phase() == "training");
    sim.now += Duration::from_secs(10);
    sim.say(a, Generation(0), FromWorker::Progress(heartbeat()));
    assert!(sim.actions.contains(&Action::CloseSession { session: b }));
    sim.tell(Event::TeamLost { reason: "enough".into() });
    sim.say(a, Generation(0), FromWorker::Goodbye);
    sim.tell(Event::SessionClosed { session: a, reason: "it left".into() });
    assert_eq!((sim.phase(), sim.outcome.is_none()), ("ended", true), "it lingers");
    let again = sim.reconnect(b).unwrap();
    sim.run();
    let told = sim.actions.iter().any(|action| {
        matches!(action, Action::Send { session, message } if *session == again
            && matches!(message.body, ToWorker::Finish(Finish::Failed { .. })))
    });
    assert!(told);
}

#[test]
fn five_generations_without_a_step_fail_the_run() {
    let mut sim = two_workers();
    for generation in 1..=5 {
        sim.until(|sim| sim.phase() == "forming");
        let a = sim.session_of("a").unwrap();
        let report = Interrupted { held: None, reason: "no route to b".into(), waited: None };
        sim.say(a, Generation(generation), FromWorker::Interrupted(report));
    }
    let Status::Failed { reason } = sim.run().status else { panic!("it fails") };
    assert!(reason.starts_with("5 generations in a row") && reason.ends_with("no route to b"), "{reason}");
}

#[test]
fn below_min_workers_it_waits_for_as_long_as_it_takes() {
    let mut job = job();
    job.cluster.min_workers = 2;
    let mut sim = Sim::new(job);
    sim.join("a");
    sim.join("b");
    sim.until(|sim| sim.phase() == "training");
    sim.kill(sim.session_of("b").unwrap());
    sim.settle();
    sim.advance(Duration::from_secs(4000));
    assert_eq!(sim.phase(), "waiting for workers");
    assert_eq!(sim.events.last(), Some(&RunEvent::WaitingForWorkers { joined: 1, wanted: 2 }));
    sim.connect("c");
    assert_eq!(sim.run().status, Status::Finished(Stopped::EpochLimit));
}

#[test]
fn a_worker_whose_link_broke_brings_its_steps_back() {
    let mut sim = Sim::new(job());
    let a = sim.join("a");
    sim.until(|sim| sim.phase() == "training");
    sim.settle_orders();
    sim.perform(Move::Step(Generation(1)));
    sim.reconnect(a).unwrap();
    sim.until(|sim| formed(sim).len() == 2);
    assert_eq!(formed(&sim)[1], (2, 1, "a".into(), 1));
    assert_eq!(starts(&sim), [Start::Seeded, Start::Held]);
}

#[test]
fn when_all_are_lost_the_run_goes_back_to_its_checkpoint_and_judges_again() {
    let mut sim = Sim::new(job());
    sim.join("a");
    sim.until_event(|event| matches!(event, RunEvent::Validated { epoch: Epoch(2), .. }));
    let a = sim.session_of("a").unwrap();
    sim.kill(a);
    sim.settle();
    let checkpoint = sim.committed.keys().next().unwrap().clone();
    assert_eq!(sim.committed.len(), 1, "the second epoch's checkpoint died with its only holder");
    sim.join("b");
    sim.run();
    assert_eq!(starts(&sim), [Start::Seeded, Start::Checkpoint(checkpoint)]);
    let judged: Vec<u32> = sim
        .events
        .iter()
        .filter_map(|e| match e {
            RunEvent::Validated { epoch, .. } => Some(epoch.0),
            _ => None,
        })
        .collect();
    assert_eq!(judged, [1, 2, 2, 3]);
    let (last, _) = &sim.committed[&"e0003-s00000009".into()];
    assert_eq!(last.progress.early_stopping.judged, Epoch(3));
    assert_eq!(last.progress.early_stopping.wait, 0);
    assert_eq!(last.position.applied, Step(9));
}
