//! What can be wrong with a weights file.

use std::path::PathBuf;

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
        Self::Damaged(what.into())
    }

    pub(crate) fn unsupported(what: impl Into<String>, instead: &'static str) -> Self {
        Self::Unsupported { what: what.into(), instead }
    }
}
