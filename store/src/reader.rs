//! An object's bytes in order.

use std::{fmt, io};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::{StreamExt, stream::BoxStream};
use object_store::GetResult;

use crate::{error, runtime::wait};

/// Bytes that are taken from the network at a time, if that many come.
const BLOCK: usize = 1 << 20;

/// Reads an object from its first byte to its last.
///
/// A connection that breaks is taken up again where it broke, if the object is still the same.
pub struct Reader {
    bytes: u64,
    left: u64,
    current: Bytes,
    stream: Option<BoxStream<'static, object_store::Result<Bytes>>>,
}

impl Reader {
    pub(crate) fn new(got: GetResult) -> Self {
        let bytes = got.range.end - got.range.start;
        Self { bytes, left: bytes, current: Bytes::new(), stream: Some(got.into_stream()) }
    }

    /// The object's length.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The next bytes; none at the end.
    fn next(&mut self) -> io::Result<Bytes> {
        let Some(mut stream) = self.stream.take() else { return Ok(Bytes::new()) };
        let (stream, block) = wait(async move {
            let mut block = BytesMut::new();
            while block.len() < BLOCK {
                match stream.next().await {
                    Some(Ok(chunk)) => block.extend_from_slice(&chunk),
                    Some(Err(error)) => return (None, Err(error)),
                    None => return (None, Ok(block.freeze())),
                }
            }
            (Some(stream), Ok(block.freeze()))
        });
        self.stream = stream;
        let block = block.map_err(|error| io::Error::other(error::cause(&error)))?;
        self.left = self.left.saturating_sub(block.len() as u64);
        match block.is_empty() && self.left > 0 {
            true => Err(io::ErrorKind::UnexpectedEof.into()),
            false => Ok(block),
        }
    }
}

impl io::Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.current.is_empty() {
            self.current = self.next()?;
        }
        let read = buffer.len().min(self.current.len());
        self.current.copy_to_slice(&mut buffer[..read]);
        Ok(read)
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("bytes", &self.bytes).field("left", &self.left).finish()
    }
}
