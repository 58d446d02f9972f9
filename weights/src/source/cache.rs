//! The user's cache of fetched files: `$XDG_CACHE_HOME/musher/weights`, or `~/.cache/musher/weights`.

use std::env;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

use sha2::Digest;

use super::{CHUNK, Sha256, SourceError};

/// A directory for fetched files.
#[derive(Debug, Clone)]
pub struct Cache {
    directory: Option<PathBuf>,
}

impl Cache {
    pub fn of_user() -> Self {
        Self { directory: user_cache().map(|musher| musher.join("weights")) }
    }

    pub fn at(directory: &Path) -> Self {
        Self { directory: Some(directory.to_owned()) }
    }

    /// Where the file of this URL and digest is, or is to be: files of one name and other content do not meet.
    pub(super) fn place(&self, url: &str, sha256: &Sha256) -> Result<PathBuf, SourceError> {
        let directory = self.directory.as_ref().ok_or(SourceError::NoCache)?;
        let name = url.split('?').next().and_then(|url| url.rsplit('/').next()).unwrap_or_default();
        let is_plain = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let name: String = name.chars().filter(is_plain).collect();
        Ok(directory.join(&sha256.0).join(if name.is_empty() { "weights".into() } else { name }))
    }
}

/// Where Musher keeps what can be had again: `$XDG_CACHE_HOME/musher`, or `~/.cache/musher`; `None` without a home.
pub fn user_cache() -> Option<PathBuf> {
    // The XDG specification wants relative paths ignored.
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(base.join("musher"))
}

/// The digest of the file at `place`; `None` if there is no file of the expected one.
pub(super) fn verified(place: &Path, expected: &Sha256) -> Result<Option<String>, SourceError> {
    match sha256_of(place) {
        Ok(found) => Ok(Some(found).filter(|found| expected.fits(found))),
        Err(SourceError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// In hex.
pub(super) fn sha256_of(file: &Path) -> Result<String, SourceError> {
    let digest = File::open(file).and_then(digest_of);
    digest.map_err(|source| SourceError::Io { file: file.to_owned(), source })
}

fn digest_of(mut file: File) -> io::Result<String> {
    let mut digest = sha2::Sha256::new();
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hex::encode(digest.finalize())),
            read => digest.update(&chunk[..read]),
        }
    }
}
