//! The exchange between the members of one generation: sums and broadcasts that leave every rank
//! with identical bits, and fail with a typed error instead of waiting for ever.
//!
//! The [`Collective`] trait is what training sees; [`Ring`] implements it over TCP for machines
//! without a GPU. This crate does not decide who is a member, which rank is to blame when the
//! exchange breaks, or what happens next: that is the coordinator's business.

// Payloads travel as the bytes that the sender has in memory.
#[cfg(target_endian = "big")]
compile_error!("musher-collective exchanges little-endian floats; port the casts in ring.rs first");

mod abort;
mod error;
mod formation;
mod frame;
mod handshake;
mod meter;
mod ring;
mod schedule;

use std::fmt;

pub use abort::Aborter;
pub use error::{CollectiveError, Neighbour, Waited};
pub use formation::{Purpose, RingListener, RingSpec, Secret};
pub use frame::{Frame, Operation};
pub use meter::Meter;
pub use ring::Ring;

/// What the members of one generation do together. All ranks make the same calls in the same order
/// with the same tags and lengths; a rank that does not is reported as
/// [`CollectiveError::Protocol`].
///
/// After an error the contents of `data` are unspecified, the exchange is unusable, and every later
/// call fails at once with the same error.
pub trait Collective: Send {
    /// This member's rank, in `0..world()`.
    fn rank(&self) -> u32;

    /// The number of members.
    fn world(&self) -> u32;

    /// Sums `data` elementwise over all ranks, in place. The order of summation depends on the
    /// world size alone, and all ranks end with identical bits.
    fn all_reduce(&mut self, tag: Tag, data: &mut [f32]) -> Result<(), CollectiveError>;

    /// [`all_reduce`](Self::all_reduce) with half the bytes on the way: each rank's values, and each partial sum
    /// that is passed on, are rounded to bf16, while two of them are added in f32. Of a sum of `W` values `x` the
    /// error is within `W * 2^-8 * Σ|x|`. All ranks end with identical bits, which bf16 holds; so does a world of one.
    fn all_reduce_bf16(&mut self, tag: Tag, data: &mut [f32]) -> Result<(), CollectiveError>;

    /// [`all_reduce`](Self::all_reduce) in double precision: for control words, loss sums and
    /// batch-norm moments.
    fn all_reduce_f64(&mut self, tag: Tag, data: &mut [f64]) -> Result<(), CollectiveError>;

    /// Copies `root`'s `data` into that of every other rank.
    fn broadcast(&mut self, tag: Tag, root: u32, data: &mut [u8]) -> Result<(), CollectiveError>;

    /// A handle that breaks the exchange off from any thread.
    fn aborter(&self) -> Aborter;

    /// How far this rank is, to be read by other threads.
    fn meter(&self) -> Meter;
}

impl<C: Collective + ?Sized> Collective for Box<C> {
    fn rank(&self) -> u32 {
        (**self).rank()
    }

    fn world(&self) -> u32 {
        (**self).world()
    }

    fn all_reduce(&mut self, tag: Tag, data: &mut [f32]) -> Result<(), CollectiveError> {
        (**self).all_reduce(tag, data)
    }

    fn all_reduce_bf16(&mut self, tag: Tag, data: &mut [f32]) -> Result<(), CollectiveError> {
        (**self).all_reduce_bf16(tag, data)
    }

    fn all_reduce_f64(&mut self, tag: Tag, data: &mut [f64]) -> Result<(), CollectiveError> {
        (**self).all_reduce_f64(tag, data)
    }

    fn broadcast(&mut self, tag: Tag, root: u32, data: &mut [u8]) -> Result<(), CollectiveError> {
        (**self).broadcast(tag, root, data)
    }

    fn aborter(&self) -> Aborter {
        (**self).aborter()
    }

    fn meter(&self) -> Meter {
        (**self).meter()
    }
}

/// What a call is about. Ranks whose tags differ have lost step with each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// The optimizer step, counted over the whole run.
    pub step: u64,
    /// The gradient bucket, or any other number that tells the calls of one phase apart.
    pub bucket: u32,
    pub phase: Phase,
}

impl Tag {
    pub fn new(step: u64, bucket: u32, phase: Phase) -> Self {
        Self { step, bucket, phase }
    }
}

/// The purpose of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Phase {
    /// The first exchange of a generation, before any that counts.
    Warmup,
    Gradients,
    /// The control word that completes a step.
    Control,
    /// Batch-norm moments and running statistics.
    BatchNorm,
    /// Parameters and optimizer state, from the donor to the others.
    State,
    /// Comparison of the replicas' digests.
    Digest,
    /// Batch norm's sums within forward and backward.
    SyncBatchNorm,
}

impl Phase {
    const ALL: [Self; 7] = [
        Self::Warmup,
        Self::Gradients,
        Self::Control,
        Self::BatchNorm,
        Self::State,
        Self::Digest,
        Self::SyncBatchNorm,
    ];
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Warmup => "warmup",
            Self::Gradients => "gradients",
            Self::Control => "control",
            Self::BatchNorm => "batch norm",
            Self::State => "state",
            Self::Digest => "digest",
            Self::SyncBatchNorm => "synchronised batch norm",
        })
    }
}
