//! A run that was cut short and resumed comes to what an uninterrupted one comes to.

use std::fs;

use musher_tests::{
    Job, Scene,
    run::{Ended, Run},
};
use rustix::process::Signal;

use crate::checks::{contents, each_sample_is_trained_on_once, figures, weights};

/// Cuts the run short with `cut`, resumes it, and compares it with one that was left alone.
fn comes_to_the_same(scene: &Scene, job: &Job, cut: impl FnOnce(Run)) -> Ended {
    let whole = scene.launch(job, "whole", 2, &[]).wait().expect_code(0);
    cut(scene.launch(job, "cut", 2, &[]));
    let resumed = scene.launch(job, "cut", 2, &["--resume"]).wait().expect_code(0);

    assert!(resumed.one("run_started").has("resumed_from"), "it began anew");
    let (whole_figures, resumed_figures) = (figures(&whole), figures(&resumed));
    assert!(!resumed_figures.is_empty());
    for (epoch, figures) in resumed_figures {
        assert_eq!(figures, whole_figures[&epoch], "epoch {epoch}");
    }
    for key in ["status", "stopped", "epochs", "best_epoch", "val_loss", "val_accuracy", "val_miou"] {
        assert_eq!(resumed.end.last_line()[key], whole.end.last_line()[key], "{key}");
    }
    for file in ["best.safetensors", "last.safetensors"] {
        assert_eq!(weights(&resumed.dir.join(file)), weights(&whole.dir.join(file)), "{file}");
    }
    resumed
}

#[test]
fn after_the_machine_went_down_between_two_epochs() {
    let scene = Scene::new();
    let job = Job::tiny(&scene.data()).set("train.epochs", 4);
    comes_to_the_same(&scene, &job, |mut run| {
        run.wait_for_nth("checkpoint_committed", 2);
        run.kill();
    });
}

#[test]
fn after_the_machine_went_down_in_the_middle_of_an_epoch() {
    let scene = Scene::new();
    let job = Job::tiny(&scene.data_of(160, 12)).set("checkpoint.every_steps", 4);
    let resumed = comes_to_the_same(&scene, &job, |mut run| {
        run.wait_for_mid_epoch();
        run.kill();
    });
    let from = resumed.one("run_started").text("resumed_from").to_owned();
    assert!(from.starts_with("e0001-") && from != "e0001-s00000020", "{from} is no mid-epoch checkpoint");
    assert_eq!(resumed.one("epoch_started").number("epoch"), 2, "the first epoch went on where it stood");
}

/// Stopping pools batch norm's running statistics at a step where the uninterrupted run does not; with
/// frozen statistics that changes nothing, and all bits must be the same.
#[test]
fn after_a_stop_on_request() {
    let scene = Scene::new();
    let data = scene.data_of(96, 12);
    let job = Job::tiny(&data).set("model.freeze_batch_norm", true);
    comes_to_the_same(&scene, &job, |mut run| {
        run.wait_for_nth("epoch_started", 2);
        run.signal(Signal::TERM);
        let stopped = run.wait().expect_code(75);
        let line = stopped.end.last_line();
        assert_eq!((&line["status"], &line["stopped"]), (&"stopped".into(), &"request".into()));
        assert_eq!(stopped.one("run_finished").text("status"), "stopped");
        let last = stopped.all("checkpoint_committed").last().expect("a stop takes a checkpoint").text("id");
        assert!(stopped.dir.join("checkpoints").join(last).join("manifest.json").is_file());
    });
}

/// With moving statistics the epoch in which it stopped differs in its last bits; what was trained does not.
#[test]
fn a_stop_on_request_loses_no_sample() {
    let scene = Scene::new();
    let data = scene.data_of(96, 12);
    let job = Job::tiny(&data);
    let mut run = scene.launch(&job, "stopped", 2, &[]);
    run.wait_for_nth("epoch_started", 1);
    run.signal(Signal::INT);
    let stopped = run.wait().expect_code(75);
    let names_weights = stopped.one("run_finished").has("best_weights");
    assert_eq!(names_weights, stopped.dir.join("best.safetensors").exists());
    let resumed = scene.launch(&job, "stopped", 2, &["--resume"]).wait().expect_code(0);
    each_sample_is_trained_on_once(&resumed, data.train.len() as u64, 8);
}

#[test]
fn with_the_patience_that_was_left() {
    let scene = Scene::new();
    let job = Job::tiny(&scene.data())
        .set("train.epochs", 9)
        .set("early_stopping.patience", 3)
        .set("early_stopping.min_delta", 1000.0);
    let resumed = comes_to_the_same(&scene, &job, |mut run| {
        run.wait_for_nth("checkpoint_committed", 2);
        run.kill();
    });
    let stopped = resumed.one("early_stopped");
    assert_eq!((stopped.number("epoch"), stopped.number("best_epoch")), (4, 1));
}

#[test]
fn damaged_checkpoints_are_skipped_with_a_warning() {
    let scene = Scene::new();
    let job = Job::tiny(&scene.data()).set("train.epochs", 3);
    let whole = scene.launch(&job, "whole", 2, &[]).wait().expect_code(0);
    let checkpoint = |step: u64| whole.dir.join(format!("checkpoints/e{:04}-s{step:08}", step / 5));

    let manifest = checkpoint(15).join("manifest.json");
    let text = fs::read(&manifest).expect("it was committed");
    fs::write(&manifest, &text[..text.len() / 2]).expect("it is ours");
    let part = checkpoint(10).join("part-0.bin");
    let mut bytes = fs::read(&part).expect("it was committed");
    bytes[1000] ^= 1;
    fs::write(&part, bytes).expect("it is ours");

    let resumed = scene.launch(&job, "whole", 2, &["--resume"]).wait().expect_code(0);
    assert_eq!(resumed.one("run_started").text("resumed_from"), "e0001-s00000005");
    for id in ["e0003-s00000015", "e0002-s00000010"] {
        let warned = |line: &str| line.contains("WARN") && line.contains(id);
        assert!(resumed.end.stderr.lines().any(warned), "no warning of {id} in {}", resumed.end.stderr);
    }
    assert_eq!(figures(&resumed)[&3], figures(&whole)[&3]);
}

/// To begin anew would write over the best weights.
#[test]
fn a_run_without_an_intact_checkpoint_is_left_alone() {
    let scene = Scene::new();
    let job = Job::tiny(&scene.data_of(16, 8)).set("train.epochs", 1);
    let run = scene.launch(&job, "lost", 1, &[]).wait().expect_code(0);
    let longer = job.clone().set("train.epochs", 2);
    let is_refused = |words: &[&str]| {
        let kept = contents(&run.dir);
        let resumed = scene.launch(&longer, "lost", 1, &["--resume"]).wait().expect_code(2);
        for words in words.iter().chain(&["--run-dir"]) {
            assert!(resumed.end.last_words().contains(words), "{words:?} is not in {}", resumed.end.stderr);
        }
        assert_eq!(contents(&run.dir), kept);
    };

    let checkpoints = run.dir.join("checkpoints");
    for entry in fs::read_dir(&checkpoints).expect("the run left them") {
        let part = entry.expect("it is ours").path().join("part-0.bin");
        let mut bytes = fs::read(&part).expect("it was committed");
        bytes[1000] ^= 1;
        fs::write(&part, bytes).expect("it is ours");
    }
    is_refused(&["none of the 1 checkpoints", "is intact (part-0.bin"]);
    fs::remove_dir_all(&checkpoints).expect("it is ours");
    fs::create_dir(&checkpoints).expect("it is ours");
    is_refused(&["was saved, but", "holds none any more"]);
}
