//! Checkpoints: when they are taken, what they wait for, and what their failure means.

use musher_proto::{
    ids::{Epoch, Generation, Step},
    message::{PartHeader, PartKind},
};

use super::sim::{Move, Sim, job};
use crate::core::{Action, Event, RunEvent, Status, Stopped};

fn two_workers(job: musher_proto::job::JobConfig) -> Sim {
    let mut sim = Sim::new(job);
    sim.join("a");
    sim.join("b");
    sim
}

/// All but what leads to the store goes on.
fn train_without_store(sim: &mut Sim, done: impl Fn(&Sim) -> bool) {
    for _ in 0..500 {
        if done(sim) {
            return;
        }
        match sim.moves().into_iter().find(|step| !matches!(step, Move::Store(_))) {
            Some(step) => sim.perform(step),
            None => sim.advance(std::time::Duration::from_secs(1)),
        }
    }
    panic!("it never came to it, in {}", sim.phase());
}

fn committed(sim: &Sim) -> Vec<&str> {
    sim.committed.keys().map(|id| id.as_str()).collect()
}

#[test]
fn training_goes_on_while_parts_are_on_their_way_but_the_next_checkpoint_waits() {
    let mut sim = two_workers(job());
    train_without_store(&mut sim, |sim| sim.phase() == "saving");
    assert!(sim.events.iter().any(|event| matches!(event, RunEvent::Validated { epoch: Epoch(2), .. })));
    assert_eq!(sim.uploads(), 3, "two slices and the weights of the first checkpoint alone");
    assert!(sim.committed.is_empty());
    sim.until(|sim| sim.committed.len() == 2);
    assert_eq!(committed(&sim), ["e0001-s00000003", "e0002-s00000006"]);
    assert_eq!(sim.run().status, Status::Finished(Stopped::EpochLimit));
}

#[test]
fn a_part_with_another_label_abandons_the_checkpoint_and_training_goes_on() {
    let mut sim = two_workers(job());
    train_without_store(&mut sim, |sim| sim.uploads() == 3);
    let header = PartHeader {
        term: sim.fences.term,
        worker: "a".into(),
        checkpoint: "e0001-s00000003".into(),
        lineage: Generation(1),
        applied: Step(4),
        kind: PartKind::State { offset: 0, digest: 0 },
        length: 20,
        stall_ms: 0.0,
    };
    // Of one from whom nothing is awaited, it is nobody's business.
    let of_a_stranger = PartHeader { worker: "c".into(), ..header.clone() };
    let told = sim.events.len();
    sim.tell(Event::PartStored { header: of_a_stranger.clone() });
    sim.tell(Event::PartFailed { header: of_a_stranger, reason: "no space left".into() });
    assert_eq!(sim.events.len(), told);
    sim.tell(Event::PartStored { header });
    assert!(
        matches!(sim.events.last(), Some(RunEvent::CheckpointFailed { reason, .. }) if reason.contains("after step 4"))
    );
    assert!(sim.actions.contains(&Action::AbandonCheckpoint { checkpoint: "e0001-s00000003".into() }));
    assert_eq!(sim.run().status, Status::Finished(Stopped::EpochLimit));
    assert_eq!(committed(&sim), ["e0002-s00000006", "e0003-s00000009"]);
}

#[test]
fn the_last_checkpoints_failure_fails_the_run() {
    let mut sim = two_workers(job());
    sim.until_event(|event| matches!(event, RunEvent::Validated { epoch: Epoch(3), .. }));
    sim.until(|sim| sim.uploads() > 0);
    sim.lose_upload(0);
    let Status::Failed { reason } = sim.run().status else { panic!("it fails") };
    assert_eq!(reason, "the last checkpoint, e0003-s00000009, could not be written: no space left");
}

#[test]
fn a_checkpoint_that_waited_is_taken_though_the_one_before_it_failed() {
    let mut sim = two_workers(job());
    train_without_store(&mut sim, |sim| sim.phase() == "saving");
    sim.lose_upload(0);
    sim.until(|sim| sim.committed.len() == 1);
    assert_eq!(committed(&sim), ["e0002-s00000006"]);
}

#[test]
fn every_so_many_steps_a_segment_ends_and_training_goes_on_from_there() {
    let mut job = job();
    (job.checkpoint.every_steps, job.checkpoint.every_epochs) = (2, 0);
    let mut sim = two_workers(job);
    sim.run();
    // Steps 3, 6 and 9 end an epoch; each is the best so far.
    let steps: Vec<u64> = sim.committed.values().map(|(commit, _)| commit.position.applied.0).collect();
    assert_eq!(steps, [2, 3, 4, 6, 8, 9]);
    let cursors: Vec<u64> = sim.committed.values().map(|(commit, _)| commit.position.cursor).collect();
    assert_eq!(cursors, [6, 7, 3, 7, 6, 7]);
}

#[test]
fn a_step_interval_that_falls_on_an_epochs_end_is_kept_to() {
    let mut job = job();
    (job.checkpoint.every_steps, job.checkpoint.every_epochs) = (3, 0);
    let mut sim = two_workers(job);
    sim.curve = vec![0.5, 0.9];
    sim.run();
    assert_eq!(committed(&sim), ["e0001-s00000003", "e0002-s00000006", "e0003-s00000009"]);
}

#[test]
fn weights_come_with_the_best_and_the_last_alone() {
    let mut job = job();
    job.train.epochs = 4;
    let mut sim = two_workers(job);
    sim.curve = vec![0.5, 0.4, 0.9];
    sim.run();
    let best: Vec<bool> = sim.committed.values().map(|(commit, _)| commit.is_best).collect();
    let last: Vec<bool> = sim.committed.values().map(|(commit, _)| commit.is_last).collect();
    assert_eq!((best, last), (vec![true, true, false, false], vec![false, false, false, true]));
}

#[test]
fn what_a_lost_worker_owed_abandons_the_checkpoint_and_late_parts_of_it_do_no_harm() {
    let mut sim = two_workers(job());
    sim.until_event(|event| matches!(event, RunEvent::Validated { epoch: Epoch(3), .. }));
    train_without_store(&mut sim, |sim| sim.uploads() == 3);
    let b = sim.session_of("b").unwrap();
    sim.kill(b);
    sim.perform(Move::Close(b));
    assert!(
        matches!(sim.events.last(), Some(RunEvent::CheckpointFailed { reason, .. }) if reason.contains("worker b left"))
    );
    // It is taken again, under the same name, before the first attempt's parts are heard of.
    train_without_store(&mut sim, |sim| sim.uploads() == 4 && sim.phase() == "saving");
    assert_eq!(sim.run().status, Status::Finished(Stopped::EpochLimit));
    assert_eq!(sim.committed[&"e0003-s00000009".into()].0.position.lineage, Generation(2));
    let judged = sim.events.iter().filter(|event| matches!(event, RunEvent::Validated { .. })).count();
    assert_eq!(judged, 3);
}
