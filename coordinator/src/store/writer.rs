//! Bytes into one file or object of a pending checkpoint, counted and digested on their way.
//!
//! A writer that is dropped before it finished removes what it wrote. Writers share nothing with their
//! checkpoint but the directory, so each can run on a thread of its own.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::PathBuf;

use musher_proto::digest;
use musher_store::Upload;

use super::{IoContext, Part, StoreError, StoredFile};

/// Writes a slice of the logical state.
#[derive(Debug)]
pub struct PartWriter {
    offset: u64,
    file: FileWriter,
}

impl PartWriter {
    pub(super) fn new(offset: u64, file: FileWriter) -> Self {
        Self { offset, file }
    }

    /// Takes the slice's next bytes, of any length.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.file.write(bytes)
    }

    /// Makes the part durable, if it has the announced length and `digest`.
    pub fn finish(self, digest: u64) -> Result<Part, StoreError> {
        let offset = self.offset;
        let StoredFile { file, bytes, digest } = self.file.finish_with(Some(digest))?;
        Ok(Part { file, offset, bytes, digest })
    }
}

/// Writes a file beside the state.
#[derive(Debug)]
pub struct FileWriter {
    name: String,
    sink: Sink,
    length: u64,
    written: u64,
    digest: RunningDigest,
}

/// Where the bytes go.
#[derive(Debug)]
enum Sink {
    File(Removing),
    Object(Upload),
}

/// A file that is removed unless it was kept.
#[derive(Debug)]
struct Removing {
    path: PathBuf,
    file: File,
    kept: bool,
}

impl FileWriter {
    /// Creates the file, in the place of an earlier attempt's. That one's writer, should it still
    /// run, is left with a file nobody can see.
    pub(super) fn create(
        path: PathBuf,
        name: String,
        first_word: u64,
        length: u64,
    ) -> Result<Self, StoreError> {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error).context("replace", &path),
            _ => {}
        }
        let file = File::create_new(&path).context("create", &path)?;
        Ok(Self::over(file, path, name, first_word, length))
    }

    /// An object is there when it is finished, and not before.
    pub(super) fn upload(upload: Upload, name: String, first_word: u64, length: u64) -> Self {
        Self::into_sink(Sink::Object(upload), name, first_word, length)
    }

    pub(super) fn over(file: File, path: PathBuf, name: String, first_word: u64, length: u64) -> Self {
        Self::into_sink(Sink::File(Removing { path, file, kept: false }), name, first_word, length)
    }

    fn into_sink(sink: Sink, name: String, first_word: u64, length: u64) -> Self {
        let digest = RunningDigest::starting_at(first_word);
        Self { name, sink, length, written: 0, digest }
    }

    /// Takes the file's next bytes, of any length.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        let written = self.written + bytes.len() as u64;
        if written > self.length {
            return Err(self.wrong_length(written));
        }
        match &mut self.sink {
            Sink::File(Removing { path, file, .. }) => file.write_all(bytes).context("write", path)?,
            Sink::Object(upload) => upload.write(bytes)?,
        }
        self.digest.update(bytes);
        self.written = written;
        Ok(())
    }

    /// Makes the file durable, if it has the announced length.
    pub fn finish(self) -> Result<StoredFile, StoreError> {
        self.finish_with(None)
    }

    fn finish_with(self, expected_digest: Option<u64>) -> Result<StoredFile, StoreError> {
        if self.written != self.length {
            return Err(self.wrong_length(self.written));
        }
        let found = self.digest.finish();
        if let Some(expected) = expected_digest.filter(|expected| *expected != found) {
            return Err(StoreError::Digest { file: self.name, expected, found });
        }
        match self.sink {
            Sink::File(mut removing) => {
                removing.file.sync_all().context("flush", &removing.path)?;
                removing.kept = true;
            }
            Sink::Object(upload) => drop(upload.finish()?),
        }
        Ok(StoredFile { file: self.name, bytes: self.written, digest: found })
    }

    fn wrong_length(&self, found: u64) -> StoreError {
        StoreError::Length { file: self.name.clone(), expected: self.length, found }
    }
}

impl Drop for Removing {
    fn drop(&mut self) {
        if !self.kept {
            // The checkpoint's removal or the next open takes what is left over.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The digest of bytes that come in pieces of any length.
#[derive(Debug)]
pub(super) struct RunningDigest {
    next_word: u64,
    sum: u64,
    /// The bytes of a word that is not complete yet.
    partial: [u8; 4],
    partial_len: usize,
}

impl RunningDigest {
    pub(super) fn starting_at(first_word: u64) -> Self {
        Self { next_word: first_word, sum: 0, partial: [0; 4], partial_len: 0 }
    }

    pub(super) fn update(&mut self, mut bytes: &[u8]) {
        while self.partial_len > 0 || bytes.len() < 4 {
            let Some((first, rest)) = bytes.split_first() else { return };
            self.partial[self.partial_len] = *first;
            self.partial_len += 1;
            bytes = rest;
            if self.partial_len == 4 {
                self.partial_len = 0;
                self.add(&self.partial.clone());
            }
        }
        let (words, rest) = bytes.split_at(bytes.len() / 4 * 4);
        self.add(words);
        self.partial[..rest.len()].copy_from_slice(rest);
        self.partial_len = rest.len();
    }

    pub(super) fn finish(&self) -> u64 {
        let rest = digest::of_slice(self.next_word, &self.partial[..self.partial_len]);
        self.sum.wrapping_add(rest)
    }

    fn add(&mut self, words: &[u8]) {
        self.sum = self.sum.wrapping_add(digest::of_slice(self.next_word, words));
        self.next_word = self.next_word.wrapping_add(words.len() as u64 / 4);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_digest_does_not_depend_on_how_the_bytes_come(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..14), 0..20),
            first_word in any::<u64>(),
        ) {
            let mut running = RunningDigest::starting_at(first_word);
            for piece in &pieces {
                running.update(piece);
            }
            prop_assert_eq!(running.finish(), digest::of_slice(first_word, &pieces.concat()));
        }
    }

    #[test]
    fn a_full_disk_is_told_apart_from_other_errors() {
        let Ok(full) = File::options().write(true).open("/dev/full") else {
            println!("skipped: there is no /dev/full");
            return;
        };
        let nowhere = PathBuf::from("/nonexistent/part-0.bin");
        let mut writer = FileWriter::over(full, nowhere, "part-0.bin".into(), 0, 4);
        let error = writer.write(b"abcd").unwrap_err();
        assert!(matches!(error, StoreError::DiskFull { .. }), "{error}");
    }
}
