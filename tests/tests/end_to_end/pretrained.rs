//! Runs whose encoder starts from pretrained weights. Those of another run serve as well as ImageNet's.

use std::{fs, path::PathBuf};

use musher_tests::{Job, Scene};

use crate::checks::weights;

/// A run's `best.safetensors`, and the job it was made by.
fn other_run(scene: &Scene) -> (Job, PathBuf) {
    let job = Job::tiny(&scene.data()).set("train.epochs", 1);
    let run = scene.launch(&job, "other", 1, &[]).wait().expect_code(0);
    (job, run.dir.join("best.safetensors"))
}

fn quoted(text: impl std::fmt::Display) -> String {
    format!("{:?}", text.to_string())
}

#[test]
fn an_encoder_starts_from_the_weights_and_a_resumed_run_does_without() {
    let scene = Scene::new();
    let (job, file) = other_run(&scene);
    let pretrained = weights(&file);
    let job = job.set("model.pretrained", quoted(file.display())).set("model.freeze_encoder", true);
    let run = scene.launch(&job, "started", 2, &[]).wait().expect_code(0);

    let loaded = run.one("pretrained_loaded");
    assert_eq!(loaded.text("file"), file.display().to_string());
    assert_eq!(loaded.text("sha256").len(), 64);
    assert_eq!(loaded.text("ignored"), "decoder.* (72), head.* (2)");
    let best = weights(&run.dir.join("best.safetensors"));
    for (name, values) in &best {
        let is_encoder = !name.starts_with("decoder.") && !name.starts_with("head.");
        assert_eq!(pretrained[name] == *values, is_encoder, "{name}");
    }

    fs::remove_file(&file).expect("the file is there");
    let job = job.set("train.epochs", 2);
    let resumed = scene.launch(&job, "started", 2, &["--resume"]).wait().expect_code(0);
    assert!(resumed.all("pretrained_loaded").is_empty());
    assert_eq!(resumed.one("epoch_finished").number("epoch"), 2);
}

#[test]
fn weights_that_do_not_fit_end_the_run_with_a_sentence() {
    let scene = Scene::new();
    let (job, file) = other_run(&scene);
    let job = job.set("model.pretrained", quoted(file.display()));
    let damaged = scene.path("damaged.pth");
    fs::write(&damaged, &fs::read(&file).expect("it is a file")[..1000]).expect("it can be written");
    let wrong = [
        ("damaged", "model.pretrained", quoted(damaged.display()), "it is damaged"),
        ("unknown", "model.pretrained", quoted("torchvision:resnet18"), "torchvision:resnet50"),
        ("unverified", "model.pretrained", quoted("http://127.0.0.1:9/w.pth"), "#sha256="),
        ("encoder", "model.encoder", quoted("keras"), "set model.encoder = \"torchvision\""),
        ("width", "model.width", "0.125".to_owned(), "bn1.bias has shape [4], not [8]"),
        ("normalize", "data.normalize", quoted("auto"), "set data.normalize = \"unit\""),
    ];
    let absent = scene.launch(&job.clone().set("model.pretrained", quoted("none.pth")), "absent", 1, &[]);
    let absent = absent.wait().expect_code(2);
    assert!(absent.end.last_words().contains("there is no file none.pth, which `model.pretrained` names"));
    assert!(!absent.dir.exists());
    for (name, key, value, part) in wrong {
        let run = scene.launch(&job.clone().set(key, value), name, 1, &[]).wait().expect_code(1);
        let reason = run.one("run_failed").text("reason").to_owned();
        assert!(reason.contains("model.pretrained = ") && reason.contains(part), "{name}: {reason}");
        assert!(!reason.contains('\n'), "{reason}");
    }
}
