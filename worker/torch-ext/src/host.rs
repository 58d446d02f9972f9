//! A CPU tensor's memory as a slice, for as long as a closure runs.

use std::slice;

use tch::{Device, Kind, Tensor};

use crate::ffi::Error;

/// Lends the memory of a contiguous f32 CPU tensor for reading.
///
/// Nothing else may write to the storage meanwhile, through this handle's aliases included.
pub fn with_f32<R>(tensor: &Tensor, read: impl FnOnce(&[f32]) -> R) -> Result<R, Error> {
    let (data, len) = memory(tensor)?;
    if len == 0 {
        return Ok(read(&[]));
    }
    // SAFETY: `memory` found `len` contiguous, aligned f32 at `data`, alive while `tensor` is borrowed; the caller
    // keeps writers away, as the function's contract says.
    Ok(read(unsafe { slice::from_raw_parts(data, len) }))
}

/// Lends the memory of a contiguous f32 CPU tensor for writing.
///
/// Nothing else may use that part of the storage meanwhile; other parts are free, so that threads may work on
/// disjoint `narrow`ed views of one flat buffer.
pub fn with_f32_mut<R>(tensor: &mut Tensor, write: impl FnOnce(&mut [f32]) -> R) -> Result<R, Error> {
    let (data, len) = memory(tensor)?;
    if len == 0 {
        return Ok(write(&mut []));
    }
    // SAFETY: `memory` found `len` contiguous, aligned f32 at `data`, alive while `tensor` is borrowed; the caller
    // keeps every other user of that memory away, as the function's contract says.
    Ok(write(unsafe { slice::from_raw_parts_mut(data, len) }))
}

fn memory(tensor: &Tensor) -> Result<(*mut f32, usize), Error> {
    if tensor.device() != Device::Cpu || tensor.kind() != Kind::Float || !tensor.is_contiguous() {
        return Err(Error("only a contiguous f32 tensor on the CPU has host memory to lend".into()));
    }
    Ok((tensor.data_ptr().cast(), tensor.numel()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn views_lend_their_own_part() {
        let flat = Tensor::zeros([8], (Kind::Float, Device::Cpu));
        with_f32_mut(&mut flat.narrow(0, 2, 3), |slice| slice.copy_from_slice(&[1., 2., 3.])).unwrap();
        assert_eq!(with_f32(&flat, <[f32]>::to_vec).unwrap(), [0., 0., 1., 2., 3., 0., 0., 0.]);
        assert_eq!(with_f32(&flat.narrow(0, 0, 0), <[f32]>::len).unwrap(), 0);
    }

    #[test]
    fn other_layouts_and_dtypes_are_errors() {
        assert!(
            with_f32(&Tensor::zeros([4, 4], (Kind::Float, Device::Cpu)).transpose(0, 1), |_| ()).is_err()
        );
        assert!(with_f32(&Tensor::zeros([4], (Kind::Double, Device::Cpu)), |_| ()).is_err());
    }
}
