//! The progress bar of the epoch in hand; nothing where stderr is no terminal.

use indicatif::{ProgressBar, ProgressStyle};

use super::Console;
use super::pretty::{count, duration};

/// A bar that counts the epoch's samples.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    samples_total: u64,
}

impl Progress {
    /// A bar on `console`, hidden until the first epoch.
    pub fn new(console: &Console) -> Self {
        let bar = match console.bars() {
            Some(bars) => bars.add(ProgressBar::no_length()),
            None => ProgressBar::hidden(),
        };
        bar.set_style(
            ProgressStyle::with_template("{prefix}  {bar:14.cyan/dim}  {wide_msg}")
                .expect("the template is well-formed")
                .progress_chars("━╸─"),
        );
        Self { bar, samples_total: 0 }
    }

    /// Starts epoch `epoch` of `total_epochs`, from 1, which has `samples_total` samples.
    pub fn set_epoch(&mut self, epoch: u32, total_epochs: u32, samples_total: u64) {
        self.samples_total = samples_total;
        self.bar.set_message("");
        self.bar.set_prefix(format!("epoch {epoch}/{total_epochs}"));
        self.bar.set_position(0);
        self.bar.set_length(samples_total);
    }

    /// `samples_done` of the epoch's samples are applied; `eta_s` is for the whole run.
    pub fn update(&self, samples_done: u64, loss: f64, images_per_second: f64, eta_s: f64) {
        self.bar.set_position(samples_done);
        let (done, total) = (count(samples_done), count(self.samples_total));
        let left = duration(eta_s);
        self.bar.set_message(format!(
            "{done}/{total}  loss {loss:.4}  {images_per_second:.1} images/s  {left} left"
        ));
    }

    /// Takes the bar off the screen.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
