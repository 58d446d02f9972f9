//! Which samples of a list are held out of training for validation. Pure: names in, places out.

use sha2::{Digest, Sha256};

/// A share of the training list that is validated on instead of trained on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeldOut {
    /// Above 0 and below 1.
    pub fraction: f64,
    pub seed: u64,
}

/// Places in a list, each part in the list's order; together they are all of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Parts {
    pub train: Vec<usize>,
    pub val: Vec<usize>,
}

impl HeldOut {
    /// The samples whose hash of seed and name is lowest are held out: which ones depends on nothing else, not on
    /// the list's order and hardly on what else is listed. `None` if one of the parts would be empty.
    pub(crate) fn part(&self, names: &[&str]) -> Option<Parts> {
        let wanted = (self.fraction * names.len() as f64).round() as usize;
        if wanted == 0 || wanted >= names.len() {
            return None;
        }
        let mut drawn: Vec<usize> = (0..names.len()).collect();
        drawn.sort_by_cached_key(|&at| {
            let hash = Sha256::new().chain_update(self.seed.to_le_bytes()).chain_update(names[at]);
            <[u8; 32]>::from(hash.finalize())
        });
        let mut is_held_out = vec![false; names.len()];
        for &at in &drawn[..wanted] {
            is_held_out[at] = true;
        }
        let (val, train) = (0..names.len()).partition(|&at| is_held_out[at]);
        Some(Parts { train, val })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|index| format!("cat_{index}")).collect()
    }

    fn part(names: &[String], fraction: f64, seed: u64) -> Option<Parts> {
        HeldOut { fraction, seed }.part(&names.iter().map(String::as_str).collect::<Vec<_>>())
    }

    proptest! {
        #[test]
        fn the_parts_are_disjoint_whole_and_in_order(count in 2usize..300, fraction in 0.01f64..0.99, seed: u64) {
            let names = names(count);
            let wanted = (fraction * count as f64).round() as usize;
            let Some(Parts { train, val }) = part(&names, fraction, seed) else {
                prop_assert!(wanted == 0 || wanted >= count);
                return Ok(());
            };
            prop_assert_eq!(val.len(), wanted);
            prop_assert!(train.is_sorted() && val.is_sorted());
            let all: BTreeSet<_> = train.iter().chain(&val).copied().collect();
            prop_assert_eq!(all.len(), train.len() + val.len());
            prop_assert_eq!(all, (0..count).collect());
        }

        #[test]
        fn the_lists_order_does_not_matter(count in 2usize..100, seed: u64) {
            let (forwards, backwards) = (names(count), names(count).into_iter().rev().collect::<Vec<_>>());
            let held_out = |names: &[String]| -> Option<BTreeSet<String>> {
                Some(part(names, 0.3, seed)?.val.iter().map(|&at| names[at].clone()).collect())
            };
            prop_assert_eq!(held_out(&forwards), held_out(&backwards));
        }
    }

    #[test]
    fn seeds_draw_differently_and_evenly() {
        let names = names(1000);
        let drawn = |seed| part(&names, 0.2, seed).unwrap().val;
        assert_eq!(drawn(44), drawn(44));
        // Of 200 held out, 40 are expected to be so by another seed too.
        let both = drawn(44).iter().filter(|at| drawn(45).contains(at)).count();
        assert!((20..60).contains(&both), "{both}");
    }
}
