//! What training asks of an exchange, in terms of tensors.

use musher_collective::{Aborter, Meter, Tag};
use tch::Tensor;

use crate::ExchangeError;

/// Asked over and over until it says true.
pub type IsReached<'a> = dyn FnMut() -> Result<bool, ExchangeError> + 'a;

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

    /// [`all_reduce`](Self::all_reduce) of f32 with half the bytes on the way: values and partial sums are rounded to
    /// bf16. All ranks end with identical bits, which bf16 holds; so does a world of one.
    fn all_reduce_bf16(&mut self, tag: Tag, tensor: &Tensor) -> Result<(), ExchangeError>;

    /// Launches the copy of `root`'s contiguous tensor of f32, bf16, f64 or u8 into that of every other rank.
    fn broadcast(&mut self, tag: Tag, root: u32, tensor: &Tensor) -> Result<(), ExchangeError>;

    /// What the current stream does from here on sees the results. The host does not wait.
    fn fence(&mut self) -> Result<(), ExchangeError>;

    /// Returns once all that was launched is done, or could not be. Polls, and gives up after the patience that the
    /// exchange was formed with.
    fn wait(&mut self) -> Result<(), ExchangeError>;

    /// Returns once `is_reached`, of which the device makes the truth, and asks meanwhile how the exchange is: a failure
    /// of it, or its abort, ends the wait. What was launched before counts as received then.
    fn wait_until(&mut self, is_reached: &mut IsReached) -> Result<(), ExchangeError>;

    /// An f64 [1] on the device that is 1.0 from the moment that the exchange is aborted, else 0.0; results of kernels
    /// that ran later are not to be believed. `None` where an abort shows as an error before any result does.
    fn abort_word(&self) -> Option<Tensor>;

    /// Breaks the exchange off, if nobody has, and waits until nothing of it touches a tensor any more.
    ///
    /// # Errors
    /// [`ExchangeError::Stuck`]: this process should end.
    fn leave(&mut self) -> Result<(), ExchangeError>;

    /// A handle that breaks the exchange off from any thread.
    fn aborter(&self) -> Aborter;

    /// How far this rank is, to be read by other threads.
    fn meter(&self) -> Meter;
}
