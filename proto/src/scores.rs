//! Validation figures from the ranks' sums: integers add exactly, losses are added in one fixed
//! order, so the result does not depend on who evaluated what.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::message::UnitResult;

/// Foreground, background, boundary: the classes of a trimap, whose figures are told one by one.
pub const TRIMAP_CLASSES: usize = 3;

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Cross-entropy, mean over pixels, natural log.
    #[serde(with = "nan_as_null")]
    pub loss: f64,
    /// Share of pixels whose class is right.
    #[serde(with = "nan_as_null")]
    pub accuracy: f64,
    /// Intersection over union, mean over the classes that occur in truth or prediction.
    #[serde(with = "nan_as_null")]
    pub miou: f64,
    /// Intersection over union of the trimap's classes; `None`: it occurs in neither truth nor prediction.
    #[serde(default)]
    pub class_iou: [Option<f64>; TRIMAP_CLASSES],
    pub samples: u64,
}

/// Sums up the units of all ranks.
///
/// # Errors
/// A sentence, if a unit is missing or their forms differ: each sample must count once.
pub fn aggregate<'a>(
    units: impl IntoIterator<Item = &'a UnitResult>,
    expected_units: u64,
    classes: usize,
) -> Result<Scores, String> {
    let by_index: BTreeMap<u64, &UnitResult> = units.into_iter().map(|u| (u.index, u)).collect();
    if by_index.len() as u64 != expected_units
        || by_index.keys().next_back().is_some_and(|&i| i >= expected_units)
    {
        return Err(format!("validation reported {} units of {expected_units}", by_index.len()));
    }
    let mut confusion = vec![0u64; classes * classes];
    let (mut loss_sum, mut samples) = (0.0, 0);
    for (index, unit) in by_index {
        if unit.confusion.len() != confusion.len() {
            return Err(format!("validation unit {index} has a confusion matrix of another size"));
        }
        for (sum, &count) in confusion.iter_mut().zip(&unit.confusion) {
            *sum += count;
        }
        loss_sum += unit.loss_sum;
        samples += unit.samples;
    }
    let pixels: u64 = confusion.iter().sum();
    let hits: u64 = (0..classes).map(|c| confusion[c * classes + c]).sum();
    let ious: Vec<_> = (0..classes).map(|class| iou(&confusion, classes, class)).collect();
    let occurring = || ious.iter().flatten();
    Ok(Scores {
        loss: loss_sum / pixels as f64,
        accuracy: hits as f64 / pixels as f64,
        miou: occurring().sum::<f64>() / occurring().count() as f64,
        class_iou: std::array::from_fn(|class| ious.get(class).copied().flatten()),
        samples,
    })
}

/// Of a class that occurs in truth or prediction; `confusion` is truth-major.
fn iou(confusion: &[u64], classes: usize, class: usize) -> Option<f64> {
    let hit = confusion[class * classes + class];
    let truth: u64 = confusion[class * classes..][..classes].iter().sum();
    let predicted: u64 = confusion.iter().skip(class).step_by(classes).sum();
    let union = truth + predicted - hit;
    (union > 0).then(|| hit as f64 / union as f64)
}

mod nan_as_null {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        Some(*value).filter(|v| v.is_finite()).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn unit(index: u64, confusion: [u64; 4]) -> UnitResult {
        UnitResult { index, samples: 2, loss_sum: 3.0, confusion: confusion.to_vec() }
    }

    /// Worked by hand: confusion [[5, 1], [2, 4]], IoU 5/8 and 4/7.
    #[test]
    fn figures_follow_from_the_sums() {
        let units = [unit(1, [2, 0, 1, 3]), unit(0, [3, 1, 1, 1])];
        let scores = aggregate(&units, 2, 2).unwrap();
        assert_eq!(scores.samples, 4);
        assert!((scores.loss - 6.0 / 12.0).abs() < 1e-12);
        assert!((scores.accuracy - 9.0 / 12.0).abs() < 1e-12);
        assert!((scores.miou - (5.0 / 8.0 + 4.0 / 7.0) / 2.0).abs() < 1e-12);
        assert_eq!(scores.class_iou, [Some(5.0 / 8.0), Some(4.0 / 7.0), None]);
    }

    #[test]
    fn a_class_that_never_occurs_does_not_count_in_the_mean() {
        let unit =
            UnitResult { index: 0, samples: 1, loss_sum: 0.0, confusion: vec![4, 0, 0, 0, 4, 0, 0, 0, 0] };
        let scores = aggregate([&unit], 1, 3).unwrap();
        assert_eq!((scores.miou, scores.class_iou), (1.0, [Some(1.0), Some(1.0), None]));
    }

    #[test]
    fn a_missing_unit_is_an_error() {
        assert!(aggregate(&[unit(0, [1; 4])], 2, 2).is_err());
        assert!(aggregate(&[unit(0, [1; 4]), unit(2, [1; 4])], 2, 2).is_err());
        assert!(aggregate(&[unit(0, [1; 4])], 1, 3).is_err());
    }

    #[test]
    fn nan_survives_json_as_null() {
        let scores = Scores { loss: f64::NAN, accuracy: 0.5, miou: 0.25, samples: 3, ..Scores::default() };
        let text = serde_json::to_string(&scores).unwrap();
        assert!(text.contains("\"loss\":null"), "{text}");
        assert!(serde_json::from_str::<Scores>(&text).unwrap().loss.is_nan());
    }
}
