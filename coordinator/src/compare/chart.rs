//! The curves: validation loss and accuracy by epoch, the training loss dashed, best epochs marked.
//!
//! One drawing for a bitmap and for SVG, on light and on dark paper. The font is in the binary; nothing of the system
//! is asked for.

use std::{collections::BTreeMap, error::Error, sync::Once};

use plotters::{
    coord::{Shift, ranged1d::ValueFormatter, types::RangedCoordf64},
    prelude::*,
    style::{FontStyle, register_font},
};

use super::{RunHistory, history::EpochFigures, table::labels};

const SIZE: (u32, u32) = (1600, 720);
const FONT: &str = "sans-serif";
const TITLE: u32 = 30;
const TEXT: u32 = 24;
const LEGEND_HEIGHT: u32 = 64;
/// Losses above so many times the median would flatten all others; their curves leave through the top.
const OUTLIER: f64 = 2.5;

/// Paper, ink, and a colour a label.
pub(super) struct Theme {
    paper: RGBColor,
    ink: RGBColor,
    grid: RGBColor,
    pub curves: [RGBColor; 6],
}

/// Okabe and Ito's colours, which are told apart with any colour vision, the strongest first.
pub(super) const LIGHT: Theme = Theme {
    paper: RGBColor(255, 255, 255),
    ink: RGBColor(38, 42, 48),
    grid: RGBColor(226, 229, 233),
    curves: [
        RGBColor(0, 114, 178),
        RGBColor(213, 94, 0),
        RGBColor(0, 158, 115),
        RGBColor(204, 121, 167),
        RGBColor(86, 180, 233),
        RGBColor(190, 140, 0),
    ],
};

/// The same, lighter.
pub(super) const DARK: Theme = Theme {
    paper: RGBColor(22, 25, 30),
    ink: RGBColor(222, 226, 232),
    grid: RGBColor(52, 58, 66),
    curves: [
        RGBColor(90, 176, 240),
        RGBColor(255, 146, 74),
        RGBColor(52, 206, 160),
        RGBColor(235, 160, 204),
        RGBColor(160, 218, 255),
        RGBColor(240, 205, 90),
    ],
};

type DrawResult = Result<(), Box<dyn Error + Send + Sync>>;

/// The curves on light paper.
pub fn png(runs: &[RunHistory]) -> Vec<u8> {
    let (width, height) = SIZE;
    let mut pixels = vec![0; width as usize * height as usize * 3];
    draw(BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area(), runs, &LIGHT)
        .expect("memory takes any drawing");
    musher_dataset::strip::encode(width, height, pixels)
}

/// The curves as an `<svg>` element.
pub(super) fn svg(runs: &[RunHistory], theme: &Theme) -> String {
    let mut text = String::new();
    draw(SVGBackend::with_string(&mut text, SIZE).into_drawing_area(), runs, theme)
        .expect("memory takes any drawing");
    text
}

fn draw<B: DrawingBackend>(area: DrawingArea<B, Shift>, runs: &[RunHistory], theme: &Theme) -> DrawResult
where
    B::ErrorType: 'static,
{
    static FONTS: Once = Once::new();
    FONTS.call_once(|| {
        register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT)
            .unwrap_or_else(|_| unreachable!("the font in the binary is a font"));
    });
    area.fill(&theme.paper)?;
    let (legend, panels) = area.split_vertically(LEGEND_HEIGHT);
    draw_legend(&legend, runs, theme)?;
    let panels = panels.split_evenly((1, 2));
    let loss =
        Panel { title: "loss", value: |figures| figures.val_loss, faint: Some(|figures| figures.train_loss) };
    let accuracy = Panel { title: "validation accuracy", value: |figures| figures.accuracy, faint: None };
    loss.draw(&panels[0], runs, theme)?;
    accuracy.draw(&panels[1], runs, theme)?;
    area.present()?;
    Ok(())
}

/// A line and a name for each label, and what dashes and dots are.
fn draw_legend<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    runs: &[RunHistory],
    theme: &Theme,
) -> DrawResult
where
    B::ErrorType: 'static,
{
    let text = (FONT, TEXT).into_font().color(&theme.ink);
    let middle = LEGEND_HEIGHT as i32 / 2 + 6;
    let half = TEXT as i32 / 2;
    let mut x = 24;
    for (label, colour) in labels(runs).into_iter().zip(theme.curves.iter().cycle()) {
        let line = [(x, middle - 6), (x + 40, middle - 6)]; // at the height of the letters
        area.draw(&PathElement::new(line, colour.stroke_width(4)))?;
        area.draw(&Text::new(label.to_owned(), (x + 50, middle - half), text.clone()))?;
        let (width, _) = area.estimate_text_size(label, &text)?;
        x += 50 + width as i32 + 36;
    }
    let explanation = "dashed: training loss, dot: best epoch";
    let faint = (FONT, TEXT).into_font().color(&theme.ink.mix(0.7));
    let (width, _) = area.estimate_text_size(explanation, &faint)?;
    let x = x.max(SIZE.0 as i32 - width as i32 - 30);
    area.draw(&Text::new(explanation, (x, middle - half), faint))?;
    Ok(())
}

/// One figure by epoch.
struct Panel {
    title: &'static str,
    value: fn(&EpochFigures) -> Option<f64>,
    /// Another, in the background.
    faint: Option<fn(&EpochFigures) -> Option<f64>>,
}

impl Panel {
    fn draw<B: DrawingBackend>(
        &self,
        area: &DrawingArea<B, Shift>,
        runs: &[RunHistory],
        theme: &Theme,
    ) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        let last = runs.iter().map(RunHistory::last_epoch).max().unwrap_or(1).max(2);
        let (low, high) = self.range(runs);
        let mut chart = ChartBuilder::on(area)
            .caption(self.title, (FONT, TITLE).into_font().color(&theme.ink))
            .margin(20)
            .x_label_area_size(62)
            .y_label_area_size(76)
            .build_cartesian_2d(Epochs(1.0..f64::from(last)), low..high)?;
        let text = (FONT, TEXT).into_font().color(&theme.ink);
        chart
            .configure_mesh()
            .x_desc("epoch")
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(theme.grid)
            .axis_style(theme.grid.stroke_width(2))
            .x_labels(10)
            .y_labels(7)
            .y_label_formatter(&|value| format!("{value:.2}"))
            .label_style(text.clone())
            .axis_desc_style(text)
            .draw()?;
        let colour_of: BTreeMap<_, _> = labels(runs).into_iter().zip(theme.curves.iter().cycle()).collect();
        for run in runs {
            let colour = colour_of[run.label.as_str()];
            let several = runs.iter().filter(|other| other.label == run.label).count() > 1;
            let points = |value: fn(&EpochFigures) -> Option<f64>| {
                let at = |(&epoch, figures)| Some((f64::from(epoch), value(figures)?.min(high)));
                run.epochs.iter().filter_map(at).collect::<Vec<_>>()
            };
            if let Some(faint) = self.faint {
                let style = colour.mix(0.45).stroke_width(2);
                chart.draw_series(DashedLineSeries::new(points(faint), 8, 7, style))?;
            }
            let strength = if several { 0.75 } else { 1.0 };
            chart.draw_series(LineSeries::new(points(self.value), colour.mix(strength).stroke_width(4)))?;
        }
        // Above all curves.
        for run in runs {
            let Some(value) = (self.value)(&run.best()) else { continue };
            let (at, colour) = ((f64::from(run.best_epoch), value.min(high)), colour_of[run.label.as_str()]);
            chart.draw_series([
                Circle::new(at, 11, theme.paper.filled()),
                Circle::new(at, 8, colour.filled()),
            ])?;
        }
        Ok(())
    }

    /// From the lowest figure to the highest that is no outlier, with some room.
    fn range(&self, runs: &[RunHistory]) -> (f64, f64) {
        let figures = runs.iter().flat_map(|run| run.epochs.values());
        let mut values: Vec<f64> = figures.clone().filter_map(self.value).collect();
        values.extend(self.faint.into_iter().flat_map(|faint| figures.clone().filter_map(faint)));
        values.sort_by(f64::total_cmp);
        let (Some(&lowest), Some(&highest)) = (values.first(), values.last()) else { return (0.0, 1.0) };
        let highest = highest.min(OUTLIER * values[values.len() / 2]);
        let room = f64::max(0.06 * (highest - lowest), 0.005);
        (lowest - room, highest + room)
    }
}

/// An axis whose marks are whole epochs.
struct Epochs(std::ops::Range<f64>);

impl Ranged for Epochs {
    type FormatOption = plotters::coord::ranged1d::NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        RangedCoordf64::from(self.0.clone()).map(value, limit)
    }

    fn key_points<Hint: plotters::coord::ranged1d::KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        let most = hint.max_num_points().max(2) as f64;
        let steps = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0];
        let step = steps.into_iter().find(|step| self.0.end / step <= most).unwrap_or(self.0.end);
        let marks = (1..).map(|mark| f64::from(mark) * step).take_while(|&mark| mark <= self.0.end);
        let first = (step > 1.0).then_some(1.0);
        first.into_iter().chain(marks).collect()
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.0.clone()
    }
}

impl ValueFormatter<f64> for Epochs {
    fn format(epoch: &f64) -> String {
        format!("{epoch:.0}")
    }
}
