//! `events.jsonl`: appended across restarts, a line at a time.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Sink;
use super::record::Record;

/// The file, opened to append.
#[derive(Debug)]
pub(super) struct EventsFile {
    file: File,
    complained: AtomicBool,
    /// A write failed: what it left of its line is to be ended.
    torn: AtomicBool,
}

impl EventsFile {
    /// Opens or creates the file and its directory. A line that a crash cut short is ended, so that
    /// it spoils no other.
    pub fn open(path: &Path) -> io::Result<Self> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        let mut file = File::options().read(true).append(true).create(true).open(path)?;
        if file.metadata()?.len() > 0 {
            let mut last = [0];
            file.seek(SeekFrom::End(-1))?;
            file.read_exact(&mut last)?;
            if last != *b"\n" {
                file.write_all(b"\n")?;
            }
        }
        Ok(Self { file, complained: AtomicBool::new(false), torn: AtomicBool::new(false) })
    }
}

impl Sink for EventsFile {
    fn take(&self, record: &Record) {
        // One write of a whole line to a file in append mode: lines of several threads never mix.
        let line = record.to_json_line();
        let line = if self.torn.swap(false, Ordering::Relaxed) { format!("\n{line}") } else { line };
        let written = (&self.file).write_all(line.as_bytes());
        self.torn.fetch_or(written.is_err(), Ordering::Relaxed);
        if let Err(error) = written
            && !self.complained.swap(true, Ordering::Relaxed)
        {
            // Said past tracing: an event about an event would come back here.
            eprintln!("events are being lost, cannot write events.jsonl: {error}; free some space");
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// As a disk that is full for a while leaves it.
    #[test]
    fn half_a_line_spoils_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let file = EventsFile::open(&path).unwrap();
        (&file.file).write_all("{\"event\":\"ha\u{e9}".as_bytes().split_last().unwrap().1).unwrap();
        file.torn.store(true, Ordering::Relaxed);
        let record = |event: &str| {
            let fields = serde_json::json!({ "event": event });
            Record::from_object(fields.as_object().unwrap())
        };
        for event in ["next", "last"] {
            file.take(&record(event));
        }
        let text = String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned();
        let told: Vec<serde_json::Value> =
            text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        assert_eq!(told.iter().map(|event| &event["event"]).collect::<Vec<_>>(), ["next", "last"]);
        assert_eq!(text.lines().count(), 3);
    }
}
