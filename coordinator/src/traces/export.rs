//! Spans on their way to the collector: a bounded queue, a thread that empties it, and a count of what was lost.

use std::{
    borrow::Cow,
    env,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use gethostname::gethostname;
use opentelemetry::{
    InstrumentationScope, KeyValue,
    trace::{Event, Link, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceState},
};
use opentelemetry_otlp::{ExporterBuildError, WithExportConfig};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{BatchSpanProcessor, SpanData, SpanEvents, SpanExporter, SpanLinks, SpanProcessor},
};
use prometheus_client::metrics::counter::Counter;
use thiserror::Error;
use tokio::task;
use tracing::warn;

use super::spans::{Place, Span};
use crate::core::{Origin, Time};

/// For the last spans to be taken, when the run has ended.
const FAREWELL: Duration = Duration::from_secs(5);

#[derive(Debug, Error)]
pub enum TracesError {
    #[error(
        "traces can't be sent to telemetry.otlp = {url:?}: {source}; correct it, or the OTEL_EXPORTER_OTLP_* variables"
    )]
    Collector { url: String, source: ExporterBuildError },
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Pipeline {
    processor: BatchSpanProcessor,
    scope: InstrumentationScope,
    taken: AtomicU64,
    deliveries: Arc<Deliveries>,
}

/// What became of spans.
#[derive(Debug)]
struct Deliveries {
    url: String,
    delivered: AtomicU64,
    lost: Counter,
    /// It was said that some are being lost.
    complained: AtomicBool,
}

impl Pipeline {
    /// Connects to nothing yet; to be called within the async runtime. `lost` counts spans that nobody got.
    pub fn open(url: &str, origin: &Origin, lost: Counter) -> Result<Self, TracesError> {
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_endpoint(url)
            .build()
            .map_err(|source| TracesError::Collector { url: url.into(), source })?;
        let deliveries = Arc::new(Deliveries {
            url: url.into(),
            delivered: AtomicU64::new(0),
            lost,
            complained: AtomicBool::new(false),
        });
        let counted = Counted { exporter, deliveries: deliveries.clone() };
        let mut processor = BatchSpanProcessor::builder(counted).build();
        processor.set_resource(&resource(origin));
        let scope = InstrumentationScope::builder("musher").with_version(env!("CARGO_PKG_VERSION")).build();
        Ok(Self { processor, scope, taken: AtomicU64::new(0), deliveries })
    }

    /// Never waits: where the queue is full, the span is lost.
    pub(super) fn take(&self, span: Span, began: SystemTime) {
        self.taken.fetch_add(1, Ordering::Relaxed);
        self.processor.on_end(self.data(span, began));
    }

    /// Gives the last spans a while to get out, and says if some did not.
    pub async fn finish(self: Arc<Self>) {
        let pipeline = self.clone();
        // An error shows in the count.
        let _ = task::spawn_blocking(move || pipeline.processor.shutdown_with_timeout(FAREWELL)).await;
        let taken = self.taken.load(Ordering::Relaxed);
        let lost = taken.saturating_sub(self.deliveries.delivered.load(Ordering::Relaxed));
        if lost > 0 {
            warn!(
                lost,
                of = taken,
                collector = self.deliveries.url,
                "not all spans of this run reached the collector"
            );
        }
    }

    fn data(&self, span: Span, began: SystemTime) -> SpanData {
        let at = |time: Time| began + time;
        let mut events = SpanEvents::default();
        events.events = span
            .events
            .into_iter()
            .map(|event| Event::new(event.name, at(event.at), event.attributes, 0))
            .collect();
        let mut links = SpanLinks::default();
        links.links = span.link.into_iter().map(|place| Link::new(context(place), Vec::new(), 0)).collect();
        SpanData {
            span_context: context(span.at),
            parent_span_id: span.parent.unwrap_or(SpanId::INVALID),
            parent_span_is_remote: false,
            span_kind: SpanKind::Internal,
            name: Cow::Borrowed(span.name),
            start_time: at(span.begun),
            end_time: at(span.ended),
            attributes: span.attributes,
            dropped_attributes_count: 0,
            events,
            links,
            status: span.error.map_or(Status::Unset, Status::error),
            instrumentation_scope: self.scope.clone(),
        }
    }
}

/// Passes spans on, and keeps count.
#[derive(Debug)]
struct Counted {
    exporter: opentelemetry_otlp::SpanExporter,
    deliveries: Arc<Deliveries>,
}

impl SpanExporter for Counted {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len() as u64;
        let result = self.exporter.export(batch).await;
        let Deliveries { url, delivered, lost, complained } = &*self.deliveries;
        match &result {
            Ok(()) => drop(delivered.fetch_add(spans, Ordering::Relaxed)),
            Err(reason) => {
                lost.inc_by(spans);
                if !complained.swap(true, Ordering::Relaxed) {
                    warn!(collector = url, %reason, "traces are being lost, and training goes on: look at telemetry.otlp");
                }
            }
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

/// Who tells it: this life of the run's coordinator. What the environment says besides is added to it.
fn resource(origin: &Origin) -> Resource {
    let name = env::var("OTEL_SERVICE_NAME").ok().filter(|name| !name.is_empty());
    let (run_id, term) = (&origin.state.id, origin.state.fences.term);
    Resource::builder()
        .with_service_name(name.unwrap_or_else(|| "musher".into()))
        .with_attributes([
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("service.instance.id", format!("{run_id}-{term}")),
            KeyValue::new("host.name", gethostname().to_string_lossy().into_owned()),
            KeyValue::new("process.pid", i64::from(std::process::id())),
            KeyValue::new("musher.run", origin.run.clone()),
            KeyValue::new("musher.run.id", run_id.clone()),
            KeyValue::new("musher.term", i64::try_from(term.0).unwrap_or(i64::MAX)),
        ])
        .build()
}

fn context(Place { trace, span }: Place) -> SpanContext {
    SpanContext::new(trace, span, TraceFlags::SAMPLED, false, TraceState::NONE)
}
