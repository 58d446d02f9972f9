//! The loader on a drawn data set: order, repetition, errors, and its end.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use musher_dataset::synth::{self, SynthOptions};
use musher_dataset::{
    AugmentOptions, Batch, BatchPlan, Dataset, DatasetError, ImageCache, Loader, LoaderOptions, MaskResize,
    Source, Split, Transform, View, Warnings,
};

static DRAWN: LazyLock<(tempfile::TempDir, Dataset)> = LazyLock::new(|| {
    let root = tempfile::tempdir().unwrap();
    let options = SynthOptions { train: 20, val: 4, seed: 1, sides: [64, 96] };
    synth::draw(root.path(), &options).unwrap();
    let dataset = open(root.path());
    (root, dataset)
});

fn open(root: &std::path::Path) -> Dataset {
    Dataset::open(&Source::at(root)).unwrap()
}

const SIDE: usize = 32;

fn options(threads: usize, cache_bytes: usize) -> LoaderOptions {
    LoaderOptions {
        split: DRAWN.1.train(),
        view: View {
            transform: Transform::Augment(AugmentOptions::default()),
            mask_resize: MaskResize::Nearest,
            image_size: SIDE as u32,
            seed: 44,
        },
        threads,
        ahead: 2,
        read_ahead: 8,
        cache: Arc::new(ImageCache::new(cache_bytes)),
        warnings: Arc::new(Warnings::new(|_| {})),
    }
}

fn plan() -> impl Iterator<Item = BatchPlan> + Send + 'static {
    let sizes = [3usize, 1, 0, 7, 5, 2];
    (0u64..12).map(move |key| BatchPlan {
        key: key + 100,
        epoch: key as u32 / 6,
        sample_ids: (0..sizes[key as usize % 6] as u64).map(|i| (key * 5 + i * 3) % 20).collect(),
    })
}

fn all(mut loader: Loader) -> Vec<Batch> {
    std::iter::from_fn(|| loader.next()).map(Result::unwrap).collect()
}

#[test]
fn batches_come_in_the_plans_order_and_shape() {
    let batches = all(Loader::start(options(3, usize::MAX), plan()));
    for (batch, plan) in batches.iter().zip(plan()) {
        assert_eq!((batch.key, &batch.sample_ids), (plan.key, &plan.sample_ids));
        assert_eq!(batch.images.len(), plan.sample_ids.len() * SIDE * SIDE * 3);
        assert_eq!(batch.masks.len(), plan.sample_ids.len() * SIDE * SIDE / 4);
        assert!(batch.masks.iter().all(|&class| class < 3));
    }
    assert_eq!(batches.len(), plan().count());
}

#[test]
fn threads_and_cache_do_not_change_a_byte() {
    let reference = all(Loader::start(options(1, 0), plan()));
    for (threads, cache_bytes) in [(1, usize::MAX), (4, 0), (4, 60_000), (7, usize::MAX)] {
        assert_eq!(all(Loader::start(options(threads, cache_bytes), plan())), reference);
    }
}

#[test]
fn a_sample_looks_the_same_in_any_batch_and_different_in_another_epoch() {
    let batch_of = |epoch, sample_ids: &[u64]| {
        let plan = BatchPlan { key: 0, epoch, sample_ids: sample_ids.to_vec() };
        all(Loader::start(options(2, 0), std::iter::once(plan))).remove(0).images
    };
    let bytes = SIDE * SIDE * 3;
    let alone = batch_of(3, &[7]);
    assert_eq!(alone, batch_of(3, &[1, 7, 2])[bytes..2 * bytes]);
    assert_ne!(alone, batch_of(4, &[7]));
}

#[test]
fn the_cache_keeps_to_its_budget() {
    let budget = 100_000;
    let options = options(2, budget);
    let cache = options.cache.clone();
    let samples: usize = plan().map(|plan| plan.sample_ids.len()).sum();
    all(Loader::start(options, plan()));
    let counters = cache.counters();
    assert!(counters.bytes > 0 && counters.bytes <= budget, "{counters:?}");
    assert!(counters.hits > 0, "{counters:?}");
    assert_eq!(counters.hits + counters.misses, samples as u64);
}

#[test]
fn an_error_is_its_batchs_alone_and_the_first_in_order() {
    let mut options = options(4, 0);
    let mut split = Split::clone(&options.split);
    for id in [4, 6] {
        split.samples[id].mask = format!("/nowhere/{id}.png").into();
    }
    options.split = Arc::new(split);
    let plans = [vec![1, 2], vec![5, 6, 4, 3], vec![2, 99], vec![1, 2]];
    let plans = plans.into_iter().map(|sample_ids| BatchPlan { key: 0, epoch: 0, sample_ids });
    let mut loader = Loader::start(options, plans);
    assert!(loader.next().unwrap().is_ok());
    let error = loader.next().unwrap().unwrap_err();
    assert!(error.to_string().contains("/nowhere/6.png"), "{error}");
    assert!(matches!(loader.next(), Some(Err(DatasetError::UnknownSample { id: 99, len: 20, .. }))));
    assert!(loader.next().unwrap().is_ok());
    assert!(loader.next().is_none());
}

#[test]
fn a_panic_is_an_error_and_not_a_hang() {
    let mut shouting = options(2, 0);
    let broken = tempfile::tempdir().unwrap();
    let mut split = Split::clone(&shouting.split);
    let misnamed = broken.path().join("a.png");
    let jpeg = split.samples.iter().find(|sample| sample.image.extension().unwrap() == "jpg").unwrap();
    fs::copy(&jpeg.image, &misnamed).unwrap();
    let mask = jpeg.mask.clone();
    split.samples[0].image = misnamed;
    split.samples[0].mask = mask;
    shouting.split = Arc::new(split);
    shouting.warnings = Arc::new(Warnings::new(|_| panic!("no warning wanted")));
    let plan = BatchPlan { key: 0, epoch: 0, sample_ids: vec![0, 1] };
    let mut loader = Loader::start(shouting, std::iter::repeat_n(plan, 1));
    let error = loader.next().unwrap().unwrap_err().to_string();
    assert!(error.contains("sample 0") && error.contains("no warning wanted"), "{error}");
    assert!(loader.next().is_none());

    let failing = plan_with(|index| assert!(index < 1, "the plan broke"));
    let mut loader = Loader::start(options(2, 0), failing);
    assert!(loader.next().unwrap().is_ok());
    let error = loader.next().unwrap().unwrap_err().to_string();
    assert!(error.contains("the plan broke"), "{error}");
    assert!(loader.next().is_none());
}

fn plan_with(at: impl Fn(u64) + Send + 'static) -> impl Iterator<Item = BatchPlan> + Send + 'static {
    (0..).map(move |key| {
        at(key);
        BatchPlan { key, epoch: 0, sample_ids: vec![1] }
    })
}

/// The plan is owned by the threads: when it is gone, so are they.
fn plan_that_tells_its_end(asked: Sender<u64>) -> impl Iterator<Item = BatchPlan> + Send + 'static {
    plan_with(move |key| {
        let _ = asked.send(key);
    })
}

fn wait_for_the_end(asked: &Receiver<u64>) {
    loop {
        match asked.recv_timeout(Duration::from_secs(20)) {
            Ok(_) => {}
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => panic!("the loader's threads did not end"),
        }
    }
}

#[test]
fn dropping_ends_the_threads_of_an_endless_plan() {
    let (sender, asked) = channel();
    let mut loader = Loader::start(options(3, usize::MAX), plan_that_tells_its_end(sender));
    loader.next().unwrap().unwrap();
    drop(loader);
    wait_for_the_end(&asked);
}

#[test]
fn no_more_is_prepared_than_asked_for() {
    let (sender, asked) = channel();
    let mut loader = Loader::start(options(4, usize::MAX), plan_that_tells_its_end(sender));
    for taken in 0..5 {
        loader.next().unwrap().unwrap();
        // `ahead` queued and one more that waits for room in the queue.
        assert!(asked.try_iter().all(|key| key <= taken + 1 + 2 + 1));
    }
}
