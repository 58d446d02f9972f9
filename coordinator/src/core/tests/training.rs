//! The happy path, and what the replicas' reports decide.

use musher_proto::{
    ids::{Epoch, Generation, Step},
    message::{
        EpochTotals, FromWorker, Phase as WorkerPhase, Progress, ReplicaLabel, SegmentFinished, Validated,
    },
};

use super::sim::{Sim, heartbeat, job};
use crate::core::{Action, RunEvent, Status, Stopped};

fn sim_of(workers: u32, job: musher_proto::job::JobConfig) -> Sim {
    let mut sim = Sim::new(job);
    for name in ["a", "b", "c", "d"].iter().take(workers as usize) {
        sim.join(name);
    }
    sim
}

#[test]
fn one_to_four_workers_train_to_the_epoch_limit() {
    for workers in 1..=4 {
        let mut sim = sim_of(workers, job());
        let outcome = sim.run();
        assert_eq!(outcome.status, Status::Finished(Stopped::EpochLimit));
        assert_eq!((outcome.epochs, outcome.best_epoch), (Epoch(3), Some(Epoch(3))));
        assert_eq!(outcome.scores.unwrap().samples, 4);
        let told: Vec<String> = sim.events.iter().map(name).collect();
        let epoch = ["epoch_started", "epoch_finished", "validated"];
        let mut expected = vec!["run_started", "waiting_for_workers"];
        expected.extend(vec!["worker_joined"; workers as usize]);
        expected.extend(["team_connected", "generation_formed"]);
        expected.extend(epoch);
        expected.push("epoch_started");
        // The first checkpoint becomes durable while the second epoch trains.
        expected.extend(["checkpoint_committed", "epoch_finished", "validated"]);
        expected.push("epoch_started");
        expected.extend(["checkpoint_committed", "epoch_finished", "validated"]);
        expected.extend(["checkpoint_committed", "run_finished"]);
        assert_eq!(told, expected);
        let pictures =
            sim.actions.iter().filter(|action| matches!(action, Action::WriteSamples { .. })).count();
        assert_eq!(pictures, 3);
    }
}

/// A step that was skipped may have no loss to tell of, or be told of late, when its epoch is over.
#[test]
fn a_skipped_step_is_told_where_no_progress_is() {
    let mut sim = sim_of(1, job());
    sim.until_event(|event| matches!(event, RunEvent::EpochStarted { epoch: Epoch(2), .. }));
    let (session, generation) = (sim.session_of("a").unwrap(), sim.live_generation());
    let told = sim.events.len();
    for (epoch, steps_skipped) in [(1, 1), (2, 1)] {
        let (phase, epoch) = (WorkerPhase::Training, Epoch(epoch));
        let report = Progress { phase, epoch, steps_skipped, ..heartbeat() };
        sim.say(session, generation, FromWorker::Progress(report));
    }
    let skipped: Vec<_> = sim.events[told..]
        .iter()
        .filter_map(|event| match event {
            RunEvent::StepSkipped { epoch, in_epoch, .. } => Some((epoch.0, *in_epoch)),
            _ => None,
        })
        .collect();
    assert_eq!(skipped, [(1, 1), (2, 1)]);
    assert!(!sim.events[told..].iter().any(|event| matches!(event, RunEvent::Progress(_))));
}

fn name(event: &RunEvent) -> String {
    match event {
        RunEvent::RunStarted { .. } => "run_started",
        RunEvent::WaitingForWorkers { .. } => "waiting_for_workers",
        RunEvent::WorkerJoined { .. } => "worker_joined",
        RunEvent::TeamConnected { .. } => "team_connected",
        RunEvent::GenerationFormed { .. } => "generation_formed",
        RunEvent::EpochStarted { .. } => "epoch_started",
        RunEvent::EpochFinished { .. } => "epoch_finished",
        RunEvent::Validated { .. } => "validated",
        RunEvent::CheckpointCommitted { .. } => "checkpoint_committed",
        RunEvent::RunFinished { .. } => "run_finished",
        other => return format!("{other:?}"),
    }
    .into()
}

#[test]
fn patience_ends_the_run_early_with_the_best_epochs_scores() {
    let mut job = job();
    job.train.epochs = 50;
    job.early_stopping.patience = 2;
    let mut sim = sim_of(2, job);
    sim.curve = vec![0.9, 0.5, 0.6, 0.7];
    let outcome = sim.run();
    assert_eq!(outcome.status, Status::Finished(Stopped::Early));
    assert_eq!((outcome.epochs, outcome.best_epoch), (Epoch(4), Some(Epoch(2))));
    assert!((outcome.scores.unwrap().loss - 0.5).abs() < 1e-12);
    assert!(sim.events.contains(&RunEvent::EarlyStopped { epoch: Epoch(4), best_epoch: Epoch(2) }));
    let (last, _) = &sim.committed[&"e0004-s00000012".into()];
    assert!(last.is_last && !last.is_best);
    assert_eq!(last.progress.saved_best.as_ref().unwrap().checkpoint, "e0002-s00000006".into());
}

#[test]
fn a_run_too_short_to_be_judged_has_its_last_weights_for_a_result() {
    let mut job = job();
    job.train.epochs = 2;
    job.early_stopping.start_from_epoch = 2;
    let mut sim = sim_of(2, job);
    sim.curve = vec![0.5, 0.9];
    let outcome = sim.run();
    assert_eq!((outcome.epochs, outcome.best_epoch), (Epoch(2), Some(Epoch(2))));
    assert!((outcome.scores.unwrap().loss - 0.9).abs() < 1e-12);
    let best: Vec<bool> = sim.committed.values().map(|(commit, _)| commit.is_best).collect();
    assert_eq!(best, [false, true]);
}

#[test]
fn without_restore_best_the_last_epochs_scores_are_the_result() {
    let mut job = job();
    job.early_stopping.restore_best = false;
    let mut sim = sim_of(1, job);
    sim.curve = vec![0.5, 0.9, 0.8];
    let outcome = sim.run();
    assert!((outcome.scores.unwrap().loss - 0.8).abs() < 1e-12);
    assert_eq!(outcome.best_epoch, Some(Epoch(1)));
}

#[test]
fn states_that_differ_after_a_segment_fail_the_run() {
    let mut sim = sim_of(2, job());
    sim.until(|sim| sim.phase() == "training");
    let held = ReplicaLabel { lineage: Generation(1), applied: Step(3), epoch: Epoch(1), cursor: 7 };
    for (session, state_digest) in sim.members(Generation(1)).into_iter().zip([1, 2]) {
        let report = SegmentFinished { held, paused: false, totals: EpochTotals::default(), state_digest };
        sim.say(session, Generation(1), FromWorker::SegmentFinished(report));
    }
    let Status::Failed { reason } = sim.run().status else { panic!("it fails") };
    assert!(reason.starts_with("after step 3 rank 1 holds another state than rank 0"), "{reason}");
}

#[test]
fn a_missing_validation_unit_breaks_the_generation_and_the_epoch_is_validated_again() {
    let mut sim = sim_of(2, job());
    sim.until(|sim| sim.phase() == "validating");
    let digest = sim.events.iter().find_map(|event| match event {
        RunEvent::EpochFinished { state_digest, .. } => Some(*state_digest),
        _ => None,
    });
    for session in sim.members(Generation(1)) {
        let report =
            Validated { epoch: Epoch(1), state_digest: digest.unwrap(), units: vec![], samples_png: vec![] };
        sim.say(session, Generation(1), FromWorker::Validated(report));
    }
    assert!(
        matches!(sim.events.last(), Some(RunEvent::GenerationAborted { cause, .. }) if cause.to_string().contains("0 units of 2"))
    );
    sim.run();
    let count = |wanted: &str| sim.events.iter().filter(|event| name(event) == wanted).count();
    assert_eq!((count("epoch_finished"), count("validated")), (3, 3));
}

#[test]
fn a_worker_whose_failure_any_other_would_share_ends_the_run() {
    let mut sim = sim_of(1, job());
    sim.until(|sim| sim.phase() == "training");
    let session = sim.session_of("a").unwrap();
    let failed = musher_proto::message::Failed { reason: "no such class".into(), any_worker: true };
    sim.say(session, Generation(0), FromWorker::Failed(failed));
    assert_eq!(sim.run().status, Status::Failed { reason: "worker a: no such class".into() });
}
