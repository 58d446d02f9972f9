//! One checkpoint from the request to the commit: which parts are awaited, and whether they agree.

use std::{collections::BTreeSet, time::Duration};

use musher_proto::{
    ids::{CheckpointId, Rank, Session, WorkerId},
    message::{PartHeader, PartKind, Save},
};

use super::{
    effects::{Commit, Time},
    peers::Peers,
    roster::Team,
};

/// All replicas hold the same, so a part more than the store's link can use is a file more to write, and nothing gained.
const MOST_UPLOADERS: u32 = 64;

/// A checkpoint whose parts are on their way. It commits only when all are there and all carry the
/// label that was asked for.
#[derive(Clone, Debug)]
pub struct OpenCheckpoint {
    pub commit: Commit,
    pub opened: Time,
    /// The longest time that a training thread was held.
    pub stall_ms: f64,
    /// The store is committing it; nothing is awaited from workers any more.
    pub committing: bool,
    /// When it was opened, or its last part was stored.
    pub moved: Time,
    patience: Duration,
    awaited: BTreeSet<(WorkerId, Part)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    State,
    Weights,
}

impl OpenCheckpoint {
    /// Splits the state over the team, and asks rank 0 for the weights too where `weights` holds their
    /// metadata.
    pub fn plan(
        commit: Commit,
        weights: Option<String>,
        team: &Team,
        peers: &Peers,
        now: Time,
        patience: Duration,
    ) -> (Self, Vec<(Session, Save)>) {
        let mut awaited = BTreeSet::new();
        let uploaders = team.world().min(MOST_UPLOADERS);
        let saves = team
            .members()
            .take(uploaders as usize)
            .map(|(rank, session)| {
                let slice = slice(commit.state_bytes, rank, uploaders);
                let weights = weights.clone().filter(|_| rank == Rank(0));
                if let Some(peer) = peers.get(&session) {
                    awaited.insert((peer.worker().clone(), Part::State));
                    if weights.is_some() {
                        awaited.insert((peer.worker().clone(), Part::Weights));
                    }
                }
                let save = Save {
                    checkpoint: commit.checkpoint.clone(),
                    offset: slice.start,
                    length: slice.end - slice.start,
                    weights,
                };
                (session, save)
            })
            .collect();
        let open =
            Self { commit, opened: now, stall_ms: 0.0, committing: false, moved: now, patience, awaited };
        (open, saves)
    }

    /// When it is given up; `None` while nothing is awaited from workers.
    pub fn deadline(&self) -> Option<Time> {
        (!self.committing).then(|| self.moved + self.patience)
    }

    /// Who let the deadline pass.
    pub fn overdue(&self) -> String {
        let workers: BTreeSet<&str> = self.awaited.iter().map(|(worker, _)| worker.as_str()).collect();
        format!(
            "no part was stored for {:.0} s (10 x cluster.step_timeout_s), and {} still owed one",
            self.patience.as_secs_f64(),
            Vec::from_iter(workers).join(", ")
        )
    }

    pub fn id(&self) -> &CheckpointId {
        &self.commit.checkpoint
    }

    /// Whether the part is of an earlier attempt at this checkpoint, before the team was formed anew.
    pub fn is_outdated(&self, header: &PartHeader) -> bool {
        header.lineage < self.commit.position.lineage
    }

    /// Takes note of a stored part; `Ok(true)` when it was the last.
    ///
    /// # Errors
    /// A sentence, if the part belongs to another moment of the run: the checkpoint must be abandoned.
    pub fn part_stored(&mut self, header: &PartHeader, now: Time) -> Result<bool, String> {
        self.moved = now;
        let position = self.commit.position;
        if (header.lineage, header.applied) != (position.lineage, position.applied) {
            return Err(format!(
                "worker {} sent the state of generation {} after step {}, not of generation {} after step {}",
                header.worker, header.lineage, header.applied, position.lineage, position.applied,
            ));
        }
        let part = match header.kind {
            PartKind::State { .. } => Part::State,
            PartKind::Weights => Part::Weights,
        };
        self.stall_ms = self.stall_ms.max(header.stall_ms);
        self.awaited.remove(&(header.worker.clone(), part));
        Ok(self.awaited.is_empty())
    }

    /// Whether a part of this worker's is still to come.
    pub fn awaits(&self, worker: &WorkerId) -> bool {
        [Part::State, Part::Weights].into_iter().any(|part| self.awaited.contains(&(worker.clone(), part)))
    }
}

/// The bytes of the state that `rank` uploads; whole words.
fn slice(state_bytes: u64, rank: Rank, world: u32) -> std::ops::Range<u64> {
    let words = musher_proto::shard::share(0..state_bytes.div_ceil(4), rank, world);
    (words.start * 4).min(state_bytes)..(words.end * 4).min(state_bytes)
}

#[cfg(test)]
mod tests {
    use musher_proto::ids::{Generation, Session};

    use super::*;
    use crate::core::effects::{Position, RunProgress};

    fn saves(world: u64) -> Vec<Save> {
        let position = Position {
            lineage: Generation(1),
            applied: musher_proto::ids::Step(8),
            epoch: musher_proto::ids::Epoch(1),
            cursor: 0,
        };
        let commit = Commit {
            checkpoint: "c".into(),
            position,
            state_bytes: 763_000_000,
            state_digest: 1,
            world_size: world as u32,
            dataset_digest: String::new(),
            progress: RunProgress::default(),
            is_best: true,
            is_last: false,
        };
        let team = Team::new(Generation(1), (1..=world).map(Session).collect());
        let (now, patience) = (Time::ZERO, Duration::from_secs(1));
        let (_, saves) =
            OpenCheckpoint::plan(commit, Some("{}".into()), &team, &Peers::default(), now, patience);
        saves.into_iter().map(|(_, save)| save).collect()
    }

    #[test]
    fn the_parts_tile_the_state_and_are_not_more_than_are_of_use() {
        for (world, parts) in [(1, 1), (3, 3), (64, 64), (10_000, 64)] {
            let saves = saves(world);
            assert_eq!(saves.len(), parts);
            let end = saves.iter().fold(0, |at, save| {
                assert_eq!(save.offset, at);
                at + save.length
            });
            assert_eq!(end, 763_000_000);
            assert_eq!(saves.iter().filter(|save| save.weights.is_some()).count(), 1);
        }
    }
}
