//! How an exchange fails. It says what this rank saw of its neighbours; it does not say who is to
//! blame: a neighbour may have closed or stalled only because the one behind it did.

use std::{fmt, io, time::Duration};

use crate::{Frame, Phase};

/// Why the ring was not formed, or a collective call did not complete.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// A neighbour's connection ended in mid-call.
    #[error("rank {rank} closed its connection; report it and form the next generation")]
    PeerClosed { rank: u32 },

    /// Nothing was sent or received for the whole step time-out.
    #[error(
        "rank {rank} made no progress for {:.1} s in step {step} ({phase}); report it, or raise \
         cluster.step_timeout_s if steps are that slow", .waited.as_secs_f64()
    )]
    Timeout { rank: u32, waited: Duration, phase: Phase, step: u64 },

    /// [`Aborter::abort`](crate::Aborter::abort) was called.
    #[error("the exchange was aborted; form the next generation")]
    Aborted,

    /// A neighbour sent another frame than the one due.
    #[error("rank {rank} is out of step: expected {expected}, received {found}; form the next generation")]
    Protocol { rank: u32, expected: Frame, found: Frame },

    /// A neighbour was not there when the formation's deadline passed.
    #[error(
        "generation {generation} formed no ring in {:.1} s: no connection with its {neighbour}, rank \
         {rank} ({reason}); check that the advertised ring addresses can be reached",
        .waited.as_secs_f64()
    )]
    NotFormed { generation: u64, rank: u32, neighbour: Neighbour, waited: Duration, reason: String },

    /// The caller's arguments contradict each other.
    #[error("invalid arguments: {0}")]
    Invalid(String),

    /// The operating system refused.
    #[error("cannot {action}: {message}; check the network and the limits of this process")]
    Io { action: &'static str, kind: io::ErrorKind, message: String },
}

impl CollectiveError {
    pub(crate) fn io(action: &'static str, error: impl Into<io::Error>) -> Self {
        let error = error.into();
        Self::Io { action, kind: error.kind(), message: error.to_string() }
    }

    /// The error of a socket shared with `rank`: its end, where that is what the error means.
    pub(crate) fn link(rank: u32, action: &'static str, error: io::Error) -> Self {
        use io::ErrorKind::*;
        match error.kind() {
            BrokenPipe | ConnectionReset | ConnectionAborted | NotConnected | UnexpectedEof | TimedOut
            | HostUnreachable | NetworkUnreachable => Self::PeerClosed { rank },
            _ => Self::io(action, error),
        }
    }
}

/// A position in the ring, relative to this rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Neighbour {
    Predecessor,
    Successor,
}

impl fmt::Display for Neighbour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Predecessor => "predecessor",
            Self::Successor => "successor",
        })
    }
}
