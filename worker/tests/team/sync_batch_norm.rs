//! Batch norm over the batches of all ranks: the team's size is no parameter of the training, though batch norm
//! normalises by the batch.

use std::time::Instant;

use musher_collective::Phase;
use musher_proto::job::JobConfig;
use musher_worker::train::{Source, StopFlag};

use crate::{
    fault::{At, Fault},
    harness::{PATIENCE, Pets, Team, Worker, agreed, can_sum_in_backward, deviation, job_with_batch_norm},
};

const TOLERANCE: f64 = 1e-5;

fn job() -> JobConfig {
    let mut job = job_with_batch_norm();
    job.model.sync_batch_norm = true;
    // Batch norm magnifies the order of summation with each step.
    job.train.learning_rate = 1e-4;
    job
}

/// Teams of one to three take the same steps, to the same statistics.
fn assert_alike(what: &str, job: &JobConfig) -> Vec<f64> {
    let pets = Pets::drawn();
    let runs = [1, 2, 3].map(|world| {
        let mut team = Team::started(&pets, job, world);
        let losses = team.train_epochs(&pets, [1]);
        agreed(team.0.iter().map(Worker::digest));
        (losses, team.0[0].statistics())
    });
    for (losses, statistics) in &runs[1..] {
        let deviation = deviation(losses, &runs[0].0);
        let apart = |(a, b): (&f32, &f32)| f64::from((a - b).abs() / b.abs().max(1.0));
        let statistics = statistics.iter().zip(&runs[0].1).map(apart).fold(0.0, f64::max);
        println!("{what}: losses deviate by {deviation:.1e}, statistics by {statistics:.1e}");
        assert!(deviation < TOLERANCE && statistics < TOLERANCE, "{losses:?} is not {:?}", runs[0].0);
    }
    runs.into_iter().next().unwrap().0
}

#[test]
fn uneven_shares() {
    if !can_sum_in_backward() {
        return;
    }
    let losses = assert_alike("uneven shares", &job());

    // The ring of one computes what the plain layer does.
    let pets = Pets::drawn();
    let mut plain = job();
    plain.model.sync_batch_norm = false;
    let alone = Team::started(&pets, &plain, 1).train_epochs(&pets, [1]);
    assert!(deviation(&losses, &alone) < TOLERANCE, "{losses:?} is not {alone:?}");
    let apart = Team::started(&pets, &plain, 3).train_epochs(&pets, [1]);
    assert!(deviation(&apart, &alone) > 100.0 * TOLERANCE, "batch norm over shares is another");
}

/// Two samples a step, and in the epoch's last one.
#[test]
fn empty_shares() {
    if !can_sum_in_backward() {
        return;
    }
    let mut job = job();
    job.train.global_batch = 2;
    assert_alike("empty shares", &job);
}

/// A rank with one sample fewer takes part in a pass for which it has none.
#[test]
fn micro_batches() {
    if !can_sum_in_backward() {
        return;
    }
    let mut job = job();
    job.train.micro_batch = 1;
    let pets = Pets::drawn();
    let mut team = Team::started(&pets, &job, 3);
    assert!(team.train_epochs(&pets, [1]).iter().all(|loss| loss.is_finite()));
}

/// In the midst of forward, and in the midst of backward while buckets are summed.
#[test]
fn a_rank_that_is_gone_ends_the_step_without_a_trace() {
    if !can_sum_in_backward() {
        return;
    }
    let pets = Pets::drawn();
    let order = pets.epoch(1);
    for call in [40, 41] {
        let mut workers = Worker::new_team(&pets, &job(), 3);
        let at = At { phase: Phase::SyncBatchNorm, step: 2, bucket: call };
        workers[1].batch_norm_goes_wrong = Some((at, Fault::GoneBefore));
        let mut team = Team::form(1, workers);
        team.sync(0, || Source::Seeded);
        let started = Instant::now();
        let errors = team.each(|worker| worker.train(order, &StopFlag::default(), |_| ()).unwrap_err());
        assert!(started.elapsed() < PATIENCE / 2, "nobody waits for a peer that is gone");
        assert!(errors.iter().all(|error| error.ends_generation_only()), "{errors:?}");
        assert_eq!(agreed(team.0.iter().map(|worker| worker.trainer.position().applied.0)), 2);
        let held = agreed(team.0.iter().map(Worker::tensor_digest));

        let mut undisturbed = Team::seeded(&pets, &job(), 3);
        undisturbed.train(musher_proto::message::Train { end: 10, ..order });
        assert_eq!(held, undisturbed.0[0].tensor_digest(), "call {call}");
    }
}
