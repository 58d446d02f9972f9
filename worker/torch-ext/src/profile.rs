//! libtorch's own profiler: which operations and kernels ran when, as a trace for <https://ui.perfetto.dev>.

use std::ffi::CString;
use std::path::Path;

use tch::Device;

use crate::ffi::{self, Error};

/// Runs `compute` and writes the operations of this thread, and on a GPU all kernels, to `path`: Chrome's trace format,
/// JSON. What is recorded is slower than it would be otherwise; one profile at a time in a process.
///
/// # Errors
/// If the profiler can't start, or `path` can't be written.
pub fn profile<T>(device: Device, path: &Path, compute: impl FnOnce() -> T) -> Result<T, Error> {
    let unfit = || Error(format!("{} is no path for a trace: it holds a zero byte", path.display()));
    let path = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| unfit())?;
    // SAFETY: starts the profiler of this thread.
    ffi::check(unsafe { ffi::torch_ext_begin_profile(matches!(device, Device::Cuda(_))) })?;
    let profile = Profile(path);
    let result = compute();
    profile.end()?;
    Ok(result)
}

/// Ends with its scope, also when that panics.
struct Profile(CString);

impl Profile {
    fn end(self) -> Result<(), Error> {
        std::mem::ManuallyDrop::new(self).write()
    }

    fn write(&self) -> Result<(), Error> {
        // SAFETY: the path is a C string that lives for the call; the profiler was started by this thread.
        ffi::check(unsafe { ffi::torch_ext_end_profile(self.0.as_ptr()) })
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        // A panic is on its way, and the trace is of no use.
        let _ = self.write();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tch::{Kind, Tensor};

    use super::*;

    #[test]
    fn operations_are_in_the_trace() {
        let path = std::env::temp_dir().join(format!("torch-ext-{}.trace.json", std::process::id()));
        let ones = || Tensor::ones([4, 4], (Kind::Float, Device::Cpu));
        let product = profile(Device::Cpu, &path, || ones().matmul(&ones())).unwrap();
        assert_eq!(product.double_value(&[0, 0]), 4.0);
        let trace = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(trace.contains("aten::matmul"), "{}", &trace[..trace.len().min(500)]);
    }
}
