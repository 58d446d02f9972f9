//! How far a rank is in its generation's exchange, told to other threads while a call goes on.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Read from any thread; clones share one state. The two figures may be a moment apart.
#[derive(Clone, Debug)]
pub struct Meter(Arc<Gauge>);

#[derive(Debug)]
struct Gauge {
    start: Instant,
    received: AtomicU64,
    moved_us: AtomicU64,
}

impl Meter {
    /// At nothing received, and moved just now.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        let (received, moved_us) = (AtomicU64::new(0), AtomicU64::new(0));
        Self(Arc::new(Gauge { start: Instant::now(), received, moved_us }))
    }

    /// Bytes of the generation's exchange that this rank has. All ranks are due the same and count alike:
    /// each round for its largest part, and a broadcast's root has all of it from the start.
    pub fn received(&self) -> u64 {
        self.0.received.load(Ordering::Relaxed)
    }

    /// When anything was sent or received last; the formation's end if nothing was.
    pub fn last_moved(&self) -> Instant {
        self.0.start + Duration::from_micros(self.0.moved_us.load(Ordering::Relaxed))
    }

    /// For an exchange to tell how far it is.
    pub fn receive(&self, received: u64) {
        self.0.received.store(received, Ordering::Relaxed);
    }

    pub fn moved(&self, at: Instant) {
        self.0.moved_us.store((at - self.0.start).as_micros() as u64, Ordering::Relaxed);
    }
}
