//! A run's traces: what it is at, and for how long, for an OpenTelemetry collector.
//!
//! Owns which spans there are, and their way out. What happens is the core's, and nothing here reaches back into
//! it: a collector that is slow or gone costs spans, and no training.

mod export;
pub(crate) mod spans;

use std::{sync::Arc, time::SystemTime};

pub use export::{Pipeline, TracesError};
use spans::Spans;

use crate::core::{Action, Origin, Time};

/// Turns what the core does into spans, and hands them on.
#[derive(Debug)]
pub struct Tracer {
    spans: Spans,
    pipeline: Arc<Pipeline>,
    /// When the core's time began.
    began: SystemTime,
}

impl Tracer {
    pub fn new(pipeline: Arc<Pipeline>, origin: &Origin, began: SystemTime) -> Self {
        Self { spans: Spans::of(origin), pipeline, began }
    }

    pub fn observe(&mut self, now: Time, action: &Action) {
        for span in self.spans.observe(now, action) {
            self.pipeline.take(span, self.began);
        }
    }
}
