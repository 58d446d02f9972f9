//! What a user gets wrong: one sentence that names what, where and what to do, exit code 2, and nothing
//! of an earlier run is touched.

use std::{fs, net::TcpListener, process::Command};

use musher_tests::{Job, Scene, binaries::musher_worker, run::Ended};

use crate::checks::contents;

#[track_caller]
fn says(run: &Ended, words: &[&str]) {
    for words in words {
        assert!(run.end.last_words().contains(words), "{words:?} is not in {}", run.end.stderr);
    }
    assert_eq!(run.end.stderr.lines().count(), 1, "one sentence: {}", run.end.stderr);
}

/// Keys in the job file and what is said of them; `{value}` is TOML.
#[test]
fn wrong_keys() {
    let scene = Scene::new();
    let data = scene.data_of(8, 8);
    let cases: &[(&str, &str, &[&str])] = &[
        ("train.epoch", "3", &["unknown key `train.epoch`", "did you mean `train.epochs`?"]),
        ("trian.epochs", "3", &["unknown key `trian", "`train`"]),
        ("data.colour", "true", &["unknown key `data.colour`"]),
        ("train.epochs", "\"three\"", &["`train.epochs`", "must be", "whole number"]),
        ("train.epochs", "0", &["`train.epochs`", "use 1 or more"]),
        ("train.learning_rate", "-0.1", &["`train.learning_rate`", "-0.1"]),
        ("data.image_size", "100", &["`data.image_size`", "multiple of 32", "use 96"]),
        ("augment.scale", "[0.9, 0.5]", &["`augment.scale`", "such as [0.7, 1.0]"]),
        ("early_stopping.monitor", "\"loss\"", &["`early_stopping.monitor`", "val_loss"]),
        ("server.grpc", "\"localhost\"", &["`server.grpc`", "such as 127.0.0.1:7400"]),
        ("cluster.device", "\"tpu\"", &["`cluster.device`", "cuda"]),
    ];
    for (key, value, said) in cases {
        let in_file = Job::tiny(&data).set(key, value);
        let run = scene.launch(&in_file, "wrong", 1, &[]).wait().expect_code(2);
        says(&run, said);
        says(&run, &["wrong.toml line "]);
        let assignment = format!("{key}={value}");
        let run = scene.launch(&Job::tiny(&data), "wrong", 1, &["--set", &assignment]).wait().expect_code(2);
        says(&run, said);
        says(&run, &["--set"]);
        assert!(!run.dir.exists());
    }
}

#[test]
fn wrong_command_lines() {
    let scene = Scene::new();
    let job = Job::tiny(&scene.data_of(8, 8));
    let run = scene.launch(&job, "line", 1, &["--set", "train.epochs"]).wait().expect_code(2);
    says(&run, &["`--set train.epochs` sets nothing", "section.key=value"]);
    let run = scene.launch(&job, "line", 0, &[]).wait().expect_code(2);
    says(&run, &["--workers must be at least 1"]);

    let end = scene.run(&["launch", "absent.toml"]).expect_code(2);
    assert!(end.last_words().contains("cannot read the job file absent.toml"), "{}", end.stderr);
    fs::write(scene.path("torn.toml"), "[train\nepochs = 3\n").expect("the scene's directory is writable");
    let end = scene.run(&["launch", "torn.toml"]).expect_code(2);
    assert!(end.last_words().contains("torn.toml line 1 is not TOML"), "{}", end.stderr);
    let end = scene.run(&["lunch"]).expect_code(2);
    assert!(end.stderr.contains("launch"), "{}", end.stderr);
}

/// On a machine that shows none, be there one or not.
#[test]
fn a_gpu_that_is_not_there() {
    let scene = Scene::new();
    let job = Job::tiny(&scene.data_of(8, 8)).set("cluster.device", "\"cuda\"");
    job.write(&scene.path("gpu.toml"));
    let mut launch = scene.musher(&["launch", "gpu.toml"]);
    launch.env("CUDA_VISIBLE_DEVICES", "");
    let end = scene.start(launch).wait().expect_code(2);
    assert!(end.last_words().contains("no NVIDIA GPU is visible on this machine"), "{}", end.stderr);

    let run = scene.serve(&job, "gpu", &[]);
    let address = run.address();
    for (device, code, said) in [
        ("auto", 1, "the job trains on GPUs (cluster.device = \"cuda\"), but no NVIDIA GPU is visible"),
        ("cpu", 1, "this worker was started with --device cpu"),
        ("cuda:0", 1, "--device cuda:0: "),
        ("gpu", 2, "give auto, cpu, cuda or cuda:K"),
    ] {
        let mut join = Command::new(musher_worker());
        join.args(["join", &address, "--device", device]).env("CUDA_VISIBLE_DEVICES", "");
        let end = scene.start(join).wait().expect_code(code);
        assert!(end.stderr.contains(said), "--device {device}: {}", end.stderr);
    }
}

#[test]
fn a_port_that_is_taken() {
    let scene = Scene::new();
    let taken = TcpListener::bind("127.0.0.1:0").and_then(|listener| Ok((listener.local_addr()?, listener)));
    let (address, _listener) = taken.expect("the system has a free port");
    let job = Job::tiny(&scene.data_of(8, 8)).set("server.grpc", format!("\"{address}\""));
    let run = scene.launch(&job, "port", 1, &[]).wait().expect_code(2);
    says(&run, &[&format!("cannot listen on {address}"), "--set server.grpc=IP:PORT"]);
    assert!(!run.dir.exists());
}

#[test]
fn resuming_nothing() {
    let scene = Scene::new();
    let job = Job::tiny(&scene.data_of(8, 8));
    let run = scene.launch(&job, "none", 1, &["--resume"]).wait().expect_code(2);
    says(&run, &["there is no run to resume in", "leave --resume out"]);
    assert!(!run.dir.exists());
}

#[test]
fn an_earlier_run_is_not_touched() {
    let scene = Scene::new();
    let job = Job::tiny(&scene.data_of(16, 8)).set("train.epochs", 1);
    let first = scene.launch(&job, "kept", 1, &[]).wait().expect_code(0);
    let kept = contents(&first.dir);

    let anew = scene.launch(&job, "kept", 1, &[]).wait().expect_code(2);
    says(&anew, &["exists", "--resume", "--run-dir"]);
    let reseeded = scene.launch(&job.clone().set("seed", 45), "kept", 1, &["--resume"]).wait().expect_code(2);
    says(&reseeded, &["seed is 45 in the job", "started with 44", "set it back to resume"]);
    let wider = scene.launch(&job.clone().set("model.width", 0.125), "kept", 1, &["--resume"]).wait();
    says(&wider.expect_code(2), &["model.width is 0.125 in the job", "started with 0.0625"]);
    assert_eq!(contents(&first.dir), kept);

    let state = first.dir.join("state.json");
    fs::write(&state, "{\"term\": 1, \"gener").expect("it is ours");
    let damaged = scene.launch(&job, "kept", 1, &["--resume"]).wait().expect_code(2);
    says(&damaged, &["state.json is damaged", "remove it and resume again"]);
    fs::remove_file(&state).expect("it is ours");
    scene.launch(&job.set("train.epochs", 2), "kept", 1, &["--resume"]).wait().expect_code(0);
}

#[test]
fn a_run_that_is_going_on_is_not_resumed() {
    let scene = Scene::new();
    let job = Job::tiny(&scene.data()).endless();
    let mut run = scene.launch(&job, "busy", 1, &[]);
    run.wait_for_nth("epoch_started", 1);
    // No bad usage: the other may be gone in a moment, and a scheduler tries again.
    let second = scene.launch(&job, "busy", 1, &["--resume"]).wait().expect_code(75);
    says(&second, &["another coordinator uses the run directory"]);
    run.wait_for_nth("epoch_finished", 1);
}
