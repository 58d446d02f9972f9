//! How an exchange fails. It says what this rank saw of its neighbours; it does not say who is to
//! blame: a neighbour may have closed or stalled only because the one behind it did.

use std::{fmt, io, time::Duration};

use crate::{Frame, Tag};

/// Why the ring was not formed, or a collective call did not complete.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    /// A neighbour's connection ended in mid-call.
    #[error("rank {rank} closed its connection {}", .waited.place())]
    PeerClosed { rank: u32, waited: Waited },

    /// What was sent to a neighbour was not acknowledged, or the network says that it is not there.
    #[error("rank {} can't be reached {} ({reason}); check the network between the two", .waited.rank, .waited.place())]
    Unreachable { waited: Waited, reason: String },

    /// Nothing was sent or received for as long as a call waits.
    #[error("rank {} made no progress for {:.1} s {}; report it", .0.rank, .0.idle.as_secs_f64(), .0.place())]
    Timeout(Waited),

    /// [`Aborter::abort`](crate::Aborter::abort) was called, and found this rank in a call or not.
    #[error("the exchange was aborted")]
    Aborted(Option<Waited>),

    /// A neighbour sent another frame than the one due.
    #[error("rank {rank} is out of step: expected {expected}, received {found}")]
    Protocol { rank: u32, expected: Frame, found: Frame },

    /// A neighbour was not there when the formation's deadline passed.
    #[error(
        "generation {generation} formed no ring in {:.1} s: no connection with its {neighbour}, rank \
         {} ({reason}); check that the advertised ring addresses can be reached",
        .waited.idle.as_secs_f64(), .waited.rank
    )]
    NotFormed { generation: u64, neighbour: Neighbour, waited: Waited, reason: String },

    /// The caller's arguments contradict each other.
    #[error("invalid arguments: {0}")]
    Invalid(String),

    /// The operating system refused.
    #[error("cannot {action}: {message}; check the network and the limits of this process")]
    Io { action: &'static str, kind: io::ErrorKind, message: String },
}

/// Whom a rank waited for when its part in the exchange ended: evidence, no verdict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waited {
    /// The neighbour.
    pub rank: u32,
    /// `None` while the ring was being formed.
    pub call: Option<Tag>,
    /// Since anything was sent or received last, in this call.
    pub idle: Duration,
    /// What this rank had of the generation's exchange: [`Meter::received`](crate::Meter::received).
    pub received: u64,
    /// What it had given to its successor, counted alike. A rank in the call takes all that arrives: if its
    /// predecessor has sent more than it received, the link between them does not carry it.
    pub sent: u64,
    /// This very neighbour ended the connection.
    pub closed: bool,
}

impl Waited {
    fn place(&self) -> String {
        match self.call {
            Some(Tag { step, phase, .. }) => format!("in step {step} ({phase})"),
            None => "while the ring was formed".into(),
        }
    }
}

impl CollectiveError {
    /// Whom this rank waited for, if it did.
    pub fn waited(&self) -> Option<&Waited> {
        match self {
            Self::PeerClosed { waited, .. }
            | Self::Unreachable { waited, .. }
            | Self::Timeout(waited)
            | Self::NotFormed { waited, .. } => Some(waited),
            Self::Aborted(waited) => waited.as_ref(),
            Self::Protocol { .. } | Self::Invalid(_) | Self::Io { .. } => None,
        }
    }

    pub(crate) fn io(action: &'static str, error: impl Into<io::Error>) -> Self {
        let error = error.into();
        Self::Io { action, kind: error.kind(), message: error.to_string() }
    }
}

/// How waiting for the neighbours ended, where it is not known how long it was and in what call.
#[derive(Debug)]
pub(crate) enum Break {
    Aborted,
    TimedOut,
    Closed {
        rank: u32,
    },
    Unreachable {
        rank: u32,
        reason: String,
    },
    /// With nobody to wait for.
    Other(CollectiveError),
}

impl Break {
    /// The error of a socket shared with `rank`.
    pub fn link(rank: u32, action: &'static str, error: io::Error) -> Self {
        use io::ErrorKind::*;
        match error.kind() {
            BrokenPipe | ConnectionReset | ConnectionAborted | NotConnected | UnexpectedEof => {
                Self::Closed { rank }
            }
            TimedOut | HostUnreachable | NetworkUnreachable => {
                Self::Unreachable { rank, reason: error.to_string() }
            }
            _ => Self::Other(CollectiveError::io(action, error)),
        }
    }

    /// With the evidence: `waited` says whom this rank waited for. A close of the other neighbour's is
    /// none against it: whoever is aborted closes, those that were stuck with it too.
    pub fn with(self, waited: Waited) -> CollectiveError {
        match self {
            Self::Aborted => CollectiveError::Aborted(Some(waited)),
            Self::TimedOut => CollectiveError::Timeout(waited),
            Self::Closed { rank } => {
                let closed = rank == waited.rank;
                CollectiveError::PeerClosed { rank, waited: Waited { closed, ..waited } }
            }
            Self::Unreachable { rank, reason } => {
                CollectiveError::Unreachable { waited: Waited { rank, ..waited }, reason }
            }
            Self::Other(error) => error,
        }
    }
}

impl From<CollectiveError> for Break {
    fn from(error: CollectiveError) -> Self {
        Self::Other(error)
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
