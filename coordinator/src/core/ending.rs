//! How a run ends: finished, stopped on request, or failed with a sentence.

use musher_proto::message::ToWorker;

use super::{
    Core, Phase,
    effects::{Action, Outcome, RunEvent, Status, Time},
    seconds,
};

impl Core {
    /// The team stops after the step in flight, saves and ends.
    pub(super) fn stop_requested(&mut self, now: Time, out: &mut Vec<Action>) {
        if std::mem::replace(&mut self.stop_requested, true) {
            return;
        }
        self.persist(out); // a next life of the coordinator keeps the promise
        match self.phase {
            Phase::Training { .. } => self.pause_team(out),
            // A state that only workers hold is saved once its team is formed.
            Phase::Forming { .. } if self.newest_held().is_none() => self.finish(Status::Stopped, now, out),
            Phase::Storing { .. } => {
                if let Some(owed) = &mut self.owed {
                    owed.then.get_or_insert(Status::Stopped);
                }
            }
            Phase::Gathering(_)
            | Phase::Forming { .. }
            | Phase::Validating { .. }
            | Phase::Lingering { .. }
            | Phase::Ended => {}
        }
    }

    pub(super) fn fail(&mut self, reason: String, now: Time, out: &mut Vec<Action>) {
        if !matches!(self.phase, Phase::Lingering { .. } | Phase::Ended) {
            self.finish(Status::Failed { reason }, now, out);
        }
    }

    /// Tells the workers, and lingers until they have heard it; one that was put out lately may still come.
    pub(super) fn finish(&mut self, status: Status, now: Time, out: &mut Vec<Action>) {
        if let Some(open) = self.checkpoint.take() {
            out.push(Action::AbandonCheckpoint { checkpoint: open.commit.checkpoint });
        }
        for (&session, _) in self.peers.iter() {
            self.send(session, ToWorker::Finish(status.goodbye()), out);
        }
        if std::mem::take(&mut self.stop_requested) {
            self.persist(out);
        }
        let outcome = self.outcome(status);
        out.push(Action::Emit(match &outcome.status {
            Status::Failed { reason } => RunEvent::RunFailed { reason: reason.clone() },
            Status::Finished(_) | Status::Stopped => RunEvent::RunFinished { outcome: outcome.clone() },
        }));
        self.enter(Phase::Lingering {
            outcome,
            until: now + seconds(self.job.server.linger_s),
            // It is to hear of the end, not to look for a coordinator that is gone.
            expecting: self.removed.is_some_and(|at| now < at + self.heartbeat_timeout()),
        });
    }

    fn outcome(&self, status: Status) -> Outcome {
        let best = self.progress.saved_best.as_ref();
        let restored = best.filter(|_| self.job.early_stopping.restore_best);
        Outcome {
            status,
            epochs: self.progress.early_stopping.judged,
            best_epoch: best.map(|best| best.epoch),
            scores: restored.map(|best| best.scores).or(self.last_scores),
            images_per_second: match self.pace.time.as_secs_f64() {
                0.0 => 0.0,
                time => self.pace.samples as f64 / time,
            },
            data_warnings: self.data_warnings.len() as u64,
        }
    }
}
