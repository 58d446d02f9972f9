//! Data sets that are wrong: before the run when a list or a file is missing, in it when a file is bad.

use std::fs;

use musher_tests::{DataSet, Job, Scene};

/// Launches on the data set as `spoil` left it; expects a refusal that says all of `said`.
#[track_caller]
fn is_refused(spoil: impl FnOnce(&DataSet) -> Vec<String>) {
    let scene = Scene::new();
    let data = scene.data_of(16, 8);
    let said = spoil(&data);
    let run = scene.launch(&Job::tiny(&data), "refused", 1, &[]).wait().expect_code(2);
    for words in said {
        assert!(run.end.last_words().contains(&words), "{words:?} is not in {}", run.end.stderr);
    }
    assert_eq!(run.end.stderr.lines().count(), 1, "one sentence: {}", run.end.stderr);
    assert!(!run.dir.exists(), "a run that never began leaves nothing");
}

fn display(path: &std::path::Path) -> String {
    path.display().to_string()
}

#[test]
fn a_missing_directory() {
    is_refused(|data| {
        fs::rename(data.root(), data.root().with_extension("away")).expect("it is ours");
        vec![display(data.root()), "does not exist".into(), "musher data synth".into()]
    });
}

#[test]
fn an_empty_directory() {
    is_refused(|data| {
        fs::remove_dir_all(data.root()).and_then(|()| fs::create_dir(data.root())).expect("it is ours");
        vec![display(data.root()), "is empty".into(), "musher data synth".into()]
    });
}

#[test]
fn a_list_of_absent_images() {
    is_refused(|data| {
        fs::remove_file(data.image(&data.train[2])).expect("it is ours");
        vec![format!("{}:3", display(&data.train_list())), data.train[2].clone(), "shorten the list".into()]
    });
}

#[test]
fn an_image_without_a_mask() {
    is_refused(|data| {
        let mask = data.mask(&data.val[1]);
        fs::remove_file(&mask).expect("it is ours");
        vec!["has no mask".into(), display(&mask), "shorten the list".into()]
    });
}

#[test]
fn an_empty_list() {
    is_refused(|data| {
        fs::write(data.train_list(), "# nothing\n").expect("it is ours");
        vec![display(&data.train_list()), "names no image".into()]
    });
}

#[test]
fn a_name_that_is_listed_twice() {
    is_refused(|data| {
        let twice: Vec<_> = data.train.iter().chain(&data.train[..1]).cloned().collect();
        data.write_list("annotations/trainval.txt", &twice);
        vec![data.train[0].clone(), "already listed on line 1".into()]
    });
}

/// Trains on the data set as `spoil` left it; expects a failure that names the file it returns.
#[track_caller]
fn fails_in_training(spoil: impl FnOnce(&DataSet) -> std::path::PathBuf, because: &str) {
    let scene = Scene::new();
    let data = scene.data_of(16, 8);
    let file = display(&spoil(&data));
    let run = scene.launch(&Job::tiny(&data), "spoilt", 2, &[]).wait().expect_code(1);
    let reason = run.one("run_failed").text("reason").to_owned();
    assert!(reason.contains(&file) && reason.contains(because), "{reason}");
    assert!(run.end.last_words().ends_with(&reason), "{}", run.end.stderr);
    let line = run.end.last_line();
    assert_eq!((&line["status"], &line["reason"]), (&"failed".into(), &reason.into()));
    assert!(line["best_weights"].is_null());
}

#[test]
fn a_truncated_image() {
    fails_in_training(
        |data| {
            let image = data.image(&data.train[3]);
            let bytes = fs::read(&image).expect("it is linked");
            DataSet::replace(&image, &bytes[..200]);
            image
        },
        "replace the file or remove it",
    );
}

#[test]
fn an_image_that_is_none() {
    fails_in_training(
        |data| {
            let image = data.image(&data.val[3]);
            DataSet::replace(&image, b"<html>404 not found</html>");
            image
        },
        "replace the file or remove it",
    );
}

#[test]
fn a_mask_of_another_size() {
    fails_in_training(
        |data| {
            let mask = data.mask(&data.train[0]);
            paint(&mask, 10, 10, 1);
            mask
        },
        "is 10x10, but its image is",
    );
}

#[test]
fn a_mask_with_a_foreign_value() {
    fails_in_training(
        |data| {
            let mask = data.mask(&data.train[0]);
            let size = image::image_dimensions(&mask).expect("it is a picture");
            paint(&mask, size.0, size.1, 7);
            mask
        },
        "has the value 7 at (0, 0)",
    );
}

/// A mask of one value, in the test's own file.
fn paint(mask: &std::path::Path, width: u32, height: u32, value: u8) {
    fs::remove_file(mask).expect("it is a link of ours");
    image::GrayImage::from_pixel(width, height, image::Luma([value])).save(mask).expect("it is a PNG");
}

/// What needs the real files: their known defects are told and survived.
#[test]
fn known_defects_of_the_real_data_are_survived() {
    let Some(pets) = musher_tests::data::real_pets() else {
        return println!("skipped: the real data is absent, set MUSHER_PETS to its directory");
    };
    let scene = Scene::new();
    let data = scene.data_of(16, 8);
    // A GIF that is named .jpg.
    let name = "Abyssinian_34";
    let link = |file: String| std::os::unix::fs::symlink(pets.join(&file), data.root().join(&file));
    link(format!("images/{name}.jpg")).expect("it is in no list");
    link(format!("annotations/trimaps/{name}.png")).expect("it is in no list");
    let with_it: Vec<_> = data.train.iter().cloned().chain([name.to_owned()]).collect();
    data.write_list("annotations/trainval.txt", &with_it);
    let job = Job::tiny(&data).set("train.epochs", 1);
    let run = scene.launch(&job, "survived", 2, &[]).wait().expect_code(0);
    let warned = run.all("data_warning").into_iter().any(|warning| {
        warning.text("file").contains(&format!("{name}.jpg")) && warning.text("reason").contains("GIF")
    });
    assert!(warned, "{:#?}", run.all("data_warning"));
    assert_eq!(run.one("epoch_finished").number("samples"), 17);
}
