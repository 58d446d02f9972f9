//! Why a worker left and why a generation was aborted, as data: people read the sentence, their tools the
//! cause and its fields.

use std::{fmt, time::Duration};

use musher_proto::{
    ids::{Rank, Step, WorkerId},
    message::Progress,
};

/// Who was waited for says what it did: at which step, in which phase, for how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wait {
    pub step: Step,
    /// For example `training, waiting for data`.
    pub phase: String,
    pub waited: Duration,
}

/// Why a worker is not in the run any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Departure {
    /// Its stream ended, and it did not come back in time.
    Disconnected {
        detail: String,
    },
    /// No message for `cluster.heartbeat_timeout_s`.
    Silent(Wait),
    /// Its heartbeat goes on, its training thread does not.
    Stuck {
        wait: Wait,
        budget: Duration,
    },
    /// It and its neighbours can't exchange anything; it may come back after `benched`.
    Unreachable {
        wait: Wait,
        benched: Duration,
    },
    /// It did not leave a generation that was aborted.
    Unresponsive(Wait),
    /// Another process of the same name took its place.
    Replaced,
    /// It said so itself.
    Failed {
        reason: String,
    },
    Drained,
    /// It said goodbye.
    Left,
}

/// Why a generation could not go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AbortCause {
    MemberLost {
        worker: WorkerId,
        rank: Rank,
        departure: Departure,
    },
    /// A member's part of the exchange failed, for the reason that it gave.
    ExchangeBroken {
        worker: WorkerId,
        rank: Rank,
        reason: String,
        wait: Option<Wait>,
    },
    /// Nothing has moved between the members, though all of them wait for each other.
    ExchangeStuck(Wait),
    /// After a sync a rank held another state than rank 0.
    StatesDiffer {
        worker: WorkerId,
        rank: Rank,
    },
    ValidationFailed {
        reason: String,
    },
}

impl Wait {
    /// What the worker said last that it does.
    pub fn of(progress: Option<&Progress>, waited: Duration) -> Self {
        let step = progress.map(|p| p.applied).unwrap_or_default();
        let phase = progress.map_or_else(|| "joining".into(), what_it_does);
        Self { step, phase, waited }
    }
}

/// Phase and activity in words.
pub fn what_it_does(progress: &Progress) -> String {
    use musher_proto::message::{Activity, Phase};
    match (progress.phase, progress.activity) {
        (phase @ (Phase::Loading | Phase::Idle), _) | (phase, Activity::Working) => phase.name().into(),
        (phase, activity) => format!("{}, {}", phase.name(), activity.name()),
    }
}

impl Departure {
    /// For tools.
    /// What [`Self::cause`] can be.
    pub const CAUSES: [&'static str; 9] = [
        "disconnected",
        "silent",
        "stuck",
        "unreachable",
        "unresponsive",
        "replaced",
        "failed",
        "drained",
        "left",
    ];

    pub fn cause(&self) -> &'static str {
        match self {
            Self::Disconnected { .. } => "disconnected",
            Self::Silent(_) => "silent",
            Self::Stuck { .. } => "stuck",
            Self::Unreachable { .. } => "unreachable",
            Self::Unresponsive(_) => "unresponsive",
            Self::Replaced => "replaced",
            Self::Failed { .. } => "failed",
            Self::Drained => "drained",
            Self::Left => "left",
        }
    }

    pub fn wait(&self) -> Option<&Wait> {
        match self {
            Self::Silent(wait)
            | Self::Stuck { wait, .. }
            | Self::Unreachable { wait, .. }
            | Self::Unresponsive(wait) => Some(wait),
            Self::Disconnected { .. } | Self::Replaced | Self::Failed { .. } | Self::Drained | Self::Left => {
                None
            }
        }
    }
}

impl AbortCause {
    /// For tools.
    /// What [`Self::cause`] can be.
    pub const CAUSES: [&'static str; 5] =
        ["member_lost", "exchange_broken", "exchange_stuck", "states_differ", "validation_failed"];

    pub fn cause(&self) -> &'static str {
        match self {
            Self::MemberLost { .. } => "member_lost",
            Self::ExchangeBroken { .. } => "exchange_broken",
            Self::ExchangeStuck(_) => "exchange_stuck",
            Self::StatesDiffer { .. } => "states_differ",
            Self::ValidationFailed { .. } => "validation_failed",
        }
    }

    /// The member that it is about.
    pub fn member(&self) -> Option<(&WorkerId, Rank)> {
        match self {
            Self::MemberLost { worker, rank, .. }
            | Self::ExchangeBroken { worker, rank, .. }
            | Self::StatesDiffer { worker, rank } => Some((worker, *rank)),
            Self::ExchangeStuck(_) | Self::ValidationFailed { .. } => None,
        }
    }

    pub fn wait(&self) -> Option<&Wait> {
        match self {
            Self::MemberLost { departure, .. } => departure.wait(),
            Self::ExchangeBroken { wait, .. } => wait.as_ref(),
            Self::ExchangeStuck(wait) => Some(wait),
            Self::StatesDiffer { .. } | Self::ValidationFailed { .. } => None,
        }
    }
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} s ({}, after step {})", self.waited.as_secs_f64(), self.phase, self.step)
    }
}

impl fmt::Display for Departure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disconnected { detail } => write!(f, "{detail} and it did not come back"),
            Self::Silent(wait) => write!(f, "it was silent for {wait}, cluster.heartbeat_timeout_s"),
            Self::Stuck { wait, budget } => write!(
                f,
                "it has made no progress for {wait}, and {:.1} s are allowed (from cluster.step_timeout_s)",
                budget.as_secs_f64()
            ),
            Self::Unreachable { wait, benched } => write!(
                f,
                "nothing came through between it and its neighbours for {wait}; it is taken in again after {:.0} s",
                benched.as_secs_f64()
            ),
            Self::Unresponsive(wait) => {
                write!(f, "it did not leave the aborted generation in time: no progress for {wait}")
            }
            Self::Replaced => f.write_str("another process of its name took its place"),
            Self::Failed { reason } => f.write_str(reason),
            Self::Drained => f.write_str("it was drained"),
            Self::Left => f.write_str("it said goodbye"),
        }
    }
}

impl fmt::Display for AbortCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MemberLost { worker, rank, departure } => {
                write!(f, "worker {worker} (rank {rank}) left: {departure}")
            }
            Self::ExchangeBroken { worker, rank, reason, .. } => {
                write!(f, "worker {worker} (rank {rank}) lost its peers: {reason}")
            }
            Self::ExchangeStuck(wait) => {
                write!(f, "nothing moved between the workers, all waiting for each other, for {wait}")
            }
            Self::StatesDiffer { worker, rank } => {
                write!(f, "after the sync worker {worker} (rank {rank}) holds another state than rank 0")
            }
            Self::ValidationFailed { reason } => f.write_str(reason),
        }
    }
}
