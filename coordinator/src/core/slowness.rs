//! A worker whose own part of a step takes longer than its team-mates' is named before it is a problem.

use musher_proto::{
    ids::{Rank, Session},
    message::Progress,
};

use super::{
    Core, Phase,
    effects::{Action, RunEvent},
    median::Median,
    roster::Team,
};

/// A step that takes so many times its team-mates' median is slow ...
const SLOW: f64 = 1.5;
/// ... until it takes less than this.
const WELL: f64 = 1.2;
/// Milliseconds that do not matter.
const NOISE: f64 = 10.0;
/// Reports in a row before it is said.
const REPORTS: u32 = 5;

/// What is remembered of one worker.
#[derive(Clone, Copy, Debug, Default)]
pub struct Slowness {
    reports: u32,
    named: bool,
}

impl Slowness {
    pub fn is_named(&self) -> bool {
        self.named
    }

    /// Takes a report of a step's time beside the others' median; whether it is to be named now.
    fn report(&mut self, step_ms: f64, median_ms: f64) -> bool {
        if step_ms < median_ms * WELL + NOISE {
            *self = Self::default();
        } else if step_ms > median_ms * SLOW + NOISE {
            self.reports += 1;
        }
        let due = !self.named && self.reports >= REPORTS;
        self.named |= due;
        due
    }
}

impl Core {
    /// Compares a member's report with what its team-mates reported last.
    pub(super) fn look_for_slowness(&mut self, session: Session, progress: &Progress, out: &mut Vec<Action>) {
        let Phase::Training { team, step_ms, .. } = &mut self.phase else { return };
        let Some(rank) = team.rank_of(session) else { return };
        step_ms.remove(session);
        if !is_steady(progress) {
            return;
        }
        let median_ms = step_ms.get(); // of the others
        step_ms.set(session, progress.step_ms);
        if let Some(median_ms) = median_ms {
            self.name_if_slow(session, rank, progress.step_ms, median_ms, out);
        }
    }

    /// What a step takes the members, by their last reports.
    pub(super) fn reported_step_ms(&self, team: &Team) -> Median<Session> {
        let mut step_ms = Median::new();
        for (_, session) in team.members() {
            if let Some(progress) = self.peers.get(&session).and_then(|peer| peer.progress.filter(is_steady))
            {
                step_ms.set(session, progress.step_ms);
            }
        }
        step_ms
    }

    fn name_if_slow(
        &mut self,
        session: Session,
        rank: Rank,
        step_ms: f64,
        median_ms: f64,
        out: &mut Vec<Action>,
    ) {
        let Some(mut peer) = self.peers.get_mut(&session) else { return };
        if peer.slow.report(step_ms, median_ms) {
            let worker = peer.worker().clone();
            out.push(Action::Emit(RunEvent::WorkerSlow { worker, rank, step_ms, median_ms }));
        }
    }
}

pub(super) fn is_steady(progress: &Progress) -> bool {
    progress.warm && progress.step_ms > 0.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_named_once_until_it_is_well_again() {
        let mut slowness = Slowness::default();
        let mut named = |step_ms, times: u32| (0..times).filter(|_| slowness.report(step_ms, 100.0)).count();
        assert_eq!(named(180.0, 4), 0, "a moment is no trouble");
        assert_eq!(named(180.0, 20), 1);
        assert_eq!(named(110.0, 1) + named(180.0, 5), 1, "it was well in between");
        assert_eq!(named(140.0, 50), 0, "neither slow nor well changes nothing");
    }

    #[test]
    fn very_short_steps_are_not_compared_too_closely() {
        let mut slowness = Slowness::default();
        assert!((0..20).all(|_| !slowness.report(9.0, 3.0)));
    }
}
