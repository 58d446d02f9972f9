//! Samples' bytes read ahead of the threads that decode them, many at once: what a store far away takes for one
//! sample is waited for during the others.
//!
//! A planner's thread runs through the plan ahead of the pipeline and queues what will be read; reading threads take
//! from the queue in the plan's order, and hold at most a number of samples that nobody has taken yet. Everything
//! before a sample that is waited for is read or on its way, so the number may be as low as one.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::pipeline::{BatchPlan, guarded};
use crate::sample::PairBytes;
use crate::{DatasetError, Sample, Split, Warnings};

/// Whether a sample's bytes will be asked for.
pub(crate) type Wanted = Box<dyn Fn(&Sample) -> bool + Send>;

/// Where a pipeline takes bytes that were read for it. Dropping it ends the threads after what they are at.
pub(crate) struct ReadAhead(Arc<Shared>);

struct Shared {
    split: Arc<Split>,
    warnings: Arc<Warnings>,
    /// Samples read, or being read, that nobody has taken.
    depth: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Not begun, in the plan's order.
    queue: VecDeque<u64>,
    /// Begun and not taken.
    begun: usize,
    /// Of each sample that is queued or begun, how often, and what is there.
    promised: HashMap<u64, Promise>,
    is_closed: bool,
}

#[derive(Default)]
struct Promise {
    outstanding: usize,
    read: Vec<Result<PairBytes, DatasetError>>,
}

impl ReadAhead {
    /// The plan to give to the pipeline, and where to take bytes of samples that it has. Of a split that is not packed
    /// nothing is read ahead.
    pub fn start(
        split: &Arc<Split>,
        wanted: Wanted,
        depth: usize,
        warnings: &Arc<Warnings>,
        plan: impl Iterator<Item = BatchPlan> + Send + 'static,
    ) -> (Box<dyn Iterator<Item = BatchPlan> + Send>, Option<Self>) {
        if depth == 0 || !split.samples.first().is_some_and(Sample::is_packed) {
            return (Box::new(plan), None);
        }
        let shared = Arc::new(Shared {
            split: split.clone(),
            warnings: warnings.clone(),
            depth,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        // A batch has a sample at least, or costs nothing: the queue's bound is in samples, below.
        let (sender, planned) = sync_channel(depth + 1);
        let planner = shared.clone();
        spawn("read-plan".to_owned(), move || {
            let run_through = AssertUnwindSafe(|| {
                for batch in plan {
                    planner.queue(&batch, &wanted);
                    if sender.send(Ok(batch)).is_err() {
                        return;
                    }
                }
            });
            if let Err(panic) = catch_unwind(run_through) {
                // The pipeline knows what to do with a plan that panics; an end without a word would pass for the
                // plan's. Nobody listens if the pipeline is gone.
                let _ = sender.send(Err(panic));
            }
        });
        for index in 0..depth.min(MOST_READERS) {
            let reader = shared.clone();
            spawn(format!("read-{index}"), move || while reader.read_next() {});
        }
        let plan = planned.into_iter().map(|batch| batch.unwrap_or_else(|panic| resume_unwind(panic)));
        (Box::new(plan), Some(Self(shared)))
    }

    /// What was read of the sample, once it is there; `None` if it was not queued.
    pub fn take(&self, id: u64) -> Option<Result<PairBytes, DatasetError>> {
        let mut state = self.0.state();
        loop {
            let promise = state.promised.get_mut(&id)?;
            if let Some(bytes) = promise.read.pop() {
                promise.outstanding -= 1;
                if promise.outstanding == 0 {
                    state.promised.remove(&id);
                }
                state.begun -= 1;
                self.0.changed.notify_all();
                return Some(bytes);
            }
            state = self.0.wait(state);
        }
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.0.state().is_closed = true;
        self.0.changed.notify_all();
    }
}

/// Reading threads: each waits for a store most of its time.
const MOST_READERS: usize = 64;

impl Shared {
    /// Waits while as many samples are queued as may be read.
    fn queue(&self, batch: &BatchPlan, wanted: &Wanted) {
        let mut state = self.state();
        while state.queue.len() >= self.depth && !state.is_closed {
            state = self.wait(state);
        }
        for &id in &batch.sample_ids {
            // An id that does not exist is the pipeline's to complain of.
            if self.split.sample(id).is_ok_and(wanted) {
                state.queue.push_back(id);
                state.promised.entry(id).or_default().outstanding += 1;
            }
        }
        self.changed.notify_all();
    }

    /// Whether there may be more.
    fn read_next(&self) -> bool {
        let mut state = self.state();
        let id = loop {
            if state.is_closed {
                return false;
            }
            if state.begun < self.depth
                && let Some(id) = state.queue.pop_front()
            {
                state.begun += 1;
                self.changed.notify_all();
                break id;
            }
            state = self.wait(state);
        };
        drop(state);
        let bytes = guarded(
            || format!("the reading of sample {id} of {}", self.split.list),
            || self.split.sample(id)?.read(&mut |warning| self.warnings.report(warning)),
        );
        let mut state = self.state();
        if let Some(promise) = state.promised.get_mut(&id) {
            promise.read.push(bytes);
        }
        self.changed.notify_all();
        true
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}

fn spawn(name: String, work: impl FnOnce() + Send + 'static) {
    thread::Builder::new().name(name).spawn(work).expect("the system can start a thread");
}
