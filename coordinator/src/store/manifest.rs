//! The manifest: what a checkpoint holds and where in the run it was taken.
//!
//! Owns its JSON form and its version. What the coordinator keeps in the `serde_json::Value`
//! fields is the coordinator's; a resume takes it from here alone.

use std::path::Path;

use musher_proto::ids::{CheckpointId, Epoch, Generation, Step};
use serde::{Deserialize, Serialize};

use super::{StoreError, plain_name};

/// The form of manifest this version writes and reads.
pub const MANIFEST_VERSION: u64 = 2;

/// `manifest.json`, which is written last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`MANIFEST_VERSION`].
    pub version: u64,
    pub id: CheckpointId,
    /// The run's name.
    pub run: String,
    pub created_unix_ms: u64,
    /// Length of the logical state.
    pub state_bytes: u64,
    /// Digest of the whole logical state, on which all replicas agreed.
    #[serde(with = "hex_digest")]
    pub state_digest: u64,
    /// Slices that tile the logical state, in any order.
    pub parts: Vec<Part>,
    /// Files beside the state, such as `weights.safetensors`.
    pub files: Vec<StoredFile>,
    /// With `applied`, the state's label.
    pub lineage: Generation,
    /// Optimizer updates in the parameters.
    pub applied: Step,
    pub epoch: Epoch,
    /// Samples of the epoch's order that are applied.
    pub cursor: u64,
    pub seed: u64,
    pub world_size: u32,
    pub dataset_digest: String,
    /// The resolved job.
    pub config: serde_json::Value,
    /// What a resumed run takes from here besides the state: early stopping and the saved best.
    pub progress: serde_json::Value,
    /// The best checkpoint so far; may be this one.
    pub best: Option<Best>,
}

/// A slice of the logical state in a file of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    pub file: String,
    /// First byte of the slice, a multiple of 4.
    pub offset: u64,
    pub bytes: u64,
    /// Digest at the slice's place in the state.
    #[serde(with = "hex_digest")]
    pub digest: u64,
}

/// A file beside the state; its digest counts from word 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredFile {
    pub file: String,
    pub bytes: u64,
    #[serde(with = "hex_digest")]
    pub digest: u64,
}

/// The epoch with the best monitored value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Best {
    pub checkpoint: CheckpointId,
    pub epoch: Epoch,
}

impl Manifest {
    /// Of the state and of the files beside it.
    pub fn bytes(&self) -> u64 {
        self.state_bytes + self.files.iter().map(|file| file.bytes).sum::<u64>()
    }

    /// Orders checkpoints from old to new: labels first, for clocks jump.
    pub(super) fn age(&self) -> (Generation, Step, u64, CheckpointId) {
        (self.lineage, self.applied, self.created_unix_ms, self.id.clone())
    }

    /// Refuses parts that do not tile the state exactly, or whose digests do not add up to its.
    pub(super) fn check_parts(&self) -> Result<(), StoreError> {
        let mut parts: Vec<_> = self.parts.iter().collect();
        parts.sort_by_key(|part| (part.offset, part.bytes));
        let mut covered = 0;
        for part in parts {
            if part.offset > covered {
                return Err(StoreError::Gap { from: covered, to: part.offset });
            }
            if part.offset < covered {
                return Err(StoreError::Overlap { from: part.offset });
            }
            covered = slice_end(part.offset, part.bytes, self.state_bytes)?;
        }
        if covered < self.state_bytes {
            return Err(StoreError::Gap { from: covered, to: self.state_bytes });
        }
        let found = self.parts.iter().fold(0u64, |sum, part| sum.wrapping_add(part.digest));
        if found != self.state_digest {
            return Err(StoreError::StateDigest { expected: self.state_digest, found });
        }
        Ok(())
    }
}

/// The end of a slice, which must lie in the state, have bytes, and begin and end between words
/// unless its end is the state's.
pub(super) fn slice_end(offset: u64, bytes: u64, state_bytes: u64) -> Result<u64, StoreError> {
    let refused = StoreError::NoSlice { offset, end: u128::from(offset) + u128::from(bytes), state_bytes };
    let Some(end) = offset.checked_add(bytes).filter(|end| *end <= state_bytes) else {
        return Err(refused);
    };
    let between_words = offset.is_multiple_of(4) && (end.is_multiple_of(4) || end == state_bytes);
    if bytes > 0 && between_words { Ok(end) } else { Err(refused) }
}

/// The manifest of checkpoint `id` from its text, which was found at `path`.
pub(super) fn parse(text: &[u8], id: &CheckpointId, path: &Path) -> Result<Manifest, StoreError> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u64,
    }

    let damaged =
        |error: serde_json::Error| StoreError::Manifest { path: path.to_owned(), reason: error.to_string() };
    let Versioned { version } = serde_json::from_slice(text).map_err(damaged)?;
    if version != MANIFEST_VERSION {
        let path = path.to_owned();
        return Err(StoreError::Version { path, found: version, known: MANIFEST_VERSION });
    }
    let manifest: Manifest = serde_json::from_slice(text).map_err(damaged)?;
    for file in
        manifest.files.iter().map(|file| &file.file).chain(manifest.parts.iter().map(|part| &part.file))
    {
        plain_name(file)?;
    }
    if manifest.id != *id {
        return Err(StoreError::WrongCheckpoint { expected: id.to_string(), found: manifest.id.0 });
    }
    Ok(manifest)
}

/// JSON's numbers lose bits above 2^53 in many readers, hex digits do not.
mod hex_digest {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(digest: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{digest:016x}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        let text = String::deserialize(deserializer)?;
        u64::from_str_radix(&text, 16).map_err(|_| D::Error::custom(format!("\"{text}\" is no digest")))
    }
}
