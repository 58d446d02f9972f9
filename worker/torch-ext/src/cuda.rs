//! libtorch's CUDA part: opened at run time, so that one binary serves machines with a GPU and without.

use std::ffi::c_void;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::ffi::{self, Error};

/// Makes libtorch's CUDA devices usable, if its CUDA build is installed and the machine has a driver for it. Opening it
/// again does nothing.
///
/// # Errors
/// One sentence that says what is missing.
pub fn open_cuda() -> Result<(), Error> {
    const NAME: &str = "libtorch_cuda.so";
    // SAFETY: its initialisers register kernels and devices with the libtorch that is linked here, of the same build.
    match unsafe { Library::open(Some(NAME), RTLD_NOW | RTLD_GLOBAL) } {
        Ok(library) => {
            // What it registered is referred to for as long as the process lives.
            std::mem::forget(library);
        }
        Err(error) => return Err(Error(what_is_missing(NAME, &words_of(&error)))),
    }
    match tch::Cuda::device_count() {
        0 => Err(Error(
            "CUDA is installed but shows no device: look whether nvidia-smi does, whether CUDA_VISIBLE_DEVICES hides it, \
             and whether the driver is recent enough for CUDA 13 (580 or newer)"
                .into(),
        )),
        _ => Ok(()),
    }
}

/// Whether cuDNN tries kernels for each new shape of a convolution on this thread, in this process, and remembers the
/// fastest: three of those that it thinks best, where libtorch's own limit is ten. Their memory is not given back to
/// the device each time, as libtorch would.
pub fn try_kernels(on: bool) -> Result<(), Error> {
    // SAFETY: sets flags of the process.
    ffi::check(unsafe { ffi::torch_ext_try_kernels(on) })
}

/// From now on cuDNN takes only kernels that give the same bits each time, in this process.
pub fn repeatable_kernels() -> Result<(), Error> {
    // SAFETY: sets a flag of the process.
    ffi::check(unsafe { ffi::torch_ext_repeatable_kernels() })
}

/// libtorch's current stream on this thread for CUDA device `ordinal`; null is CUDA's default stream.
pub fn current_stream(ordinal: usize) -> Result<*mut c_void, Error> {
    let index = i8::try_from(ordinal).map_err(|_| Error(format!("there is no CUDA device {ordinal}")))?;
    let mut stream = std::ptr::null_mut();
    // SAFETY: writes the handle.
    let message = unsafe { ffi::torch_ext_current_stream(index, &mut stream) };
    ffi::check(message).map(|()| stream)
}

/// The system's own, which libloading gives as the cause.
fn words_of(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// In terms of what to install, as the loader names but the first file that it misses.
fn what_is_missing(name: &str, error: &str) -> String {
    let error = error.lines().next().unwrap_or_default();
    if error.contains("libcuda.so") {
        return format!("there is no NVIDIA driver on this machine ({error})");
    }
    let is_lean = "libtorch is installed without its CUDA part: run `MUSHER_LIBTORCH=full make setup`";
    match error.contains(name) && !error.contains("undefined symbol") {
        true => format!("{is_lean} ({error})"),
        false if error.contains("cannot open shared object file") => format!("{is_lean} ({error})"),
        false => format!("{name} can't be opened ({error})"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_cuda_is_told_what_is_missing() {
        let Err(Error(message)) = open_cuda() else { return println!("skipped: CUDA is here") };
        println!("{message}");
        assert!(
            ["make setup", "driver", "no device"].iter().any(|words| message.contains(words)),
            "{message}"
        );
        assert!(!message.contains('\n'), "{message}");
        let Error(message) = current_stream(0).unwrap_err();
        assert!(message.to_lowercase().contains("cuda"), "{message}");
    }

    #[test]
    fn what_the_loader_says_becomes_what_to_do() {
        let missing = |file| format!("{file}: cannot open shared object file: No such file or directory");
        let said = |file| what_is_missing("libtorch_cuda.so", &missing(file));
        assert!(said("libtorch_cuda.so").contains("MUSHER_LIBTORCH=full make setup"));
        assert!(said("libcudnn.so.9").contains("MUSHER_LIBTORCH=full make setup"));
        assert!(said("libcuda.so.1").starts_with("there is no NVIDIA driver"));
        let odd = what_is_missing("libtorch_cuda.so", "x/libtorch_cuda.so: undefined symbol: f");
        assert!(odd.starts_with("libtorch_cuda.so can't be opened"), "{odd}");
    }
}
