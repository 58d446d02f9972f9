//! A real run under a random fault every few seconds, which must end well: exit code 0 if it does.
//!
//! ```text
//! cargo run --release -p musher-tests --bin chaos -- --seed 7 --minutes 30 --workers 4
//! ```
//!
//! Build `musher` and `musher-worker` first (`make build`). The faults depend on the seed alone. `make
//! test` runs half a minute of it; this is for longer ones. A run that breaks a rule is kept, with the
//! logs of all its processes, and its directory is named.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::Parser;
use musher_tests::chaos::{self, Options};

/// Disturbs a real run, and checks that nothing is lost or repeated
#[derive(Debug, Parser)]
struct Arguments {
    /// Decides which faults come, and when
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How long the run is disturbed
    #[arg(long, default_value_t = 5.0)]
    minutes: f64,
    #[arg(long, default_value_t = 4)]
    workers: usize,
    /// Data set in the Oxford-IIIT Pet layout [default: a few of the pets, or drawn ones]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
}

fn main() -> ExitCode {
    let Arguments { seed, minutes, workers, data } = Arguments::parse();
    let length = Duration::from_secs_f64(minutes * 60.0);
    let summary = chaos::run(&Options { seed, length, workers, data, verbose: true });
    println!("{summary}");
    match summary.violations.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
