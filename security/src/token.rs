//! Shared secrets, as the least that keeps strangers out. They come by file or environment, never as an argument,
//! and never show in a log. A file that changes is read again.

use std::{
    env::{self, VarError},
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use thiserror::Error;

/// Fewer characters can be guessed.
const SHORTEST: usize = 16;

/// For so long after a file was changed, its former token still counts: those who show it may read theirs later.
const FORMER: Duration = Duration::from_secs(600);

/// Printed, it is three stars. Clones share what was read.
#[derive(Clone)]
pub struct Token(Arc<Inner>);

struct Inner {
    /// `None`: it is from the environment, and stays.
    file: Option<PathBuf>,
    held: Mutex<Held>,
}

struct Held {
    text: String,
    /// The one before, and since when it is.
    former: Option<(String, Instant)>,
    /// When the file was changed last.
    version: Option<SystemTime>,
}

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
        let version = version(file);
        let text = read(file)?;
        let held = Mutex::new(Held { text, former: None, version });
        Ok(Self(Arc::new(Inner { file: Some(file.to_owned()), held })))
    }

    /// From a variable that holds the token itself; `None` where it is absent or empty.
    pub fn from_env(variable: &str) -> Result<Option<Self>, TokenError> {
        match env::var(variable) {
            Ok(text) if !text.is_empty() => parse(&text, variable.into()).map(Self::fixed).map(Some),
            Ok(_) | Err(VarError::NotPresent) => Ok(None),
            Err(VarError::NotUnicode(_)) => Err(TokenError::Unprintable { place: variable.into() }),
        }
    }

    fn fixed(text: String) -> Self {
        let held = Mutex::new(Held { text, former: None, version: None });
        Self(Arc::new(Inner { file: None, held }))
    }

    /// What is held, after a look at the file. One that can't be used, as in the midst of a change, changes nothing.
    fn held(&self) -> MutexGuard<'_, Held> {
        let mut held = self.0.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = &self.0.file
            && let Some(found) = version(file)
            && held.version != Some(found)
            && let Ok(text) = read(file)
        {
            held.version = Some(found);
            if text != held.text {
                let former = std::mem::replace(&mut held.text, text);
                held.former = Some((former, Instant::now()));
            }
        }
        held
    }

    /// Whether somebody showed this token, or the one that it replaced just now. How long it takes tells nothing of
    /// either.
    pub fn is(&self, shown: &str) -> bool {
        let held = self.held();
        let former = held.former.as_ref().filter(|(_, since)| since.elapsed() < FORMER);
        let is_current = equals(shown, &held.text);
        former.is_some_and(|(former, _)| equals(shown, former)) || is_current
    }

    /// As a header's value.
    pub(crate) fn bearer(&self) -> String {
        format!("Bearer {}", self.held().text)
    }
}

fn equals(shown: &str, expected: &str) -> bool {
    let digest = |text: &str| {
        let mac = Hmac::<Sha256>::new_from_slice(b"musher token").expect("any key length will do");
        mac.chain_update(text)
    };
    digest(shown).verify(&digest(expected).finalize().into_bytes()).is_ok()
}

fn version(file: &Path) -> Option<SystemTime> {
    fs::metadata(file).and_then(|found| found.modified()).ok()
}

fn read(file: &Path) -> Result<String, TokenError> {
    let path = file.display().to_string();
    let text =
        fs::read_to_string(file).map_err(|source| TokenError::Unreadable { path: path.clone(), source })?;
    parse(&text, path)
}

fn parse(text: &str, place: String) -> Result<String, TokenError> {
    let text = text.trim();
    if text.len() < SHORTEST {
        return Err(TokenError::Short { place, length: text.len() });
    }
    if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(TokenError::Unprintable { place });
    }
    Ok(text.into())
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
        let token = Token::fixed(parse(" 0123456789abcdef\n", "a test".into()).unwrap());
        assert!(token.is("0123456789abcdef"));
        assert!(
            ["", "0123456789abcde", "0123456789abcdef0", " 0123456789abcdef"].iter().all(|t| !token.is(t))
        );
        assert_eq!(format!("{token:?}"), "***");
    }

    #[test]
    fn a_file_that_changes_is_read_again_and_its_former_token_counts_for_a_while() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut stamp = SystemTime::now();
        let mut write = |text: &str| {
            fs::write(file.path(), text).unwrap();
            stamp += Duration::from_secs(1); // as clocks of file systems are coarse
            file.as_file().set_modified(stamp).unwrap();
        };
        let (first, second) = ("first-first-first-1", "second-second-second");
        write(first);
        let token = Token::read(file.path()).unwrap();
        assert!(token.is(first) && !token.is(second));
        write(second);
        assert!(token.is(second) && token.is(first));
        assert_eq!(token.bearer(), format!("Bearer {second}"));
        write("short");
        assert!(token.is(second), "what can't be a token changes nothing");
        token.0.held.lock().unwrap().former.as_mut().unwrap().1 -= FORMER;
        assert!(token.is(second) && !token.is(first));
    }

    #[test]
    fn one_that_can_be_guessed_or_carried_by_no_header_is_refused_without_showing_it() {
        let short = parse("hunter2", "FILE".into()).unwrap_err().to_string();
        assert!(short.contains("FILE") && short.contains("7 characters") && !short.contains("hunter2"));
        let odd = parse("0123456789abc\ndef", "FILE".into()).unwrap_err().to_string();
        assert!(odd.contains("header") && !odd.contains("0123"), "{odd}");
    }
}
