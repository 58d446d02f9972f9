//! Batch norm's sums over the ranks in the midst of forward and backward, on a ring of their own: the gradients'
//! ring is busy with buckets meanwhile, in an order of its own.

use std::{
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use musher_collective::{Collective, CollectiveError, Phase, Tag};
use musher_model::{OverRanks, SumOverRanks};
use musher_proto::{ids::Step, message::Activity};

use super::{ProgressBoard, TrainError};

/// The ring, shared with the hooks in a step's backward pass, which run on the training thread too.
#[derive(Clone)]
pub struct SyncBatchNorm(Arc<Mutex<Sums>>);

struct Sums {
    collective: Box<dyn Collective>,
    board: Arc<ProgressBoard>,
    step: Step,
    /// In this step.
    waited: Duration,
    failure: Option<CollectiveError>,
}

impl SyncBatchNorm {
    pub fn new(collective: Box<dyn Collective>, board: Arc<ProgressBoard>) -> Self {
        let (step, waited, failure) = (Step(0), Duration::ZERO, None);
        Self(Arc::new(Mutex::new(Sums { collective, board, step, waited, failure })))
    }

    pub(super) fn begin(&self, step: Step) {
        let mut sums = self.lock();
        sums.step = step;
        sums.waited = Duration::ZERO;
    }

    /// How long this rank has waited in this step's sums.
    pub(super) fn waited(&self) -> Duration {
        self.lock().waited
    }

    /// A rank without samples of its own does not count.
    pub(super) fn over_ranks(&self, counts: bool) -> OverRanks {
        OverRanks { sums: self.0.clone(), counts }
    }

    /// What is behind an error in forward or backward, which only says that the exchange failed.
    pub(super) fn reason(&self, error: TrainError) -> TrainError {
        mem::take(&mut self.lock().failure).map_or(error, TrainError::Collective)
    }

    fn lock(&self) -> MutexGuard<'_, Sums> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SumOverRanks for Sums {
    fn sum(&mut self, call: u32, numbers: &mut [f64]) -> Option<()> {
        let started = Instant::now();
        self.board.mark(Activity::WaitingForPeers);
        let tag = Tag::new(self.step.0, call, Phase::SyncBatchNorm);
        let result = self.collective.all_reduce_f64(tag, numbers);
        self.board.mark(Activity::Working);
        self.waited += started.elapsed();
        result.map_err(|error| self.failure = Some(error)).ok()
    }
}
