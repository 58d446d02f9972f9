//! `musher data`: fetch a data set, look at it before training on it, pack it, or draw one.

use std::path::PathBuf;

use anyhow::Context;
use bytesize::ByteSize;
use clap::{Args, Subcommand, value_parser};
use indicatif::{ProgressBar, ProgressStyle};
use musher_dataset::{
    PackOptions, Source, check, pack, reach,
    synth::{self, SynthOptions},
};
use musher_proto::job;

use super::{Exit, Failure, local, usage};
use crate::fetch::{self, Mirror, Progress};

/// What to do instead of naming a store.
const TO_A_STORE: &str = "`musher data pack` copies a data set into an object store";

#[derive(Debug, Subcommand)]
pub enum Data {
    /// Download and unpack the Oxford-IIIT Pet data set: 0.8 GB, CC BY-SA 4.0
    Fetch(Fetch),
    /// Decode every image and mask of a data set and report what is wrong with it
    Check(Check),
    /// Copy a data set's listed samples into tar shards, with an index: few large files for slow disks and stores
    Pack(Pack),
    /// Draw a synthetic data set in the Oxford-IIIT Pet layout
    Synth(Synth),
}

#[derive(Debug, Args)]
pub struct Fetch {
    /// Where it goes: `images/` and `annotations/` in it; what is there already is left alone
    dir: PathBuf,
    /// Where images.tar.gz and annotations.tar.gz are instead: a URL without the files' names, or a directory
    #[arg(long, value_name = "URL|DIR", default_value = fetch::ORIGIN)]
    from: String,
}

#[derive(Debug, Args)]
pub struct Check {
    #[command(flatten)]
    data: Lists,
}

#[derive(Debug, Args)]
pub struct Pack {
    #[command(flatten)]
    data: Lists,
    /// Where to pack it: a directory that is empty or does not exist, or s3://, gs:// or az:// BUCKET/PREFIX
    out: PathBuf,
    /// Most MiB of a shard; a sample that is longer has one of its own
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = value_parser!(u64).range(1..=1 << 20))]
    shard_mb: u64,
}

/// A data set, and which of its lists are meant.
#[derive(Debug, Args)]
struct Lists {
    /// Root of a data set in the Oxford-IIIT Pet layout, or packed; or an object store's URL of a packed one
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
            Data::Fetch(fetch) => fetch.run(),
            Data::Check(check) => check.run(),
            Data::Pack(pack) => pack.run(),
            Data::Synth(synth) => synth.run(),
        }
    }
}

impl Fetch {
    fn run(self) -> Result<Exit, Failure> {
        local("DIR", &self.dir, TO_A_STORE)?;
        let bar = ProgressBar::new(0);
        bar.set_style(
            ProgressStyle::with_template(
                "{msg:20} {bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta}",
            )
            .context("the progress bar's template")?,
        );
        // Told without a terminal too, where there is no bar.
        let tell = |text: String| bar.suspend(|| eprintln!("musher: {text}"));
        let mut shown = |progress: Progress| match progress {
            Progress::Present { folder } => tell(format!("{folder}/ is there already")),
            Progress::Receiving { file, bytes, total } => {
                bar.set_message(file.to_owned());
                bar.set_length(total.unwrap_or(bytes));
                bar.set_position(bytes);
            }
            Progress::Retrying { reason } => tell(format!("trying again: {reason}")),
            Progress::Verifying { file } => bar.set_message(format!("verifying {file}")),
            Progress::Unpacking { folder } => bar.set_message(format!("unpacking {folder}/")),
        };
        let fetched = fetch::fetch(&fetch::ARCHIVES, &Mirror::parse(&self.from), &self.dir, &mut shown);
        bar.finish_and_clear();
        fetched.map_err(anyhow::Error::from)?;
        let dir = self.dir.display();
        println!("the data set is in {dir}; `musher data check {dir}` looks at every file");
        Ok(Exit::Finished)
    }
}

impl Check {
    fn run(self) -> Result<Exit, Failure> {
        let source = self.data.source();
        reach(&source.root).map_err(usage)?;
        let report = check::check(&source).map_err(usage)?;
        println!("{report}");
        Ok(if report.errors() == 0 { Exit::Finished } else { Exit::Failed })
    }
}

impl Pack {
    fn run(self) -> Result<Exit, Failure> {
        let options = PackOptions { shard_bytes: self.shard_mb << 20 };
        if !musher_store::is_url(&self.out.to_string_lossy()) {
            local("OUT", &self.out, "object stores are s3://, gs:// or az:// BUCKET/PREFIX")?;
        }
        let source = self.data.source();
        reach(&source.root).map_err(usage)?;
        let packing = pack(&source, &self.out, options).map_err(usage)?;
        println!(
            "packed {} samples into {} shards of {} in {}\ndigest {}, the same as unpacked",
            packing.samples,
            packing.shards,
            ByteSize(packing.bytes).display().si(),
            self.out.display(),
            packing.digest
        );
        Ok(Exit::Finished)
    }
}

impl Lists {
    fn source(&self) -> Source {
        Source {
            root: self.dir.clone(),
            train_split: self.train_split.clone(),
            val_split: self.val_split.clone(),
            ..Source::default()
        }
    }
}

impl Synth {
    fn run(self) -> Result<Exit, Failure> {
        let options =
            SynthOptions { train: self.train, val: self.val, seed: self.seed, ..SynthOptions::default() };
        local("DIR", &self.dir, TO_A_STORE)?;
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
