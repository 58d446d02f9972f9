//! The whole step, done by a team, against `tools/team_reference.py`: the epoch's order, the network, the
//! loss, clipping, the schedule and Adam, written again in PyTorch for one process and the global batch.

use std::{
    collections::HashMap,
    env, fs,
    path::{Path, PathBuf},
};

use image::{GrayImage, Luma, Rgb, RgbImage};
use musher_proto::job::{JobConfig, Schedule};

use crate::harness::{Pets, Team, deviation, device, job};

const SIDE: u32 = 64;
const SAMPLES: u32 = 11;
const EPOCHS: u32 = 4;
/// On a GPU sums have another order, which the last steps magnify.
fn tolerance() -> f64 {
    if device().is_cuda() { 1e-3 } else { 1e-5 }
}

/// Four samples a step and, in an epoch's last, three; as the reference sees them, without augmentation.
fn reference_job() -> JobConfig {
    let mut job = job();
    job.train.global_batch = 4;
    job.train.epochs = EPOCHS;
    job.augment.rotate_degrees = 0.0;
    job.augment.horizontal_flip = false;
    job.augment.scale = [1.0, 1.0];
    job
}

fn assert_as_reference(name: &str, job: &JobConfig) {
    // Asked when it runs: the program may have been brought to a machine with a GPU.
    let package = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let file = PathBuf::from(package).join("tests/reference/losses.json");
    let expected: HashMap<String, Vec<f64>> = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    let pets = Pets::made_by(waves_and_discs);
    let found = Team::started(&pets, job, 3).train_epochs(&pets, 1..=EPOCHS);
    let deviation = deviation(&found, &expected[name]);
    println!("{name}: losses of {} steps deviate by {deviation:.1e}", found.len());
    assert!(deviation < tolerance(), "{found:?} is not {:?}", expected[name]);
}

#[test]
fn a_team_takes_the_steps_of_pytorch() {
    assert_as_reference("plain", &reference_job());
}

#[test]
fn a_team_clips_and_slows_down_as_pytorch() {
    let mut job = reference_job();
    job.train.schedule = Schedule::Cosine;
    job.train.clip_norm = 0.3;
    job.train.micro_batch = 1;
    assert_as_reference("cosine_clipped", &job);
}

#[test]
fn a_team_weighs_classes_and_adds_dice_as_pytorch() {
    let mut job = reference_job();
    job.train.class_weights = vec![0.5, 1.0, 3.0];
    job.train.dice_weight = 0.7;
    assert_as_reference("weighted_dice", &job);
}

/// Five steps, of three an epoch, lead up to the cosine; the encoder learns at a tenth of the rate.
#[test]
fn a_team_warms_up_with_two_rates_as_pytorch() {
    let mut job = reference_job();
    job.train.schedule = Schedule::Cosine;
    job.train.warmup_epochs = 5.0 / 3.0;
    job.train.encoder_learning_rate = 0.1 * job.train.learning_rate;
    assert_as_reference("warmed_up", &job);
}

#[test]
fn a_team_leaves_a_frozen_encoder_alone_as_pytorch() {
    let mut job = reference_job();
    job.model.freeze_encoder = true;
    assert_as_reference("frozen", &job);
}

/// The reference's data set. Masks are of the network's resolution, in trimaps of the image's.
fn waves_and_discs(root: &Path) {
    let (images, masks) = (root.join("images"), root.join("annotations/trimaps"));
    fs::create_dir_all(&images).unwrap();
    fs::create_dir_all(&masks).unwrap();
    let mut list = String::new();
    for index in 0..SAMPLES {
        let image = RgbImage::from_fn(SIDE, SIDE, |x, y| Rgb([0, 1, 2].map(|c| wave(index, c, x, y))));
        image.save(images.join(format!("wave_{index:02}.png"))).unwrap();
        let mask = GrayImage::from_fn(SIDE, SIDE, |x, y| Luma([disc(index, x / 2, y / 2) + 1]));
        mask.save(masks.join(format!("wave_{index:02}.png"))).unwrap();
        list += &format!("wave_{index:02} 1 1 1\n");
    }
    for split in ["trainval", "test"] {
        fs::write(root.join(format!("annotations/{split}.txt")), &list).unwrap();
    }
}

fn wave(index: u32, channel: u32, x: u32, y: u32) -> u8 {
    let phase = x * (channel + index % 5 + 1) + y * (index % 3 + 2 * channel + 1) + 37 * index;
    (phase * 3 % 256) as u8
}

fn disc(index: u32, x: u32, y: u32) -> u8 {
    let distance = (i64::from(x) - 8 - i64::from(index)).pow(2) + (i64::from(y) - 16).pow(2);
    match distance {
        ..64 => 0,
        64..100 => 2,
        _ => 1,
    }
}
