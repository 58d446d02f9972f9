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
        Ok(Self { file, complained: AtomicBool::new(false) })
    }
}

impl Sink for EventsFile {
    fn take(&self, record: &Record) {
        // One write of a whole line to a file in append mode: lines of several threads never mix.
        let written = (&self.file).write_all(record.to_json_line().as_bytes());
        if let Err(error) = written
            && !self.complained.swap(true, Ordering::Relaxed)
        {
            // Said past tracing: an event about an event would come back here.
            eprintln!("events are being lost, cannot write events.jsonl: {error}; free some space");
        }
    }
}
