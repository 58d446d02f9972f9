//! What simulations came through: how often, and in how many runs.

use std::{collections::BTreeMap, fmt};

#[derive(Clone, Debug, Default)]
pub struct Coverage {
    /// (times, runs)
    counts: BTreeMap<&'static str, (u64, u64)>,
}

impl Coverage {
    pub fn count(&mut self, what: &'static str) {
        self.counts.entry(what).or_insert((0, 1)).0 += 1;
    }

    pub fn take_back(&mut self, what: &'static str) {
        if let Some((times, _)) = self.counts.get_mut(what) {
            *times -= 1;
            if *times == 0 {
                self.counts.remove(what);
            }
        }
    }

    pub fn add(&mut self, other: &Self) {
        for (what, (times, runs)) in &other.counts {
            let sum = self.counts.entry(what).or_default();
            *sum = (sum.0 + times, sum.1 + runs);
        }
    }

    pub fn times(&self, what: &str) -> u64 {
        self.counts.get(what).map_or(0, |(times, _)| *times)
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:>10} {:>8}", "times", "runs")?;
        self.counts.iter().try_for_each(|(what, (times, runs))| writeln!(f, "{times:>10} {runs:>8}  {what}"))
    }
}
