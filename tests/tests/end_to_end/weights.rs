//! What a run leaves is of use: its weights evaluate as the run did, and predict any image.

use std::fs;

use musher_tests::{End, Job, Scene};

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
    refused(predict(&["absent.jpg"]), &["there is no image at absent.jpg"]);
    refused(predict(&["out"]), &["--out out is the directory of the images"]);
    let with = |weights| scene.run_worker(&["eval", "--weights", weights]);
    refused(with("absent.safetensors"), &["there are no weights at absent.safetensors"]);
    refused(with("note.jpg"), &["note.jpg is no weights file"]);
}
