//! Who gets in, and when the first generation is formed.

use std::time::Duration;

use musher_proto::{
    ids::{Generation, Session, Step, Term},
    message::{DataFacts, Fenced, FromWorker, Join, PROTOCOL, ToWorker},
};

use super::sim::{Sim, facts, job};
use crate::core::{Event, RunEvent, Status, reasons::Departure};

const SECOND: Duration = Duration::from_secs(1);

fn world(sim: &Sim) -> Option<u32> {
    sim.events.iter().rev().find_map(|event| match event {
        RunEvent::GenerationFormed { world_size, .. } => Some(*world_size),
        _ => None,
    })
}

#[test]
fn the_first_formation_waits_for_the_workers_that_were_asked_for() {
    let mut job = job();
    job.cluster.workers = 3;
    let mut sim = Sim::new(job);
    sim.join("a");
    sim.join("b");
    sim.advance(100 * SECOND);
    sim.settle();
    assert_eq!((sim.phase(), world(&sim)), ("waiting for workers", None));
    sim.join("c");
    sim.until_event(|event| matches!(event, RunEvent::GenerationFormed { .. }));
    assert_eq!(world(&sim), Some(3));
}

#[test]
fn too_few_workers_at_the_start_timeout_fail_the_run_with_a_sentence() {
    for (workers, min_workers, wanted) in [(3, 2, 3), (0, 2, 2)] {
        let mut job = job();
        (job.cluster.workers, job.cluster.min_workers) = (workers, min_workers);
        let mut sim = Sim::new(job);
        sim.join("a");
        sim.advance(299 * SECOND);
        assert_eq!(sim.phase(), "waiting for workers");
        let Status::Failed { reason } = sim.run().status else { panic!("it fails") };
        assert!(reason.starts_with(&format!("1 of {wanted} workers joined within 300 s")), "{reason}");
        assert_eq!(sim.events.last(), Some(&RunEvent::RunFailed { reason }));
    }
}

#[test]
fn enough_workers_at_the_start_timeout_begin_without_the_others() {
    let mut job = job();
    job.cluster.workers = 3;
    let mut sim = Sim::new(job);
    sim.join("a");
    sim.until(|sim| world(sim).is_some());
    assert_eq!((world(&sim), sim.now), (Some(1), 300 * SECOND));
}

#[test]
fn with_no_number_asked_for_it_forms_when_nobody_has_come_for_a_while() {
    let mut sim = Sim::new(job());
    sim.advance(10 * SECOND);
    sim.join("a");
    sim.advance(SECOND);
    sim.join("b");
    sim.until(|sim| world(sim).is_some());
    assert_eq!((world(&sim), sim.now), (Some(2), 13 * SECOND));
}

#[test]
fn ranks_follow_names_not_arrival() {
    let mut sim = Sim::new(job());
    let (b, a) = (sim.join("b"), sim.join("a"));
    sim.until(|sim| world(sim).is_some());
    assert_eq!(sim.members(Generation(1)), [a, b]);
}

#[test]
fn another_protocol_is_refused() {
    let mut sim = Sim::new(job());
    let session = sim.connect_as("a", 1, PROTOCOL + 1, None);
    sim.settle();
    let refused = sim.events.iter().find(|event| matches!(event, RunEvent::WorkerRefused { .. }));
    let Some(RunEvent::WorkerRefused { reason, .. }) = refused else { panic!("it is refused") };
    assert!(reason.contains(&format!("protocol {}, the coordinator {PROTOCOL}", PROTOCOL + 1)), "{reason}");
    assert!(!sim.workers.contains_key(&session), "its stream was ended");
}

#[test]
fn another_data_set_is_refused() {
    let mut sim = Sim::new(job());
    sim.join("a");
    let session = sim.connect("b");
    let data = DataFacts { train_samples: 8, ..facts() };
    sim.say(session, Generation(0), FromWorker::Join(Join::of_newcomer(data, "b:1", "cpu")));
    assert!(
        matches!(sim.events.last(), Some(RunEvent::WorkerRefused { reason, .. }) if reason.contains("has 8 training"))
    );
    let empty = sim.connect("c");
    let data = DataFacts { val_samples: 0, ..facts() };
    sim.say(empty, Generation(0), FromWorker::Join(Join::of_newcomer(data, "c:1", "cpu")));
    assert!(
        matches!(sim.events.last(), Some(RunEvent::WorkerRefused { reason, .. }) if reason.contains("no validation"))
    );
}

fn join_as(sim: &mut Sim, session: Session, arithmetic: &str) {
    let join = Join::of_newcomer(facts(), format!("{session}:1"), arithmetic);
    sim.say(session, Generation(0), FromWorker::Join(join));
}

#[test]
fn another_arithmetic_is_refused_while_somebody_is_there() {
    let mut sim = Sim::new(job());
    let first = sim.join("a");
    let second = sim.connect("b");
    join_as(&mut sim, second, "CUDA");
    assert!(
        matches!(sim.events.last(), Some(RunEvent::WorkerRefused { reason, .. })
            if reason.contains("trains on CUDA, the team, as a does, on cpu")),
        "{:?}",
        sim.events.last()
    );
    sim.say(first, Generation(0), FromWorker::Goodbye);
    let third = sim.connect("c");
    join_as(&mut sim, third, "CUDA");
    assert!(matches!(sim.events.last(), Some(RunEvent::WorkerJoined { worker, .. }) if worker.0 == "c"));
}

/// They prepare for seconds between Hello and Join.
#[test]
fn too_many_that_come_at_once_are_refused_when_they_join() {
    let mut job = job();
    job.cluster.max_workers = 2;
    let mut sim = Sim::new(job);
    let sessions = ["a", "b", "c"].map(|name| sim.connect(name));
    for session in sessions {
        join_as(&mut sim, session, "cpu");
    }
    assert!(
        matches!(sim.events.last(), Some(RunEvent::WorkerRefused { worker, reason })
            if worker.0 == "c" && reason.contains("cluster.max_workers = 2")),
        "{:?}",
        sim.events.last()
    );
    assert_eq!(sim.core.status(sim.now).peers.len(), 2);
}

/// And says where it stands: with nobody there, that is the newest checkpoint.
#[test]
fn a_run_that_loses_its_last_worker_says_that_it_waits() {
    let mut job = job();
    job.cluster.workers = 1;
    let mut sim = Sim::new(job);
    let only = sim.join("a");
    sim.until(|sim| sim.events.iter().any(|event| matches!(event, RunEvent::CheckpointCommitted { .. })));
    sim.until(|sim| sim.phase() == "training");
    sim.say(only, Generation(0), FromWorker::Goodbye);
    let aborted = |event: &RunEvent| matches!(event, RunEvent::GenerationAborted { .. });
    let since = sim.events.iter().position(aborted).expect("its generation ended with it");
    let waits = |event: &RunEvent| matches!(event, RunEvent::WaitingForWorkers { joined: 0, wanted: 1 });
    assert_eq!(
        sim.events[since..].iter().filter(|event| waits(event)).count(),
        1,
        "{:?}",
        &sim.events[since..]
    );
    let saved = sim.events.iter().rev().find_map(|event| match event {
        RunEvent::CheckpointCommitted { epoch, step, .. } => Some((*epoch, *step)),
        _ => None,
    });
    let status = sim.core.status(sim.now);
    assert_eq!(Some((status.epoch(), status.applied())), saved);
}

/// Even one that would not be let in.
#[test]
fn a_members_second_join_changes_nothing() {
    let mut sim = Sim::new(job());
    let a = sim.join("a");
    sim.join("b");
    sim.until(|sim| sim.phase() == "training");
    join_as(&mut sim, a, "CUDA");
    assert_eq!((sim.phase(), sim.core.status(sim.now).peers.len()), ("training", 2));
}

#[test]
fn one_worker_too_many_is_refused_but_a_member_may_come_back() {
    let mut job = job();
    job.cluster.max_workers = 2;
    let mut sim = Sim::new(job);
    sim.join("a");
    let b = sim.join("b");
    let c = sim.connect("c");
    sim.perform(super::sim::Move::ToWorker(c));
    assert!(sim.workers[&c].refused.as_ref().unwrap().contains("cluster.max_workers = 2"));
    let again = sim.reconnect(b).unwrap();
    assert!(sim.workers[&again].refused.is_none());
    assert_eq!(sim.core.status(sim.now).peers.len(), 2);
}

#[test]
fn a_newer_process_takes_the_place_and_an_older_one_is_refused() {
    let mut sim = Sim::new(job());
    let old = sim.join("a");
    let new = sim.join("a");
    assert!(
        sim.events
            .iter()
            .any(|event| matches!(event, RunEvent::WorkerLeft { departure: Departure::Replaced, .. }))
    );
    let oldest = sim.connect_as("a", 0, PROTOCOL, None);
    assert!(
        matches!(sim.events.last(), Some(RunEvent::WorkerRefused { reason, .. }) if reason.contains("newer process"))
    );
    // The replaced session's end, and what it still says, change nothing.
    sim.say(old, Generation(0), FromWorker::Goodbye);
    sim.tell(Event::SessionClosed { session: old, reason: "late".into() });
    sim.tell(Event::SessionClosed { session: oldest, reason: "late".into() });
    let peers = sim.core.status(sim.now).peers;
    assert_eq!(peers.len(), 1);
    sim.settle();
    sim.until(|sim| world(sim).is_some());
    assert_eq!(sim.members(Generation(1)), [new]);
}

#[test]
fn messages_of_another_term_or_generation_change_nothing() {
    let mut sim = Sim::new(job());
    let a = sim.join("a");
    sim.join("b");
    sim.until(|sim| sim.phase() == "training");
    let goodbye = Fenced { term: Term(9), generation: Generation(0), body: FromWorker::Goodbye };
    sim.tell(Event::MessageReceived { session: a, message: goodbye });
    let interrupted = musher_proto::message::Interrupted { held: None, reason: "stale".into(), waited: None };
    for generation in [0, 2] {
        sim.say(a, Generation(generation), FromWorker::Interrupted(interrupted.clone()));
    }
    assert_eq!(sim.phase(), "training");
    sim.say(a, Generation(1), FromWorker::Interrupted(interrupted));
    assert_eq!(sim.phase(), "waiting for workers");
}

#[test]
fn a_worker_that_comes_in_mid_epoch_is_taken_in_between_two_steps() {
    let mut sim = Sim::new(job());
    sim.join("a");
    sim.until(|sim| sim.phase() == "training");
    sim.join("b");
    sim.until_event(|event| {
        matches!(event, RunEvent::GenerationFormed { world_size: 2, applied: Step(1 | 2), .. })
    });
    assert!(!sim.events.iter().any(|event| matches!(event, RunEvent::GenerationAborted { .. })));
    sim.run();
}

#[test]
fn whoever_comes_when_the_run_is_over_is_told_so() {
    let mut sim = Sim::new(job());
    sim.join("a");
    sim.until(|sim| sim.phase() == "ended");
    let late = sim.connect("b");
    sim.perform(super::sim::Move::ToWorker(late));
    sim.perform(super::sim::Move::ToWorker(late));
    assert!(matches!(sim.workers[&late].finish, Some(ToWorker::Finish(_))));
}
