//! Wherever a team stands between two steps, its ranks hold the same bits; and a team that does the same
//! again holds the same bits again.

use musher_collective::Phase;
use musher_proto::message::Train;
use musher_worker::train::{Source, StopFlag};

use crate::{
    fault::{At, Fault},
    harness::{GLOBAL_BATCH, Pets, STEPS_PER_EPOCH, Team, Worker, agreed, bits, job, job_with_batch_norm},
};

/// The digest of a checkpoint as the coordinator forms it.
fn digest_of_parts(team: &mut Team) -> u64 {
    let parts = team.snapshots();
    agreed(parts.iter().map(|part| part.held));
    parts.iter().fold(0, |sum, part| sum.wrapping_add(part.digest()))
}

/// Batch norm's statistics follow each rank's own share, until they are pooled at the segment's end.
#[test]
fn all_ranks_hold_one_digest_after_each_segment() {
    let pets = Pets::drawn();
    let mut team = Team::started(&pets, &job_with_batch_norm(), 3);
    let (epoch, half) = (pets.epoch(1), 2 * GLOBAL_BATCH);
    // `Team::train` and `Team::sync` compare the ranks.
    let first = team.train(Train { end: half, ..epoch });
    assert_eq!(digest_of_parts(&mut team), first.state_digest);
    let second = team.train(Train { cursor: half, ..epoch });
    assert_eq!(digest_of_parts(&mut team), second.state_digest);
    assert_ne!(first.state_digest, second.state_digest);

    let mut team = Team::form(2, team.0);
    let synced = team.sync(1, || Source::Held);
    assert_eq!(synced.state_digest, second.state_digest);
    assert_eq!(digest_of_parts(&mut team), second.state_digest);
}

#[test]
fn the_same_team_twice_has_the_same_bits() {
    let pets = Pets::drawn();
    for job in [job(), job_with_batch_norm()] {
        let run = || {
            let mut team = Team::seeded(&pets, &job, 3);
            let losses = team.train_epochs(&pets, 1..=2);
            (bits(&losses), team.0[0].digest())
        };
        assert_eq!(run(), run());
    }
}

/// Not even the statistics, which are pooled already.
#[test]
fn a_segment_without_steps_changes_nothing() {
    let pets = Pets::drawn();
    let mut team = Team::started(&pets, &job_with_batch_norm(), 2);
    let end = team.train(pets.epoch(1));
    let again = team.train(Train { cursor: pets.epoch(1).end, ..pets.epoch(1) });
    assert_eq!(again, end);
}

/// Means and second moments of the ranks, each weighing as the samples that it saw.
#[test]
fn pooled_statistics_are_those_of_all_samples() {
    let pets = Pets::drawn();
    let mut team = Team::started(&pets, &job_with_batch_norm(), 3);
    team.train(pets.epoch(1));
    let pooled = team.0[0].statistics();

    let mut team = Team::started(&pets, &job_with_batch_norm(), 3);
    let before_pooling = At { phase: Phase::BatchNorm, step: STEPS_PER_EPOCH as u64, bucket: 0 };
    team.0[0].goes_wrong(before_pooling, Fault::GoneBefore);
    team.each(|worker| worker.train(pets.epoch(1), &StopFlag::default(), |_| ()).unwrap_err());
    let own: Vec<_> = team.0.iter().map(Worker::statistics).collect();

    // Of four steps of five samples and one of three.
    let weights = [5.0, 9.0, 9.0].map(|samples| samples / 23.0);
    let mean_of = |moment: &dyn Fn(&[f32]) -> f64| -> f64 {
        weights.iter().zip(&own).map(|(weight, own)| weight * moment(own)).sum()
    };
    let channels = pooled.len() / 2;
    for channel in 0..channels {
        let variance = channels + channel;
        let mean = mean_of(&|own| own[channel].into());
        let second = mean_of(&|own| f64::from(own[variance]) + f64::from(own[channel]).powi(2));
        assert!((f64::from(pooled[channel]) - mean).abs() < 1e-6 * (1.0 + mean.abs()));
        assert!((f64::from(pooled[variance]) - (second - mean * mean)).abs() < 1e-6 * (1.0 + second));
    }
}
