//! Whether this process does its work or is stuck, for an orchestrator that would start another in its place.
//!
//! One that waits for its coordinator, or for its team, is alive. The coordinator judges by the same budgets, from
//! what heartbeats tell, and mends more gently: this is for when it can't.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use musher_proto::{
    job::Cluster,
    message::{Activity, Phase, Progress},
    patience::budget,
};

use crate::train::ProgressBoard;

/// What a probe is answered from, from the process's first moment on.
#[derive(Debug, Default)]
pub struct Liveness {
    board: Arc<ProgressBoard>,
    /// Unknown before a coordinator has given its job: until then nothing is to be done.
    cluster: Mutex<Option<Cluster>>,
}

impl Liveness {
    /// Where the training thread writes what it does.
    pub fn board(&self) -> Arc<ProgressBoard> {
        self.board.clone()
    }

    /// The job is known, and is prepared for from now on.
    pub fn follow(&self, cluster: &Cluster) {
        self.board.enter(Phase::Loading);
        *self.cluster.lock().unwrap_or_else(PoisonError::into_inner) = Some(cluster.clone());
    }

    /// # Errors
    /// What it is stuck in, and for how long.
    pub fn verdict(&self) -> Result<(), String> {
        let cluster = self.cluster.lock().unwrap_or_else(PoisonError::into_inner);
        cluster.as_ref().map_or(Ok(()), |cluster| judge(&self.board.read(), cluster))
    }
}

fn judge(progress: &Progress, cluster: &Cluster) -> Result<(), String> {
    if progress.phase == Phase::Idle || progress.activity == Activity::WaitingForPeers {
        return Ok(());
    }
    let (taken, budget) = (Duration::from_millis(progress.in_activity_ms), budget(progress, cluster));
    if taken <= budget {
        return Ok(());
    }
    Err(format!(
        "the training thread is stuck: in phase {}, {}, for {:.1} s, where it may take {:.1} s",
        progress.phase.name(),
        progress.activity.name(),
        taken.as_secs_f64(),
        budget.as_secs_f64(),
    ))
}

#[cfg(test)]
mod tests {
    use musher_proto::job;

    use super::*;

    fn after(phase: Phase, activity: Activity, seconds: u64) -> Result<(), String> {
        let settings = ["cluster.step_timeout_s=10".into(), "cluster.heartbeat_timeout_s=5".into()];
        let cluster = job::load("", "test", &settings).expect("a job").cluster;
        let board = ProgressBoard::default();
        let progress = Progress { phase, activity, in_activity_ms: seconds * 1000, ..board.read() };
        judge(&progress, &cluster)
    }

    #[test]
    fn who_waits_for_others_is_alive_and_who_takes_too_long_itself_is_not() {
        for (phase, activity, alive, stuck) in [
            (Phase::Training, Activity::WaitingForData, 50, 51),
            (Phase::Validating, Activity::Working, 50, 51),
            (Phase::Loading, Activity::Working, 50, 51),
        ] {
            assert_eq!(after(phase, activity, alive), Ok(()));
            let why = after(phase, activity, stuck).expect_err("it is past its budget");
            assert!(why.contains("50.0 s") && why.contains(activity.name()), "{why}");
        }
        assert_eq!(after(Phase::Idle, Activity::Working, 100_000), Ok(()));
        assert_eq!(after(Phase::Connecting, Activity::WaitingForPeers, 100_000), Ok(()));
    }

    #[test]
    fn without_a_job_there_is_nothing_to_be_stuck_in() {
        assert_eq!(Liveness::default().verdict(), Ok(()));
    }
}
