//! A node's workers under one command.

use std::{
    fs,
    os::{fd::OwnedFd, unix::fs::symlink},
    path::Path,
    process::Command,
};

use musher_tests::{
    DataSet, Job, Process, Scene,
    binaries::musher_worker,
    faults::Stopped,
    http::get,
    process::until,
    run::{Ended, Run},
};
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, mknodat},
    process::{Pid, Signal, kill_process},
};
use serde_json::Value;

use crate::checks::each_sample_is_trained_on_once;

/// 20 steps an epoch.
const TRAIN: usize = 160;

fn job(data: &DataSet) -> Job {
    Job::tiny(data).set("cluster.workers", 2).set("checkpoint.every_steps", 4)
}

fn join(scene: &Scene, run: &Run) -> Process {
    scene.join(run, "ox", &["--workers-per-node", "2"])
}

fn sizes(run: &Ended) -> Vec<u64> {
    run.all("generation_formed").iter().map(|event| event.number("world_size")).collect()
}

#[test]
fn a_dead_worker_of_a_node_is_started_again_and_taken_in() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let mut run = scene.serve(&job(&data), "node", &[]);
    let node = join(&scene, &run);
    run.wait_for_mid_epoch();
    let dead = node.worker(1);
    kill_process(dead, Signal::KILL).expect("it runs");
    run.wait_for_nth("generation_formed", 3);
    assert_ne!(node.worker(1), dead, "a new process has its place");
    let run = run.wait().expect_code(0);
    let node = node.wait().expect_code(0);

    assert_eq!(sizes(&run), [2, 1, 2]);
    assert_eq!(run.all("generation_aborted").len(), 1, "taking it in aborts nothing");
    assert_eq!(run.one("worker_left").text("worker"), "ox.1");
    let restart = node.stderr.lines().map(|line| serde_json::from_str::<Value>(line).expect("a log of JSON"));
    let restart: Vec<_> =
        restart.filter(|line| line["message"] == "a worker died: it is started again").collect();
    assert_eq!(restart.len(), 1, "{}", node.stderr);
    assert_eq!((&restart[0]["attempt"], &restart[0]["of"]), (&1.into(), &5.into()));
    each_sample_is_trained_on_once(&run, TRAIN as u64, 8);
}

/// Its thread can't be woken; the process is given up, by itself, and its place is taken by another.
#[test]
fn a_worker_that_is_stuck_is_removed_and_ends_and_is_started_again() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let job = job(&data)
        .endless()
        .set("data.cache_mb", 0)
        .set("cluster.heartbeat_timeout_s", 1.5)
        .set("cluster.step_timeout_s", 2);
    let mut run = scene.serve(&job, "stuck", &[]);
    let node = scene.join(&run, "ox", &["--workers-per-node", "2", "--probes", "127.0.0.1:0"]);
    let probes = probes(&node);
    run.wait_for_nth("epoch_started", 1);
    let _never_written = swallow_one_reader(&scene, &data.mask(&data.train[0]));
    let stuck = run.wait_for_nth("worker_left", 1);
    assert_eq!(
        (stuck.text("cause"), stuck.text("phase")),
        ("stuck", "training, waiting for data"),
        "{stuck:?}"
    );
    assert!(stuck.real("waited_s") >= 10.0, "{stuck:?}");
    let why = until_livez_is(503, &probes);
    assert!(
        why.contains("the training thread is stuck: in phase training, waiting for data, for 1"),
        "{why}"
    );
    run.wait_for_nth("generation_formed", 3);
    assert_eq!(until_livez_is(200, &probes), "alive\n", "another process is in its place");
    scene.run(&["stop", &run.address()]).expect_code(0);
    let run = run.wait().expect_code(75);
    let node = node.wait().expect_code(75);
    assert_eq!(sizes(&run), [2, 1, 2]);
    let last_words = "the training thread is stuck: in phase training, waiting for data";
    assert!(node.stderr.contains(last_words), "{}", node.stderr);
    assert!(node.stderr.contains("the coordinator removed this worker"), "{}", node.stderr);
    assert_eq!(node.stderr.matches("a worker died: it is started again").count(), 1, "{}", node.stderr);
    assert!(!node.stderr.contains("panicked"), "{}", node.stderr);
}

/// Whoever opens the file next waits for its bytes as long as what is returned is kept.
fn swallow_one_reader(scene: &Scene, link: &Path) -> OwnedFd {
    let target = fs::read_link(link).expect("samples are links");
    let (fifo, again) = (scene.path("fifo"), scene.path("again"));
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("the scene is writable");
    symlink(target, &again).expect("the scene is writable");
    fs::rename(&fifo, link).expect("the data set is the test's own");
    // It can't be opened so before there is a reader.
    let open = || rustix::fs::open(link, OFlags::WRONLY | OFlags::NONBLOCK, Mode::empty()).ok();
    let writer = until(open, || format!("nobody reads {}", link.display()));
    fs::rename(&again, link).expect("the data set is the test's own");
    writer
}

#[test]
fn a_node_that_is_told_to_stop_drains_its_workers() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let mut run = scene.serve(&job(&data).endless(), "drained", &[]);
    let node = join(&scene, &run);
    run.wait_for_mid_epoch();
    let workers = [0, 1].map(|rank| node.worker(rank));
    node.signal(Signal::TERM);
    node.wait().expect_code(75);
    assert!(!workers.iter().any(runs), "a worker outlived its node");

    run.wait_for_nth("worker_left", 2);
    scene.run(&["stop", &run.address()]).expect_code(0);
    let run = run.wait().expect_code(75);
    let mut left: Vec<_> =
        run.all("worker_left").iter().map(|event| (event.text("worker"), event.text("cause"))).collect();
    left.sort_unstable();
    assert_eq!(left, [("ox.0", "drained"), ("ox.1", "drained")]);
    assert!(run.all("generation_aborted").is_empty(), "nobody was interrupted");
}

#[test]
fn a_node_ends_its_workers_at_once_when_it_is_told_to_twice_and_they_end_with_it() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let job = job(&data).endless();
    for fatal in [Signal::INT, Signal::KILL] {
        let mut run = scene.serve(&job, &format!("ended-by-{}", fatal.as_raw()), &[]);
        let node = join(&scene, &run);
        run.wait_for_nth("epoch_started", 1);
        let workers = [0, 1].map(|rank| node.worker(rank));
        if fatal == Signal::INT {
            // It can't be drained.
            kill_process(workers[0], Signal::STOP).expect("it runs");
            node.signal(Signal::TERM);
            let said = || node.said().contains("a second signal ends them").then_some(());
            until(said, || format!("it heard no signal\n{}", node.said()));
        }
        node.signal(fatal);
        assert_eq!(node.wait().code, (fatal == Signal::INT).then_some(130));
        until(|| (!workers.iter().any(runs)).then_some(()), || format!("{workers:?} live on"));
    }
}

/// A dead process that nobody has waited for has no command line.
fn runs(worker: &Pid) -> bool {
    let command = fs::read(format!("/proc/{}/cmdline", worker.as_raw_nonzero()));
    command.is_ok_and(|command| !command.is_empty())
}

/// The run fails for each of them; none is started again for it.
#[test]
fn a_node_whose_run_fails_fails_with_it() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let job = job(&data).set("train.learning_rate", "1e30");
    let run = scene.serve(&job, "failed", &[]);
    let node = join(&scene, &run);
    run.wait().expect_code(1);
    // For a scheduler: another node would fare no better.
    let node = node.wait().expect_code(3);
    assert!(!node.stderr.contains("started again"), "{}", node.stderr);
    assert!(node.last_words().contains("no worker is left"), "{}", node.stderr);
}

#[test]
fn a_node_is_refused_what_it_can_t_do() {
    let scene = Scene::new();
    for (args, complaint) in [
        (["--workers-per-node", "2", "--advertise", "127.0.0.1:7500"], "2 workers can't share a port"),
        (["--workers-per-node", "0", "--threads", "1"], "give a number from 1, or auto"),
        (["--workers-per-node", "2", "--local-rank", "1"], "cannot be used with"),
        (["--workers-per-node", "2", "--device", "cuda:1"], "2 workers can't share a GPU"),
        (["--advertise", "here", "--threads", "1"], "not an address such as 10.0.0.7"),
    ] {
        let mut command = Command::new(musher_worker());
        command.args(["join", "http://127.0.0.1:1"]).args(args);
        let end = scene.start(command).wait().expect_code(2);
        assert!(end.stderr.contains(complaint), "{}", end.stderr);
    }
}

#[test]
fn a_node_finds_out_for_all_its_workers_that_no_coordinator_is_there() {
    let scene = Scene::new();
    let mut command = Command::new(musher_worker());
    command.args(["join", "http://127.0.0.1:1", "--workers-per-node", "auto", "--connect-timeout-s", "1"]);
    let end = scene.start(command).wait().expect_code(1);
    assert!(end.last_words().contains("no coordinator answered at http://127.0.0.1:1"), "{}", end.stderr);
    assert!(!end.stderr.contains("started again"), "{}", end.stderr);
}

/// The address at which a node's command answers probes.
fn probes(node: &Process) -> String {
    let address = || {
        let said = node.said();
        let line = said.lines().find(|line| line.contains("probes are answered"))?;
        let line: Value = serde_json::from_str(line).expect("a log of JSON");
        line["address"].as_str().map(str::to_owned)
    };
    until(address, || node.said())
}

/// Asks until the answer is that, and returns its text.
#[track_caller]
fn until_livez_is(code: u16, probes: &str) -> String {
    let asked = || {
        let answer = get(probes, "/livez");
        (answer.code == code).then(|| answer.text().to_owned())
    };
    until(asked, || format!("/livez never was {code}, but {:?}", get(probes, "/livez")))
}

#[test]
fn a_node_is_alive_while_it_waits_and_not_while_a_process_of_it_is_stopped() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let mut run = scene.serve(&job(&data).endless().set("cluster.workers", 3), "probed", &[]);
    let node = scene.join(&run, "ox", &["--workers-per-node", "2", "--probes", "127.0.0.1:0"]);
    let probes = probes(&node);
    // They wait for a third, which is nobody's fault.
    run.wait_for_nth("worker_joined", 2);
    assert_eq!(until_livez_is(200, &probes), "alive\n");
    assert_eq!(get(&probes, "/").code, 404);
    let stopped = Stopped::stop(node.worker(1));
    let why = until_livez_is(503, &probes);
    assert_eq!(why, "worker 1: its process does not answer within 2 s\n");
    stopped.wake();
    until_livez_is(200, &probes);
    // One that died is started again, which is no probe's business.
    kill_process(node.worker(0), Signal::KILL).expect("it runs");
    assert_eq!(get(&probes, "/livez").code, 200);
    node.signal(Signal::TERM);
    node.wait().expect_code(75);
    scene.run(&["stop", &run.address()]).expect_code(0);
    run.wait();
}
