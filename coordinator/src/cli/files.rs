//! How many files this process may open: each worker's connection is one, and many systems allow a thousand unless they
//! are asked for more.

use musher_proto::job::JobConfig;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

/// Besides the workers' connections: what else is connected, the run's files, checkpoints on their way.
const OTHERS: u64 = 512;

/// As many as the job's workers may need, as far as the system allows it; said where it does not.
pub(super) fn allow_for(job: &JobConfig) {
    let needed = u64::from(job.cluster.max_workers) + OTHERS;
    let limit = getrlimit(Resource::Nofile);
    let wanted = raised(limit, needed);
    if wanted != limit
        && let Err(error) = setrlimit(Resource::Nofile, wanted)
    {
        warn!(%error, "the limit on open files can't be raised");
    }
    if let Some(allowed) = wanted.current.filter(|allowed| *allowed < needed) {
        warn!(
            allowed,
            needed,
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
