//! Weights as a safetensors file: f32, row-major, no padding, torchvision's names for the encoder (see [`crate::unet`]
//! for the decoder's). No optimizer state.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use safetensors::tensor::{Dtype, View};
use safetensors::{SafeTensorError, SafeTensors};
use tch::{Device, Tensor, no_grad};

use crate::Error;
use crate::flat::Flat;
use crate::layout::is_encoder;

/// Names listed at most in a message.
const LISTED: usize = 6;

/// What is wrong with a weights file.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    #[error("the weights are no valid safetensors file: {0}")]
    Format(#[from] SafeTensorError),
    #[error("the weights do not fit the model, check its width, classes and encoder: {}", listed(.0))]
    Misfit(Vec<String>),
}

/// Which tensors a file must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Whole,
    /// The encoder alone. A classifier (`fc.`), a decoder and batch norm's `num_batches_tracked` may be there too,
    /// and are ignored.
    Encoder,
}

pub(crate) fn save(flat: &Flat, metadata: HashMap<String, String>) -> Result<Vec<u8>, Error> {
    let tensors = tensors(flat, Part::Whole)
        .into_iter()
        .map(|(name, tensor)| Ok((name, HostTensor::copy_of(tensor)?)))
        .collect::<Result<BTreeMap<_, _>, Error>>()?;
    Ok(safetensors::serialize(tensors, Some(metadata)).map_err(WeightsError::Format)?)
}

/// Overwrites parameters and running statistics, all or, on an error, none.
pub(crate) fn load(flat: &mut Flat, file: &[u8], part: Part) -> Result<(), Error> {
    let file = SafeTensors::deserialize(file).map_err(WeightsError::Format)?;
    let expected = tensors(flat, part);
    let misfits = misfits(&expected, &file, part);
    if !misfits.is_empty() {
        return Err(WeightsError::Misfit(misfits).into());
    }
    for (name, target) in expected {
        let view = file.tensor(&name).map_err(WeightsError::Format)?;
        let (words, _) = view.data().as_chunks::<4>();
        let values: Vec<f32> = words.iter().map(|&word| f32::from_le_bytes(word)).collect();
        let source = Tensor::f_from_slice(&values)?.f_view(target.size().as_slice())?;
        no_grad(|| target.shallow_clone().f_copy_(&source))?;
    }
    Ok(())
}

/// The network's tensors by name.
fn tensors(flat: &Flat, part: Part) -> BTreeMap<String, &Tensor> {
    let parameters = flat.parameters().map(|(spec, tensor)| (spec.name.clone(), tensor));
    let all = parameters.chain(flat.running_statistics());
    all.filter(|(name, _)| part == Part::Whole || is_encoder(name)).collect()
}

fn misfits(expected: &BTreeMap<String, &Tensor>, file: &SafeTensors, part: Part) -> Vec<String> {
    let mut misfits = Vec::new();
    for (name, tensor) in expected {
        let Ok(found) = file.tensor(name) else {
            misfits.push(format!("{name} is missing"));
            continue;
        };
        let shape: Vec<_> = tensor.size().iter().map(|&len| len as usize).collect();
        if found.shape() != shape {
            misfits.push(format!("{name} has shape {:?}, not {shape:?}", found.shape()));
        } else if found.dtype() != Dtype::F32 {
            misfits.push(format!("{name} holds {:?}, not F32", found.dtype()));
        }
    }
    let ignored = |name: &str| {
        part == Part::Encoder
            && (name.starts_with("fc.") || !is_encoder(name) || name.ends_with(".num_batches_tracked"))
    };
    let mut surplus: Vec<_> =
        file.names().into_iter().filter(|&name| !expected.contains_key(name) && !ignored(name)).collect();
    surplus.sort_unstable();
    misfits.extend(surplus.iter().map(|name| format!("{name} is not part of it")));
    misfits
}

fn listed(misfits: &[String]) -> String {
    let mut text = misfits[..misfits.len().min(LISTED)].join("; ");
    if misfits.len() > LISTED {
        text += &format!("; and {} more", misfits.len() - LISTED);
    }
    text
}

/// A row-major copy of a tensor in host memory.
struct HostTensor {
    shape: Vec<usize>,
    values: Vec<f32>,
}

impl HostTensor {
    fn copy_of(tensor: &Tensor) -> Result<Self, Error> {
        let shape = tensor.size().iter().map(|&len| len as usize).collect();
        let row_major = no_grad(|| tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous())?;
        Ok(Self { shape, values: torch_ext::with_f32(&row_major, <[f32]>::to_vec)? })
    }
}

impl View for HostTensor {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        bytemuck::cast_slice(&self.values).into()
    }

    fn data_len(&self) -> usize {
        size_of_val(self.values.as_slice())
    }
}
