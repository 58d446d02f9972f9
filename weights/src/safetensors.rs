//! Safetensors: a JSON header, then the arrays. The header is the safetensors crate's to parse and check; here the
//! arrays stay in the file.

use std::io::{Read, Seek};

use safetensors::tensor::{Dtype as TheirDtype, Metadata};

use crate::file::Index;
use crate::input::Input;
use crate::{Dtype, Error, Stored};

/// Longest header that is read; ResNet50's has 30 kB.
const MOST_HEADER_BYTES: u64 = 16 << 20;

pub(crate) fn index<R: Read + Seek>(input: &mut Input<R>) -> Result<Index, Error> {
    let length = input.read_at(0, 8, "the header's length")?;
    let length = length.iter().rev().fold(0u64, |length, &byte| length << 8 | u64::from(byte));
    if length > MOST_HEADER_BYTES {
        return Err(Error::damaged(format!("its header claims {length} bytes")));
    }
    let header = input.read_at(8, length, "the header")?;
    let header: Metadata = serde_json::from_slice(&header)
        .map_err(|error| Error::damaged(format!("its header does not parse: {error}")))?;
    let begin = 8 + length;
    let end = begin.saturating_add(header.data_len() as u64);
    if end != input.len {
        let found = input.len;
        return Err(Error::damaged(format!("by its header it has {end} bytes, but there are {found}")));
    }
    let mut index = Index::default();
    for (name, info) in header.tensors() {
        let (from, to) = info.data_offsets;
        let storage = begin + from as u64..begin + to as u64;
        let stored = Stored::row_major(dtype(info.dtype), info.shape.clone(), storage)?;
        index.tensors.insert(name, stored);
    }
    index.metadata.extend(header.metadata().clone().unwrap_or_default());
    Ok(index)
}

fn dtype(theirs: TheirDtype) -> Dtype {
    match theirs {
        TheirDtype::F16 => Dtype::F16,
        TheirDtype::BF16 => Dtype::Bf16,
        TheirDtype::F32 => Dtype::F32,
        TheirDtype::F64 => Dtype::F64,
        other => Dtype::Other((other.bitsize() / 8) as u8),
    }
}
