//! The same job comes to the same, and the team's size hardly matters.

use musher_tests::{Job, Scene};

use crate::checks::{figures, weights};

#[test]
fn the_same_job_comes_to_the_same_bits() {
    let scene = Scene::new();
    let job = Job::tiny(&scene.data());
    let [one, other] = ["one", "other"].map(|name| scene.launch(&job, name, 2, &[]).wait().expect_code(0));
    assert_eq!(figures(&one), figures(&other));
    assert_eq!(weights(&one.dir.join("best.safetensors")), weights(&other.dir.join("best.safetensors")));
}

#[test]
fn another_seed_comes_to_other_bits() {
    let scene = Scene::new();
    let job = Job::tiny(&scene.data()).set("train.epochs", 1);
    let one = scene.launch(&job, "one", 1, &[]).wait().expect_code(0);
    let other = scene.launch(&job.set("seed", 45), "other", 1, &[]).wait().expect_code(0);
    assert_ne!(figures(&one)[&1].state_digest, figures(&other)[&1].state_digest);
}

/// Only the order of float sums differs, as batch norm's statistics are frozen.
#[test]
fn two_workers_train_as_one_does() {
    let scene = Scene::new();
    let job = Job::tiny(&scene.data_of(44, 12)).set("model.freeze_batch_norm", true);
    let [one, two] = [1, 2].map(|workers| {
        let run = scene.launch(&job, &format!("with-{workers}"), workers, &[]).wait().expect_code(0);
        figures(&run).into_values().map(|figures| figures.train_loss).collect::<Vec<_>>()
    });
    assert_eq!(one.len(), 2);
    for (one, two) in one.iter().zip(&two) {
        assert!((one / two - 1.0).abs() < 1e-3, "{one} is not {two}");
    }
}
