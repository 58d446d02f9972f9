//! A run as it is seen from outside: its process, its directory and its events.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    ops::{Deref, Index},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::process::Pid;
use serde_json::Value;

use crate::{
    checkpoints,
    faults::Stopped,
    process::{End, Process, until},
};

/// A line of `events.jsonl`. An absent field reads as null.
#[derive(Clone, Debug, PartialEq)]
pub struct Event(Value);

impl Event {
    /// A line of the file.
    pub fn parse(line: &[u8]) -> Self {
        let parsed = serde_json::from_slice(line);
        let said = || String::from_utf8_lossy(line);
        Self(parsed.unwrap_or_else(|error| panic!("{} is not JSON: {error}", said())))
    }

    pub fn name(&self) -> &str {
        self["event"].as_str().unwrap_or_default()
    }

    #[track_caller]
    pub fn number(&self, field: &str) -> u64 {
        self[field].as_u64().unwrap_or_else(|| panic!("{field} is no whole number in {self:?}"))
    }

    #[track_caller]
    pub fn real(&self, field: &str) -> f64 {
        self[field].as_f64().unwrap_or_else(|| panic!("{field} is no number in {self:?}"))
    }

    #[track_caller]
    pub fn text(&self, field: &str) -> &str {
        self[field].as_str().unwrap_or_else(|| panic!("{field} is no text in {self:?}"))
    }

    pub fn fields(&self) -> impl Iterator<Item = &str> {
        self.0.as_object().into_iter().flat_map(|fields| fields.keys()).map(String::as_str)
    }

    pub fn has(&self, field: &str) -> bool {
        self.0.get(field).is_some()
    }
}

impl Index<&str> for Event {
    type Output = Value;

    fn index(&self, field: &str) -> &Value {
        &self.0[field]
    }
}

/// `musher launch` or `musher serve`, followed.
#[derive(Debug)]
pub struct Run {
    process: Process,
    dir: PathBuf,
    /// Bytes of the event file that an earlier life of the run wrote.
    past: usize,
}

impl Deref for Run {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

/// An ended run.
#[derive(Debug)]
pub struct Ended {
    pub end: End,
    pub events: Vec<Event>,
    pub dir: PathBuf,
}

impl Run {
    /// Events that are in `dir` already are not this process's. Call it before the process can write.
    pub(crate) fn follow(process: Process, dir: PathBuf, past: usize) -> Self {
        Self { process, dir, past }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Events of this process so far.
    pub fn events(&self) -> Vec<Event> {
        events_of(&self.dir, self.past)
    }

    /// Waits for the first event that `is_it`.
    #[track_caller]
    pub fn wait_for(&mut self, what: &str, is_it: impl Fn(&Event) -> bool) -> Event {
        self.wait_to_find(what, |events| events.iter().find(|event| is_it(event)).cloned())
    }

    /// Waits for the `nth` event of that name, from 1.
    #[track_caller]
    pub fn wait_for_nth(&mut self, name: &str, nth: usize) -> Event {
        let find = |events: &[Event]| events.iter().filter(|e| e.name() == name).nth(nth - 1).cloned();
        self.wait_to_find(&format!("{name} number {nth}"), find)
    }

    /// Waits for an event of that name that `is_it`, past the first `told` events.
    #[track_caller]
    pub fn wait_past(&mut self, told: usize, name: &str, is_it: impl Fn(&Event) -> bool) -> Event {
        let find = |events: &[Event]| events[told..].iter().find(|e| e.name() == name && is_it(e)).cloned();
        self.wait_to_find(&format!("{name} past the first {told} events"), find)
    }

    #[track_caller]
    fn wait_to_find(&mut self, what: &str, find: impl Fn(&[Event]) -> Option<Event>) -> Event {
        let (dir, past) = (self.dir.clone(), self.past);
        let found = until(
            || {
                // In this order: what it wrote before it ended is there to be found.
                let ended = self.process.has_ended();
                find(&events_of(&dir, past)).map(Some).or(ended.then_some(None))
            },
            || format!("no {what}\n{}", said(&dir)),
        );
        found.unwrap_or_else(|| panic!("the run ended without {what}\n{}", self.process.said()))
    }

    /// Waits for the first mid-epoch checkpoint, after step 4 of a job with `checkpoint.every_steps = 4`.
    /// As checkpoints never pile up, the team cannot be far ahead of it.
    #[track_caller]
    pub fn wait_for_mid_epoch(&mut self) -> Event {
        self.wait_for("a checkpoint after step 4", |event| {
            event.name() == "checkpoint_committed" && event.number("step") == 4
        })
    }

    /// Stops `process` while a checkpoint is being written that can't be completed without it. Returns the
    /// checkpoint's id. The job must take one every few steps.
    #[track_caller]
    pub fn stop_in_a_checkpoint(&mut self, process: Pid) -> (Stopped, String) {
        /// A part that is on its way arrives in this time.
        const SETTLES: Duration = Duration::from_millis(300);
        let dir = self.dir.join("checkpoints");
        let caught = || {
            let id = checkpoints::pending(&dir)?;
            let stopped = Stopped::stop(process);
            thread::sleep(SETTLES);
            (checkpoints::pending(&dir).as_deref() == Some(&id)).then_some((stopped, id))
        };
        until(caught, || format!("no checkpoint was caught on its way\n{}", said(&self.dir)))
    }

    /// The coordinator's URL.
    #[track_caller]
    pub fn address(&self) -> String {
        let started = || self.events().into_iter().find(|event| event.name() == "run_started");
        let started = until(started, || format!("the run did not start\n{}", self.process.said()));
        format!("http://{}", started.text("address"))
    }

    pub fn has_ended(&mut self) -> bool {
        self.process.has_ended()
    }

    #[track_caller]
    pub fn wait(self) -> Ended {
        let Self { process, dir, past } = self;
        let end = process.wait();
        Ended { events: events_of(&dir, past), end, dir }
    }

    /// SIGKILL for the coordinator and the workers that it started. Returns all its events.
    pub fn kill(mut self) -> Vec<Event> {
        self.process.kill_with_children();
        self.events()
    }
}

impl Ended {
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        Self { end: self.end.expect_code(code), ..self }
    }

    /// All events of that name.
    pub fn all(&self, name: &str) -> Vec<&Event> {
        self.events.iter().filter(|event| event.name() == name).collect()
    }

    /// The only event of that name.
    #[track_caller]
    pub fn one(&self, name: &str) -> &Event {
        let all = self.all(name);
        assert_eq!(all.len(), 1, "{name} in {:#?}", self.events);
        all[0]
    }
}

fn said(dir: &Path) -> String {
    fs::read_to_string(dir.join("events.jsonl")).unwrap_or_else(|_| "there are no events".into())
}

/// The whole lines from byte `past` on; a line that is being written is left for later.
fn events_of(dir: &Path, past: usize) -> Vec<Event> {
    let mut follower = Follower { read: past as u64, ..Follower::new(dir.to_owned()) };
    follower.read();
    follower.events
}

/// The events of all lives of a run, read as they come.
#[derive(Debug)]
pub struct Follower {
    file: PathBuf,
    /// Bytes.
    read: u64,
    events: Vec<Event>,
}

impl Follower {
    /// `dir` is the run's.
    pub fn new(dir: PathBuf) -> Self {
        Self { file: dir.join("events.jsonl"), read: 0, events: Vec::new() }
    }

    /// All so far.
    pub fn read(&mut self) -> &[Event] {
        let mut text = Vec::new();
        let read = File::open(&self.file).and_then(|mut file| {
            file.seek(SeekFrom::Start(self.read))?;
            file.read_to_end(&mut text)
        });
        let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        if read.is_ok() {
            let lines = text[..whole].split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
            self.events.extend(lines.map(Event::parse));
            self.read += whole as u64;
        }
        &self.events
    }
}
