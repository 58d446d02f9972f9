//! The decoder on a drawn data set: what is wanted comes, in the plan's order, and nothing else is read.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use musher_dataset::synth::{self, SynthOptions};
use musher_dataset::{
    BatchPlan, Dataset, Decoder, DecoderOptions, Raster, Source, Split, Warnings, decode_pair,
};

fn drawn() -> (tempfile::TempDir, Split) {
    let root = tempfile::tempdir().unwrap();
    synth::draw(root.path(), &SynthOptions { train: 9, val: 1, seed: 1, sides: [64, 96] }).unwrap();
    let dataset = Dataset::open(&Source::at(root.path()));
    let split = Split::clone(&dataset.unwrap().train());
    (root, split)
}

#[test]
fn only_what_is_wanted_is_read() {
    let (_root, mut split) = drawn();
    let unwanted = split.samples[4].name.clone();
    split.samples[4].image = "/nowhere.jpg".into();
    let split = Arc::new(split);
    let options = DecoderOptions {
        split: split.clone(),
        wanted: move |sample: &musher_dataset::Sample| sample.name != unwanted,
        threads: 3,
        ahead: 2,
        read_ahead: 8,
        warnings: Arc::new(Warnings::new(|_| {})),
    };
    let batches = [vec![8, 4, 0], vec![], vec![4], vec![2, 99], vec![1]];
    let plans = (0..).zip(batches).map(|(key, sample_ids)| BatchPlan { key, epoch: 3, sample_ids });
    let mut decoder = Decoder::start(options, plans.clone().collect::<Vec<_>>().into_iter());
    for plan in plans {
        let decoded = decoder.next().unwrap();
        if plan.sample_ids.contains(&99) {
            assert!(decoded.unwrap_err().to_string().contains("there is no sample 99"));
            continue;
        }
        let decoded = decoded.unwrap();
        let expected: Vec<Option<Raster<4>>> = plan
            .sample_ids
            .iter()
            .map(|&id| {
                let sample = &split.samples[id as usize];
                (id != 4).then(|| decode_pair(sample, &mut |_| {}).unwrap().interleaved())
            })
            .collect();
        assert_eq!(decoded.samples, expected);
        assert_eq!(decoded.plan, plan);
    }
    assert!(decoder.next().is_none());
}

#[test]
fn a_pixel_is_red_green_blue_and_class() {
    let (_root, split) = drawn();
    let pair = decode_pair(&split.samples[0], &mut |_| {}).unwrap();
    let both = pair.interleaved();
    assert_eq!(both.size(), pair.picture.size());
    for (x, y) in [(0, 0), (40, 30), (both.width - 1, both.height - 1)] {
        let [red, green, blue, class] = both.pixel(x, y);
        assert_eq!(([red, green, blue], [class]), (pair.picture.pixel(x, y), pair.mask.pixel(x, y)));
    }
}
