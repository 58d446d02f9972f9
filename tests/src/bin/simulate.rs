//! Simulates the protocol: a range of seeds, one seed, or a scenario that was kept.

use std::{collections::BTreeMap, path::PathBuf, process::ExitCode, time::Instant};

use clap::Parser;
use musher_tests::sim::{Failure, Scenario, run, seeds, simulate};

/// Runs the real core and the real sessions against simulated faults, and checks the nine invariants.
/// Exit code 1 if one does not hold.
#[derive(Debug, Parser)]
struct Arguments {
    /// A range of seeds, such as 0..2000 or 5000..+2000.
    #[arg(long, value_parser = range, conflicts_with_all = ["seed", "replay"])]
    seeds: Option<(u64, u64)>,
    /// One seed.
    #[arg(long)]
    seed: Option<u64>,
    /// A scenario that was kept when it failed.
    #[arg(long, conflicts_with = "seed")]
    replay: Option<PathBuf>,
    /// Show all that happens.
    #[arg(long)]
    trace: bool,
    /// Print counters of what the simulations came through.
    #[arg(long)]
    coverage: bool,
    /// Failures to shrink and keep, of each invariant.
    #[arg(long, default_value_t = 1)]
    keep: usize,
}

fn range(text: &str) -> Result<(u64, u64), String> {
    let (from, to) = text.split_once("..").ok_or("write FROM..TO, or FROM..+COUNT")?;
    let number = |text: &str| text.parse::<u64>().map_err(|_| format!("{text} is no number"));
    let from = number(from)?;
    Ok((from, to.strip_prefix('+').map_or_else(|| number(to), |count| Ok(from + number(count)?))?))
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    if arguments.seed.is_none() && arguments.replay.is_none() {
        let (from, to) = arguments.seeds.unwrap_or((0, 2000));
        return Ok(many(from..to, arguments.keep));
    }
    let scenario = match &arguments.replay {
        Some(file) => run::replay(file)?,
        None => Scenario::generate(arguments.seed.unwrap_or_default()),
    };
    let report = simulate(&scenario, arguments.trace);
    if arguments.trace {
        println!("{scenario:#?}\n{}", report.trace.join("\n"));
    }
    if arguments.coverage {
        println!("{}", report.coverage);
    }
    match report.violation {
        None => {
            println!("seed {}: {:?} after {:?}", scenario.seed, report.outcome, report.took);
            Ok(ExitCode::SUCCESS)
        }
        Some(violation) => {
            println!("{}", Failure::shrunk(&scenario, violation).tell(&run::failures()));
            Ok(ExitCode::FAILURE)
        }
    }
}

fn many(range: std::ops::Range<u64>, keep: usize) -> ExitCode {
    let started = Instant::now();
    let tally = seeds(range.clone());
    let took = started.elapsed().as_secs_f64();
    println!("{}", tally.coverage);
    let mut kept: BTreeMap<u8, usize> = BTreeMap::new();
    for (seed, violation) in &tally.failed {
        let count = kept.entry(violation.invariant).or_default();
        *count += 1;
        if *count <= keep {
            println!(
                "{}",
                Failure::shrunk(&Scenario::generate(*seed), violation.clone()).tell(&run::failures())
            );
        }
    }
    for (invariant, count) in &kept {
        println!("invariant {invariant}: {count} seeds failed");
    }
    println!(
        "{} seeds from {}, {} failed, {took:.1} s, {:.0} seeds/s",
        tally.runs,
        range.start,
        tally.failed.len(),
        tally.runs as f64 / took
    );
    if tally.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
