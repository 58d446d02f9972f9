//! Where the files of a packed data set are. It knows names and ranges, not what is in them.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Files by name, read whole or in part; a name may have folders, parted by `/`.
pub trait Store: fmt::Debug + Send + Sync {
    /// Length in bytes.
    ///
    /// # Errors
    /// Of kind `NotFound` if there is no such file.
    fn size(&self, name: &str) -> io::Result<u64>;

    /// # Errors
    /// Of kind `NotFound` if there is no such file.
    fn read_all(&self, name: &str) -> io::Result<Vec<u8>>;

    /// Exactly these bytes.
    ///
    /// # Errors
    /// Of kind `NotFound` if there is no such file, `UnexpectedEof` if it ends before.
    fn read(&self, name: &str, range: Range<u64>) -> io::Result<Vec<u8>>;
}

/// A directory of this machine.
#[derive(Clone, Debug)]
pub struct Directory(pub PathBuf);

impl Store for Directory {
    fn size(&self, name: &str) -> io::Result<u64> {
        Ok(fs::metadata(self.0.join(name))?.len())
    }

    fn read_all(&self, name: &str) -> io::Result<Vec<u8>> {
        fs::read(self.0.join(name))
    }

    fn read(&self, name: &str, range: Range<u64>) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        File::open(self.0.join(name))?.read_exact_at(&mut bytes, range.start)?;
        Ok(bytes)
    }
}
