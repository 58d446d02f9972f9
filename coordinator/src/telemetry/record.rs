//! One tracing event as a flat list of fields, and its JSON form.

use std::{borrow::Cow, fmt};

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

use super::EVENT_TARGET;

/// What was said, and when. Spans are not part of it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Record {
    /// RFC 3339, UTC, with microseconds.
    pub timestamp: String,
    pub level: Level,
    pub target: String,
    /// In the order they were given. Numbers that are not finite are null.
    pub fields: Vec<(Cow<'static, str>, Value)>,
}

impl Record {
    pub fn now(event: &Event<'_>) -> Self {
        let mut timestamp = String::new();
        SystemTime.format_time(&mut Writer::new(&mut timestamp)).expect("a String takes all that is written");
        let mut fields = Fields(Vec::new());
        event.record(&mut fields);
        let metadata = event.metadata();
        Self { timestamp, level: *metadata.level(), target: metadata.target().to_owned(), fields: fields.0 }
    }

    /// The `event` field, for those that users may rely on.
    pub fn event(&self) -> Option<&str> {
        if self.target == EVENT_TARGET { self.get("event")?.as_str() } else { None }
    }

    pub fn get(&self, name: &str) -> Option<&Value> {
        self.fields.iter().find(|(known, _)| *known == name).map(|(_, value)| value)
    }

    /// What was said once, from its line in the event file.
    pub fn from_object(object: &Map<String, Value>) -> Self {
        let text = |name: &str| object.get(name).and_then(Value::as_str).unwrap_or_default();
        let fields = object.iter().filter(|(name, _)| !["timestamp", "level"].contains(&name.as_str()));
        Self {
            timestamp: text("timestamp").to_owned(),
            level: text("level").parse().unwrap_or(Level::INFO),
            target: EVENT_TARGET.to_owned(),
            fields: fields.map(|(name, value)| (name.clone().into(), value.clone())).collect(),
        }
    }

    /// What a line of the event file has.
    pub fn to_object(&self) -> Map<String, Value> {
        let fixed = [("timestamp", self.timestamp.as_str()), ("level", self.level.as_str())];
        let fixed = fixed.map(|(name, value)| (name.to_owned(), value.into()));
        fixed
            .into_iter()
            .chain(self.fields.iter().map(|(name, value)| (name.to_string(), value.clone())))
            .collect()
    }

    /// One line with its end: `timestamp`, `level`, the fields in order; an ordinary log has its
    /// `target` too.
    pub fn to_json_line(&self) -> String {
        let mut line = format!(r#"{{"timestamp":"{}","level":"{}""#, self.timestamp, self.level);
        let mut push = |name: &str, value: &Value| {
            line.push_str(&format!(",{}:{value}", Value::from(name)));
        };
        if self.event().is_none() {
            push("target", &Value::from(self.target.as_str()));
        }
        for (name, value) in &self.fields {
            push(name, value);
        }
        line.push_str("}\n");
        line
    }
}

/// Takes fields with their types as far as JSON has them.
struct Fields(Vec<(Cow<'static, str>, Value)>);

impl Fields {
    fn push(&mut self, field: &Field, value: impl Into<Value>) {
        self.0.push((field.name().into(), value.into()));
    }
}

impl Visit for Fields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.push(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.push(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.push(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.push(field, value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.push(field, value);
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.push(field, value.to_string());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.push(field, format!("{value:?}"));
    }
}
