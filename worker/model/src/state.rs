//! The logical state as one string of bytes: parameters, both Adam moments, batch-norm statistics, counters.
//!
//! Owns offsets, reading, staging; not where the bytes travel. Numbers are little-endian.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::Error;
use crate::layout::Layout;

#[cfg(target_endian = "big")]
compile_error!("the state's bytes are the memory's, so the machine must be little-endian");

/// The caller's counters, which travel with the state: cursor, applied steps and the like.
pub const COUNTERS: usize = 8;

/// Bytes of Adam's step count and the caller's counters.
const COUNTER_BYTES: u64 = (1 + COUNTERS as u64) * 8;

/// Elements copied from another device at a time.
const CHUNK: usize = 1 << 22;

/// Where each part lies in the state, in bytes. All but the counters are f32 in flat order, padding included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateLayout {
    pub parameters: Range<u64>,
    pub exp_avg: Range<u64>,
    pub exp_avg_sq: Range<u64>,
    /// Batch norm's running means, then variances.
    pub batch_norm: Range<u64>,
    /// Adam's step count, then the caller's counters, u64 each.
    pub counters: Range<u64>,
}

impl StateLayout {
    pub(crate) fn new(layout: &Layout) -> Self {
        let mut end = 0;
        let mut next = |bytes: u64| {
            end += bytes;
            end - bytes..end
        };
        let f32s = |len: usize| (len * size_of::<f32>()) as u64;
        Self {
            parameters: next(f32s(layout.parameter_len)),
            exp_avg: next(f32s(layout.trainable_len)),
            exp_avg_sq: next(f32s(layout.trainable_len)),
            batch_norm: next(f32s(2 * layout.channel_len)),
            counters: next(COUNTER_BYTES),
        }
    }

    pub fn total_bytes(&self) -> u64 {
        self.counters.end
    }
}

/// Adam's step count, then the caller's counters.
pub type CounterWords = [u64; 1 + COUNTERS];

/// A whole state where it computes: one that a replica holds, or one that it receives from a peer's.
#[derive(Debug)]
pub struct StateTensors {
    /// Flat f32, in the state's order: parameters, first and second moments, batch norm's statistics.
    pub tensors: [Tensor; 4],
    pub counters: CounterWords,
}

pub(crate) fn counter_words(adam_steps: u64, counters: &[u64; COUNTERS]) -> CounterWords {
    std::array::from_fn(|i| if i == 0 { adam_steps } else { counters[i - 1] })
}

/// Adam's step count, and the caller's counters.
pub(crate) fn from_words(words: &CounterWords) -> (u64, [u64; COUNTERS]) {
    (words[0], std::array::from_fn(|i| words[1 + i]))
}

pub(crate) fn words_to_bytes(words: &CounterWords) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A state that is being received. Nothing of the replica changes before it is complete and adopted.
#[derive(Debug)]
pub struct StateStaging {
    /// Words, so that the f32 parts are aligned.
    words: Vec<u32>,
    received: usize,
}

impl StateStaging {
    pub(crate) fn new(layout: &StateLayout) -> Self {
        // All parts are multiples of four bytes. Zeroed memory costs nothing until it is written.
        Self { words: vec![0; (layout.total_bytes() / 4) as usize], received: 0 }
    }

    /// Takes the next bytes.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.room(bytes.len())?.copy_from_slice(bytes);
        Ok(())
    }

    /// Where the next `length` bytes go. They count as received.
    pub fn room(&mut self, length: usize) -> Result<&mut [u8], Error> {
        let (start, end) = (self.received, self.received.saturating_add(length));
        let expected = self.expected();
        if end as u64 > expected {
            return Err(Error::StateLength { expected, found: end as u64 });
        }
        self.received = end;
        Ok(&mut bytemuck::cast_slice_mut::<u32, u8>(&mut self.words)[start..end])
    }

    /// Bytes received so far.
    pub fn received(&self) -> u64 {
        self.received as u64
    }

    pub fn is_complete(&self) -> bool {
        self.received() == self.expected()
    }

    /// The digest of what a complete state holds; see [`musher_proto::digest`].
    pub fn digest(&self) -> u64 {
        musher_proto::digest::of_slice(0, bytemuck::cast_slice(&self.words))
    }

    fn expected(&self) -> u64 {
        (self.words.len() * 4) as u64
    }

    /// All bytes, if they are there.
    pub(crate) fn complete(&self) -> Result<&[u8], Error> {
        if !self.is_complete() {
            return Err(Error::StateLength { expected: self.expected(), found: self.received() });
        }
        Ok(bytemuck::cast_slice(&self.words))
    }
}

/// Hands the bytes `range` of a flat f32 tensor to `visit`, in order, in one or several pieces, each with its offset.
pub(crate) fn visit(
    flat: &Tensor,
    range: Range<u64>,
    mut visit: impl FnMut(u64, &[u8]),
) -> Result<(), Error> {
    if flat.device() == Device::Cpu {
        return Ok(torch_ext::with_f32(flat, |values| {
            let bytes: &[u8] = bytemuck::cast_slice(values);
            visit(range.start, &bytes[range.start as usize..range.end as usize]);
        })?);
    }
    let (first, last) = (range.start / 4, range.end.div_ceil(4));
    for start in (first..last).step_by(CHUNK) {
        let len = (CHUNK as u64).min(last - start);
        let host = flat.f_narrow(0, start as i64, len as i64)?.f_to_device(Device::Cpu)?;
        torch_ext::with_f32(&host, |values| {
            let wanted = range.start.max(start * 4)..range.end.min((start + len) * 4);
            let bytes: &[u8] = bytemuck::cast_slice(values);
            visit(
                wanted.start,
                &bytes[(wanted.start - start * 4) as usize..(wanted.end - start * 4) as usize],
            );
        })?;
    }
    Ok(())
}

/// Overwrites a flat f32 tensor with as many bytes.
pub(crate) fn write(flat: &mut Tensor, bytes: &[u8]) -> Result<(), Error> {
    if flat.device() == Device::Cpu {
        return Ok(torch_ext::with_f32_mut(flat, |flat| {
            bytemuck::cast_slice_mut(flat).copy_from_slice(bytes)
        })?);
    }
    for (mut chunk, bytes) in flat.f_split(CHUNK as i64, 0)?.into_iter().zip(bytes.chunks(CHUNK * 4)) {
        let host = Tensor::f_from_data_size(bytes, &[(bytes.len() / 4) as i64], Kind::Float)?;
        chunk.f_copy_(&host)?;
    }
    Ok(())
}
