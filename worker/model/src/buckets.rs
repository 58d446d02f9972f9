//! The flat gradient in buckets, and which of them a backward pass has finished. Sends nothing anywhere.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Error;
use crate::flat::Flat;
use crate::layout::Layout;

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
type Report = Box<dyn FnMut(usize) + Send>;

/// Reports buckets as a backward pass completes them, in order, to whoever asked for that pass.
#[derive(Clone)]
pub struct Readiness(Arc<Mutex<Progress>>);

struct Progress {
    /// Tensors in each bucket.
    tensors: Vec<usize>,
    /// Tensors of each bucket whose gradient is still to come.
    pending: Vec<usize>,
    /// The next bucket to report.
    next: usize,
    /// `None`: nobody asked.
    report: Option<Report>,
}

impl Readiness {
    /// Hooks every trainable parameter, in place of any earlier hooks.
    pub fn install(flat: &Flat, buckets: &[Bucket]) -> Result<Self, Error> {
        let bucket_of = |offset: usize| buckets.partition_point(|bucket| bucket.range.end <= offset);
        let trainable = || flat.parameters().filter(|(spec, _)| !spec.frozen);
        let mut tensors = vec![0; buckets.len()];
        for (spec, _) in trainable() {
            tensors[bucket_of(spec.range.start)] += 1;
        }
        let pending = tensors.clone();
        let progress = Progress { tensors, pending, next: 0, report: None };
        let readiness = Self(Arc::new(Mutex::new(progress)));
        for (spec, parameter) in trainable() {
            let (readiness, bucket) = (readiness.clone(), bucket_of(spec.range.start));
            torch_ext::on_gradient_accumulated(parameter, move || readiness.lock().accumulated(bucket))?;
        }
        Ok(readiness)
    }

    /// While `backward` runs, `report` hears of the buckets; afterwards it is dropped, whatever became of the pass.
    pub fn during<T>(&self, report: impl FnMut(usize) + Send + 'static, backward: impl FnOnce() -> T) -> T {
        self.lock().begin(Box::new(report));
        let result = backward();
        self.lock().report = None;
        result
    }

    /// A report that panicked fails its backward pass; the counters are sound all the same, and the next pass resets
    /// them.
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress {
    fn begin(&mut self, report: Report) {
        self.pending.clone_from(&self.tensors);
        self.next = 0;
        self.report = Some(report);
    }

    fn accumulated(&mut self, bucket: usize) {
        let Some(report) = &mut self.report else { return };
        self.pending[bucket] = self.pending[bucket].saturating_sub(1);
        while self.pending.get(self.next) == Some(&0) {
            self.next += 1;
            report(self.next - 1);
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
        let mut progress = Progress { tensors: vec![1, 2, 1], pending: vec![0; 3], next: 0, report: None };
        progress.begin(Box::new(move |bucket| sender.send(bucket).expect("the test listens")));
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
