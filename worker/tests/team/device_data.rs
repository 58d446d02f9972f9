//! Samples that are kept and augmented on the device: the same bits as by the loader's threads, from files that are
//! read once. The device is the CPU, or for the batches the one that `MUSHER_TEST_DEVICE` names, such as `cuda:0`.

use std::{
    fs,
    io::Cursor,
    path::Path,
    sync::{Arc, Mutex},
};

use image::{DynamicImage, GrayImage, ImageFormat, Luma, Rgb, RgbImage};
use musher_dataset::{BatchPlan, DataWarning, ImageCache};
use musher_proto::{
    ids::Epoch,
    job::{AugmentOn, JobConfig, MaskResize, Normalize},
    message::{Train, Validate},
};
use musher_worker::train::{Batches, DeviceBatch, Feed, KeptBytes, Source, TrainingData};
use tch::{Device, Tensor};

use crate::harness::{GLOBAL_BATCH, Pets, Team, Worker, bits, device, job, job_with_batch_norm};

fn on_device(mut job: JobConfig) -> JobConfig {
    job.data.augment_on = AugmentOn::Device;
    job
}

fn feed(pets: &Pets, job: &JobConfig) -> Feed {
    let device = match job.data.augment_on {
        AugmentOn::Device => device(),
        AugmentOn::Auto | AugmentOn::Cpu => Device::Cpu,
    };
    Feed::new(Arc::new(job.clone()), pets.warning_data(|_| {}), device).unwrap()
}

/// Batches of some, one and no samples.
fn plan(epoch: u32, samples: u64) -> impl Iterator<Item = BatchPlan> + Clone + Send + 'static {
    let sizes = [5u64, 0, 1, 7];
    let mut taken = 0;
    (0..).map_while(move |key| {
        let end = samples.min(taken + sizes[key as usize % sizes.len()]);
        let sample_ids: Vec<u64> = (taken..end).collect();
        (taken < samples).then(|| {
            taken = end;
            BatchPlan { key, epoch, sample_ids }
        })
    })
}

fn all(mut batches: Batches) -> Vec<DeviceBatch> {
    std::iter::from_fn(|| batches.next()).map(Result::unwrap).collect()
}

fn assert_same(found: Vec<DeviceBatch>, expected: Vec<DeviceBatch>) {
    assert_eq!(found.len(), expected.len());
    let same = |a: &Tensor, b: &Tensor| {
        let alike = a.size() == b.size() && a.kind() == b.kind() && a.stride() == b.stride();
        alike && a.to_device(Device::Cpu).equal(&b.to_device(Device::Cpu))
    };
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!((found.key, &found.sample_ids), (expected.key, &expected.sample_ids));
        let what = format!("batch {}", found.key);
        assert!(
            same(&found.images, &expected.images),
            "{what}: {found:?} is not {expected:?}",
            found = found.images,
            expected = expected.images
        );
        assert!(same(&found.masks, &expected.masks), "{what}");
    }
}

/// Training samples of two epochs, and validation samples, by both ways.
fn assert_same_by_both(pets: &Pets, job: &JobConfig) {
    let (cpu, device) = (feed(pets, job), feed(pets, &on_device(job.clone())));
    let (train, val) = (cpu.train_samples(), cpu.val_samples());
    for epoch in 1..=2 {
        assert_same(
            all(device.training(plan(epoch, train)).unwrap()),
            all(cpu.training(plan(epoch, train)).unwrap()),
        );
    }
    assert_same(all(device.validation(plan(0, val)).unwrap()), all(cpu.validation(plan(0, val)).unwrap()));
    assert!(device.kept_bytes().device > 0);
    assert_eq!(cpu.kept_bytes(), KeptBytes::default());
}

#[test]
fn both_ways_give_the_same_bits() {
    let pets = Pets::drawn();
    for normalize in [Normalize::Unit, Normalize::Imagenet, Normalize::Caffe] {
        for mask_resize in [MaskResize::Nearest, MaskResize::Article] {
            let mut job = job();
            (job.data.normalize, job.data.mask_resize) = (normalize, mask_resize);
            assert_same_by_both(&pets, &job);
        }
    }
}

#[test]
fn real_photographs_give_the_same_bits() {
    let Some(pets) = Pets::real() else { return };
    assert_same_by_both(&pets, &job());
}

/// Gray, damaged, misnamed, one pixel high: all that the decoder survives, and its warnings.
#[test]
fn defective_files_give_the_same_bits_and_warnings() {
    let pets = Pets::made_by(defects);
    assert_same_by_both(&pets, &job());
    let told = [AugmentOn::Cpu, AugmentOn::Device].map(|augment_on| {
        let warnings = Arc::new(Mutex::new(Vec::new()));
        let sink = warnings.clone();
        let data = pets.warning_data(move |warning: DataWarning| sink.lock().unwrap().push(warning));
        let mut job = job();
        job.data.augment_on = augment_on;
        // What the team's cache holds is not decoded again, and not warned of.
        let data = TrainingData { cache: Arc::new(ImageCache::new(0)), ..data };
        let feed = Feed::new(Arc::new(job), data, Device::Cpu).unwrap();
        for epoch in 1..=2 {
            all(feed.training(plan(epoch, feed.train_samples())).unwrap());
        }
        let mut told = warnings.lock().unwrap().clone();
        told.sort();
        told
    });
    assert_eq!(told[0].len(), 3, "{told:?}");
    assert_eq!(told[0], told[1]);
}

/// Seven samples.
fn defects(root: &Path) {
    let photo = |w, h| RgbImage::from_fn(w, h, |x, y| Rgb([(x * 2) as u8, (y * 3) as u8, (x * y) as u8]));
    let encode = |image: DynamicImage, format| {
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    };
    let jpeg = encode(photo(96, 64).into(), ImageFormat::Jpeg);
    let gray = DynamicImage::from(photo(75, 99)).to_luma8();
    let files: [(&str, (u32, u32), Vec<u8>); 7] = [
        ("whole", (96, 64), jpeg.clone()),
        ("cut", (96, 64), jpeg[..jpeg.len() * 3 / 4].to_vec()),
        ("trailing", (96, 64), [&jpeg[..], b"junk"].concat()),
        ("gray", (75, 99), encode(gray.into(), ImageFormat::Jpeg)),
        ("misnamed", (60, 90), encode(photo(60, 90).into(), ImageFormat::Gif)),
        ("row", (33, 1), encode(photo(33, 1).into(), ImageFormat::Jpeg)),
        ("pixel", (1, 1), encode(photo(1, 1).into(), ImageFormat::Jpeg)),
    ];
    fs::create_dir_all(root.join("images")).unwrap();
    fs::create_dir_all(root.join("annotations/trimaps")).unwrap();
    let mut list = String::new();
    for (name, (w, h), bytes) in files {
        fs::write(root.join(format!("images/{name}.jpg")), bytes).unwrap();
        let trimap = GrayImage::from_fn(w, h, |x, y| Luma([((x + y) % 3 + 1) as u8]));
        trimap.save(root.join(format!("annotations/trimaps/{name}.png"))).unwrap();
        list += &format!("{name} 1 1 1\n");
    }
    for split in ["trainval", "test"] {
        fs::write(root.join(format!("annotations/{split}.txt")), &list).unwrap();
    }
}

#[test]
fn kept_samples_need_no_files() {
    let pets = Pets::drawn();
    let feed = feed(&pets, &on_device(job()));
    let samples = feed.train_samples();
    let first = all(feed.training(plan(1, samples)).unwrap());
    fs::remove_dir_all(pets.root().join("images")).unwrap();
    assert_same(all(feed.training(plan(1, samples)).unwrap()), first);
    all(feed.training(plan(2, samples)).unwrap());
}

/// What does not fit on the device is kept by the host, and what fits neither is decoded again.
#[test]
fn budgets_change_no_bit_and_are_kept() {
    let pets = Pets::drawn();
    let mut job = on_device(job());
    let samples = feed(&pets, &job).train_samples();
    let expected = || all(feed(&pets, &on_device(crate::harness::job())).training(plan(2, samples)).unwrap());
    let whole = {
        let feed = feed(&pets, &job);
        all(feed.training(plan(1, samples)).unwrap());
        feed.kept_bytes()
    };
    assert_eq!(whole.host, 0);
    assert!(whole.device > 23 * 64 * 42 * 4, "{whole:?}");
    // The samples take less than one MiB, the unit of the budgets.
    for (device, host, kept) in
        [(0, 0, [0, 0]), (1, 0, [whole.device, 0]), (0, 1, [0, whole.device]), (1, 1, [whole.device, 0])]
    {
        (job.data.device_cache_mb, job.data.cache_mb) = (device, host);
        let feed = feed(&pets, &job);
        all(feed.training(plan(1, samples)).unwrap());
        assert_same(all(feed.training(plan(2, samples)).unwrap()), expected());
        assert_eq!(feed.kept_bytes(), KeptBytes { device: kept[0], host: kept[1] });
    }
}

#[test]
fn a_sample_that_cannot_be_used_is_its_batchs_error() {
    let pets = Pets::drawn();
    let feed = feed(&pets, &on_device(job()));
    let plan = [vec![0, 1], vec![2, 99], vec![3]];
    let plan = plan.into_iter().map(|sample_ids| BatchPlan { key: 0, epoch: 1, sample_ids });
    let mut batches = feed.training(plan).unwrap();
    assert!(batches.next().unwrap().is_ok());
    let error = batches.next().unwrap().err().unwrap().to_string();
    assert!(error.contains("there is no sample 99"), "{error}");
    assert!(batches.next().unwrap().is_ok());
    assert!(batches.next().is_none());
}

/// A segment that is given up leaves what it decoded, and the next begins at its own place.
#[test]
fn a_segment_may_begin_anywhere_and_be_given_up() {
    let pets = Pets::drawn();
    let feed = feed(&pets, &on_device(job()));
    let samples = feed.train_samples();
    let whole = all(feed.training(plan(3, samples)).unwrap());
    let again = self::feed(&pets, &on_device(job()));
    let mut given_up = again.training(plan(3, samples)).unwrap();
    given_up.next().unwrap().unwrap();
    drop(given_up);
    let rest = all(again.training(plan(3, samples).skip(2)).unwrap());
    assert_same(rest, whole.into_iter().skip(2).collect());
}

#[test]
fn a_team_takes_the_same_steps() {
    let pets = Pets::drawn();
    for (world, job) in [(1, job()), (3, job()), (2, job_with_batch_norm())] {
        let losses = [job.clone(), on_device(job)]
            .map(|job| Team::started(&pets, &job, world).train_epochs(&pets, 1..=2));
        assert_eq!(bits(&losses[0]), bits(&losses[1]), "{world} workers: {losses:?}");
    }
}

/// Three samples a step for four workers, and a team that changes in mid-epoch.
#[test]
fn empty_shares_and_changing_teams_take_the_same_steps() {
    let pets = Pets::drawn();
    let losses = [job(), on_device(job())].map(|mut job| {
        job.train.global_batch = 3;
        let mut losses = Team::started(&pets, &job, 4).train_epochs(&pets, 1..=1);
        let mut workers = Team::started(&pets, &job, 1).0;
        for (generation, world) in [(2, 3), (3, 1), (4, 2)] {
            workers.resize_with(world, || Worker::new(&pets, &job));
            let mut team = Team::form(generation, workers);
            let cursor = team.sync(0, || Source::Held).held.cursor;
            let whole = pets.epoch(1);
            team.train(Train { cursor, end: whole.end.min(cursor + 2 * GLOBAL_BATCH / 5 * 3), ..whole });
            losses.extend(&team.0[0].losses);
            workers = team.0;
        }
        losses
    });
    assert_eq!(losses[0].len(), 8 + 6);
    assert_eq!(bits(&losses[0]), bits(&losses[1]), "{losses:?}");
}

#[test]
fn validation_has_the_same_bits() {
    let pets = Pets::drawn();
    let figures = [job(), on_device(job())].map(|mut job| {
        job.train.global_batch = 2;
        let mut team = Team::started(&pets, &job, 3);
        let order = Validate { epoch: Epoch(1), samples_wanted: 2 };
        let parts =
            team.each(|worker| worker.trainer.validate(worker.member.as_ref().unwrap(), order).unwrap());
        let picture = parts[0].samples_png.clone();
        let units = parts.into_iter().flat_map(|part| part.units);
        let units: Vec<_> = units.map(|unit| (unit.index, unit.loss_sum.to_bits(), unit.confusion)).collect();
        (units, picture)
    });
    assert_eq!(figures[0], figures[1]);
    assert_eq!(figures[0].0.len(), 4);
}
