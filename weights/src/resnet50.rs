//! What the arrays of a ResNet50's file are: torchvision's and timm's names, Keras' names, and those of Musher's own
//! weights, as the tensors of one encoder under torchvision's names.
//!
//! Nothing is read here, and no shape is judged: what a network needs of this is the network's to say.

use std::collections::BTreeMap;
use std::io::{Read, Seek};

use crate::{Error, Format, Stored, WeightsFile};

/// Which ResNet50 a file holds: they compute differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// v1.5, without convolution biases: torchvision's and timm's.
    Torchvision,
    /// v1, with them: Keras'.
    Keras,
}

/// The encoder's part of a file.
#[derive(Debug)]
pub struct Encoder {
    pub variant: Variant,
    /// By torchvision's names, `conv1.weight` to `layer4.2.bn3.running_var`; kernels are [outputs, inputs, height,
    /// width]. Arrays that no ResNet50 has keep their own names.
    pub tensors: BTreeMap<String, Found>,
    /// What else is in the file and is known not to be the encoder's, with the number of its arrays: `fc.* (2)`.
    pub ignored: Vec<String>,
}

#[derive(Debug, Clone)]
pub struct Found {
    /// The file's.
    pub name: String,
    pub stored: Stored,
}

impl Encoder {
    /// Tells by the names what a file holds.
    pub fn of<R: Read + Seek>(file: &WeightsFile<R>) -> Result<Self, Error> {
        let keras = file.format() == Format::Hdf5;
        if keras && file.tensors().keys().all(|name| name.starts_with("layers/")) {
            let what = "Keras 3's .weights.h5, which does not name the model's layers,";
            return Err(Error::unsupported(what, "save the whole model, by model.save(\"FILE.h5\")"));
        }
        let meaning = if keras { keras_meaning } else { torch_meaning };
        let (mut tensors, mut ignored) = (BTreeMap::new(), BTreeMap::<_, usize>::new());
        for (name, stored) in file.tensors() {
            let found = |stored: Stored| Found { name: name.clone(), stored };
            match meaning(name) {
                Meaning::Encoder(known) => {
                    let is_kernel = keras && known.ends_with(".weight") && stored.shape().len() == 4;
                    // Keras' kernels are [height, width, inputs, outputs].
                    let stored = if is_kernel { stored.permuted(&[3, 2, 0, 1]) } else { stored.clone() };
                    tensors.insert(known, found(stored));
                }
                Meaning::Ignored(part) => *ignored.entry(part).or_default() += 1,
                Meaning::Unknown => {
                    tensors.insert(name.clone(), found(stored.clone()));
                }
            }
        }
        let biased = keras || tensors.contains_key("conv1.bias");
        let variant = if biased { Variant::Keras } else { Variant::Torchvision };
        let ignored = ignored.into_iter().map(|(part, count)| format!("{part} ({count})")).collect();
        Ok(Self { variant, tensors, ignored })
    }
}

/// The encoder's name for an array in a file of Keras; `None` if it is none of the encoder's.
pub fn keras_name(path: &str) -> Option<String> {
    match keras_meaning(path) {
        Meaning::Encoder(name) => Some(name),
        Meaning::Ignored(_) | Meaning::Unknown => None,
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Meaning {
    /// The encoder's tensor of this name.
    Encoder(String),
    /// Part of something else.
    Ignored(&'static str),
    Unknown,
}

fn torch_meaning(name: &str) -> Meaning {
    match name.split('.').next() {
        Some("fc") => Meaning::Ignored("fc.*"),
        Some("decoder") => Meaning::Ignored("decoder.*"),
        Some("head") => Meaning::Ignored("head.*"),
        _ if name.ends_with(".num_batches_tracked") => Meaning::Ignored("*.num_batches_tracked"),
        _ => Meaning::Encoder(name.to_owned()),
    }
}

/// Of `LAYER/LAYER/WEIGHT`, possibly below `model_weights` and with `:0` behind it, in a file of Keras.
fn keras_meaning(path: &str) -> Meaning {
    let mut parts = path.rsplit('/');
    let (weight, layer) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let weight = weight.strip_suffix(":0").unwrap_or(weight);
    match (keras_layer(layer), keras_weight(weight)) {
        _ if path.starts_with("optimizer_weights/") => Meaning::Ignored("optimizer_weights/*"),
        (Some(layer), Some(weight)) => Meaning::Encoder(format!("{layer}.{weight}")),
        _ if layer == "predictions" => Meaning::Ignored("predictions/*"),
        _ => Meaning::Unknown,
    }
}

/// `conv1_bn` is bn1; `conv3_block2_1_conv` is layer2.1.conv1; `conv3_block1_0_bn` is layer2.0.downsample.1.
fn keras_layer(layer: &str) -> Option<String> {
    match layer {
        "conv1_conv" => return Some("conv1".into()),
        "conv1_bn" => return Some("bn1".into()),
        _ => {}
    }
    let (stage, rest) = layer.strip_prefix("conv")?.split_once("_block")?;
    let (block, rest) = rest.split_once('_')?;
    let (index, kind) = rest.split_once('_')?;
    let part = match (index, kind) {
        ("0", "conv") => "downsample.0".to_owned(),
        ("0", "bn") => "downsample.1".to_owned(),
        ("1" | "2" | "3", "conv" | "bn") => format!("{kind}{index}"),
        _ => return None,
    };
    let (stage, block) = (one_digit(stage, 2..=5)? - 1, one_digit(block, 1..=9)? - 1);
    Some(format!("layer{stage}.{block}.{part}"))
}

fn keras_weight(weight: &str) -> Option<&'static str> {
    Some(match weight {
        "kernel" | "gamma" => "weight",
        "bias" | "beta" => "bias",
        "moving_mean" => "running_mean",
        "moving_variance" => "running_var",
        _ => return None,
    })
}

fn one_digit(text: &str, range: std::ops::RangeInclusive<u32>) -> Option<u32> {
    let &[digit] = text.as_bytes() else { return None };
    char::from(digit).to_digit(10).filter(|digit| range.contains(digit))
}
