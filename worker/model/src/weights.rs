//! Weights in and out. Out: a safetensors file, f32, row-major, no padding, torchvision's names for the encoder (see
//! [`crate::unet`] for the decoder's), no optimizer state; equal weights and metadata are equal bytes. In: such a
//! file, or the encoder out of any file that `musher-weights` reads.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{Cursor, Read, Seek};

use musher_weights::resnet50::{self, Variant};
use musher_weights::{Dtype, Stored, WeightsFile};
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype as TheirDtype, View};
use tch::{Device, Tensor, no_grad};

use crate::flat::Flat;
use crate::layout::is_encoder;
use crate::{Encoder, Error};

/// Names listed at most in a message.
const LISTED: usize = 6;
/// Bytes before a safetensors file's header, which hold its length, and what the length is a multiple of.
const PREFIX: usize = 8;

/// What is wrong with a weights file.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    #[error("the weights can't be used: {0}")]
    File(#[from] musher_weights::Error),
    #[error("the weights can't be written: {0}")]
    Write(#[from] SafeTensorError),
    #[error(
        "the weights are of the encoder \"{found}\", but the model's is \"{expected}\": set model.encoder = \"{found}\", or use other weights"
    )]
    Encoder { found: &'static str, expected: &'static str },
    #[error("the weights do not fit the model, check its width, classes and encoder: {}", listed(.0))]
    Misfit(Vec<String>),
}

/// Which tensors a file must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Whole,
    Encoder,
}

pub(crate) fn save(flat: &Flat, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>, Error> {
    let tensors = tensors(flat, Part::Whole)
        .into_iter()
        .map(|(name, tensor)| Ok((name, HostTensor::copy_of(tensor)?)))
        .collect::<Result<BTreeMap<_, _>, Error>>()?;
    let file = safetensors::serialize(tensors, None).map_err(WeightsError::Write)?;
    Ok(with_metadata(file, metadata))
}

/// Overwrites all parameters and running statistics by those of such a file, all or, on an error, none.
pub(crate) fn load(flat: &mut Flat, file: &[u8]) -> Result<(), Error> {
    let mut file = WeightsFile::new(Cursor::new(file)).map_err(WeightsError::File)?;
    let found = file.tensors().clone();
    let found = found.iter().map(|(name, stored)| (name.as_str(), (name.as_str(), stored))).collect();
    take(flat, Part::Whole, &found, &mut file)
}

/// Overwrites the encoder's, all or, on an error, none. Returns what the file has besides.
pub(crate) fn load_encoder<R: Read + Seek>(
    flat: &mut Flat,
    encoder: Encoder,
    file: &mut WeightsFile<R>,
) -> Result<Vec<String>, Error> {
    let found = resnet50::Encoder::of(file).map_err(WeightsError::File)?;
    let (variant, found_name) = match found.variant {
        Variant::Torchvision => (Encoder::Torchvision, "torchvision"),
        Variant::Keras => (Encoder::Keras, "keras"),
    };
    if variant != encoder {
        let expected = if found_name == "keras" { "torchvision" } else { "keras" };
        return Err(WeightsError::Encoder { found: found_name, expected }.into());
    }
    let tensors = found.tensors.iter();
    let tensors = tensors.map(|(name, of)| (name.as_str(), (of.name.as_str(), &of.stored))).collect();
    take(flat, Part::Encoder, &tensors, file)?;
    Ok(found.ignored)
}

/// By the network's name: the file's name, and the array.
type Found<'a> = BTreeMap<&'a str, (&'a str, &'a Stored)>;

fn take<R: Read + Seek>(
    flat: &mut Flat,
    part: Part,
    found: &Found,
    file: &mut WeightsFile<R>,
) -> Result<(), Error> {
    let expected = tensors(flat, part);
    let misfits = misfits(&expected, found);
    if !misfits.is_empty() {
        return Err(WeightsError::Misfit(misfits).into());
    }
    let mut values = Vec::with_capacity(expected.len());
    for name in expected.keys() {
        let (_, stored) = found[name.as_str()];
        values.push(file.read(stored).map_err(WeightsError::File)?);
    }
    for (target, values) in expected.values().zip(values) {
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

fn misfits(expected: &BTreeMap<String, &Tensor>, found: &Found) -> Vec<String> {
    let mut misfits = Vec::new();
    for (name, tensor) in expected {
        let shape = shape(tensor);
        let Some(&(file_name, stored)) = found.get(name.as_str()) else {
            misfits.push(format!("{name} {shape:?} is missing"));
            continue;
        };
        let called = if file_name == name { String::new() } else { format!(" (in the file {file_name})") };
        if stored.shape() != shape {
            misfits.push(format!("{name}{called} has shape {:?}, not {shape:?}", stored.shape()));
        } else if let Dtype::Other(_) = stored.dtype() {
            misfits.push(format!("{name}{called} holds no floating-point numbers"));
        }
    }
    let surplus = found.iter().filter(|(name, _)| !expected.contains_key(**name));
    misfits
        .extend(surplus.map(|(_, (name, stored))| format!("{name} {:?} is not part of it", stored.shape())));
    misfits
}

fn shape(tensor: &Tensor) -> Vec<usize> {
    tensor.size().iter().map(|&len| len as usize).collect()
}

fn listed(misfits: &[String]) -> String {
    let mut text = misfits[..misfits.len().min(LISTED)].join("; ");
    if misfits.len() > LISTED {
        text += &format!("; and {} more", misfits.len() - LISTED);
    }
    text
}

/// Puts metadata into a safetensors file, in the order of its keys: the safetensors crate takes a hash map, and writes
/// it in another order each time.
fn with_metadata(mut file: Vec<u8>, metadata: &BTreeMap<String, String>) -> Vec<u8> {
    let length = file.first_chunk().map_or(0, |&prefix| u64::from_le_bytes(prefix)) as usize;
    let tensors = &file[PREFIX..PREFIX + length];
    let metadata = serde_json::to_vec(metadata).expect("a map of texts is always JSON");
    let mut header = [b"{\"__metadata__\":", metadata.as_slice(), b",", &tensors[1..]].concat();
    header.resize(header.len().next_multiple_of(PREFIX), b' ');
    let prefix = (header.len() as u64).to_le_bytes();
    file.splice(..PREFIX + length, prefix.into_iter().chain(header));
    file
}

/// A row-major copy of a tensor in host memory.
struct HostTensor {
    shape: Vec<usize>,
    values: Vec<f32>,
}

impl HostTensor {
    fn copy_of(tensor: &Tensor) -> Result<Self, Error> {
        let row_major = no_grad(|| tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous())?;
        Ok(Self { shape: shape(tensor), values: torch_ext::with_f32(&row_major, <[f32]>::to_vec)? })
    }
}

impl View for HostTensor {
    fn dtype(&self) -> TheirDtype {
        TheirDtype::F32
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
