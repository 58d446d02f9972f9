//! `musher data`: look at a data set before training on it, or draw one.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use musher_dataset::{
    Source, check,
    synth::{self, SynthOptions},
};
use musher_proto::job;

use super::{Exit, Failure, usage};

#[derive(Debug, Subcommand)]
pub enum Data {
    /// Decode every image and mask of a data set and report what is wrong with it
    Check(Check),
    /// Draw a synthetic data set in the Oxford-IIIT Pet layout
    Synth(Synth),
}

#[derive(Debug, Args)]
pub struct Check {
    /// Root of a data set in the Oxford-IIIT Pet layout
    dir: PathBuf,
    /// List of the training samples, relative to the root
    #[arg(long, default_value_t = job::Data::default().train_split)]
    train_split: String,
    /// List of the validation samples, relative to the root
    #[arg(long, default_value_t = job::Data::default().val_split)]
    val_split: String,
}

#[derive(Debug, Args)]
pub struct Synth {
    /// Where to draw it: a directory that is empty or does not exist
    dir: PathBuf,
    /// Training samples
    #[arg(long, default_value_t = 480)]
    train: usize,
    /// Validation samples
    #[arg(long, default_value_t = 120)]
    val: usize,
    #[arg(long, default_value_t = 44)]
    seed: u64,
}

impl Data {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        match self {
            Data::Check(check) => check.run(),
            Data::Synth(synth) => synth.run(),
        }
    }
}

impl Check {
    fn run(self) -> Result<Exit, Failure> {
        let source = Source { root: self.dir, train_split: self.train_split, val_split: self.val_split };
        let report = check::check(&source).map_err(usage)?;
        println!("{report}");
        Ok(if report.errors() == 0 { Exit::Finished } else { Exit::Failed })
    }
}

impl Synth {
    fn run(self) -> Result<Exit, Failure> {
        let options =
            SynthOptions { train: self.train, val: self.val, seed: self.seed, ..SynthOptions::default() };
        synth::draw(&self.dir, &options).map_err(usage)?;
        println!(
            "drew {} training and {} validation samples in {}",
            self.train,
            self.val,
            self.dir.display()
        );
        Ok(Exit::Finished)
    }
}
