//! What Musher needs of libtorch and tch does not bind: fused Adam on flat buffers, gradients that are views,
//! hooks on gradients on their way and after their accumulation, a tensor's host memory as a slice, convolutions as
//! products, streams beside the main one, autocast to bf16, its profiler, and CUDA opened at run time.
//!
//! Beside musher-nccl the only package with `unsafe`; it owns no training logic. Every C++ exception comes back as an [`Error`].
//!
//! **Aliasing.** tch's tensors are shared handles: two of them, on two threads, may name the same memory, and tch
//! lets both write. What borrows memory here is as safe as tch's own in-place operations, no safer: the caller keeps
//! other users of the same storage away meanwhile.

mod adam;
mod autograd;
mod conv;
mod cuda;
mod exit;
mod ffi;
mod host;
mod precision;
mod profile;
mod spread;
mod stream;

pub use adam::{AdamStep, OnDevice, fused_adam};
pub use autograd::{drop_grad, gather_gradients, on_gradient, on_gradient_accumulated, set_grad};
pub use conv::{Factors, Join, conv_as_product, conv_as_transposed_product, conv_of_join, row_major};
pub use cuda::{current_stream, open_cuda, repeatable_kernels, try_kernels};
pub use exit::exit_at_once;
pub use ffi::Error;
pub use host::{with_f32, with_f32_mut};
pub use precision::{allow_tf32, autocast_bf16, cpu_capability};
pub use profile::profile;
pub use spread::{Norm, spread};
pub use stream::{Mark, SideStream, copy_later, pin, used_here};
