//! What a worker may take for what it does, before it counts as stuck: the coordinator removes it then, and it
//! tells an orchestrator's probe so itself.

use std::time::Duration;

use crate::{
    job::Cluster,
    message::{Activity, Phase, Progress},
};

/// A step's budget counts this often for what is slow once, or depends on a disk.
pub const SLOW: u32 = 5;
/// A steady step may take this many times its median.
const MEDIANS: f64 = 10.0;

/// For work of its own, or for data: waiting for others is not its to answer for.
pub fn budget(progress: &Progress, cluster: &Cluster) -> Duration {
    let step = Duration::from_secs_f64(cluster.step_timeout_s);
    match (progress.phase, progress.activity) {
        (Phase::Training, Activity::Working) if progress.warm => {
            let median = Duration::from_secs_f64(progress.step_ms.clamp(0.0, 1e9) / 1e3);
            step.max(median.mul_f64(MEDIANS))
        }
        _ => step * SLOW,
    }
}
