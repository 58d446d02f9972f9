//! Commands that look at a run from outside.

use musher_tests::{Job, Scene};

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
    scene.run(&["logs", "nowhere"]).expect_code(2);
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
