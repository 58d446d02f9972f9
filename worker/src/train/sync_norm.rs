//! Batch norm's sums over the ranks in the midst of forward and backward, by an exchange of their own: the gradients'
//! is busy with buckets meanwhile, in an order of its own.

use std::{
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use musher_collective::{Phase, Tag};
use musher_model::{OverRanks, SumOverRanks};
use musher_nccl::{ExchangeError, TensorCollective};
use musher_proto::{ids::Step, message::Activity};
use tch::Tensor;

use super::{ProgressBoard, TrainError};

/// The exchange, shared with the hooks in a step's backward pass, which run on a thread of libtorch's where that is on
/// a GPU.
#[derive(Clone)]
pub struct SyncBatchNorm(Arc<Mutex<Sums>>);

struct Sums {
    exchange: Box<dyn TensorCollective>,
    board: Arc<ProgressBoard>,
    step: Step,
    /// In this step, by the host.
    waited: Duration,
    failure: Option<ExchangeError>,
}

impl SyncBatchNorm {
    pub fn new(exchange: Box<dyn TensorCollective>, board: Arc<ProgressBoard>) -> Self {
        let (step, waited, failure) = (Step(0), Duration::ZERO, None);
        Self(Arc::new(Mutex::new(Sums { exchange, board, step, waited, failure })))
    }

    /// Sums some f64 numbers, for the exchange to be connected.
    pub(super) fn warm_up(&self, numbers: &Tensor) -> Result<(), ExchangeError> {
        let mut sums = self.lock();
        sums.exchange.all_reduce(Tag::new(0, 0, Phase::Warmup), &numbers.f_detach_copy()?)?;
        sums.exchange.wait()
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
        mem::take(&mut self.lock().failure).map_or(error, TrainError::from)
    }

    /// See [`TensorCollective::leave`].
    pub(super) fn leave(&self) -> Result<(), ExchangeError> {
        self.lock().exchange.leave()
    }

    fn lock(&self) -> MutexGuard<'_, Sums> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SumOverRanks for Sums {
    fn sum(&mut self, call: u32, numbers: &Tensor) -> Option<()> {
        let started = Instant::now();
        self.board.mark(Activity::WaitingForPeers);
        let tag = Tag::new(self.step.0, call, Phase::SyncBatchNorm);
        let result = self.exchange.all_reduce(tag, numbers).and_then(|()| self.exchange.fence());
        self.board.mark(Activity::Working);
        self.waited += started.elapsed();
        result.map_err(|error| self.failure = Some(error)).ok()
    }
}
