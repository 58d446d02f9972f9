//! Encoders loaded from their libraries' own files, against what the libraries compute with them
//! (`tools/encoder_reference.py`).

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use musher_model::{Encoder, Mode, ModelOptions, Replica};
use musher_weights::WeightsFile;
use tch::{Device, Kind, Tensor};

fn narrow() -> (PathBuf, ModelOptions) {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/reference/encoders");
    (directory, ModelOptions { width: 0.03, image_size: 64, ..ModelOptions::default() })
}

fn replica(options: &ModelOptions, encoder: Encoder) -> Replica {
    tch::set_num_threads(1);
    Replica::new(&ModelOptions { encoder, ..options.clone() }, 0, Device::Cpu).unwrap()
}

/// The reference's tensor of this name, f32.
fn feature(directory: &Path, name: &str) -> Tensor {
    let features = std::fs::read(directory.join("features.safetensors")).unwrap();
    let features = safetensors::SafeTensors::deserialize(&features).unwrap();
    let view = features.tensor(name).unwrap();
    let kind = if name == "pixels" { Kind::Uint8 } else { Kind::Float };
    let shape: Vec<_> = view.shape().iter().map(|&len| len as i64).collect();
    Tensor::from_data_size(view.data(), &shape, kind).to_kind(Kind::Float)
}

/// Loads the file and compares all taps; returns what was ignored.
fn check(directory: &Path, options: &ModelOptions, file: &str, encoder: Encoder) -> Vec<String> {
    let library = if encoder == Encoder::Keras { "keras" } else { "torchvision" };
    let mut replica = replica(options, encoder);
    let mut weights = WeightsFile::open(&directory.join(file)).unwrap();
    let ignored = replica.load_encoder_weights(&mut weights).unwrap();
    let images = feature(directory, "pixels") / 255.0;
    for (i, tap) in replica.encode(&images, Mode::Eval).unwrap().iter().enumerate() {
        let expected = feature(directory, &format!("{library}.{i}"));
        assert_eq!(tap.size(), expected.size(), "{file}, tap {i}");
        let error = ((tap - &expected).abs().max() / expected.abs().max()).double_value(&[]);
        println!("{file}, tap {i}: largest deviation {error:.1e} of the largest value");
        assert!(error < 1e-4, "{file}, tap {i} deviates by {error}");
    }
    ignored
}

#[test]
fn torchvisions_file_gives_torchvisions_features() {
    let (directory, options) = narrow();
    let ignored = check(&directory, &options, "torchvision.pth", Encoder::Torchvision);
    assert_eq!(ignored, ["*.num_batches_tracked (53)", "fc.* (2)"]);
}

#[test]
fn keras_file_gives_keras_features() {
    let (directory, options) = narrow();
    assert!(check(&directory, &options, "keras.h5", Encoder::Keras).is_empty());
}

/// `make test-extra` prepares the files: full width, every container.
#[test]
fn full_size_encoders_do_too() {
    let Some(directory) = std::env::var_os("MUSHER_ENCODERS").map(PathBuf::from) else {
        println!("skipped: MUSHER_ENCODERS names no directory of full-size encoders (make test-extra)");
        return;
    };
    let options = ModelOptions { image_size: 96, ..ModelOptions::default() };
    for file in ["torchvision.pth", "torchvision_legacy.pth", "torchvision.safetensors"] {
        check(&directory, &options, file, Encoder::Torchvision);
    }
    check(&directory, &options, "keras.h5", Encoder::Keras);
}

#[test]
fn weights_that_do_not_fit_are_named_and_change_nothing() {
    let (directory, options) = narrow();
    let refused = |options: &ModelOptions, encoder, file: &str| {
        let mut replica = replica(options, encoder);
        let before = replica.state_digest().unwrap();
        let mut weights = WeightsFile::open(&directory.join(file)).unwrap();
        let error = replica.load_encoder_weights(&mut weights).unwrap_err().to_string();
        assert_eq!(replica.state_digest().unwrap(), before);
        error
    };
    let other = refused(&options, Encoder::Keras, "torchvision.pth");
    assert!(other.contains("set model.encoder = \"torchvision\""), "{other}");
    let other = refused(&options, Encoder::Torchvision, "keras.h5");
    assert!(other.contains("set model.encoder = \"keras\""), "{other}");

    let wide = ModelOptions { width: 0.05, ..options.clone() };
    let misfit = refused(&wide, Encoder::Torchvision, "torchvision.pth");
    assert!(misfit.contains("bn1.bias has shape [2], not [3]; "), "{misfit}");
    assert!(misfit.contains("; and "), "{misfit}");
    let misfit = refused(&wide, Encoder::Keras, "keras.h5");
    assert!(
        misfit.contains("bn1.bias (in the file conv1_bn/conv1_bn/beta) has shape [2], not [3]"),
        "{misfit}"
    );
}
