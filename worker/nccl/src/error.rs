//! How the exchange between GPUs fails: what was done or waited for, how long, and NCCL's own words.

use std::{fmt, time::Duration};

use musher_collective::Tag;

use crate::version::Version;

#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    #[error(
        "NCCL can't be opened ({reason}): install the CUDA build of libtorch, which brings it, or put \
         libnccl.so.2 on LD_LIBRARY_PATH"
    )]
    Missing { reason: String },

    #[error(
        "NCCL {found} is too old: {}, so Musher needs {} or newer; the CUDA build of libtorch 2.11 brings 2.28.9",
        Version::WHY,
        Version::MINIMUM
    )]
    TooOld { found: Version },

    #[error("CUDA can't be used ({reason})")]
    Cuda { reason: String },

    /// The tensor can't be handed to NCCL.
    #[error("a tensor that is {found} can't be exchanged: it must be {expected}")]
    Unfit { expected: &'static str, found: String },

    /// A call failed at once, or in the background.
    #[error("NCCL failed {wait}: {error}")]
    Failed { wait: Wait, error: CallError },

    /// Nothing failed, and nothing came.
    #[error("nothing came of {wait}; report it")]
    TimedOut { wait: Wait },

    /// This rank's part was aborted, in a call or before it.
    #[error("the exchange was aborted{}", during(.0))]
    Aborted(Option<Wait>),

    /// NCCL does not let go; there is no way on in this process.
    #[error("NCCL did not end an aborted communicator in {:.1} s: end this process and start it again", .waited.as_secs_f64())]
    Stuck { waited: Duration },

    /// The exchange between the hosts, which GPUs use to find each other.
    #[error(transparent)]
    Host(#[from] musher_collective::CollectiveError),

    #[error(transparent)]
    Torch(#[from] torch_ext::Error),

    #[error(transparent)]
    Tensor(#[from] tch::TchError),
}

impl ExchangeError {
    /// Whether the generation alone is over: this process can be a member of the next.
    pub fn ends_generation_only(&self) -> bool {
        matches!(self, Self::Failed { .. } | Self::TimedOut { .. } | Self::Aborted(_) | Self::Host(_))
    }
}

/// A failed call, in NCCL's own terms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallError {
    /// The function's name in nccl.h.
    pub call: &'static str,
    pub code: i32,
    /// What `ncclGetLastError` said; may be empty, or about something earlier.
    pub last_error: String,
}

impl CallError {
    fn name(&self) -> &'static str {
        match self.code {
            1 => "an unhandled CUDA error",
            2 => "a system error",
            3 => "an internal error",
            4 => "an invalid argument",
            5 => "an invalid usage",
            6 => "a remote error",
            _ => "an unknown error",
        }
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { call, code, last_error } = self;
        write!(f, "{call} says {} ({code}){}", self.name(), in_brackets(last_error))
    }
}

/// What the caller was at, and since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    pub what: What,
    pub waited: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The ranks to connect.
    Init { rank: u32, world: u32 },
    /// A call to be enqueued.
    Launch(Tag),
    /// The device to be done with all calls up to this one.
    Completion(Tag),
    /// The peers to let go of each other.
    Finalize,
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let call = |f: &mut fmt::Formatter<'_>, verb, Tag { step, bucket, phase }| {
            write!(f, "{verb} bucket {bucket} of step {step} ({phase})")
        };
        match *self {
            Self::Init { rank, world } => write!(f, "connecting as rank {rank} of {world}"),
            Self::Launch(tag) => call(f, "launching", tag),
            Self::Completion(tag) => call(f, "waiting for", tag),
            Self::Finalize => write!(f, "letting go of the peers"),
        }
    }
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} for {:.1} s", self.what, self.waited.as_secs_f64())
    }
}

fn during(wait: &Option<Wait>) -> String {
    wait.map_or_else(String::new, |wait| format!(" while {wait}"))
}

fn in_brackets(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(" ({text})") }
}
