//! Which samples each rank uses at each step: one pure function of (seed, epoch, cursor, roster) that
//! the coordinator and the workers both call, so that nobody sends or stores a list.
//!
//! An epoch is a seeded permutation of the training split. Step `i` takes positions
//! `[i*B, min((i+1)*B, N))` of it at *every* world size; the ranks split that range. Hence each sample
//! is used exactly once an epoch, whoever joins or leaves between two steps.

use std::ops::Range;

use crate::ids::{Epoch, Rank};

/// A pseudo-random permutation of `0..len` that needs no list: any position in O(1), for 10^9 samples
/// as for ten.
///
/// A balanced Feistel network over the next even power of two, walked along its cycle until it falls
/// into the range (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
#[derive(Clone, Debug)]
pub struct Permutation {
    len: u64,
    half_bits: u32,
    keys: [u64; Self::ROUNDS],
}

impl Permutation {
    const ROUNDS: usize = 6;

    pub fn new(seed: u64, epoch: Epoch, len: u64) -> Self {
        let bits = 64 - len.saturating_sub(1).leading_zeros();
        let mut state = scramble(seed ^ scramble(u64::from(epoch.0)));
        let keys = std::array::from_fn(|_| {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            scramble(state)
        });
        Self { len, half_bits: bits.div_ceil(2).max(1), keys }
    }

    /// The sample at `position` of the epoch's order.
    ///
    /// # Panics
    /// If `position` is not below the length.
    pub fn at(&self, position: u64) -> u64 {
        assert!(position < self.len, "position {position} is outside a permutation of {}", self.len);
        let mut value = position;
        loop {
            value = self.encrypt(value);
            if value < self.len {
                return value;
            }
        }
    }

    fn encrypt(&self, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (scramble(right ^ key) & mask));
        }
        left << self.half_bits | right
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
/// Generators", 2014): a bijection in which each input bit changes half of the output bits.
pub fn scramble(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// The part of `range` that `rank` of `world` takes: contiguous, and no two parts differ by more than
/// one. Parts of ranks beyond the range's length are empty.
pub fn share(range: Range<u64>, rank: Rank, world: u32) -> Range<u64> {
    let len = u128::from(range.end - range.start);
    let bound = |r: u32| range.start + (len * u128::from(r) / u128::from(world)) as u64;
    bound(rank.0)..bound(rank.0 + 1)
}

/// The steps of an epoch from a cursor to a segment's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    pub seed: u64,
    pub epoch: Epoch,
    /// Samples of the epoch that are applied already; a multiple of the global batch, or `end`.
    pub cursor: u64,
    /// Where the segment stops: the split's length, or a multiple of the global batch before it.
    pub end: u64,
    /// Training samples in the split, N.
    pub samples: u64,
    /// Global batch, B.
    pub global_batch: u64,
}

/// One rank's part of one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepShard {
    /// The global batch's positions in the epoch's order.
    pub positions: Range<u64>,
    /// This rank's samples, possibly none.
    pub sample_ids: Vec<u64>,
}

impl Segment {
    /// Steps left from the cursor to the end.
    pub fn step_count(&self) -> u64 {
        (self.end.saturating_sub(self.cursor)).div_ceil(self.global_batch)
    }

    /// This rank's part of each step, in order.
    pub fn steps(&self, rank: Rank, world: u32) -> impl Iterator<Item = StepShard> + Send + use<> {
        let order = Permutation::new(self.seed, self.epoch, self.samples);
        let Segment { cursor, end, global_batch, .. } = *self;
        (cursor..end).step_by(global_batch as usize).map(move |start| {
            let positions = start..(start + global_batch).min(end);
            let sample_ids = share(positions.clone(), rank, world).map(|p| order.at(p)).collect();
            StepShard { positions, sample_ids }
        })
    }
}

/// The validation split in units of a fixed size, in list order. A unit is evaluated as one batch by
/// whichever rank it falls to, so that its numbers do not depend on the world size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ValidationUnits {
    pub samples: u64,
    pub unit: u64,
}

impl ValidationUnits {
    pub fn count(&self) -> u64 {
        self.samples.div_ceil(self.unit)
    }

    /// Positions of unit `index` in the validation list.
    pub fn positions(&self, index: u64) -> Range<u64> {
        index * self.unit..((index + 1) * self.unit).min(self.samples)
    }

    /// The units that `rank` evaluates.
    pub fn of_rank(&self, rank: Rank, world: u32) -> Range<u64> {
        share(0..self.count(), rank, world)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn segment(samples: u64, global_batch: u64, cursor: u64) -> Segment {
        Segment { seed: 44, epoch: Epoch(3), cursor, end: samples, samples, global_batch }
    }

    proptest! {
        #[test]
        fn a_permutation_visits_each_sample_once(seed in any::<u64>(), epoch in 1u32..50, len in 1u64..3000) {
            let order = Permutation::new(seed, Epoch(epoch), len);
            let mut seen: Vec<u64> = (0..len).map(|p| order.at(p)).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..len).collect::<Vec<_>>());
        }

        #[test]
        fn shares_tile_the_range_evenly(start in 0u64..1000, len in 0u64..500, world in 1u32..40) {
            let range = start..start + len;
            let mut next = start;
            for rank in 0..world {
                let part = share(range.clone(), Rank(rank), world);
                prop_assert_eq!(part.start, next);
                prop_assert!(part.end - part.start <= len.div_ceil(u64::from(world)));
                prop_assert!(part.end - part.start >= len / u64::from(world));
                next = part.end;
            }
            prop_assert_eq!(next, range.end);
        }

        /// Exact also where the world size divides neither the batch nor the data set, and when the
        /// team changes between two steps.
        #[test]
        fn an_epoch_uses_each_sample_once_whoever_joins(
            samples in 1u64..700, batch in 1u64..40, worlds in prop::collection::vec(1u32..9, 1..6),
        ) {
            let mut used = Vec::new();
            let mut cursor = 0;
            let mut step = 0usize;
            while cursor < samples {
                let world = worlds[step % worlds.len()];
                for rank in 0..world {
                    let shard = segment(samples, batch, cursor).steps(Rank(rank), world).next().expect("the cursor is before the end");
                    used.extend(shard.sample_ids);
                }
                cursor = (cursor + batch).min(samples);
                step += 1;
            }
            used.sort_unstable();
            prop_assert_eq!(used, (0..samples).collect::<Vec<_>>());
        }

        #[test]
        fn validation_counts_each_sample_once(samples in 1u64..500, unit in 1u64..50, world in 1u32..9) {
            let units = ValidationUnits { samples, unit };
            let seen: Vec<u64> = (0..world)
                .flat_map(|r| units.of_rank(Rank(r), world))
                .flat_map(|u| units.positions(u))
                .collect();
            prop_assert_eq!(seen, (0..samples).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_billion_samples_need_no_list() {
        let order = Permutation::new(1, Epoch(1), 1_000_000_007);
        let mut first: Vec<u64> = (0..100_000).map(|p| order.at(p)).collect();
        assert!(first.iter().all(|&s| s < 1_000_000_007));
        first.sort_unstable();
        first.dedup();
        assert_eq!(first.len(), 100_000, "no sample twice");
    }

    /// Pearson's chi-squared over (position, sample) cells: 15 x 15 degrees of freedom, mean 225,
    /// standard deviation 21; six of them is the bound.
    #[test]
    fn a_permutation_spreads_samples_evenly() {
        let (len, epochs, cells) = (480u64, 400u32, 16u64);
        let mut counts = vec![0u32; (cells * cells) as usize];
        for epoch in 1..=epochs {
            let order = Permutation::new(44, Epoch(epoch), len);
            for p in 0..len {
                counts[(p * cells / len * cells + order.at(p) * cells / len) as usize] += 1;
            }
        }
        let expected = f64::from(epochs) * len as f64 / (cells * cells) as f64;
        let chi2: f64 = counts.iter().map(|&c| (f64::from(c) - expected).powi(2) / expected).sum();
        assert!(chi2 < 225.0 + 6.0 * 21.2, "chi squared {chi2}");
    }

    #[test]
    fn epochs_and_seeds_differ() {
        let order = |seed, epoch| {
            let p = Permutation::new(seed, Epoch(epoch), 1000);
            (0..1000).map(|i| p.at(i)).collect::<Vec<_>>()
        };
        assert_ne!(order(1, 1), order(1, 2));
        assert_ne!(order(1, 1), order(2, 1));
        assert_eq!(order(1, 1), order(1, 1));
    }

    #[test]
    fn a_step_smaller_than_the_team_leaves_ranks_empty() {
        let last: Vec<_> = (0..4)
            .map(|r| {
                segment(33, 16, 32).steps(Rank(r), 4).next().expect("one sample is left").sample_ids.len()
            })
            .collect();
        assert_eq!(last.iter().sum::<usize>(), 1);
    }
}
