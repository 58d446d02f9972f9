//! Whose links are cut: a verdict from what each rank saw of an exchange in which nothing moved.
//!
//! Each rank knows only the neighbour that it waited for. All ranks are due the same bytes, so those that
//! have the fewest are next to the cut; who is named by most of them is put out. Where that is a draw (one
//! link, or two ranks), either will do: the ring closes without one of them.

use std::collections::BTreeMap;

use musher_proto::{ids::Rank, message::Waited};

/// Who names weighs less than who is named: a rank cut off from all is named by both its neighbours and
/// names one itself.
const NAMED: u32 = 2;
const NAMES: u32 = 1;

/// The rank to put out; `None` without evidence. Of equals the highest goes, but for `spared`.
pub fn verdict(testimony: &[(Rank, Waited)], spared: Rank) -> Option<Rank> {
    let fewest = testimony.iter().map(|(_, waited)| waited.received).min()?;
    let mut points: BTreeMap<Rank, u32> = BTreeMap::new();
    for (rank, waited) in testimony.iter().filter(|(_, waited)| waited.received == fewest) {
        *points.entry(*rank).or_default() += NAMES;
        *points.entry(waited.peer).or_default() += NAMED;
    }
    points.into_iter().max_by_key(|&(rank, points)| (points, rank != spared, rank)).map(|(rank, _)| rank)
}

#[cfg(test)]
mod tests {
    use musher_proto::ids::Step;

    use super::*;

    fn names(rank: u32, peer: u32, received: u64) -> (Rank, Waited) {
        let phase = "gradients".into();
        (Rank(rank), Waited { peer: Rank(peer), step: Step(1), phase, ms: 1, received, closed: false })
    }

    #[test]
    fn a_rank_cut_off_from_both_neighbours_is_put_out() {
        // 2 is cut off: 2 and 3 starve first, 0 and 1 have a chunk or two more.
        let seen = [names(0, 3, 9), names(1, 0, 10), names(2, 1, 8), names(3, 2, 8)];
        assert_eq!(verdict(&seen, Rank(0)), Some(Rank(2)));
    }

    #[test]
    fn one_of_the_ends_of_a_cut_link_is_put_out() {
        let seen = [names(0, 3, 9), names(1, 0, 10), names(2, 1, 8), names(3, 2, 9)];
        assert_eq!(verdict(&seen, Rank(0)), Some(Rank(1)));
    }

    #[test]
    fn a_formation_that_failed_names_the_one_that_nobody_reaches() {
        let seen = [names(0, 1, 0), names(1, 2, 0), names(2, 1, 0)];
        assert_eq!(verdict(&seen, Rank(0)), Some(Rank(1)));
    }

    #[test]
    fn of_two_the_one_that_is_spared_stays() {
        let seen = [names(0, 1, 5), names(1, 0, 5)];
        assert_eq!(verdict(&seen, Rank(0)), Some(Rank(1)));
        assert_eq!(verdict(&seen, Rank(1)), Some(Rank(0)));
        assert_eq!(verdict(&[], Rank(1)), None);
    }
}
