//! Validation's figures do not depend on who evaluates which unit.

use musher_proto::{
    ids::Epoch,
    message::{UnitResult, Validate, Validated},
};

use crate::harness::{Pets, Team, Worker, agreed, job_with_batch_norm};

fn validate(team: &mut Team) -> Vec<Validated> {
    let order = Validate { epoch: Epoch(1), samples_wanted: 2 };
    team.each(|worker| worker.trainer.validate(worker.member.as_ref().unwrap(), order).unwrap())
}

fn bits(unit: &UnitResult) -> (u64, u64, u64, Vec<u64>) {
    (unit.index, unit.samples, unit.loss_sum.to_bits(), unit.confusion.clone())
}

#[test]
fn figures_have_the_same_bits_in_any_team() {
    let pets = Pets::drawn();
    let mut job = job_with_batch_norm();
    job.train.global_batch = 2;
    let mut trained = Team::started(&pets, &job, 2);
    trained.train(pets.epoch(1));
    let state = trained.0[0].state();

    let figures = (1..=3).map(|world| {
        let mut team = Team::resumed(&pets, &job, world, &state);
        let parts = validate(&mut team);
        assert_eq!(parts.len(), world);
        assert!(parts.iter().all(|part| !part.units.is_empty()), "seven samples are four units");
        assert!(parts.iter().skip(1).all(|part| part.samples_png.is_empty()));
        let digest = agreed(parts.iter().map(|part| part.state_digest));
        assert_eq!(agreed(team.0.iter().map(Worker::digest)), digest, "validation changes nothing");
        let picture = parts[0].samples_png.clone();
        let units: Vec<_> = parts.iter().flat_map(|part| &part.units).map(bits).collect();
        (units, digest, picture)
    });
    let (units, _, picture) = agreed(figures);
    assert_eq!(
        units.iter().map(|(index, samples, ..)| (*index, *samples)).collect::<Vec<_>>(),
        [(0, 2), (1, 2), (2, 2), (3, 1)]
    );
    let pixels: u64 = units.iter().flat_map(|(.., confusion)| confusion).sum();
    assert_eq!(pixels, 7 * 32 * 32);
    assert!(picture.starts_with(b"\x89PNG"));
}
