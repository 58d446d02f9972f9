//! The replica against `tools/model_reference.py`: torchvision's ResNet class in float64 and Keras' Adam in NumPy.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use musher_model::{Encoder, Mode, ModelOptions, Replica};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};
use tch::{Device, Kind, Tensor, no_grad};

const OPTIONS: ModelOptions = ModelOptions {
    classes: 3,
    encoder: Encoder::Torchvision,
    width: 0.03,
    freeze_encoder: false,
    freeze_batch_norm: false,
    image_size: 64,
};

const LEARNING_RATE: f64 = 1e-3;

fn file(name: &str) -> Vec<u8> {
    std::fs::read(
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/reference/{name}.safetensors")),
    )
    .unwrap()
}

fn tensors(file: &[u8]) -> BTreeMap<String, Tensor> {
    let convert = |view: &TensorView| {
        let kind = match view.dtype() {
            Dtype::F32 => Kind::Float,
            Dtype::F64 => Kind::Double,
            Dtype::U8 => Kind::Uint8,
            other => panic!("unexpected {other:?}"),
        };
        let shape: Vec<_> = view.shape().iter().map(|&len| len as i64).collect();
        Tensor::from_data_size(view.data(), &shape, kind)
    };
    SafeTensors::deserialize(file).unwrap().iter().map(|(name, view)| (name.into(), convert(&view))).collect()
}

fn images(reference: &BTreeMap<String, Tensor>) -> Tensor {
    reference["pixels"].to_kind(Kind::Float) / 255.0
}

fn masks(reference: &BTreeMap<String, Tensor>) -> Tensor {
    reference["masks"].to_kind(Kind::Int64)
}

fn replica() -> Replica {
    tch::set_num_threads(1);
    let mut replica = Replica::new(&OPTIONS, 0, Device::Cpu).unwrap();
    replica.load_weights(&file("weights")).unwrap();
    replica
}

/// Largest deviation over the largest magnitude.
fn deviation(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.size(), expected.size());
    no_grad(|| ((found - expected).abs().max() / expected.abs().max()).double_value(&[]))
}

/// Norm of the deviation over the norm.
fn relative_error(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.size(), expected.size());
    no_grad(|| ((found - expected).norm() / expected.norm()).double_value(&[]))
}

fn assert_taps_and_logits(replica: &Replica, images: &Tensor, expected: &BTreeMap<String, Tensor>) {
    for (i, tap) in replica.encode(images, Mode::Eval).unwrap().iter().enumerate() {
        let error = deviation(tap, &expected[&format!("tap.{i}")]);
        assert!(error < 1e-4, "tap {i} deviates by {error}");
    }
    let error = deviation(&replica.forward(images, Mode::Eval).unwrap(), &expected["logits.eval"]);
    assert!(error < 1e-4, "logits deviate by {error}");
}

/// One training step up to the gradients of the mean loss; returns the loss sum.
fn accumulate(replica: &mut Replica, images: &Tensor, masks: &Tensor) -> f64 {
    replica.begin_step().unwrap();
    replica.zero_gradients().unwrap();
    let logits = replica.forward(images, Mode::Train).unwrap();
    replica.backward_sum_loss(&logits, masks, 1.0 / masks.numel() as f64).unwrap().double_value(&[])
}

/// The step applies.
fn update(replica: &mut Replica) {
    let applies = Tensor::ones([1], (Kind::Float, replica.device()));
    replica.update(LEARNING_RATE, &applies, None).unwrap();
    replica.settle(true);
}

#[test]
fn torchvision_encoder_evaluates_alike() {
    let reference = tensors(&file("torchvision"));
    assert_taps_and_logits(&replica(), &images(&reference), &reference);
}

#[test]
fn keras_encoder_evaluates_alike() {
    let (reference, keras) = (tensors(&file("torchvision")), file("keras"));
    let options = ModelOptions { encoder: Encoder::Keras, ..OPTIONS };
    let mut replica = Replica::new(&options, 0, Device::Cpu).unwrap();

    let (shared, own) = (file("weights"), SafeTensors::deserialize(&keras).unwrap());
    let shared = SafeTensors::deserialize(&shared).unwrap();
    let own = own.iter().filter_map(|(name, view)| Some((name.strip_prefix("weights.")?, view)));
    replica.load_weights(&serialize(shared.iter().chain(own), None).unwrap()).unwrap();

    assert_taps_and_logits(&replica, &images(&reference), &tensors(&keras));
}

#[test]
fn a_training_pass_has_the_same_logits_loss_gradients_and_statistics() {
    let reference = tensors(&file("torchvision"));
    let (images, masks) = (images(&reference), masks(&reference));
    let mut replica = replica();

    let logits = replica.forward(&images, Mode::Train).unwrap();
    // Fifty batch norms over few values amplify float32's rounding; PyTorch's own deviation from float64 is 1e-4.
    let error = deviation(&logits, &reference["logits.train"]);
    assert!(error < 3e-4, "logits deviate by {error}");

    let loss = accumulate(&mut replica, &images, &masks);
    let expected = reference["loss.train"].double_value(&[]);
    assert!((loss / expected - 1.0).abs() < 1e-5, "{loss} is not {expected}");
    for (name, parameter) in replica.parameters() {
        let error = relative_error(&parameter.grad(), &reference[&format!("grad.{name}")]);
        assert!(error < 1e-3, "the gradient of {name} is off by {error}");
    }

    update(&mut replica);
    let weights = tensors(&replica.weights_safetensors(HashMap::new()).unwrap());
    let statistics: Vec<_> = weights.iter().filter(|(name, _)| name.contains(".running_")).collect();
    assert_eq!(statistics.len(), 2 * (53 + 12));
    for (name, found) in statistics {
        let error = deviation(found, &reference[&format!("after.{name}")]);
        assert!(error < 1e-4, "{name} is off by {error}");
    }
}

#[test]
fn one_whole_step_moves_as_keras_does() {
    let (reference, adam, before) =
        (tensors(&file("torchvision")), tensors(&file("adam")), tensors(&file("weights")));
    let mut replica = replica();
    accumulate(&mut replica, &images(&reference), &masks(&reference));
    update(&mut replica);
    for (name, parameter) in replica.parameters() {
        let expected = &adam[&format!("1.{name}")] - &before[name];
        let error = relative_error(&(parameter.detach() - &before[name]), &expected);
        // Adam's first move is nearly the gradient's sign: rounding shows where a gradient is nearly zero.
        assert!(error < 0.01, "the move of {name} is off by {error}");
    }
}

#[test]
fn adam_is_keras_formula() {
    let (reference, adam) = (tensors(&file("torchvision")), tensors(&file("adam")));
    let mut replica = replica();
    for (step, factor) in [(1, 1.0), (2, -0.5), (3, 3.0)] {
        for (name, parameter) in replica.parameters() {
            parameter.grad().copy_(&(&reference[&format!("grad.{name}")] * factor));
        }
        update(&mut replica);
        for (name, parameter) in replica.parameters().filter(|_| step != 2) {
            let error =
                no_grad(|| (parameter - &adam[&format!("{step}.{name}")]).abs().max().double_value(&[]));
            assert!(error < 1e-3 * LEARNING_RATE, "after step {step}, {name} is off by {error}");
        }
    }
    assert_eq!(replica.adam_steps(), 3);
}

#[test]
fn weights_survive_export_bit_for_bit() {
    let exported = replica().weights_safetensors(HashMap::from([("epoch".into(), "3".into())])).unwrap();
    let (expected, found) = (tensors(&file("weights")), tensors(&exported));
    assert_eq!(expected.keys().collect::<Vec<_>>(), found.keys().collect::<Vec<_>>());
    for (name, expected) in expected {
        assert_eq!(found[&name], expected, "{name}");
    }
    let (_, header) = SafeTensors::read_metadata(&exported).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["epoch"], "3");
}
