//! The comparison as one HTML file that needs nothing beside it: curves, table and predictions, on light or dark
//! paper as the reader's system has it.

use std::fmt::Write;

use base64::{Engine, prelude::BASE64_STANDARD};
use musher_dataset::strip::{self, Tiles};
use plotters::style::RGBColor;

use super::{
    RunHistory, chart,
    table::{Line, labels, lines, titles},
};

pub fn html(runs: &[RunHistory]) -> String {
    let title = labels(runs).into_iter().map(escaped).collect::<Vec<_>>().join(", ");
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n<style>\n{}{STYLE}</style>\n\
         <h1>{title}</h1>\n<figure class=\"curves\">\n<div class=\"light\">{}</div>\n<div class=\"dark\">{}</div>\n\
         </figure>\n{}{}</html>\n",
        colours(),
        chart::svg(runs, &chart::LIGHT),
        chart::svg(runs, &chart::DARK),
        table(runs),
        samples(runs),
    )
}

const STYLE: &str = "\
:root { color-scheme: light dark; --paper: #fff; --ink: #262a30; --faint: #68707a; --line: #e2e5e9 }
.dark { display: none }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16191e; --ink: #dee2e8; --faint: #98a1ac; --line: #343a42 }
  .light { display: none }
  .dark { display: block }
}
body { margin: 2rem auto; max-width: 84rem; padding: 0 1.5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-weight: 500; font-size: 1.5rem } h2 { font-weight: 500; font-size: 1.15rem; margin-top: 2.5rem }
figure { margin: 0 } svg { width: 100%; height: auto }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .875rem }
th, td { padding: .35rem 0 .35rem 1rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 500; color: var(--faint) } th:first-child, td:first-child { text-align: left;
  padding-left: 0 }
tr.mean td { font-weight: 600; border-color: var(--faint) } .run { color: var(--faint) } p { color: var(--faint) }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em }
.tiles td, .tiles th { border: 0; padding: 0 .6rem .6rem 0; text-align: left } .tiles img { display: block; width: 9rem;
  border-radius: 4px; image-rendering: pixelated }
";

/// A class for each curve's colour, in both themes.
fn colours() -> String {
    let rule = |(nth, RGBColor(r, g, b)): (usize, &RGBColor)| {
        format!(".c{nth} {{ background: rgb({r} {g} {b}) }}\n")
    };
    let light: String = chart::LIGHT.curves.iter().enumerate().map(rule).collect();
    let dark: String = chart::DARK.curves.iter().enumerate().map(rule).collect();
    format!("{light}@media (prefers-color-scheme: dark) {{\n{dark}}}\n")
}

fn dot(runs: &[RunHistory], label: &str) -> String {
    let nth = labels(runs).iter().position(|other| *other == label).unwrap_or_default();
    format!("<span class=\"dot c{}\"></span>", nth % chart::LIGHT.curves.len())
}

fn table(runs: &[RunHistory]) -> String {
    let heads: String = titles().map(|title| format!("<th>{title}")).collect();
    let row = |line: Line| {
        let (kind, name) = match &line.run {
            Some(run) if *run == line.label => ("", String::new()),
            Some(run) => ("", format!(" <span class=\"run\">{}</span>", escaped(run))),
            None => (" class=\"mean\"", " mean ± sd".into()),
        };
        let cells: String = line.cells.iter().map(|cell| format!("<td>{}", escaped(cell))).collect();
        format!("<tr{kind}><td>{}{}{name}{cells}\n", dot(runs, &line.label), escaped(&line.label))
    };
    let rows: String = lines(runs).into_iter().map(row).collect();
    format!(
        "<h2>Best epochs</h2>\n<div class=\"scroll\"><table>\n<tr><th>run{heads}\n{rows}</table></div>\n\
         <p>Figures of the validation split. IoU: intersection over union, for each class and as their mean.</p>\n"
    )
}

/// One grid for all runs that show the same images: image, truth, and a prediction a label.
fn samples(runs: &[RunHistory]) -> String {
    let mut grids: Vec<Vec<(&RunHistory, Tiles)>> = Vec::new();
    for label in labels(runs) {
        let first = runs
            .iter()
            .filter(|run| run.label == label)
            .find_map(|run| Some((run, strip::tiles(run.samples.as_ref()?)?)));
        let Some((run, tiles)) = first else { continue };
        let same = |grid: &&mut Vec<(&RunHistory, Tiles)>| {
            grid[0].1.iter().map(|row| &row[..2]).eq(tiles.iter().map(|row| &row[..2]))
        };
        match grids.iter_mut().find(same) {
            Some(grid) => grid.push((run, tiles)),
            None => grids.push(vec![(run, tiles)]),
        }
    }
    if grids.is_empty() {
        return String::new();
    }
    let mut text = "<h2>Predictions at the best epochs</h2>\n".to_owned();
    for grid in grids {
        text += "<div class=\"scroll\"><table class=\"tiles\">\n<tr><th>image<th>truth";
        for (run, _) in &grid {
            let _ = write!(text, "<th>{}{}", dot(runs, &run.label), escaped(&run.label));
        }
        for row in 0..grid[0].1.len() {
            text += "\n<tr>";
            let [image, truth, _] = &grid[0].1[row];
            let predictions = grid.iter().map(|(_, tiles)| &tiles[row][2]);
            for tile in [image, truth].into_iter().chain(predictions) {
                let _ = write!(
                    text,
                    "<td><img alt=\"\" src=\"data:image/png;base64,{}\">",
                    BASE64_STANDARD.encode(tile)
                );
            }
        }
        text += "\n</table></div>\n";
    }
    text
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
