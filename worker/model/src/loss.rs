//! What training minimises: cross-entropy, with a weight a class if wanted, and a Dice term if wanted.
//!
//! It is a value a pixel, so that sums over micro-batches and ranks, over the pixels of the global batch, are the
//! global mean: nothing in it depends on which samples are computed together. Validation does not use it; its loss is
//! always the plain cross-entropy, which compares between runs.

use tch::{Device, Kind, Reduction, Tensor};

use crate::Error;

/// Added to numerator and denominator of each Dice ratio: a class that is neither there nor predicted counts as right.
const SMOOTH: f64 = 1.0;

/// No class of a mask is this one, so libtorch ignores no pixel.
const IGNORE_NOTHING: i64 = -100;

#[derive(Debug, Clone, PartialEq, Default)]
pub struct LossOptions {
    /// Factor of a pixel's cross-entropy by its true class; empty: 1 for all. The mean is over the number of pixels,
    /// as with Keras' `class_weight`, and not over their weights.
    pub class_weights: Vec<f64>,
    /// Factor of the Dice term; 0: none.
    pub dice_weight: f64,
}

#[derive(Debug, Default)]
pub(crate) struct Loss {
    /// f32 [classes]
    class_weights: Option<Tensor>,
    dice_weight: f64,
}

impl Loss {
    pub fn new(options: &LossOptions, classes: usize, device: Device) -> Result<Self, Error> {
        let LossOptions { class_weights, dice_weight } = options;
        if class_weights.is_empty() {
            return Ok(Self { class_weights: None, dice_weight: *dice_weight });
        }
        if class_weights.len() != classes {
            let (expected, found) = (format!("{classes} numbers"), class_weights.len().to_string());
            return Err(Error::Shape { what: "the class weights", expected, found });
        }
        let weights = Tensor::f_from_slice(class_weights)?.f_to_kind(Kind::Float)?.f_to_device(device)?;
        Ok(Self { class_weights: Some(weights), dice_weight: *dice_weight })
    }

    /// Of each pixel, [N, H, W], from logits [N, classes, H, W] and i64 masks [N, H, W]: its weighted cross-entropy in
    /// nats, plus the weighted Dice loss of its sample. A class beyond the logits' is an error.
    pub fn per_pixel(&self, logits: &Tensor, masks: &Tensor) -> Result<Tensor, Error> {
        let weights = self.class_weights.as_ref();
        let entropy = logits.f_cross_entropy_loss(masks, weights, Reduction::None, IGNORE_NOTHING, 0.0)?;
        if self.dice_weight == 0.0 {
            return Ok(entropy);
        }
        let dice = (dice_loss(logits, masks)? * self.dice_weight).f_view([-1, 1, 1])?;
        Ok(entropy.f_add(&dice)?)
    }
}

/// Of each sample, [N], in 0..1: 1 less the mean over classes of (2 Σpg + 1) / (Σp + Σg + 1), with p the softmax, g one
/// for the true class and zero else, and sums over the sample's pixels.
fn dice_loss(logits: &Tensor, masks: &Tensor) -> Result<Tensor, Error> {
    let predicted = logits.f_softmax(1, Kind::Float)?;
    let truth = predicted.f_detach()?.f_zeros_like()?.f_scatter_value_(1, &masks.f_unsqueeze(1)?, 1.0)?;
    let over_pixels = |values: &Tensor| values.f_sum_dim_intlist([2, 3].as_slice(), false, Kind::Float);
    let both = over_pixels(&predicted.f_mul(&truth)?)?;
    let either = over_pixels(&predicted)?.f_add(&over_pixels(&truth)?)?;
    let ratio = (both * 2.0 + SMOOTH).f_div(&(either + SMOOTH))?;
    Ok(1.0 - ratio.f_mean_dim([1].as_slice(), false, Kind::Float)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn batch() -> (Tensor, Tensor) {
        let logits: Vec<f32> = (0..4 * 3 * 6 * 5).map(|i| (i as f32 * 0.7).sin() * 2.0).collect();
        let masks: Vec<i64> = (0..4 * 6 * 5).map(|i| (i * i % 7) % 3).collect();
        (Tensor::from_slice(&logits).view([4, 3, 6, 5]), Tensor::from_slice(&masks).view([4, 6, 5]))
    }

    fn loss(class_weights: &[f64], dice_weight: f64) -> Loss {
        let options = LossOptions { class_weights: class_weights.to_vec(), dice_weight };
        Loss::new(&options, 3, Device::Cpu).unwrap()
    }

    #[test]
    fn samples_do_not_depend_on_each_other() {
        let (logits, masks) = batch();
        let loss = loss(&[0.5, 1.0, 3.0], 0.7);
        let whole = loss.per_pixel(&logits, &masks).unwrap();
        let parts = [(0, 1), (1, 3)].map(|(start, len)| {
            loss.per_pixel(&logits.narrow(0, start, len), &masks.narrow(0, start, len)).unwrap()
        });
        assert!(f64::try_from((whole - Tensor::cat(&parts, 0)).abs().max()).unwrap() < 1e-6);
    }

    #[test]
    fn a_perfect_prediction_has_no_dice_loss_and_a_wrong_one_all_of_it() {
        let masks = Tensor::zeros([1, 8, 8], (Kind::Int64, Device::Cpu));
        let sure_of = |class: i64| {
            let logits = Tensor::zeros([1, 3, 8, 8], (Kind::Float, Device::Cpu));
            let _ = logits.narrow(1, class, 1).fill_(50.0);
            f64::try_from(dice_loss(&logits, &masks).unwrap()).unwrap()
        };
        assert!(sure_of(0).abs() < 1e-6);
        // Classes 0 and 1 are all wrong, class 2 is neither there nor predicted.
        assert!((sure_of(1) - (1.0 - (1.0 / 65.0 + 1.0 / 65.0 + 1.0) / 3.0)).abs() < 1e-6);
    }

    #[test]
    fn weights_must_be_as_many_as_classes() {
        let options = LossOptions { class_weights: vec![1.0; 2], dice_weight: 0.0 };
        assert!(Loss::new(&options, 3, Device::Cpu).is_err());
    }
}
