//! The median of what many report, kept as they report it: each report costs the logarithm of their number, where
//! sorting all anew would cost them all.

use std::collections::{BTreeMap, BTreeSet};

/// One value of each reporter.
#[derive(Clone, Debug)]
pub struct Median<K> {
    values: BTreeMap<K, Bits>,
    /// The lower half, rounded down ...
    below: BTreeSet<(Bits, K)>,
    /// ... and the rest, whose first is the median: of an even number the upper one in the middle.
    above: BTreeSet<(Bits, K)>,
}

/// Of a float above 0: these order as the floats do.
type Bits = u64;

impl<K: Copy + Ord> Median<K> {
    pub fn new() -> Self {
        Self { values: BTreeMap::new(), below: BTreeSet::new(), above: BTreeSet::new() }
    }

    /// `value` is above 0.
    pub fn set(&mut self, reporter: K, value: f64) {
        self.remove(reporter);
        let entry = (value.to_bits(), reporter);
        self.values.insert(reporter, entry.0);
        match self.above.first().is_some_and(|first| entry < *first) {
            true => self.below.insert(entry),
            false => self.above.insert(entry),
        };
        self.level();
    }

    pub fn remove(&mut self, reporter: K) {
        let Some(bits) = self.values.remove(&reporter) else { return };
        if !self.below.remove(&(bits, reporter)) {
            self.above.remove(&(bits, reporter));
        }
        self.level();
    }

    pub fn get(&self) -> Option<f64> {
        self.above.first().map(|(bits, _)| f64::from_bits(*bits))
    }

    fn level(&mut self) {
        let half = self.values.len() / 2;
        while self.below.len() > half {
            let Some(last) = self.below.pop_last() else { return };
            self.above.insert(last);
        }
        while self.below.len() < half {
            let Some(first) = self.above.pop_first() else { return };
            self.below.insert(first);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_the_one_in_the_middle_of_all_sorted(
            reports in prop::collection::vec((0u8..12, prop::option::weighted(0.8, 1e-3f64..1e6)), 0..60),
        ) {
            let (mut median, mut all) = (Median::new(), BTreeMap::new());
            for (reporter, value) in reports {
                match value {
                    Some(value) => {
                        median.set(reporter, value);
                        all.insert(reporter, value);
                    }
                    None => {
                        median.remove(reporter);
                        all.remove(&reporter);
                    }
                }
                let mut sorted: Vec<f64> = all.values().copied().collect();
                sorted.sort_by(f64::total_cmp);
                prop_assert_eq!(median.get(), sorted.get(sorted.len() / 2).copied());
            }
        }
    }
}
