//! One weights file of any format: which it is, what is in it, and its arrays on demand.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

use crate::input::Input;
use crate::{Error, Stored, hdf5, safetensors, torch};

const MOST_NAME_BYTES: usize = 512;

/// How a file holds its arrays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `torch.save` since PyTorch 1.6: a zip archive.
    TorchZip,
    /// `torch.save` before: pickles, then raw storages.
    TorchLegacy,
    Safetensors,
    /// HDF5, as Keras' `.h5` files are.
    Hdf5,
}

/// What a format's reader finds in a file.
#[derive(Debug, Default)]
pub(crate) struct Index {
    pub tensors: BTreeMap<String, Stored>,
    /// Free text beside the arrays.
    pub metadata: BTreeMap<String, String>,
}

/// An opened file. Its arrays are checked to lie within it.
#[derive(Debug)]
pub struct WeightsFile<R = BufReader<File>> {
    input: Input<R>,
    format: Format,
    index: Index,
}

impl WeightsFile {
    pub fn open(path: &Path) -> Result<Self, Error> {
        let named = |problem| Error::In { file: path.to_owned(), problem: Box::new(problem) };
        let file = File::open(path).map_err(|error| named(error.into()))?;
        Self::new(BufReader::new(file)).map_err(named)
    }
}

impl<R: Read + Seek> WeightsFile<R> {
    /// Reads what is needed to know all names, shapes and places.
    pub fn new(reader: R) -> Result<Self, Error> {
        let mut input = Input::new(reader)?;
        let format = recognise(&mut input)?;
        let index = match format {
            Format::TorchZip => torch::index_zip(&mut input),
            Format::TorchLegacy => torch::index_legacy(&mut input),
            Format::Safetensors => safetensors::index(&mut input),
            Format::Hdf5 => hdf5::index(&mut input),
        }?;
        match index.tensors.keys().find(|name| !is_name(name)) {
            Some(name) => Err(Error::damaged(format!("an array has the name {name:?}"))),
            None => Ok(Self { input, format, index }),
        }
    }

    pub fn format(&self) -> Format {
        self.format
    }

    /// All arrays by the file's own names.
    pub fn tensors(&self) -> &BTreeMap<String, Stored> {
        &self.index.tensors
    }

    /// Text that the file carries: a safetensors file's metadata.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.index.metadata
    }

    /// The elements of one of this file's arrays, the last axis fastest.
    pub fn read(&mut self, stored: &Stored) -> Result<Vec<f32>, Error> {
        stored.read(&mut self.input)
    }
}

/// What may go into messages and logs as it is.
fn is_name(name: &str) -> bool {
    name.len() <= MOST_NAME_BYTES && !name.chars().any(char::is_control)
}

fn recognise<R: Read + Seek>(input: &mut Input<R>) -> Result<Format, Error> {
    let head = input.read(0..input.len.min(512), "the beginning")?;
    let not_these = "use a PyTorch state dict (.pth), safetensors or Keras' .h5";
    match head.as_slice() {
        [] => Err(Error::damaged("it is empty")),
        [b'P', b'K', 3 | 5, 4 | 6, ..] => Ok(Format::TorchZip),
        [0x89, b'H', b'D', b'F', b'\r', b'\n', 0x1a, b'\n', ..] => Ok(Format::Hdf5),
        // A pickle says its protocol; torch.save's was 2.
        [0x80, 2..=5, ..] => Ok(Format::TorchLegacy),
        [_, _, _, _, _, _, _, _, b'{', ..] => Ok(Format::Safetensors),
        [0x1f, 0x8b, ..] => Err(Error::unsupported("a gzip archive", "unpack it")),
        [b'<', ..] => Err(Error::unsupported("a web page", not_these)),
        text if text.starts_with(b"version https://git-lfs") => {
            Err(Error::unsupported("a Git LFS pointer", "get the file itself with git lfs pull"))
        }
        _ => Err(Error::unsupported("a file of no known format", not_these)),
    }
}
