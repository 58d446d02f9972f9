//! What augmentation makes of real images, in distribution: against albumentations' own
//! (`tools/augment_pixels.py`). For given draws the pixels themselves are compared in `augment.rs`.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use musher_dataset::{AugmentOptions, MaskResize, Sample, Transform, View, decode_pair};

const REFERENCE: &str = include_str!("reference/pixels.json");
const SIDE: usize = 112;
const DRAWS: u64 = 2_000;
/// Of the share of draws below a quantile: four standard deviations of ours and the reference's together.
const TOLERANCE: f64 = 0.055;

/// Figures of one augmented image and its mask, as the reference defines them.
fn figures(image: &[u8], mask: &[u8]) -> [(&'static str, f64); 9] {
    let channel = |c: usize| mean(image.iter().skip(c).step_by(3).map(|&level| level.into()));
    let grey: Vec<f64> = image
        .chunks_exact(3)
        .map(|rgb| rgb.iter().map(|&level| f64::from(level)).sum::<f64>() / 3.0)
        .collect();
    let middle = mean(grey.iter().copied());
    let rows = || grey.chunks_exact(SIDE);
    let of_class = |class: u8| mean(mask.iter().map(|&c| f64::from(u8::from(c == class))));
    let left = mean(rows().flat_map(|row| &row[..SIDE / 2]).copied());
    let top = mean(rows().take(SIDE / 2).flatten().copied());
    [
        ("red", channel(0)),
        ("green", channel(1)),
        ("blue", channel(2)),
        ("contrast", mean(grey.iter().map(|level| (level - middle).powi(2))).sqrt()),
        ("detail", mean(rows().flat_map(|row| row.windows(2)).map(|pair| (pair[1] - pair[0]).abs()))),
        // Both halves are as large: their mean is the whole's.
        ("sideways", 2.0 * (left - middle)),
        ("upright", 2.0 * (top - middle)),
        ("foreground", of_class(0)),
        ("boundary", of_class(2)),
    ]
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0), |(sum, count), value| (sum + value, count + 1));
    sum / f64::from(count)
}

/// The furthest that the share of `values` below a reference quantile, give or take `slack`, is from that
/// quantile's own.
fn distance(values: &[f64], quantiles: &[f64], slack: f64) -> f64 {
    let last = quantiles.len() - 1;
    let share =
        |limit: f64| values.iter().filter(|&&value| value < limit).count() as f64 / values.len() as f64;
    (1..last)
        .map(|k| {
            let expected = k as f64 / last as f64;
            (share(quantiles[k] - slack) - expected).max(expected - share(quantiles[k] + slack))
        })
        .fold(0.0, f64::max)
}

/// What a figure may differ by because we interpolate once, albumentations twice when it rotates: levels of 255, or
/// a share of all pixels. Once is sharper, by a few hundredths of the detail.
fn slack(figure: &str, median: f64) -> f64 {
    match figure {
        "foreground" | "boundary" => 0.003,
        "detail" => 0.04 * median,
        _ => 0.5,
    }
}

#[test]
fn real_images_come_out_as_albumentations_makes_them() {
    let root = std::env::var_os("MUSHER_PETS")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/pets"), PathBuf::from);
    if !root.is_dir() {
        println!("skipped: no data set at {}", root.display());
        return;
    }
    let reference: BTreeMap<String, BTreeMap<String, Vec<f64>>> = serde_json::from_str(REFERENCE).unwrap();
    let view = View {
        transform: Transform::Augment(AugmentOptions::default()),
        mask_resize: MaskResize::Nearest,
        image_size: SIDE as u32,
        seed: 44,
    };
    for (name, expected) in &reference {
        let sample = Sample::of_files(
            name.clone(),
            root.join(format!("images/{name}.jpg")),
            root.join(format!("annotations/trimaps/{name}.png")),
        );
        let pair = decode_pair(&sample, &mut |warning| panic!("{warning}")).unwrap();
        let (mut image, mut mask) = (vec![0; view.image_bytes()], vec![0; view.mask_bytes()]);
        let mut drawn = BTreeMap::<_, Vec<f64>>::new();
        for id in 0..DRAWS {
            view.render(&pair, 1, id, &mut image, &mut mask);
            for (figure, value) in figures(&image, &mask) {
                drawn.entry(figure).or_default().push(value);
            }
        }
        for (figure, values) in &drawn {
            let quantiles = &expected[*figure];
            let distance = distance(values, quantiles, slack(figure, quantiles[10]));
            println!("{name:20} {figure:10} {distance:.3}");
            assert!(distance < TOLERANCE, "{name}: {figure} is distributed otherwise, {distance:.3}");
        }
    }
}
