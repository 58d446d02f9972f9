//! The header before each piece of payload. It is compared with the one due, never acted upon.

use std::fmt;

use crate::{Phase, Tag};

/// Bytes of an encoded header.
pub(crate) const HEADER_BYTES: usize = 40;

/// The call a piece of payload belongs to, and its place in it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    generation: u64,
    step: u64,
    bucket: u32,
    phase: u8,
    operation: u8,
    root: u32,
    chunk: u32,
    bytes: u32,
}

/// What the ranks do together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    AllReduceF32,
    AllReduceF64,
    AllReduceBf16,
    Broadcast { root: u32 },
}

impl Frame {
    /// The header of a call's first chunk; [`chunk`](Self::chunk) gives the others.
    pub(crate) fn new(generation: u64, tag: Tag, operation: Operation) -> Self {
        let (operation, root) = match operation {
            Operation::AllReduceF32 => (0, 0),
            Operation::AllReduceF64 => (1, 0),
            Operation::Broadcast { root } => (2, root),
            Operation::AllReduceBf16 => (3, 0),
        };
        Self {
            generation,
            step: tag.step,
            bucket: tag.bucket,
            phase: tag.phase as u8,
            operation,
            root,
            chunk: 0,
            bytes: 0,
        }
    }

    pub(crate) fn chunk(self, chunk: u32, bytes: usize) -> Self {
        let bytes = u32::try_from(bytes).expect("a chunk is far below 4 GiB");
        Self { chunk, bytes, ..self }
    }

    /// Little-endian; the last six bytes are zero.
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[0..8].copy_from_slice(&self.generation.to_le_bytes());
        out[8..16].copy_from_slice(&self.step.to_le_bytes());
        for (slot, word) in
            out[16..32].chunks_exact_mut(4).zip([self.bucket, self.root, self.chunk, self.bytes])
        {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        out[32] = self.phase;
        out[33] = self.operation;
        out
    }

    /// Accepts any bytes: a header is decoded only to be named in an error.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let word = |at| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let long = |at| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        Self {
            generation: long(0),
            step: long(8),
            bucket: word(16),
            root: word(20),
            chunk: word(24),
            bytes: word(28),
            phase: bytes[32],
            operation: bytes[33],
        }
    }
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.operation {
            0 => write!(f, "all-reduce of f32")?,
            1 => write!(f, "all-reduce of f64")?,
            2 => write!(f, "broadcast from rank {}", self.root)?,
            3 => write!(f, "all-reduce of bf16")?,
            other => write!(f, "unknown operation {other}")?,
        }
        write!(f, " (generation {}, step {}, ", self.generation, self.step)?;
        match Phase::ALL.iter().find(|&&phase| phase as u8 == self.phase) {
            Some(phase) => write!(f, "{phase}")?,
            None => write!(f, "unknown phase {}", self.phase)?,
        }
        write!(f, ", bucket {}, chunk {}, {} bytes)", self.bucket, self.chunk, self.bytes)
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Frame({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_encoding_and_names_its_parts() {
        let tag = Tag::new(u64::MAX - 1, 7, Phase::BatchNorm);
        let frame = Frame::new(3, tag, Operation::Broadcast { root: 2 }).chunk(9, 1 << 18);
        assert_eq!(Frame::decode(&frame.encode()), frame);
        assert_eq!(
            frame.to_string(),
            "broadcast from rank 2 (generation 3, step 18446744073709551614, batch norm, bucket 7, \
             chunk 9, 262144 bytes)"
        );
    }

    #[test]
    fn garbage_decodes_without_a_panic() {
        let frame = Frame::decode(&[0xff; HEADER_BYTES]);
        assert!(frame.to_string().contains("unknown phase 255"));
    }
}
