//! A state to start from, whose values follow from a formula: `tools/team_reference.py` has it too.
//!
//! With batch norm frozen and statistics of (0, 1), fifty layers as drawn from a seed hardly let the image
//! through. Weak residual branches, mostly open ReLUs and statistics of their own keep this network
//! well-conditioned, and every one of its tensors in use.

use std::collections::BTreeMap;

use musher_model::{ModelOptions, Replica};
use musher_proto::shard::scramble;
use safetensors::{
    SafeTensors,
    tensor::{Dtype, TensorView},
};

/// The state of a run that has not begun, in bytes.
pub fn state(options: &ModelOptions) -> Vec<u8> {
    let mut replica = Replica::new(options, 0, tch::Device::Cpu).unwrap();
    let drawn = replica.weights_safetensors(&BTreeMap::new()).unwrap();
    let drawn = SafeTensors::deserialize(&drawn).unwrap();
    let shapes: BTreeMap<_, _> =
        drawn.iter().map(|(name, tensor)| (name.to_owned(), tensor.shape().to_vec())).collect();
    let values: Vec<_> =
        (0..).zip(&shapes).map(|(index, (name, shape))| values(index, name, shape)).collect();
    let tensors = shapes
        .iter()
        .zip(&values)
        .map(|((name, shape), bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    replica.load_weights(&safetensors::serialize(tensors, None).unwrap()).unwrap();
    replica.read_state(0, replica.state_len() as usize).unwrap()
}

fn values(tensor_index: u64, name: &str, shape: &[usize]) -> Vec<u8> {
    let [low, high] = spread(name, shape);
    let elements = shape.iter().product::<usize>() as u64;
    let value = |i: u64| {
        let unit = (scramble(tensor_index << 32 | i) >> 40) as f64 / f64::from(1 << 24);
        (low + (high - low) * unit) as f32
    };
    (0..elements).flat_map(|i| value(i).to_le_bytes()).collect()
}

/// The range of a tensor's values.
fn spread(name: &str, shape: &[usize]) -> [f64; 2] {
    let encoder = !name.starts_with("decoder.") && !name.starts_with("head.");
    let of_norm = name.contains("bn") || name.contains("downsample.1");
    let opens_relu = encoder && (name.contains("bn1.") || name.contains("bn2."));
    match (name.rsplit('.').next().unwrap(), of_norm) {
        ("running_mean", _) => [-0.3, 0.3],
        ("running_var", _) => [0.5, 2.0],
        ("weight", true) if name.contains(".bn3.") => [0.1, 0.3],
        ("weight", true) => [0.5, 1.5],
        ("weight", false) => {
            let area: usize = shape[2..].iter().product();
            let bound = (6.0 / ((shape[0] + shape[1]) * area) as f64).sqrt();
            [-bound, bound]
        }
        (_, true) if opens_relu => [1.7, 2.3],
        (_, true) => [-0.3, 0.3],
        (_, false) => [0.2, 0.8],
    }
}
