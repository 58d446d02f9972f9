//! Where a step's time goes: the spans of its parts as intervals on one clock, and as a file for Perfetto.
//!
//! It records what the code marks with spans (`forward`, `backward`, `all_reduce`, ...); it marks nothing itself.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Map, Value, json};
use tracing::{
    Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id},
};
use tracing_subscriber::{Layer, layer::Context, registry::LookupSpan};

/// A layer that records each span from its first entry to its end; clones share one record.
#[derive(Clone, Debug)]
pub struct Trace {
    start: Instant,
    intervals: Arc<Mutex<Vec<Interval>>>,
}

#[derive(Clone, Debug)]
pub struct Interval {
    pub name: &'static str,
    /// What the span says of itself, and what those around it say: rank, step, bucket.
    pub fields: Map<String, Value>,
    pub thread: String,
    /// Since the trace began.
    pub start: Duration,
    pub end: Duration,
}

impl Interval {
    /// A field that is a number; `None` where the span has none of that name.
    pub fn number(&self, field: &str) -> Option<u64> {
        self.fields.get(field)?.as_u64()
    }
}

impl Default for Trace {
    fn default() -> Self {
        Self { start: Instant::now(), intervals: Arc::default() }
    }
}

impl Trace {
    /// Those that have ended, in the order of their ends.
    pub fn intervals(&self) -> Vec<Interval> {
        self.intervals.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// In the Trace Event Format, a process for each rank and a track for each of its threads' names; open it in
    /// <https://ui.perfetto.dev>.
    pub fn write(&self, mut file: impl Write) -> io::Result<()> {
        let mut threads: Vec<String> = Vec::new();
        let mut events = Vec::new();
        for interval in self.intervals() {
            let rank = interval.number("rank").unwrap_or(0);
            let thread = threads.iter().position(|name| *name == interval.thread).unwrap_or_else(|| {
                threads.push(interval.thread.clone());
                threads.len() - 1
            });
            let micros = |time: Duration| time.as_secs_f64() * 1e6;
            let (start, length) = (micros(interval.start), micros(interval.end - interval.start));
            for (kind, name) in [("process_name", format!("rank {rank}")), ("thread_name", interval.thread)] {
                events.push(
                    json!({"ph": "M", "pid": rank, "tid": thread, "name": kind, "args": {"name": name}}),
                );
            }
            events.push(json!({
                "ph": "X", "pid": rank, "tid": thread, "name": interval.name, "ts": start, "dur": length,
                "args": interval.fields,
            }));
        }
        serde_json::to_writer(&mut file, &json!({ "traceEvents": events }))?;
        file.flush()
    }
}

/// Of a span that has not ended.
struct Begun {
    fields: Map<String, Value>,
    at: Option<Duration>,
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Trace {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let around =
            span.parent().and_then(|parent| Some(parent.extensions().get::<Begun>()?.fields.clone()));
        let mut fields = Fields(around.unwrap_or_default());
        attributes.record(&mut fields);
        span.extensions_mut().insert(Begun { fields: fields.0, at: None });
    }

    fn on_enter(&self, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(begun) = span.extensions_mut().get_mut::<Begun>() {
            begun.at.get_or_insert_with(|| self.start.elapsed());
        }
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let end = self.start.elapsed();
        let Some(span) = context.span(&id) else { return };
        let Some(Begun { fields, at: Some(start) }) = span.extensions_mut().remove() else { return };
        let thread = thread::current().name().unwrap_or("unnamed").to_owned();
        let interval = Interval { name: span.name(), fields, thread, start, end };
        self.intervals.lock().unwrap_or_else(PoisonError::into_inner).push(interval);
    }
}

struct Fields(Map<String, Value>);

impl Visit for Fields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name().into(), value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.insert(field.name().into(), format!("{value:?}").into());
    }
}
