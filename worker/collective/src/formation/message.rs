//! Handshake messages on a non-blocking socket; what is in them is the handshake's business.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
};

/// A message of `N` bytes that arrives in pieces.
pub(super) struct Inbox<const N: usize> {
    bytes: [u8; N],
    filled: usize,
}

impl<const N: usize> Inbox<N> {
    pub fn new() -> Self {
        Self { bytes: [0; N], filled: 0 }
    }

    /// The message once it is complete; never reads beyond it.
    pub fn fill(&mut self, stream: &mut TcpStream) -> io::Result<Option<[u8; N]>> {
        while self.filled < N {
            match stream.read(&mut self.bytes[self.filled..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => self.filled += bytes,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(Some(self.bytes))
    }
}

/// Sends a handshake message whole: it fits any socket's buffer, so one that would block is wrong.
pub(super) fn say(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    stream.write_all(message)
}
