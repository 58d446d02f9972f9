//! Initial parameters, a function of layout and seed alone: the same on every rank, device and thread count.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tch::{Device, Kind, Tensor};

use crate::Error;
use crate::layout::{Init, Layout};

/// The flat parameters on the CPU. Each tensor draws from its own stream, numbered by its place in the order of use,
/// and fills its memory in order.
pub fn parameters(layout: &Layout, seed: u64) -> Result<Tensor, Error> {
    let mut flat = Tensor::f_zeros([layout.parameter_len as i64], (Kind::Float, Device::Cpu))?;
    torch_ext::with_f32_mut(&mut flat, |flat| {
        for (stream, parameter) in layout.parameters.iter().enumerate() {
            let values = &mut flat[parameter.range.clone()];
            match parameter.init {
                Init::Zeros => values.fill(0.0),
                Init::Ones => values.fill(1.0),
                Init::Glorot { fan_in, fan_out } => {
                    let mut rng = ChaCha8Rng::seed_from_u64(seed);
                    rng.set_stream(stream as u64);
                    let bound = (6.0 / (fan_in + fan_out) as f64).sqrt() as f32;
                    values.fill_with(|| bound * symmetric(rng.next_u32()));
                }
            }
        }
    })?;
    Ok(flat)
}

/// Uniform in [-1, 1), on 2^24 equally spaced values.
fn symmetric(bits: u32) -> f32 {
    (bits >> 8) as f32 * (2.0 / (1 << 24) as f32) - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::LayoutBuilder;

    fn drawn(seed: u64) -> Vec<f32> {
        let mut builder = LayoutBuilder::default();
        let init = Init::Glorot { fan_in: 2, fan_out: 1 };
        builder.parameter("a".into(), &[8000], init, false);
        builder.parameter("b".into(), &[8000], init, false);
        let flat = parameters(&builder.finish(), seed).expect("a flat CPU tensor can be filled");
        Vec::try_from(flat).expect("it is one-dimensional")
    }

    #[test]
    fn values_fill_the_bound_evenly() {
        let values = drawn(1);
        let bound = 2f32.sqrt();
        assert!(values.iter().all(|value| value.abs() <= bound));
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let var = values.iter().map(|value| value * value).sum::<f32>() / values.len() as f32;
        assert!(mean.abs() < 0.03 && (var - 2.0 / 3.0).abs() < 0.03, "{mean} {var}");
    }

    #[test]
    fn seeds_and_streams_differ_and_repeat() {
        assert_eq!(drawn(7), drawn(7));
        assert_ne!(drawn(7), drawn(8));
        let values = drawn(7);
        assert_ne!(values[..8000], values[8000..]);
    }
}
