//! How draws are distributed, against albumentations' own (`tools/augment_distribution.py`).
#![allow(clippy::unwrap_used)]

use musher_dataset::{AugmentOptions, Draw};
use serde_json::Value;

const REFERENCE: &str = include_str!("reference/draws.json");
const DRAWS: u64 = 20_000;
/// Of the share of draws below a quantile: five standard deviations.
const TOLERANCE: f64 = 0.02;

fn draws(size: (u32, u32)) -> impl Iterator<Item = Draw> {
    (0..DRAWS).map(move |id| Draw::of(44, 1, id, size, &AugmentOptions::default()))
}

/// The share of `values` at or below each reference quantile is that quantile's, where ties leave room.
fn assert_distributed(what: &str, values: &[f64], quantiles: &Value) {
    for (hundredth, quantile) in quantiles.as_array().unwrap().iter().enumerate() {
        let quantile = quantile.as_f64().unwrap();
        let share = |is: &dyn Fn(f64) -> bool| {
            values.iter().filter(|&&value| is(value)).count() as f64 / values.len() as f64
        };
        // The reference is rounded to five places.
        let (below, up_to) =
            (share(&|value| value < quantile - 1e-5), share(&|value| value <= quantile + 1e-5));
        let expected = hundredth as f64 / 100.0;
        assert!(
            below - TOLERANCE <= expected && expected <= up_to + TOLERANCE,
            "{what}: {below} to {up_to} of the draws are below {quantile}, of albumentations' {expected}"
        );
    }
}

#[test]
fn crops_are_distributed_as_albumentations() {
    let reference: Value = serde_json::from_str(REFERENCE).unwrap();
    for size in [(500, 375), (333, 500), (224, 224), (500, 300)] {
        let (width, height) = size;
        let reference = &reference[format!("{width}x{height}")];
        let crops: Vec<_> = draws(size).map(|draw| draw.crop).collect();
        let of = |value: &dyn Fn(f64, f64) -> f64| {
            crops.iter().map(|crop| value(crop.width.into(), crop.height.into())).collect::<Vec<_>>()
        };
        let whole = f64::from(width * height);
        assert_distributed("area", &of(&|w, h| w * h / whole), &reference["area"]);
        assert_distributed("aspect", &of(&|w, h| w / h), &reference["aspect"]);
        let within = |at: u32, room: u32| (room > 0).then(|| f64::from(at) / f64::from(room));
        let lefts: Vec<_> = crops.iter().filter_map(|crop| within(crop.left, width - crop.width)).collect();
        assert_distributed("left", &lefts, &reference["left"]);
        let tops: Vec<_> = crops.iter().filter_map(|crop| within(crop.top, height - crop.height)).collect();
        assert_distributed("top", &tops, &reference["top"]);
    }
}

#[test]
fn angles_are_distributed_as_albumentations() {
    let reference: Value = serde_json::from_str(REFERENCE).unwrap();
    let angles: Vec<_> =
        draws((500, 375)).map(|draw| draw.turn_degrees).filter(|&degrees| degrees != 0.0).collect();
    assert!((angles.len() as f64 / DRAWS as f64 - 0.5).abs() < TOLERANCE, "half are turned");
    assert_distributed("angle", &angles, &reference["angle"]);
}
