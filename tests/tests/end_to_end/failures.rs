//! Workers that die, hang or all go away.

use musher_tests::{DataSet, Job, Scene, run::Ended};
use rustix::process::{Signal, kill_process};

use crate::checks::{each_sample_is_trained_on_once, each_sample_is_validated_once, figures};

/// 20 steps an epoch.
const TRAIN: usize = 160;
/// What dies stays dead.
const NO_RESTARTS: [&str; 2] = ["--max-restarts", "0"];

fn job(data: &DataSet) -> Job {
    Job::tiny(data).set("checkpoint.every_steps", 4)
}

#[test]
fn survivors_go_on_when_a_worker_is_killed() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let job = job(&data).set("model.freeze_batch_norm", true);
    let whole = scene.launch(&job, "whole", 3, &[]).wait().expect_code(0);

    let mut run = scene.launch(&job, "killed", 3, &NO_RESTARTS);
    run.wait_for_mid_epoch();
    let processes = [0, 1, 2].map(|rank| run.worker(rank));
    kill_process(processes[1], Signal::KILL).expect("it runs");
    run.wait_for_nth("epoch_started", 2);
    assert_eq!([run.worker(0), run.worker(2)], [processes[0], processes[2]], "no survivor was restarted");
    let run = run.wait().expect_code(0);

    the_loss_is_told(&run, ".1");
    let sizes: Vec<_> = run.all("generation_formed").iter().map(|event| event.number("world_size")).collect();
    assert_eq!(sizes, [3, 2]);
    let second = run.all("generation_formed")[1];
    assert!(second.number("applied_step") > 0, "the survivors kept what was trained: {second:?}");
    assert_eq!(run.all("epoch_started").len(), 2, "no epoch began anew");
    each_sample_is_trained_on_once(&run, TRAIN as u64, 8);
    each_sample_is_validated_once(&run, 12);
    // The same samples in the same steps: only the order of float sums differs.
    for (epoch, undisturbed) in figures(&whole) {
        let ratio = figures(&run)[&epoch].train_loss / undisturbed.train_loss;
        assert!((ratio - 1.0).abs() < 1e-2, "epoch {epoch} trained on other samples: {ratio}");
    }
}

fn the_loss_is_told(run: &Ended, worker: &str) {
    let left = run.one("worker_left");
    assert!(left.text("worker").ends_with(worker), "{left:?}");
    assert!(!left.text("reason").is_empty());
    let aborted = run.one("generation_aborted");
    assert_eq!(aborted.number("generation"), run.all("generation_formed")[0].number("generation"));
    assert!(!aborted.text("reason").is_empty());
}

#[test]
fn a_worker_that_hangs_is_removed() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let job = job(&data).set("train.epochs", 1).set("cluster.heartbeat_timeout_s", 3.0);
    let mut run = scene.launch(&job, "hung", 2, &[]);
    run.wait_for_mid_epoch();
    let hung = run.worker(1);
    kill_process(hung, Signal::STOP).expect("it runs");
    run.wait_for_nth("generation_formed", 2);
    kill_process(hung, Signal::CONT).expect("it was only stopped");
    let run = run.wait().expect_code(0);
    the_loss_is_told(&run, ".1");
    let reason = run.one("worker_left").text("reason").to_owned();
    assert!(reason.contains("silent for 3.0 s (cluster.heartbeat_timeout_s)"), "{reason}");
    each_sample_is_trained_on_once(&run, TRAIN as u64, 8);
}

#[test]
fn a_run_whose_workers_are_all_dead_fails() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let mut run = scene.launch(&job(&data), "dead", 2, &NO_RESTARTS);
    run.wait_for_nth("epoch_started", 1);
    for rank in [0, 1] {
        kill_process(run.worker(rank), Signal::KILL).expect("it runs");
    }
    let run = run.wait().expect_code(1);
    let reason = run.one("run_failed").text("reason").to_owned();
    assert!(reason.contains("SIGKILL"), "{reason}");
    let line = run.end.last_line();
    assert_eq!((&line["status"], &line["reason"]), (&"failed".into(), &reason.into()));
}

#[test]
fn below_min_workers_a_run_waits_for_another() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let job = job(&data).set("train.epochs", 1).set("cluster.min_workers", 2);
    let mut run = scene.launch(&job, "short-handed", 2, &NO_RESTARTS);
    run.wait_for_mid_epoch();
    kill_process(run.worker(0), Signal::KILL).expect("it runs");
    let waiting = run.wait_for_nth("waiting_for_workers", 2);
    assert_eq!((waiting.number("present"), waiting.number("expected")), (1, 2));
    let substitute = scene.join(&run, "substitute", &[]);
    let run = run.wait().expect_code(0);
    substitute.wait().expect_code(0);
    let sizes: Vec<_> = run.all("generation_formed").iter().map(|event| event.number("world_size")).collect();
    // The survivor forms alone to save what it holds, unless that was saved already; then it waits.
    assert!(sizes == [2, 1, 2] || sizes == [2, 2], "{sizes:?}");
    let formed = run.all("generation_formed");
    let saved = formed[1].number("applied_step");
    assert!(saved > 0, "the survivor's state was kept");
    assert_eq!(
        formed[formed.len() - 1].number("applied_step"),
        saved,
        "nothing was trained below min_workers"
    );
    assert!(run.all("checkpoint_committed").iter().any(|event| event.number("step") == saved));
    each_sample_is_trained_on_once(&run, TRAIN as u64, 8);
}

#[test]
fn a_dead_worker_is_started_again_and_taken_in() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let mut run = scene.launch(&job(&data), "restarted", 2, &[]);
    run.wait_for_mid_epoch();
    let dead = run.worker(1);
    kill_process(dead, Signal::KILL).expect("it runs");
    run.wait_for_nth("generation_formed", 3);
    assert_ne!(run.worker(1), dead, "a new process has its place");
    let run = run.wait().expect_code(0);
    let sizes: Vec<_> = run.all("generation_formed").iter().map(|event| event.number("world_size")).collect();
    assert_eq!(sizes, [2, 1, 2]);
    assert_eq!(run.all("generation_aborted").len(), 1, "taking it in aborts nothing");
    each_sample_is_trained_on_once(&run, TRAIN as u64, 8);
}

#[test]
fn a_drained_worker_costs_no_step() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let mut run = scene.launch(&job(&data), "drained", 3, &[]);
    run.wait_for_mid_epoch();
    let joined = run.wait_for_nth("worker_joined", 1);
    let host = joined.text("host").to_owned();
    let drained = scene.run(&["drain", &run.address(), &format!("{host}.1")]);
    drained.expect_code(0);
    run.wait_for_nth("worker_left", 1);
    kill_process(run.worker(2), Signal::TERM).expect("it runs");
    run.wait_for_nth("worker_left", 2);
    let unknown = scene.run(&["drain", &run.address(), "nobody"]).expect_code(1);
    assert!(unknown.last_words().contains("no worker nobody"), "{}", unknown.last_words());
    let run = run.wait().expect_code(0);
    let sizes: Vec<_> = run.all("generation_formed").iter().map(|event| event.number("world_size")).collect();
    assert_eq!(sizes, [3, 2, 1]);
    assert!(run.all("generation_aborted").is_empty(), "nobody was interrupted");
    each_sample_is_trained_on_once(&run, TRAIN as u64, 8);
}
