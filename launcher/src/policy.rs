//! Whether a process that ended is started again, and when: a pure decision.

use std::{process::ExitStatus, time::Duration};

/// Exit code by which a worker tells its launcher that another start of any worker would end alike: its run is over,
/// or failed. So does a node's command to whoever started that; a worker that was started alone says 1.
pub const FUTILE: u8 = 3;
/// As [`FUTILE`], of this worker alone: the run has no use for it.
pub const UNFIT: u8 = 4;
/// Exit code of a worker whose run was stopped, or that was drained: it has nothing left to do.
const RESUMABLE: i32 = 75;
/// Exit code for bad usage or configuration: another start would end alike.
const USAGE: i32 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestartPolicy {
    /// Restarts in a row without a life of `settled` between; more, and the worker is given up.
    pub limit: u32,
    /// Wait before the first restart in a row; doubles with each.
    pub first_backoff: Duration,
    pub longest_backoff: Duration,
    /// A process that lived so long was well: what follows is counted anew.
    pub settled: Duration,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self {
            limit: 5,
            first_backoff: Duration::from_millis(250),
            longest_backoff: Duration::from_secs(30),
            settled: Duration::from_secs(60),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It has done its work, or could not be helped by another start.
    Ended,
    RestartAfter(Duration),
    GiveUp,
}

impl RestartPolicy {
    /// Judges a process that `lived` so long and ended with `status`, after `in_a_row` restarts in a row.
    /// Returns the count to go on with, too.
    pub fn judge(&self, status: ExitStatus, lived: Duration, in_a_row: u32) -> (Verdict, u32) {
        let is_unfit = status.code() == Some(UNFIT.into());
        if matches!(status.code(), Some(0 | USAGE | RESUMABLE)) || is_unfit || is_futile(status) {
            return (Verdict::Ended, in_a_row);
        }
        let before = if lived >= self.settled { 0 } else { in_a_row };
        if before >= self.limit {
            return (Verdict::GiveUp, before);
        }
        let backoff = self.first_backoff.saturating_mul(1 << before.min(16)).min(self.longest_backoff);
        (Verdict::RestartAfter(backoff), before + 1)
    }
}

pub(crate) fn is_futile(status: ExitStatus) -> bool {
    status.code() == Some(FUTILE.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    const QUICK: Duration = Duration::from_secs(1);

    fn killed() -> ExitStatus {
        ExitStatus::from_raw(9)
    }

    #[test]
    fn work_that_is_done_is_not_begun_again() {
        for code in [0, 2, 3, 4, 75] {
            let status = ExitStatus::from_raw(code << 8);
            assert_eq!(
                RestartPolicy::default().judge(status, QUICK, 0).0,
                Verdict::Ended,
                "exit code {code}"
            );
        }
    }

    #[test]
    fn backoff_doubles_up_to_its_bound_and_the_limit_ends_it() {
        let policy = RestartPolicy { limit: 9, ..RestartPolicy::default() };
        let (mut in_a_row, mut waits) = (0, Vec::new());
        loop {
            let (verdict, next) = policy.judge(killed(), QUICK, in_a_row);
            match verdict {
                Verdict::RestartAfter(wait) => waits.push(wait.as_millis()),
                Verdict::GiveUp => break,
                Verdict::Ended => unreachable!("it was killed"),
            }
            in_a_row = next;
        }
        assert_eq!(waits, [250, 500, 1000, 2000, 4000, 8000, 16000, 30000, 30000]);
    }

    #[test]
    fn a_long_life_is_forgiven() {
        let policy = RestartPolicy::default();
        let (verdict, in_a_row) = policy.judge(killed(), policy.settled, policy.limit);
        assert_eq!((verdict, in_a_row), (Verdict::RestartAfter(policy.first_backoff), 1));
    }

    #[test]
    fn a_limit_of_none_never_restarts() {
        let policy = RestartPolicy { limit: 0, ..RestartPolicy::default() };
        assert_eq!(policy.judge(killed(), QUICK, 0).0, Verdict::GiveUp);
    }
}
