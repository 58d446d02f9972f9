//! Which fault strikes next: drawn from a seed and from nothing else, whatever the run makes of it.

use std::{fmt, time::Duration};

use rand::{RngExt, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

/// Workers are meant by their place in the team, from 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// SIGKILL; the next process of its name starts after a while.
    KillWorker {
        worker: usize,
        back_after: Duration,
    },
    /// SIGSTOP, then SIGCONT: for a moment, or longer than its heartbeat may be missed.
    StopWorker {
        worker: usize,
        length: Duration,
    },
    /// SIGTERM; the next process of its name starts after it has left.
    DrainWorker {
        worker: usize,
        back_after: Duration,
    },
    /// Its training thread stands still, the rest of its process goes on.
    HoldTrainingThread {
        worker: usize,
        length: Duration,
    },
    /// One more than the team had, for a while.
    AddWorker {
        stays: Duration,
    },
    KillCoordinator {
        back_after: Duration,
    },
    StopCoordinator {
        length: Duration,
    },
    /// Everything is killed, and the newest checkpoint is damaged unless it is the only one.
    LoseEverything {
        back_after: Duration,
    },
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Strike {
    /// Since the team has recovered from the strike before, or since that strike.
    pub pause: Duration,
    /// Without waiting for the team to recover from the strike before.
    pub at_once: bool,
    pub fault: Fault,
}

/// An endless sequence of strikes. Each kind comes as often as it is in the deck, which is shuffled anew
/// when it is used up.
#[derive(Debug)]
pub struct Plan {
    random: ChaCha8Rng,
    workers: usize,
    deck: Vec<Kind>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    KillWorker,
    StopWorker,
    DrainWorker,
    HoldTrainingThread,
    AddWorker,
    KillCoordinator,
    StopCoordinator,
    LoseEverything,
}

const DECK: [(Kind, usize); 8] = [
    (Kind::KillWorker, 3),
    (Kind::StopWorker, 3),
    (Kind::DrainWorker, 2),
    (Kind::HoldTrainingThread, 1),
    (Kind::AddWorker, 1),
    (Kind::KillCoordinator, 3),
    (Kind::StopCoordinator, 1),
    (Kind::LoseEverything, 1),
];

/// One strike in so many does not wait.
const HASTE: u32 = 4;

impl Plan {
    pub fn new(seed: u64, workers: usize) -> Self {
        Self { random: ChaCha8Rng::seed_from_u64(seed), workers, deck: Vec::new() }
    }

    fn kind(&mut self) -> Kind {
        if self.deck.is_empty() {
            self.deck = DECK.iter().flat_map(|&(kind, count)| vec![kind; count]).collect();
            self.deck.shuffle(&mut self.random);
        }
        self.deck.pop().expect("it was filled just now")
    }

    fn seconds(&mut self, least: f64, most: f64) -> Duration {
        Duration::from_secs_f64(self.random.random_range(least..most))
    }
}

impl Iterator for Plan {
    type Item = Strike;

    fn next(&mut self) -> Option<Strike> {
        let at_once = self.random.random_ratio(1, HASTE);
        let pause = self.seconds(0.2, 1.5);
        let worker = self.random.random_range(0..self.workers);
        let fault = match self.kind() {
            Kind::KillWorker => Fault::KillWorker { worker, back_after: self.seconds(0.1, 1.5) },
            Kind::StopWorker => Fault::StopWorker { worker, length: self.seconds(0.2, 4.0) },
            Kind::DrainWorker => Fault::DrainWorker { worker, back_after: self.seconds(0.1, 1.5) },
            Kind::HoldTrainingThread => Fault::HoldTrainingThread { worker, length: self.seconds(1.0, 7.0) },
            Kind::AddWorker => Fault::AddWorker { stays: self.seconds(2.0, 6.0) },
            Kind::KillCoordinator => Fault::KillCoordinator { back_after: self.seconds(0.05, 3.0) },
            Kind::StopCoordinator => Fault::StopCoordinator { length: self.seconds(0.2, 4.0) },
            Kind::LoseEverything => Fault::LoseEverything { back_after: self.seconds(0.05, 1.0) },
        };
        Some(Strike { pause, at_once, fault })
    }
}

impl Fault {
    pub fn kind(&self) -> Kind {
        match self {
            Self::KillWorker { .. } => Kind::KillWorker,
            Self::StopWorker { .. } => Kind::StopWorker,
            Self::DrainWorker { .. } => Kind::DrainWorker,
            Self::HoldTrainingThread { .. } => Kind::HoldTrainingThread,
            Self::AddWorker { .. } => Kind::AddWorker,
            Self::KillCoordinator { .. } => Kind::KillCoordinator,
            Self::StopCoordinator { .. } => Kind::StopCoordinator,
            Self::LoseEverything { .. } => Kind::LoseEverything,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::KillWorker => "worker killed",
            Self::StopWorker => "worker stopped",
            Self::DrainWorker => "worker drained",
            Self::HoldTrainingThread => "training thread held",
            Self::AddWorker => "worker added",
            Self::KillCoordinator => "coordinator killed",
            Self::StopCoordinator => "coordinator stopped",
            Self::LoseEverything => "everything lost",
        })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind())?;
        match self {
            Self::KillWorker { worker, back_after } | Self::DrainWorker { worker, back_after } => {
                write!(f, ": {worker}, back after {:.2} s", back_after.as_secs_f64())
            }
            Self::StopWorker { worker, length } | Self::HoldTrainingThread { worker, length } => {
                write!(f, ": {worker}, for {:.2} s", length.as_secs_f64())
            }
            Self::AddWorker { stays: length } | Self::StopCoordinator { length } => {
                write!(f, " for {:.2} s", length.as_secs_f64())
            }
            Self::KillCoordinator { back_after } | Self::LoseEverything { back_after } => {
                write!(f, ", back after {:.2} s", back_after.as_secs_f64())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_a_sequence() {
        let drawn = |seed| Plan::new(seed, 4).take(50).collect::<Vec<_>>();
        assert_eq!(drawn(7), drawn(7));
        assert_ne!(drawn(7), drawn(8));
    }

    #[test]
    fn a_deck_has_all_kinds() {
        let cards = DECK.iter().map(|(_, count)| count).sum();
        let mut kinds: Vec<_> = Plan::new(1, 4).take(cards).map(|strike| strike.fault.kind()).collect();
        kinds.sort_unstable();
        kinds.dedup();
        assert_eq!(kinds.len(), DECK.len());
    }
}
