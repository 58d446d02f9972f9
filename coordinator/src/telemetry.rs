//! What a run says of itself: events in `events.jsonl`, lines on stderr, a progress bar, a feed.
//!
//! Owns the forms events take outside and where they go. What happens, and is worth saying, is said
//! elsewhere, by tracing events of target [`EVENT_TARGET`] with an `event` field; all other tracing
//! events are ordinary logs, which reach stderr alone. Metrics and traces are not its business.

mod console;
mod events_file;
mod feed;
mod pretty;
mod progress;
mod record;
mod tensorboard;

use std::io;
use std::path::PathBuf;

use tracing::level_filters::LevelFilter;
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::{FromEnvError, filter_fn};
use tracing_subscriber::layer::{Context, Filter, SubscriberExt};
use tracing_subscriber::{EnvFilter, Layer, Registry};

pub use console::Console;
pub use feed::{Curves, Feed, Said};
pub use pretty::printable;
pub use progress::Progress;

use events_file::EventsFile;
use record::Record;
use tensorboard::TensorBoard;

/// The target of the events that users and their tools may rely on.
pub const EVENT_TARGET: &str = "musher::event";

/// The form of lines on stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// One flat JSON object a line, as in `events.jsonl`.
    Json,
    /// For people: short, aligned in time, coloured on a terminal unless `NO_COLOR` is set.
    Pretty,
}

/// Where telemetry goes.
#[derive(Debug, Clone, Default)]
pub struct TelemetryOptions {
    /// `None`: pretty on a terminal, JSON otherwise.
    pub format: Option<LogFormat>,
    /// Events are appended here, whatever `RUST_LOG` says.
    pub events_file: Option<PathBuf>,
    /// Hears the events, and first those that are in the file already.
    pub feed: Option<Feed>,
    /// A directory for TensorBoard.
    pub tensorboard: Option<PathBuf>,
}

/// Why telemetry could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("cannot open {} for events: {source}; check the run directory", path.display())]
    EventsFile { path: PathBuf, source: io::Error },
    #[error("RUST_LOG is not a filter: {0}; write a level, or target=level, such as RUST_LOG=info")]
    Filter(#[from] FromEnvError),
    #[error("telemetry is already set up in this process; set it up once")]
    AlreadySet(#[from] tracing::subscriber::SetGlobalDefaultError),
}

/// Sets telemetry up for the whole process. `RUST_LOG` filters stderr, `info` by default.
///
/// The console is where a [`Progress`] bar shows, between the lines.
pub fn init(options: TelemetryOptions) -> Result<Console, TelemetryError> {
    if let (Some(feed), Some(path)) = (&options.feed, &options.events_file) {
        feed.replay(path);
    }
    let events = match options.events_file {
        None => None,
        Some(path) => match EventsFile::open(&path) {
            Ok(file) => Some(file),
            Err(source) => return Err(TelemetryError::EventsFile { path, source }),
        },
    };
    let curves = options.tensorboard.map(TensorBoard::within);
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::INFO.into()).try_from_env();
    let filter = match filter {
        Err(error) if std::env::var_os(EnvFilter::DEFAULT_ENV).is_some() => return Err(error.into()),
        Err(_) => EnvFilter::new("info"),
        Ok(filter) => filter,
    };
    let console = Console::stderr(options.format);
    tracing::subscriber::set_global_default(subscriber(
        events,
        options.feed,
        curves,
        console.clone(),
        filter,
    ))?;
    Ok(console)
}

/// Says what somebody who looks after the run should know of, and nothing waits for: an event. `cause` is one of those
/// that `docs/watching.md` names, `reason` a sentence.
pub fn warn_of(run: &str, cause: &'static str, reason: impl std::fmt::Display) {
    tracing::warn!(target: EVENT_TARGET, event = "warning", run, cause, reason = %reason);
}

/// A line of `events.jsonl` for people, with its end.
pub fn pretty_line(fields: &serde_json::Map<String, serde_json::Value>, terminal: bool) -> String {
    let paint = pretty::Paint::choose(terminal, std::env::var_os("NO_COLOR").as_deref());
    pretty::line(&Record::from_object(fields), paint)
}

fn subscriber(
    events: Option<EventsFile>,
    feed: Option<Feed>,
    curves: Option<TensorBoard>,
    console: Console,
    filter: EnvFilter,
) -> impl Subscriber + Send + Sync {
    Registry::default()
        .with(events.map(|file| Recorder(file).with_filter(events_only())))
        .with(feed.map(|feed| Recorder(feed).with_filter(events_only())))
        .with(curves.map(|curves| Recorder(curves).with_filter(events_only())))
        .with(Recorder(console).with_filter(filter))
}

fn events_only<S>() -> impl Filter<S> {
    filter_fn(|metadata| metadata.target() == EVENT_TARGET)
}

/// Takes records of events, and has nobody to tell that it failed.
trait Sink {
    fn take(&self, record: &Record);
}

/// The layer in front of a sink.
struct Recorder<S>(S);

impl<S: Sink + 'static, C: Subscriber> Layer<C> for Recorder<S> {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, C>) {
        self.0.take(&Record::now(event));
    }
}

#[cfg(test)]
mod tests;
