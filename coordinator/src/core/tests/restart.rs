//! The coordinator dies and is started again while workers live on.

use std::time::Duration;

use musher_proto::{
    ids::{Epoch, Step, WorkerId},
    message::{PROTOCOL, ReplicaLabel},
};

use super::sim::{Move, Sim, job};
use crate::core::{Action, Event, RunEvent, Status, Stopped};

const SECOND: Duration = Duration::from_secs(1);

fn two_workers() -> Sim {
    let mut sim = Sim::new(job());
    sim.join("a");
    sim.join("b");
    sim
}

/// (world size, applied) of each generation that was formed, from the `seen`th event on.
fn formed(sim: &Sim, seen: usize) -> Vec<(u32, u64)> {
    let formed = sim.events[seen..].iter().filter_map(|event| match event {
        RunEvent::GenerationFormed { world_size, applied, .. } => Some((*world_size, applied.0)),
        _ => None,
    });
    formed.collect()
}

fn judged(sim: &Sim) -> Vec<u32> {
    let judged = sim.events.iter().filter_map(|event| match event {
        RunEvent::Validated { epoch, .. } => Some(epoch.0),
        _ => None,
    });
    judged.collect()
}

fn newest_label(sim: &Sim) -> ReplicaLabel {
    let states = sim.workers.values().filter_map(|worker| worker.state.as_ref());
    states.map(|state| state.label.0).max().unwrap()
}

#[test]
fn in_any_phase_it_costs_a_generation_and_nothing_else() {
    for phase in ["forming", "training", "validating", "saving"] {
        let mut sim = two_workers();
        sim.until(|sim| sim.phase() == phase);
        if phase == "training" {
            sim.settle_orders();
            sim.perform(Move::Step(sim.live_generation()));
        }
        let applied = if phase == "forming" { 0 } else { newest_label(&sim).applied.0 };
        let (seen, died) = (sim.events.len(), sim.now);
        sim.restart();
        assert!(
            sim.events[seen..].iter().any(|event| matches!(event, RunEvent::CoordinatorRestarted { .. }))
        );
        sim.until(|sim| !formed(sim, seen).is_empty());
        assert_eq!(formed(&sim, seen), [(2, applied)], "while {phase}");
        assert_eq!(sim.now, died, "all are back: nobody is waited for");
        assert_eq!(sim.run().status, Status::Finished(Stopped::EpochLimit), "while {phase}");
        assert_eq!(judged(&sim), [1, 2, 3], "while {phase}");
        assert_eq!(sim.committed[&"e0003-s00000009".into()].1.steps.len(), 9, "while {phase}");
    }
}

#[test]
fn it_waits_for_a_heartbeat_timeout_before_it_goes_on_without_some() {
    let mut sim = two_workers();
    sim.until(|sim| sim.phase() == "training");
    sim.settle_orders();
    sim.perform(Move::Step(sim.live_generation()));
    let (seen, died) = (sim.events.len(), sim.now);
    sim.restart();
    sim.kill_away(1);
    sim.until(|sim| !formed(sim, seen).is_empty());
    assert_eq!(formed(&sim, seen), [(1, 1)]);
    assert_eq!(sim.now, died + 10 * SECOND);
    sim.run();
}

/// The job may have been written for more workers than there were at the end; those that come bear other names.
#[test]
fn as_many_as_there_were_are_waited_for() {
    let mut wanting = job();
    wanting.cluster.workers = 4;
    wanting.cluster.start_timeout_s = 300.0;
    let mut sim = Sim::new(wanting);
    for name in ["a", "b", "c", "d"] {
        sim.join(name);
    }
    sim.until_event(|event| matches!(event, RunEvent::EpochFinished { epoch: Epoch(1), .. }));
    let seen = sim.events.len();
    sim.kill(sim.session_of("c").unwrap());
    sim.kill(sim.session_of("d").unwrap());
    sim.until(|sim| formed(sim, seen).iter().any(|(world, _)| *world == 2));
    sim.restart();
    sim.away.clear();
    let (seen, began) = (sim.events.len(), sim.now);
    sim.connect("e");
    sim.connect("f");
    sim.until(|sim| !formed(sim, seen).is_empty());
    assert_eq!(formed(&sim, seen)[0].0, 2);
    assert!(sim.now - began < 30 * SECOND, "{:?}", sim.now - began);
}

#[test]
fn when_none_come_back_it_starts_from_the_checkpoint() {
    let mut sim = two_workers();
    sim.until_event(|event| matches!(event, RunEvent::EpochFinished { epoch: Epoch(2), .. }));
    let seen = sim.events.len();
    sim.restart();
    sim.away.clear();
    sim.connect("c");
    sim.until(|sim| !formed(sim, seen).is_empty());
    assert_eq!(formed(&sim, seen), [(1, 3)]);
    sim.run();
    assert_eq!(judged(&sim), [1, 2, 3]);
}

#[test]
fn once_a_team_started_from_the_checkpoint_former_holders_are_newcomers() {
    let mut sim = two_workers();
    sim.until_event(|event| matches!(event, RunEvent::EpochFinished { epoch: Epoch(2), .. }));
    let holder = sim.workers[&sim.session_of("a").unwrap()].state.clone();
    let seen = sim.events.len();
    sim.restart();
    sim.away.clear();
    sim.connect("c");
    sim.until(|sim| !formed(sim, seen).is_empty());
    sim.connect_as("a", 1, PROTOCOL, holder.clone());
    sim.until(|sim| formed(sim, seen).len() == 2);
    let (_, applied) = formed(&sim, seen)[1];
    assert!(applied < 6, "the donor is c: {applied}");
    // Nor does another restart bring its steps back.
    sim.restart();
    sim.away.clear();
    let seen = sim.events.len();
    sim.connect_as("a", 1, PROTOCOL, holder);
    sim.until(|sim| !formed(sim, seen).is_empty());
    assert_eq!(formed(&sim, seen), [(1, 3)]);
    assert_eq!(sim.run().status, Status::Finished(Stopped::EpochLimit));
}

#[test]
fn the_best_epochs_checkpoint_that_it_interrupted_is_taken_again() {
    let mut sim = two_workers();
    sim.until(|sim| sim.uploads() > 0);
    assert_eq!(sim.disk.owed.map(|owed| (owed.applied, owed.is_best)), Some((Step(3), true)));
    assert!(sim.committed.is_empty());
    // No step was taken since: the team still stands there.
    sim.restart();
    sim.until(|sim| !sim.committed.is_empty());
    let (commit, _) = &sim.committed[&"e0001-s00000003".into()];
    assert!(commit.is_best);
    assert_eq!(commit.progress.saved_best.as_ref().map(|best| best.epoch), Some(Epoch(1)));
    sim.run();
    assert_eq!(judged(&sim), [1, 2, 3]);
}

#[test]
fn the_last_checkpoint_that_it_interrupted_ends_the_run_all_the_same() {
    let mut sim = two_workers();
    sim.until_event(|event| matches!(event, RunEvent::Validated { epoch: Epoch(3), .. }));
    let scores = sim.disk.last_scores;
    sim.restart();
    let outcome = sim.run();
    assert_eq!((outcome.status, outcome.scores), (Status::Finished(Stopped::EpochLimit), scores));
    assert!(sim.committed[&"e0003-s00000009".into()].0.is_last);
    assert_eq!(judged(&sim), [1, 2, 3]);
}

#[test]
fn a_best_checkpoint_committed_at_the_last_moment_counts() {
    let mut sim = two_workers();
    sim.curve = vec![0.5, 0.9];
    sim.until(|sim| !sim.committed.is_empty());
    assert_eq!(sim.disk.progress.saved_best, None, "it was not told of the commit yet");
    sim.restart();
    assert_eq!(sim.run().best_epoch, Some(Epoch(1)));
}

#[test]
fn a_run_that_was_over_waits_for_its_workers_to_hear_of_it() {
    let mut sim = two_workers();
    sim.until(|sim| sim.committed.len() == 3);
    sim.restart();
    assert!(sim.outcome.is_none(), "its workers are expected");
    assert_eq!(sim.run().status, Status::Finished(Stopped::EpochLimit));
    assert!(sim.workers.values().all(|worker| worker.finish.is_some()));
}

#[test]
fn the_decision_is_on_disk_before_anybody_hears_of_it() {
    let mut sim = two_workers();
    sim.until_event(|event| matches!(event, RunEvent::Validated { epoch: Epoch(1), .. }));
    let decided = |action: &Action| matches!(action, Action::Persist(state) if state.progress.early_stopping.judged == Epoch(1));
    assert!(sim.actions.iter().any(decided));
    assert_eq!(sim.disk.roster, ["a", "b"].map(WorkerId::from));
}

#[test]
fn a_stop_while_it_listens_still_saves_what_comes_back() {
    let mut sim = two_workers();
    sim.until(|sim| sim.phase() == "training");
    sim.settle_orders();
    sim.perform(Move::Step(sim.live_generation()));
    sim.restart();
    sim.tell(Event::StopRequested);
    assert!(sim.outcome.is_none());
    assert_eq!(sim.run().status, Status::Stopped);
    assert_eq!(sim.committed.keys().map(|id| id.as_str()).collect::<Vec<_>>(), ["e0001-s00000001"]);
}
