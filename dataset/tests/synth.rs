//! The drawn data set: complete, repeatable, exact, and not solved by colour.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use musher_dataset::check::check;
use musher_dataset::synth::{SynthOptions, draw};
use musher_dataset::{Dataset, DatasetError, Pair, Source, decode_pair};

const OPTIONS: SynthOptions = SynthOptions { train: 30, val: 10, seed: 5, sides: [80, 120] };

fn files(root: &Path) -> BTreeMap<String, Vec<u8>> {
    ["images", "annotations", "annotations/trimaps"]
        .iter()
        .flat_map(|folder| fs::read_dir(root.join(folder)).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
        .map(|path| (path.strip_prefix(root).unwrap().display().to_string(), fs::read(path).unwrap()))
        .collect()
}

#[test]
fn the_check_finds_nothing_wrong() {
    let root = tempfile::tempdir().unwrap();
    draw(root.path(), &OPTIONS).unwrap();
    let report = check(&Source::at(root.path())).unwrap();
    assert_eq!((report.errors(), report.warnings()), (0, 0), "{report}");
    assert_eq!((report.train.usable, report.val.usable), (30, 10));
    assert_eq!(report.unlisted.len() + report.not_images.len() + report.in_both.len(), 0);
    let (class, share) = report.train.majority().unwrap();
    assert!(class == 1 && (0.45..0.75).contains(&share), "{report}");
    let text = report.to_string();
    assert!(text.contains("30 listed, 30 usable") && text.contains("errors: 0"), "{text}");
}

#[test]
fn the_seed_decides_every_byte() {
    let [one, same, other] = [5, 5, 6].map(|seed| {
        let root = tempfile::tempdir().unwrap();
        draw(root.path(), &SynthOptions { seed, ..OPTIONS }).unwrap();
        files(root.path())
    });
    assert_eq!(one, same);
    assert_ne!(one, other);
}

#[test]
fn a_filled_directory_and_an_empty_split_are_refused() {
    let root = tempfile::tempdir().unwrap();
    fs::write(root.path().join("thesis.tex"), "precious").unwrap();
    assert!(matches!(draw(root.path(), &OPTIONS), Err(DatasetError::NotEmpty { .. })));
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    let options = SynthOptions { val: 0, ..OPTIONS };
    assert!(matches!(draw(root.path(), &options), Err(DatasetError::NothingToDraw { split: "validation" })));
}

/// Foreground and background must never touch: the band lies between them.
#[test]
fn a_band_runs_along_the_whole_contour() {
    let root = tempfile::tempdir().unwrap();
    draw(root.path(), &OPTIONS).unwrap();
    for Pair { mask, .. } in pairs(root.path()) {
        for y in 0..mask.height - 1 {
            for x in 0..mask.width - 1 {
                let here = mask.pixel(x, y);
                for next in [mask.pixel(x + 1, y), mask.pixel(x, y + 1)] {
                    assert!(here == next || here == [2] || next == [2]);
                }
            }
        }
    }
}

/// The best colour-only guess, a table of 512 colours learnt from the training split, gets few of
/// validation's figures right.
#[test]
fn colour_alone_does_not_find_the_figures() {
    let root = tempfile::tempdir().unwrap();
    let options = SynthOptions { train: 80, val: 30, ..OPTIONS };
    draw(root.path(), &options).unwrap();
    let pairs = pairs(root.path());
    let (train, val) = pairs.split_at(80);

    let mut seen = vec![[0u32; 3]; 512];
    for (bin, class) in train.iter().flat_map(bins_and_classes) {
        seen[bin][class] += 1;
    }
    let guess = |bin: usize| (0..3).max_by_key(|&class| seen[bin][class]).unwrap();
    let (mut both, mut either) = (0, 0);
    for (bin, class) in val.iter().flat_map(bins_and_classes) {
        both += u32::from(class == 0 && guess(bin) == 0);
        either += u32::from(class == 0 || guess(bin) == 0);
    }
    let intersection_over_union = f64::from(both) / f64::from(either);
    assert!(intersection_over_union < 0.45, "{intersection_over_union}");
}

fn pairs(root: &Path) -> Vec<Pair> {
    let dataset = Dataset::open(&Source::at(root)).unwrap();
    let (train, val) = (dataset.train(), dataset.val());
    train
        .samples
        .iter()
        .chain(&val.samples)
        .map(|sample| decode_pair(sample, &mut |warning| panic!("{warning}")).unwrap())
        .collect()
}

fn bins_and_classes(pair: &Pair) -> impl Iterator<Item = (usize, usize)> {
    let bin = |pixel: &[u8]| pixel.iter().fold(0, |bin, channel| bin * 8 + usize::from(channel / 32));
    let classes = pair.mask.data.iter().map(|&class| usize::from(class));
    pair.picture.data.chunks_exact(3).map(bin).zip(classes)
}
