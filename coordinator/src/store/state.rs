//! Reading a committed checkpoint back: the logical state in order, and the proof that it is whole.

use std::fmt;
use std::io::{self, Read, Take};
use std::vec;

use super::writer::RunningDigest;
use super::{CheckpointStore, IoContext, Manifest, Part, Source, StoreError};

/// Reads the logical state from its first byte to its last, across its parts.
pub struct StateReader {
    store: CheckpointStore,
    manifest: Manifest,
    /// Parts not begun yet, in the state's order.
    parts: vec::IntoIter<Part>,
    current: Option<Take<Box<dyn Read + Send>>>,
}

impl StateReader {
    pub(super) fn new(store: CheckpointStore, manifest: Manifest) -> Self {
        let mut parts = manifest.parts.clone();
        parts.sort_by_key(|part| part.offset);
        Self { store, manifest, parts: parts.into_iter(), current: None }
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }
}

impl fmt::Debug for StateReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StateReader").field("id", &self.manifest.id).field("parts", &self.parts).finish()
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
            let source = self.store.source(&self.manifest.id, &part.file).map_err(io::Error::other)?;
            self.current = Some(source.reader.take(part.bytes));
        }
    }
}

/// Reads every byte the manifest names, by way of `open`, and compares lengths and digests.
pub(super) fn damages<'a>(
    manifest: &'a Manifest,
    open: impl Fn(&str) -> Result<Source, StoreError> + 'a,
) -> impl Iterator<Item = StoreError> + 'a {
    let parts = manifest.parts.iter().map(|part| (&part.file, part.bytes, part.offset / 4, part.digest));
    let files = manifest.files.iter().map(|file| (&file.file, file.bytes, 0, file.digest));
    let bytes = parts.chain(files).filter_map(move |(file, bytes, first_word, digest)| {
        open(file).and_then(|source| verify_file(source, file, bytes, first_word, digest)).err()
    });
    manifest.check_parts().err().into_iter().chain(bytes)
}

fn verify_file(
    source: Source,
    name: &str,
    bytes: u64,
    first_word: u64,
    expected: u64,
) -> Result<(), StoreError> {
    if source.bytes != bytes {
        return Err(StoreError::Length { file: name.to_owned(), expected: bytes, found: source.bytes });
    }
    let mut reader = source.reader;
    let mut digest = RunningDigest::starting_at(first_word);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match reader.read(&mut buffer).context("read", name.as_ref())? {
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
