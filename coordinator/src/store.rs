//! Checkpoints in a directory or an object store: written aside, made visible whole, verified when read.
//!
//! Owns the layout `DIR/<id>/{part-<offset>.bin, manifest.json, ...}` and its durability. A
//! checkpoint is visible only when every byte of it is stored, and committing one never touches
//! another. Knows nothing of tensors, of who sends the bytes or of when to take a checkpoint; it
//! blocks, so callers keep it off their async threads. One process writes a directory at a time;
//! the run directory's lock, which is not held here, sees to that. An object store sees to it itself.

mod directory;
mod durable;
mod error;
mod index;
mod manifest;
mod objects;
mod pending;
mod state;
mod writer;

use std::cmp::Reverse;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use musher_proto::{digest, ids::CheckpointId};
use musher_store::{Patience, Store, Variables};

pub use directory::Access;
pub use durable::write_atomically;
pub use error::StoreError;
pub use index::Owner;
pub use manifest::{Best, MANIFEST_VERSION, Manifest, Part, StoredFile};
pub use pending::PendingCheckpoint;
pub use state::StateReader;
pub use writer::{FileWriter, PartWriter};

use directory::Directory;
use error::IoContext;
use objects::Objects;

const MANIFEST: &str = "manifest.json";
/// A file that some checkpoints have beside the state: the network's weights for others to open.
pub const WEIGHTS: &str = "weights.safetensors";

/// A place with checkpoints.
#[derive(Debug, Clone)]
pub struct CheckpointStore {
    place: Place,
}

#[derive(Debug, Clone)]
enum Place {
    Directory(Directory),
    Objects(Objects),
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

/// Readable manifests newest first, and the checkpoints without one.
#[derive(Debug)]
pub struct Listing {
    pub manifests: Vec<Manifest>,
    pub skipped: Vec<Skipped>,
}

/// A stored file: its length, and its bytes from the first on.
struct Source {
    bytes: u64,
    reader: Box<dyn Read + Send>,
}

impl CheckpointStore {
    /// Opens `dir`, created if absent, and clears what a crashed process left half-done in it.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, StoreError> {
        Directory::open(dir.into(), Access::Writing).map(Self::at_directory)
    }

    /// Opens `dir`, which must be there, and changes nothing in it.
    pub fn look_at(dir: impl Into<PathBuf>) -> Result<Self, StoreError> {
        Directory::open(dir.into(), Access::Looking).map(Self::at_directory)
    }

    /// Reaches the object store at `url`, with credentials from `variables`. What is to write there must
    /// [`CheckpointStore::take_over`] first.
    pub fn connect(url: &str, variables: &Variables) -> Result<Self, StoreError> {
        // Somebody waits for this answer; later, work goes on meanwhile.
        Store::open(url, variables, Patience::Short)?.check()?;
        let store = Store::open(url, variables, Patience::Long)?;
        Ok(Self { place: Place::Objects(Objects::new(store)) })
    }

    fn at_directory(directory: Directory) -> Self {
        Self { place: Place::Directory(directory) }
    }

    /// For people.
    pub fn name(&self) -> String {
        match &self.place {
            Place::Directory(directory) => directory.dir().display().to_string(),
            Place::Objects(objects) => objects.url().to_owned(),
        }
    }

    /// Whose checkpoints an object store holds, as it says itself; a directory does not say.
    pub fn owner(&self) -> Result<Option<Owner>, StoreError> {
        match &self.place {
            Place::Directory(_) => Ok(None),
            Place::Objects(objects) => objects.owner(),
        }
    }

    /// Makes this process the only one that can commit to an object store, in a term above those of all
    /// before it, and clears what they left half-done. A directory is guarded by its run's lock.
    pub fn take_over(&self, owner: Owner) -> Result<(), StoreError> {
        match &self.place {
            Place::Directory(_) => Ok(()),
            Place::Objects(objects) => objects.take_over(owner),
        }
    }

    /// Begins a checkpoint whose logical state has `state_bytes` bytes.
    ///
    /// An intact checkpoint of that name is never replaced, a damaged one is, at the commit.
    pub fn begin(&self, id: &CheckpointId, state_bytes: u64) -> Result<PendingCheckpoint, StoreError> {
        plain_name(id.as_str())?;
        if self.holds(id)? && self.verify(id).is_ok() {
            return Err(StoreError::AlreadyCommitted { id: id.clone() });
        }
        match &self.place {
            Place::Directory(directory) => {
                PendingCheckpoint::in_directory(directory.dir(), id.clone(), state_bytes)
            }
            Place::Objects(objects) => PendingCheckpoint::in_objects(objects, id.clone(), state_bytes),
        }
    }

    /// Whether there is no checkpoint, not even one that can't be read.
    pub fn is_empty(&self) -> Result<bool, StoreError> {
        Ok(self.ids()?.is_empty())
    }

    /// The manifests of all complete checkpoints, newest first. Their state is not read.
    pub fn list(&self) -> Result<Vec<Manifest>, StoreError> {
        Ok(self.scan()?.manifests)
    }

    /// The newest checkpoint whose every byte verifies.
    ///
    /// Fails on a manifest of an unknown version: going back to an older checkpoint would quietly
    /// undo what a newer Musher did.
    pub fn load_latest(&self) -> Result<Latest, StoreError> {
        let Listing { manifests, mut skipped } = self.scan()?;
        if let Some(at) = skipped.iter().position(|skip| matches!(skip.reason, StoreError::Version { .. })) {
            return Err(skipped.swap_remove(at).reason);
        }
        for manifest in manifests {
            match self.verify_all(&manifest) {
                Ok(()) => return Ok(Latest { manifest: Some(manifest), skipped }),
                Err(reason) => skipped.push(Skipped { id: manifest.id, reason }),
            }
        }
        Ok(Latest { manifest: None, skipped })
    }

    /// The manifest of checkpoint `id`, once all its bytes are verified.
    pub fn verify(&self, id: &CheckpointId) -> Result<Manifest, StoreError> {
        let manifest = self.manifest(id)?;
        self.verify_all(&manifest)?;
        Ok(manifest)
    }

    /// All that is wrong with the bytes of a checkpoint, in the order of its parts.
    pub fn damages(&self, manifest: &Manifest) -> Vec<StoreError> {
        let open = |file: &str| self.source(&manifest.id, file);
        state::damages(manifest, open).collect()
    }

    /// The logical state of `id` from its first byte to its last.
    pub fn open_state(&self, id: &CheckpointId) -> Result<StateReader, StoreError> {
        let manifest = self.manifest(id)?;
        Ok(StateReader::new(self.clone(), manifest))
    }

    /// Replaces `to` by a copy of a file of checkpoint `id`, whole or not at all.
    pub fn copy_out(&self, id: &CheckpointId, file: &str, to: &Path) -> Result<(), StoreError> {
        let Source { mut reader, .. } = self.source(id, file)?;
        durable::replace(to, |to| io::copy(&mut reader, to).map(drop))
    }

    /// Whether `copy` holds that file of checkpoint `id`, byte for byte; one that can't be read does not.
    pub fn is_copy(&self, id: &CheckpointId, file: &str, copy: &Path) -> Result<bool, StoreError> {
        let manifest = self.manifest(id)?;
        let Some(stored) = manifest.files.iter().find(|stored| stored.file == file) else { return Ok(false) };
        let Ok(bytes) = fs::read(copy) else { return Ok(false) };
        Ok(bytes.len() as u64 == stored.bytes && digest::of_slice(0, &bytes) == stored.digest)
    }

    /// Removes all complete checkpoints but the `keep` newest and `best`; says which went.
    pub fn prune(&self, keep: usize, best: Option<&CheckpointId>) -> Result<Vec<CheckpointId>, StoreError> {
        let doomed = self.surplus(keep, best)?;
        match &self.place {
            Place::Directory(directory) => directory.remove(&doomed)?,
            Place::Objects(objects) => objects.remove(&doomed)?,
        }
        Ok(doomed)
    }

    /// What [`Self::prune`] would remove.
    pub fn surplus(&self, keep: usize, best: Option<&CheckpointId>) -> Result<Vec<CheckpointId>, StoreError> {
        let older = self.list()?.into_iter().skip(keep).map(|manifest| manifest.id);
        Ok(older.filter(|id| Some(id) != best).collect())
    }

    /// All checkpoints, those that can't be read too.
    pub fn scan(&self) -> Result<Listing, StoreError> {
        let ids = self.ids()?;
        let (mut manifests, mut skipped) = (Vec::new(), Vec::new());
        for id in ids {
            match self.manifest(&id) {
                Ok(manifest) => manifests.push(manifest),
                // What can't be reached is not damaged.
                Err(reason @ StoreError::Remote(_)) if !reason.is_absence() => return Err(reason),
                Err(reason) => skipped.push(Skipped { id, reason }),
            }
        }
        manifests.sort_by_key(|manifest| Reverse(manifest.age()));
        skipped.sort_by(|a, b| b.id.cmp(&a.id));
        Ok(Listing { manifests, skipped })
    }

    /// The manifest of `id`; the files it names are not read.
    pub fn manifest(&self, id: &CheckpointId) -> Result<Manifest, StoreError> {
        plain_name(id.as_str())?;
        match &self.place {
            Place::Directory(directory) => directory.manifest(id),
            Place::Objects(objects) => objects.manifest(id),
        }
    }

    fn verify_all(&self, manifest: &Manifest) -> Result<(), StoreError> {
        let open = |file: &str| self.source(&manifest.id, file);
        match state::damages(manifest, open).next() {
            Some(damage) => Err(damage),
            None => Ok(()),
        }
    }

    fn ids(&self) -> Result<Vec<CheckpointId>, StoreError> {
        match &self.place {
            Place::Directory(directory) => directory.ids(),
            Place::Objects(objects) => objects.ids(),
        }
    }

    fn holds(&self, id: &CheckpointId) -> Result<bool, StoreError> {
        match &self.place {
            Place::Directory(directory) => Ok(directory.path_of(id).exists()),
            Place::Objects(objects) => Ok(objects.ids()?.contains(id)),
        }
    }

    fn source(&self, id: &CheckpointId, file: &str) -> Result<Source, StoreError> {
        plain_name(id.as_str())?;
        plain_name(file)?;
        match &self.place {
            Place::Directory(directory) => directory.source(id, file),
            Place::Objects(objects) => objects.source(id, file),
        }
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

#[cfg(test)]
mod object_tests;
#[cfg(test)]
mod tests;
