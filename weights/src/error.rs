//! What can be wrong with a weights file.

use std::path::PathBuf;

/// Of a file's own words in a message.
const MOST_CHARACTERS: usize = 400;

/// Why a weights file can't be used. [`crate::WeightsFile::open`] puts the file's name in front.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("it can't be read: {0}")]
    Io(#[from] std::io::Error),
    #[error("it is damaged, or no weights file: {0}; get it once more")]
    Damaged(String),
    #[error("{what} can't be read: {instead}")]
    Unsupported { what: String, instead: &'static str },
    #[error("{}: {problem}", file.display())]
    In { file: PathBuf, problem: Box<Error> },
}

impl Error {
    pub(crate) fn damaged(what: impl Into<String>) -> Self {
        Self::Damaged(printable(what.into()))
    }

    pub(crate) fn unsupported(what: impl Into<String>, instead: &'static str) -> Self {
        Self::Unsupported { what: printable(what.into()), instead }
    }
}

/// One line of moderate length, whatever a hostile file's names are.
fn printable(text: String) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).take(MOST_CHARACTERS).collect()
}
