//! A device works on a step while the host prepares the next, and sees the outcome only then: nothing that a team
//! computes or decides depends on it.

use musher_collective::Phase;
use musher_proto::{
    job::{Compression, JobConfig},
    message::Train,
};
use musher_worker::train::StopFlag;

use crate::{
    fault::{At, Fault},
    harness::{GLOBAL_BATCH, Pets, Team, Worker, agreed, bits, can_sum_in_backward, job_with_batch_norm},
};

/// Which of three ranks look late.
const WHO: [[bool; 3]; 3] = [[false; 3], [true; 3], [true, false, true]];

fn team(pets: &Pets, who: [bool; 3], change: impl FnOnce(&mut JobConfig)) -> Team {
    let mut job = job_with_batch_norm();
    change(&mut job);
    let mut team = Team::started(pets, &job, 3);
    for (worker, late) in team.0.iter_mut().zip(who) {
        worker.trainer.looks_late = late;
    }
    team
}

#[test]
fn the_steps_are_the_same_bits() {
    let pets = Pets::drawn();
    for change in [
        |_: &mut JobConfig| (),
        |job: &mut JobConfig| job.train.clip_norm = 0.5,
        |job: &mut JobConfig| job.train.compress_gradients = Compression::Bf16,
        |job: &mut JobConfig| job.model.sync_batch_norm = can_sum_in_backward(),
    ] {
        let ran = WHO.map(|who| {
            let mut team = team(&pets, who, change);
            let losses = bits(&team.train_epochs(&pets, 1..3));
            (losses, agreed(team.0.iter().map(Worker::digest)))
        });
        agreed(ran);
    }
}

/// Over a step without a finite gradient too, which is none of Adam's.
#[test]
fn a_skipped_step_is_skipped_by_all() {
    let pets = Pets::drawn();
    let ran = WHO.map(|who| {
        let mut team = team(&pets, who, |_| ());
        team.0[1].goes_wrong(At { phase: Phase::Gradients, step: 1, bucket: 0 }, Fault::Overflow);
        let end = team.train(pets.epoch(1));
        assert_eq!(end.totals.steps_skipped, 1);
        assert_eq!(agreed(team.0.iter().map(|w| w.trainer.replica().adam_steps())), 4);
        (end.state_digest, bits(&team.0[0].losses))
    });
    agreed(ran);
}

/// The step that carries the wish is the last one on all ranks, though some have begun the next.
#[test]
fn a_wish_to_stop_ends_the_segment_after_the_same_step() {
    let pets = Pets::drawn();
    for who in WHO {
        let mut team = team(&pets, who, |_| ());
        let stop = StopFlag::default();
        let ends = team.each(|worker| {
            let wants = worker.rank() == 0;
            let none = StopFlag::default();
            let flag = if wants { &stop } else { &none };
            let raise = |steps| {
                if wants && steps == 1 {
                    stop.raise();
                }
            };
            worker.train(pets.epoch(1), flag, raise).unwrap()
        });
        let end = agreed(ends);
        assert!(end.paused && (2..=3).contains(&end.held.applied.0), "{end:?}");

        let order = Train { end: end.held.cursor, ..pets.epoch(1) };
        let mut undisturbed = self::team(&pets, [false; 3], |_| ());
        assert_eq!(undisturbed.train(order).state_digest, end.state_digest);
        let rest = Train { cursor: end.held.cursor, ..pets.epoch(1) };
        assert_eq!(undisturbed.train(rest), team.train(rest), "what was begun left no trace");
        assert!(end.held.cursor.is_multiple_of(GLOBAL_BATCH));
    }
}
