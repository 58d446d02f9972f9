//! The figures of each run's best epoch, and of each kind of run their mean.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::RunHistory;

/// What a line of the table says.
pub(super) struct Line {
    pub label: String,
    /// `None`: the mean over the runs of the label.
    pub run: Option<String>,
    pub cells: Vec<String>,
}

/// A column: how it is called, its name in JSON, its decimals, and its figure for a run.
struct Column {
    title: &'static str,
    key: &'static str,
    decimals: usize,
    figure: fn(&RunHistory) -> Option<f64>,
}

const COLUMNS: [Column; 9] = [
    Column { title: "best epoch", key: "best_epoch", decimals: 0, figure: |run| Some(run.best_epoch.into()) },
    Column { title: "epochs", key: "epochs", decimals: 0, figure: |run| Some(run.last_epoch().into()) },
    Column { title: "val loss", key: "val_loss", decimals: 4, figure: |run| run.best().val_loss },
    Column { title: "accuracy", key: "val_accuracy", decimals: 4, figure: |run| run.best().accuracy },
    Column { title: "mIoU", key: "val_miou", decimals: 4, figure: |run| run.best().miou },
    Column {
        title: "IoU foreground",
        key: "val_iou_foreground",
        decimals: 4,
        figure: |run| run.best().class_iou[0],
    },
    Column {
        title: "IoU background",
        key: "val_iou_background",
        decimals: 4,
        figure: |run| run.best().class_iou[1],
    },
    Column {
        title: "IoU boundary",
        key: "val_iou_boundary",
        decimals: 4,
        figure: |run| run.best().class_iou[2],
    },
    Column { title: "seconds", key: "seconds", decimals: 0, figure: |run| Some(run.seconds) },
];

pub(super) fn titles() -> impl Iterator<Item = &'static str> {
    COLUMNS.iter().map(|column| column.title).chain(["ended"])
}

/// The labels in the order of the runs, each once.
pub(super) fn labels(runs: &[RunHistory]) -> Vec<&str> {
    let mut labels: Vec<&str> = Vec::new();
    for run in runs {
        if !labels.contains(&run.label.as_str()) {
            labels.push(&run.label);
        }
    }
    labels
}

/// Each run; and after those of a label, if they are several, their mean and standard deviation.
pub(super) fn lines(runs: &[RunHistory]) -> Vec<Line> {
    let mut lines = Vec::new();
    for label in labels(runs) {
        let of_label: Vec<_> = runs.iter().filter(|run| run.label == label).collect();
        for run in &of_label {
            let figures = COLUMNS.iter().map(|column| match (column.figure)(run) {
                Some(figure) => format!("{figure:.*}", column.decimals),
                None => "-".into(),
            });
            let ended = run.ended.clone().unwrap_or_else(|| "goes on".into());
            let name = run.dir.display().to_string();
            lines.push(Line {
                label: label.into(),
                run: Some(name),
                cells: figures.chain([ended.replace('_', " ")]).collect(),
            });
        }
        if of_label.len() > 1 {
            let cells = COLUMNS.iter().map(|column| mean(column, &of_label)).chain([String::new()]).collect();
            lines.push(Line { label: label.into(), run: None, cells });
        }
    }
    lines
}

/// `0.6246 ± 0.0110`, the deviation being that of a sample.
fn mean(column: &Column, runs: &[&RunHistory]) -> String {
    let figures: Option<Vec<f64>> = runs.iter().map(|run| (column.figure)(run)).collect();
    let Some(figures) = figures else { return "-".into() };
    let count = figures.len() as f64;
    let mean = figures.iter().sum::<f64>() / count;
    let variance = figures.iter().map(|figure| (figure - mean).powi(2)).sum::<f64>() / (count - 1.0);
    let decimals = column.decimals.max(1);
    format!("{mean:.decimals$} ± {:.decimals$}", variance.sqrt())
}

/// The table in columns, for a terminal.
pub fn as_text(runs: &[RunHistory]) -> String {
    let lines = lines(runs);
    let name = |line: &Line| match &line.run {
        Some(run) if *run == line.label => run.clone(),
        Some(run) => format!("{}  {run}", line.label),
        None => format!("{}  mean ± sd", line.label),
    };
    let mut rows = vec![std::iter::once("run".to_owned()).chain(titles().map(String::from)).collect()];
    rows.extend(
        lines
            .iter()
            .map(|line| std::iter::once(name(line)).chain(line.cells.iter().cloned()).collect::<Vec<_>>()),
    );
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<_> = (0..rows[0].len()).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let (first, rest) = row.split_first().expect("a row begins with the run");
        let _ = write!(text, "{first:<0$}", widths[0]);
        for (cell, width) in rest.iter().zip(&widths[1..]) {
            let _ = write!(text, "  {cell:>width$}");
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

/// `{"runs": [{"label", "run", "best_epoch", ...}]}`
pub fn as_json(runs: &[RunHistory]) -> Value {
    let run = |run: &RunHistory| {
        let mut fields = Map::new();
        fields.insert("label".into(), json!(run.label));
        fields.insert("run".into(), json!(run.dir));
        for column in &COLUMNS {
            let figure = (column.figure)(run);
            let whole = column.key.contains("epoch");
            let figure = if whole { json!(figure.map(|figure| figure as u64)) } else { json!(figure) };
            fields.insert(column.key.into(), figure);
        }
        fields.insert("ended".into(), json!(run.ended));
        Value::Object(fields)
    };
    json!({ "runs": runs.iter().map(run).collect::<Vec<_>>() })
}
