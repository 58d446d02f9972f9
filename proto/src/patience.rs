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
            let step_ms = if progress.step_ms.is_nan() { 0.0 } else { progress.step_ms.clamp(0.0, 1e9) };
            let median = Duration::from_secs_f64(step_ms / 1e3);
            step.max(median.mul_f64(MEDIANS))
        }
        _ => step * SLOW,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::{Epoch, Step},
        message::StepWaits,
    };

    #[test]
    fn whatever_a_peer_says_there_is_a_budget() {
        let cluster = Cluster::default();
        let step = Duration::from_secs_f64(cluster.step_timeout_s);
        let budget_of = |step_ms: f64| {
            let progress = Progress {
                phase: Phase::Training,
                activity: Activity::Working,
                in_activity_ms: 0,
                warm: true,
                applied: Step(1),
                epoch: Epoch(1),
                cursor: 0,
                loss: f64::NAN,
                images_per_second: 0.0,
                step_ms,
                waits: StepWaits::default(),
                steps_skipped: 0,
            };
            budget(&progress, &cluster)
        };
        for step_ms in [f64::NAN, f64::NEG_INFINITY, -1.0, 0.0, 1.0] {
            assert_eq!(budget_of(step_ms), step);
        }
        assert_eq!(budget_of(f64::INFINITY), budget_of(1e9));
        assert_eq!(budget_of(step.as_secs_f64() * 1e3), step.mul_f64(MEDIANS));
    }
}
