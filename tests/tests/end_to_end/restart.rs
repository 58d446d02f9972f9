//! A coordinator that is killed and started again: its workers live on and bring what they hold.

use std::{collections::BTreeMap, fs, net::TcpListener};

use musher_tests::{
    DataSet, Event, Job, Process, Scene,
    process::until,
    run::{Ended, Run},
};
use rustix::process::{Pid, Signal};

use crate::checks::{each_sample_is_trained_on_once, each_sample_is_validated_once};

/// 20 steps an epoch.
const TRAIN: usize = 160;
const VAL: usize = 48;

/// On a port that stays the same over restarts.
fn job(data: &DataSet) -> Job {
    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let address = free.expect("there is a free port").to_string();
    Job::tiny(data)
        .set("server.grpc", format!("{address:?}"))
        .set("cluster.workers", 2)
        .set("cluster.heartbeat_timeout_s", 30)
        .set("train.epochs", 3)
}

/// Starts the run with two workers, kills its coordinator once `cut` returns, and sees the run to its end.
fn survives(scene: &Scene, job: &Job, cut: impl FnOnce(&mut Run)) -> (Vec<Event>, Ended) {
    let mut run = scene.serve(job, "restarted", &[]);
    let workers = ["ox", "mule"].map(|name| scene.join(&run, name, &[]));
    cut(&mut run);
    let before = run.kill();
    let run = scene.serve(job, "restarted", &["--resume"]).wait().expect_code(0);
    for worker in workers {
        let worker: Process = worker;
        worker.wait().expect_code(0);
    }
    (before, run)
}

/// The step that each epoch was finished at, over both lives; no epoch twice.
fn finished(before: &[Event], run: &Ended, name: &str) -> BTreeMap<u64, u64> {
    let mut steps = BTreeMap::new();
    for event in before.iter().chain(&run.events).filter(|event| event.name() == name) {
        let former = steps.insert(event.number("epoch"), event.number("step"));
        assert_eq!(former, None, "{name} twice: {event:?}");
    }
    steps
}

#[track_caller]
fn nothing_was_lost(before: &[Event], run: &Ended) {
    let formed = run.all("generation_formed");
    assert_eq!(formed[0].number("world_size"), 2, "it was formed before both were back: {formed:#?}");
    let told = before.iter().filter(|event| event.name() == "progress" || event.name() == "epoch_finished");
    let told = told.map(|event| event.number("step")).max().expect("it had trained");
    assert!(formed[0].number("applied_step") >= told, "{told} steps were told of before: {formed:#?}");
    assert_eq!(run.one("coordinator_restarted").number("term"), 2);

    let steps = BTreeMap::from([(1, 20), (2, 40), (3, 60)]);
    assert_eq!(finished(before, run, "epoch_finished"), steps);
    assert_eq!(finished(before, run, "validated"), steps);
    each_sample_is_trained_on_once(run, TRAIN as u64, 8);
    each_sample_is_validated_once(run, VAL as u64);
    assert_eq!(run.end.last_line()["epochs"], 3);
    assert!(run.dir.join("best.safetensors").is_file());
}

#[test]
fn in_the_middle_of_an_epoch_without_any_checkpoint() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, VAL);
    let (before, run) = survives(&scene, &job(&data), |run| {
        run.wait_for("progress", |event| event.name() == "progress" && event.number("step") > 0);
    });
    nothing_was_lost(&before, &run);
    let first = run.all("generation_formed")[0];
    let none_yet = !before.iter().any(|event| event.name() == "checkpoint_committed");
    assert!(!none_yet || first.number("applied_step") > 0, "{first:?}");
}

#[test]
fn during_validation() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, VAL);
    let (before, run) = survives(&scene, &job(&data), |run| {
        run.wait_for_nth("epoch_finished", 1);
    });
    nothing_was_lost(&before, &run);
}

#[test]
fn workers_that_were_launched_end_with_a_launcher_that_is_killed() {
    let scene = Scene::new();
    let job = Job::tiny(&scene.data()).set("train.epochs", 1000);
    let mut run = scene.launch(&job, "killed", 2, &[]);
    run.wait_for_nth("epoch_started", 1);
    let workers = [0, 1].map(|rank| run.worker(rank));
    run.signal(Signal::KILL);
    // A dead process that nobody has waited for has no command line.
    let runs = |worker: &Pid| {
        let command = fs::read(format!("/proc/{}/cmdline", worker.as_raw_nonzero()));
        command.is_ok_and(|command| !command.is_empty())
    };
    until(|| (!workers.iter().any(runs)).then_some(()), || format!("{workers:?} live on"));
}
