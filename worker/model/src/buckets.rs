//! The flat gradient in buckets, how a backward pass fills them, and which of them it has finished. Sends nothing
//! anywhere.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tch::Tensor;

use crate::Error;
use crate::flat::Flat;
use crate::layout::Layout;
use crate::options::Manner;

/// Large enough to use a link's bandwidth, small enough to overlap with the rest of the backward pass.
pub const DEFAULT_BUCKET_BYTES: usize = 25 << 20;

/// The first bucket is this much smaller, so that the exchange starts early.
const FIRST_BUCKET_DIVISOR: usize = 8;

/// Consecutive gradients that are exchanged together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bucket {
    /// Its elements of the flat gradient. Buckets cover it without gaps, in the order they become ready.
    pub range: Range<usize>,
}

/// Cuts the flat gradient at tensor boundaries into buckets of about `bytes`. A tensor larger than that has a bucket
/// of its own size.
pub fn plan(layout: &Layout, bytes: usize) -> Vec<Bucket> {
    let order = layout.flat_order();
    let trainable = order.iter().map(|&id| layout.parameter(id)).filter(|spec| !spec.frozen);
    let starts: Vec<_> = trainable.map(|spec| spec.range.start).collect();
    cut(&starts, layout.trainable_len, bytes)
}

/// `starts` are the tensors' offsets in ascending order, from 0.
fn cut(starts: &[usize], len: usize, bytes: usize) -> Vec<Bucket> {
    let elements = (bytes / size_of::<f32>()).max(1);
    let mut buckets: Vec<Bucket> = Vec::new();
    let mut start = 0;
    for &end in starts.iter().skip(1).chain([&len]) {
        let target = if buckets.is_empty() { elements / FIRST_BUCKET_DIVISOR } else { elements };
        if end - start >= target.max(1) || end == len {
            buckets.push(Bucket { range: start..end });
            start = end;
        }
    }
    buckets
}

/// Hears of each bucket.
pub type Report = Box<dyn FnMut(usize) + Send>;

/// Sees to a backward pass's buckets as it completes them: has their gradients in the flat gradient, and reports them,
/// in order, to whoever asked for that pass.
#[derive(Clone)]
pub struct Readiness(Arc<Mutex<Progress>>);

#[derive(Default)]
struct Progress {
    /// Tensors in each bucket.
    tensors: Vec<usize>,
    /// Tensors of each bucket whose gradient is still to come.
    pending: Vec<usize>,
    /// The next bucket to report.
    next: usize,
    /// `None`: nobody asked.
    report: Option<Report>,
    /// Leaves and the places of their gradients, by bucket; none where gradients are made in their places.
    gather: Vec<Vec<(Tensor, Tensor)>>,
    /// The pass's gradients add to those that are there.
    adds: bool,
    failed: Option<torch_ext::Error>,
}

impl Readiness {
    /// Hooks every leaf that trains, in place of any earlier hooks.
    pub fn install(flat: &Flat, buckets: &[Bucket], manner: Manner) -> Result<Self, Error> {
        let bucket_of = |offset: usize| buckets.partition_point(|bucket| bucket.range.end <= offset);
        let mut tensors = vec![0; buckets.len()];
        let mut gather = Vec::new();
        if manner == Manner::Device {
            gather.resize_with(buckets.len(), Vec::new);
        }
        for (spec, leaf) in flat.trained() {
            let bucket = bucket_of(spec.range.start);
            tensors[bucket] += 1;
            if let Some(pairs) = gather.get_mut(bucket) {
                pairs.push((leaf.shallow_clone(), flat.gradient_place(spec)?));
            }
        }
        let progress = Progress { pending: tensors.clone(), tensors, gather, ..Progress::default() };
        let readiness = Self(Arc::new(Mutex::new(progress)));
        for (spec, leaf) in flat.trained() {
            // The leaf owns its hook, which must not own the leaf.
            let (progress, bucket) = (Arc::downgrade(&readiness.0), bucket_of(spec.range.start));
            torch_ext::on_gradient_accumulated(leaf, move || {
                if let Some(progress) = progress.upgrade() {
                    lock(&progress).accumulated(bucket);
                }
            })?;
        }
        Ok(readiness)
    }

    /// While `backward` runs, its gradients go to their places, and add to what is there if `adds`; `report` hears of
    /// the buckets, and is dropped afterwards, whatever became of the pass.
    pub fn during<T>(
        &self,
        adds: bool,
        report: Option<Report>,
        backward: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        lock(&self.0).begin(adds, report);
        let result = backward();
        let mut progress = lock(&self.0);
        progress.report = None;
        if result.is_ok() {
            progress.gather_the_rest();
        }
        let result = result.and_then(|done| match progress.failed.take() {
            Some(error) => Err(error.into()),
            None => Ok(done),
        });
        if result.is_err() {
            // What such a pass has left must not be added to the next one's.
            for (leaf, _) in progress.gather.iter().flatten() {
                torch_ext::drop_grad(leaf)?;
            }
        }
        result
    }
}

/// A report that panicked fails its backward pass; the counters are sound all the same, and the next pass resets them.
fn lock(progress: &Mutex<Progress>) -> MutexGuard<'_, Progress> {
    progress.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Progress {
    fn gather(&mut self, bucket: usize) {
        if let Some(pairs) = self.gather.get(bucket)
            && let Err(error) = torch_ext::gather_gradients(pairs, self.adds)
        {
            self.failed.get_or_insert(error);
        }
    }

    /// A pass through a part of the network leaves buckets that it has not completed.
    fn gather_the_rest(&mut self) {
        for bucket in 0..self.pending.len() {
            if self.pending[bucket] > 0 {
                self.gather(bucket);
            }
        }
    }

    fn begin(&mut self, adds: bool, report: Option<Report>) {
        self.pending.clone_from(&self.tensors);
        self.next = 0;
        self.report = report;
        self.adds = adds;
        self.failed = None;
    }

    fn accumulated(&mut self, bucket: usize) {
        self.pending[bucket] = self.pending[bucket].saturating_sub(1);
        if self.pending[bucket] == 0 {
            self.gather(bucket);
        }
        while self.failed.is_none() && self.pending.get(self.next) == Some(&0) {
            self.next += 1;
            if let Some(report) = &mut self.report {
                report(self.next - 1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn buckets_tile_the_gradient_at_tensor_boundaries(
            lens in prop::collection::vec(1usize..5000, 1..80),
            bytes in 1usize..40_000,
        ) {
            let starts: Vec<_> = lens.iter().scan(0, |end, len| { *end += len; Some(*end - len) }).collect();
            let len = lens.iter().sum();
            let buckets = cut(&starts, len, bytes);
            prop_assert_eq!(buckets[0].range.start, 0);
            prop_assert_eq!(buckets[buckets.len() - 1].range.end, len);
            for pair in buckets.windows(2) {
                prop_assert_eq!(pair[0].range.end, pair[1].range.start);
                prop_assert!(starts.contains(&pair[1].range.start));
            }
            for bucket in &buckets {
                let inside = starts.iter().filter(|start| bucket.range.contains(start));
                let last = inside.max().copied().unwrap_or(0);
                prop_assert!(last - bucket.range.start <= bytes / 4, "a bucket closes once it is full");
            }
        }
    }

    #[test]
    fn buckets_are_reported_in_order_though_they_finish_in_another() {
        let (sender, reported) = std::sync::mpsc::channel();
        let mut progress = Progress { tensors: vec![1, 2, 1], ..Progress::default() };
        progress.begin(false, Some(Box::new(move |bucket| sender.send(bucket).expect("the test listens"))));
        let mut after = |bucket| {
            progress.accumulated(bucket);
            reported.try_iter().collect::<Vec<_>>()
        };
        assert_eq!(after(2), [0usize; 0]);
        assert_eq!(after(1), [0usize; 0]);
        assert_eq!(after(0), [0]);
        assert_eq!(after(1), [1, 2]);
        assert_eq!(after(0), [0usize; 0], "nothing after the last");
    }
}
