//! A segment: steps in a row without a word to the coordinator.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use musher_collective::{Phase, Tag};
use musher_dataset::BatchPlan;
use musher_proto::{
    message::{Activity, EpochTotals, Phase as WorkerPhase, ReplicaLabel, Train},
    shard::Segment,
};

use super::{Membership, TrainError, Trainer, step::Next};

/// Asks the team to stop after the step in flight. Any rank's is enough: the flag travels in the
/// control word, so all stop after the same step.
#[derive(Clone, Debug, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    pub fn raise(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_raised(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// The team stands between two steps; all ranks report the same.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SegmentEnd {
    pub held: ReplicaLabel,
    /// Stopped on request before the segment's end.
    pub paused: bool,
    pub totals: EpochTotals,
    pub state_digest: u64,
}

impl Trainer {
    /// Trains from the cursor to the segment's end, then pools batch norm's statistics over the ranks.
    ///
    /// `after_step` sees each applied step's loss. After an error the membership is over, and the replica holds its last
    /// applied step.
    pub fn train(
        &mut self,
        member: &mut Membership,
        order: Train,
        stop: &StopFlag,
        mut after_step: impl FnMut(f64),
    ) -> Result<SegmentEnd, TrainError> {
        let end = self.train_segment(member, order, stop, &mut after_step);
        if end.is_err() {
            self.abandon(member, &mut after_step)?;
        }
        end
    }

    fn train_segment(
        &mut self,
        member: &mut Membership,
        order: Train,
        stop: &StopFlag,
        after_step: &mut impl FnMut(f64),
    ) -> Result<SegmentEnd, TrainError> {
        self.board.enter(WorkerPhase::Training);
        let position = self.position();
        if position.epoch != order.epoch {
            self.replica.set_counters(position.at_start_of(order.epoch).to_counters());
        }
        let cursor = self.position().cursor;
        if cursor != order.cursor {
            return Err(TrainError::OutOfOrder { cursor, ordered: order.cursor });
        }
        let segment = Segment {
            seed: self.job.seed,
            epoch: order.epoch,
            cursor: order.cursor,
            end: order.end,
            samples: self.data.train_samples(),
            global_batch: u64::from(self.job.train.global_batch),
        };
        let (rank, world) = (member.rank(), member.world());
        let plan = segment.steps(rank, world).map(move |shard| BatchPlan {
            key: shard.positions.start,
            epoch: order.epoch.0,
            sample_ids: shard.sample_ids,
        });
        let mut loader = self.data.training(plan)?;
        for shard in segment.steps(rank, world) {
            self.board.mark(Activity::WaitingForData);
            let Some(batch) = loader.next() else { break };
            let next = self.step(member, &batch?, shard.positions, stop.is_raised(), after_step)?;
            if next == Next::Stop {
                break;
            }
        }
        self.finish_step(member, after_step)?;
        self.board.mark(Activity::Working);
        self.pool_batch_norm(member)?;
        let position = self.position();
        let (paused, totals) = (position.cursor < segment.end, position.totals);
        let state_digest = self.replica.state_digest()?;
        Ok(SegmentEnd { held: self.label(), paused, totals, state_digest })
    }

    /// Makes the running statistics those of all samples that the team has seen. Once per stopping
    /// point: a re-formed team that stands at one already skips it.
    fn pool_batch_norm(&mut self, member: &mut Membership) -> Result<(), TrainError> {
        let mut position = self.position();
        if position.pooled_at == Some(position.applied) {
            return Ok(());
        }
        // Those over all ranks' batches are the same bits everywhere already.
        if member.batch_norm.is_none() {
            let mut sums = self.replica.pooled_moments(self.unpooled_samples)?;
            self.board.mark(Activity::WaitingForPeers);
            let tag = Tag::new(position.applied.0, 0, Phase::BatchNorm);
            member.hosts.0.all_reduce_f64(tag, &mut sums)?;
            self.board.mark(Activity::Working);
            self.replica.set_pooled(&sums, member.world() as usize)?;
        }
        self.unpooled_samples = 0;
        position.pooled_at = Some(position.applied);
        self.replica.set_counters(position.to_counters());
        Ok(())
    }

    /// A copy of what a checkpoint wants of this rank, and how long that held the training thread. Whatever
    /// can be done with the copy later is left for later.
    pub fn snapshot(
        &mut self,
        offset: u64,
        length: u64,
        weights: Option<&BTreeMap<String, String>>,
    ) -> Result<Snapshot, TrainError> {
        let started = Instant::now();
        self.board.enter(WorkerPhase::Saving);
        let bytes = self.replica.read_state(offset, length as usize)?;
        let weights = weights.map(|metadata| self.weights(metadata)).transpose()?;
        let stall_ms = started.elapsed().as_secs_f64() * 1e3;
        Ok(Snapshot { held: self.label(), offset, bytes, weights, stall_ms })
    }
}

/// A slice of a replica's state at one moment.
pub struct Snapshot {
    pub held: ReplicaLabel,
    /// Of the slice, in the state.
    pub offset: u64,
    pub bytes: Vec<u8>,
    /// The network's weights as a safetensors file, where they were asked for.
    pub weights: Option<Vec<u8>>,
    pub stall_ms: f64,
}

impl Snapshot {
    /// Of the slice at its place in the state.
    pub fn digest(&self) -> u64 {
        musher_proto::digest::of_slice(self.offset / 4, &self.bytes)
    }
}
