//! The CUDA device of this process as NCCL's communicators see it: a stream of their own, its order with libtorch's,
//! and the abort word. It computes nothing.

use std::{
    ffi::c_void,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use cudarc::driver::{
    CudaContext, CudaEvent, CudaStream, DriverError,
    result::{self, malloc_host, stream::get_priority_range},
    sys::{CU_MEMHOSTALLOC_DEVICEMAP, CU_MEMHOSTALLOC_PORTABLE, is_culib_present},
};
use tch::{Kind, Tensor};

use crate::{ExchangeError, api::Stream, communicator::Device};

/// One GPU, opened once a process: it serves the communicators of all generations.
pub struct CudaDevice {
    ordinal: usize,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    word: Arc<AbortWord>,
}

impl CudaDevice {
    /// GPU `ordinal` of those visible, with a high-priority stream, as what others wait for is worth more than what
    /// nobody waits for. Libtorch's CUDA part is to be open already.
    ///
    /// # Errors
    /// If there is no driver, no such device, or libtorch has no CUDA.
    pub fn open(ordinal: usize) -> Result<Arc<Self>, ExchangeError> {
        // SAFETY: the driver's library asks nothing of whoever opens it.
        if !unsafe { is_culib_present() } {
            return Err(no_driver());
        }
        // libtorch works in the device's primary context, which this is too.
        let context = CudaContext::new(ordinal).map_err(cuda)?;
        let stream = high_priority_stream(&context)?;
        let word = Arc::new(AbortWord::new().map_err(cuda)?);
        torch_ext::current_stream(ordinal)?;
        Ok(Arc::new(Self { ordinal, context, stream, word }))
    }

    /// The same device and abort word. What two communicators do has no common order on all ranks, so each has a stream
    /// to itself.
    pub fn with_another_stream(&self) -> Result<Arc<Self>, ExchangeError> {
        self.context.bind_to_thread().map_err(cuda)?;
        let stream = high_priority_stream(&self.context)?;
        let (context, word) = (self.context.clone(), self.word.clone());
        Ok(Arc::new(Self { ordinal: self.ordinal, context, stream, word }))
    }

    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// For kernels: 1.0 from the moment that the generation is aborted, else 0.0. An f64 of shape `[1]` on the device,
    /// in the host's memory, so a kernel that runs later reads the latest.
    pub fn abort_word(&self) -> Tensor {
        // SAFETY: the memory is mapped into the device's address space at the host's address, and is never freed.
        let host = unsafe {
            let device = tch::Device::Cuda(self.ordinal);
            Tensor::from_blob(self.word.0.as_ptr().cast::<u8>(), &[1], &[1], Kind::Double, device)
        };
        host.set_requires_grad(false)
    }

    /// libtorch's current stream on the calling thread.
    fn tensors_stream(&self) -> Result<Arc<CudaStream>, ExchangeError> {
        let stream = torch_ext::current_stream(self.ordinal)?;
        // SAFETY: libtorch's streams live as long as the process, in the primary context; the wrapper is used to order
        // events, no more.
        Ok(unsafe { self.context.wrap_borrowed_stream(stream.cast()) })
    }
}

impl Device for CudaDevice {
    type Mark = CudaEvent;

    fn bind(&self) -> Result<(), ExchangeError> {
        self.context.bind_to_thread().map_err(cuda)
    }

    fn stream(&self) -> Stream {
        Stream(self.stream.cu_stream().cast::<c_void>())
    }

    fn follow_tensors(&self) -> Result<(), ExchangeError> {
        self.stream.join(&*self.tensors_stream()?).map_err(cuda)
    }

    fn lead_tensors(&self) -> Result<(), ExchangeError> {
        self.tensors_stream()?.join(&self.stream).map_err(cuda)
    }

    fn mark(&self) -> Result<CudaEvent, ExchangeError> {
        self.stream.record_event(None).map_err(cuda)
    }

    fn has_reached(&self, mark: &CudaEvent) -> Result<bool, ExchangeError> {
        mark.try_is_complete().map_err(cuda)
    }

    fn set_abort_word(&self, aborted: bool) {
        self.word.set(if aborted { 1.0 } else { 0.0 });
    }
}

fn high_priority_stream(context: &Arc<CudaContext>) -> Result<Arc<CudaStream>, ExchangeError> {
    let (_, highest) = get_priority_range().map_err(cuda)?;
    context.new_stream_with_priority(highest).map_err(cuda)
}

/// What the driver calls GPU `ordinal` of those visible.
pub fn device_name(ordinal: usize) -> Result<String, ExchangeError> {
    // SAFETY: the driver's library asks nothing of whoever opens it.
    if !unsafe { is_culib_present() } {
        return Err(no_driver());
    }
    result::init().map_err(cuda)?;
    let device = result::device::get(i32::try_from(ordinal).unwrap_or(i32::MAX)).map_err(cuda)?;
    result::device::get_name(device).map_err(cuda)
}

fn no_driver() -> ExchangeError {
    ExchangeError::Cuda { reason: "there is no NVIDIA driver, libcuda.so.1, on this machine".into() }
}

/// An f64 in pinned host memory that the device reads in place. Never freed: tensors may view it.
struct AbortWord(NonNull<u64>);

// SAFETY: all access from the host is atomic.
unsafe impl Send for AbortWord {}
// SAFETY: as above.
unsafe impl Sync for AbortWord {}

impl AbortWord {
    /// In the context that is current on this thread.
    fn new() -> Result<Self, DriverError> {
        // SAFETY: no requirements; the memory is written before it is read, below.
        let memory =
            unsafe { malloc_host(size_of::<u64>(), CU_MEMHOSTALLOC_DEVICEMAP | CU_MEMHOSTALLOC_PORTABLE)? };
        let word = Self(NonNull::new(memory.cast()).expect("the driver's allocation succeeded"));
        word.set(0.0);
        Ok(word)
    }

    fn set(&self, value: f64) {
        // SAFETY: page-aligned memory of our own, never freed, that the host accesses through this alone.
        unsafe { AtomicU64::from_ptr(self.0.as_ptr()) }.store(value.to_bits(), Ordering::SeqCst);
    }
}

fn cuda(error: DriverError) -> ExchangeError {
    ExchangeError::Cuda { reason: error.to_string() }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_is_told_so() {
        // SAFETY: the driver's library asks nothing of whoever opens it.
        if unsafe { is_culib_present() } {
            return println!("skipped: there is a driver");
        }
        let message = CudaDevice::open(0).map(drop).unwrap_err().to_string();
        assert_eq!(message, "CUDA can't be used (there is no NVIDIA driver, libcuda.so.1, on this machine)");
    }
}
