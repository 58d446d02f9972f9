//! A packed data set in an object store: read by ranges, with retries, and written.

use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::ops::Range;
use std::path::Path;

use musher_store::{Patience, StoreError, Upload, environment, is_url};

use super::target::{Output, Target};
use super::{DatasetError, Store};

/// The place in an object store that a root names, with credentials from the environment; `None` if the root is no
/// such URL.
pub(super) fn open(root: &Path) -> Option<Result<Remote, DatasetError>> {
    let url = root.to_str().filter(|root| is_url(root))?;
    let opened = musher_store::Store::open(url, &environment(), Patience::Long);
    Some(opened.map(Remote).map_err(told))
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
