//! A rank that is gone in the middle of a segment: the others keep their last applied step, and go on
//! without it.

use std::{collections::BTreeMap, thread, time::Instant};

use musher_collective::{CollectiveError, Phase};
use musher_proto::{ids::Step, message::Train};
use musher_worker::train::{Source, StopFlag, TrainError};

use crate::{
    fault::{At, Fault},
    harness::{GLOBAL_BATCH, PATIENCE, Pets, Team, Worker, bits, job, job_with_batch_norm},
};

/// Steps 0 to 2 are applied when step 3 goes wrong.
const AT_STEP: u64 = 3;

/// Whether a step's outcome is seen in the midst of the next one only.
const BOTH: [bool; 2] = [false, true];

fn buckets(team: &Team) -> u32 {
    team.0[0].trainer.replica().buckets().len() as u32
}

/// Each worker's (applied, digest of its tensors) after the step went wrong.
fn break_step(team: &mut Team, order: Train) -> Vec<(Step, u64)> {
    let started = Instant::now();
    let results = team.each(|worker| worker.train(order, &StopFlag::default(), |_| ()));
    assert!(started.elapsed() < PATIENCE / 2, "nobody waits for a peer that is gone");
    for result in results {
        let error = result.unwrap_err();
        assert!(error.ends_generation_only(), "{error}");
    }
    team.0.iter().map(|worker| (worker.trainer.position().applied, worker.tensor_digest())).collect()
}

/// Digests after each step of an unbroken run, by steps applied.
fn unbroken(pets: &Pets) -> BTreeMap<Step, u64> {
    let mut team = Team::started(pets, &job(), 3);
    let order = pets.epoch(1);
    let ends = (0..order.end).step_by(GLOBAL_BATCH as usize).map(|cursor| {
        let end = team.train(Train { cursor, end: order.end.min(cursor + GLOBAL_BATCH), ..order });
        (end.held.applied, team.0[0].tensor_digest())
    });
    ends.collect()
}

#[test]
fn survivors_hold_their_last_applied_step() {
    let pets = Pets::drawn();
    let expected = unbroken(&pets);
    let last = buckets(&Team::started(&pets, &job(), 1)) - 1;
    let calls = [(Phase::Gradients, 0), (Phase::Gradients, last), (Phase::Control, 0)];
    for (late, (phase, bucket)) in BOTH.into_iter().flat_map(|late| calls.map(|call| (late, call))) {
        let mut team = Team::started(&pets, &job(), 3).look_late(late);
        team.0[1].goes_wrong(At { phase, step: AT_STEP, bucket }, Fault::GoneBefore);
        for (applied, digest) in break_step(&mut team, pets.epoch(1)) {
            assert_eq!(applied, Step(AT_STEP), "gone before {phase} {bucket}");
            assert_eq!(digest, expected[&applied], "gone before {phase} {bucket}");
        }
    }
}

/// Also where batch norm's forward pass has moved statistics already, each rank's in its own way.
#[test]
fn a_step_that_is_not_applied_leaves_no_trace() {
    BOTH.into_iter().for_each(no_trace);
}

fn no_trace(late: bool) {
    let pets = Pets::drawn();
    let mut traces = [(Phase::Gradients, AT_STEP), (Phase::Control, AT_STEP)].map(|(phase, step)| {
        let mut team = Team::started(&pets, &job_with_batch_norm(), 3).look_late(late);
        team.0[2].goes_wrong(At { phase, step, bucket: 0 }, Fault::GoneBefore);
        break_step(&mut team, pets.epoch(1));
        team.0.iter().map(Worker::digest).collect::<Vec<_>>()
    });
    traces[0].dedup();
    assert_eq!(traces[0].len(), 3, "the ranks' statistics are not pooled yet");
    assert_eq!(traces[0], traces[1]);

    // Nor in what a state's bytes do not show: one who was there goes on as one who was not.
    let mut team = Team::started(&pets, &job_with_batch_norm(), 3).look_late(late);
    team.0[2].goes_wrong(At { phase: Phase::Control, step: AT_STEP, bucket: 0 }, Fault::GoneBefore);
    break_step(&mut team, pets.epoch(1));
    let mut newcomer = Team::resumed(&pets, &job_with_batch_norm(), 1, &team.0[0].state());
    let mut survivor = Team::form(2, vec![team.0.remove(0)]);
    let cursor = survivor.sync(0, || Source::Held).held.cursor;
    for team in [&mut newcomer, &mut survivor] {
        team.train(Train { cursor, ..pets.epoch(1) });
    }
    assert_eq!(survivor.0[0].digest(), newcomer.0[0].digest());
}

#[test]
fn the_furthest_survivor_hands_its_state_on() {
    BOTH.into_iter().for_each(the_furthest_hands_on);
}

fn the_furthest_hands_on(late: bool) {
    let pets = Pets::drawn();
    let expected = unbroken(&pets);
    let order = pets.epoch(1);

    // Rank 2 is gone, and rank 0 too sees no end of a step that is complete for rank 1.
    let mut team = Team::started(&pets, &job(), 3).look_late(late);
    for rank in [0, 2] {
        team.0[rank].goes_wrong(At { phase: Phase::Control, step: AT_STEP, bucket: 0 }, Fault::GoneAfter);
    }
    let held = break_step(&mut team, order);
    assert_eq!(held.iter().map(|&(applied, _)| applied.0).collect::<Vec<_>>(), [3, 4, 3]);
    assert!(held.iter().all(|(applied, digest)| *digest == expected[applied]));

    team.0.pop();
    let mut survivors = Team::form(2, team.0);
    let synced = survivors.sync(1, || Source::Held);
    assert_eq!((synced.held.applied, synced.held.cursor), (Step(4), 4 * GLOBAL_BATCH));
    let end = survivors.train(Train { cursor: synced.held.cursor, ..order });
    survivors.train(pets.epoch(2));

    // The same sequence of teams, with nothing lost.
    let mut team = Team::started(&pets, &job(), 3);
    let paused = team.train(Train { end: synced.held.cursor, ..order });
    team.0.pop();
    let mut team = Team::form(2, team.0);
    team.sync(0, || Source::Held);
    assert_eq!(team.train(Train { cursor: paused.held.cursor, ..order }), end);
    team.train(pets.epoch(2));
    assert_eq!(team.0[0].digest(), survivors.0[0].digest());
    assert_eq!(bits(&team.0[0].losses), bits(&survivors.0[0].losses));
}

/// The sum says that some rank was elsewhere, whatever became of the gradients.
#[test]
fn a_control_word_that_does_not_add_up_is_no_step() {
    let pets = Pets::drawn();
    let expected = unbroken(&pets);
    for late in BOTH {
        let mut team = Team::started(&pets, &job(), 3).look_late(late);
        team.0[1].goes_wrong(At { phase: Phase::Control, step: AT_STEP, bucket: 0 }, Fault::Damaged);
        let results =
            team.each(|worker| worker.train(pets.epoch(1), &StopFlag::default(), |_| ()).unwrap_err());
        assert!(matches!(results[1], TrainError::Incomplete { step: AT_STEP }), "{}", results[1]);
        assert!(results.iter().all(TrainError::ends_generation_only), "{results:?}");
        assert_eq!(team.0[1].trainer.position().applied, Step(AT_STEP));
        assert_eq!(team.0[1].tensor_digest(), expected[&Step(AT_STEP)]);
    }
}

/// Aborted by rank 0's thread, between two steps, while the victim is within one.
#[test]
fn an_abort_from_another_thread_ends_the_generation_between_two_steps() {
    let pets = Pets::drawn();
    let expected = unbroken(&pets);
    for (late, victim) in [(false, 1), (false, 2), (true, 1), (true, 2)] {
        let mut team = Team::started(&pets, &job(), 3).look_late(late);
        let aborter = team.0[victim].aborter();
        let errors = team.each(|worker| {
            let first = worker.rank() == 0;
            let result = worker.train(pets.epoch(1), &StopFlag::default(), |steps| {
                if first && steps == 2 {
                    aborter.abort();
                }
            });
            result.unwrap_err()
        });
        assert!(errors.iter().all(TrainError::ends_generation_only), "{errors:?}");
        assert!(matches!(errors[victim], TrainError::Collective(CollectiveError::Aborted(_))), "{errors:?}");
        let applied: Vec<_> = team.0.iter().map(|worker| worker.trainer.position().applied).collect();
        assert!(applied.iter().max().unwrap().0 - applied.iter().min().unwrap().0 <= 1, "{applied:?}");
        for worker in &team.0 {
            assert_eq!(worker.tensor_digest(), expected[&worker.trainer.position().applied]);
        }
    }
}

/// A membership that is dropped closes its connections.
#[test]
fn a_worker_that_leaves_ends_the_generation() {
    let pets = Pets::drawn();
    let mut team = Team::started(&pets, &job(), 3);
    team.0[0].member = None;
    let (left, stayed) = team.0.split_at_mut(1);
    let errors = thread::scope(|scope| {
        let threads: Vec<_> = stayed
            .iter_mut()
            .map(|worker| scope.spawn(|| worker.train(pets.epoch(1), &StopFlag::default(), |_| ())))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap().unwrap_err()).collect::<Vec<_>>()
    });
    assert!(errors.iter().all(TrainError::ends_generation_only), "{errors:?}");
    assert_eq!(stayed[0].tensor_digest(), left[0].tensor_digest());
}
