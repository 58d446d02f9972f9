//! A checkpoint that is being written: nobody sees it before its commit.
//!
//! In a directory it lives in `.pending-<id>.<attempt>`, in an object store in a folder that the index does
//! not name; dropping it without a commit removes it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use musher_proto::ids::CheckpointId;

use super::directory::{PENDING, REMOVED};
use super::manifest::slice_end;
use super::objects::Objects;
use super::{FileWriter, IoContext, MANIFEST, Manifest, PartWriter, StoreError, durable, plain_name};

/// A checkpoint between `begin` and `commit`.
#[derive(Debug)]
pub struct PendingCheckpoint {
    id: CheckpointId,
    state_bytes: u64,
    desk: Desk,
}

/// Where it is written.
#[derive(Debug)]
enum Desk {
    Directory(PendingDirectory),
    Objects(PendingFolder),
}

#[derive(Debug)]
struct PendingDirectory {
    store: PathBuf,
    dir: PathBuf,
}

#[derive(Debug)]
struct PendingFolder {
    objects: Objects,
    folder: String,
    /// Whether it was committed, or may have been.
    keep: bool,
}

impl PendingCheckpoint {
    pub(super) fn in_directory(store: &Path, id: CheckpointId, state_bytes: u64) -> Result<Self, StoreError> {
        // Each attempt has a directory of its own: writers of one that was abandoned can't disturb the next.
        static ATTEMPTS: AtomicU64 = AtomicU64::new(0);
        let attempt = ATTEMPTS.fetch_add(1, Ordering::Relaxed);
        let dir = store.join(format!("{PENDING}{id}.{attempt}"));
        durable::remove_dir(&dir)?;
        fs::create_dir(&dir).context("create", &dir)?;
        Ok(Self { id, state_bytes, desk: Desk::Directory(PendingDirectory { store: store.to_owned(), dir }) })
    }

    pub(super) fn in_objects(
        objects: &Objects,
        id: CheckpointId,
        state_bytes: u64,
    ) -> Result<Self, StoreError> {
        let folder = objects.new_folder(&id)?;
        let desk = Desk::Objects(PendingFolder { objects: objects.clone(), folder, keep: false });
        Ok(Self { id, state_bytes, desk })
    }

    pub fn id(&self) -> &CheckpointId {
        &self.id
    }

    /// A writer for the state's bytes `offset..offset + bytes`; a second one for the same offset
    /// starts the part over.
    pub fn part(&self, offset: u64, bytes: u64) -> Result<PartWriter, StoreError> {
        slice_end(offset, bytes, self.state_bytes)?;
        let file = self.desk.writer(format!("part-{offset}.bin"), offset / 4, bytes)?;
        Ok(PartWriter::new(offset, file))
    }

    /// A writer for a file of `bytes` bytes beside the state.
    pub fn file(&self, name: &str, bytes: u64) -> Result<FileWriter, StoreError> {
        plain_name(name)?;
        if name.starts_with(MANIFEST) || name.starts_with("part-") {
            return Err(StoreError::Name { name: name.to_owned() });
        }
        self.desk.writer(name.to_owned(), 0, bytes)
    }

    /// Makes the checkpoint visible, if what `manifest` says is there and adds up.
    ///
    /// After an error it is gone, with two exceptions. Where flushing the store's directory fails as the very
    /// last thing, it is visible and complete, and may or may not outlive a power failure. Where an object
    /// store is lost from sight in the very last request, it may become visible yet, and is complete.
    pub fn commit(mut self, manifest: &Manifest) -> Result<(), StoreError> {
        self.check(manifest)?;
        let text = serde_json::to_vec_pretty(manifest).expect("a manifest is plain data");
        self.desk.commit(&self.id, text)
    }

    /// Removes what was written; so does dropping it, but this says if that failed.
    pub fn abandon(self) -> Result<(), StoreError> {
        match &self.desk {
            Desk::Directory(PendingDirectory { dir, .. }) => durable::remove_dir(dir),
            Desk::Objects(PendingFolder { objects, folder, .. }) => objects.discard(folder),
        }
    }

    fn check(&self, manifest: &Manifest) -> Result<(), StoreError> {
        if manifest.id != self.id {
            let (expected, found) = (self.id.to_string(), manifest.id.to_string());
            return Err(StoreError::WrongCheckpoint { expected, found });
        }
        manifest.check_parts()?;
        let parts = manifest.parts.iter().map(|part| (&part.file, part.bytes));
        let files = manifest.files.iter().map(|file| (&file.file, file.bytes));
        let stored = self.desk.lengths()?;
        for (file, expected) in parts.chain(files) {
            plain_name(file)?;
            let found = *stored.get(file).ok_or_else(|| StoreError::Lost { file: file.clone() })?;
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

impl Desk {
    fn writer(&self, name: String, first_word: u64, bytes: u64) -> Result<FileWriter, StoreError> {
        match self {
            Desk::Directory(PendingDirectory { dir, .. }) => {
                FileWriter::create(dir.join(&name), name, first_word, bytes)
            }
            Desk::Objects(PendingFolder { objects, folder, .. }) => {
                let upload = objects.store().upload(&format!("{folder}/{name}"))?;
                Ok(FileWriter::upload(upload, name, first_word, bytes))
            }
        }
    }

    /// What is there, in bytes.
    fn lengths(&self) -> Result<BTreeMap<String, u64>, StoreError> {
        match self {
            Desk::Directory(PendingDirectory { dir, .. }) => {
                let mut lengths = BTreeMap::new();
                for entry in fs::read_dir(dir).context("list", dir)? {
                    let entry = entry.context("list", dir)?;
                    let bytes = entry.metadata().context("find", &entry.path())?.len();
                    lengths.extend(entry.file_name().into_string().ok().map(|name| (name, bytes)));
                }
                Ok(lengths)
            }
            Desk::Objects(PendingFolder { objects, folder, .. }) => {
                let entries = objects.store().list(folder)?.into_iter();
                let name = |key: String| key.rsplit('/').next().unwrap_or_default().to_owned();
                Ok(entries.map(|entry| (name(entry.key), entry.bytes)).collect())
            }
        }
    }

    fn commit(&mut self, id: &CheckpointId, manifest: Vec<u8>) -> Result<(), StoreError> {
        match self {
            Desk::Directory(PendingDirectory { store, dir }) => {
                durable::write_atomically(&dir.join(MANIFEST), &manifest)?;
                let target = store.join(id.as_str());
                if target.exists() {
                    // `begin` found it damaged.
                    durable::remove_whole(&target, &store.join(format!("{REMOVED}{id}")))?;
                }
                fs::rename(&*dir, &target).context("commit", &target)?;
                durable::sync_dir(store)
            }
            Desk::Objects(PendingFolder { objects, folder, keep }) => {
                objects.store().put(&format!("{folder}/{MANIFEST}"), manifest)?;
                let committed = objects.commit(id, folder.clone());
                *keep = !matches!(committed, Err(StoreError::Fenced { .. }));
                committed
            }
        }
    }
}

impl Drop for PendingDirectory {
    fn drop(&mut self) {
        // After a commit there is nothing under this name; what cannot be removed now goes at the
        // next open.
        let _ = durable::remove_dir(&self.dir);
    }
}

impl Drop for PendingFolder {
    fn drop(&mut self) {
        if !self.keep {
            self.objects.discard_later(self.folder.clone());
        }
    }
}
