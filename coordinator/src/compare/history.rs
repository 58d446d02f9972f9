//! One run, as its directory tells it.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use musher_dataset::CLASS_NAMES;
use musher_proto::scores::TRIMAP_CLASSES;
use serde_json::Value;
use thiserror::Error;

#[derive(Debug, Error)]
pub enum HistoryError {
    #[error("{} is no run directory, as it has no events.jsonl: name one such as runs/pets", .0.display())]
    NoRun(PathBuf),
    #[error("the run {} has not validated yet: there is nothing to compare", .0.display())]
    NothingYet(PathBuf),
    #[error("cannot read {}: {source}", file.display())]
    Read { file: PathBuf, source: io::Error },
}

/// A run so far. Epochs that were trained again after a resumption are told as they were the last time.
#[derive(Clone, Debug)]
pub struct RunHistory {
    /// Runs with one label are of one kind, and differ by their seeds.
    pub label: String,
    pub dir: PathBuf,
    pub epochs: BTreeMap<u32, EpochFigures>,
    /// The run's choice, or where it has not made one, the lowest validation loss.
    pub best_epoch: u32,
    /// Why it ended: `early`, `epoch_limit`, `request`, or `failed`; `None` while it goes on.
    pub ended: Option<String>,
    /// From its start to its newest event, the pauses between a stop and a resumption left out.
    pub seconds: f64,
    /// Images, truths and predictions of the best epoch: a PNG of [`musher_dataset::strip`].
    pub samples: Option<Vec<u8>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EpochFigures {
    pub train_loss: Option<f64>,
    pub val_loss: Option<f64>,
    pub accuracy: Option<f64>,
    pub miou: Option<f64>,
    pub class_iou: [Option<f64>; TRIMAP_CLASSES],
}

impl RunHistory {
    pub fn read(dir: &Path, label: String) -> Result<Self, HistoryError> {
        let file = dir.join("events.jsonl");
        let bytes = fs::read(&file).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => HistoryError::NoRun(dir.into()),
            _ => HistoryError::Read { file, source },
        })?;
        let told = Told::of(&String::from_utf8_lossy(&bytes));
        let best_epoch = told.best_epoch.or_else(|| lowest_loss(&told.epochs));
        let samples = ["best.png".into(), format!("epoch-{:04}.png", best_epoch.unwrap_or_default())];
        Ok(Self {
            label,
            dir: dir.into(),
            best_epoch: best_epoch.ok_or_else(|| HistoryError::NothingYet(dir.into()))?,
            samples: samples.iter().find_map(|name| fs::read(dir.join("samples").join(name)).ok()),
            epochs: told.epochs,
            ended: told.ended,
            seconds: told.seconds,
        })
    }

    /// The figures of the best epoch.
    pub fn best(&self) -> EpochFigures {
        self.epochs.get(&self.best_epoch).copied().unwrap_or_default()
    }

    pub fn last_epoch(&self) -> u32 {
        self.epochs.keys().next_back().copied().unwrap_or_default()
    }
}

/// What the events say, one after the other.
#[derive(Default)]
struct Told {
    epochs: BTreeMap<u32, EpochFigures>,
    best_epoch: Option<u32>,
    ended: Option<String>,
    seconds: f64,
}

impl Told {
    /// A line that is not JSON is the torn last one of a process that was killed.
    fn of(text: &str) -> Self {
        let mut told = Self::default();
        let mut before = None;
        for event in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            let now = event["timestamp"].as_str().and_then(seconds_of);
            if event["event"] == "run_started" {
                told.ended = None; // it was resumed
            } else if let (Some(before), Some(now)) = (before, now) {
                told.seconds += f64::max(now - before, 0.0);
            }
            before = now.or(before);
            told.hear(&event);
        }
        told
    }

    fn hear(&mut self, event: &Value) {
        let number = |name: &str| event[name].as_f64();
        let whole = |name: &str| event[name].as_u64().map(|number| number as u32);
        let text = |name: &str| event[name].as_str().map(str::to_owned);
        match (event["event"].as_str().unwrap_or_default(), whole("epoch")) {
            ("epoch_finished", Some(epoch)) => {
                self.epochs.entry(epoch).or_default().train_loss = number("train_loss");
            }
            ("validated", Some(epoch)) => {
                let figures = self.epochs.entry(epoch).or_default();
                figures.val_loss = number("val_loss");
                figures.accuracy = number("val_accuracy");
                figures.miou = number("val_miou");
                figures.class_iou = CLASS_NAMES.map(|name| number(&format!("val_iou_{name}")));
            }
            ("early_stopped", _) => self.best_epoch = whole("best_epoch"),
            ("run_finished", _) => {
                self.best_epoch = whole("best_epoch").or(self.best_epoch);
                self.ended = text("stopped").or(text("status"));
            }
            ("run_failed", _) => self.ended = Some("failed".into()),
            _ => {}
        }
    }
}

fn lowest_loss(epochs: &BTreeMap<u32, EpochFigures>) -> Option<u32> {
    let losses = epochs.iter().filter_map(|(&epoch, figures)| Some((epoch, figures.val_loss?)));
    losses.min_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(epoch, _)| epoch)
}

/// Seconds since 1970 of a UTC time as events have it: `2026-11-23T18:12:26.187980Z`.
fn seconds_of(timestamp: &str) -> Option<f64> {
    let (date, time) = timestamp.strip_suffix('Z')?.split_once('T')?;
    let mut date = date.splitn(3, '-').map(|part| part.parse::<i64>().ok());
    let mut time = time.splitn(3, ':').map(|part| part.parse::<f64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let (hours, minutes, seconds) = (time.next()??, time.next()??, time.next()??);
    Some(days_before(year, month, day) as f64 * 86400.0 + hours * 3600.0 + minutes * 60.0 + seconds)
}

/// Days from 1970-01-01 to a date of the Gregorian calendar: Hinnant, "chrono-Compatible Low-Level Date Algorithms".
fn days_before(year: i64, month: i64, day: i64) -> i64 {
    // A year that begins in March ends with the leap day.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * month + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_seconds_since_1970() {
        assert_eq!(seconds_of("1970-01-01T00:00:01.500000Z"), Some(1.5));
        assert_eq!(seconds_of("2026-11-23T18:12:26.000000Z"), Some(1_795_457_546.0));
        assert_eq!(seconds_of("2024-02-29T00:00:00.0Z"), Some(1_709_164_800.0));
        assert_eq!(seconds_of("today"), None);
    }

    #[test]
    fn a_resumed_run_is_told_as_one_without_the_pause_between() {
        let at =
            |second: u32, rest: &str| format!("{{\"timestamp\":\"2026-01-01T00:00:{second:02}Z\",{rest}}}\n");
        let text = [
            at(0, r#""event":"run_started""#),
            at(
                4,
                r#""event":"validated","epoch":1,"val_loss":0.5,"val_accuracy":0.8,"val_iou_boundary":0.1"#,
            ),
            at(5, r#""event":"run_finished","status":"stopped","stopped":"request""#),
            at(40, r#""event":"run_started""#),
            at(43, r#""event":"epoch_finished","epoch":2,"train_loss":0.4"#),
            at(44, r#""event":"validated","epoch":2,"val_loss":null"#),
            "{\"timestamp\":\"2026-01-01T00:0".into(),
        ]
        .concat();
        let told = Told::of(&text);
        assert_eq!((told.seconds, told.ended), (9.0, None));
        assert_eq!(told.epochs[&1].class_iou, [None, None, Some(0.1)]);
        assert_eq!((told.epochs[&2].train_loss, told.epochs[&2].val_loss), (Some(0.4), None));
        assert_eq!(lowest_loss(&told.epochs), Some(1));
    }

    #[test]
    fn a_directory_without_events_is_no_run() {
        let dir = tempfile::tempdir().unwrap();
        let read = || RunHistory::read(dir.path(), "a".into());
        assert!(matches!(read(), Err(HistoryError::NoRun(_))));
        fs::write(dir.path().join("events.jsonl"), "").unwrap();
        assert!(matches!(read(), Err(HistoryError::NothingYet(_))));
    }
}
