//! Bytes of a file at a place, after a look at whether they are there.

use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;

use crate::Error;

/// A file and its length.
#[derive(Debug)]
pub(crate) struct Input<R> {
    pub reader: R,
    pub len: u64,
}

impl<R: Read + Seek> Input<R> {
    pub fn new(mut reader: R) -> Result<Self, Error> {
        let len = reader.seek(SeekFrom::End(0))?;
        Ok(Self { reader, len })
    }

    /// The bytes in `range`; an error if the file ends before. `what` says what they were to be.
    pub fn read(&mut self, range: Range<u64>, what: &str) -> Result<Vec<u8>, Error> {
        let wanted = self.checked(range, what)?;
        self.reader.seek(SeekFrom::Start(wanted.start))?;
        let mut bytes = vec![0; (wanted.end - wanted.start) as usize];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// `length` bytes from `start`.
    pub fn read_at(&mut self, start: u64, length: u64, what: &str) -> Result<Vec<u8>, Error> {
        self.read(start..start.saturating_add(length), what)
    }

    pub fn checked(&self, range: Range<u64>, what: &str) -> Result<Range<u64>, Error> {
        let Range { start, end } = range;
        match start <= end && end <= self.len {
            true => Ok(range),
            false => Err(Error::damaged(format!(
                "{what} should be at bytes {start} to {end}, but the file has {}",
                self.len
            ))),
        }
    }
}
