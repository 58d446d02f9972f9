//! The exchange between the GPUs of one generation: NCCL, opened at run time, with a life that always ends.
//!
//! [`TensorCollective`] is what training sees; [`GpuCollective`] implements it with NCCL on CUDA tensors, and [`OnHost`]
//! with any [`Collective`](musher_collective::Collective) on tensors anywhere. As in musher-collective, who is a
//! member and what happens after a failure is the coordinator's business.
//!
//! Beside torch-ext the only package with `unsafe`.

mod api;
mod communicator;
mod cuda;
mod error;
mod gpu;
mod host;
mod library;
mod life;
mod tensor;
mod version;

pub use api::UniqueId;
pub use communicator::Place;
pub use cuda::{CudaDevice, device_name};
pub use error::{CallError, ExchangeError, Wait, What};
pub use gpu::{GpuCollective, NcclRuntime};
pub use host::OnHost;
pub use tensor::{IsReached, TensorCollective};
pub use version::Version;
