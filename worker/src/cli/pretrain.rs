//! `musher-worker pretrain`: an encoder for `model.pretrained`, from the job's own images.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use anyhow::Context;
use clap::{Args, ValueEnum, value_parser};
use musher_dataset::{Dataset, ImageCache, Warnings, reach};
use musher_proto::{ids::Epoch, job};
use serde_json::json;

use super::{Failure, compute_threads, find, usage};
use crate::{
    device::Choice,
    job_data,
    pretext::{Pretext, Task},
    train::TrainingData,
};

#[derive(Debug, Args)]
pub struct Pretrain {
    /// The job whose network, images, batches and learning rate are used
    job: PathBuf,
    /// What the encoder learns
    #[arg(long, value_enum, default_value_t = Task::Rotation)]
    task: Task,
    /// Where the weights go
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = value_parser!(u32).range(1..))]
    epochs: u32,
    /// Override a key of the job file, for example data.root=DIR
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,
    /// What to compute on: auto, cpu, cuda or cuda:K
    #[arg(long, value_name = "DEVICE", default_value_t = Choice::Auto)]
    device: Choice,
    /// Threads to compute with [default: the cores]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

impl Pretrain {
    pub(super) fn run(self) -> Result<(), Failure> {
        check_writable(&self.out).map_err(usage)?;
        let threads = compute_threads(self.threads);
        tch::set_num_threads(threads as i32);
        let name = self.job.display().to_string();
        let text = fs::read_to_string(&self.job)
            .with_context(|| format!("cannot read the job file {name}"))
            .map_err(usage)?;
        let mut job = job::load(&text, &name, &self.overrides).map_err(usage)?;
        // All of the encoder learns here, whatever the job does with it later.
        job.model.freeze_encoder = false;
        let device = find(self.device)?;
        let source = job_data::source(&job, None).map_err(usage)?;
        reach(&source.root).map_err(usage)?;
        let data = TrainingData {
            dataset: Arc::new(Dataset::open(&source).map_err(usage)?),
            cache: Arc::new(ImageCache::new(job::mebibytes(job.data.cache_mb))),
            warnings: Arc::new(Warnings::new(|warning| eprintln!("musher-worker: {warning}"))),
            threads,
        };
        let mut metadata = BTreeMap::from([
            ("width", job.model.width.to_string()),
            ("encoder", name_of(&job.encoder())),
            ("normalize", name_of(&job.normalize())),
            ("task", self.task.to_possible_value().map_or_else(String::new, |task| task.get_name().into())),
            ("dataset_digest", data.dataset.digest().into()),
        ]);
        let mut pretext = Pretext::new(job, self.task, data, device).map_err(usage)?;
        let started = Instant::now();
        for epoch in 1..=self.epochs {
            let result = pretext.epoch(Epoch(epoch))?;
            println!(
                "epoch {epoch}/{}  loss {:.4}  accuracy on the validation images {:.4}",
                self.epochs, result.loss, result.accuracy
            );
            metadata.insert("accuracy", result.accuracy.to_string());
        }
        let metadata = metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let bytes = pretext.replica().weights_safetensors(&metadata)?;
        let file = self.out.display();
        fs::write(&self.out, bytes).with_context(|| format!("cannot write {file}"))?;
        println!("{:.0} s; use it with --set model.pretrained={file}", started.elapsed().as_secs_f64());
        Ok(())
    }
}

/// Found out before hours of work, not behind them. What is there stays as it is.
fn check_writable(file: &Path) -> anyhow::Result<()> {
    let is_new = !file.exists();
    let opened = fs::File::options().append(true).create(true).open(file);
    opened.with_context(|| format!("--out: cannot write {}", file.display()))?;
    if is_new {
        fs::remove_file(file)?;
    }
    Ok(())
}

/// As a job file has it.
fn name_of(choice: &impl serde::Serialize) -> String {
    json!(choice).as_str().unwrap_or_default().to_owned()
}
