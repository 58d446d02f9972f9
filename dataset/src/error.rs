//! What can be wrong with a data set: errors that end the work, and warnings that are survived and
//! told once. How they are shown or logged is up to the caller.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// A defect that makes a data set, or a sample of it, unusable.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    #[error(
        "no data set at {}: the directory does not exist; name an existing one, or draw one \
         with `musher data synth`", .root.display()
    )]
    NoDirectory { root: PathBuf },

    #[error(
        "no data set at {}: the directory is empty; unpack the data set there, or draw \
         one with `musher data synth`", .root.display()
    )]
    EmptyDirectory { root: PathBuf },

    #[error(
        "{} does not exist, so this is not the Oxford-IIIT Pet layout; the data root must hold \
         images/ and annotations/", .folder.display()
    )]
    NoFolder { folder: PathBuf },

    #[error("the split list {} does not exist; correct its path", .list.display())]
    NoList { list: PathBuf },

    #[error("the split list {} names no image; put one name a line into it", .list.display())]
    EmptyList { list: PathBuf },

    #[error("{}:{line}: `{name}` is not a plain file name; list names without folders", .list.display())]
    BadName { list: PathBuf, line: usize, name: String },

    #[error(
        "{}:{line}: `{name}` is already listed on line {first_line}; remove one of the two",
        .list.display()
    )]
    DuplicateName { list: PathBuf, line: usize, name: String, first_line: usize },

    #[error(
        "{}:{line}: there is no image for `{name}` ({count} of the list's images are absent); \
         complete images/ or shorten the list", .list.display()
    )]
    AbsentImages { list: PathBuf, line: usize, name: String, count: usize },

    #[error(
        "{}:{line}: the image `{name}` has no mask {} ({count} of the list's masks are absent); \
         complete annotations/trimaps/ or shorten the list", .list.display(), .mask.display()
    )]
    AbsentMasks { list: PathBuf, line: usize, name: String, mask: PathBuf, count: usize },

    #[error(
        "{} does not exist, but tar shards do; copy it there too, or pack the data set again with \
         `musher data pack`", .index.display()
    )]
    NoIndex { index: PathBuf },

    #[error(
        "there is no index.json in {}, and a data set in an object store must be packed: pack it with \
         `musher data pack DIR {}`", .root.display(), .root.display()
    )]
    NotPackedThere { root: PathBuf },

    /// Of an object store, in its own words.
    #[error("{reason}")]
    Store { reason: String },

    #[error(
        "{} is no index of a packed data set: {reason}; copy it again, or pack the data set again with \
         `musher data pack`", .index.display()
    )]
    BadIndex { index: PathBuf, reason: String },

    #[error(
        "{}:{line}: `{name}` is in no shard ({count} of the list's names are in none); pack the data set \
         with this list, or shorten the list", .list.display()
    )]
    NotPacked { list: PathBuf, line: usize, name: String, count: usize },

    #[error("the shard {} is gone; bring it back, or pack the data set again", .shard.display())]
    NoShard { shard: PathBuf },

    #[error(
        "the shard {} has {found} bytes, its index says {expected}; copy both again, or pack the data set again",
        .shard.display()
    )]
    ShardSize { shard: PathBuf, found: u64, expected: u64 },

    #[error("the shard {} ends before its index says; copy both again, or pack the data set again", .shard.display())]
    ShardCut { shard: PathBuf },

    #[error(
        "what the shard {} has for `{name}` is not what was packed; copy it and its index again, or pack the data \
         set again", .shard.display()
    )]
    ShardContent { shard: PathBuf, name: String },

    #[error(
        "the shard {} does not fit its index: {reason}; copy both again, or pack the data set again",
        .shard.display()
    )]
    ShardStructure { shard: PathBuf, reason: String },

    #[error("`{name}` can't be packed: {reason}; rename it, in its list too")]
    NotPackable { name: String, reason: String },

    #[error(
        "a share of {fraction} of the {len} names in {list} leaves nothing to train on or nothing to validate on; \
         use another `data.val_fraction`, or a longer list"
    )]
    NothingHeldOut { list: String, fraction: f64, len: usize },

    #[error("cannot read {}: {source}", .file.display())]
    Read { file: PathBuf, source: io::Error },

    #[error("cannot decode {}: {reason}; replace the file or remove it from its split list", .file.display())]
    Undecodable { file: PathBuf, reason: String },

    #[error(
        "the mask {} is {mask_width}x{mask_height}, but its image is {width}x{height}; replace one \
         of the two or remove them from the split list", .mask.display()
    )]
    SizeMismatch { mask: PathBuf, mask_width: u32, mask_height: u32, width: u32, height: u32 },

    #[error(
        "the mask {} has the value {value} at ({x}, {y}); a trimap's values are 1 (foreground), \
         2 (background) and 3 (boundary)", .file.display()
    )]
    MaskValue { file: PathBuf, value: u8, x: u32, y: u32 },

    #[error("there is no sample {id} in {list}, which has {len}; give all workers the same lists")]
    UnknownSample { id: u64, len: usize, list: String },

    #[error("a loader thread panicked at {at}: {message}; this is a bug, please report it")]
    LoaderPanicked { at: String, message: String },

    #[error("{} is not empty; name one that does not exist yet", .root.display())]
    NotEmpty { root: PathBuf },

    #[error("the data set to draw would have no {split} images; ask for at least one")]
    NothingToDraw { split: &'static str },

    #[error("cannot write {}: {source}", .file.display())]
    Write { file: PathBuf, source: io::Error },
}

impl DatasetError {
    pub(crate) fn undecodable(file: &Path, reason: impl fmt::Display) -> Self {
        Self::Undecodable { file: file.to_owned(), reason: reason.to_string() }
    }

    pub(crate) fn read(file: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Read { file: file.to_owned(), source }
    }

    pub(crate) fn write(file: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Write { file: file.to_owned(), source }
    }
}

/// A defect of one file that training survives.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DataWarning {
    pub file: PathBuf,
    /// What is wrong and what was done about it, as the rest of a sentence on the file.
    pub problem: String,
}

impl fmt::Display for DataWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.file.display(), self.problem)
    }
}

/// Hands each distinct warning to its sink once, however often the file is decoded again.
///
/// Make one per process and share it: loaders come and go with the team's generations.
pub struct Warnings {
    told: Mutex<HashSet<DataWarning>>,
    sink: Box<dyn Fn(DataWarning) + Send + Sync>,
}

impl Warnings {
    pub fn new(sink: impl Fn(DataWarning) + Send + Sync + 'static) -> Self {
        Self { told: Mutex::default(), sink: Box::new(sink) }
    }

    pub fn report(&self, warning: DataWarning) {
        let is_new = self.told.lock().unwrap_or_else(PoisonError::into_inner).insert(warning.clone());
        if is_new {
            (self.sink)(warning);
        }
    }
}
