//! What a run leaves is of use: its weights evaluate as the run did, and predict any image.

use std::fs;

use musher_tests::{End, Job, Scene};

use crate::checks::weights;

fn refused(end: End, words: &[&str]) {
    let end = end.expect_code(2);
    assert_eq!(end.stderr.lines().count(), 1, "one sentence: {}", end.stderr);
    for words in words {
        assert!(end.stderr.contains(words), "{words:?} is not in {}", end.stderr);
    }
}

#[test]
fn evaluate_as_the_run_did_and_predict() {
    let scene = Scene::new();
    let data = scene.data();
    let run = scene.launch(&Job::tiny(&data), "useful", 2, &[]).wait().expect_code(0);
    let weights = run.dir.join("best.safetensors");
    let weights = weights.to_str().expect("the scene's directory is UTF-8");

    let eval =
        |args: &[&str]| scene.run_worker(&[&["eval", "--threads", "1", "--weights", weights], args].concat());
    let found = eval(&["--json"]).expect_code(0).last_line();
    let best = run.one("run_finished").number("best_epoch");
    let validated = run.all("validated").into_iter().find(|event| event.number("epoch") == best);
    let validated = validated.expect("the best epoch was validated");
    let classes = ["val_iou_foreground", "val_iou_background", "val_iou_boundary"];
    for figure in ["epoch", "step", "samples", "val_loss", "val_accuracy", "val_miou"].iter().chain(&classes)
    {
        assert_eq!(found[*figure], validated[*figure], "{figure}");
    }
    assert_eq!(found["data_of_the_run"], true);
    let other = eval(&["--json", "--split", "annotations/trainval.txt"]).expect_code(0).last_line();
    assert_eq!((&other["samples"], &other["data_of_the_run"]), (&40.into(), &false.into()));

    let image = data.image(&data.val[0]);
    let image = image.to_str().expect("the scene's directory is UTF-8");
    let predict = |args: &[&str]| {
        scene.run_worker(
            &[&["predict", "--threads", "1", "--weights", weights, "--out", "out"], args].concat(),
        )
    };
    let folder = data.root().join("images");
    predict(&["--probabilities", folder.to_str().expect("UTF-8")]).expect_code(0);
    let size = image::image_dimensions(image).expect("it is an image");
    for kind in ["mask.png", "overlay.png"] {
        let written = scene.path(&format!("out/{}.{kind}", data.val[0]));
        assert_eq!(image::image_dimensions(written).expect("it is an image"), size);
    }
    let pixels = u64::from(size.0) * u64::from(size.1);
    let probabilities = fs::metadata(scene.path(&format!("out/{}.probabilities.npy", data.val[0])));
    assert!(
        (0..=128).contains(&(probabilities.expect("it is written").len() - pixels * 3 * 4)),
        "f32 and a header"
    );

    fs::write(scene.path("note.jpg"), "no image").expect("the scene's directory is writable");
    let mixed = predict(&["note.jpg", image]).expect_code(1);
    assert!(
        mixed.stderr.contains("cannot decode note.jpg") && mixed.stdout.contains("1 image in"),
        "{mixed:?}"
    );
    let mixed = scene.path("mixed");
    fs::create_dir(&mixed).expect("the scene's directory is writable");
    for (name, bytes) in [("broken.jpg", "no image"), ("list.txt", "no image")] {
        fs::write(mixed.join(name), bytes).expect("the scene's directory is writable");
    }
    fs::copy(image, mixed.join("whole.jpg")).expect("the scene's directory is writable");
    let mixed = predict(&["mixed"]).expect_code(1);
    assert!(
        mixed.stderr.contains("cannot decode mixed/broken.jpg")
            && mixed.stderr.contains("such as mixed/list.txt"),
        "{mixed:?}"
    );
    refused(predict(&["absent.jpg"]), &["there is no image at absent.jpg"]);
    refused(predict(&["out"]), &["--out out is the directory of the images"]);
    let with = |weights| scene.run_worker(&["eval", "--weights", weights]);
    refused(with("absent.safetensors"), &["there are no weights at absent.safetensors"]);
    refused(with("note.jpg"), &["note.jpg is no weights file"]);
}

/// The encoder of the run is the pretrained one, to the bit, as it is frozen; the run can be looked at.
#[test]
fn start_from_an_encoder_that_was_pretrained_here() {
    let scene = Scene::new();
    let data = scene.data_of(16, 8);
    let job = Job::tiny(&data).set("train.epochs", 1);
    job.write(&scene.path("tiny.toml"));
    let pretrain = |task| {
        let fixed =
            ["pretrain", "tiny.toml", "--threads", "1", "--epochs", "1", "--out", "encoder.safetensors"];
        scene.run_worker(&[&fixed[..], &["--task", task]].concat())
    };
    let told = pretrain("rotation").expect_code(0);
    assert!(told.stdout.contains("epoch 1/1  loss"), "{}", told.stdout);
    let encoder = scene.path("encoder.safetensors");
    let job = job.set("model.pretrained", format!("{:?}", encoder.display().to_string()));
    let job = job.set("model.freeze_encoder", true);
    let run = scene.launch(&job, "pretrained", 2, &[]).wait().expect_code(0);
    let (start, end) = (weights(&encoder), weights(&run.dir.join("best.safetensors")));
    for (name, tensor) in &start {
        let encoder = !name.starts_with("decoder.") && !name.starts_with("head.");
        assert!(!encoder || end[name] == *tensor, "{name}");
    }

    fs::write(data.train_list(), format!("{} 1 - 1\n", data.train[0]))
        .expect("the scene's directory is writable");
    refused(pretrain("species"), &["trainval.txt line 1 has no species", "--task rotation"]);

    let table = scene.run(&["compare", "first=runs/pretrained", "--out", "pictures"]).expect_code(0);
    assert!(table.stdout.lines().nth(1).is_some_and(|line| line.starts_with("first")), "{}", table.stdout);
    assert!(image::open(scene.path("pictures/compare.png")).is_ok());
    let page = fs::read_to_string(scene.path("pictures/compare.html")).expect("it is written");
    assert_eq!(page.matches("src=\"data:image/png;base64,").count(), 6 * 3, "six samples");
    refused(scene.run(&["compare", "tiny.toml"]), &["tiny.toml is no run directory"]);
}
