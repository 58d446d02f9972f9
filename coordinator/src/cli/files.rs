//! How many files this process may open: each worker's connection is one, and many systems allow a thousand unless they
//! are asked for more.

use musher_proto::job::JobConfig;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

use crate::{http, service::Connections};

/// Besides so many for each worker: operators, and those who are turned away.
const CONNECTIONS: u64 = 256;
/// A worker has one, and one more while it connects again.
const CONNECTIONS_PER_WORKER: u64 = 3;
/// Besides all connections: the run's files, checkpoints on their way, an object store.
const OTHERS: u64 = 256;
/// What the page, the probes and the run itself may open.
const RESERVED: u64 = 2 * http::CONNECTIONS as u64 + OTHERS;

/// So many connections that neither they nor the page's can use the files up that the run itself needs. The limit is
/// raised as far as the system allows it and `job` may need it.
pub(super) fn allow_for(job: &JobConfig) -> Connections {
    let workers = u64::from(job.cluster.max_workers);
    let limit = getrlimit(Resource::Nofile);
    let wanted = raised(limit, most(workers) + RESERVED);
    let allowed = match setrlimit(Resource::Nofile, wanted) {
        Ok(()) => wanted.current,
        Err(_) => limit.current,
    };
    share(workers, allowed)
}

/// Connections that so many workers and everybody else may want.
fn most(workers: u64) -> u64 {
    CONNECTIONS + CONNECTIONS_PER_WORKER * workers
}

fn share(workers: u64, allowed: Option<u64>) -> Connections {
    let left = allowed.map_or(u64::MAX, |allowed| allowed.saturating_sub(RESERVED).max(allowed / 4));
    let all = most(workers).min(left);
    let strangers = (CONNECTIONS + workers).min(all / 2);
    Connections { all: all as usize, strangers: strangers as usize }
}

/// Says where the system allows too little.
pub(super) fn caution(job: &JobConfig, connections: Connections) {
    let (max_workers, connections) = (job.cluster.max_workers, connections.all);
    if connections < max_workers as usize {
        warn!(
            connections,
            max_workers,
            "cluster.max_workers may need more open files than this system allows: raise its hard limit (ulimit -Hn), \
             or lower cluster.max_workers"
        );
    }
}

/// Never lower; up to the hard limit, and not beyond what is needed.
fn raised(limit: Rlimit, needed: u64) -> Rlimit {
    let current = limit.current.map(|current| {
        let most = limit.maximum.unwrap_or(u64::MAX);
        current.max(needed.min(most))
    });
    Rlimit { current, ..limit }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_the_run_its_files() {
        let share = |workers, allowed| {
            let Connections { all, strangers } = share(workers, allowed);
            (all as u64, strangers as u64)
        };
        assert_eq!(share(1024, None), (3328, 1280));
        assert_eq!(share(1024, Some(4096)), (3328, 1280));
        assert_eq!(share(1024, Some(2048)), (2048 - RESERVED, (2048 - RESERVED) / 2));
        assert_eq!(share(1024, Some(600)), (150, 75), "what there is, is shared out all the same");
        assert_eq!(share(10_000, Some(20_000)), (20_000 - RESERVED, (20_000 - RESERVED) / 2));
    }

    #[test]
    fn it_grows_up_to_the_hard_limit_and_never_shrinks() {
        let limit = |current, maximum| Rlimit { current, maximum };
        let cases = [
            (limit(Some(1024), Some(4096)), Some(1600)),
            (limit(Some(1024), Some(1500)), Some(1500)),
            (limit(Some(1024), None), Some(1600)),
            (limit(Some(20_000), Some(20_000)), Some(20_000)),
            (limit(None, None), None),
        ];
        for (before, after) in cases {
            assert_eq!(raised(before, 1600), limit(after, before.maximum));
        }
    }
}
