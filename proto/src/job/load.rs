//! From the text of a job file and `--set` overrides to a checked [`JobConfig`].
//!
//! Knows where each key was written, so that every error says it. Reads no file: the caller has
//! the text and the name to call it by.

use std::collections::BTreeMap;
use std::fmt;

use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::schema::{self, Misfit};
use super::{JobConfig, check};

/// Parses and checks the job file `text`, called `file` in messages, with `section.key=value`
/// overrides applied in order.
pub fn load(text: &str, file: &str, overrides: &[String]) -> Result<JobConfig, JobError> {
    let (mut table, mut places) = parse(text, file)?;
    fits(&table, &places)?;
    for assignment in overrides {
        let (key, value) = parse_override(assignment)?;
        let nested = nest(&key, value);
        fits(&nested, &Places::all_set())?;
        places.mark_set(&key);
        merge(&mut table, nested);
    }
    let config: JobConfig = serde_path_to_error::deserialize(table).map_err(|error| {
        let key = error.path().to_string();
        JobError::Invalid { place: places.of(&key), key, reason: one_line(error.inner().message()) }
    })?;
    check::check(&config).map_err(|problem| {
        let place = places.of(problem.key);
        problem.at(place)
    })?;
    Ok(config)
}

/// Why a configuration was refused; the message is for the person who wrote it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum JobError {
    #[error("{place} is not TOML: {reason}")]
    Syntax { place: Place, reason: String },
    #[error("{reason}")]
    Json { reason: String },
    #[error("`--set {assignment}` sets nothing; write --set section.key=value")]
    NotAnAssignment { assignment: String },
    #[error("unknown key `{key}` in {place}: {hint}")]
    UnknownKey { key: String, place: Place, hint: String },
    #[error("`{key}` in {place} must be {expected}, but is {found}")]
    WrongType { key: String, place: Place, expected: &'static str, found: &'static str },
    #[error("`{key}` in {place}: {reason}")]
    Invalid { key: String, place: Place, reason: String },
}

/// Where a key was given its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Line of a job file, from 1.
    Line { file: String, line: usize },
    /// On the command line.
    Set,
    /// Nowhere: the default, or a configuration that was not loaded from text.
    Default,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line { file, line } => write!(f, "{file} line {line}"),
            Self::Set => f.write_str("--set"),
            Self::Default => f.write_str("the job"),
        }
    }
}

/// Where each key of one job was written.
struct Places {
    by_key: BTreeMap<String, Place>,
    otherwise: Place,
}

impl Places {
    fn all_set() -> Self {
        Self { by_key: BTreeMap::new(), otherwise: Place::Set }
    }

    fn mark_set(&mut self, key: &str) {
        let inside = format!("{key}.");
        self.by_key.retain(|known, _| !known.starts_with(&inside));
        self.by_key.insert(key.to_owned(), Place::Set);
    }

    /// The place of `key` or, where it was not written itself, of the value or section around it.
    fn of(&self, key: &str) -> Place {
        let indexless = key.split('[').next().unwrap_or(key);
        let mut candidate = Some(indexless);
        while let Some(key) = candidate {
            if let Some(place) = self.by_key.get(key) {
                return place.clone();
            }
            candidate = key.rsplit_once('.').map(|(outer, _)| outer);
        }
        self.otherwise.clone()
    }
}

fn parse(text: &str, file: &str) -> Result<(Table, Places), JobError> {
    let line_of = |offset: usize| {
        let line = 1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count();
        Place::Line { file: file.to_owned(), line }
    };
    let syntax = |error: toml::de::Error| JobError::Syntax {
        place: line_of(error.span().map_or(0, |span| span.start)),
        reason: one_line(error.message()),
    };
    let spanned = DeTable::parse(text).map_err(syntax)?;
    let mut places = Places { by_key: BTreeMap::new(), otherwise: Place::Default };
    record("", spanned.get_ref(), &line_of, &mut places.by_key);
    let table = text.parse().map_err(syntax)?;
    Ok((table, places))
}

fn record(
    prefix: &str,
    table: &DeTable<'_>,
    line_of: &impl Fn(usize) -> Place,
    places: &mut BTreeMap<String, Place>,
) {
    for (name, value) in table {
        let key = format!("{prefix}{}", name.get_ref());
        if let DeValue::Table(inner) = value.get_ref() {
            record(&format!("{key}."), inner, line_of, places);
        }
        places.insert(key, line_of(name.span().start));
    }
}

/// A value that is not TOML is taken as bare text, and so is any value of a key that holds text:
/// `--set name=2023` needs no quotes.
fn parse_override(assignment: &str) -> Result<(String, Value), JobError> {
    let split = assignment.split_once('=').map(|(key, value)| (key.trim(), value.trim()));
    let Some((key, text)) = split.filter(|(key, _)| key.split('.').all(|part| !part.is_empty())) else {
        return Err(JobError::NotAnAssignment { assignment: assignment.to_owned() });
    };
    let bare = || Value::String(text.to_owned());
    let value = match text.parse::<Value>() {
        Ok(value) if schema::is_text(key) && !value.is_str() => bare(),
        Ok(value) => value,
        Err(_) => bare(),
    };
    Ok((key.to_owned(), value))
}

fn nest(key: &str, value: Value) -> Table {
    let (outer, value) = match key.split_once('.') {
        None => (key, value),
        Some((outer, rest)) => (outer, Value::Table(nest(rest, value))),
    };
    Table::from_iter([(outer.to_owned(), value)])
}

fn merge(onto: &mut Table, from: Table) {
    for (name, value) in from {
        match (onto.get_mut(&name), value) {
            (Some(Value::Table(onto)), Value::Table(from)) => merge(onto, from),
            (_, value) => {
                onto.insert(name, value);
            }
        }
    }
}

fn fits(table: &Table, places: &Places) -> Result<(), JobError> {
    match schema::misfit(table) {
        None => Ok(()),
        Some(Misfit::Unknown { key, hint }) => {
            Err(JobError::UnknownKey { place: places.of(&key), key, hint })
        }
        Some(Misfit::WrongType { key, expected, found }) => {
            Err(JobError::WrongType { place: places.of(&key), key, expected, found })
        }
    }
}

fn one_line(message: &str) -> String {
    let line = message.lines().map(str::trim).collect::<Vec<_>>().join("; ");
    // In Rust's words, as serde has it.
    line.replace("expected u32", "expected a whole number from 0 to 4294967295")
        .replace("expected u64", "expected a whole number of at least 0")
}
