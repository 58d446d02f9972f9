//! What a simulated replica holds: its label, the list of the steps that were applied to it, and running
//! statistics that differ between ranks until they are pooled.

use std::rc::Rc;

use musher_proto::{
    digest,
    ids::{Epoch, Generation, Rank, Step},
    message::{EpochTotals, ReplicaLabel},
    shard::{Permutation, StepShard, scramble},
};

pub const STATE_BYTES: u64 = 48;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    /// Lineage 0: it holds nothing of the run.
    pub label: ReplicaLabel,
    /// Of its whole history, in order.
    pub steps: Rc<Vec<AppliedStep>>,
    parameters: u64,
    statistics: u64,
    pooled_at: Option<Step>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppliedStep {
    /// That took it: another team's arithmetic rounds otherwise.
    pub generation: Generation,
    pub epoch: Epoch,
    pub samples: Vec<u64>,
}

impl Replica {
    pub fn seeded(seed: u64) -> Self {
        let label = ReplicaLabel { lineage: Generation(0), applied: Step(0), epoch: Epoch(0), cursor: 0 };
        Self { label, steps: Rc::default(), parameters: scramble(seed), statistics: 0, pooled_at: None }
    }

    pub fn held(&self) -> Option<ReplicaLabel> {
        (self.label.lineage != Generation(0)).then_some(self.label)
    }

    /// Another's state, as this worker holds it in its own lineage.
    pub fn adopted(state: &Self, lineage: Generation) -> Self {
        Self { label: ReplicaLabel { lineage, ..state.label }, ..state.clone() }
    }

    pub fn begin_epoch(&mut self, epoch: Epoch) {
        (self.label.epoch, self.label.cursor) = (epoch, 0);
    }

    /// One step on a global batch, of which this rank saw `shard`.
    pub fn apply(&mut self, order: &Permutation, shard: &StepShard, rank: Rank) {
        let samples: Vec<u64> = shard.positions.clone().map(|position| order.at(position)).collect();
        let ReplicaLabel { lineage: generation, epoch, .. } = self.label;
        self.parameters = scramble(self.parameters ^ scramble(generation.0));
        for &sample in &samples {
            self.parameters = scramble(self.parameters ^ scramble(sample + 1));
        }
        if !shard.sample_ids.is_empty() {
            self.statistics = scramble(self.statistics ^ scramble(u64::from(rank.0) + 1) ^ self.parameters);
        }
        Rc::make_mut(&mut self.steps).push(AppliedStep { generation, epoch, samples });
        self.label.applied = self.label.applied.next();
        self.label.cursor = shard.positions.end;
    }

    /// This rank's contribution to the pooled statistics; `None` where they are pooled already.
    pub fn unpooled(&self) -> Option<u64> {
        (self.pooled_at != Some(self.label.applied)).then_some(self.statistics)
    }

    pub fn pool(&mut self, all_ranks: u64) {
        (self.statistics, self.pooled_at) = (all_ranks, Some(self.label.applied));
    }

    /// Everything but the lineage, which each holder writes for itself.
    pub fn bytes(&self) -> [u8; STATE_BYTES as usize] {
        let ReplicaLabel { applied, epoch, cursor, .. } = self.label;
        let pooled = self.pooled_at.map_or(0, |step| step.0 + 1);
        let words = [self.parameters, self.statistics, applied.0, u64::from(epoch.0), cursor, pooled];
        let mut bytes = [0; STATE_BYTES as usize];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    pub fn digest(&self) -> u64 {
        digest::of_slice(0, &self.bytes())
    }

    pub fn digest_of(&self, offset: u64, length: u64) -> u64 {
        let range = offset as usize..(offset + length) as usize;
        self.bytes().get(range).map_or(0, |slice| digest::of_slice(offset / 4, slice))
    }

    pub fn totals(&self) -> EpochTotals {
        EpochTotals { loss_sum: self.label.cursor as f64, steps_skipped: 0 }
    }
}
