//! The team's size is no parameter of the training: with batch norm's statistics frozen, any team takes
//! the same steps, up to the order in which floats are summed.

use std::{collections::BTreeMap, ops::RangeInclusive};

use musher_proto::{
    job::{JobConfig, Schedule},
    message::Train,
};
use musher_worker::train::Source;

use safetensors::SafeTensors;

use crate::harness::{GLOBAL_BATCH, Pets, Team, Worker, deviation, job, job_with_batch_norm};

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

/// Shares of a weighted loss add up, also those without samples, as each sample's Dice term is its own.
#[test]
fn a_weighted_loss_with_dice() {
    let mut job = job();
    job.train.global_batch = 3;
    job.train.class_weights = vec![0.5, 1.0, 3.0];
    job.train.dice_weight = 1.0;
    let pets = Pets::drawn();
    let whole = Team::started(&pets, &job, 1).train_epochs(&pets, [1]);
    job.train.micro_batch = 1;
    assert_alike("workers with Dice", &job, 1..=1, Some(&whole));

    job.train.class_weights.clear();
    let unweighted = Team::started(&pets, &job, 1).train_epochs(&pets, [1]);
    assert!(deviation(&unweighted, &whole) > 100.0 * TOLERANCE, "the weights made no difference");
}

/// The warm-up ends in the midst of an epoch; the encoder has a rate of its own.
#[test]
fn a_warm_up_and_two_rates() {
    let mut job = job();
    job.train.warmup_epochs = 0.6;
    job.train.encoder_learning_rate = 0.2 * job.train.learning_rate;
    assert_alike("workers that warm up", &job, 1..=2, None);
}

#[test]
fn a_frozen_encoder() {
    let mut job = job();
    job.model.freeze_encoder = true;
    assert_alike("workers with a frozen encoder", &job, 1..=2, None);
}

/// To the bit, batch norm's statistics included; the decoder's move.
#[test]
fn a_frozen_encoder_stays_as_it_is() {
    let mut job = job_with_batch_norm();
    job.model.freeze_encoder = true;
    let pets = Pets::drawn();
    let mut team = Team::started(&pets, &job, 2);
    let weights = |team: &Team| team.0[0].trainer.weights(&BTreeMap::new()).unwrap();
    let before = weights(&team);
    team.train(pets.epoch(1));
    let after = weights(&team);
    let (before, after) =
        (SafeTensors::deserialize(&before).unwrap(), SafeTensors::deserialize(&after).unwrap());
    for (name, tensor) in before.iter() {
        let stays = !name.starts_with("decoder.") && !name.starts_with("head.");
        let stayed = tensor.data() == after.tensor(name).unwrap().data();
        assert_eq!(stayed, stays, "{name}");
    }
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
