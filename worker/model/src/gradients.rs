//! Measures of the flat gradient, as scalars on its device that nobody has waited for: whether it is finite, and by
//! what it is to be divided.

use tch::{Device, Kind, Tensor};

use crate::Error;

/// Elements summed at a time where the sum is the device's.
const CHUNK: i64 = 1 << 22;

/// What one pass over the gradient tells.
#[derive(Debug)]
pub struct GradientMeasure {
    /// f64 []: 1.0 if all elements are finite, else 0.0.
    pub finite: Tensor,
    /// f32 [1]: the gradient divided by this has at most the norm that it was measured against. At least 1.0; of no
    /// meaning where the gradient is not finite.
    pub scale: Option<Tensor>,
}

impl GradientMeasure {
    /// Against `max_norm`, the largest Euclidean norm to be let through, if there is one.
    pub(crate) fn of(flat: &Tensor, max_norm: Option<f64>) -> Result<Self, Error> {
        let Some(max_norm) = max_norm else {
            return Ok(Self { finite: finite(flat)?, scale: None });
        };
        let norm = norm(flat)?;
        let finite = norm.f_isfinite()?.f_to_kind(Kind::Double)?;
        let scale = norm.f_div_scalar(max_norm)?.f_clamp_min(1.0)?.f_to_kind(Kind::Float)?.f_view([1])?;
        Ok(Self { finite, scale: Some(scale) })
    }
}

/// Euclidean, f64 [], summed in f64: squares of finite f32 cannot overflow that, so it is finite exactly if all
/// elements are.
pub(crate) fn norm(flat: &Tensor) -> Result<Tensor, Error> {
    let squares = match flat.device() {
        Device::Cpu => Tensor::from(torch_ext::with_f32(flat, sum_of_squares)?),
        _ => device_sum_of_squares(flat)?,
    };
    Ok(squares.f_sqrt()?)
}

/// f64 []: 1.0 if all elements are finite, else 0.0.
fn finite(flat: &Tensor) -> Result<Tensor, Error> {
    match flat.device() {
        Device::Cpu => Ok(Tensor::from(f64::from(torch_ext::with_f32(flat, all_finite)?))),
        _ => device_finite(flat),
    }
}

/// By the exponents alone, and to the end: what the compiler does for many values at a time on any processor.
fn all_finite(values: &[f32]) -> bool {
    const EXPONENT: u32 = 0xff << 23;
    !values.iter().fold(false, |found, value| found | (value.to_bits() & EXPONENT == EXPONENT))
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

/// By the largest absolute value, which is NaN if there is one.
fn device_finite(flat: &Tensor) -> Result<Tensor, Error> {
    let largest = flat.f_norm_scalaropt_dim(f64::INFINITY, [0i64].as_slice(), false)?;
    Ok(largest.f_isfinite()?.f_to_kind(Kind::Double)?)
}

/// Chunk by chunk, for the f64 copies to stay small.
fn device_sum_of_squares(flat: &Tensor) -> Result<Tensor, Error> {
    let mut total = Tensor::f_zeros([], (Kind::Double, flat.device()))?;
    for chunk in flat.f_split(CHUNK, 0)? {
        let _ = total.f_add_(&chunk.f_to_kind(Kind::Double)?.f_square()?.f_sum(Kind::Double)?)?;
    }
    Ok(total)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn value(scalar: &Tensor) -> f64 {
        scalar.double_value(&[])
    }

    #[test]
    fn the_norm_is_exact_beyond_the_range_of_f32_squares() {
        let flat = Tensor::from_slice(&[3e30f32, 4e30, 0.0].repeat(9));
        assert!((value(&norm(&flat).unwrap()) / 1.5e31 - 1.0).abs() < 1e-6);
        let scale = |max| {
            let measure = GradientMeasure::of(&flat, Some(max)).unwrap();
            assert_eq!(value(&measure.finite), 1.0);
            measure.scale.unwrap().double_value(&[0])
        };
        assert!((scale(1e30) / 15.0 - 1.0).abs() < 1e-6);
        assert_eq!(scale(1e32), 1.0, "what is small enough is left alone");
        assert!(GradientMeasure::of(&flat, None).unwrap().scale.is_none());
    }

    #[test]
    fn one_bad_element_anywhere_shows() {
        for len in [1, 8, 9, 100] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = vec![1f32; len];
                values[len - 1] = bad;
                let flat = Tensor::from_slice(&values);
                for max_norm in [None, Some(1.0)] {
                    assert_eq!(value(&GradientMeasure::of(&flat, max_norm).unwrap().finite), 0.0);
                }
                assert_eq!(value(&device_finite(&flat).unwrap()), 0.0);
            }
        }
    }

    #[test]
    fn both_ways_agree() {
        let values: Vec<f32> = (0..10_001).map(|i| (i as f32 * 0.37).sin()).collect();
        let on_device = value(&device_sum_of_squares(&Tensor::from_slice(&values)).unwrap());
        assert!((sum_of_squares(&values) / on_device - 1.0).abs() < 1e-12);
        let finite = Tensor::from_slice(&[f32::MAX, f32::MIN, f32::MIN_POSITIVE, 0.0, -1e-42]);
        assert_eq!(value(&device_finite(&finite).unwrap()), 1.0);
        assert_eq!(value(&super::finite(&finite).unwrap()), 1.0);
    }
}
