//! The team's size is no parameter of the training: with batch norm's statistics frozen, any team takes
//! the same steps, up to the order in which floats are summed.

use std::ops::RangeInclusive;

use musher_proto::{
    job::{JobConfig, Schedule},
    message::Train,
};
use musher_worker::train::Source;

use crate::harness::{GLOBAL_BATCH, Pets, Team, Worker, deviation, job};

const TOLERANCE: f64 = 1e-5;

/// Trains teams of one to four alike, and compares their losses with `expected` or else the first one's.
fn assert_alike(
    what: &str,
    job: &JobConfig,
    epochs: RangeInclusive<u32>,
    expected: Option<&[f64]>,
) -> Vec<f64> {
    let pets = Pets::drawn();
    let mut alone = None;
    for world in 1..=4 {
        let found = Team::started(&pets, job, world).train_epochs(&pets, epochs.clone());
        let expected = expected.or(alone.as_deref()).unwrap_or(&found);
        let deviation = deviation(&found, expected);
        println!("{what}, {world} of them, {} steps: losses deviate by {deviation:.1e}", found.len());
        assert!(deviation < TOLERANCE, "{found:?} is not {expected:?}");
        alone.get_or_insert(found);
    }
    alone.unwrap()
}

#[test]
fn uneven_shares() {
    let losses = assert_alike("workers", &job(), 1..=4, None);
    assert_eq!(losses.len(), 20);
}

/// Three samples a step for four workers, and in an epoch's last step two.
#[test]
fn empty_shares() {
    let mut job = job();
    job.train.global_batch = 3;
    let losses = assert_alike("workers with empty shares", &job, 1..=3, None);
    assert_eq!(losses.len(), 24);
}

#[test]
fn micro_batches_clipping_and_a_schedule() {
    let mut job = job();
    job.train.clip_norm = 0.5;
    job.train.schedule = Schedule::Cosine;
    let pets = Pets::drawn();
    let whole = Team::started(&pets, &job, 1).train_epochs(&pets, 1..=4);

    job.train.micro_batch = 2;
    let found = assert_alike("workers with micro-batches", &job, 1..=4, Some(&whole));

    job.train.clip_norm = 0.0;
    let unclipped = Team::started(&pets, &job, 1).train_epochs(&pets, [1]);
    assert!(deviation(&unclipped, &found[..unclipped.len()]) > TOLERANCE, "nothing was clipped");
}

/// One member more, or fewer, at each step.
#[test]
fn teams_that_grow_and_shrink_within_an_epoch() {
    let pets = Pets::drawn();
    let expected = Team::started(&pets, &job(), 1).train_epochs(&pets, [1]);
    let mut workers = Team::started(&pets, &job(), 1).0;
    let mut found = Vec::new();
    for (step, world) in [3, 2, 4, 1, 3].into_iter().enumerate() {
        workers.resize_with(world, || Worker::new(&pets, &job()));
        let mut team = Team::form(2 + step as u64, workers);
        let cursor = team.sync(0, || Source::Held).held.cursor;
        let whole = pets.epoch(1);
        let end = team.train(Train { cursor, end: whole.end.min(cursor + GLOBAL_BATCH), ..whole });
        assert_eq!(end.held.applied.0, 1 + step as u64);
        found.extend(&team.0[0].losses);
        workers = team.0;
    }
    assert!(deviation(&found, &expected) < TOLERANCE, "{found:?} is not {expected:?}");
}

#[test]
fn real_photographs() {
    let Some(pets) = Pets::real() else { return };
    let mut job = job();
    job.train.global_batch = 16;
    let order = Train { end: 64, ..pets.epoch(1) };
    let losses = [1, 3].map(|world| {
        let mut team = Team::started(&pets, &job, world);
        team.train(order);
        team.0.remove(0).losses
    });
    let deviation = deviation(&losses[1], &losses[0]);
    println!("photographs, 3 workers: losses of 4 steps deviate by {deviation:.1e}");
    assert!(deviation < TOLERANCE, "{losses:?}");
}
