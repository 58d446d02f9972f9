//! Reading a committed checkpoint back: the logical state in order, and the proof that it is whole.

use std::fs::{self, File};
use std::io::{self, Read, Take};
use std::path::{Path, PathBuf};
use std::vec;

use super::writer::RunningDigest;
use super::{IoContext, Manifest, Part, StoreError};

/// Reads the logical state from its first byte to its last, across its parts.
#[derive(Debug)]
pub struct StateReader {
    dir: PathBuf,
    manifest: Manifest,
    /// Parts not begun yet, in the state's order.
    parts: vec::IntoIter<Part>,
    current: Option<Take<File>>,
}

impl StateReader {
    pub(super) fn new(dir: PathBuf, manifest: Manifest) -> Self {
        let mut parts = manifest.parts.clone();
        parts.sort_by_key(|part| part.offset);
        Self { dir, manifest, parts: parts.into_iter(), current: None }
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }
}

impl Read for StateReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(part) = self.current.as_mut().filter(|part| part.limit() > 0) {
                let read = part.read(buffer)?;
                if read == 0 && !buffer.is_empty() {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "a part of the state is short"));
                }
                return Ok(read);
            }
            let Some(part) = self.parts.next() else { return Ok(0) };
            self.current = Some(File::open(self.dir.join(&part.file))?.take(part.bytes));
        }
    }
}

/// Reads every byte the manifest names and compares lengths and digests.
pub(super) fn verify(dir: &Path, manifest: &Manifest) -> Result<(), StoreError> {
    manifest.check_parts()?;
    for part in &manifest.parts {
        verify_file(dir, &part.file, part.bytes, part.offset / 4, part.digest)?;
    }
    for file in &manifest.files {
        verify_file(dir, &file.file, file.bytes, 0, file.digest)?;
    }
    Ok(())
}

fn verify_file(dir: &Path, name: &str, bytes: u64, first_word: u64, expected: u64) -> Result<(), StoreError> {
    let path = dir.join(name);
    let length = fs::metadata(&path).context("find", &path)?.len();
    if length != bytes {
        return Err(StoreError::Length { file: name.to_owned(), expected: bytes, found: length });
    }
    let mut file = File::open(&path).context("open", &path)?;
    let mut digest = RunningDigest::starting_at(first_word);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).context("read", &path)? {
            0 => break,
            read => digest.update(&buffer[..read]),
        }
    }
    let found = digest.finish();
    if found != expected {
        return Err(StoreError::Digest { file: name.to_owned(), expected, found });
    }
    Ok(())
}
