//! What can go wrong with a checkpoint, each with what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use musher_proto::ids::CheckpointId;

/// Why a checkpoint was not written, or is not to be trusted.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("no space left to {action} {}; free some or lower checkpoint.keep", path.display())]
    DiskFull { action: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("\"{name}\" cannot name a file here; use letters, digits, `-`, `_` and `.`")]
    Name { name: String },
    #[error("checkpoint {id} is already committed; take the next one under another name")]
    AlreadyCommitted { id: CheckpointId },
    #[error("bytes {offset}..{end} are no slice of whole 4-byte words of a state of {state_bytes} bytes")]
    NoSlice { offset: u64, end: u128, state_bytes: u64 },
    #[error("{file} has {found} bytes where {expected} were announced; send it again")]
    Length { file: String, expected: u64, found: u64 },
    #[error("{file} has digest {found:016x}, not {expected:016x}; its bytes changed on the way or on disk")]
    Digest { file: String, expected: u64, found: u64 },
    #[error("cannot find {file}, which was stored before; something else writes to this place")]
    Lost { file: String },
    #[error("the state's bytes {from}..{to} are in no part")]
    Gap { from: u64, to: u64 },
    #[error("the state's bytes from {from} are in more than one part")]
    Overlap { from: u64 },
    #[error("the parts add up to digest {found:016x}, the replicas agreed on {expected:016x}")]
    StateDigest { expected: u64, found: u64 },
    #[error("{} is of version {found}, this Musher reads version {known}; use the version that wrote it", path.display())]
    Version { path: PathBuf, found: u64, known: u64 },
    #[error("{} is torn or damaged: {reason}", path.display())]
    Manifest { path: PathBuf, reason: String },
    #[error("the manifest is of {found}, not of {expected}; it was moved or copied by hand")]
    WrongCheckpoint { expected: String, found: String },
    #[error(transparent)]
    Remote(#[from] musher_store::StoreError),
    #[error("this process only looks at {url}, it may not write there; take it over first")]
    ReadOnly { url: String },
    #[error(
        "{url} ignores the conditions of writes (If-None-Match), so nothing would keep two coordinators apart there; use a store that honours them"
    )]
    Unconditional { url: String },
    #[error(
        "another coordinator has taken {url} over{}, this one of term {term} may not commit there any more",
        by.map(|by| format!(" in term {by}")).unwrap_or_default()
    )]
    Fenced { url: String, term: u64, by: Option<u64> },
}

impl StoreError {
    /// Whether it may be otherwise in a while, without anybody's doing.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Remote(error) if error.may_pass())
    }

    /// Whether an object store answered that something is not there.
    pub(super) fn is_absence(&self) -> bool {
        matches!(self, Self::Remote(musher_store::StoreError::Absent { .. }))
    }
}

/// Adds what was being done to what to an I/O error.
pub(super) trait IoContext<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T, StoreError>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T, StoreError> {
        self.map_err(|source| {
            let path = path.to_owned();
            match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    StoreError::DiskFull { action, path, source }
                }
                _ => StoreError::Io { action, path, source },
            }
        })
    }
}
