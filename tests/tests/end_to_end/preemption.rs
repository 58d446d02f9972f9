//! A node is taken away: SIGTERM for every process on it at once, and SIGKILL when the time of grace is over.

use std::time::{Duration, Instant};

use musher_store_server::{Effect, Fault, S3Server};
use musher_tests::{
    Job, Scene, checkpoints,
    process::until,
    run::{Ended, Run},
};
use rustix::process::{Signal, kill_process};

/// Kubernetes gives 30 s.
const GRACE: Duration = Duration::from_secs(30);
const URL: &str = "s3://pets/runs/tiny";

/// For the coordinator and its workers, as near to each other as signals can be sent.
fn terminate_all(run: &Run) {
    let workers = run.children();
    run.signal(Signal::TERM);
    for worker in workers {
        // An error means that it has ended already.
        let _ = kill_process(worker, Signal::TERM);
    }
}

/// Takes no checkpoint but the one of its end.
fn job(scene: &Scene) -> Job {
    Job::tiny(&scene.data_of(160, 12)).endless().set("checkpoint.every_epochs", 0)
}

fn saved_in_time(scene: &Scene, job: &Job, place: &str) {
    let mut run = scene.launch(job, "taken", 2, &[]);
    run.wait_for("a step", |event| event.name() == "progress" && event.number("step") > 0);
    let told = Instant::now();
    terminate_all(&run);
    let ended = run.wait().expect_code(75);
    assert!(told.elapsed() < GRACE, "{:?}", told.elapsed());
    let saved = ended.all("checkpoint_committed").last().expect("the state is saved").text("id").to_owned();
    scene.run(&["checkpoints", "verify", place]).expect_code(0);

    // By three, what two have left.
    let resumed = resumed_for_an_epoch(scene, job, 3);
    assert_eq!(resumed.one("run_started").text("resumed_from"), saved);
}

fn resumed_for_an_epoch(scene: &Scene, job: &Job, workers: u32) -> Ended {
    let mut run = scene.launch(job, "taken", workers, &["--resume"]);
    run.wait_for_nth("validated", 1);
    run.signal(Signal::TERM);
    run.wait().expect_code(75)
}

#[test]
fn the_state_is_saved_in_a_directory() {
    let scene = Scene::new();
    saved_in_time(&scene, &job(&scene), "runs/taken");
}

#[test]
fn the_state_is_saved_in_an_object_store() {
    let server = S3Server::start();
    let scene = Scene::new().with_environment(server.environment());
    let job = job(&scene).set("checkpoint.store", format!("{URL:?}"));
    saved_in_time(&scene, &job, URL);
}

/// The grace is over while the checkpoint is written: it is absent, and the one before is whole.
#[test]
fn a_save_that_is_cut_short_is_absent() {
    let scene = Scene::new();
    let job = job(&scene).set("checkpoint.every_steps", 4);
    let mut run = scene.launch(&job, "taken", 2, &[]);
    run.wait_for_mid_epoch();
    terminate_all(&run);
    let store = run.dir().join("checkpoints");
    until(
        || (checkpoints::pending(&store).is_some() || run.has_ended()).then_some(()),
        || "no checkpoint was begun".into(),
    );
    run.kill();
    scene.run(&["checkpoints", "verify", "runs/taken"]).expect_code(0);
    let resumed = resumed_for_an_epoch(&scene, &job, 1);
    assert!(resumed.one("run_started").has("resumed_from"));
}

#[test]
fn a_save_that_is_cut_short_in_an_object_store_is_absent() {
    let server = S3Server::start();
    let scene = Scene::new().with_environment(server.environment());
    let job = job(&scene).set("checkpoint.store", format!("{URL:?}"));
    let mut run = scene.launch(&job, "taken", 2, &[]);
    run.wait_for("a step", |event| event.name() == "progress" && event.number("step") > 0);
    // The commit is on its way, and stays there.
    let effect = Effect::Late(GRACE * 10);
    server.order(Fault { method: "PUT", target: "index.json".into(), effect });
    terminate_all(&run);
    until(|| (server.faults_left() == 0).then_some(()), || run.said());
    run.kill();
    let listed = scene.run(&["checkpoints", "list", URL]).expect_code(0);
    assert_eq!(listed.stdout, "there are no checkpoints\n");

    let resumed = resumed_for_an_epoch(&scene, &job, 1);
    let saved: Vec<_> = resumed.all("checkpoint_committed").iter().map(|event| event.text("id")).collect();
    assert!(!saved.is_empty(), "{:#?}", resumed.events);
    // In folders that carry the term: what the first coordinator left lies in others.
    let is_saved = |key: &String| saved.iter().any(|id| key.starts_with(&format!("runs/tiny/{id}.t2-")));
    let mut left = server.keys("runs/tiny/");
    left.retain(|key| key != "runs/tiny/index.json" && !is_saved(key));
    assert!(left.is_empty(), "beside {saved:?}: {left:#?}");
}
