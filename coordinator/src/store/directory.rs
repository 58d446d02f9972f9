//! Checkpoints in a local directory, one directory each.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use musher_proto::ids::CheckpointId;

use super::{IoContext, MANIFEST, Manifest, Source, StoreError, durable, manifest, plain_name};

/// A checkpoint not yet committed.
pub(super) const PENDING: &str = ".pending-";
/// A checkpoint on its way out: renamed first, so that it vanishes whole.
pub(super) const REMOVED: &str = ".removed-";

/// What a directory is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It is created if absent, and cleared of what a crashed process left half-done.
    Writing,
    /// It must be there, and its run may be going on.
    Looking,
}

#[derive(Debug, Clone)]
pub(super) struct Directory {
    dir: PathBuf,
}

impl Directory {
    pub fn open(dir: PathBuf, access: Access) -> Result<Self, StoreError> {
        match access {
            Access::Looking => drop(names(&dir)?),
            Access::Writing => {
                fs::create_dir_all(&dir).context("create", &dir)?;
                for name in names(&dir)? {
                    if name.starts_with(PENDING) || name.starts_with(REMOVED) {
                        durable::remove_dir(&dir.join(name))?;
                    }
                }
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

    pub fn ids(&self) -> Result<Vec<CheckpointId>, StoreError> {
        let names = names(&self.dir)?.into_iter();
        let plain = names.filter(|name| plain_name(name).is_ok() && self.dir.join(name).is_dir());
        Ok(plain.map(CheckpointId).collect())
    }

    pub fn manifest(&self, id: &CheckpointId) -> Result<Manifest, StoreError> {
        let path = self.path_of(id).join(MANIFEST);
        let text = fs::read(&path).context("read", &path)?;
        manifest::parse(&text, id, &path)
    }

    pub fn source(&self, id: &CheckpointId, file: &str) -> Result<Source, StoreError> {
        let path = self.path_of(id).join(file);
        let bytes = fs::metadata(&path).context("find", &path)?.len();
        let reader = Box::new(File::open(&path).context("open", &path)?);
        Ok(Source { bytes, reader })
    }

    pub fn remove(&self, doomed: &[CheckpointId]) -> Result<(), StoreError> {
        doomed.iter().try_for_each(|id| {
            durable::remove_whole(&self.path_of(id), &self.dir.join(format!("{REMOVED}{id}")))
        })
    }
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
