//! The life of a checkpoint, from the stopping point it is taken at until it is committed or given up, and what a
//! team waits for meanwhile. What is due when is `training`'s, who sends which part `checkpointing`'s.

use musher_proto::{
    ids::{CheckpointId, Step},
    message::{Fenced, PartHeader, ReplicaLabel, ToWorker},
};

use super::{
    Core, Durable, Phase, SaveRequest, StoppingPoint,
    checkpointing::OpenCheckpoint,
    effects::{Action, Commit, Position, RunEvent, SavedBest, Time},
    roster::Team,
};

/// Step time-outs within which the next part of a checkpoint must be stored.
const UPLOAD_PATIENCE: u32 = 10;

impl Core {
    pub(super) fn checkpoint_id(&self, held: ReplicaLabel) -> CheckpointId {
        let at_the_end = held.cursor >= self.train_samples();
        match at_the_end && self.progress.early_stopping.judged < held.epoch {
            true => CheckpointId::before_validation(held.epoch, held.applied),
            false => CheckpointId::of(held.epoch, held.applied),
        }
    }

    /// Whether the state is in the newest checkpoint, or can't be put into one.
    pub(super) fn is_safe(&self, held: ReplicaLabel) -> bool {
        let id = self.checkpoint_id(held);
        held.applied == Step(0)
            || self.durable.as_ref().is_some_and(|durable| durable.checkpoint == id)
            || self.unsavable == Some(id)
    }

    pub(super) fn is_unsavable(&self, held: ReplicaLabel) -> bool {
        self.unsavable == Some(self.checkpoint_id(held))
    }

    /// Takes a checkpoint at the stopping point; training goes on as soon as the replicas are copied.
    /// A checkpoint still on its way is waited for: they never pile up.
    pub(super) fn save(
        &mut self,
        team: Team,
        stop: StoppingPoint,
        save: SaveRequest,
        now: Time,
        out: &mut Vec<Action>,
    ) {
        if self.checkpoint.is_some() {
            self.owed = Some(save);
            self.enter(Phase::Storing { team, stop });
            return;
        }
        let held = stop.finished.held;
        let checkpoint = self.checkpoint_id(held);
        if self.durable.as_ref().is_some_and(|durable| durable.checkpoint == checkpoint) {
            return match save.then {
                Some(status) => self.finish(status, now, out),
                None => self.go_on(team, stop, now, out),
            };
        }
        let mut progress = self.progress.clone();
        if save.is_best {
            let judged = progress.early_stopping.best.map(|best| (best.epoch, best.scores));
            let best = judged.or(self.last_scores.map(|scores| (held.epoch, scores)));
            progress.saved_best =
                best.map(|(epoch, scores)| SavedBest { checkpoint: checkpoint.clone(), epoch, scores });
        }
        let weights = save.is_best || save.is_last;
        let commit = Commit {
            checkpoint,
            position: Position {
                lineage: held.lineage,
                applied: held.applied,
                epoch: held.epoch,
                cursor: held.cursor,
            },
            state_bytes: self.state_bytes,
            state_digest: stop.finished.state_digest,
            world_size: team.world(),
            dataset_digest: self.data.as_ref().map(|data| data.digest.clone()).unwrap_or_default(),
            progress,
            is_best: save.is_best,
            is_last: save.is_last,
        };
        out.push(Action::OpenCheckpoint {
            checkpoint: commit.checkpoint.clone(),
            lineage: held.lineage,
            state_bytes: commit.state_bytes,
        });
        let metadata = weights.then(|| self.weights_metadata(&commit));
        let patience = super::seconds(self.job.cluster.step_timeout_s) * UPLOAD_PATIENCE;
        let (open, saves) = OpenCheckpoint::plan(commit, metadata, &team, &self.peers, now, patience);
        self.checkpoint = Some(open);
        for (session, request) in saves {
            let message =
                Fenced { term: self.fences.term, generation: team.generation, body: ToWorker::Save(request) };
            out.push(Action::Send { session, message });
        }
        if save.then.is_some() || save.hold {
            self.owed = Some(save);
            self.enter(Phase::Storing { team, stop });
        } else {
            self.go_on(team, stop, now, out);
        }
    }

    /// Written into the weights file, for whoever opens it elsewhere.
    fn weights_metadata(&self, commit: &Commit) -> String {
        let scores = self.last_scores.unwrap_or_default();
        serde_json::json!({
            "run": self.run,
            "epoch": commit.position.epoch.to_string(),
            "step": commit.position.applied.to_string(),
            "val_loss": scores.loss.to_string(),
            "val_accuracy": scores.accuracy.to_string(),
            "val_miou": scores.miou.to_string(),
            "classes": self.job.model.classes.to_string(),
            "width": self.job.model.width.to_string(),
            "encoder": name_of(self.job.encoder()),
            "normalize": name_of(self.job.normalize()),
            "image_size": self.job.data.image_size.to_string(),
            "dataset_digest": commit.dataset_digest,
            "job": serde_json::to_string(&self.job).expect("a job is plain data"),
        })
        .to_string()
    }

    pub(super) fn part_stored(&mut self, header: &PartHeader, now: Time, out: &mut Vec<Action>) {
        let Some(open) = self.open_for(header) else { return };
        match open.part_stored(header, now) {
            Ok(false) => {}
            Ok(true) => {
                open.committing = true;
                out.push(Action::CommitCheckpoint(Box::new(open.commit.clone())));
            }
            Err(reason) => self.checkpoint_failed(&reason, now, out),
        }
    }

    pub(super) fn part_failed(
        &mut self,
        header: &PartHeader,
        reason: &str,
        now: Time,
        out: &mut Vec<Action>,
    ) {
        if self.open_for(header).is_some() {
            self.checkpoint_failed(reason, now, out);
        }
    }

    /// The checkpoint that the part is for, if it still waits for one of this worker's: nobody else has a say in it.
    fn open_for(&mut self, header: &PartHeader) -> Option<&mut OpenCheckpoint> {
        let waits = |open: &&mut OpenCheckpoint| {
            let is_it = *open.id() == header.checkpoint && !open.is_outdated(header);
            is_it && !open.committing && open.awaits(&header.worker)
        };
        self.checkpoint.as_mut().filter(waits)
    }

    pub(super) fn committed(
        &mut self,
        checkpoint: &CheckpointId,
        bytes: u64,
        now: Time,
        out: &mut Vec<Action>,
    ) {
        let Some(open) = self.checkpoint.take_if(|open| open.id() == checkpoint) else { return };
        let Commit { checkpoint, position, progress, is_best, .. } = open.commit;
        self.durable = Some(Durable {
            checkpoint: checkpoint.clone(),
            cursor: position.cursor,
            progress: progress.clone(),
        });
        let durable_id = checkpoint.clone();
        out.push(Action::Emit(RunEvent::CheckpointCommitted {
            checkpoint,
            epoch: position.epoch,
            step: position.applied,
            bytes,
            elapsed: now.saturating_sub(open.opened),
            stall_ms: open.stall_ms,
        }));
        if is_best {
            self.progress.saved_best = progress.saved_best;
        }
        let other = self.owes_another(&durable_id);
        let owed = self.owed.take_if(|owed| !other && owed.applied == position.applied);
        self.persist(out);
        match owed {
            Some(SaveRequest { then: Some(status), .. }) => self.finish(status, now, out),
            _ => self.storing_done(now, out),
        }
    }

    /// Training goes on: the checkpoints before this one stand. A run that ends with it fails, as its
    /// result is not safe.
    pub(super) fn checkpoint_failed(&mut self, reason: &str, now: Time, out: &mut Vec<Action>) {
        let Some(open) = self.checkpoint.take() else { return };
        let Commit { checkpoint, position, .. } = open.commit;
        out.push(Action::AbandonCheckpoint { checkpoint: checkpoint.clone() });
        out.push(Action::Emit(RunEvent::CheckpointFailed {
            checkpoint: checkpoint.clone(),
            reason: reason.into(),
        }));
        let Phase::Storing { .. } = self.phase else { return };
        let other = self.owes_another(&checkpoint);
        match self.owed.take_if(|owed| !other && owed.applied == position.applied) {
            Some(SaveRequest { then: Some(_), .. }) => self.fail(
                format!("the last checkpoint, {checkpoint}, could not be written: {reason}"),
                now,
                out,
            ),
            Some(_) => {
                self.unsavable = Some(checkpoint);
                self.storing_done(now, out);
            }
            None => self.storing_done(now, out),
        }
    }

    /// The same step before its validation is another checkpoint.
    fn owes_another(&self, checkpoint: &CheckpointId) -> bool {
        matches!(&self.phase, Phase::Storing { stop, .. } if self.checkpoint_id(stop.finished.held) != *checkpoint)
    }

    /// Nothing is on its way any more: takes the checkpoint that waited, or trains on.
    fn storing_done(&mut self, now: Time, out: &mut Vec<Action>) {
        let Phase::Storing { team, stop } = &self.phase else { return };
        let (team, stop) = (team.clone(), *stop);
        match self.owed.take() {
            Some(owed) => self.save(team, stop, owed, now, out),
            None => self.go_on(team, stop, now, out),
        }
    }
}

/// As in a job file.
fn name_of(choice: impl serde::Serialize) -> serde_json::Value {
    serde_json::to_value(choice).expect("a choice without data is a text")
}
