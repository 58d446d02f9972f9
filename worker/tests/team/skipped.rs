//! Steps whose gradient is not finite.

use musher_collective::Phase;
use musher_proto::message::Train;
use musher_worker::train::{StopFlag, TrainError};

use crate::{
    fault::{At, Fault},
    harness::{GLOBAL_BATCH, Pets, Team, Worker, agreed, job, job_with_batch_norm},
};

/// The gradient of a single rank overflows in step 2: all skip the step, and none keeps a trace of it.
#[test]
fn all_ranks_skip_the_step_of_one_ranks_overflow() {
    let pets = Pets::drawn();
    let order = pets.epoch(1);
    let mut team = Team::started(&pets, &job_with_batch_norm(), 3);
    team.0[1].goes_wrong(At { phase: Phase::Gradients, step: 2, bucket: 0 }, Fault::Overflow);
    team.train(Train { end: 2 * GLOBAL_BATCH, ..order });
    let before = agreed(team.0.iter().map(Worker::tensor_digest));
    let adam_steps = team.0[0].trainer.replica().adam_steps();

    let skipped = team.train(Train { cursor: 2 * GLOBAL_BATCH, end: 3 * GLOBAL_BATCH, ..order });
    assert_eq!(skipped.totals.steps_skipped, 1);
    assert_eq!((skipped.held.applied.0, skipped.held.cursor), (3, 3 * GLOBAL_BATCH));
    assert_eq!(agreed(team.0.iter().map(Worker::tensor_digest)), before);
    assert_eq!(agreed(team.0.iter().map(|w| w.trainer.replica().adam_steps())), adam_steps);

    let mut newcomers = Team::resumed(&pets, &job_with_batch_norm(), 3, &team.0[0].state());
    let end = team.train(Train { cursor: 3 * GLOBAL_BATCH, ..order });
    assert_eq!(newcomers.train(Train { cursor: 3 * GLOBAL_BATCH, ..order }), end);
    assert_eq!(end.totals.steps_skipped, 1);
    assert!(end.totals.loss_sum.is_finite());
    assert_ne!(team.0[0].tensor_digest(), before);
    assert_eq!(agreed(team.0.iter().map(|w| w.trainer.replica().adam_steps())), adam_steps + 2);
    let next = team.train(pets.epoch(2));
    assert_eq!(next.totals.steps_skipped, 0, "each epoch counts its own");
}

/// The first step throws the parameters as far as floats go; no later one has a finite gradient.
#[test]
fn a_rate_beyond_reason_fails_the_run_after_twenty_steps() {
    let pets = Pets::drawn();
    let mut job = job();
    job.train.learning_rate = 1e37;
    job.train.global_batch = 2;
    let mut team = Team::started(&pets, &job, 2);
    // Its losses are NaN, so ends cannot be compared whole.
    let ends = team.each(|w| w.train(pets.epoch(1), &StopFlag::default(), |_| ()).unwrap());
    assert_eq!(agreed(ends.iter().map(|end| (end.held, end.totals.steps_skipped))).1, 11);
    assert_eq!(agreed(ends.iter().map(|end| end.state_digest)), team.0[0].digest());
    let before = agreed(team.0.iter().map(Worker::tensor_digest));

    let errors = team.each(|w| w.train(pets.epoch(2), &StopFlag::default(), |_| ()).unwrap_err());
    for error in &errors {
        assert!(matches!(error, TrainError::NotFinite(20)), "{error}");
        assert!(error.any_worker() && !error.ends_generation_only());
    }
    assert_eq!(agreed(team.0.iter().map(Worker::tensor_digest)), before);
    assert_eq!(agreed(team.0.iter().map(|worker| worker.trainer.position().applied.0)), 21);
}
