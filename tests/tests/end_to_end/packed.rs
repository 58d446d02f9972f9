//! Data sets in tar shards, and validation that is held out of training.

use std::fs;

use musher_tests::{Job, Scene};

use crate::checks::figures;

#[test]
fn packed_and_unpacked_copies_are_of_one_team_and_come_to_the_same_bits() {
    let scene = Scene::new();
    let data = scene.data();
    let (root, packed, cache) = (text(data.root()), text(&scene.path("packed")), scene.path("cache"));
    scene.run(&["data", "pack", &root, &packed, "--shard-mb", "1"]).expect_code(0);
    scene.run(&["data", "check", &packed]).expect_code(0);
    let job = Job::tiny(&data)
        .set("data.cache_mb", 0)
        .set("data.disk_cache_mb", 64)
        .set("data.disk_cache_dir", format!("{:?}", text(&cache)));
    let unpacked = scene.launch(&job, "unpacked", 2, &[]).wait().expect_code(0);
    assert!(!cache.exists(), "files need no copies");

    let mixed = scene.serve(&job.set("cluster.workers", 2), "mixed", &[]);
    let workers = [scene.join(&mixed, "files", &[]), scene.join(&mixed, "shards", &["--data-root", &packed])];
    let mixed = mixed.wait().expect_code(0);
    for worker in workers {
        worker.wait().expect_code(0);
    }
    assert_eq!(figures(&mixed), figures(&unpacked));
    let kept = fs::read_dir(&cache).expect("what is read is kept").flatten();
    let kept: usize = kept.map(|set| fs::read_dir(set.path()).map_or(0, Iterator::count)).sum();
    assert!((1..=data.train.len() + data.val.len()).contains(&kept), "{kept}");
}

#[test]
fn a_shard_that_vanishes_costs_no_checkpoint() {
    let scene = Scene::new();
    let data = scene.data_of(16, 8);
    let packed = scene.path("packed");
    scene.run(&["data", "pack", &text(data.root()), &text(&packed), "--shard-mb", "1"]).expect_code(0);
    let job = Job::tiny(&data)
        .set("data.root", format!("{:?}", text(&packed)))
        .set("data.cache_mb", 0)
        .set("train.epochs", 100_000)
        .set("early_stopping.patience", 100_000);
    let mut run = scene.launch(&job, "robbed", 1, &["--max-restarts", "0"]);
    run.wait_for("checkpoint_committed", |event| event.name() == "checkpoint_committed");
    let (shard, away) = (packed.join("trainval-000000.tar"), scene.path("away.tar"));
    fs::rename(&shard, &away).expect("it is ours");
    let run = run.wait().expect_code(1);
    let reason = run.one("run_failed").text("reason");
    assert!(reason.contains("trainval-000000.tar is gone"), "{reason}");

    // A checkpoint that was committed while the run failed is not told of.
    let epochs = run.all("validated").last().map_or(1, |event| event.number("epoch")) + 1;
    let job = job.set("train.epochs", epochs);
    let refused = scene.launch(&job, "robbed", 1, &["--resume"]).wait().expect_code(2);
    assert!(refused.end.last_words().contains("is gone"), "{}", refused.end.stderr);
    fs::rename(&away, &shard).expect("it is ours");
    let resumed = scene.launch(&job, "robbed", 1, &["--resume"]).wait().expect_code(0);
    assert_eq!(resumed.all("epoch_finished").last().map(|event| event.number("epoch")), Some(epochs));
}

#[test]
fn validation_is_held_out_and_the_test_split_is_left_for_the_end() {
    let scene = Scene::new();
    let data = scene.data_of(16, 8);
    let test_list = data.root().join("annotations/test.txt");
    let away = scene.path("test.txt");
    fs::rename(&test_list, &away).expect("it is ours");
    let job = Job::tiny(&data).set("data.val_fraction", 0.25);
    let run = scene.launch(&job, "held-out", 2, &[]).wait().expect_code(0);
    assert_eq!(run.all("epoch_finished").last().map(|event| event.number("samples")), Some(12));
    assert_eq!(run.all("validated").last().map(|event| event.number("samples")), Some(4));

    fs::rename(&away, &test_list).expect("it is ours");
    let best = text(&run.dir.join("best.safetensors"));
    let eval = |more: &[&str]| {
        let arguments = [&["eval", "--weights", &best, "--json", "--device", "cpu"], more].concat();
        let end = scene.run_worker(&arguments).expect_code(0);
        let report = end.last_line();
        (report["samples"].as_u64(), report["data_of_the_run"].as_bool())
    };
    assert_eq!(eval(&[]), (Some(4), Some(true)));
    assert_eq!(eval(&["--split", "annotations/test.txt"]), (Some(8), Some(false)));

    let changed = Job::tiny(&data).set("data.val_fraction", 0.5).set("train.epochs", 3);
    let refused = scene.launch(&changed, "held-out", 1, &["--resume"]).wait().expect_code(2);
    assert!(refused.end.last_words().contains("data.val_fraction"), "{}", refused.end.stderr);
    let nothing = Job::tiny(&data).set("data.val_fraction", 0.01);
    let refused = scene.launch(&nothing, "nothing", 1, &[]).wait().expect_code(2);
    assert!(refused.end.last_words().contains("nothing to validate on"), "{}", refused.end.stderr);
}

fn text(path: &std::path::Path) -> String {
    path.display().to_string()
}
