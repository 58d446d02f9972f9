//! Where a packed data set is written to: files by name, each there when it is whole.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;

/// A name may have folders, parted by `/`.
pub(super) trait Target {
    /// Nothing is there yet.
    fn is_empty(&self) -> io::Result<bool>;

    /// Begins a file.
    fn create(&self, name: &str) -> io::Result<Box<dyn Output>>;
}

/// A file that is being written. One that is dropped before it is finished is of no use, if it is there at all.
pub(super) trait Output: Write {
    /// It is written, and will last.
    fn finish(self: Box<Self>) -> io::Result<()>;
}

/// A directory, which need not be there.
pub(super) struct NewDirectory(pub PathBuf);

impl Target for NewDirectory {
    fn is_empty(&self) -> io::Result<bool> {
        Ok(!self.0.read_dir().is_ok_and(|mut entries| entries.next().is_some()))
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn Output>> {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().unwrap_or(&self.0))?;
        Ok(Box::new(File::create_new(path)?))
    }
}

impl Output for File {
    fn finish(self: Box<Self>) -> io::Result<()> {
        self.sync_all()
    }
}
