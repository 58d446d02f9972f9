//! `musher-worker eval`: a network's figures on a data set, by the code that validates in a run.

use std::{fmt::Write, fs, path::PathBuf, sync::Arc};

use anyhow::{Context, anyhow};
use clap::Args;
use musher_dataset::{CLASS_NAMES, Dataset, ImageCache, Source, Warnings, reach};
use musher_proto::{
    job,
    scores::{self, Scores},
};
use serde_json::json;

use super::{Failure, compute_threads, find, usage};
use crate::{
    device::Choice,
    job_data,
    train::{Feed, ProgressBoard, TrainingData, evaluate, validation_units},
    trained::Trained,
};

#[derive(Debug, Args)]
pub struct Eval {
    /// Weights that a run wrote, such as runs/pets/best.safetensors
    #[arg(long, value_name = "FILE")]
    weights: PathBuf,
    /// A job file whose data set is evaluated on [default: the data set of the weights' own job]
    job: Option<PathBuf>,
    /// Where the data set is on this machine, if not where the job says
    #[arg(long, value_name = "DIR")]
    data_root: Option<PathBuf>,
    /// List of the samples, relative to the data set's root [default: the job's validation split]
    #[arg(long, value_name = "LIST")]
    split: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// What to compute on: auto, cpu, cuda or cuda:K
    #[arg(long, value_name = "DEVICE", default_value_t = Choice::Auto)]
    device: Choice,
    /// Threads to compute with; another number than a worker's in the run may change the last bits
    /// [default: the cores]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

impl Eval {
    pub(super) fn run(self) -> Result<(), Failure> {
        let threads = compute_threads(self.threads);
        let device = find(self.device)?;
        tch::set_num_threads(threads as i32);
        let trained = Trained::open(&self.weights, device).map_err(usage)?;
        let source = self.source(&trained).map_err(usage)?;
        reach(&source.root).map_err(usage)?;
        let elsewhere = "if the data set is elsewhere on this machine, say where with --data-root";
        let dataset = Dataset::open(&source).map_err(|error| {
            match self.data_root.is_none() && !source.root.exists() {
                true => usage(anyhow!("{error}; {elsewhere}")),
                false => usage(error),
            }
        })?;
        let dataset = Arc::new(dataset);
        let of_the_run =
            trained.metadata.get("dataset_digest").is_some_and(|digest| digest == dataset.digest());
        let data = TrainingData {
            dataset,
            cache: Arc::new(ImageCache::new(0)), // each sample is used once
            warnings: Arc::new(Warnings::new(|warning| eprintln!("musher-worker: {warning}"))),
            threads,
        };
        let feed = Feed::new(Arc::new(trained.job.clone()), data, device)?;
        let units = validation_units(&feed, &trained.job);
        let results = evaluate(&trained.replica, &feed, units, 0..units.count(), &ProgressBoard::default())?;
        let classes = trained.job.model.classes as usize;
        let scores =
            scores::aggregate(&results, units.count(), classes).map_err(|reason| anyhow!("{reason}"))?;
        let report =
            Report { weights: &self.weights, trained: &trained, source: &source, of_the_run, scores };
        match self.json {
            true => println!("{}", report.as_json()),
            false => print!("{}", report.as_text()),
        }
        Ok(())
    }

    fn source(&self, trained: &Trained) -> anyhow::Result<Source> {
        let job = match &self.job {
            None => trained.job.clone(),
            Some(file) => {
                let name = file.display().to_string();
                let text =
                    fs::read_to_string(file).with_context(|| format!("cannot read the job file {name}"))?;
                job::load(&text, &name, &[])?
            }
        };
        let source = job_data::source(&job, self.data_root.as_deref())?;
        Ok(match self.split.clone() {
            None => source,
            // Nothing else of the data set needs to be there.
            Some(split) => Source { train_split: split.clone(), val_split: split, held_out: None, ..source },
        })
    }
}

struct Report<'a> {
    weights: &'a PathBuf,
    trained: &'a Trained,
    source: &'a Source,
    /// On the very data that the run validated on.
    of_the_run: bool,
    scores: Scores,
}

impl Report<'_> {
    fn split(&self) -> String {
        match self.source.held_out {
            None => self.source.val_split.clone(),
            Some(_) => format!("{} (held out)", self.source.train_split),
        }
    }

    fn as_json(&self) -> serde_json::Value {
        let Scores { loss, accuracy, miou, class_iou, samples } = self.scores;
        let text = |name: &str| self.trained.metadata.get(name);
        let mut report = json!({
            "weights": self.weights,
            "run": text("run"),
            "epoch": self.trained.recorded("epoch").map(|epoch| epoch as u64),
            "step": self.trained.recorded("step").map(|step| step as u64),
            "data_root": self.source.root,
            "split": self.split(),
            "data_of_the_run": self.of_the_run,
            "samples": samples,
            "val_loss": loss,
            "val_accuracy": accuracy,
            "val_miou": miou,
        });
        for (name, iou) in CLASS_NAMES.iter().zip(class_iou) {
            report[format!("val_iou_{name}")] = json!(iou);
        }
        report
    }

    fn as_text(&self) -> String {
        let Scores { loss, accuracy, miou, class_iou, samples } = self.scores;
        let said = |name: &str| self.trained.metadata.get(name).map_or("?", String::as_str);
        let mut text = format!(
            "{}: run {}, epoch {}, step {}\n{} samples of {}, {}\n\n",
            self.weights.display(),
            said("run"),
            said("epoch"),
            said("step"),
            samples,
            self.source.root.display(),
            self.split(),
        );
        let recorded = |name: &str| self.trained.recorded(name).filter(|_| self.of_the_run);
        let mut line = |name: &str, here: Option<f64>, in_the_run: Option<f64>| {
            let figure = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.6}"));
            let _ = writeln!(text, "{name:<16}{:>12}{:>12}", figure(here), figure(in_the_run));
        };
        line("val loss", Some(loss), recorded("val_loss"));
        line("accuracy", Some(accuracy), recorded("val_accuracy"));
        line("mIoU", Some(miou), recorded("val_miou"));
        for (name, iou) in CLASS_NAMES.iter().zip(class_iou) {
            line(&format!("IoU {name}"), iou, None);
        }
        let title = format!("{:<16}{:>12}{:>12}\n", "", "here", "in the run");
        let figures = text.find("\n\n").map_or(0, |end| end + 2);
        text.insert_str(figures, &title);
        if !self.of_the_run {
            text += "\nthis is other data than the run validated on\n";
        }
        text
    }
}
