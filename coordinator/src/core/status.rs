//! What the run is doing, for people who ask.

use std::time::Duration;

use musher_proto::{
    ids::{Epoch, Generation, Rank, Step, Term, WorkerId},
    job::Monitor,
    message::Progress,
    scores::Scores,
};

use super::{Core, Phase, early_stopping::Best, effects::Time, peers::Peer, reasons::what_it_does};

/// What the run is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunPhase {
    Waiting,
    Forming,
    Training,
    Validating,
    Saving,
    /// Workers that come are told how.
    Ended,
}

#[derive(Clone, Debug)]
pub struct RunStatus {
    pub run: String,
    pub phase: RunPhase,
    /// Workers that the job asks for; 0: whoever comes.
    pub wanted: u32,
    pub term: Term,
    pub generation: Generation,
    pub epochs: u32,
    pub train_samples: u64,
    /// Of the rank that speaks for the team; `None` before anything was trained.
    pub progress: Option<Progress>,
    /// That the newest applied step was made with.
    pub learning_rate: Option<f64>,
    /// Seconds to the epoch limit, training only; `None` while the rate is unknown.
    pub eta_s: Option<f64>,
    pub monitor: Monitor,
    /// Epoch, step and cursor that the next team goes on from, as things are: of the newest state that somebody holds, or
    /// of the newest checkpoint.
    pub resting: (Epoch, Step, u64),
    /// Of the last epoch that was judged, also in a life of the coordinator before this one.
    pub last_scores: Option<Scores>,
    pub best: Option<Best>,
    pub peers: Vec<PeerStatus>,
    /// The last abort or removal, as a sentence.
    pub last_trouble: Option<String>,
}

#[derive(Clone, Debug)]
pub struct PeerStatus {
    pub worker: WorkerId,
    pub rank: Option<Rank>,
    pub host: String,
    pub device: String,
    pub progress: Option<Progress>,
    /// In words.
    pub doing: String,
    /// Since its last sign of progress in that.
    pub doing_for: Duration,
    pub silent: Duration,
    pub health: Health,
    /// It wants to go, or is told to.
    pub leaving: bool,
}

/// How well a worker keeps up with its team.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    Well,
    /// Named by `worker_slow`, and not well since.
    Slow,
    /// Its stream broke; it may come back.
    Suspect,
    /// Put out for a while.
    Benched,
}

impl RunPhase {
    pub const ALL: [Self; 6] =
        [Self::Waiting, Self::Forming, Self::Training, Self::Validating, Self::Saving, Self::Ended];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting for workers",
            Self::Forming => "forming",
            Self::Training => "training",
            Self::Validating => "validating",
            Self::Saving => "saving",
            Self::Ended => "ended",
        }
    }
}

impl Health {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Well => "well",
            Self::Slow => "slow",
            Self::Suspect => "suspect",
            Self::Benched => "benched",
        }
    }
}

impl RunStatus {
    pub fn epoch(&self) -> Epoch {
        self.progress.map_or(self.resting.0, |progress| progress.epoch)
    }

    /// Samples of the epoch that are applied.
    pub fn cursor(&self) -> u64 {
        self.progress.map_or(self.resting.2, |progress| progress.cursor)
    }

    pub fn team_size(&self) -> usize {
        self.peers.iter().filter(|peer| peer.rank.is_some()).count()
    }

    pub fn applied(&self) -> Step {
        self.progress.map_or(self.resting.1, |progress| progress.applied)
    }
}

impl Core {
    fn resting(&self) -> (Epoch, Step, u64) {
        let held = self.newest_held().map(|held| (held.epoch, held.applied, held.cursor));
        let durable = || {
            let durable = self.durable.as_ref()?;
            durable.checkpoint.position().map(|(epoch, applied)| (epoch, applied, durable.cursor))
        };
        held.or_else(durable).unwrap_or_default()
    }

    pub fn status(&self, now: Time) -> RunStatus {
        let rank_of = |session| self.team().and_then(|team| team.rank_of(session));
        let progress = self
            .team()
            .and_then(|team| self.peers.get(&team.session_of(Rank(0))?))
            .and_then(|peer| peer.progress);
        RunStatus {
            run: self.run.clone(),
            phase: match self.phase {
                Phase::Gathering(_) => RunPhase::Waiting,
                Phase::Forming { .. } => RunPhase::Forming,
                Phase::Training { .. } => RunPhase::Training,
                Phase::Validating { .. } => RunPhase::Validating,
                Phase::Storing { .. } => RunPhase::Saving,
                Phase::Lingering { .. } | Phase::Ended => RunPhase::Ended,
            },
            wanted: self.job.cluster.workers,
            term: self.fences.term,
            generation: self.fences.generation,
            epochs: self.job.train.epochs,
            train_samples: self.train_samples(),
            progress,
            learning_rate: progress.map(|progress| self.learning_rate(progress.applied)),
            eta_s: progress.and_then(|progress| self.eta_s(&progress)),
            monitor: self.job.early_stopping.monitor,
            resting: self.resting(),
            last_scores: self.last_scores,
            last_trouble: self.last_trouble.clone(),
            best: self.progress.early_stopping.best,
            peers: self
                .peers
                .iter()
                .map(|(&session, peer)| PeerStatus {
                    worker: peer.worker().clone(),
                    rank: rank_of(session),
                    host: peer.hello.host.clone(),
                    device: peer.hello.device.clone(),
                    progress: peer.progress,
                    doing: doing(peer, now),
                    doing_for: peer.progress.as_ref().map_or(Duration::ZERO, |progress| {
                        let began =
                            peer.progressed.saturating_sub(Duration::from_millis(progress.in_activity_ms));
                        now.saturating_sub(began)
                    }),
                    silent: now.saturating_sub(peer.heard),
                    health: health(peer),
                    leaving: peer.leaving,
                })
                .collect(),
        }
    }
}

fn health(peer: &Peer) -> Health {
    match peer {
        Peer { suspect: Some(_), .. } => Health::Suspect,
        Peer { benched: Some(_), .. } => Health::Benched,
        Peer { slow, .. } if slow.is_named() => Health::Slow,
        _ => Health::Well,
    }
}

fn doing(peer: &Peer, now: Time) -> String {
    match (&peer.suspect, peer.benched, &peer.progress) {
        (Some(_), ..) => "lost its connection".into(),
        (None, Some(until), _) => format!("put out for {:.0} s", until.saturating_sub(now).as_secs_f64()),
        (None, None, Some(progress)) => what_it_does(progress),
        (None, None, None) => "joining".into(),
    }
}
