//! Measures of the flat gradient: its norm, and whether it is finite.

use tch::{Device, Kind, Tensor};

use crate::Error;

/// Elements summed at a time where the sum is the device's.
const CHUNK: i64 = 1 << 22;

/// What one pass over the gradient tells.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GradientNorm {
    /// Euclidean norm, summed in f64. NaN or infinite if any element is.
    pub norm: f64,
    /// Whether all elements are finite.
    pub finite: bool,
}

impl GradientNorm {
    /// Squares of finite f32 cannot overflow an f64 sum, so a sum is finite exactly if all its elements are.
    pub(crate) fn of(flat: &Tensor) -> Result<Self, Error> {
        let squares = match flat.device() {
            Device::Cpu => torch_ext::with_f32(flat, sum_of_squares)?,
            _ => device_sum_of_squares(flat)?,
        };
        Ok(Self { norm: squares.sqrt(), finite: squares.is_finite() })
    }

    /// The factor that brings the norm down to `max_norm`; 1.0 if it is no larger, or not finite.
    pub fn clip_factor(self, max_norm: f64) -> f64 {
        if self.finite && self.norm > max_norm { max_norm / self.norm } else { 1.0 }
    }
}

/// In eight running sums, which the compiler keeps in vector registers; the same order on every machine.
fn sum_of_squares(values: &[f32]) -> f64 {
    let (chunks, rest) = values.as_chunks::<8>();
    let mut sums = [0f64; 8];
    for chunk in chunks {
        for (sum, &value) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(value) * f64::from(value);
        }
    }
    let rest = rest.iter().map(|&value| f64::from(value) * f64::from(value));
    sums.into_iter().chain(rest).sum()
}

/// Chunk by chunk, for the f64 copies to stay small; waits for the device once.
fn device_sum_of_squares(flat: &Tensor) -> Result<f64, Error> {
    let mut total = Tensor::f_zeros([], (Kind::Double, flat.device()))?;
    for chunk in flat.f_split(CHUNK, 0)? {
        let _ = total.f_add_(&chunk.f_to_kind(Kind::Double)?.f_square()?.f_sum(Kind::Double)?)?;
    }
    Ok(total.f_double_value(&[])?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_norm_is_exact_beyond_the_range_of_f32_squares() {
        let found = GradientNorm::of(&Tensor::from_slice(&[3e30f32, 4e30, 0.0].repeat(9))).unwrap();
        assert!(found.finite && (found.norm / 1.5e31 - 1.0).abs() < 1e-6, "{found:?}");
        assert!((found.clip_factor(1.0) * found.norm - 1.0).abs() < 1e-12);
        assert_eq!(found.clip_factor(1e32), 1.0);
    }

    #[test]
    fn one_bad_element_anywhere_shows() {
        for len in [1, 8, 9, 100] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = vec![1f32; len];
                values[len - 1] = bad;
                assert!(!GradientNorm::of(&Tensor::from_slice(&values)).unwrap().finite);
            }
        }
    }

    #[test]
    fn both_ways_agree() {
        let values: Vec<f32> = (0..10_001).map(|i| (i as f32 * 0.37).sin()).collect();
        let on_device = device_sum_of_squares(&Tensor::from_slice(&values)).unwrap();
        assert!((sum_of_squares(&values) / on_device - 1.0).abs() < 1e-12);
    }
}
