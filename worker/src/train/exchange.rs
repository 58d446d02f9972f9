//! The sums of a step's gradients over the ranks, formed while backward still computes: a thread that lives as
//! long as the step takes hands the buckets to the exchange, in their order, each as soon as it is complete.
//!
//! What the buckets are and when one is complete is the replica's business; what a failure means, the step's.

use std::{
    panic::resume_unwind,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
};

use musher_collective::{Phase, Tag};
use musher_nccl::{ExchangeError, TensorCollective};
use musher_proto::{ids::Step, job::Compression};
use tch::{Device, Tensor};
use torch_ext::{Mark, SideStream};
use tracing::trace_span;

use super::{ProgressBoard, TrainError, outcome::Outcome};

/// Says that the next bucket is complete, from whatever thread completes it. Dropped, it says so of all that
/// are left: nobody adds to them any more.
#[derive(Clone, Debug)]
pub struct Launcher {
    launched: SyncSender<Result<Mark, torch_ext::Error>>,
    device: Device,
}

impl Launcher {
    /// Returns at once; without effect once the exchange is over.
    pub fn launch(&self) {
        // There is room for each bucket; it can only be that nobody listens any more.
        let _ = self.launched.try_send(Mark::set(self.device));
    }
}

/// What a step sums over the ranks.
pub struct Buckets {
    pub step: Step,
    /// Views of the flat gradient, which nobody else touches once they are launched.
    pub gradients: Vec<Tensor>,
    pub compression: Compression,
    pub device: Device,
    /// Beside which the exchange's thread works, where that is a GPU.
    pub stream: SideStream,
}

/// The step before, which has to have ended well before anything of this one is exchanged: so no two ranks are ever
/// further apart than one step.
pub struct Before<'a> {
    pub outcome: &'a mut Outcome,
    pub board: &'a ProgressBoard,
}

/// Runs `compute`, which completes `buckets` one after the other, and sums them over the ranks meanwhile. On
/// success they hold the sums, for what the calling thread's stream does next. `None`: the step before was the last one,
/// or was not complete; nothing was exchanged.
///
/// A failure of the exchange shows once `compute` has returned; one of `compute` breaks the exchange off.
pub fn overlapped<T>(
    exchange: &mut dyn TensorCollective,
    buckets: Buckets,
    before: Option<Before>,
    compute: impl FnOnce(Launcher) -> Result<T, TrainError>,
) -> Result<Option<T>, TrainError> {
    // One for each bucket: the hooks in the backward pass never wait.
    let (sender, launched) = sync_channel(buckets.gradients.len());
    let launcher = Launcher { launched: sender, device: buckets.device };
    let begin = Mark::set(buckets.device)?;
    let aborter = exchange.aborter();
    let summed = thread::scope(|scope| {
        let handed = &mut *exchange;
        let sums = thread::Builder::new()
            .name("exchange".into())
            .spawn_scoped(scope, move || all_reduce(handed, buckets, before, begin, &launched))
            .expect("the system can start a thread");
        let computed = compute(launcher);
        if computed.is_err() {
            aborter.abort();
        }
        let summed = sums.join().unwrap_or_else(|panic| resume_unwind(panic));
        let computed = computed?;
        summed.map(|summed| summed.then_some(computed))
    })?;
    if summed.is_some() {
        exchange.fence()?;
    }
    Ok(summed)
}

/// False: the step before does not let this one begin.
fn all_reduce(
    exchange: &mut dyn TensorCollective,
    buckets: Buckets,
    before: Option<Before>,
    begin: Mark,
    launched: &Receiver<Result<Mark, torch_ext::Error>>,
) -> Result<bool, TrainError> {
    let Buckets { step, gradients, compression, stream, .. } = buckets;
    stream.enter()?;
    begin.take_over(&[])?;
    let mut before = before;
    for (index, bucket) in (0..).zip(&gradients) {
        // An error is the launcher's end, which launches all that are left.
        if let Ok(mark) = launched.recv() {
            mark?.take_over(&[bucket])?;
        }
        if let Some(Before { outcome, board }) = before.take() {
            let seen = outcome.wait(exchange, board)?;
            if !seen.complete || seen.stop {
                return Ok(false);
            }
        }
        let _span =
            trace_span!("all_reduce", rank = exchange.rank(), step = step.0, bucket = index).entered();
        let tag = Tag::new(step.0, index, Phase::Gradients);
        sum_bucket(exchange, compression, tag, bucket)?;
    }
    Ok(true)
}

/// As the job wants them summed.
pub(super) fn sum_bucket(
    exchange: &mut dyn TensorCollective,
    compression: Compression,
    tag: Tag,
    bucket: &Tensor,
) -> Result<(), ExchangeError> {
    match compression {
        Compression::None => exchange.all_reduce(tag, bucket),
        Compression::Bf16 => exchange.all_reduce_bf16(tag, bucket),
    }
}
