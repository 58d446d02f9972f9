//! The original data set's own files, where they are at hand.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use musher_dataset::check::{Severity, check};
use musher_dataset::{Dataset, Sample, Source, decode_pair};

/// A part of Oxford-IIIT Pet: `MUSHER_PETS`, or `pets/` in `shared/` beside the workspace.
fn pets() -> Option<Source> {
    let root = std::env::var_os("MUSHER_PETS")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/pets"), PathBuf::from);
    if !root.is_dir() {
        println!("skipped: no data set at {}", root.display());
        return None;
    }
    Some(Source::at(root))
}

#[test]
fn every_listed_pair_is_usable() {
    let Some(source) = pets() else { return };
    let report = check(&source).unwrap();
    println!("{report}");
    assert_eq!(report.errors(), 0);
    for split in [&report.train, &report.val] {
        assert_eq!(split.usable, split.listed);
        assert_eq!(split.class_pixels.iter().filter(|&&pixels| pixels > 0).count(), 3);
    }
    let (class, share) = report.val.majority().unwrap();
    assert_eq!(class, 1, "most pixels are background");
    assert!((0.45..0.65).contains(&share));
    assert!(report.in_both.is_empty());
}

/// `Abyssinian_34.jpg` is a GIF, in the original lists neither for training nor for testing.
#[test]
fn the_known_defects_are_found() {
    let Some(source) = pets() else { return };
    let report = check(&source).unwrap();
    let names = |files: &[PathBuf]| -> Vec<_> {
        files.iter().map(|file| file.file_name().unwrap().to_str().unwrap().to_owned()).collect()
    };
    assert!(names(&report.not_images).contains(&"Abyssinian_100.mat".to_owned()));
    assert!(names(&report.unlisted).contains(&"Abyssinian_34.jpg".to_owned()));
    assert!(report.problems.iter().any(|problem| problem.severity == Severity::Warning
        && problem.text.contains("Abyssinian_34.jpg")
        && problem.text.contains("GIF")));
}

#[test]
fn unlisted_pairs_decode_too() {
    let Some(source) = pets() else { return };
    for name in ["Abyssinian_34", "Abyssinian_82"] {
        let sample = Sample::of_files(
            name,
            source.root.join(format!("images/{name}.jpg")),
            source.root.join(format!("annotations/trimaps/{name}.png")),
        );
        let pair = decode_pair(&sample, &mut |warning| println!("{warning}")).unwrap();
        assert_eq!(pair.picture.size(), pair.mask.size());
    }
}

#[test]
fn the_digest_is_sha256() {
    let Some(source) = pets() else { return };
    let dataset = Dataset::open(&source).unwrap();
    assert_eq!(dataset.digest().len(), 64);
    assert_eq!(dataset.digest(), Dataset::open(&source).unwrap().digest());
    assert!(dataset.train().len() > 100 && dataset.val().len() > 100);
}
