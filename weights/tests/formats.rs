//! Every format, in files that PyTorch, safetensors and Keras wrote (`tools/weights_reference.py`).

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::PathBuf;

use musher_weights::resnet50::{Encoder, Variant};
use musher_weights::{Dtype, Error, Format, WeightsFile};

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/reference").join(name)
}

fn open(name: &str) -> WeightsFile {
    WeightsFile::open(&path(name)).unwrap()
}

fn counted(range: std::ops::Range<u8>) -> Vec<f32> {
    range.map(|number| f32::from(number) / 8.0).collect()
}

#[test]
fn all_of_pytorchs_files_hold_the_same() {
    for (name, format) in [
        ("tiny.pth", Format::TorchZip),
        ("tiny_wrapped.pth", Format::TorchZip),
        ("tiny_legacy.pth", Format::TorchLegacy),
        ("tiny.safetensors", Format::Safetensors),
    ] {
        let mut file = open(name);
        assert_eq!(file.format(), format);
        let tensors = file.tensors().clone();
        assert_eq!(tensors.len(), 6, "{name}: {:?}", tensors.keys());
        let mut read = |tensor: &str| file.read(&tensors[tensor]).unwrap();
        assert_eq!(read("conv1.weight"), counted(0..48), "{name}");
        assert_eq!(read("bn1.weight"), counted(0..4), "{name}");
        assert_eq!(read("bn1.running_mean"), counted(2..6), "{name}");
        assert_eq!(read("fc.weight"), counted(0..6), "{name}");
        assert_eq!(read("fc.bias"), counted(0..2), "{name}");
        assert_eq!(tensors["conv1.weight"].shape(), [4, 3, 2, 2]);
        assert_eq!(tensors["fc.weight"].dtype(), Dtype::F16);
        let counter = &tensors["bn1.num_batches_tracked"];
        assert_eq!((counter.shape(), counter.dtype()), (&[][..], Dtype::Other(8)));
        assert!(file.read(counter).is_err());
    }
    assert_eq!(open("tiny.safetensors").metadata()["format"], "pt");
}

#[test]
fn keras_kernels_come_in_the_networks_order() {
    let mut file = open("tiny.h5");
    let encoder = Encoder::of(&file).unwrap();
    assert_eq!(encoder.variant, Variant::Keras);
    let kernel = &encoder.tensors["conv1.weight"];
    assert_eq!(kernel.stored.shape(), [4, 3, 2, 2]);
    // Element [height, width, input, output] of [2, 2, 3, 4] is its number.
    let at = |o: u8, i: u8, h: u8, w: u8| f32::from(((h * 2 + w) * 3 + i) * 4 + o) / 8.0;
    let mut expected = Vec::new();
    for o in 0..4 {
        for i in 0..3 {
            for h in 0..2 {
                expected.extend([at(o, i, h, 0), at(o, i, h, 1)]);
            }
        }
    }
    assert_eq!(file.read(&kernel.stored).unwrap(), expected);
    assert_eq!(file.read(&encoder.tensors["bn1.running_var"].stored).unwrap(), counted(0..4));
}

/// Names and shapes of the whole networks, as torchvision and Keras have them.
#[test]
fn both_libraries_names_mean_the_same_encoder() {
    let names = std::fs::read_to_string(path("names.txt")).unwrap();
    let (mut torchvision, mut keras) = (BTreeMap::new(), BTreeMap::new());
    for line in names.lines() {
        let [library, name, shape] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let shape = shape.split(',').filter_map(|len| len.parse::<usize>().ok()).collect::<Vec<_>>();
        let network = if library == "keras" { &mut keras } else { &mut torchvision };
        network.insert(name.to_owned(), shape);
    }
    let torchvision = encoder_of(safetensors_of(&torchvision));
    assert_eq!(torchvision.variant, Variant::Torchvision);
    assert_eq!(torchvision.ignored, ["*.num_batches_tracked (53)", "fc.* (2)"]);
    assert_eq!(torchvision.tensors.len(), 53 * 5);

    assert_eq!(keras.len(), 53 * 6);
    for (path, shape) in &keras {
        let name = musher_weights::resnet50::keras_name(path).unwrap();
        if name.ends_with(".bias") && !torchvision.tensors.contains_key(&name) {
            continue; // a convolution's
        }
        let theirs = torchvision.tensors[&name].stored.shape();
        let ours = match shape[..] {
            [height, width, inputs, outputs] => vec![outputs, inputs, height, width],
            _ => shape.clone(),
        };
        assert_eq!(ours, theirs, "{path} is {name}");
    }
}

fn encoder_of(file: Vec<u8>) -> Encoder {
    Encoder::of(&WeightsFile::new(Cursor::new(file)).unwrap()).unwrap()
}

/// A file of empty content: only names and shapes matter. U8 keeps it small.
fn safetensors_of(shapes: &BTreeMap<String, Vec<usize>>) -> Vec<u8> {
    use safetensors::tensor::{Dtype, TensorView};
    let data = vec![0; shapes.values().map(|shape| shape.iter().product::<usize>()).max().unwrap()];
    let views = shapes.iter().map(|(name, shape)| {
        let bytes = &data[..shape.iter().product()];
        (name, TensorView::new(Dtype::U8, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

fn sentence(name: &str) -> String {
    WeightsFile::open(&path(name)).unwrap_err().to_string()
}

#[test]
fn a_hostile_pickle_is_named_and_not_run() {
    for name in ["hostile.pth", "hostile_legacy.pth", "hostile.pkl"] {
        let error = sentence(name);
        assert!(error.contains("a call of posix.system (which was not made)"), "{error}");
    }
    assert!(!PathBuf::from("/tmp/it-was-run").exists());
}

#[test]
fn other_files_are_told_apart() {
    assert!(sentence("tiny_chunked.h5").contains("`conv1_conv/kernel`, which is stored in chunks"));
    for (content, part) in [
        (&b""[..], "empty"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"something else", "no known format"),
        (b"\x80\x02K\x01.", "a pickle that torch.save did not write"),
    ] {
        let error = WeightsFile::new(Cursor::new(content)).unwrap_err().to_string();
        assert!(error.contains(part) && !error.contains('\n'), "{error}");
    }
    assert!(matches!(WeightsFile::open(&path("none")), Err(Error::In { .. })));
}
