//! The checkpoints on disk, as `coordinator/src/store` keeps them: invisible until they are complete,
//! never replaced, pruned down to the newest and the best.

use std::collections::BTreeMap;

use musher_coordinator::core::{Commit, ResumePoint, RunState};
use musher_proto::{
    ids::CheckpointId,
    message::{PartHeader, PartKind},
};

use super::replica::Replica;

#[derive(Debug, Default)]
pub struct Store {
    pub committed: BTreeMap<CheckpointId, Checkpoint>,
    /// Faults that keep anything from being written now.
    pub full: u32,
    commits: u64,
}

#[derive(Clone, Debug)]
pub struct Checkpoint {
    pub commit: Commit,
    pub state: Replica,
    /// Counts up, as its time would.
    created: u64,
}

impl Store {
    /// # Errors
    /// The parts do not make up the state, or nothing can be written.
    pub fn commit(&mut self, commit: &Commit, parts: &[(PartHeader, Replica)]) -> Result<(), String> {
        if self.full > 0 {
            return Err("no space left on the device".into());
        }
        let mut slices: Vec<(u64, u64, u64)> = parts
            .iter()
            .filter_map(|(header, _)| match header.kind {
                PartKind::State { offset, digest } => Some((offset, header.length, digest)),
                PartKind::Weights => None,
            })
            .collect();
        slices.sort_unstable();
        let covered =
            slices.iter().try_fold(0, |end, &(offset, length, _)| (offset == end).then_some(end + length));
        if covered != Some(commit.state_bytes) {
            return Err(format!("the parts {slices:?} do not tile the state"));
        }
        if slices.iter().fold(0u64, |sum, slice| sum.wrapping_add(slice.2)) != commit.state_digest {
            return Err("the parts' digests do not add up to the state's".into());
        }
        let Some((_, state)) = parts.first() else { return Err("there are no parts".into()) };
        self.commits += 1;
        let checkpoint = Checkpoint { commit: commit.clone(), state: state.clone(), created: self.commits };
        self.committed.insert(commit.checkpoint.clone(), checkpoint);
        Ok(())
    }

    pub fn prune(&mut self, keep: usize, best: Option<&CheckpointId>) {
        let surplus: Vec<CheckpointId> =
            self.newest_first().skip(keep).map(|checkpoint| checkpoint.commit.checkpoint.clone()).collect();
        for id in surplus.iter().filter(|id| Some(*id) != best) {
            self.committed.remove(id);
        }
    }

    fn newest_first(&self) -> impl Iterator<Item = &Checkpoint> {
        let mut all: Vec<&Checkpoint> = self.committed.values().collect();
        all.sort_by_key(|checkpoint| {
            let position = checkpoint.commit.position;
            std::cmp::Reverse((position.lineage, position.applied, checkpoint.created))
        });
        all.into_iter()
    }

    pub fn newest(&self) -> Option<&Checkpoint> {
        self.newest_first().next()
    }

    /// As `coordinator/src/run_dir.rs` does it.
    pub fn resume_point(&self, state: &mut RunState) -> Option<ResumePoint> {
        let Commit { checkpoint, position, progress, dataset_digest, .. } = self.newest()?.commit.clone();
        if state.fences.lineage < position.lineage {
            let generation = state.fences.generation.max(position.lineage).next();
            (state.fences.generation, state.fences.lineage) = (generation, generation);
        }
        Some(ResumePoint { checkpoint, position, progress, dataset_digest })
    }
}
