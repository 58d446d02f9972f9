//! Files and directories that survive a crash whole, or not at all.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::StoreError;
use super::error::IoContext;

/// Replaces `to` by a file of `bytes`: readers see the old file or the new one, never a torn one.
pub fn write_atomically(to: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    replace(to, |file| file.write_all(bytes))
}

/// Replaces `to` by what `fill` writes: readers see the old file or the new one.
pub(super) fn replace(to: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), StoreError> {
    let aside = aside(to);
    let written = write_durably(&aside, fill)
        .context("write", to)
        .and_then(|()| fs::rename(&aside, to).context("replace", to));
    if written.is_err() {
        // The error that matters is the one that brought us here.
        let _ = fs::remove_file(&aside);
    }
    written?;
    sync_dir(parent(to))
}

fn write_durably(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let mut file = File::create(path)?;
    fill(&mut file)?;
    file.sync_all()
}

/// Makes renames and new names in `dir` durable.
pub(super) fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir).and_then(|dir| dir.sync_all()).context("flush", dir)
}

/// Removes a directory, by way of the name `aside` so that nobody sees half of it.
pub(super) fn remove_whole(dir: &Path, aside: &Path) -> Result<(), StoreError> {
    remove_dir(aside)?;
    fs::rename(dir, aside).context("remove", dir)?;
    remove_dir(aside)
}

/// Removes a directory and what is in it, if it is there.
pub(super) fn remove_dir(dir: &Path) -> Result<(), StoreError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).context("remove", dir),
        _ => Ok(()),
    }
}

fn aside(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".tmp");
    path.with_file_name(name)
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_replaces_the_old_file_and_leaves_nothing_aside() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("best"));
        fs::write(&from, "new").unwrap();
        fs::write(&to, "old").unwrap();
        let mut from = File::open(&from).unwrap();
        replace(&to, |to| io::copy(&mut from, to).map(drop)).unwrap();
        assert_eq!(fs::read_to_string(&to).unwrap(), "new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_copy_that_fails_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("best");
        fs::write(&to, "old").unwrap();
        // Opening a directory works, reading it does not: the copy fails half-way.
        let mut from = File::open(dir.path()).unwrap();
        let copied = replace(&to, |to| io::copy(&mut from, to).map(drop));
        assert!(matches!(copied, Err(StoreError::Io { .. })));
        assert_eq!(fs::read_to_string(&to).unwrap(), "old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
