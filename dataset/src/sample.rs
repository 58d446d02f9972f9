//! One sample of a data set: what it is called, and where the bytes of its image and mask are.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::packed::{EntryIndex, Packed};
use crate::{DataWarning, DatasetError};

#[derive(Clone, Debug)]
pub struct Sample {
    pub name: String,
    /// What messages call the image and caches know the sample by: its file, or its place in a shard.
    pub image: PathBuf,
    pub mask: PathBuf,
    home: Home,
}

#[derive(Clone, Debug)]
enum Home {
    /// Files of their own.
    Files,
    Shard(Arc<Packed>, EntryIndex),
}

/// A sample's files as they are stored, undecoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PairBytes {
    pub image: Vec<u8>,
    pub mask: Vec<u8>,
}

impl Sample {
    /// A sample whose image and mask are files.
    pub fn of_files(name: impl Into<String>, image: impl Into<PathBuf>, mask: impl Into<PathBuf>) -> Self {
        Self { name: name.into(), image: image.into(), mask: mask.into(), home: Home::Files }
    }

    pub(crate) fn of_shard(packed: &Arc<Packed>, at: EntryIndex) -> Self {
        let entry = packed.entry(at);
        Self {
            name: entry.name.clone(),
            image: packed.shown(at, &entry.image),
            mask: packed.shown(at, &entry.mask),
            home: Home::Shard(packed.clone(), at),
        }
    }

    /// Whether its bytes come from a shard, and so perhaps from afar.
    pub(crate) fn is_packed(&self) -> bool {
        matches!(self.home, Home::Shard(..))
    }

    pub(crate) fn read(&self, warn: &mut dyn FnMut(DataWarning)) -> Result<PairBytes, DatasetError> {
        match &self.home {
            Home::Files => Ok(PairBytes { image: read_file(&self.image)?, mask: read_file(&self.mask)? }),
            Home::Shard(packed, at) => packed.read(*at, warn),
        }
    }
}

pub(crate) fn read_file(file: &Path) -> Result<Vec<u8>, DatasetError> {
    fs::read(file).map_err(DatasetError::read(file))
}
