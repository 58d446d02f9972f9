//! Records as lines for people: `12:01:33  epoch 3/20  loss 0.4120  83.2 images/s`.
//!
//! Each event has its own wording, a list of phrases with fields in them. A phrase whose field is
//! absent is left out; a field no phrase has follows as `name=value`, so nothing is hidden.

use std::ffi::OsStr;
use std::fmt::Write;

use bytesize::ByteSize;
use serde_json::Value;
use tracing::Level;

use super::record::Record;

/// The phrases of an event, the first of which is its headline.
///
/// `{field}` is as it comes, `{field:.4}` has 4 decimals, and `count`, `bytes`, `s` and `ms` are
/// formatted for reading; `{/field}` follows a slash, and may be absent. A `?` behind a
/// form leaves the phrase out where the figure is not known.
fn phrases(event: &str) -> &'static [&'static str] {
    match event {
        "run_started" => &[
            "run {run} started",
            "{epochs} epochs",
            "{train_samples:count} training samples",
            "{val_samples:count} validation samples",
            "global batch {global_batch}",
            "seed {seed}",
            "see {page}",
        ],
        "waiting_for_workers" => &["waiting for workers", "{present} of {expected}", "at {address}"],
        "worker_joined" => &["worker {worker} joined", "{device}", "on {host}"],
        "worker_left" => &["worker {worker} left", "{reason}"],
        "worker_returned" => &["worker {worker} is back at its place"],
        "worker_refused" => &["worker {worker} was refused", "{reason}"],
        "worker_slow" => {
            &["worker {worker} is slow", "{step_ms:ms} a step", "its team-mates' median is {median_ms:ms}"]
        }
        "generation_continued" => &["generation {generation} goes on", "world size {world_size}"],
        "steps_lost" => &[
            "steps {applied_step:count} to {reported_step:count} were lost with their only holders",
            "they are taken again",
        ],
        "generation_formed" => &[
            "generation {generation} formed",
            "world size {world_size}",
            "donor {donor}",
            "at step {applied_step:count}",
            "in {elapsed_ms:ms}",
        ],
        "generation_aborted" => &["generation {generation} aborted", "{reason}"],
        "coordinator_restarted" => &["coordinator restarted", "term {term}"],
        "epoch_started" => &["epoch {epoch}{/epochs} started", "{samples:count} samples"],
        "progress" => &[
            "epoch {epoch}{/epochs}",
            "{cursor:count}{/samples} samples",
            "step {step:count}",
            "loss {loss:.4}",
            "{images_per_second:.1} images/s",
            "{eta_s:s?} left",
        ],
        "step_skipped" => &["step {step:count} skipped", "{reason}"],
        "epoch_finished" => &[
            "epoch {epoch}{/epochs} finished",
            "train loss {train_loss:.4}",
            "{samples:count} samples",
            "{images_per_second:.1} images/s",
        ],
        "validated" => &[
            "epoch {epoch}{/epochs} validated",
            "val loss {val_loss:.4}",
            "accuracy {val_accuracy:.4}",
            "mIoU {val_miou:.4}",
            "by class {val_iou_foreground:.3} {val_iou_background:.3} {val_iou_boundary:.3}",
            "{samples:count} samples",
        ],
        "checkpoint_committed" => &[
            "checkpoint {id} committed",
            "{bytes:bytes}",
            "in {seconds:s}",
            "training held for {stall_ms:ms}",
        ],
        "checkpoint_failed" => &["checkpoint {id} failed", "{reason}"],
        "pretrained_loaded" => &["encoder starts from {file}"],
        "warning" => &["warning", "{reason}"],
        "data_warning" => &["data warning", "{file}", "{reason}"],
        "early_stopped" => &["stopped early", "best epoch {best_epoch}"],
        "run_finished" => &[
            "run {run} {status}",
            "{epochs} epochs",
            "best epoch {best_epoch}",
            "val loss {val_loss:.4}",
            "accuracy {val_accuracy:.4}",
            "mIoU {val_miou:.4}",
            "{images_per_second:.1} images/s",
            "weights in {best_weights}",
        ],
        "run_failed" => &["run {run} failed", "{reason}"],
        _ => &[],
    }
}

/// Context that every event carries, and what is for tools: read in the headline or not at all.
const CONTEXT: [&str; 10] =
    ["event", "run", "rank", "generation", "epoch", "step", "term", "cause", "stopped", "learning_rate"];

/// Whether lines have colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Paint {
    Plain,
    Ansi,
}

impl Paint {
    /// Colours are for terminals, unless `NO_COLOR` is set to anything but nothing.
    pub fn choose(terminal: bool, no_color: Option<&OsStr>) -> Self {
        let refused = no_color.is_some_and(|value| !value.is_empty());
        if terminal && !refused { Self::Ansi } else { Self::Plain }
    }

    fn dim(self, text: &str) -> String {
        self.wrap("2", text)
    }

    fn headline(self, level: Level, text: &str) -> String {
        match level {
            Level::ERROR => self.wrap("1;31", text),
            Level::WARN => self.wrap("33", text),
            Level::INFO => self.wrap("1", text),
            _ => self.dim(text),
        }
    }

    fn wrap(self, code: &str, text: &str) -> String {
        match self {
            Self::Plain => text.to_owned(),
            Self::Ansi => format!("\x1b[{code}m{text}\x1b[0m"),
        }
    }
}

/// One line with its end.
pub(super) fn line(record: &Record, paint: Paint) -> String {
    let (headline, phrases, rest) = match record.event() {
        Some(event) => event_words(event, record),
        None => log_words(record),
    };
    let time = record.timestamp.get(11..19).unwrap_or(&record.timestamp);
    let mut words = vec![paint.dim(time), paint.headline(record.level, &headline)];
    words.extend(phrases);
    words.extend((!rest.is_empty()).then(|| paint.dim(&rest.join(" "))));
    words.join("  ") + "\n"
}

/// Headline, phrases, and fields that are in neither.
type Words = (String, Vec<String>, Vec<String>);

fn event_words(event: &str, record: &Record) -> Words {
    let mut said = vec!["event", "run"];
    let Some((headline, phrases)) = phrases(event).split_first() else {
        return (event.to_owned(), Vec::new(), pairs(record, &said));
    };
    said.extend(CONTEXT);
    let headline = fill(headline, record, &mut said).unwrap_or_else(|| event.replace('_', " "));
    let phrases = phrases.iter().filter_map(|phrase| fill(phrase, record, &mut said)).collect();
    (headline, phrases, pairs(record, &said))
}

fn log_words(record: &Record) -> Words {
    let message = record.get("message").map(|message| show(message, "")).unwrap_or_default();
    let headline = format!("{} {}: {message}", record.level.as_str().to_lowercase(), record.target);
    (headline, Vec::new(), pairs(record, &["message"]))
}

fn pairs(record: &Record, said: &[&str]) -> Vec<String> {
    let unsaid = record.fields.iter().filter(|(name, _)| !said.contains(&name.as_ref()));
    unsaid.map(|(name, value)| format!("{name}={}", show(value, ""))).collect()
}

/// The phrase with its fields, or `None` if one is absent. Notes which fields are said now.
fn fill<'a>(phrase: &'a str, record: &Record, said: &mut Vec<&'a str>) -> Option<String> {
    let (mut text, mut rest, mut names) = (String::new(), phrase, Vec::new());
    while let Some((before, after)) = rest.split_once('{') {
        let (field, after) = after.split_once('}')?;
        text.push_str(before);
        rest = after;
        let (name, form) = field.split_once(':').unwrap_or((field, ""));
        if let Some(name) = name.strip_prefix('/') {
            if let Some(value) = record.get(name) {
                let _ = write!(text, "/{}", show(value, form));
                names.push(name);
            }
        } else {
            let value = record.get(name)?;
            names.push(name);
            match form.strip_suffix('?') {
                Some(_) if value.is_null() => {
                    said.extend(names);
                    return None;
                }
                known => text.push_str(&show(value, known.unwrap_or(form))),
            }
        }
    }
    said.extend(names);
    Some(text + rest)
}

/// A value on one line, whatever a peer put into it.
fn show(value: &Value, form: &str) -> String {
    let number = value.as_f64();
    match (form, number) {
        ("count", _) if value.is_u64() => count(value.as_u64().unwrap_or_default()),
        ("bytes", Some(bytes)) => ByteSize::b(bytes as u64).display().si().to_string(),
        ("s", Some(seconds)) => duration(seconds),
        ("ms", Some(ms)) => duration(ms / 1000.0),
        (".1", Some(number)) => format!("{number:.1}"),
        (".3", Some(number)) => format!("{number:.3}"),
        (".4", Some(number)) => format!("{number:.4}"),
        _ => match value {
            Value::Null => "nan".to_owned(),
            Value::String(text) => printable(text),
            other => other.to_string(),
        },
    }
}

/// On one line, and without what a terminal would obey.
pub fn printable(text: &str) -> String {
    let shown = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(shown).collect()
}

/// `12,345`.
pub(super) fn count(number: u64) -> String {
    let digits = number.to_string();
    let grouped = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy);
    grouped.collect::<Vec<_>>().join(",")
}

/// Seconds as `350 ms`, `12.3 s`, `3m 20s` or `2h 05m`.
pub(super) fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match seconds {
        s if !s.is_finite() => "?".to_owned(),
        s if s < 0.9995 => format!("{:.0} ms", s * 1000.0),
        s if s < 59.95 => format!("{s:.1} s"),
        _ if whole < 3600 => format!("{}m {:02}s", whole / 60, whole % 60),
        _ => format!("{}h {:02}m", whole / 3600, whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!([0, 999, 1000, 1234567].map(count), ["0", "999", "1,000", "1,234,567"]);
        let spans = [0.0, 0.35, 0.9996, 12.34, 59.96, 200.0, 3599.6, 7500.0, f64::NAN];
        let expected = ["0 ms", "350 ms", "1.0 s", "12.3 s", "1m 00s", "3m 20s", "1h 00m", "2h 05m", "?"];
        assert_eq!(spans.map(duration), expected);
    }

    #[test]
    fn colours_need_a_terminal_and_consent() {
        assert_eq!(Paint::choose(true, None), Paint::Ansi);
        assert_eq!(Paint::choose(true, Some(OsStr::new(""))), Paint::Ansi);
        assert_eq!(Paint::choose(true, Some(OsStr::new("1"))), Paint::Plain);
        assert_eq!(Paint::choose(false, None), Paint::Plain);
    }
}
