//! Runs whose checkpoints are in an object store: a real S3 server, with real faults.

use musher_store_server::{BUCKET, Effect, Fault, S3Server};
use musher_tests::{Job, Scene};
use rustix::process::Signal;

use crate::checks::each_sample_is_trained_on_once;

const URL: &str = "s3://pets/runs/tiny";

fn scene(server: &S3Server) -> Scene {
    assert_eq!(BUCKET, "pets");
    Scene::new().with_environment(server.environment())
}

fn job(scene: &Scene) -> Job {
    Job::tiny(&scene.data()).set("checkpoint.store", format!("{URL:?}"))
}

/// The machine goes down, and nothing of its disk is left: another goes on, with another number of workers.
#[test]
fn a_run_goes_on_in_a_new_directory_with_other_workers() {
    let server = S3Server::start();
    let scene = scene(&server);
    let job = job(&scene).set("train.epochs", 4);
    for (target, effect) in [
        ("part-0.bin", Effect::CutRequest(1000)),
        ("part-0.bin", Effect::Status(503)),
        ("weights.safetensors", Effect::LoseResponse),
        ("manifest.json", Effect::Status(500)),
    ] {
        server.order(Fault { method: "PUT", target: target.into(), effect });
    }
    let mut first = scene.launch(&job, "first", 2, &[]);
    first.wait_for_nth("checkpoint_committed", 1);
    server.order(Fault { method: "PUT", target: "index.json".into(), effect: Effect::LoseResponse });
    first.wait_for_nth("checkpoint_committed", 2);
    assert_eq!(server.faults_left(), 0, "{:#?}", server.seen());
    let told = first.kill();
    assert!(told.iter().all(|event| event.name() != "checkpoint_failed"), "{told:#?}");
    let term = told[0].number("term");

    let second = scene.launch(&job, "second", 1, &["--resume"]).wait().expect_code(0);
    let started = second.one("run_started");
    assert!(started.number("term") > term, "{started:?} follows term {term}");
    assert!(started.has("resumed_from"), "{started:?}");
    each_sample_is_trained_on_once(&second, 40, 8);
    assert_eq!(second.end.last_line()["epochs"], 4);
    assert!(second.dir.join("best.safetensors").is_file() && second.dir.join("last.safetensors").is_file());
    assert!(!second.dir.join("checkpoints").exists(), "all are in the store");

    let listed = scene.run(&["checkpoints", "list", URL, "--json"]).expect_code(0);
    let listed: serde_json::Value = serde_json::from_str(&listed.stdout).expect("it is JSON");
    let listed = listed.as_array().expect("a list");
    assert!((3..=4).contains(&listed.len()), "the newest three and the best: {listed:#?}");
    assert_eq!(listed[0]["id"], "e0004-s00000020");
    scene.run(&["checkpoints", "verify", URL]).expect_code(0);
    scene.run(&["checkpoints", "export", URL, "best", "weights.safetensors"]).expect_code(0);
    let exported = std::fs::read(scene.path("weights.safetensors")).expect("it was written");
    assert!(exported == std::fs::read(second.dir.join("best.safetensors")).expect("it was written"));
}

#[test]
fn what_is_wrong_with_the_store_is_said_before_there_is_a_run() {
    let server = S3Server::start();
    let scene = scene(&server);
    let job = job(&scene).set("train.epochs", 1);
    scene.launch(&job, "done", 1, &[]).wait().expect_code(0);
    let ends = |code: i32, job: &Job, name: &str, expected: &str| {
        let ended = scene.launch(job, name, 1, &[]).wait().expect_code(code);
        assert!(ended.end.last_words().contains(expected), "{}", ended.end.stderr);
        assert!(!ended.dir.join("state.json").exists());
    };
    ends(2, &job, "again", "holds the checkpoints of a run already: continue that one with --resume");
    let elsewhere = job.clone().set("checkpoint.store", "\"s3://nowhere/runs\"");
    ends(2, &elsewhere, "nowhere", "there is no bucket \"nowhere\"");
    let secret = job.clone().set("checkpoint.store", "\"s3://key:hush@pets/runs\"");
    ends(2, &secret, "secret", "credentials come from the environment");

    let mut list = scene.musher(&["checkpoints", "list", URL]);
    list.env("AWS_SECRET_ACCESS_KEY", "wrong");
    let ended = scene.start(list).wait().expect_code(2);
    assert!(ended.last_words().contains("the credentials are refused"), "{}", ended.stderr);
}

/// As when a cluster starts a coordinator again elsewhere, and the first one was not dead.
#[test]
fn a_coordinator_that_was_paused_while_another_took_over_ends() {
    let server = S3Server::start();
    let scene = scene(&server);
    let job = job(&scene).endless();
    let mut paused = scene.launch(&job, "paused", 1, &[]);
    paused.wait_for_nth("checkpoint_committed", 1);
    paused.signal(Signal::STOP);
    let mut other = scene.launch(&job, "other", 1, &["--resume"]);
    other.wait_for_nth("checkpoint_committed", 1);
    paused.signal(Signal::CONT);
    let paused = paused.wait().expect_code(1);
    let words = paused.end.last_words();
    assert!(words.contains("another coordinator has taken") && words.contains("in term 2"), "{words}");
    assert!(paused.one("run_failed").text("reason").contains("another coordinator"));

    other.signal(Signal::TERM);
    let other = other.wait().expect_code(75);
    assert!(other.all("checkpoint_failed").is_empty(), "{:#?}", other.events);
    scene.run(&["checkpoints", "verify", URL]).expect_code(0);
}
