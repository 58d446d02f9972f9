//! Batches prepared on threads of their own, ahead of the consumer and in the plan's order. Which
//! samples make a batch is the plan's business; what becomes of a sample is a recipe's.
//!
//! Threads take single samples, not batches, so that a batch that is waited for is worked on by
//! all of them. A batch's place in the order is a channel of one; those channels queue in another,
//! whose bound is what is prepared ahead.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::DatasetError;

/// A running pipeline. Dropping it makes its threads end after the sample they are at.
pub(crate) struct Pipeline<B> {
    batches: Receiver<BatchSlot<B>>,
    stop: Arc<AtomicBool>,
}

/// One batch to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchPlan {
    /// Handed back with the batch; nobody looks at it on the way.
    pub key: u64,
    pub epoch: u32,
    /// Indices into the split; none give an empty batch.
    pub sample_ids: Vec<u64>,
}

/// What becomes of samples, and of the batch they make.
pub(crate) trait Recipe: Send + Sync + 'static {
    type Sample: Send;
    type Batch: Send;

    fn sample(&self, epoch: u32, id: u64) -> Result<Self::Sample, DatasetError>;

    /// `samples` are in the plan's order.
    fn batch(&self, plan: BatchPlan, samples: Vec<Self::Sample>) -> Self::Batch;

    /// The split list's name, for messages.
    fn list(&self) -> &str;
}

#[derive(Clone, Copy)]
pub(crate) struct Pace {
    /// At least one is started.
    pub threads: usize,
    /// Batches that may be finished or begun before they are asked for; at least one.
    pub ahead: usize,
}

impl<B: Send + 'static> Pipeline<B> {
    /// Starts the threads; they work until the plan ends or the pipeline is dropped.
    ///
    /// The plan is asked from these threads, one at a time. It may wait, for instance on a channel.
    pub fn start<R: Recipe<Batch = B>>(
        recipe: R,
        pace: Pace,
        plan: impl Iterator<Item = BatchPlan> + Send + 'static,
    ) -> Self {
        let (slots, batches) = sync_channel(pace.ahead.max(1));
        let stop = Arc::new(AtomicBool::new(false));
        let work = Arc::new(Work {
            recipe,
            stop: stop.clone(),
            feed: Mutex::new(Feed { open: Some(OpenFeed { plan, slots }), begun: None }),
        });
        for index in 0..pace.threads.max(1) {
            let work = work.clone();
            thread::Builder::new()
                .name(format!("loader-{index}"))
                .spawn(move || work.run())
                .expect("the system can start a thread");
        }
        Self { batches, stop }
    }

    /// The next batch in the plan's order, or `None` behind its end. Waits for it.
    ///
    /// # Errors
    /// Of a sample of this batch (the first in its order); the batches behind it still follow.
    pub fn next(&mut self) -> Option<Result<B, DatasetError>> {
        let slot = self.batches.recv().ok()?;
        Some(slot.recv().unwrap_or_else(|_| {
            Err(DatasetError::LoaderPanicked {
                at: "the end of a batch".to_owned(),
                message: "the batch was dropped".to_owned(),
            })
        }))
    }
}

impl<B> Drop for Pipeline<B> {
    fn drop(&mut self) {
        // The threads are not joined: one of them may be waiting in the plan. A thread that waits
        // for room in the queue is woken by the receiver's end.
        self.stop.store(true, Ordering::Relaxed);
    }
}

type BatchResult<B> = Result<B, DatasetError>;
type BatchSlot<B> = Receiver<BatchResult<B>>;

struct Work<R: Recipe, P> {
    recipe: R,
    stop: Arc<AtomicBool>,
    feed: Mutex<Feed<R, P>>,
}

struct Feed<R: Recipe, P> {
    /// `None` once the plan has ended or the pipeline is gone.
    open: Option<OpenFeed<R, P>>,
    /// The batch whose samples are being given out, and the next of them.
    begun: Option<(Arc<Assembly<R>>, usize)>,
}

struct OpenFeed<R: Recipe, P> {
    plan: P,
    slots: SyncSender<BatchSlot<R::Batch>>,
}

/// A batch on its way.
struct Assembly<R: Recipe> {
    plan: BatchPlan,
    parts: Mutex<Parts<R::Sample>>,
    done: SyncSender<BatchResult<R::Batch>>,
}

struct Parts<S> {
    samples: Vec<Option<S>>,
    missing: usize,
    /// The error of the lowest index, so that it does not depend on the threads.
    error: Option<(usize, DatasetError)>,
}

impl<R: Recipe, P: Iterator<Item = BatchPlan>> Work<R, P> {
    fn run(&self) {
        while !self.stop.load(Ordering::Relaxed)
            && let Some((assembly, index)) = self.take_sample()
        {
            let BatchPlan { epoch, ref sample_ids, .. } = assembly.plan;
            let id = sample_ids[index];
            let sample = guarded(
                || format!("sample {id} of {}", self.recipe.list()),
                || self.recipe.sample(epoch, id),
            );
            if let Some(samples) = assembly.place(index, sample) {
                assembly.finish(&self.recipe, samples);
            }
        }
    }

    fn take_sample(&self) -> Option<(Arc<Assembly<R>>, usize)> {
        let mut feed = lock(&self.feed);
        loop {
            if let Some((assembly, index)) = feed.begun.take() {
                if index + 1 < assembly.plan.sample_ids.len() {
                    feed.begun = Some((assembly.clone(), index + 1));
                }
                return Some((assembly, index));
            }
            feed.begin_batch(&self.recipe)?;
        }
    }
}

impl<R: Recipe, P: Iterator<Item = BatchPlan>> Feed<R, P> {
    /// Waits for the plan, then for room in the queue. An empty batch is done at once and leaves none begun.
    fn begin_batch(&mut self, recipe: &R) -> Option<()> {
        // Taken out, so that the feed stays closed if this is the end.
        let mut open = self.open.take()?;
        let plan = guarded(|| "the plan".to_owned(), || Ok(open.plan.next()));
        let (done, slot) = sync_channel(1);
        let plan = match plan {
            Ok(plan) => plan?,
            Err(error) => {
                // Neither fails unless the pipeline is dropped, when nobody wants to know.
                let _ = done.send(Err(error));
                let _ = open.slots.send(slot);
                return None;
            }
        };
        open.slots.send(slot).ok()?;
        self.open = Some(open);

        let assembly = Assembly::new(plan, done);
        if assembly.plan.sample_ids.is_empty() {
            assembly.finish(recipe, Ok(Vec::new()));
        } else {
            self.begun = Some((Arc::new(assembly), 0));
        }
        Some(())
    }
}

impl<R: Recipe> Assembly<R> {
    fn new(plan: BatchPlan, done: SyncSender<BatchResult<R::Batch>>) -> Self {
        let missing = plan.sample_ids.len();
        let samples = (0..missing).map(|_| None).collect();
        Self { plan, parts: Mutex::new(Parts { samples, missing, error: None }), done }
    }

    /// The batch's samples, or its error, once this was the last that was missing.
    fn place(
        &self,
        index: usize,
        sample: Result<R::Sample, DatasetError>,
    ) -> Option<Result<Vec<R::Sample>, DatasetError>> {
        let mut parts = lock(&self.parts);
        match sample {
            Ok(sample) => parts.samples[index] = Some(sample),
            Err(error) if parts.error.as_ref().is_none_or(|(first, _)| index < *first) => {
                parts.error = Some((index, error));
            }
            Err(_) => {}
        }
        parts.missing -= 1;
        if parts.missing > 0 {
            return None;
        }
        let samples = std::mem::take(&mut parts.samples).into_iter().flatten().collect();
        Some(parts.error.take().map_or(Ok(samples), |(_, error)| Err(error)))
    }

    fn finish(&self, recipe: &R, samples: Result<Vec<R::Sample>, DatasetError>) {
        let batch = samples.and_then(|samples| {
            guarded(|| "the end of a batch".to_owned(), || Ok(recipe.batch(self.plan.clone(), samples)))
        });
        // Nobody listens once the pipeline is dropped.
        let _ = self.done.send(batch);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Turns a panic of the work into an error. What the work leaves behind is overwritten or dropped.
pub(crate) fn guarded<T>(
    at: impl FnOnce() -> String,
    work: impl FnOnce() -> Result<T, DatasetError>,
) -> Result<T, DatasetError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        Err(DatasetError::LoaderPanicked { at: at(), message: panic_message(&*panic) })
    })
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message").to_owned()
}
