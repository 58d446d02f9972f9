//! A checkpoint that is being written: nobody sees it before its commit.
//!
//! Lives in `.pending-<id>.<attempt>`; dropping it without a commit removes that directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use musher_proto::ids::CheckpointId;

use super::manifest::slice_end;
use super::{
    FileWriter, IoContext, MANIFEST, Manifest, PENDING, PartWriter, REMOVED, StoreError, durable, plain_name,
};

/// A checkpoint between `begin` and `commit`.
#[derive(Debug)]
pub struct PendingCheckpoint {
    id: CheckpointId,
    state_bytes: u64,
    store: PathBuf,
    dir: PathBuf,
}

impl PendingCheckpoint {
    pub(super) fn create(store: &Path, id: CheckpointId, state_bytes: u64) -> Result<Self, StoreError> {
        // Each attempt has a directory of its own: writers of one that was abandoned can't disturb the next.
        static ATTEMPTS: AtomicU64 = AtomicU64::new(0);
        let attempt = ATTEMPTS.fetch_add(1, Ordering::Relaxed);
        let dir = store.join(format!("{PENDING}{id}.{attempt}"));
        durable::remove_dir(&dir)?;
        fs::create_dir(&dir).context("create", &dir)?;
        Ok(Self { id, state_bytes, store: store.to_owned(), dir })
    }

    pub fn id(&self) -> &CheckpointId {
        &self.id
    }

    /// A writer for the state's bytes `offset..offset + bytes`; a second one for the same offset
    /// starts the part over.
    pub fn part(&self, offset: u64, bytes: u64) -> Result<PartWriter, StoreError> {
        slice_end(offset, bytes, self.state_bytes)?;
        let name = format!("part-{offset}.bin");
        let file = FileWriter::create(self.dir.join(&name), name, offset / 4, bytes)?;
        Ok(PartWriter::new(offset, file))
    }

    /// A writer for a file of `bytes` bytes beside the state.
    pub fn file(&self, name: &str, bytes: u64) -> Result<FileWriter, StoreError> {
        plain_name(name)?;
        if name.starts_with(MANIFEST) || name.starts_with("part-") {
            return Err(StoreError::Name { name: name.to_owned() });
        }
        FileWriter::create(self.dir.join(name), name.to_owned(), 0, bytes)
    }

    /// Makes the checkpoint visible, if what `manifest` says is there and adds up.
    ///
    /// After an error it is gone, but for a failure to flush the store's directory as the very
    /// last thing: then it is visible and complete, and may or may not outlive a power failure.
    pub fn commit(self, manifest: &Manifest) -> Result<(), StoreError> {
        self.check(manifest)?;
        let text = serde_json::to_vec_pretty(manifest).map_err(|error| StoreError::Manifest {
            path: self.dir.join(MANIFEST),
            reason: error.to_string(),
        })?;
        durable::write_atomically(&self.dir.join(MANIFEST), &text)?;
        let target = self.store.join(self.id.as_str());
        if target.exists() {
            // `begin` found it damaged.
            durable::remove_whole(&target, &self.store.join(format!("{REMOVED}{}", self.id)))?;
        }
        fs::rename(&self.dir, &target).context("commit", &target)?;
        durable::sync_dir(&self.store)
    }

    /// Removes what was written; so does dropping it, but this says if that failed.
    pub fn abandon(self) -> Result<(), StoreError> {
        durable::remove_dir(&self.dir)
    }

    fn check(&self, manifest: &Manifest) -> Result<(), StoreError> {
        if manifest.id != self.id {
            let (expected, found) = (self.id.to_string(), manifest.id.to_string());
            return Err(StoreError::WrongCheckpoint { expected, found });
        }
        manifest.check_parts()?;
        let parts = manifest.parts.iter().map(|part| (&part.file, part.bytes));
        let files = manifest.files.iter().map(|file| (&file.file, file.bytes));
        for (file, expected) in parts.chain(files) {
            plain_name(file)?;
            let path = self.dir.join(file);
            let found = fs::metadata(&path).context("find", &path)?.len();
            if found != expected {
                return Err(StoreError::Length { file: file.clone(), expected, found });
            }
        }
        if manifest.state_bytes != self.state_bytes {
            let (expected, found) = (self.state_bytes, manifest.state_bytes);
            return Err(StoreError::Length { file: "the state".into(), expected, found });
        }
        Ok(())
    }
}

impl Drop for PendingCheckpoint {
    fn drop(&mut self) {
        // After a commit there is nothing under this name; what cannot be removed now goes at the
        // next open.
        let _ = durable::remove_dir(&self.dir);
    }
}
