//! A coordinator that is killed and started again: its workers live on and bring what they hold.

use std::{fs, thread, time::Duration};

use musher_tests::{
    DataSet, Event, Job, Process, Scene,
    process::until,
    run::{Ended, Run},
};
use rustix::process::{Pid, Signal};

use crate::checks::nothing_is_lost;

/// 20 steps an epoch.
const TRAIN: usize = 160;
const VAL: usize = 48;

fn job(data: &DataSet) -> Job {
    Job::tiny(data)
        .on_one_port()
        .set("cluster.workers", 2)
        .set("cluster.heartbeat_timeout_s", 30)
        .set("checkpoint.every_steps", 4)
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

#[track_caller]
fn nothing_was_lost(before: &[Event], run: &Ended, data: &DataSet) {
    assert_eq!(run.one("coordinator_restarted").number("term"), 2);
    assert!(run.all("worker_left").is_empty(), "{:?}", run.all("worker_left"));
    let all: Vec<_> = before.iter().chain(&run.events).cloned().collect();
    nothing_is_lost(&all, data);
    let in_teams = all.iter().filter(|event| event.has("world_size"));
    for team in in_teams {
        assert_eq!(team.number("world_size"), 2, "it was formed before both were back: {team:?}");
    }
    for name in ["epoch_finished", "validated"] {
        let ends = all.iter().filter(|event| event.name() == name);
        let steps: Vec<_> = ends.map(|event| event.number("step")).collect();
        assert_eq!(steps, [20, 40, 60], "{name}");
    }
    assert_eq!(run.end.last_line()["epochs"], 3);
    assert!(run.dir.join("best.safetensors").is_file());
}

#[test]
fn in_the_middle_of_an_epoch_the_generation_goes_on() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, VAL);
    let (before, run) = survives(&scene, &job(&data), |run| {
        run.wait_for_mid_epoch();
    });
    nothing_was_lost(&before, &run, &data);
    let formed = before.iter().filter(|event| event.name() == "generation_formed").collect::<Vec<_>>();
    assert_eq!(formed.len(), 1);
    let continued = run.one("generation_continued");
    assert_eq!(continued.number("generation"), formed[0].number("generation"));
    assert_eq!(continued.number("world_size"), 2);
    assert!(run.all("generation_formed").is_empty(), "nobody stopped for it");
}

#[test]
fn during_validation() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, VAL);
    let (before, run) = survives(&scene, &job(&data), |run| {
        run.wait_for_nth("epoch_finished", 1);
    });
    nothing_was_lost(&before, &run, &data);
}

#[test]
fn in_the_middle_of_a_checkpoint() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, VAL);
    let mut caught = None;
    let (before, run) = survives(&scene, &job(&data), |run| {
        caught = Some(run.stop_in_a_checkpoint(run.id()));
    });
    nothing_was_lost(&before, &run, &data);
    let (_, id) = caught.expect("it was caught before it was killed");
    let committed = |event: &&Event| event.name() == "checkpoint_committed" && event.text("id") == id;
    assert_eq!(before.iter().filter(committed).count(), 0);
    for checkpoint in fs::read_dir(run.dir.join("checkpoints")).expect("it is there").flatten() {
        assert!(checkpoint.path().join("manifest.json").is_file(), "{checkpoint:?} is half-written");
    }
}

/// The team is listened for until the heartbeat time-out, then it is formed without the one that is gone.
#[test]
fn with_a_worker_that_died_meanwhile() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, VAL);
    let job = job(&data).set("cluster.heartbeat_timeout_s", 2).set("cluster.workers", 3);
    let mut run = scene.serve(&job, "bereaved", &[]);
    let mut workers = ["ox", "mule", "dog"].map(|name| scene.join(&run, name, &[]));
    run.wait_for_mid_epoch();
    let before = run.kill();
    workers[1].kill_with_children();
    // Longer than a coordinator listens: what workers hold does not depend on it.
    thread::sleep(Duration::from_millis(2500));
    let run = scene.serve(&job, "bereaved", &["--resume"]).wait().expect_code(0);
    let [ox, _, dog] = workers;
    for survivor in [ox, dog] {
        survivor.wait().expect_code(0);
    }
    let formed = run.one("generation_formed");
    assert_eq!(formed.number("world_size"), 2);
    let all: Vec<_> = before.iter().chain(&run.events).cloned().collect();
    nothing_is_lost(&all, &data);
}

#[test]
fn workers_that_were_launched_end_with_a_launcher_that_is_killed() {
    let scene = Scene::new();
    let job = Job::tiny(&scene.data()).endless();
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

/// As when its pod is moved to another node.
#[test]
fn one_that_hands_over_costs_as_little() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, VAL);
    let job = job(&data).endless();
    let run = scene.serve(&job, "moved", &["--on-sigterm", "hand-over"]);
    let workers = ["ox", "mule"].map(|name| scene.join(&run, name, &[]));
    let mut run = run;
    run.wait_for_mid_epoch();
    run.signal(Signal::TERM);
    let before = run.wait().expect_code(75);
    assert!(before.all("run_finished").is_empty(), "the run goes on");
    let mut run = scene.serve(&job, "moved", &["--resume", "--on-sigterm", "hand-over"]);
    let continued = run.wait_for_nth("generation_continued", 1);
    assert_eq!(continued.number("world_size"), 2);
    // Where the workers are told to leave too, nobody is left to hand over to.
    run.signal(Signal::TERM);
    for worker in &workers {
        worker.signal(Signal::TERM);
    }
    let ended = run.wait().expect_code(75);
    assert_eq!(ended.one("run_finished").text("status"), "stopped");
    assert!(!ended.all("checkpoint_committed").is_empty());
    for worker in workers {
        worker.wait().expect_code(75);
    }
}
