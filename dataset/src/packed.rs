//! A data set packed into tar shards, in WebDataset's layout: read by ranges, each sample alone and in any order, by
//! an index that lies beside the shards. What makes one is [`pack`].
//!
//! ```text
//! index.json                        what is where
//! annotations/{trainval,test}.txt   the split lists, as they were
//! {trainval,test}-000000.tar, ...   NAME.jpg and NAME.png, its trimap, one after the other
//! ```

mod disk_cache;
mod index;
mod pack;
#[cfg(feature = "stores")]
mod remote;
mod store;
mod target;

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::sample::PairBytes;
use crate::{DataWarning, DatasetError};
use disk_cache::DiskCache;
use index::{Entry, INDEX_FILE, Index, Member};

pub use disk_cache::DiskCacheOptions;
pub(crate) use index::EntryIndex;
pub use pack::{PackOptions, Packing, pack};
pub use store::{Directory, Store};

/// A packed data set whose index is read and whose shards are all there, at their lengths.
pub(crate) struct Packed {
    /// For messages and names.
    root: PathBuf,
    store: Arc<dyn Store>,
    index: Index,
    by_name: HashMap<String, EntryIndex>,
    cache: Option<DiskCache>,
}

/// Whether the object store that `root` names answers at all: soon, for somebody who waits, where reading is patient.
/// A directory always does.
pub fn reach(root: &Path) -> Result<(), DatasetError> {
    #[cfg(feature = "stores")]
    if let Some(reached) = remote::reach(root) {
        return reached;
    }
    let _ = root;
    Ok(())
}

impl Packed {
    /// `None` if the root is a directory that is not packed.
    pub fn find(root: &Path, cache: Option<&DiskCacheOptions>) -> Result<Option<Self>, DatasetError> {
        #[cfg(feature = "stores")]
        if let Some(store) = remote::open(root) {
            let store = Arc::new(store?);
            return match Self::open(root, store.clone(), cache) {
                Err(DatasetError::NoIndex { .. }) => {
                    store.check()?; // it may be the bucket that is missing
                    Err(DatasetError::NotPackedThere { root: root.into() })
                }
                opened => opened.map(Some),
            };
        }
        let directory = Directory(root.to_owned());
        if root.join(INDEX_FILE).is_file() {
            return Self::open(root, Arc::new(directory), cache).map(Some);
        }
        let has_shards = root.read_dir().is_ok_and(|entries| {
            entries.flatten().any(|entry| entry.path().extension().is_some_and(|it| it == "tar"))
        });
        match has_shards && !crate::layout::images_folder(root).is_dir() {
            true => Err(DatasetError::NoIndex { index: root.join(INDEX_FILE) }),
            false => Ok(None),
        }
    }

    pub fn open(
        root: &Path,
        store: Arc<dyn Store>,
        cache: Option<&DiskCacheOptions>,
    ) -> Result<Self, DatasetError> {
        let file = root.join(INDEX_FILE);
        let json = store.read_all(INDEX_FILE).map_err(|source| match source.kind() {
            ErrorKind::NotFound => DatasetError::NoIndex { index: file.clone() },
            _ => unreadable(file.clone())(source),
        })?;
        let index =
            Index::parse(&json).map_err(|reason| DatasetError::BadIndex { index: file.clone(), reason })?;
        // All at once, as each is a round trip where the store is far.
        let check = |shard: &index::Shard| {
            let found = store.size(&shard.file).map_err(unreadable(root.join(&shard.file)))?;
            match found == shard.bytes {
                true => Ok(()),
                false => Err(DatasetError::ShardSize {
                    shard: root.join(&shard.file),
                    found,
                    expected: shard.bytes,
                }),
            }
        };
        index.shards.par_iter().map(check).collect::<Vec<_>>().into_iter().collect::<Result<(), _>>()?;
        let id = &hex::encode(Sha256::digest(&json))[..ID_DIGITS];
        let cache = cache.filter(|cache| cache.budget_bytes > 0).map(|cache| DiskCache::new(cache, id));
        Ok(Self { root: root.to_owned(), store, by_name: index.by_name(), index, cache })
    }

    /// The text of one of its files, such as a split list.
    pub fn read_text(&self, name: &str) -> Result<String, DatasetError> {
        let list = self.root.join(name);
        let text = self.store.read_all(name).map_err(|source| match source.kind() {
            ErrorKind::NotFound => DatasetError::NoList { list },
            _ => unreadable(list)(source),
        })?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn shards(&self) -> usize {
        self.index.shards.len()
    }

    pub fn find_sample(&self, name: &str) -> Option<EntryIndex> {
        self.by_name.get(name).copied()
    }

    pub fn entry(&self, at: EntryIndex) -> &Entry {
        &self.index.shards[at.shard].samples[at.sample]
    }

    /// How messages name a file in a shard.
    pub fn shown(&self, at: EntryIndex, member: &Member) -> PathBuf {
        self.root.join(&self.index.shards[at.shard].file).join(&member.file)
    }

    /// A sample's files, from the disk cache or the shard.
    pub fn read(&self, at: EntryIndex, warn: &mut dyn FnMut(DataWarning)) -> Result<PairBytes, DatasetError> {
        let (entry, shard) = (self.entry(at), &self.index.shards[at.shard].file);
        let name = format!("{shard}@{}", entry.image.at);
        if let Some(cache) = &self.cache
            && let Some(span) = cache.get(&name)
        {
            if is_intact(&span, entry) {
                return Ok(parted(span, entry));
            }
            cache.remove(&name);
        }
        let file = self.root.join(shard);
        let span = self.store.read(shard, entry.span()).map_err(unreadable(file.clone()))?;
        if !is_intact(&span, entry) {
            return Err(DatasetError::ShardContent { shard: file, name: entry.name.clone() });
        }
        if let Some(cache) = &self.cache {
            cache.put(&name, &span, warn);
        }
        Ok(parted(span, entry))
    }

    /// Walks a shard's tar from end to end and compares it with the index.
    ///
    /// # Errors
    /// The first thing that differs.
    pub fn check_shard(&self, shard: usize) -> Result<(), DatasetError> {
        let shard = &self.index.shards[shard];
        let file = self.root.join(&shard.file);
        let differs = |reason: String| DatasetError::ShardStructure { shard: file.clone(), reason };
        let reader = ShardReader { store: &*self.store, file: &shard.file, at: 0, bytes: shard.bytes };
        let mut archive = tar::Archive::new(io::BufReader::with_capacity(READ_BYTES, reader));
        let mut members = shard.samples.iter().flat_map(|entry| [&entry.image, &entry.mask]);
        for found in archive.entries().map_err(|error| differs(error.to_string()))? {
            let found = found.map_err(|error| differs(error.to_string()))?;
            let name = String::from_utf8_lossy(&found.path_bytes()).into_owned();
            let expected =
                members.next().ok_or_else(|| differs(format!("it has {name}, the index has not")))?;
            let is_same = name == expected.file
                && found.raw_file_position() == expected.at
                && found.size() == expected.bytes;
            if !is_same {
                let (at, bytes) = (found.raw_file_position(), found.size());
                return Err(differs(format!(
                    "it has {name} of {bytes} bytes at {at}, the index {} of {} at {}",
                    expected.file, expected.bytes, expected.at
                )));
            }
        }
        match members.next() {
            Some(absent) => Err(differs(format!("it ends before {}", absent.file))),
            None => Ok(()),
        }
    }
}

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packed").field("root", &self.root).finish_non_exhaustive()
    }
}

/// Hexadecimal digits of an index's SHA-256 that name its copies' directory.
const ID_DIGITS: usize = 16;

/// At a time, when a whole shard is read.
const READ_BYTES: usize = 4 << 20;

/// Whether a sample's span is what was packed.
fn is_intact(span: &[u8], entry: &Entry) -> bool {
    let range = entry.span();
    span.len() as u64 == range.end - range.start && {
        let (image, mask) = (&span[..entry.image.bytes as usize], &span[mask_in_span(entry)..]);
        crc_of(image, mask) == entry.crc32c
    }
}

/// The two files of an intact span.
fn parted(mut span: Vec<u8>, entry: &Entry) -> PairBytes {
    let mask = span[mask_in_span(entry)..].to_vec();
    span.truncate(entry.image.bytes as usize);
    PairBytes { image: span, mask }
}

fn mask_in_span(entry: &Entry) -> usize {
    (entry.mask.at - entry.image.at) as usize
}

fn crc_of(image: &[u8], mask: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(image), mask)
}

fn unreadable(shard: PathBuf) -> impl FnOnce(io::Error) -> DatasetError {
    move |source| match source.kind() {
        ErrorKind::NotFound => DatasetError::NoShard { shard },
        ErrorKind::UnexpectedEof => DatasetError::ShardCut { shard },
        // The store's own sentence, which names the file.
        ErrorKind::Other => DatasetError::Store { reason: source.to_string() },
        _ => DatasetError::Read { file: shard, source },
    }
}

/// A shard from its beginning to its end.
struct ShardReader<'a> {
    store: &'a dyn Store,
    file: &'a str,
    at: u64,
    bytes: u64,
}

impl Read for ShardReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let end = self.bytes.min(self.at + buffer.len() as u64);
        if end == self.at {
            return Ok(0);
        }
        let read = self.store.read(self.file, self.at..end)?;
        buffer[..read.len()].copy_from_slice(&read);
        self.at = end;
        Ok(read.len())
    }
}
