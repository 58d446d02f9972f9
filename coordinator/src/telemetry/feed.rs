//! The run's events for whoever looks at it now: the newest ones, its curves, and each event as it comes.
//!
//! It knows no more than `events.jsonl` says, so a resumed run shows what its earlier lives wrote there.

use std::{
    collections::VecDeque,
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde_json::{Map, Value};
use tokio::sync::broadcast;

use super::{Sink, record::Record};

/// Events kept, progress not counted.
const RECENT: usize = 500;
/// Events that a slow reader may be behind before it misses some.
const BEHIND: usize = 256;
/// Points of a curve; a full one drops every other.
const POINTS: usize = 2048;

/// One event, as its line in `events.jsonl` has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Said {
    /// Grows by one at each event.
    pub id: u64,
    pub fields: Map<String, Value>,
}

impl Said {
    pub fn name(&self) -> &str {
        self.fields.get("event").and_then(Value::as_str).unwrap_or_default()
    }
}

/// What the curves show, each point the fields of one event.
#[derive(Clone, Debug, Default)]
pub struct Curves {
    /// `progress`: step, loss, images a second.
    pub progress: Vec<Arc<Said>>,
    /// Every so many of them is kept.
    stride: u64,
    seen: u64,
    pub epochs: Vec<Arc<Said>>,
    pub validations: Vec<Arc<Said>>,
}

/// Clones are the same feed.
#[derive(Clone, Debug)]
pub struct Feed(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    past: Mutex<Past>,
    live: broadcast::Sender<Arc<Said>>,
}

#[derive(Debug, Default)]
struct Past {
    next: u64,
    recent: VecDeque<Arc<Said>>,
    curves: Curves,
}

impl Default for Feed {
    fn default() -> Self {
        Self(Arc::new(Inner { past: Mutex::default(), live: broadcast::Sender::new(BEHIND) }))
    }
}

impl Feed {
    /// Takes in what earlier lives of the run said. A file that can't be read is an empty past.
    pub fn replay(&self, events_file: &Path) {
        let Ok(file) = File::open(events_file) else { return };
        for line in BufReader::new(file).split(b'\n').map_while(Result::ok) {
            if let Ok(fields) = serde_json::from_slice(&line) {
                self.say(fields);
            }
        }
    }

    /// The newest events with ids above `after`, oldest first, and all that come after them.
    pub fn follow(&self, after: Option<u64>) -> (Vec<Arc<Said>>, broadcast::Receiver<Arc<Said>>) {
        let past = self.lock();
        let missed = past.recent.iter().filter(|said| after.is_none_or(|after| said.id > after));
        (missed.cloned().collect(), self.0.live.subscribe())
    }

    pub fn curves(&self) -> Curves {
        self.lock().curves.clone()
    }

    fn say(&self, fields: Map<String, Value>) {
        let mut past = self.lock();
        past.next += 1;
        let said = Arc::new(Said { id: past.next, fields });
        past.keep(&said);
        // Under the lock, so that nobody misses it between the past and what comes. An error: nobody looks.
        let _ = self.0.live.send(said);
    }

    fn lock(&self) -> MutexGuard<'_, Past> {
        self.0.past.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Past {
    fn keep(&mut self, said: &Arc<Said>) {
        match said.name() {
            "progress" => return self.curves.progressed(said),
            "epoch_finished" => self.curves.epochs.push(said.clone()),
            "validated" => self.curves.validations.push(said.clone()),
            _ => {}
        }
        self.recent.push_back(said.clone());
        if self.recent.len() > RECENT {
            self.recent.pop_front();
        }
    }
}

impl Curves {
    fn progressed(&mut self, said: &Arc<Said>) {
        self.stride = self.stride.max(1);
        if self.seen.is_multiple_of(self.stride) {
            self.progress.push(said.clone());
        }
        self.seen += 1;
        if self.progress.len() >= POINTS {
            let mut nth = 0;
            self.progress.retain(|_| {
                nth += 1;
                nth % 2 == 1
            });
            self.stride *= 2;
        }
    }
}

impl Sink for Feed {
    fn take(&self, record: &Record) {
        self.say(record.to_object());
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    fn say(feed: &Feed, fields: Value) {
        feed.say(fields.as_object().unwrap().clone());
    }

    #[test]
    fn who_comes_back_hears_what_was_missed_and_then_each_event() {
        let feed = Feed::default();
        for step in 1..=3 {
            say(&feed, json!({"event": "epoch_finished", "step": step}));
        }
        let (missed, mut live) = feed.follow(Some(1));
        assert_eq!(missed.iter().map(|said| said.id).collect::<Vec<_>>(), [2, 3]);
        say(&feed, json!({"event": "early_stopped"}));
        assert_eq!(live.try_recv().unwrap().name(), "early_stopped");
        assert_eq!(feed.follow(None).0.len(), 4);
    }

    #[test]
    fn progress_is_a_curve_and_no_news() {
        let feed = Feed::default();
        for step in 0..3 * POINTS as u64 {
            say(&feed, json!({"event": "progress", "step": step}));
        }
        let steps: Vec<u64> =
            feed.curves().progress.iter().map(|said| said.fields["step"].as_u64().unwrap()).collect();
        assert!((POINTS / 2..POINTS).contains(&steps.len()), "{}", steps.len());
        assert!(steps.windows(2).all(|pair| pair[1] - pair[0] == steps[1]), "evenly thinned out");
        assert!(feed.follow(None).0.is_empty());
    }

    #[test]
    fn an_earlier_life_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("events.jsonl");
        std::fs::write(&file, "{\"event\":\"validated\",\"epoch\":1}\n{\"event\":\"valida").unwrap();
        let feed = Feed::default();
        feed.replay(&file);
        assert_eq!(feed.curves().validations.len(), 1);
        feed.replay(&dir.path().join("absent"));
    }
}
