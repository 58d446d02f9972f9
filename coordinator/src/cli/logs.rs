//! `musher logs`: what happened in a run, as far as one wants to know it.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, BufRead, BufReader, IsTerminal, Write},
    path::PathBuf,
    thread,
    time::Duration,
};

use anyhow::{Context, anyhow};
use clap::Args;
use serde_json::{Map, Value};
use tracing::Level;

use super::{Exit, Failure, usage};
use crate::telemetry;

/// Between two looks at a file that may grow.
const POLL: Duration = Duration::from_millis(200);

#[derive(Debug, Args)]
pub struct Logs {
    /// The run's directory
    run_dir: PathBuf,
    /// Only events of this name; may be given again [default: all but `progress`]
    #[arg(long = "event", value_name = "EVENT")]
    events: Vec<String>,
    /// Only what is said of this worker
    #[arg(long)]
    worker: Option<String>,
    /// Only what is said of this epoch
    #[arg(long)]
    epoch: Option<u64>,
    /// Only what is at least so bad: info, warn or error
    #[arg(long, value_name = "LEVEL", default_value_t = Level::INFO)]
    level: Level,
    /// Go on as the run goes on
    #[arg(long, short)]
    follow: bool,
    /// Print the lines as they are in the file
    #[arg(long)]
    json: bool,
}

impl Logs {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let file = self.run_dir.join("events.jsonl");
        let opened = File::open(&file).with_context(|| {
            format!("{} is no run directory, as its events.jsonl can't be read", self.run_dir.display())
        });
        let mut lines = BufReader::new(opened.map_err(usage)?);
        let mut seen = Seen::default();
        let mut line = Vec::new();
        loop {
            let read = lines.read_until(b'\n', &mut line)?;
            if read > 0 && line.ends_with(b"\n") {
                if !self.show(&String::from_utf8_lossy(&line), &mut seen)? {
                    return Ok(Exit::Finished);
                }
                line.clear();
            } else if self.follow && !seen.is_over {
                thread::sleep(POLL); // the rest of a line comes later
            } else {
                break;
            }
        }
        if self.json {
            return Ok(Exit::Finished);
        }
        let Seen { events, workers, .. } = seen;
        check("event", self.events.iter(), &events)?;
        check("worker", self.worker.iter(), &workers)?;
        Ok(Exit::Finished)
    }

    /// Prints the line if it is wanted; false once nobody reads any more.
    fn show(&self, line: &str, seen: &mut Seen) -> anyhow::Result<bool> {
        // A line that a crash cut short is nobody's event.
        let Ok(fields) = serde_json::from_str::<Map<String, Value>>(line) else { return Ok(true) };
        let text = |name: &str| fields.get(name).and_then(Value::as_str).map(str::to_owned);
        seen.is_over =
            text("event").is_some_and(|event| ["run_finished", "run_failed"].contains(&event.as_str()));
        seen.events.extend(text("event"));
        seen.workers.extend(text("worker"));
        if !self.wants(&fields) {
            return Ok(true);
        }
        let text = match self.json {
            true => line.to_owned(),
            false => telemetry::pretty_line(&fields, io::stdout().is_terminal()),
        };
        match io::stdout().write_all(text.as_bytes()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            written => Ok(written.map(|()| true)?),
        }
    }

    fn wants(&self, fields: &Map<String, Value>) -> bool {
        let text = |name: &str| fields.get(name).and_then(Value::as_str).unwrap_or_default();
        let named = match self.events.is_empty() {
            true => text("event") != "progress",
            false => self.events.iter().any(|event| event == text("event")),
        };
        let level = text("level").parse().unwrap_or(Level::INFO);
        let of = |wanted: &Option<u64>, name| {
            wanted.is_none_or(|wanted| fields.get(name).and_then(Value::as_u64) == Some(wanted))
        };
        named
            && level <= self.level
            && of(&self.epoch, "epoch")
            && self.worker.as_ref().is_none_or(|worker| text("worker") == worker)
    }
}

/// What a run's file names.
#[derive(Default)]
struct Seen {
    events: BTreeSet<String>,
    workers: BTreeSet<String>,
    /// The newest event ends the run, unless it is resumed.
    is_over: bool,
}

/// Whoever asks for what is not there has perhaps misspelt it.
fn check<'a>(
    what: &str,
    mut wanted: impl Iterator<Item = &'a String>,
    there: &BTreeSet<String>,
) -> Result<(), Failure> {
    let Some(unknown) = wanted.find(|wanted| !there.contains(*wanted)) else { return Ok(()) };
    let there = match there.is_empty() {
        true => "there is none".into(),
        false => format!("there are {}", there.iter().cloned().collect::<Vec<_>>().join(", ")),
    };
    Err(usage(anyhow!("there is no {what} {unknown} in this run; {there}")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::Parser;
    use serde_json::json;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        logs: Logs,
    }

    #[test]
    fn filters_go_together() {
        let wants = |flags: &str, event: Value| {
            let cli =
                Cli::try_parse_from(["logs", "run"].into_iter().chain(flags.split_whitespace())).unwrap();
            cli.logs.wants(event.as_object().unwrap())
        };
        let left = json!({"event": "worker_left", "level": "WARN", "worker": "a", "epoch": 2});
        let progress = json!({"event": "progress", "level": "INFO"});
        assert!(wants("", left.clone()) && !wants("", progress.clone()));
        assert!(wants("--event progress --event worker_left", progress.clone()));
        assert!(wants("--level warn --worker a --epoch 2", left.clone()));
        assert!(!wants("--level error", left.clone()) && !wants("--worker b", left.clone()));
        assert!(!wants("--epoch 3", left) && !wants("--event progress --level warn", progress));
    }
}
