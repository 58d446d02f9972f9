//! A team that is asked to stop between two steps, by a flag that need only be raised on one rank.

use musher_proto::{
    ids::{Epoch, Step},
    message::Train,
};
use musher_worker::train::StopFlag;

use crate::harness::{
    GLOBAL_BATCH, Pets, STEPS_PER_EPOCH, Team, Worker, agreed, bits, job, job_with_batch_norm,
};

/// Trains `order` until rank `raiser` asks for a stop, `after` steps on.
fn interrupt(team: &mut Team, order: Train, raiser: u32, after: usize) -> musher_worker::train::SegmentEnd {
    agreed(team.each(|worker| {
        let (stop, raises) = (StopFlag::default(), worker.rank() == raiser);
        let end = worker.train(order, &stop, |steps| {
            if raises && steps == after {
                stop.raise();
            }
        });
        end.unwrap()
    }))
}

#[test]
fn all_ranks_stop_after_the_same_step_and_go_on_to_the_same_bits() {
    let pets = Pets::drawn();
    let mut team = Team::started(&pets, &job(), 3);
    let through = team.train(pets.epoch(1));
    let losses = bits(&team.0[0].losses);

    for raiser in 0..3 {
        let mut team = Team::started(&pets, &job(), 3);
        // The flag travels with the step that comes after it was raised.
        let paused = interrupt(&mut team, pets.epoch(1), raiser, 2);
        assert!(paused.paused);
        let held = paused.held;
        assert_eq!((held.applied, held.epoch, held.cursor), (Step(3), Epoch(1), 3 * GLOBAL_BATCH));
        assert!(0.0 < paused.totals.loss_sum && paused.totals.loss_sum < through.totals.loss_sum);

        let rest = Train { cursor: held.cursor, ..pets.epoch(1) };
        assert_eq!(team.train(rest), through, "raised by rank {raiser}");
        assert_eq!(bits(&team.0[0].losses), losses);
    }
}

#[test]
fn ranks_agree_after_a_pause_with_live_batch_norm() {
    let pets = Pets::drawn();
    let mut team = Team::started(&pets, &job_with_batch_norm(), 3);
    let paused = interrupt(&mut team, pets.epoch(1), 1, 2);
    assert_eq!(agreed(team.0.iter().map(Worker::digest)), paused.state_digest);
}

#[test]
fn a_stop_at_the_segments_last_step_is_no_pause() {
    let pets = Pets::drawn();
    let mut team = Team::started(&pets, &job(), 2);
    let end = interrupt(&mut team, pets.epoch(1), 1, STEPS_PER_EPOCH - 1);
    assert!(!end.paused);
    assert_eq!(end.held.cursor, pets.epoch(1).end);
}
