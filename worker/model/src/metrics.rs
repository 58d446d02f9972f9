//! What logits amount to: predicted classes, summed loss, confusion.

use tch::{Kind, Reduction, Tensor, no_grad};

use crate::Error;

/// Validation results that add up: over batches, and over ranks.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// Cross-entropy in nats, summed over pixels.
    pub loss_sum: f64,
    pub confusion: Confusion,
}

/// Pixel counts by true and predicted class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confusion {
    pub classes: usize,
    /// `classes * classes` counts, one row a true class.
    pub counts: Vec<u64>,
}

impl Confusion {
    pub fn count(&self, truth: usize, predicted: usize) -> u64 {
        self.counts[truth * self.classes + predicted]
    }

    /// All pixels.
    pub fn pixels(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// The likeliest class of each pixel: u8 [N, H, W] from logits [N, classes, H, W].
pub fn argmax(logits: &Tensor) -> Result<Tensor, Error> {
    Ok(no_grad(|| logits.f_argmax(1, false)?.f_to_kind(Kind::Uint8))?)
}

/// Loss and confusion of logits [N, classes, H, W] against masks [N, H, W] of i64 classes.
pub fn evaluate(logits: &Tensor, masks: &Tensor) -> Result<Evaluation, Error> {
    check_masks(logits, masks)?;
    let classes = logits.size()[1];
    no_grad(|| {
        let loss_sum = pixel_losses(logits, masks)?.f_sum(Kind::Double)?.f_double_value(&[])?;
        let cells = (masks * classes).f_add(&logits.f_argmax(1, false)?)?.f_flatten(0, -1)?;
        let counts = cells.f_bincount::<Tensor>(None, classes * classes)?;
        let counts = Vec::<i64>::try_from(&counts)?.into_iter().map(|count| count as u64).collect();
        Ok(Evaluation { loss_sum, confusion: Confusion { classes: classes as usize, counts } })
    })
}

/// Cross-entropy of each pixel, [N, H, W]. A class beyond the logits' is an error.
fn pixel_losses(logits: &Tensor, masks: &Tensor) -> Result<Tensor, Error> {
    // -100 is libtorch's own "ignore nothing that a mask can hold".
    Ok(logits.f_cross_entropy_loss::<Tensor>(masks, None, Reduction::None, -100, 0.0)?)
}

pub(crate) fn check_masks(logits: &Tensor, masks: &Tensor) -> Result<(), Error> {
    let (kind, found) = (masks.kind(), masks.size());
    let expected = match *logits.size() {
        [n, _, h, w] => [n, h, w],
        _ => {
            let found = format!("{:?}", logits.size());
            return Err(Error::Shape { what: "logits", expected: "[N, classes, H, W]".into(), found });
        }
    };
    if found != expected || kind != Kind::Int64 {
        let (expected, found) = (format!("i64 {expected:?}"), format!("{kind:?} {found:?}"));
        return Err(Error::Shape { what: "masks", expected, found });
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn logits() -> Tensor {
        // Two pixels of three classes: [N=1, C=3, H=1, W=2].
        Tensor::from_slice(&[2f32, 0., 0., 0., 0., 5.]).view([1, 3, 1, 2])
    }

    #[test]
    fn counts_go_to_the_true_class_row() {
        let masks = Tensor::from_slice(&[0i64, 1]).view([1, 1, 2]);
        let Evaluation { loss_sum, confusion } = evaluate(&logits(), &masks).unwrap();
        assert_eq!(confusion.counts, [1, 0, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!((confusion.count(1, 2), confusion.pixels()), (1, 2));
        let expected = (2f64.exp() + 2.0).ln() - 2.0 + (5f64.exp() + 2.0).ln();
        assert!((loss_sum - expected).abs() < 1e-6);
    }

    #[test]
    fn predictions_are_bytes() {
        let classes = argmax(&logits()).unwrap();
        assert_eq!((classes.kind(), classes.size()), (Kind::Uint8, vec![1, 1, 2]));
        assert_eq!(Vec::<u8>::try_from(classes.flatten(0, -1)).unwrap(), [0, 2]);
    }

    #[test]
    fn bad_masks_are_errors() {
        let logits = logits();
        assert!(evaluate(&logits, &Tensor::from_slice(&[0i64, 3]).view([1, 1, 2])).is_err());
        assert!(evaluate(&logits, &Tensor::from_slice(&[0i64, 1]).view([1, 2, 1])).is_err());
        assert!(evaluate(&logits, &Tensor::from_slice(&[0u8, 1]).view([1, 1, 2])).is_err());
    }
}
