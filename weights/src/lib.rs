//! Weights files as named f32 arrays: PyTorch's state dicts (`.pth`, both container formats), safetensors, and Keras'
//! HDF5.
//!
//! A file is indexed when it is opened, and an array is read when it is asked for. Whatever a file claims is checked
//! against its length before memory is taken, and nothing in it is ever executed. What the names mean is
//! [`resnet50`]'s, where a file comes from [`source`]'s; what a network makes of the arrays is the caller's.

mod array;
mod error;
mod input;

mod file;

mod hdf5;
mod pickle;
mod safetensors;
mod torch;

pub mod resnet50;
pub mod source;

pub use array::{Dtype, Stored};
pub use error::Error;
pub use file::{Format, WeightsFile};
