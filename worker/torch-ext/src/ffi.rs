//! The C face of the C++ files here, and its errors.

use std::ffi::{CStr, c_char, c_int, c_void};

use torch_sys::C_tensor;

/// A refusal of libtorch, or of a precondition checked on the way to it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("libtorch: {0}")]
pub struct Error(pub String);

unsafe extern "C" {
    fn torch_ext_free(message: *mut c_char);

    pub(crate) fn torch_ext_fused_adam(
        params: *mut C_tensor,
        grads: *mut C_tensor,
        exp_avg: *mut C_tensor,
        exp_avg_sq: *mut C_tensor,
        lr: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        step: f64,
        grad_scale: *mut C_tensor,
        found_inf: *mut C_tensor,
    ) -> *mut c_char;

    pub(crate) fn torch_ext_gather(
        params: *const *mut C_tensor,
        places: *const *mut C_tensor,
        count: usize,
        add: bool,
    ) -> *mut c_char;
    pub(crate) fn torch_ext_drop_grad(param: *mut C_tensor) -> *mut c_char;

    pub(crate) fn torch_ext_set_grad(param: *mut C_tensor, grad: *mut C_tensor) -> *mut c_char;

    pub(crate) fn torch_ext_on_gradient(
        tensor: *mut C_tensor,
        context: *mut c_void,
        call: extern "C" fn(*mut c_void, *mut C_tensor) -> *mut C_tensor,
        drop: extern "C" fn(*mut c_void),
    ) -> *mut c_char;

    pub(crate) fn torch_ext_on_gradient_accumulated(
        param: *mut C_tensor,
        context: *mut c_void,
        call: extern "C" fn(*mut c_void) -> bool,
        drop: extern "C" fn(*mut c_void),
    ) -> *mut c_char;

    pub(crate) fn torch_ext_side_stream(cuda_index: c_int, id: *mut i64) -> *mut c_char;
    pub(crate) fn torch_ext_enter_stream(cuda_index: c_int, id: i64) -> *mut c_char;
    pub(crate) fn torch_ext_mark(cuda_index: c_int, mark: *mut *mut c_void) -> *mut c_char;
    pub(crate) fn torch_ext_wait_for(mark: *mut c_void) -> *mut c_char;
    pub(crate) fn torch_ext_is_reached(mark: *mut c_void, is_reached: *mut bool) -> *mut c_char;
    pub(crate) fn torch_ext_drop_mark(mark: *mut c_void);
    pub(crate) fn torch_ext_used_here(tensor: *mut C_tensor) -> *mut c_char;
    pub(crate) fn torch_ext_pin(tensor: *mut C_tensor) -> *mut c_char;
    pub(crate) fn torch_ext_copy_later(target: *mut C_tensor, source: *mut C_tensor) -> *mut c_char;
    pub(crate) fn torch_ext_autocast_bf16(device_type: i8, on: bool) -> *mut c_char;
    pub(crate) fn torch_ext_allow_tf32(allow: bool) -> *mut c_char;
    pub(crate) fn torch_ext_try_kernels(on: bool) -> *mut c_char;
    pub(crate) fn torch_ext_repeatable_kernels() -> *mut c_char;
    pub(crate) fn torch_ext_cpu_capability() -> *const c_char;
    pub(crate) fn torch_ext_exit(code: c_int) -> !;
    pub(crate) fn torch_ext_spread(
        x: *mut C_tensor,
        background: *mut C_tensor,
        weight: *mut C_tensor,
        bias: *mut C_tensor,
        running_mean: *mut C_tensor,
        running_var: *mut C_tensor,
        by_batch: bool,
        momentum: f64,
        eps: f64,
        sparse: *mut *mut C_tensor,
        constant: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(crate) fn torch_ext_row_major(weight: *mut C_tensor, y: *mut *mut C_tensor) -> *mut c_char;
    pub(crate) fn torch_ext_conv_as_product(
        x: *mut C_tensor,
        weight: *mut C_tensor,
        bias: *mut C_tensor,
        transposed: bool,
        bf16: bool,
        y: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(crate) fn torch_ext_conv_of_join(
        sparse: *mut C_tensor,
        constant: *mut C_tensor,
        skip: *mut C_tensor,
        weight: *mut C_tensor,
        bias: *mut C_tensor,
        skip_by_product: bool,
        bf16: bool,
        y: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(crate) fn torch_ext_begin_profile(cuda: bool) -> *mut c_char;
    pub(crate) fn torch_ext_end_profile(path: *const c_char) -> *mut c_char;
    pub(crate) fn torch_ext_current_stream(device_index: i8, stream: *mut *mut c_void) -> *mut c_char;
}

/// Turns the shim's message, which must be fresh from one of its functions, into a result.
pub(crate) fn check(message: *mut c_char) -> Result<(), Error> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: not null, so a C string that the shim allocated for us and nobody else holds.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
    // SAFETY: as above; freed once, and not read again.
    unsafe { torch_ext_free(message) };
    Err(Error(text))
}
