//! Decoded pairs kept in memory within a byte budget. What falls outside is decoded at each use:
//! slower, but the same bytes.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::decode::decode_bytes;
use crate::sample::PairBytes;
use crate::{DatasetError, Pair, Sample, Warnings};

/// Shared by the loaders of a process. The first pairs to come stay: an epoch visits each sample
/// once in random order, where evicting the least recently used would hardly ever hit.
pub struct ImageCache {
    budget_bytes: usize,
    kept: Mutex<Kept>,
    hits: AtomicU64,
    misses: AtomicU64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheCounters {
    pub hits: u64,
    pub misses: u64,
    /// Bytes of the pairs kept, at most the budget.
    pub bytes: usize,
}

#[derive(Default)]
struct Kept {
    pairs: HashMap<PathBuf, Arc<Pair>>,
    bytes: usize,
}

impl ImageCache {
    /// A budget of 0 keeps nothing.
    pub fn new(budget_bytes: usize) -> Self {
        Self { budget_bytes, kept: Mutex::default(), hits: AtomicU64::new(0), misses: AtomicU64::new(0) }
    }

    /// The sample's pair, from memory or decoded now.
    ///
    /// # Errors
    /// As [`decode_pair`](crate::decode_pair).
    pub fn get(&self, sample: &Sample, warnings: &Warnings) -> Result<Arc<Pair>, DatasetError> {
        self.get_or_decode(sample, || sample.read(&mut |warning| warnings.report(warning)), warnings)
    }

    /// As [`get`](Self::get), with the bytes from elsewhere if they are needed.
    pub(crate) fn get_or_decode(
        &self,
        sample: &Sample,
        read: impl FnOnce() -> Result<PairBytes, DatasetError>,
        warnings: &Warnings,
    ) -> Result<Arc<Pair>, DatasetError> {
        if let Some(pair) = self.kept().pairs.get(&sample.image) {
            self.hits.fetch_add(1, Ordering::Relaxed);
            return Ok(pair.clone());
        }
        self.misses.fetch_add(1, Ordering::Relaxed);
        let pair = Arc::new(decode_bytes(sample, &read()?, &mut |warning| warnings.report(warning))?);
        self.keep(sample, &pair);
        Ok(pair)
    }

    pub(crate) fn holds(&self, sample: &Sample) -> bool {
        self.kept().pairs.contains_key(&sample.image)
    }

    pub fn counters(&self) -> CacheCounters {
        CacheCounters {
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            bytes: self.kept().bytes,
        }
    }

    fn keep(&self, sample: &Sample, pair: &Arc<Pair>) {
        let mut kept = self.kept();
        let bytes = kept.bytes + pair.bytes();
        // Another thread may have decoded the same sample in the meantime.
        if bytes <= self.budget_bytes && !kept.pairs.contains_key(&sample.image) {
            kept.pairs.insert(sample.image.clone(), pair.clone());
            kept.bytes = bytes;
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
