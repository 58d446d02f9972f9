//! The state's digest (see [`musher_proto::digest`]) of a flat tensor, formed where the tensor is. On a GPU that is a few
//! passes of whole-number arithmetic, whose overflow wraps; only the sum leaves the device.

use std::ops::Range;

use tch::{Device, Kind, TchError, Tensor};

use crate::Error;

/// Words at a time, for the copies of twice their size to stay small.
const CHUNK: i64 = 1 << 22;

/// Of the words `words` of a contiguous f32 tensor, which is the part of the state that begins at word `first`.
pub fn of(flat: &Tensor, words: Range<u64>, first: u64) -> Result<u64, Error> {
    if flat.device() != Device::Cpu {
        return Ok(on_device(flat, words, first)?);
    }
    let slice = |values: &[f32]| {
        let bytes = bytemuck::cast_slice(&values[words.start as usize..words.end as usize]);
        musher_proto::digest::of_slice(first + words.start, bytes)
    };
    Ok(torch_ext::with_f32(flat, slice)?)
}

fn on_device(flat: &Tensor, words: Range<u64>, first: u64) -> Result<u64, TchError> {
    let mut total = Tensor::f_zeros([], (Kind::Int64, flat.device()))?;
    for start in (words.start as i64..words.end as i64).step_by(CHUNK as usize) {
        let len = CHUNK.min(words.end as i64 - start);
        let part = flat.f_narrow(0, start, len)?;
        let _ = total.f_add_(&mixed(&part, first as i64 + start)?.f_sum(Kind::Int64)?)?;
    }
    Ok(total.f_int64_value(&[])? as u64)
}

/// Each word mixed with its index, as [`musher_proto::digest`] does.
fn mixed(words: &Tensor, first: i64) -> Result<Tensor, TchError> {
    let options = (Kind::Int64, words.device());
    let mut index = Tensor::f_arange_start(first, first + words.size()[0], options)?;
    let _ = index.f_mul_scalar_(0x9E37_79B9_7F4A_7C15_u64 as i64)?;
    let mut x = words.f_view_dtype(Kind::Int)?.f_to_kind(Kind::Int64)?;
    let _ = x.f_bitwise_and_(0xFFFF_FFFF_i64)?.f_bitwise_xor_tensor_(&index)?;
    let _ = x.f_mul_scalar_(0xBF58_476D_1CE4_E5B9_u64 as i64)?;
    // The shift of a signed number brings its sign with it.
    let shifted = x.f_bitwise_right_shift_tensor_scalar(31)?.f_bitwise_and((1_i64 << 33) - 1)?;
    x.f_bitwise_xor_tensor_(&shifted)?.f_mul_scalar_(0x94D0_49BB_1331_11EB_u64 as i64)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_the_digest_of_the_bytes(
            words in prop::collection::vec(any::<u32>(), 1..300),
            first in 0u64..1 << 40,
            cut in any::<prop::sample::Index>(),
        ) {
            let floats: Vec<f32> = words.iter().map(|&word| f32::from_bits(word)).collect();
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let (flat, cut) = (Tensor::from_slice(&floats), cut.index(words.len()) as u64);
            let expected = musher_proto::digest::of_slice(first + cut, &bytes[cut as usize * 4..]);
            prop_assert_eq!(on_device(&flat, cut..words.len() as u64, first).unwrap(), expected);
            prop_assert_eq!(of(&flat, cut..words.len() as u64, first).unwrap(), expected);
        }
    }

    #[test]
    fn chunks_add_up() {
        let floats: Vec<f32> = (0..CHUNK + 1000).map(|i| i as f32).collect();
        let found = on_device(&Tensor::from_slice(&floats), 3..floats.len() as u64, 7).unwrap();
        assert_eq!(found, musher_proto::digest::of_slice(10, bytemuck::cast_slice(&floats[3..])));
    }
}
