//! The NCCL calls that Musher makes, and no others: a thin trait, so that a test can script the library.
//! When a call may be made is the business of [`life`](crate::life).

use std::{ffi::c_void, fmt, ptr::NonNull};

use crate::{CallError, version::Version};

/// What the library does on behalf of one process. Calls that may go on in the background say so.
pub(crate) trait Nccl: Send + Sync {
    fn version(&self) -> Result<Version, CallError>;

    /// A fresh name for a communicator, good for one [`init_rank`](Self::init_rank) on each of its ranks.
    fn unique_id(&self) -> Result<UniqueId, CallError>;

    /// Begins to connect this rank, without blocking, on the CUDA device that is current on this thread.
    fn init_rank(&self, id: &UniqueId, rank: u32, world: u32) -> Result<Comm, CallError>;

    /// Whether what was begun on the communicator is done, or how it failed.
    ///
    /// # Safety
    /// `comm` came from [`init_rank`](Self::init_rank) and is not freed.
    unsafe fn async_error(&self, comm: Comm) -> Result<Status, CallError>;

    /// Sums `buffer` over all ranks, in place, in the stream's order.
    ///
    /// # Safety
    /// As [`async_error`](Self::async_error), and no other thread is in a call on `comm`. The stream is live; the
    /// buffer is memory of the communicator's device that stays until the stream has passed the call.
    unsafe fn all_reduce(&self, comm: Comm, buffer: Buffer, stream: Stream) -> Result<Status, CallError>;

    /// Copies `root`'s buffer into everybody's, in the stream's order.
    ///
    /// # Safety
    /// As [`all_reduce`](Self::all_reduce).
    unsafe fn broadcast(
        &self,
        comm: Comm,
        buffer: Buffer,
        root: u32,
        stream: Stream,
    ) -> Result<Status, CallError>;

    /// Stops what is in flight and refuses what comes, without freeing anything. `None`: the library has no such
    /// call.
    ///
    /// # Safety
    /// As [`async_error`](Self::async_error); another thread may be in a call on `comm`.
    unsafe fn revoke(&self, comm: Comm) -> Option<Result<Status, CallError>>;

    /// Stops what is in flight and frees the communicator. May block.
    ///
    /// # Safety
    /// As [`async_error`](Self::async_error); no thread is in a call on `comm`, and none will be.
    unsafe fn abort(&self, comm: Comm) -> Result<(), CallError>;

    /// Begins to let go of the peers, after everything in flight.
    ///
    /// # Safety
    /// As [`all_reduce`](Self::all_reduce).
    unsafe fn finalize(&self, comm: Comm) -> Result<Status, CallError>;

    /// Frees a communicator that is finalized.
    ///
    /// # Safety
    /// As [`abort`](Self::abort).
    unsafe fn destroy(&self, comm: Comm) -> Result<(), CallError>;
}

/// What a call that did not fail came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Done,
    /// It goes on in the background: the communicator is to be polled before anything else is asked of it.
    InProgress,
}

/// The library's handle of a communicator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Comm(pub NonNull<c_void>);

// SAFETY: an opaque handle. Which thread may use it when is the contract of each call.
unsafe impl Send for Comm {}
// SAFETY: as above.
unsafe impl Sync for Comm {}

/// A CUDA stream's handle; null is the default stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stream(pub *mut c_void);

/// Memory of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Buffer {
    pub address: *mut c_void,
    pub elements: usize,
    pub element: Element,
}

/// The types that are exchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    U8,
    F32,
    F64,
    Bf16,
}

impl Element {
    pub fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::Bf16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

/// Names a communicator that is to be; rank 0 makes it, all ranks of one generation use it once.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UniqueId(pub [u8; UniqueId::BYTES]);

impl UniqueId {
    pub const BYTES: usize = 128;
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UniqueId({:02x?}..)", &self.0[..8])
    }
}
