//! Checkpoints on a local directory: written aside, made visible whole, verified when read.
//!
//! Owns the layout `DIR/<id>/{part-<offset>.bin, manifest.json, ...}` and its durability. A
//! checkpoint is visible only when every byte of it is on disk, and committing one never touches
//! another. Knows nothing of tensors, of who sends the bytes or of when to take a checkpoint; it
//! blocks, so callers keep it off their async threads. One process writes a directory at a time;
//! the run directory's lock, which is not held here, sees to that.

mod durable;
mod error;
mod manifest;
mod pending;
mod state;
mod writer;

use std::cmp::Reverse;
use std::fs;
use std::path::{Path, PathBuf};

use musher_proto::ids::CheckpointId;

pub use durable::{copy_atomically, write_atomically};
pub use error::StoreError;
pub use manifest::{Best, MANIFEST_VERSION, Manifest, Part, StoredFile};
pub use pending::PendingCheckpoint;
pub use state::StateReader;
pub use writer::{FileWriter, PartWriter};

use error::IoContext;

const MANIFEST: &str = "manifest.json";
/// A checkpoint not yet committed.
const PENDING: &str = ".pending-";
/// A checkpoint on its way out: renamed first, so that it vanishes whole.
const REMOVED: &str = ".removed-";

/// A directory of checkpoints.
#[derive(Debug, Clone)]
pub struct CheckpointStore {
    dir: PathBuf,
}

/// The newest checkpoint that can be trusted, and why newer ones cannot.
#[derive(Debug)]
pub struct Latest {
    pub manifest: Option<Manifest>,
    /// Newest first; each is worth a warning.
    pub skipped: Vec<Skipped>,
}

/// A checkpoint that is torn, damaged or not understood.
#[derive(Debug)]
pub struct Skipped {
    pub id: CheckpointId,
    pub reason: StoreError,
}

impl CheckpointStore {
    /// Opens `dir`, created if absent, and clears what a crashed process left half-done in it.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let dir = dir.into();
        fs::create_dir_all(&dir).context("create", &dir)?;
        for name in names(&dir)? {
            if name.starts_with(PENDING) || name.starts_with(REMOVED) {
                durable::remove_dir(&dir.join(name))?;
            }
        }
        Ok(Self { dir })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where a committed checkpoint's files are.
    pub fn path_of(&self, id: &CheckpointId) -> PathBuf {
        self.dir.join(id.as_str())
    }

    /// Begins a checkpoint whose logical state has `state_bytes` bytes.
    ///
    /// An intact checkpoint of that name is never replaced, a damaged one is, at the commit.
    pub fn begin(&self, id: &CheckpointId, state_bytes: u64) -> Result<PendingCheckpoint, StoreError> {
        plain_name(id.as_str())?;
        if self.path_of(id).exists() && self.verify(id).is_ok() {
            return Err(StoreError::AlreadyCommitted { id: id.clone() });
        }
        PendingCheckpoint::create(&self.dir, id.clone(), state_bytes)
    }

    /// The manifests of all complete checkpoints, newest first. Their state is not read.
    pub fn list(&self) -> Result<Vec<Manifest>, StoreError> {
        Ok(self.scan()?.0)
    }

    /// The newest checkpoint whose every byte verifies.
    ///
    /// Fails on a manifest of an unknown version: going back to an older checkpoint would quietly
    /// undo what a newer Musher did.
    pub fn load_latest(&self) -> Result<Latest, StoreError> {
        let (manifests, mut skipped) = self.scan()?;
        if let Some(at) = skipped.iter().position(|skip| matches!(skip.reason, StoreError::Version { .. })) {
            return Err(skipped.swap_remove(at).reason);
        }
        for manifest in manifests {
            match state::verify(&self.path_of(&manifest.id), &manifest) {
                Ok(()) => return Ok(Latest { manifest: Some(manifest), skipped }),
                Err(reason) => skipped.push(Skipped { id: manifest.id, reason }),
            }
        }
        Ok(Latest { manifest: None, skipped })
    }

    /// The manifest of checkpoint `id`, once all its bytes are verified.
    pub fn verify(&self, id: &CheckpointId) -> Result<Manifest, StoreError> {
        plain_name(id.as_str())?;
        let dir = self.path_of(id);
        let manifest = manifest::read(&dir)?;
        state::verify(&dir, &manifest)?;
        Ok(manifest)
    }

    /// The logical state of `id` from its first byte to its last.
    pub fn open_state(&self, id: &CheckpointId) -> Result<StateReader, StoreError> {
        plain_name(id.as_str())?;
        let dir = self.path_of(id);
        let manifest = manifest::read(&dir)?;
        Ok(StateReader::new(dir, manifest))
    }

    /// Removes all complete checkpoints but the `keep` newest and `best`; says which went.
    pub fn prune(&self, keep: usize, best: Option<&CheckpointId>) -> Result<Vec<CheckpointId>, StoreError> {
        let surplus = self.list()?.into_iter().skip(keep).map(|manifest| manifest.id);
        let doomed: Vec<_> = surplus.filter(|id| Some(id) != best).collect();
        for id in &doomed {
            durable::remove_whole(&self.path_of(id), &self.dir.join(format!("{REMOVED}{id}")))?;
        }
        Ok(doomed)
    }

    /// Readable manifests newest first, and the checkpoints without one.
    fn scan(&self) -> Result<(Vec<Manifest>, Vec<Skipped>), StoreError> {
        let (mut manifests, mut skipped) = (Vec::new(), Vec::new());
        for name in names(&self.dir)? {
            let dir = self.dir.join(&name);
            if plain_name(&name).is_err() || !dir.is_dir() {
                continue;
            }
            match manifest::read(&dir) {
                Ok(manifest) => manifests.push(manifest),
                Err(reason) => skipped.push(Skipped { id: CheckpointId(name), reason }),
            }
        }
        manifests.sort_by_key(|manifest| Reverse(manifest.age()));
        skipped.sort_by(|a, b| b.id.cmp(&a.id));
        Ok((manifests, skipped))
    }
}

/// Ids and file names come from peers: none may leave its directory or hide in it.
fn plain_name(name: &str) -> Result<(), StoreError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
        return Err(StoreError::Name { name: name.to_owned() });
    }
    Ok(())
}

fn names(dir: &Path) -> Result<Vec<String>, StoreError> {
    let entries = fs::read_dir(dir).context("list", dir)?;
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.context("list", dir)?.file_name();
        names.extend(name.into_string());
    }
    Ok(names)
}

#[cfg(test)]
mod tests;
