//! What a disturbed run came to.

use std::{collections::BTreeMap, fmt, path::PathBuf, time::Duration};

use crate::{
    History,
    history::{Fall, Holders},
};

use super::{Kind, Options, recovery::Struck};

#[derive(Debug)]
pub struct Summary {
    seed: u64,
    length: Duration,
    workers: usize,
    /// Seconds to recover, sorted.
    recoveries: BTreeMap<Kind, Vec<f64>>,
    counts: BTreeMap<&'static str, usize>,
    /// Steps that were told of at the end.
    steps: u64,
    falls: Vec<Fall>,
    /// Workers that ended by themselves, and why.
    unasked_ends: Vec<String>,
    /// Rules that do not hold; empty: all is well.
    pub violations: Vec<String>,
    /// Where the run can be looked into, if all is not well.
    kept: Option<PathBuf>,
}

const COUNTED: [&str; 8] = [
    "generation_formed",
    "generation_continued",
    "generation_aborted",
    "worker_left",
    "worker_returned",
    "epoch_finished",
    "checkpoint_committed",
    "checkpoint_failed",
];

impl Summary {
    pub(super) fn new(
        options: &Options,
        history: &History,
        strikes: &[Struck],
        unasked_ends: Vec<String>,
        violations: Vec<String>,
        kept: Option<PathBuf>,
    ) -> Self {
        let mut recoveries: BTreeMap<_, Vec<f64>> = BTreeMap::new();
        for strike in strikes {
            let seconds = strike.recovered_after(&history.events).unwrap_or(f64::INFINITY);
            recoveries.entry(strike.kind).or_default().push(seconds);
        }
        for seconds in recoveries.values_mut() {
            seconds.sort_by(f64::total_cmp);
        }
        let count = |name| history.events.iter().filter(|event| event.name() == name).count();
        Self {
            seed: options.seed,
            length: options.length,
            workers: options.workers,
            recoveries,
            counts: COUNTED.into_iter().map(|name| (name, count(name))).collect(),
            steps: history.steps(),
            falls: history.falls(),
            unasked_ends,
            violations,
            kept,
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, workers, steps, .. } = self;
        writeln!(
            f,
            "chaos: seed {seed}, {workers} workers, {:.0} s, {steps} steps",
            self.length.as_secs_f64()
        )?;
        writeln!(f, "{:24} {:>5}   seconds to a further step: median, longest", "fault", "count")?;
        for (kind, seconds) in &self.recoveries {
            let (median, longest) = (seconds[seconds.len() / 2], seconds[seconds.len() - 1]);
            writeln!(f, "{kind:24} {:>5}   {median:6.2} {longest:6.2}", seconds.len())?;
        }
        let counts: Vec<_> = self.counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
        writeln!(f, "events: {}", counts.join(", "))?;
        let of = |holders: Holders| {
            let falls = self.falls.iter().filter(|fall| fall.holders == holders);
            falls.fold((0, 0), |(times, steps), fall| (times + 1, steps + fall.from - fall.to))
        };
        let ((single, in_flight), (returns, since)) = (of(Holders::SomeGone), of(Holders::AllGone));
        writeln!(
            f,
            "taken again: {in_flight} steps whose only holder was lost ({single} times), {since} since a checkpoint, all holders lost ({returns} times)"
        )?;
        for end in &self.unasked_ends {
            writeln!(f, "ended by itself: {end}")?;
        }
        for violation in &self.violations {
            writeln!(f, "BROKEN: {violation}")?;
        }
        match &self.kept {
            Some(dir) => write!(f, "the run is kept in {}", dir.display()),
            None => write!(f, "all rules hold"),
        }
    }
}
