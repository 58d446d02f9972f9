//! The team's size is no parameter of the training: with batch norm's statistics frozen, any team takes
//! the same steps, up to the order in which floats are summed.

use musher_proto::job::{JobConfig, Schedule};

use crate::harness::{Pets, Team, deviation, job};

const TOLERANCE: f64 = 1e-4;

/// Trains teams of one to four alike and compares their losses, and the first with `expected`.
fn assert_alike(what: &str, job: &JobConfig, epochs: u32, expected: Option<&[f64]>) -> Vec<f64> {
    let pets = Pets::drawn();
    let mut alone = None;
    for world in 1..=4 {
        let found = Team::seeded(&pets, job, world).train_epochs(&pets, 1..=epochs);
        let expected = expected.or(alone.as_deref()).unwrap_or(&found);
        let deviation = deviation(&found, expected);
        println!("{what}, {world} of them, {} steps: losses deviate by {deviation:.1e}", found.len());
        assert!(deviation < TOLERANCE, "{found:?} is not {expected:?}");
        alone.get_or_insert(found);
    }
    let alone = alone.unwrap();
    assert!(alone[alone.len() - 3..].iter().sum::<f64>() < 0.9 * alone[..3].iter().sum::<f64>(), "{alone:?}");
    alone
}

#[test]
fn uneven_shares() {
    let losses = assert_alike("workers", &job(), 4, None);
    assert_eq!(losses.len(), 20);
}

/// Three samples a step for four workers, and in an epoch's last step two.
#[test]
fn empty_shares() {
    let mut job = job();
    job.train.global_batch = 3;
    let losses = assert_alike("workers with empty shares", &job, 3, None);
    assert_eq!(losses.len(), 24);
}

#[test]
fn micro_batches_clipping_and_a_schedule() {
    let mut job = job();
    job.train.clip_norm = 0.5;
    job.train.schedule = Schedule::Cosine;
    let pets = Pets::drawn();
    let whole = Team::seeded(&pets, &job, 1).train_epochs(&pets, 1..=4);

    job.train.micro_batch = 2;
    let found = assert_alike("workers with micro-batches", &job, 4, Some(&whole));

    job.train.clip_norm = 0.0;
    let unclipped = Team::seeded(&pets, &job, 1).train_epochs(&pets, 1..=1);
    assert!(deviation(&unclipped, &found[..unclipped.len()]) > TOLERANCE, "nothing was clipped");
}
