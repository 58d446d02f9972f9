//! Shared secrets, as the least that keeps strangers out. They come by file or environment, never as an argument,
//! and never show in a log.

use std::{
    env::{self, VarError},
    fmt, fs, io,
    path::Path,
};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use thiserror::Error;

/// Fewer characters can be guessed.
const SHORTEST: usize = 16;

/// Printed, it is three stars.
#[derive(Clone)]
pub struct Token(String);

#[derive(Debug, Error)]
pub enum TokenError {
    #[error("cannot read the token in {path}: {source}; `openssl rand -hex 32` makes one")]
    Unreadable { path: String, source: io::Error },
    #[error(
        "the token in {place} has {length} characters, fewer than {SHORTEST}: make one with `openssl rand -hex 32`"
    )]
    Short { place: String, length: usize },
    #[error("the token in {place} holds characters that a header can't carry: use letters and digits")]
    Unprintable { place: String },
}

impl Token {
    pub fn read(file: &Path) -> Result<Self, TokenError> {
        let path = file.display().to_string();
        let text = fs::read_to_string(file)
            .map_err(|source| TokenError::Unreadable { path: path.clone(), source })?;
        Self::parse(&text, path)
    }

    /// From a variable that holds the token itself; `None` where it is absent or empty.
    pub fn from_env(variable: &str) -> Result<Option<Self>, TokenError> {
        match env::var(variable) {
            Ok(text) if !text.is_empty() => Self::parse(&text, variable.into()).map(Some),
            Ok(_) | Err(VarError::NotPresent) => Ok(None),
            Err(VarError::NotUnicode(_)) => Err(TokenError::Unprintable { place: variable.into() }),
        }
    }

    fn parse(text: &str, place: String) -> Result<Self, TokenError> {
        let text = text.trim();
        if text.len() < SHORTEST {
            return Err(TokenError::Short { place, length: text.len() });
        }
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(TokenError::Unprintable { place });
        }
        Ok(Self(text.into()))
    }

    /// Whether somebody showed this token. How long it takes tells nothing of the token.
    pub fn is(&self, shown: &str) -> bool {
        let digest = |text: &str| {
            let mac = Hmac::<Sha256>::new_from_slice(b"musher token").expect("any key length will do");
            mac.chain_update(text)
        };
        digest(shown).verify(&digest(&self.0).finalize().into_bytes()).is_ok()
    }

    /// As a header's value.
    pub(crate) fn bearer(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn it_is_equal_to_itself_alone_and_shows_nothing() {
        let token = Token::parse(" 0123456789abcdef\n", "a test".into()).unwrap();
        assert!(token.is("0123456789abcdef"));
        assert!(
            ["", "0123456789abcde", "0123456789abcdef0", " 0123456789abcdef"].iter().all(|t| !token.is(t))
        );
        assert_eq!(format!("{token:?}"), "***");
    }

    #[test]
    fn one_that_can_be_guessed_or_carried_by_no_header_is_refused_without_showing_it() {
        let short = Token::parse("hunter2", "FILE".into()).unwrap_err().to_string();
        assert!(short.contains("FILE") && short.contains("7 characters") && !short.contains("hunter2"));
        let odd = Token::parse("0123456789abc\ndef", "FILE".into()).unwrap_err().to_string();
        assert!(odd.contains("header") && !odd.contains("0123"), "{odd}");
    }
}
