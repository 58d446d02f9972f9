//! The shape of a job file: which keys there are and what type each has.
//!
//! The default configuration is the schema, so a new field needs no second entry here. Ranges are
//! `check`'s, choices are serde's.

use toml::{Table, Value};

use super::JobConfig;

/// How far a typo may be from a key for the key to be named.
const SIMILAR: f64 = 0.7;

/// The full path of every key, sorted: `augment.horizontal_flip`, ..., `train.schedule`.
pub fn known_keys() -> Vec<String> {
    let mut keys = Vec::new();
    leaves("", &defaults(), &mut keys);
    keys
}

/// What a table has that no job file may have.
#[derive(Debug, PartialEq)]
pub(super) enum Misfit {
    Unknown { key: String, hint: String },
    WrongType { key: String, expected: &'static str, found: &'static str },
}

/// The first key of `table` that is unknown or has the wrong type.
pub(super) fn misfit(table: &Table) -> Option<Misfit> {
    misfit_in("", table, &defaults())
}

/// Whether `key` is one that holds text.
pub(super) fn is_text(key: &str) -> bool {
    let defaults = defaults();
    let value = match key.split_once('.') {
        None => defaults.get(key),
        Some((section, rest)) => defaults.get(section).and_then(|section| section.get(rest)),
    };
    value.is_some_and(Value::is_str)
}

fn defaults() -> Table {
    Table::try_from(JobConfig::default()).expect("the default configuration is a TOML table")
}

fn misfit_in(prefix: &str, table: &Table, known: &Table) -> Option<Misfit> {
    table.iter().find_map(|(name, value)| {
        let key = join(prefix, name);
        match (known.get(name), value) {
            (None, _) => Some(Misfit::Unknown { hint: hint(prefix, &key, known), key }),
            (Some(Value::Table(known)), Value::Table(inner)) => misfit_in(&key, inner, known),
            (Some(Value::Float(_)), Value::Integer(_)) => None,
            (Some(known), value) if !known.same_type(value) => {
                Some(Misfit::WrongType { key, expected: describe(known), found: describe(value) })
            }
            _ => None,
        }
    })
}

/// What to write instead of the unknown `key`: a sibling if one is near, else any near key.
fn hint(prefix: &str, key: &str, siblings: &Table) -> String {
    let near_sibling = nearest(key, siblings.keys().map(|name| join(prefix, name)));
    if let Some(near) = near_sibling.or_else(|| elsewhere(key)) {
        return format!("did you mean `{near}`?");
    }
    let names = siblings.keys().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    match prefix {
        "" => format!("a job file has {names}"),
        section => format!("[{section}] has {names}"),
    }
}

/// A known key of another section with the same last name, or one spelt alike.
fn elsewhere(key: &str) -> Option<String> {
    let last = key.rsplit('.').next().unwrap_or(key);
    let named_alike = known_keys().into_iter().find(|known| known.rsplit('.').next() == Some(last));
    named_alike.or_else(|| nearest(key, known_keys().into_iter()))
}

fn nearest(key: &str, candidates: impl Iterator<Item = String>) -> Option<String> {
    candidates
        .map(|candidate| (strsim::normalized_damerau_levenshtein(key, &candidate), candidate))
        .filter(|(similarity, _)| *similarity >= SIMILAR)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, candidate)| candidate)
}

fn leaves(prefix: &str, table: &Table, keys: &mut Vec<String>) {
    for (name, value) in table {
        let key = join(prefix, name);
        match value {
            Value::Table(inner) => leaves(&key, inner, keys),
            _ => keys.push(key),
        }
    }
}

fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") }
}

fn describe(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "a string",
        Value::Integer(_) => "a whole number",
        Value::Float(_) => "a number",
        Value::Boolean(_) => "true or false",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list",
        Value::Table(_) => "a section",
    }
}
