//! A coordinator that was stopped, or starved, accuses nobody of what it slept through.

use std::time::Duration;

use super::{Core, Phase, effects::Time};

/// Called so much later than it asked for, it has not been running.
const LATE: Duration = Duration::from_millis(100);
/// For what arrived meanwhile to be read.
const READING: Duration = Duration::from_millis(500);
/// One that is always late must still come to a verdict.
const NOT_AGAIN_WITHIN: Duration = Duration::from_secs(5);

impl Core {
    /// Moves all that it has waited for on by the time that it lost: what came meanwhile is still to be
    /// read.
    pub(super) fn forgive_lateness(&mut self, now: Time) {
        let Some(asked) = self.asked else { return };
        let lost = now.saturating_sub(asked);
        let again = self.forgave.is_some_and(|forgave| now < forgave + NOT_AGAIN_WITHIN);
        if lost > LATE && !again {
            self.forgave = Some(now);
            self.move_on(lost + READING);
        }
    }

    fn move_on(&mut self, by: Duration) {
        self.peers.change_times(|peer| {
            peer.heard += by;
            peer.progressed += by;
            if let Some(suspect) = &mut peer.suspect {
                suspect.until += by;
            }
            if let Some(until) = &mut peer.benched {
                *until += by;
            }
        });
        self.watch.all_changed();
        if let Some(open) = &mut self.checkpoint {
            open.moved += by;
        }
        match &mut self.phase {
            Phase::Gathering(gathering) => {
                gathering.until += by;
                gathering.since += by;
                for moment in [&mut gathering.give_up, &mut gathering.listening].into_iter().flatten() {
                    *moment += by;
                }
            }
            Phase::Forming { since, .. }
            | Phase::Training { since, .. }
            | Phase::Validating { since, .. } => *since += by,
            Phase::Lingering { until, .. } => *until += by,
            Phase::Storing { .. } | Phase::Ended => {}
        }
    }
}
