//! Batches prepared on threads of their own, ahead of the consumer and in the plan's order. Which
//! samples make a batch is the plan's business.
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

use crate::{DatasetError, ImageCache, Split, View, Warnings};

/// A running loader. Dropping it makes its threads end after the sample they are at.
pub struct Loader {
    batches: Receiver<BatchSlot>,
    stop: Arc<AtomicBool>,
}

pub struct LoaderOptions {
    pub split: Arc<Split>,
    pub view: View,
    /// At least one is started.
    pub threads: usize,
    /// Batches that may be finished or begun before they are asked for; at least one.
    pub ahead: usize,
    pub cache: Arc<ImageCache>,
    pub warnings: Arc<Warnings>,
}

/// One batch to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchPlan {
    /// Handed back with the batch; the loader does not look at it.
    pub key: u64,
    pub epoch: u32,
    /// Indices into the split; none give an empty batch.
    pub sample_ids: Vec<u64>,
}

/// What a plan became.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    pub key: u64,
    pub sample_ids: Vec<u64>,
    /// [N, S, S, 3], RGB, 0..=255.
    pub images: Vec<u8>,
    /// [N, S/2, S/2], class indices.
    pub masks: Vec<u8>,
}

impl Loader {
    /// Starts the threads; they work until the plan ends or the loader is dropped.
    ///
    /// The plan is asked from these threads, one at a time. It may wait, for instance on a channel.
    pub fn start(options: LoaderOptions, plan: impl Iterator<Item = BatchPlan> + Send + 'static) -> Self {
        let (slots, batches) = sync_channel(options.ahead.max(1));
        let stop = Arc::new(AtomicBool::new(false));
        let threads = options.threads.max(1);
        let work = Arc::new(Work {
            options,
            stop: stop.clone(),
            feed: Mutex::new(Feed { open: Some(OpenFeed { plan, slots }), begun: None }),
        });
        for index in 0..threads {
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
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Option<Result<Batch, DatasetError>> {
        let slot = self.batches.recv().ok()?;
        Some(slot.recv().unwrap_or_else(|_| {
            Err(DatasetError::LoaderPanicked {
                at: "the end of a batch".to_owned(),
                message: "the batch was dropped".to_owned(),
            })
        }))
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // The threads are not joined: one of them may be waiting in the plan. A thread that waits
        // for room in the queue is woken by the receiver's end.
        self.stop.store(true, Ordering::Relaxed);
    }
}

type BatchResult = Result<Batch, DatasetError>;
type BatchSlot = Receiver<BatchResult>;

struct Work<P> {
    options: LoaderOptions,
    stop: Arc<AtomicBool>,
    feed: Mutex<Feed<P>>,
}

struct Feed<P> {
    /// `None` once the plan has ended or the loader is gone.
    open: Option<OpenFeed<P>>,
    /// The batch whose samples are being given out, and the next of them.
    begun: Option<(Arc<Assembly>, usize)>,
}

struct OpenFeed<P> {
    plan: P,
    slots: SyncSender<BatchSlot>,
}

/// A batch on its way.
struct Assembly {
    epoch: u32,
    sample_ids: Vec<u64>,
    parts: Mutex<Parts>,
    done: SyncSender<BatchResult>,
}

struct Parts {
    batch: Batch,
    missing: usize,
    /// The error of the lowest index, so that it does not depend on the threads.
    error: Option<(usize, DatasetError)>,
}

/// A sample rendered, reused from one to the next.
struct Scratch {
    image: Vec<u8>,
    mask: Vec<u8>,
}

impl<P: Iterator<Item = BatchPlan>> Work<P> {
    fn run(&self) {
        let view = &self.options.view;
        let mut scratch = Scratch { image: vec![0; view.image_bytes()], mask: vec![0; view.mask_bytes()] };
        while !self.stop.load(Ordering::Relaxed)
            && let Some((assembly, index)) = self.take_sample()
        {
            let id = assembly.sample_ids[index];
            let rendered = guarded(
                || format!("sample {id} of {}", self.options.split.list),
                || self.render(id, assembly.epoch, &mut scratch),
            );
            assembly.place(index, rendered.map(|()| &scratch));
        }
    }

    fn render(&self, id: u64, epoch: u32, scratch: &mut Scratch) -> Result<(), DatasetError> {
        let LoaderOptions { split, view, cache, warnings, .. } = &self.options;
        let pair = cache.get(split.sample(id)?, warnings)?;
        view.render(&pair, epoch, id, &mut scratch.image, &mut scratch.mask);
        Ok(())
    }

    fn take_sample(&self) -> Option<(Arc<Assembly>, usize)> {
        let mut feed = lock(&self.feed);
        loop {
            if let Some((assembly, index)) = feed.begun.take() {
                if index + 1 < assembly.sample_ids.len() {
                    feed.begun = Some((assembly.clone(), index + 1));
                }
                return Some((assembly, index));
            }
            feed.begin_batch(&self.options.view)?;
        }
    }
}

impl<P: Iterator<Item = BatchPlan>> Feed<P> {
    /// Waits for the plan, then for room in the queue. An empty batch is done at once and leaves none begun.
    fn begin_batch(&mut self, view: &View) -> Option<()> {
        // Taken out, so that the feed stays closed if this is the end.
        let mut open = self.open.take()?;
        let plan = guarded(|| "the plan".to_owned(), || Ok(open.plan.next()));
        let (done, slot) = sync_channel(1);
        let plan = match plan {
            Ok(plan) => plan?,
            Err(error) => {
                // Neither fails unless the loader is dropped, when nobody wants to know.
                let _ = done.send(Err(error));
                let _ = open.slots.send(slot);
                return None;
            }
        };
        open.slots.send(slot).ok()?;
        self.open = Some(open);

        let assembly = Assembly::new(plan, view, done);
        if assembly.sample_ids.is_empty() {
            assembly.finish(&mut lock(&assembly.parts));
        } else {
            self.begun = Some((Arc::new(assembly), 0));
        }
        Some(())
    }
}

impl Assembly {
    fn new(plan: BatchPlan, view: &View, done: SyncSender<BatchResult>) -> Self {
        let samples = plan.sample_ids.len();
        Self {
            epoch: plan.epoch,
            sample_ids: plan.sample_ids.clone(),
            parts: Mutex::new(Parts {
                batch: Batch {
                    key: plan.key,
                    sample_ids: plan.sample_ids,
                    images: vec![0; samples * view.image_bytes()],
                    masks: vec![0; samples * view.mask_bytes()],
                },
                missing: samples,
                error: None,
            }),
            done,
        }
    }

    fn place(&self, index: usize, rendered: Result<&Scratch, DatasetError>) {
        let mut parts = lock(&self.parts);
        match rendered {
            Ok(Scratch { image, mask }) => {
                let Batch { images, masks, .. } = &mut parts.batch;
                images[index * image.len()..][..image.len()].copy_from_slice(image);
                masks[index * mask.len()..][..mask.len()].copy_from_slice(mask);
            }
            Err(error) => {
                if parts.error.as_ref().is_none_or(|(first, _)| index < *first) {
                    parts.error = Some((index, error));
                }
            }
        }
        parts.missing -= 1;
        if parts.missing == 0 {
            self.finish(&mut parts);
        }
    }

    fn finish(&self, parts: &mut Parts) {
        let empty =
            Batch { key: parts.batch.key, sample_ids: Vec::new(), images: Vec::new(), masks: Vec::new() };
        let batch = std::mem::replace(&mut parts.batch, empty);
        let result = parts.error.take().map_or(Ok(batch), |(_, error)| Err(error));
        // Nobody listens once the loader is dropped.
        let _ = self.done.send(result);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Turns a panic of the work into an error. What the work leaves behind is overwritten or dropped.
fn guarded<T>(
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
