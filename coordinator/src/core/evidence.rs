//! Whose links are cut: a verdict from what each rank saw of an exchange in which nothing moved.
//!
//! A rank in the exchange takes all that arrives, so a link is cut if its two ends disagree on what it
//! carried; who has most of them is put out. Where that says nothing (a formation), all ranks are due the
//! same bytes, so those that have the fewest are next to the cut, and who is named by most of them is put
//! out. Where it is a draw (one link, or two ranks), either will do: the ring closes without one of them.

use std::collections::BTreeMap;

use musher_proto::{ids::Rank, message::Waited};

/// Who names weighs less than who is named: a rank cut off from all is named by both its neighbours and
/// names one itself.
const NAMED: u32 = 2;
const NAMES: u32 = 1;

/// The rank to put out; `None` without evidence. Of equals the highest goes, but for the first of `holders`,
/// who hold the newest state: one that alone does must not be lost, and is never put out.
pub fn verdict(testimony: &[(Rank, Waited)], world: u32, holders: &[Rank]) -> Option<Rank> {
    let testimony = of_one_ring(testimony);
    let mut points = ends_of_cut_links(&testimony, world);
    if points.is_empty() {
        points = named_by_the_starved(&testimony);
    }
    if let [sole] = holders {
        points.remove(sole);
    }
    let spared = holders.first();
    points
        .into_iter()
        .max_by_key(|&(rank, points)| (points, Some(&rank) != spared, rank))
        .map(|(rank, _)| rank)
}

/// From the ring in which more of them waited: each counts its own bytes.
fn of_one_ring(testimony: &[(Rank, Waited)]) -> Vec<(Rank, Waited)> {
    let (batch_norm, steps): (Vec<_>, Vec<_>) =
        testimony.iter().cloned().partition(|(_, waited)| waited.batch_norm);
    if batch_norm.len() > steps.len() { batch_norm } else { steps }
}

fn ends_of_cut_links(testimony: &[(Rank, Waited)], world: u32) -> BTreeMap<Rank, u32> {
    let seen: BTreeMap<Rank, &Waited> = testimony.iter().map(|(rank, waited)| (*rank, waited)).collect();
    let mut points = BTreeMap::new();
    for (&rank, waited) in &seen {
        let before = Rank((rank.0 + world - 1) % world);
        if seen.get(&before).is_some_and(|before| before.sent > waited.received) {
            *points.entry(before).or_default() += 1;
            *points.entry(rank).or_default() += 1;
        }
    }
    points
}

fn named_by_the_starved(testimony: &[(Rank, Waited)]) -> BTreeMap<Rank, u32> {
    let mut points = BTreeMap::new();
    let Some(fewest) = testimony.iter().map(|(_, waited)| waited.received).min() else { return points };
    for (rank, waited) in testimony.iter().filter(|(_, waited)| waited.received == fewest) {
        *points.entry(*rank).or_default() += NAMES;
        *points.entry(waited.peer).or_default() += NAMED;
    }
    points
}

#[cfg(test)]
mod tests {
    use musher_proto::ids::Step;

    use super::*;

    /// Two, of whom this is the first.
    fn holders(first: u32) -> [Rank; 2] {
        [Rank(first), Rank(9)]
    }

    fn names(rank: u32, peer: u32, received: u64) -> (Rank, Waited) {
        let (peer, step, phase) = (Rank(peer), Step(1), "gradients".into());
        let waited = Waited { peer, step, phase, ms: 1, received, sent: 0, closed: false, batch_norm: false };
        (Rank(rank), waited)
    }

    /// Rank, what it received, what it sent.
    fn carried(rank: u32, received: u64, sent: u64) -> (Rank, Waited) {
        let (_, waited) = names(rank, (rank + 3) % 4, received);
        (Rank(rank), Waited { sent, ..waited })
    }

    /// As real ranks said it: of the two behind the cuts, either may have received more.
    #[test]
    fn what_was_sent_and_not_received_tells_where_the_cut_is() {
        for of_2 in [19, 27] {
            let seen =
                [carried(0, 33, 43), carried(1, 43, 47), carried(2, of_2, of_2 + 10), carried(3, 23, 33)];
            assert_eq!(verdict(&seen, 4, &holders(0)), Some(Rank(2)), "cut off from both");
            let seen = [
                carried(0, 33, 43),
                carried(1, 43, 47),
                carried(2, of_2, of_2 + 1),
                carried(3, of_2 + 1, 33),
            ];
            assert_eq!(verdict(&seen, 4, &holders(1)), Some(Rank(2)), "one link, and rank 1 is spared");
        }
    }

    /// Rank 3 was done with batch norm's sums, and has its bytes from the other ring.
    #[test]
    fn bytes_of_different_rings_are_not_compared() {
        let of_batch_norm = |(rank, waited)| (rank, Waited { batch_norm: true, ..waited });
        let seen = [carried(0, 4, 6), carried(1, 6, 6), carried(2, 3, 4)].map(of_batch_norm);
        let seen = [&seen[..], &[carried(3, 1_000, 1_000)]].concat();
        assert_eq!(
            verdict(&seen, 4, &holders(0)),
            Some(Rank(2)),
            "the link from 1 to 2 is cut, not that from 3"
        );
    }

    #[test]
    fn a_rank_cut_off_from_both_neighbours_is_put_out() {
        // 2 is cut off: 2 and 3 starve first, 0 and 1 have a chunk or two more.
        let seen = [names(0, 3, 9), names(1, 0, 10), names(2, 1, 8), names(3, 2, 8)];
        assert_eq!(verdict(&seen, 4, &holders(0)), Some(Rank(2)));
    }

    #[test]
    fn one_of_the_ends_of_a_cut_link_is_put_out() {
        let seen = [names(0, 3, 9), names(1, 0, 10), names(2, 1, 8), names(3, 2, 9)];
        assert_eq!(verdict(&seen, 4, &holders(0)), Some(Rank(1)));
    }

    #[test]
    fn a_formation_that_failed_names_the_one_that_nobody_reaches() {
        let seen = [names(0, 1, 0), names(1, 2, 0), names(2, 1, 0)];
        assert_eq!(verdict(&seen, 3, &holders(0)), Some(Rank(1)));
    }

    #[test]
    fn of_two_the_one_that_is_spared_stays() {
        let seen = [names(0, 1, 5), names(1, 0, 5)];
        assert_eq!(verdict(&seen, 2, &holders(0)), Some(Rank(1)));
        assert_eq!(verdict(&seen, 2, &holders(1)), Some(Rank(0)));
        assert_eq!(verdict(&[], 4, &holders(1)), None);
    }

    #[test]
    fn who_alone_holds_the_newest_state_stays_whatever_speaks_against_it() {
        let seen = [names(0, 1, 0), names(1, 2, 0), names(2, 1, 0)];
        assert_eq!(verdict(&seen, 3, &[Rank(1)]), Some(Rank(2)));
    }
}
