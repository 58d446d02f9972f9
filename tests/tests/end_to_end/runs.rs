//! Runs that nothing disturbs.

use std::path::Path;

use musher_tests::{DataSet, Job, Scene, run::Ended};

use crate::checks::{
    each_sample_is_trained_on_once, each_sample_is_validated_once, events_are_documented, weights,
};

#[test]
fn one_worker_runs_a_job() {
    runs_a_job(1);
}

#[test]
fn two_workers_run_a_job() {
    runs_a_job(2);
}

#[test]
fn three_workers_run_a_job() {
    runs_a_job(3);
}

fn runs_a_job(workers: u32) {
    let scene = Scene::new();
    let data = scene.data();
    let run = scene.launch(&Job::tiny(&data), "whole", workers, &[]).wait().expect_code(0);
    the_events_tell_the_run_in_order(&run, workers);
    the_events_have_the_contracts_fields(&run);
    events_are_documented(&run.events);
    each_sample_is_trained_on_once(&run, data.train.len() as u64, 8);
    each_sample_is_validated_once(&run, data.val.len() as u64);
    the_last_line_is_the_result(&run, "epoch_limit");
    the_run_directory_is_complete(&run);
    assert_eq!(run.end.stdout.lines().count(), 1, "stdout is for the result alone: {}", run.end.stdout);
}

fn the_events_tell_the_run_in_order(run: &Ended, workers: u32) {
    let mut expected = vec!["run_started", "waiting_for_workers"];
    expected.extend((0..workers).map(|_| "worker_joined"));
    expected.push("generation_formed");
    expected.extend(["epoch_started", "epoch_finished", "validated"].repeat(2));
    expected.push("run_finished");
    let beside = ["progress", "data_warning", "warning", "checkpoint_committed"];
    let told: Vec<_> =
        run.events.iter().map(|event| event.name()).filter(|name| !beside.contains(name)).collect();
    assert_eq!(told, expected);
    assert_eq!(run.all("checkpoint_committed").len(), 2);
    assert_eq!(run.events.last().map(|event| event.name()), Some("run_finished"));
    assert_eq!(run.one("generation_formed").number("world_size"), u64::from(workers));
}

fn the_events_have_the_contracts_fields(run: &Ended) {
    let fields: &[(&str, &[&str])] = &[
        ("worker_joined", &["worker"]),
        ("generation_formed", &["generation", "world_size", "donor", "applied_step", "elapsed_ms"]),
        ("epoch_started", &["generation", "epoch", "step"]),
        ("progress", &["generation", "epoch", "step", "loss", "learning_rate", "images_per_second", "eta_s"]),
        ("epoch_finished", &["epoch", "step", "samples", "train_loss", "images_per_second", "state_digest"]),
        ("validated", &["epoch", "step", "val_loss", "val_accuracy", "val_miou", "samples"]),
        ("checkpoint_committed", &["epoch", "step", "id", "bytes", "seconds", "stall_ms"]),
        ("warning", &["cause", "reason"]),
        ("data_warning", &["worker", "file", "reason"]),
        ("run_finished", &["status", "epochs", "best_epoch", "val_loss"]),
    ];
    for event in &run.events {
        let own = fields.iter().find(|(name, _)| *name == event.name()).map_or(&[][..], |(_, own)| own);
        for field in ["timestamp", "level", "event", "run"].iter().chain(own) {
            assert!(event.has(field), "no {field} in {event:?}");
        }
    }
}

fn the_last_line_is_the_result(run: &Ended, stopped: &str) {
    let line = run.end.last_line();
    let finished = run.one("run_finished");
    assert_eq!(line["status"], "finished");
    assert_eq!(line["stopped"], stopped);
    for key in ["epochs", "best_epoch", "val_loss", "val_accuracy", "val_miou", "images_per_second"] {
        assert!(line[key].is_number(), "{key} in {line}");
        assert_eq!(line[key], finished[key], "{key}");
    }
    let weights = line["best_weights"].as_str().expect("a finished run has weights");
    assert!(Path::new(weights).is_file(), "{weights}");
}

fn the_run_directory_is_complete(run: &Ended) {
    for file in ["events.jsonl", "state.json", "best.safetensors", "last.safetensors"] {
        assert!(run.dir.join(file).is_file(), "{file}");
    }
    for checkpoint in run.all("checkpoint_committed") {
        let manifest = run.dir.join("checkpoints").join(checkpoint.text("id")).join("manifest.json");
        assert!(manifest.is_file(), "{}", manifest.display());
    }
    for picture in ["epoch-0001.png", "epoch-0002.png", "best.png"] {
        let picture = image::open(run.dir.join("samples").join(picture)).expect("it is a picture");
        assert!(picture.width() >= 64 && picture.height() >= 64);
    }
    let tensors = weights(&run.dir.join("best.safetensors"));
    for name in [
        "conv1.weight",
        "bn1.running_mean",
        "layer1.0.downsample.0.weight",
        "layer2.3.conv3.weight",
        "layer4.2.bn3.running_var",
    ] {
        assert!(tensors.contains_key(name), "torchvision's {name} is not among {:?}", tensors.keys());
    }
}

#[test]
fn a_run_that_no_longer_improves_stops_early() {
    let scene = Scene::new();
    let data: DataSet = scene.data();
    let job = Job::tiny(&data)
        .set("train.epochs", 9)
        .set("early_stopping.patience", 2)
        .set("early_stopping.min_delta", 1000.0);
    let run = scene.launch(&job, "early", 2, &[]).wait().expect_code(0);
    let stopped = run.one("early_stopped");
    assert_eq!((stopped.number("epoch"), stopped.number("best_epoch")), (3, 1));
    the_last_line_is_the_result(&run, "early");
    assert_eq!(run.end.last_line()["epochs"], 3);
    let best = &run.all("validated")[0];
    assert_eq!(run.end.last_line()["val_loss"], best["val_loss"], "the result is the best epoch's");
    let differ = weights(&run.dir.join("best.safetensors")) != weights(&run.dir.join("last.safetensors"));
    assert!(differ, "the best epoch's weights are not the last's");
}

#[test]
fn a_finished_run_that_is_resumed_says_so_at_once() {
    let scene = Scene::new();
    let job = Job::tiny(&scene.data()).set("train.epochs", 1);
    let first = scene.launch(&job, "again", 1, &[]).wait().expect_code(0);
    let second = scene.launch(&job, "again", 1, &["--resume"]).wait().expect_code(0);
    assert_eq!(second.end.last_line()["val_loss"], first.end.last_line()["val_loss"]);
    assert!(second.all("worker_joined").is_empty(), "there is nothing to do for workers");

    let longer = scene.launch(&job.set("train.epochs", 2), "again", 1, &["--resume"]).wait().expect_code(0);
    assert_eq!(longer.end.last_line()["epochs"], 2, "more epochs may be asked for");
}

#[test]
fn a_dry_run_prints_the_job_and_leaves_no_trace() {
    let scene = Scene::new();
    let run = scene.launch(&Job::tiny(&scene.data()), "dry", 1, &["--dry-run", "--set", "train.epochs=7"]);
    let run = run.wait().expect_code(0);
    assert!(run.end.stdout.contains("epochs = 7"), "{}", run.end.stdout);
    assert!(!run.dir.exists());
}
