//! The coordinator under thousands of workers, which are simulated, over streams, which are real.
//!
//! ```text
//! cargo run --release -p musher-tests --bin crowd -- 1000 4000 10000
//! ```
//!
//! Build `musher` first (`make build`). Each worker takes two open files, one on either side: see `ulimit -n`.

use std::{process::ExitCode, time::Duration};

use clap::Parser;
use musher_tests::crowd::{self, Options};

/// Measures the coordinator under crowds of workers
#[derive(Debug, Parser)]
struct Arguments {
    /// How many, one measurement each
    #[arg(required = true)]
    workers: Vec<usize>,
    /// Of the data set that they say they have
    #[arg(long, default_value_t = 1_000_000_000)]
    train_samples: u64,
    /// Seconds for which the steady state is watched
    #[arg(long, default_value_t = 10.0)]
    steady: f64,
}

fn main() -> ExitCode {
    let Arguments { workers, train_samples, steady } = Arguments::parse();
    println!("| workers | what | until all have heard | the coordinator's processor time |");
    println!("| --- | --- | --- | --- |");
    for workers in workers {
        let options = Options { workers, train_samples, steady: Duration::from_secs_f64(steady) };
        let dir = tempfile::tempdir().expect("the system has a temporary directory");
        match crowd::run(&options, dir.path()) {
            Ok(report) => println!("{report}"),
            Err(error) => {
                eprintln!("crowd: {workers} workers: {error:#}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}
