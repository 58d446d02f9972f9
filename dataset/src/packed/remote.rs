//! A packed data set in an object store: read by ranges, with retries, and written.

use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::ops::Range;
use std::path::Path;

use musher_store::{Patience, StoreError, Upload, environment, is_url};

use super::index::INDEX_FILE;
use super::target::{Output, Target};
use super::{DatasetError, Store};

/// The place in an object store that a root names, with credentials from the environment; `None` if the root is no
/// such URL.
pub(super) fn open(root: &Path) -> Option<Result<Remote, DatasetError>> {
    Some(open_with(root, Patience::Long)?.map(Remote).map_err(told))
}

/// As [`super::reach`]. It asks for no other right than reading does.
pub(super) fn reach(root: &Path) -> Option<Result<(), DatasetError>> {
    let read = open_with(root, Patience::Short)?.and_then(|store| store.get_range(INDEX_FILE, 0..1));
    Some(match read {
        Ok(_) | Err(StoreError::Absent { .. }) => Ok(()),
        Err(error) => Err(told(error)),
    })
}

/// For what is to be written: looks first, and soon, whether the bucket is there.
pub(super) fn open_to_write(root: &Path) -> Option<Result<Remote, DatasetError>> {
    let looked = open_with(root, Patience::Short)?.and_then(|store| store.check()).map_err(told);
    looked.map_or_else(|error| Some(Err(error)), |()| open(root))
}

fn open_with(root: &Path, patience: Patience) -> Option<Result<musher_store::Store, StoreError>> {
    let url = root.to_str().filter(|root| is_url(root))?;
    Some(musher_store::Store::open(url, &environment(), patience))
}

pub(super) struct Remote(musher_store::Store);

impl Remote {
    /// Whether the bucket is there, and may be looked into.
    pub fn check(&self) -> Result<(), DatasetError> {
        self.0.check().map_err(told)
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Remote").field(&self.0.url()).finish()
    }
}

impl Store for Remote {
    fn size(&self, name: &str) -> io::Result<u64> {
        self.0.head(name).map_err(io_error)?.map(|entry| entry.bytes).ok_or_else(absent)
    }

    fn read_all(&self, name: &str) -> io::Result<Vec<u8>> {
        self.0.get(name).map_err(io_error)?.map(|(bytes, _)| bytes.into()).ok_or_else(absent)
    }

    fn read(&self, name: &str, range: Range<u64>) -> io::Result<Vec<u8>> {
        let wanted = range.end - range.start;
        let bytes = self.0.get_range(name, range).map_err(io_error)?;
        match bytes.len() as u64 == wanted {
            true => Ok(bytes.into()),
            false => Err(ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl Target for Remote {
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.0.list("").map_err(io_error)?.is_empty())
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn Output>> {
        Ok(Box::new(Sent(self.0.upload(name).map_err(io_error)?)))
    }
}

/// An object on its way.
struct Sent(Upload);

impl Write for Sent {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).map_err(io_error)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(()) // what is gathered for a part is sent at the end
    }
}

impl Output for Sent {
    fn finish(self: Box<Self>) -> io::Result<()> {
        self.0.finish().map(drop).map_err(io_error)
    }
}

fn told(error: StoreError) -> DatasetError {
    DatasetError::Store { reason: error.to_string() }
}

/// Of kind `Other` where the store's sentence says it all.
fn io_error(error: StoreError) -> io::Error {
    match error {
        StoreError::Absent { .. } => absent(),
        told => io::Error::other(told),
    }
}

fn absent() -> io::Error {
    ErrorKind::NotFound.into()
}
