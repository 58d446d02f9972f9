//! Virtual time: what happens when, and dice whose throws do not depend on what else happens.

use std::{
    cmp::{Ordering, Reverse},
    collections::BinaryHeap,
    time::Duration,
};

use musher_proto::shard::scramble;

/// Since the simulation's start.
pub type Time = Duration;

/// What is going to happen, in the order of time; at one moment, in the order in which it was set.
#[derive(Debug)]
pub struct Agenda<T> {
    heap: BinaryHeap<Reverse<Entry<T>>>,
    set: u64,
}

#[derive(Debug)]
struct Entry<T> {
    at: Time,
    order: u64,
    what: T,
}

impl<T> Default for Agenda<T> {
    fn default() -> Self {
        Self { heap: BinaryHeap::new(), set: 0 }
    }
}

impl<T> Agenda<T> {
    pub fn set(&mut self, at: Time, what: T) {
        self.heap.push(Reverse(Entry { at, order: self.set, what }));
        self.set += 1;
    }

    pub fn next(&mut self) -> Option<(Time, T)> {
        self.heap.pop().map(|Reverse(entry)| (entry.at, entry.what))
    }
}

impl<T> Ord for Entry<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

impl<T> PartialOrd for Entry<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> PartialEq for Entry<T> {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl<T> Eq for Entry<T> {}

/// A throw is a function of the seed and of what it is for: a scenario with one fault less has the same
/// latencies elsewhere, which is what makes shrinking work.
#[derive(Clone, Copy, Debug)]
pub struct Dice(pub u64);

impl Dice {
    pub fn throw(self, what_for: &[u64]) -> u64 {
        what_for.iter().fold(scramble(self.0), |hash, &key| scramble(hash.rotate_left(7) ^ scramble(!key)))
    }

    /// In `0.0..1.0`.
    pub fn share(self, what_for: &[u64]) -> f64 {
        (self.throw(what_for) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Mostly short, sometimes up to `longest`.
    pub fn delay(self, what_for: &[u64], longest: Duration) -> Duration {
        longest.mul_f64(self.share(what_for).powi(3))
    }
}

pub const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

pub fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}
