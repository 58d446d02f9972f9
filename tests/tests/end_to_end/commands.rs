//! Commands that look at a run from outside.

use std::net::TcpListener;

use musher_proto::{job, size::NetworkSize};
use musher_tests::{Job, Scene};
use serde_json::Value;

#[test]
fn logs_tell_what_is_asked_for() {
    let scene = Scene::new();
    let run = scene.launch(&Job::tiny(&scene.data()), "told", 1, &[]).wait().expect_code(0);
    let dir = run.dir.display().to_string();
    let logs = |args: &[&str]| scene.run(&[&["logs", &dir], args].concat());
    let all = logs(&[]).expect_code(0).stdout;
    assert!(all.contains("run tiny started") && all.contains("epoch 2/2 validated"), "{all}");
    assert!(!all.contains('\x1b'), "no colours where no terminal is");
    assert_eq!(logs(&["--event", "validated", "--epoch", "2"]).expect_code(0).stdout.lines().count(), 1);
    let json = logs(&["--event", "validated", "--json"]).expect_code(0).stdout;
    assert!(json.lines().all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()), "{json}");
    let unknown = logs(&["--event", "valdated"]).expect_code(2);
    assert!(
        unknown.stderr.contains("there are") && unknown.stderr.contains("validated"),
        "{}",
        unknown.stderr
    );
    let unknown = logs(&["--worker", "nobody"]).expect_code(2);
    assert!(
        unknown.last_words().contains("there is no worker nobody in this run; there are"),
        "{}",
        unknown.stderr
    );
    scene.run(&["logs", "nowhere"]).expect_code(2);

    let checkpoints = |args: &[&str]| scene.run(&[&["checkpoints"], args].concat()).expect_code(0).stdout;
    let told = checkpoints(&["prune", &dir, "--keep", "1", "--dry-run"]);
    let listed = checkpoints(&["list", &dir]);
    assert_eq!(told == "there is nothing to remove\n", listed.lines().count() == 2, "{told}{listed}");
    let newest = run.all("checkpoint_committed").last().expect("there is one").text("id").to_owned();
    let exported = checkpoints(&["export", &dir, "last", "last.safetensors"]);
    assert!(exported.contains(&newest), "{exported}");
}

#[test]
fn a_run_is_resumed_or_started() {
    let scene = Scene::new();
    let data = scene.data();
    let first = scene.launch(&Job::tiny(&data).set("train.epochs", 1), "again", 1, &["--resume-or-start"]);
    let first = first.wait().expect_code(0);
    assert!(first.one("run_started")["resumed_from"].is_null());
    let second = scene.launch(&Job::tiny(&data), "again", 1, &["--resume-or-start"]).wait().expect_code(0);
    assert!(second.one("run_started")["resumed_from"].is_string());
}

#[test]
fn a_watched_status_ends_with_the_run() {
    let scene = Scene::new();
    let run = scene.launch(&Job::tiny(&scene.data()).set("train.epochs", 4), "watched", 1, &[]);
    let end = scene.run(&["status", &run.address(), "--watch"]).expect_code(0);
    assert!(end.stdout.contains("run tiny: "), "{}", end.stdout);
    run.wait().expect_code(0);
}

#[test]
fn completions_know_the_commands() {
    let scene = Scene::new();
    for shell in ["bash", "zsh", "fish"] {
        assert!(scene.run(&["completions", shell]).expect_code(0).stdout.contains("drain"), "{shell}");
    }
    scene.run(&["man", "pages"]).expect_code(0);
    assert!(scene.path("pages/musher-launch.1").exists());
}

#[test]
fn a_doctor_finds_what_a_run_would_fail_on() {
    let scene = Scene::new();
    let data = scene.data();
    Job::tiny(&data).write(&scene.path("tiny.toml"));
    let doctor = |args: &[&str]| {
        let end = scene.run(&[&["doctor", "tiny.toml", "--json"], args].concat());
        let findings: Vec<Value> =
            serde_json::from_str(&end.stdout).unwrap_or_else(|_| panic!("{}", end.stderr));
        (end, findings)
    };
    let of = |findings: &[Value], check: &str| {
        findings.iter().find(|it| it["check"] == check).cloned().unwrap_or_else(|| panic!("no {check}"))
    };
    let (end, findings) = doctor(&[]);
    end.expect_code(0);
    assert!(findings.iter().all(|it| it["verdict"] != "fail"), "{findings:?}");
    for check in
        ["libtorch", "CUDA", "open files", "clock", "server.grpc", "run directory", "processor", "/dev/shm"]
    {
        of(&findings, check);
    }
    assert!(
        of(&findings, "libtorch")["says"].as_str().is_some_and(|says| says.contains("2.11")),
        "{findings:?}"
    );
    let says = of(&findings, "data set")["says"].clone();
    assert!(says.as_str().is_some_and(|says| says.starts_with("40 training and 12 validation")), "{says}");
    assert!(!scene.path("runs").exists(), "it leaves all as it was");

    let taken = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    let taken = taken.local_addr().map(|address| (taken, address)).expect("it is bound");
    let port = format!("server.grpc=\"{}\"", taken.1);
    let (end, findings) = doctor(&["--set", "data.root=nowhere", "--set", &port]);
    end.expect_code(1);
    for check in ["data set", "server.grpc"] {
        let finding = of(&findings, check);
        assert!(finding["verdict"] == "fail" && finding["advice"].is_string(), "{finding}");
    }
    let run = scene.serve(&Job::tiny(&data), "asked", &[]);
    let end = scene.run(&["doctor", "--coordinator", &run.address()]).expect_code(0);
    assert!(end.stdout.contains("its clock is this machine's"), "{}", end.stdout);
    let gone = scene.run(&["doctor", "--coordinator", "http://127.0.0.1:1"]).expect_code(1);
    assert!(gone.stdout.lines().any(|line| line.starts_with("fail  coordinator")), "{}", gone.stdout);
}

#[test]
fn a_dry_run_prints_a_job_and_what_the_run_then_comes_to() {
    let scene = Scene::new();
    let job = Job::tiny(&scene.data_of(42, 12)).set("train.epochs", 1);
    job.write(&scene.path("tiny.toml"));
    let dry = scene.run(&["launch", "tiny.toml", "--workers", "2", "--dry-run"]).expect_code(0).stdout;
    std::fs::write(scene.path("again.toml"), &dry).expect("the scene is writable");
    assert_eq!(
        scene.run(&["launch", "again.toml", "--workers", "2", "--dry-run"]).expect_code(0).stdout,
        dry
    );
    assert!(dry.contains("# 42 training samples: 6 steps an epoch, 6 in 1 epochs"), "{dry}");
    assert!(dry.contains("the last of an epoch has 2: 1 a rank"), "{dry}");
    let run = scene.launch(&job, "real", 2, &[]).wait().expect_code(0);
    assert_eq!(run.one("epoch_finished").number("step"), 6);
    let checkpoint = run.dir.join("checkpoints").join(run.one("checkpoint_committed").text("id"));
    let parts = std::fs::read_dir(checkpoint).expect("the checkpoint is there").flatten();
    let parts = parts.filter(|file| file.file_name().to_string_lossy().starts_with("part-"));
    let bytes: u64 = parts.map(|file| file.metadata().map_or(0, |file| file.len())).sum();
    let said = NetworkSize::of(&job::load(&dry, "dry", &[]).expect("what is printed is a job"));
    assert_eq!(said.state_bytes, bytes);
}
