//! Work beside a device's main stream, handed over without a wait of the host. The CPU has no streams: there each
//! of these does nothing.

use std::ffi::{c_int, c_void};
use std::ptr::{self, NonNull};

use tch::{Device, Tensor};

use crate::ffi::{self, Error};

/// A stream beside the device's main one. Memory that was allocated on it is used again on it alone, so whoever
/// comes back to such work comes back to its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SideStream(Option<OnCuda>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct OnCuda {
    index: c_int,
    id: i64,
}

impl SideStream {
    /// One of the device's pool.
    pub fn of(device: Device) -> Result<Self, Error> {
        let Some(index) = cuda_index(device) else { return Ok(Self(None)) };
        let mut id = 0;
        // SAFETY: `id` is a valid place for the number that the shim writes.
        ffi::check(unsafe { ffi::torch_ext_side_stream(index, &mut id) })?;
        Ok(Self(Some(OnCuda { index, id })))
    }

    /// From here on what this thread gives to the device goes to this stream.
    pub fn enter(self) -> Result<(), Error> {
        let Some(OnCuda { index, id }) = self.0 else { return Ok(()) };
        // SAFETY: takes the numbers of a stream that the pool gave out, which lives as long as the process, and changes
        // nothing but this thread's own notion of the current stream.
        ffi::check(unsafe { ffi::torch_ext_enter_stream(index, id) })
    }
}

/// A copy in page-locked host memory, which is sent to the CUDA device without a detour and without a wait.
pub fn pin(tensor: &Tensor) -> Result<Tensor, Error> {
    let pinned = tensor.shallow_clone();
    // SAFETY: the pointer is of a live handle that nobody else has; the shim assigns another tensor to it.
    ffi::check(unsafe { ffi::torch_ext_pin(pinned.as_ptr().cast_mut()) })?;
    Ok(pinned)
}

/// Copies without a wait: behind what this thread has given to the device so far. Between a device and page-locked host
/// memory the host sees the result once a [`Mark`] set after this is reached; on the CPU at once.
pub fn copy_later(target: &mut Tensor, source: &Tensor) -> Result<(), Error> {
    // SAFETY: the pointers are of live tensors, borrowed for the call; libtorch keeps the memory that a copy in flight
    // needs from being given to others on the device, and pinned memory until the copy is done.
    ffi::check(unsafe { ffi::torch_ext_copy_later(target.as_mut_ptr(), source.as_ptr().cast_mut()) })
}

/// Keeps a tensor's memory its own, though the tensor be dropped, until what this thread has given to the device so far is
/// done: for one that was allocated on another stream.
pub fn used_here(tensor: &Tensor) -> Result<(), Error> {
    if tensor.device() == Device::Cpu {
        return Ok(());
    }
    // SAFETY: the pointer is of a live tensor, borrowed for the call.
    ffi::check(unsafe { ffi::torch_ext_used_here(tensor.as_ptr().cast_mut()) })
}

/// A place in the current stream of the thread that set it: behind all it had given to the device.
pub struct Mark(Option<NonNull<c_void>>);

// SAFETY: an event is a handle that names its device; any thread may wait for it or drop it. It is not `Sync`.
unsafe impl Send for Mark {}

impl Mark {
    pub fn set(device: Device) -> Result<Self, Error> {
        let Some(index) = cuda_index(device) else { return Ok(Self(None)) };
        let mut mark = ptr::null_mut();
        // SAFETY: `mark` is a valid place for a pointer; the shim leaves an event there that only we hold.
        ffi::check(unsafe { ffi::torch_ext_mark(index, &mut mark) })?;
        Ok(Self(NonNull::new(mark)))
    }

    /// Whether the device has come so far. Does not wait.
    ///
    /// # Errors
    /// If the device has failed.
    pub fn is_reached(&self) -> Result<bool, Error> {
        let Some(mark) = self.0 else { return Ok(true) };
        let mut is_reached = false;
        // SAFETY: the event lives until `self` is dropped, and `is_reached` is a valid place for the answer.
        ffi::check(unsafe { ffi::torch_ext_is_reached(mark.as_ptr(), &mut is_reached) })?;
        Ok(is_reached)
    }

    /// What this thread gives to the device from here on runs after the mark. `tensors`, of the marked stream, may be
    /// used then: their memory stays theirs for as long as this thread's stream needs it.
    pub fn take_over(self, tensors: &[&Tensor]) -> Result<(), Error> {
        let Some(mark) = self.0 else { return Ok(()) };
        // SAFETY: the event lives until `self` is dropped.
        ffi::check(unsafe { ffi::torch_ext_wait_for(mark.as_ptr()) })?;
        tensors.iter().try_for_each(|tensor| used_here(tensor))
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if let Some(mark) = self.0 {
            // SAFETY: the event is ours alone, and dropped once.
            unsafe { ffi::torch_ext_drop_mark(mark.as_ptr()) };
        }
    }
}

fn cuda_index(device: Device) -> Option<c_int> {
    match device {
        Device::Cuda(index) => Some(index as c_int),
        Device::Cpu | Device::Mps | Device::Vulkan => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn the_cpu_has_one_stream() {
        SideStream::of(Device::Cpu).unwrap().enter().unwrap();
        let ones = Tensor::ones([3], (Kind::Float, Device::Cpu));
        let mark = Mark::set(Device::Cpu).unwrap();
        assert!(mark.is_reached().unwrap());
        mark.take_over(&[&ones]).unwrap();
        let mut copy = ones.zeros_like();
        copy_later(&mut copy, &ones).unwrap();
        assert_eq!(Vec::<f32>::try_from(copy).unwrap(), [1.0; 3]);
        assert_eq!(Vec::<f32>::try_from(ones).unwrap(), [1.0; 3]);
    }

    /// Up to the device's boundary: the shim's own calls, on a machine without one.
    #[test]
    fn a_missing_device_is_an_error() {
        if tch::Cuda::is_available() {
            return println!("skipped: there is a CUDA device");
        }
        let ones = Tensor::ones([3], (Kind::Float, Device::Cpu));
        assert!(SideStream::of(Device::Cuda(0)).is_err());
        assert!(SideStream(Some(OnCuda { index: 0, id: 0 })).enter().is_err());
        assert!(Mark::set(Device::Cuda(0)).is_err());
        assert!(pin(&ones).is_err());
        assert_eq!(Vec::<f32>::try_from(ones).unwrap(), [1.0; 3]);
    }
}
