//! In what precision libtorch computes: autocast to bf16, and TF32. tch has neither.

use std::ffi::CStr;

use tch::Device;

use crate::ffi::{self, Error};

/// Runs `compute` with autocast: what gains by it is computed in bf16 on `device`'s kind, what loses by it in f32, as
/// PyTorch's lists say. It holds for this thread; the backward pass needs none of its own.
pub fn autocast_bf16<T>(device: Device, compute: impl FnOnce() -> T) -> Result<T, Error> {
    let _on = Autocast::on(device)?;
    Ok(compute())
}

/// Lets matrix products and convolutions of f32 on CUDA round their factors to TF32, 10 bits of mantissa, in this
/// process.
pub fn allow_tf32(allow: bool) -> Result<(), Error> {
    // SAFETY: sets flags of the process.
    ffi::check(unsafe { ffi::torch_ext_allow_tf32(allow) })
}

/// Ends with its scope, also when that panics.
struct Autocast(i8);

impl Autocast {
    fn on(device: Device) -> Result<Self, Error> {
        // c10::DeviceType's numbers.
        let device_type = match device {
            Device::Cuda(_) => 1,
            _ => 0,
        };
        // SAFETY: sets this thread's own state.
        ffi::check(unsafe { ffi::torch_ext_autocast_bf16(device_type, true) })?;
        Ok(Self(device_type))
    }
}

impl Drop for Autocast {
    fn drop(&mut self) {
        // SAFETY: as in `on`. An error could only be of memory, and there is nobody to tell.
        let _ = ffi::check(unsafe { ffi::torch_ext_autocast_bf16(self.0, false) });
    }
}

/// The vector instructions that libtorch's own kernels were chosen for, as it names them: `AVX2`, `AVX512`, or `DEFAULT`
/// where it found none that it knows. `ATEN_CPU_CAPABILITY` in the environment chooses others.
pub fn cpu_capability() -> &'static str {
    // SAFETY: the shim's string is never freed nor changed.
    unsafe { CStr::from_ptr(ffi::torch_ext_cpu_capability()) }.to_str().unwrap_or("DEFAULT")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tch::{Kind, Tensor};

    use super::*;

    #[test]
    fn products_are_bf16_within_and_f32_after() {
        let one = || Tensor::full([4, 4], 1.0 / 3.0, (Kind::Float, Device::Cpu));
        let inside = autocast_bf16(Device::Cpu, || one().matmul(&one())).unwrap();
        assert_eq!(inside.kind(), Kind::BFloat16);
        assert_eq!(one().matmul(&one()).kind(), Kind::Float);
        let _ = std::panic::catch_unwind(|| autocast_bf16(Device::Cpu, || panic!("within")));
        assert_eq!(one().matmul(&one()).kind(), Kind::Float);
    }

    #[test]
    fn tf32_is_a_flag_without_a_gpu_too() {
        allow_tf32(true).unwrap();
        allow_tf32(false).unwrap();
    }
}
