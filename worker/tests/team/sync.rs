//! From several states to one.

use musher_collective::Phase;
use musher_proto::ids::{Epoch, Generation, Step};
use musher_worker::train::{Source, TrainError};

use crate::{
    fault::{At, Fault},
    harness::{Pets, Team, Worker, agreed, bits, checkpoint, deviation, job, job_with_batch_norm},
};

/// A state of several broadcasts.
const LARGE: f64 = 0.13;

#[test]
fn newcomers_take_the_donors_state_bit_for_bit() {
    let pets = Pets::drawn();
    let job = job_with_batch_norm();
    let mut team = Team::started(&pets, &job, 2);
    team.train(pets.epoch(1));
    let expected = team.0[1].state();

    let mut workers = team.0;
    workers.insert(0, Worker::new(&pets, &job));
    workers.push(Worker::new(&pets, &job));
    assert_eq!(workers[0].trainer.held(), None);
    let mut team = Team::form(2, workers);
    let synced = team.sync(2, || Source::Held);
    assert_eq!((synced.held.lineage, synced.held.applied), (Generation(2), Step(5)));
    assert!(team.0.iter().all(|worker| worker.state() == expected));
    // What they hold is all that they need.
    team.train(pets.epoch(2));
}

#[test]
fn those_that_hold_the_donors_state_pass_it_on_and_keep_theirs() {
    let pets = Pets::drawn();
    let mut job = job();
    job.model.width = LARGE;
    let mut team = Team::started(&pets, &job, 3);
    team.train(pets.epoch(1));
    let expected = team.0[1].state();
    let mut workers = team.0;
    workers.iter_mut().for_each(|worker| worker.holds_it = true);
    workers.insert(1, Worker::new(&pets, &job));
    let mut team = Team::form(2, workers);
    let synced = team.sync(2, || Source::Held);
    assert_eq!((synced.held.lineage, synced.held.applied), (Generation(2), Step(5)));
    assert!(team.0.iter().all(|worker| worker.state() == expected));
}

#[test]
fn one_that_does_not_hold_what_it_is_said_to_hold_says_so() {
    let pets = Pets::drawn();
    let mut team = Team::started(&pets, &job(), 1);
    team.train(pets.epoch(1));
    let mut workers = team.0;
    workers.push(Worker::new(&pets, &job()));
    workers[1].holds_it = true;
    let mut team = Team::form(2, workers);
    let error = team.try_sync(0, || Source::Held).remove(1).unwrap_err();
    assert!(matches!(error, TrainError::TornSync { .. }) && error.ends_generation_only(), "{error}");
    assert_eq!(team.0[1].trainer.held(), None);
}

#[test]
fn warming_up_leaves_no_trace() {
    let pets = Pets::drawn();
    let [cold, warm] = [false, true].map(|warms_up| {
        let mut workers = Worker::new_team(&pets, &job_with_batch_norm(), 2);
        if warms_up {
            workers[0].trainer.warm_up().unwrap();
        }
        let mut team = Team::form(1, workers);
        team.sync(1, || Source::Held);
        let end = team.train(pets.epoch(1));
        (end.state_digest, bits(&team.0[0].losses))
    });
    assert_eq!(warm, cold);
}

#[test]
fn a_seeded_start_forgets_what_the_donor_held() {
    let pets = Pets::drawn();
    let mut team = Team::seeded(&pets, &job(), 2);
    let fresh = team.0[0].digest();
    team.train(pets.epoch(1));
    let mut team = Team::form(2, team.0);
    let synced = team.sync(1, || Source::Seeded);
    assert_eq!((synced.state_digest, synced.held.applied), (fresh, Step(0)));
}

#[test]
fn a_checkpoint_of_three_goes_on_with_two_and_with_one() {
    let pets = Pets::drawn();
    let mut team = Team::started(&pets, &job(), 3);
    team.train(pets.epoch(1));
    let state: Vec<u8> = team.snapshots().into_iter().flat_map(|part| part.bytes).collect();
    let digest = team.0[0].digest();
    let expected = team.train_epochs(&pets, [2]);

    for world in [3, 2, 1] {
        let mut team = Team::resumed(&pets, &job(), world, &state);
        assert_eq!(agreed(team.0.iter().map(Worker::digest)), digest);
        assert_eq!(team.0[0].trainer.position().epoch, Epoch(1));
        let found = team.train_epochs(&pets, [2]);
        let deviation = deviation(&found, &expected);
        println!("resumed by {world}: losses deviate by {deviation:.1e}");
        assert!(deviation < 1e-5, "{found:?} is not {expected:?}");
        assert!(world != 3 || bits(&found) == bits(&expected));
    }
}

/// Two that hold a state of their own, and a donor with a checkpoint.
fn before_a_checkpoint() -> (Team, Vec<u8>) {
    let pets = Pets::drawn();
    let mut job = job();
    job.model.width = LARGE;
    let newer = Team::started(&pets, &job, 1).0.remove(0).state();
    let team = Team::seeded(&pets, &job, 3);
    assert_ne!(team.0[0].state(), newer);
    (Team::form(2, team.0), newer)
}

fn assert_receivers_unchanged(team: &mut Team, newer: &[u8]) -> Vec<TrainError> {
    let before: Vec<_> = team.0.iter().map(|worker| (worker.digest(), worker.trainer.held())).collect();
    let synced = team.try_sync(0, || checkpoint(newer));
    let after: Vec<_> = team.0.iter().map(|worker| (worker.digest(), worker.trainer.held())).collect();
    assert_eq!(after[1..], before[1..]);
    assert_eq!(team.0[0].trainer.held(), None, "the donor's state is of no lineage yet");
    let errors: Vec<_> = synced.into_iter().filter_map(Result::err).collect();
    assert!(errors.iter().all(TrainError::ends_generation_only), "{errors:?}");
    errors
}

#[test]
fn a_broadcast_that_breaks_off_leaves_the_receivers_as_they_were() {
    for (phase, bucket) in [(Phase::State, 0), (Phase::State, 1), (Phase::Digest, 0)] {
        let (mut team, newer) = before_a_checkpoint();
        team.0[0].goes_wrong(At { phase, step: 0, bucket }, Fault::GoneBefore);
        assert_eq!(assert_receivers_unchanged(&mut team, &newer).len(), 3);

        // And they can still be given one.
        let mut team = Team::form(3, team.0);
        let synced = team.sync(0, || checkpoint(&newer));
        assert_eq!(synced.held.lineage, Generation(3));
        assert!(team.0.iter().all(|worker| worker.state() == newer));
    }
}

#[test]
fn a_damaged_state_is_refused() {
    let (mut team, newer) = before_a_checkpoint();
    for rank in [1, 2] {
        team.0[rank].goes_wrong(At { phase: Phase::State, step: 0, bucket: 1 }, Fault::Damaged);
    }
    let before: Vec<_> = team.0.iter().map(|worker| (worker.digest(), worker.trainer.held())).collect();
    let synced = team.try_sync(0, || checkpoint(&newer));
    for rank in [1, 2] {
        let error = synced[rank].as_ref().unwrap_err();
        assert!(matches!(error, TrainError::TornSync { .. }) && error.ends_generation_only(), "{error}");
        assert_eq!((team.0[rank].digest(), team.0[rank].trainer.held()), before[rank]);
    }
}

#[test]
fn a_checkpoint_that_does_not_arrive_or_does_not_fit_is_an_error() {
    let pets = Pets::drawn();
    let mut team = Team::seeded(&pets, &job(), 1);
    let digest = team.0[0].digest();
    let (sender, pieces) = std::sync::mpsc::sync_channel(1);
    sender.send(Err("the coordinator is gone".to_owned())).unwrap();
    let pieces = std::sync::Mutex::new(Some(pieces));
    let lost = || Source::Checkpoint(pieces.lock().unwrap().take().unwrap());
    let state = team.0[0].state();
    let short = || checkpoint(&state[4..]);
    for (generation, source) in [(2, &lost as &(dyn Fn() -> Source + Sync)), (3, &short)] {
        team = Team::form(generation, team.0);
        team.try_sync(0, source).remove(0).unwrap_err();
        assert_eq!(team.0[0].digest(), digest);
        assert_eq!(team.0[0].trainer.held().unwrap().lineage, Generation(1));
    }
}
