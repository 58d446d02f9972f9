//! Which bytes travel when. Pure arithmetic; it knows neither sockets nor sums.
//!
//! An all-reduce splits the data into one part a rank. In round `t` rank `r` sends part `r - t` and
//! receives part `r - t - 1` (both modulo the world size `W`). In the first `W - 1` rounds what
//! arrives is added to the rank's own, after which rank `r` alone holds the whole sum of part
//! `r + 1`; in the next `W - 1` the sums travel on as they are. So part `p` is always summed in the
//! order of ranks `p, p + 1, ...`.
//!
//! What a rank sends in round `t + 1` is what it received in round `t`. The frames to send are
//! therefore its own part's, followed by those received, in their order: frame `n` may leave once
//! `n - lead` frames have been received. A broadcast is the same with one part and one round.

use std::ops::Range;

/// The frames of one call that one rank sends and receives.
#[derive(Debug)]
pub(crate) struct Schedule {
    pub send: Walk,
    pub receive: Walk,
    /// How many frames may be sent before any is received.
    pub lead: u32,
    /// How many of the first rounds received are added, rather than copied.
    pub adding_rounds: u32,
    /// The rounds of the call.
    pub rounds: u32,
    /// What a round counts for, on all ranks: the largest part's bytes, and one so that an empty
    /// round counts too.
    pub round_bytes: u64,
}

impl Schedule {
    /// `rank`'s schedule for an all-reduce of `shape` over `world` ranks.
    pub fn all_reduce(rank: u32, world: u32, shape: Shape) -> Self {
        let rounds = 2 * (world - 1);
        let send = Walk::new(shape, world, rank, rounds);
        let receive = Walk::new(shape, world, (rank + world - 1) % world, rounds);
        let round_bytes = round_bytes(shape, world);
        Self { lead: send.frames_in_part(), send, receive, adding_rounds: world - 1, rounds, round_bytes }
    }

    /// `rank`'s schedule for a broadcast of `shape` from `root`: a chain that ends before the root.
    pub fn broadcast(rank: u32, world: u32, root: u32, shape: Shape) -> Self {
        let last = (root + world - 1) % world;
        let send = Walk::new(shape, 1, 0, u32::from(rank != last));
        let receive = Walk::new(shape, 1, 0, u32::from(rank != root));
        let lead = if rank == root { send.frames_in_part() } else { 0 };
        Self { send, receive, lead, adding_rounds: 0, rounds: 1, round_bytes: round_bytes(shape, 1) }
    }

    /// What the whole call counts for.
    pub fn bytes(&self) -> u64 {
        u64::from(self.rounds) * self.round_bytes
    }
}

/// The data's length and its grain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Bytes; a multiple of `element`.
    pub bytes: usize,
    /// Bytes of an element, which is never split.
    pub element: usize,
    /// Most bytes in a frame; a positive multiple of `element`.
    pub frame: usize,
}

/// A walk over frames: through the parts in descending order, each from its start to its end. An
/// empty part has one empty frame, so that every round compares tags.
#[derive(Clone, Debug)]
pub(crate) struct Walk {
    shape: Shape,
    parts: u32,
    part: Range<usize>,
    part_index: u32,
    /// Bytes of the part that lie behind.
    done: usize,
    round: u32,
    rounds: u32,
    chunk: u32,
}

impl Walk {
    fn new(shape: Shape, parts: u32, first: u32, rounds: u32) -> Self {
        let part = part(shape, parts, first);
        Self { shape, parts, part, part_index: first, done: 0, round: 0, rounds, chunk: 0 }
    }

    pub fn is_done(&self) -> bool {
        self.round == self.rounds
    }

    pub fn round(&self) -> u32 {
        self.round
    }

    /// Bytes of the round's part that lie behind.
    pub fn done(&self) -> usize {
        self.done
    }

    /// The number of the current frame, counted over the whole call.
    pub fn chunk(&self) -> u32 {
        self.chunk
    }

    /// The bytes of the current frame.
    pub fn range(&self) -> Range<usize> {
        let start = self.part.start + self.done;
        start..self.part.end.min(start + self.shape.frame)
    }

    pub fn advance(&mut self) {
        self.done += self.range().len();
        self.chunk += 1;
        if self.done == self.part.len() {
            self.part_index = (self.part_index + self.parts - 1) % self.parts;
            self.part = part(self.shape, self.parts, self.part_index);
            self.done = 0;
            self.round += 1;
        }
    }

    fn frames_in_part(&self) -> u32 {
        let frames = self.part.len().div_ceil(self.shape.frame).max(1);
        u32::try_from(frames).expect("data has far fewer than 2^32 frames")
    }
}

fn round_bytes(shape: Shape, parts: u32) -> u64 {
    part(shape, parts, 0).len() as u64 + 1
}

/// The bytes of part `index`; parts differ by at most one element, and the
/// first is a largest.
fn part(shape: Shape, parts: u32, index: u32) -> Range<usize> {
    let elements = shape.bytes / shape.element;
    let (parts, index) = (parts as usize, index as usize);
    let bound = |i: usize| (elements / parts * i + (elements % parts).min(i)) * shape.element;
    bound(index)..bound(index + 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frames(mut walk: Walk) -> Vec<(u32, Range<usize>)> {
        let mut out = Vec::new();
        while !walk.is_done() {
            out.push((walk.chunk(), walk.range()));
            walk.advance();
        }
        out
    }

    /// Runs all ranks in lock-step on sets of contributors instead of sums.
    fn contributors(world: u32, shape: Shape) -> Vec<Vec<u32>> {
        let elements = shape.bytes / shape.element;
        let mut held: Vec<Vec<u32>> = (0..world).map(|rank| vec![1 << rank; elements]).collect();
        let mut all: Vec<_> = (0..world).map(|rank| Schedule::all_reduce(rank, world, shape)).collect();
        while all.iter().any(|schedule| !schedule.receive.is_done()) {
            let sent: Vec<_> = all
                .iter()
                .zip(&held)
                .map(|(s, held)| {
                    let range = s.send.range();
                    held[range.start / shape.element..range.end / shape.element].to_vec()
                })
                .collect();
            for (rank, s) in all.iter_mut().enumerate() {
                let from = (rank + world as usize - 1) % world as usize;
                for (into, &add) in
                    held[rank][s.receive.range().start / shape.element..].iter_mut().zip(&sent[from])
                {
                    if s.receive.round() < s.adding_rounds {
                        assert_eq!(*into & add, 0, "a contribution was added twice");
                        *into |= add;
                    } else {
                        *into = add;
                    }
                }
                s.receive.advance();
                s.send.advance();
            }
        }
        held
    }

    proptest! {
        #[test]
        fn every_rank_ends_with_every_contribution_once(
            world in 1u32..7, elements in 0usize..200, frame in 1usize..70,
        ) {
            // Lock-step needs parts of one length; the ring itself does not.
            let elements = elements / world as usize * world as usize;
            let shape = Shape { bytes: elements * 4, element: 4, frame: frame * 4 };
            for held in contributors(world, shape) {
                prop_assert!(held.iter().all(|&set| set == (1 << world) - 1));
            }
        }

        #[test]
        fn a_rank_receives_what_its_predecessor_sends_and_sends_on_what_it_received(
            world in 2u32..7, elements in 0usize..200, frame in 1usize..70, rank in 0u32..7,
        ) {
            let rank = rank % world;
            let shape = Shape { bytes: elements * 8, element: 8, frame: frame * 8 };
            let own = Schedule::all_reduce(rank, world, shape);
            let before = Schedule::all_reduce((rank + world - 1) % world, world, shape);
            let received = frames(own.receive.clone());
            prop_assert_eq!(&received, &frames(before.send));
            for (n, (_, sent)) in frames(own.send).iter().enumerate().skip(own.lead as usize) {
                prop_assert_eq!(sent, &received[n - own.lead as usize].1);
            }
        }
    }
}
