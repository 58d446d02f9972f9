//! Lines on stderr, and the place of a progress bar between them.

use std::env;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};

use indicatif::MultiProgress;

use super::pretty::{self, Paint};
use super::record::Record;
use super::{LogFormat, Sink};

/// Where lines go and how they look. Clones are the same console.
#[derive(Clone)]
pub struct Console {
    format: LogFormat,
    paint: Paint,
    /// Present where a bar can be drawn: a terminal with lines for people.
    bars: Option<MultiProgress>,
    out: Arc<Mutex<dyn Write + Send>>,
}

impl Console {
    /// The process's stderr, in `format` or the one that suits what stderr is.
    pub(super) fn stderr(format: Option<LogFormat>) -> Self {
        let terminal = io::stderr().is_terminal();
        let default = if terminal { LogFormat::Pretty } else { LogFormat::Json };
        let format = format.unwrap_or(default);
        let no_color = env::var_os("NO_COLOR");
        Self {
            format,
            paint: Paint::choose(terminal, no_color.as_deref()),
            bars: (terminal && format == LogFormat::Pretty).then(MultiProgress::new),
            out: Arc::new(Mutex::new(io::stderr())),
        }
    }

    #[cfg(test)]
    pub(super) fn to(out: Arc<Mutex<dyn Write + Send>>, format: LogFormat, paint: Paint) -> Self {
        Self { format, paint, bars: None, out }
    }

    pub(super) fn bars(&self) -> Option<&MultiProgress> {
        self.bars.as_ref()
    }
}

impl Sink for Console {
    fn take(&self, record: &Record) {
        // The bar says it, and more often.
        if self.bars.is_some() && record.event() == Some("progress") {
            return;
        }
        let line = match self.format {
            LogFormat::Json => record.to_json_line(),
            LogFormat::Pretty => pretty::line(record, self.paint),
        };
        let write = || {
            let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
            // A closed stderr is no reason to stop training.
            let _ = out.write_all(line.as_bytes());
        };
        match &self.bars {
            Some(bars) => bars.suspend(write),
            None => write(),
        }
    }
}
