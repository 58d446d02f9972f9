//! The sums of a step's gradients over the ranks, formed while backward still computes: a thread that lives as
//! long as the step takes the buckets round the ring, in their order, each as soon as it is complete.
//!
//! What the buckets are and when one is complete is the replica's business; what a failure means, the step's.

use std::{
    panic::resume_unwind,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
};

use musher_collective::{Collective, Phase, Tag};
use musher_proto::{ids::Step, job::Compression};
use tch::Tensor;
use tracing::trace_span;

use super::TrainError;

/// Says that the next bucket is complete, from whatever thread completes it. Dropped, it says so of all that
/// are left: nobody adds to them any more.
#[derive(Clone, Debug)]
pub struct Launcher(SyncSender<()>);

impl Launcher {
    /// Returns at once; without effect once the exchange is over.
    pub fn launch(&self) {
        // There is room for each bucket; it can only be that nobody listens any more.
        let _ = self.0.try_send(());
    }
}

/// What a step sums over the ranks.
pub struct Buckets {
    pub step: Step,
    /// Views of the flat gradient, which nobody else touches once they are launched.
    pub gradients: Vec<Tensor>,
    pub compression: Compression,
}

/// Runs `compute`, which completes `buckets` one after the other, and sums them over the ranks meanwhile. On
/// success they hold the sums.
///
/// A failure of the exchange shows once `compute` has returned; one of `compute` breaks the exchange off.
pub fn overlapped<T>(
    collective: &mut dyn Collective,
    buckets: Buckets,
    compute: impl FnOnce(Launcher) -> Result<T, TrainError>,
) -> Result<T, TrainError> {
    // One for each bucket: the hooks in the backward pass never wait.
    let (launcher, launched) = sync_channel(buckets.gradients.len());
    let aborter = collective.aborter();
    thread::scope(|scope| {
        let exchange = move || all_reduce(collective, buckets, &launched);
        let exchange = thread::Builder::new()
            .name("exchange".into())
            .spawn_scoped(scope, exchange)
            .expect("the system can start a thread");
        let computed = compute(Launcher(launcher));
        if computed.is_err() {
            aborter.abort();
        }
        let summed = exchange.join().unwrap_or_else(|panic| resume_unwind(panic));
        let computed = computed?;
        summed.map(|()| computed)
    })
}

fn all_reduce(
    collective: &mut dyn Collective,
    buckets: Buckets,
    launched: &Receiver<()>,
) -> Result<(), TrainError> {
    let Buckets { step, gradients, compression } = buckets;
    for (index, mut bucket) in (0..).zip(gradients) {
        // An error is the launcher's end, which launches all that are left.
        let _ = launched.recv();
        let _span =
            trace_span!("all_reduce", rank = collective.rank(), step = step.0, bucket = index).entered();
        let tag = Tag::new(step.0, index, Phase::Gradients);
        let sum = |data: &mut [f32]| match compression {
            Compression::None => collective.all_reduce(tag, data),
            Compression::Bf16 => collective.all_reduce_bf16(tag, data),
        };
        torch_ext::with_f32_mut(&mut bucket, sum).map_err(musher_model::Error::from)??;
    }
    Ok(())
}
