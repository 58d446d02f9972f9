//! Stops on request, and resumed runs.

use musher_proto::{
    ids::{CheckpointId, Epoch, Generation, Term},
    message::{Finish, ToWorker},
};

use super::sim::{Move, Sim, job};
use crate::core::{Event, RunEvent, Status, Stopped};

fn two_workers(job: musher_proto::job::JobConfig) -> Sim {
    let mut sim = Sim::new(job);
    sim.join("a");
    sim.join("b");
    sim
}

#[test]
fn a_stop_before_anything_was_trained_ends_at_once() {
    for phase in ["waiting for workers", "forming"] {
        let mut sim = two_workers(job());
        sim.until(|sim| sim.phase() == phase);
        sim.tell(Event::StopRequested);
        assert_eq!(sim.phase(), "ended");
        let told: Vec<_> = sim.workers.keys().copied().collect();
        sim.settle_orders();
        assert!(told.iter().all(|s| sim.workers[s].finish == Some(ToWorker::Finish(Finish::Stopped))));
        assert_eq!(sim.run().status, Status::Stopped);
    }
    let mut alone = Sim::new(job());
    alone.tell(Event::StopRequested);
    assert_eq!(alone.outcome.map(|outcome| outcome.status), Some(Status::Stopped));
}

#[test]
fn a_stop_saves_what_was_trained_in_whatever_phase_it_comes() {
    for phase in ["training", "validating", "saving"] {
        let mut sim = two_workers(job());
        sim.until(|sim| sim.phase() == phase);
        sim.tell(Event::StopRequested);
        let status = sim.run().status;
        let steps: usize = sim.committed.values().map(|(_, state)| state.steps.len()).max().unwrap();
        let (expected, expected_steps) = match phase {
            "training" => (Status::Stopped, 1),
            "validating" => (Status::Stopped, 3),
            _ => (Status::Finished(Stopped::EpochLimit), 9),
        };
        assert_eq!((status, steps), (expected, expected_steps), "asked while {phase}");
    }
}

#[test]
fn a_stop_while_the_team_is_broken_saves_the_survivors_state() {
    let mut job = job();
    job.cluster.min_workers = 2;
    let mut sim = two_workers(job);
    sim.until(|sim| sim.phase() == "training");
    sim.settle_orders();
    sim.perform(Move::Step(Generation(1)));
    sim.kill(sim.session_of("b").unwrap());
    sim.settle();
    assert_eq!(sim.phase(), "waiting for workers");
    sim.tell(Event::StopRequested);
    assert_eq!(sim.run().status, Status::Stopped);
    assert_eq!(sim.committed.values().map(|(_, state)| state.steps.len()).collect::<Vec<_>>(), [1]);
}

#[test]
fn a_stop_at_a_state_that_is_durable_already_needs_no_checkpoint() {
    let mut job = job();
    job.checkpoint.every_steps = 2;
    let mut sim = two_workers(job.clone());
    sim.until_event(|event| matches!(event, RunEvent::CheckpointCommitted { .. }));
    let mut sim = sim.resumed(job);
    let a = sim.join("a");
    sim.until(|sim| sim.phase() == "training");
    sim.tell(Event::StopRequested);
    // The worker stops before it has taken a step.
    let state = sim.workers[&a].state.clone().unwrap();
    let report = musher_proto::message::SegmentFinished {
        held: state.label.0,
        paused: true,
        totals: Default::default(),
        state_digest: 1,
    };
    sim.say(a, sim.fences.generation, musher_proto::message::FromWorker::SegmentFinished(report));
    assert_eq!(sim.run().status, Status::Stopped);
}

#[test]
fn a_run_that_was_stopped_in_mid_epoch_goes_on_there() {
    let mut sim = two_workers(job());
    sim.until(|sim| sim.phase() == "training");
    sim.tell(Event::StopRequested);
    sim.run();
    let mut sim = sim.resumed(job());
    assert_eq!(
        sim.events[0],
        RunEvent::RunStarted { term: Term(2), resumed_from: Some(CheckpointId::from("e0001-s00000001")) }
    );
    sim.join("a");
    assert_eq!(sim.run().status, Status::Finished(Stopped::EpochLimit));
    let state = &sim.committed[&"e0003-s00000009".into()].1;
    assert_eq!(state.steps.len(), 9, "no step was lost or taken twice");
    assert!(
        !sim.events.iter().any(|e| matches!(e, RunEvent::EpochStarted { epoch: Epoch(1), .. })),
        "the epoch had begun"
    );
}

#[test]
fn a_run_resumed_at_an_epochs_end_begins_the_next_one() {
    let mut sim = two_workers(job());
    sim.until_event(|event| matches!(event, RunEvent::CheckpointCommitted { .. }));
    let mut sim = sim.resumed(job());
    sim.join("a");
    sim.run();
    let judged: Vec<u32> = sim
        .events
        .iter()
        .filter_map(|e| match e {
            RunEvent::Validated { epoch, .. } => Some(epoch.0),
            _ => None,
        })
        .collect();
    assert_eq!(judged, [2, 3]);
}

#[test]
fn a_finished_run_that_is_resumed_ends_at_once() {
    let mut sim = two_workers(job());
    let first = sim.run();
    let resumed = sim.resumed(job());
    let outcome = resumed.outcome.expect("nobody needs to come");
    assert_eq!((outcome.status, outcome.scores), (first.status, first.scores));
}

#[test]
fn a_finished_run_lingers_until_all_workers_have_left() {
    let mut sim = two_workers(job());
    sim.until(|sim| sim.phase() == "ended");
    assert!(sim.outcome.is_none());
    let ended = sim.now;
    sim.run();
    assert_eq!(sim.now, ended, "they left at once");
}

#[test]
fn a_lost_team_fails_the_run() {
    let mut sim = two_workers(job());
    sim.tell(Event::TeamLost { reason: "all workers were ended".into() });
    assert_eq!(sim.run().status, Status::Failed { reason: "all workers were ended".into() });
}
