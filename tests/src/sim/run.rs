//! Many simulations: over threads, each failing one shrunk to the faults that it needs and kept as a file.

use std::{
    fs, io,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use super::{
    coverage::Coverage,
    invariants::Violation,
    scenario::Scenario,
    world::{Report, World},
};

/// Lines of the trace that are shown with a failure.
const LAST_LINES: usize = 60;

/// One run. A panic in the core or a session is a violation, too.
pub fn simulate(scenario: &Scenario, tracing: bool) -> Report {
    let run = AssertUnwindSafe(|| World::new(scenario.clone(), tracing).run());
    catch_unwind(run).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        let violation = Violation { invariant: 0, what: format!("a panic: {text}") };
        Report {
            violation: Some(violation),
            outcome: None,
            coverage: Coverage::default(),
            trace: Vec::new(),
            took: Default::default(),
        }
    })
}

/// A scenario that violates an invariant, with no fault that it could do without.
#[derive(Debug)]
pub struct Failure {
    pub scenario: Scenario,
    pub violation: Violation,
    pub trace: Vec<String>,
}

impl Failure {
    /// Drops faults as long as the same invariant fails.
    pub fn shrunk(scenario: &Scenario, violation: Violation) -> Self {
        let mut smallest = scenario.clone();
        let fails = |candidate: &Scenario| {
            simulate(candidate, false).violation.is_some_and(|found| found.invariant == violation.invariant)
        };
        loop {
            let before = smallest.faults.len();
            for index in (0..before).rev() {
                let mut candidate = smallest.clone();
                candidate.faults.remove(index);
                if fails(&candidate) {
                    smallest = candidate;
                }
            }
            if smallest.faults.len() == before {
                break;
            }
        }
        let Report { violation: found, trace, .. } = simulate(&smallest, true);
        Self { scenario: smallest, violation: found.unwrap_or(violation), trace }
    }

    /// Keeps the scenario in `dir`, and tells all that is known.
    pub fn tell(&self, dir: &Path) -> String {
        let file = dir.join(format!("{}-seed-{}.json", self.violation.invariant, self.scenario.seed));
        let kept = match keep(&file, &self.scenario) {
            Ok(()) => format!(
                "repeat it: cargo run --release -p musher-tests --bin simulate -- --replay {}",
                file.display()
            ),
            Err(error) => format!("it could not be kept in {}: {error}", file.display()),
        };
        let from = self.trace.len().saturating_sub(LAST_LINES);
        let faults: String =
            self.scenario.faults.iter().map(|(at, fault)| format!("  {at} ms: {fault:?}\n")).collect();
        format!(
            "seed {} violates invariant {}: {}\nfaults that it needs:\n{faults}last of {} lines:\n{}\n{kept}\n",
            self.scenario.seed,
            self.violation.invariant,
            self.violation.what,
            self.trace.len(),
            self.trace[from..].join("\n"),
        )
    }
}

fn keep(file: &Path, scenario: &Scenario) -> io::Result<()> {
    fs::create_dir_all(file.parent().unwrap_or(Path::new(".")))?;
    fs::write(file, serde_json::to_vec_pretty(scenario)?)
}

pub fn replay(file: &Path) -> io::Result<Scenario> {
    Ok(serde_json::from_slice(&fs::read(file)?)?)
}

/// Where failures are kept: beside the build.
pub fn failures() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    target.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target")).join("sim-failures")
}

/// What came of many seeds.
#[derive(Debug, Default)]
pub struct Tally {
    pub runs: u64,
    pub coverage: Coverage,
    /// By seed.
    pub failed: Vec<(u64, Violation)>,
}

/// Simulates a range of seeds on all cores.
pub fn seeds(range: Range<u64>) -> Tally {
    let next = AtomicU64::new(range.start);
    let tally = Mutex::new(Tally::default());
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut mine = Tally::default();
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= range.end {
                        break;
                    }
                    let report = simulate(&Scenario::generate(seed), false);
                    mine.runs += 1;
                    mine.coverage.add(&report.coverage);
                    mine.failed.extend(report.violation.map(|violation| (seed, violation)));
                }
                tally.lock().unwrap_or_else(PoisonError::into_inner).add(mine);
            });
        }
    });
    let mut tally = tally.into_inner().unwrap_or_else(PoisonError::into_inner);
    tally.failed.sort_by_key(|(seed, _)| *seed);
    tally
}

impl Tally {
    fn add(&mut self, other: Tally) {
        self.runs += other.runs;
        self.coverage.add(&other.coverage);
        self.failed.extend(other.failed);
    }
}
