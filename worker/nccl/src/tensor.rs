//! What training asks of an exchange, in terms of tensors.

use musher_collective::{Aborter, Meter, Tag};
use tch::Tensor;

use crate::ExchangeError;

/// What the members of one generation do together on tensors. All ranks make the same calls in the same order with
/// the same tags, dtypes and lengths.
///
/// Calls are *launched*: they read what the calling thread's current stream of libtorch has computed so far, and their
/// results are there after a [`fence`](Self::fence), for the stream, or a [`wait`](Self::wait), for the host. On the CPU
/// both are at once. Until then nobody else may use the tensor's memory.
///
/// After an error the tensors' contents are unspecified and every later call fails.
pub trait TensorCollective: Send {
    /// This member's rank, in `0..world()`.
    fn rank(&self) -> u32;

    /// The number of members.
    fn world(&self) -> u32;

    /// Launches the elementwise sum over all ranks, in place: a contiguous tensor of f32, bf16 or f64. All ranks end
    /// with identical bits.
    fn all_reduce(&mut self, tag: Tag, tensor: &Tensor) -> Result<(), ExchangeError>;

    /// Launches the copy of `root`'s contiguous tensor of f32, bf16, f64 or u8 into that of every other rank.
    fn broadcast(&mut self, tag: Tag, root: u32, tensor: &Tensor) -> Result<(), ExchangeError>;

    /// What the current stream does from here on sees the results. The host does not wait.
    fn fence(&mut self) -> Result<(), ExchangeError>;

    /// Returns once all that was launched is done, or could not be. Polls, and gives up after the patience that the
    /// exchange was formed with.
    fn wait(&mut self) -> Result<(), ExchangeError>;

    /// A handle that breaks the exchange off from any thread.
    fn aborter(&self) -> Aborter;

    /// How far this rank is, to be read by other threads.
    fn meter(&self) -> Meter;
}
