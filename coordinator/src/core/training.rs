//! A formed team's work: segments of an epoch, validation, and the decisions between two steps. The checkpoints
//! that make them durable are `saving`'s.

use musher_proto::{
    ids::{Epoch, Rank, Session, Step},
    message::{
        EpochTotals, Phase as WorkerPhase, Progress, ReplicaLabel, SegmentFinished, Synced, ToWorker, Train,
        Validate, Validated,
    },
    scores,
    shard::ValidationUnits,
};

use super::{
    Core, Gathering, Phase, SaveRequest, StoppingPoint,
    early_stopping::Verdict,
    effects::{Action, ProgressReport, RunEvent, RunProgress, Status, Time},
    reasons::AbortCause,
    roster::{Replies, Team},
};

/// Samples in the picture that is drawn at each validation.
const PICTURE_SAMPLES: u32 = 6;

impl Core {
    /// A formed team goes on where its state stands.
    pub(super) fn resume_work(&mut self, team: Team, synced: Synced, now: Time, out: &mut Vec<Action>) {
        let held = ReplicaLabel { lineage: team.generation, ..synced.held };
        self.advanced_to(held.applied);
        self.last_applied = held.applied;
        let totals = EpochTotals::default(); // told already, or told again at the epoch's end
        let finished = SegmentFinished { held, paused: false, totals, state_digest: synced.state_digest };
        let stop = StoppingPoint { finished };
        let too_few = self.staying() < self.job.cluster.min_workers;
        match self.owed.take_if(|owed| owed.applied == held.applied) {
            Some(owed) => self.save(team, stop, owed, now, out),
            None if self.stop_requested => {
                let then = Some(Status::Stopped);
                let save =
                    SaveRequest { applied: held.applied, is_best: false, is_last: false, then, hold: false };
                self.save(team, stop, save, now, out);
            }
            None if too_few => self.go_on(team, stop, now, out),
            None => self.train_from(team, held, now, out),
        }
    }

    /// Whether nobody is left who holds the end of the last epoch that was finished.
    pub(super) fn is_behind(&self, held: ReplicaLabel) -> bool {
        (held.epoch, held.cursor) < (self.progress.announced, self.train_samples())
    }

    /// What happened after the checkpoint that the team starts from will happen again.
    pub(super) fn roll_back(&mut self, held: ReplicaLabel) {
        let finished = match held.cursor >= self.train_samples() {
            true => held.epoch,
            false => Epoch(held.epoch.0.saturating_sub(1)),
        };
        let announced = self.progress.announced.min(finished);
        let durable = self.durable.as_ref().map(|durable| durable.progress.clone()).unwrap_or_default();
        self.progress = RunProgress { announced, ..durable };
        self.owed = None;
    }

    pub(super) fn advanced_to(&mut self, applied: Step) {
        if applied > self.last_applied {
            self.last_applied = applied;
            self.barren = 0;
        }
    }

    /// Sends the team on from what it holds.
    fn train_from(&mut self, team: Team, held: ReplicaLabel, now: Time, out: &mut Vec<Action>) {
        let samples = self.train_samples();
        let judged = self.progress.early_stopping.judged;
        let next_epoch = held.cursor >= samples && held.epoch <= judged;
        let (epoch, cursor) = match next_epoch {
            true => (held.epoch.next(), 0),
            false => (held.epoch.max(Epoch(1)), held.cursor),
        };
        let train = Train { epoch, cursor, end: self.segment_end(held, cursor) };
        if cursor == 0 {
            out.push(Action::Emit(RunEvent::EpochStarted {
                generation: team.generation,
                epoch,
                step: held.applied,
                samples,
            }));
        }
        self.enter_training(team, train, true, now);
        self.send_team(&ToWorker::Train(train), out);
        if self.wants_pause() {
            self.pause_team(out);
        }
    }

    /// `whole`: the segment begins now, so that its rate can be told.
    pub(super) fn enter_training(&mut self, team: Team, train: Train, whole: bool, now: Time) {
        let finished = Replies::expected_from(&team);
        let step_ms = self.reported_step_ms(&team);
        self.enter(Phase::Training { team, train, finished, step_ms, pausing: false, whole, since: now });
    }

    /// The epoch's end, or before it the next step whose checkpoint is due.
    fn segment_end(&self, held: ReplicaLabel, cursor: u64) -> u64 {
        let (samples, every) = (self.train_samples(), self.job.checkpoint.every_steps);
        match every {
            0 => samples,
            every => {
                let steps = every - held.applied.0 % every;
                samples.min(cursor + steps * u64::from(self.job.train.global_batch))
            }
        }
    }

    pub(super) fn train_samples(&self) -> u64 {
        self.data.as_ref().map_or(0, |data| data.train_samples)
    }

    /// Of the newest of so many applied steps.
    pub(super) fn learning_rate(&self, applied: Step) -> f64 {
        let before = Step(applied.0.saturating_sub(1));
        self.job.train.rate_after(before, self.train_samples())
    }

    /// Seconds to the epoch limit at the rate of `progress`, training only.
    pub(super) fn eta_s(&self, progress: &Progress) -> Option<f64> {
        let samples = self.train_samples();
        let epochs_left = self.job.train.epochs.saturating_sub(progress.epoch.0);
        let samples_left = samples.saturating_sub(progress.cursor) + u64::from(epochs_left) * samples;
        let rate = progress.images_per_second;
        (rate > 0.0).then(|| samples_left as f64 / rate)
    }

    fn validation_units(&self) -> ValidationUnits {
        ValidationUnits {
            samples: self.data.as_ref().map_or(0, |data| data.val_samples),
            unit: u64::from(self.job.train.global_batch),
        }
    }

    pub(super) fn progressed(
        &mut self,
        session: Session,
        progress: Progress,
        now: Time,
        out: &mut Vec<Action>,
    ) {
        self.look_for_slowness(session, &progress, out);
        let Some(mut peer) = self.peers.get_mut(&session) else { return };
        let skipped_before =
            peer.progress.map_or(0, |p| if p.epoch == progress.epoch { p.steps_skipped } else { 0 });
        peer.progress = Some(progress);
        peer.progressed = now;
        drop(peer);
        if progress.phase == WorkerPhase::Syncing {
            self.connected(session, now, out);
        }
        let Phase::Training { team, train, .. } = &self.phase else { return };
        let in_hand = train.epoch;
        let speaks_for_the_team = team.rank_of(session) == Some(Rank(0));
        if !speaks_for_the_team || progress.phase != WorkerPhase::Training {
            return;
        }
        let (generation, samples) = (team.generation, self.train_samples());
        self.advanced_to(progress.applied);
        if progress.steps_skipped > skipped_before {
            out.push(Action::Emit(RunEvent::StepSkipped {
                generation,
                epoch: progress.epoch,
                step: progress.applied,
                in_epoch: progress.steps_skipped,
            }));
        }
        let is_of_before = progress.epoch != in_hand;
        let has_no_step = progress.loss.is_nan() && progress.images_per_second == 0.0;
        if is_of_before || has_no_step {
            return; // nothing that one wants to hear
        }
        out.push(Action::Emit(RunEvent::Progress(ProgressReport {
            generation,
            epoch: progress.epoch,
            step: progress.applied,
            cursor: progress.cursor,
            samples,
            loss: progress.loss,
            learning_rate: self.learning_rate(progress.applied),
            images_per_second: progress.images_per_second,
            eta_s: self.eta_s(&progress).unwrap_or(f64::NAN),
        })));
    }

    pub(super) fn segment_finished(
        &mut self,
        session: Session,
        report: SegmentFinished,
        now: Time,
        out: &mut Vec<Action>,
    ) {
        if let Phase::Gathering(Gathering { listening: Some(_), .. }) = &self.phase
            && let Some(mut peer) = self.peers.get_mut(&session)
        {
            peer.finished = Some(report); // it counts if the generation goes on
        }
        let Phase::Training { team, train, finished, whole, since, .. } = &mut self.phase else { return };
        let Some(rank) = team.rank_of(session) else { return };
        let advanced = (train.cursor + 1..=train.end).contains(&report.held.cursor);
        let ends_it = if report.paused { advanced } else { report.held.cursor == train.end };
        if report.held.epoch != train.epoch || !ends_it {
            return; // a repeated report of an earlier segment
        }
        finished.take(rank, report, now);
        let Some(all) = finished.complete() else { return };
        let first = *all[0];
        let odd = all.iter().position(|r| (r.held, r.state_digest) != (first.held, first.state_digest));
        let (team, stop, train) = (team.clone(), StoppingPoint { finished: first }, *train);
        let time = whole.then(|| now.saturating_sub(*since));
        if let Some(odd) = odd {
            // One state on all ranks is what everything else stands on: better no run than a wrong one.
            let reason = format!(
                "after step {} rank {odd} holds another state than rank 0; resume from the newest checkpoint, \
                 and suspect that worker's memory or device if it happens again",
                first.held.applied
            );
            return self.fail(reason, now, out);
        }
        let held = first.held;
        self.advanced_to(held.applied);
        for worker in &self.roster {
            self.bench.remove(worker); // its links serve
        }
        let trained = held.cursor.saturating_sub(train.cursor);
        if let Some(time) = time {
            self.pace.samples += trained;
            self.pace.time += time;
        }
        if held.cursor < self.train_samples() {
            let then = self.stop_requested.then_some(Status::Stopped);
            if first.paused && then.is_none() {
                return self.go_on(team, stop, now, out);
            }
            let save =
                SaveRequest { applied: held.applied, is_best: false, is_last: false, then, hold: false };
            return self.save(team, stop, save, now, out);
        }
        if self.progress.announced < held.epoch {
            self.progress.announced = held.epoch;
            self.persist(out);
            out.push(Action::Emit(RunEvent::EpochFinished {
                epoch: held.epoch,
                step: held.applied,
                samples: held.cursor,
                train_loss: first.totals.loss_sum / held.cursor as f64,
                images_per_second: time.map_or(f64::NAN, |time| trained as f64 / time.as_secs_f64()),
                state_digest: first.state_digest,
            }));
        }
        let validate = Validate { epoch: held.epoch, samples_wanted: PICTURE_SAMPLES };
        let validated = Replies::expected_from(&team);
        self.enter(Phase::Validating { team, stop, validated, since: now });
        self.send_team(&ToWorker::Validate(validate), out);
    }

    pub(super) fn validated(
        &mut self,
        session: Session,
        report: Validated,
        now: Time,
        out: &mut Vec<Action>,
    ) {
        let units = self.validation_units().count();
        let Phase::Validating { team, stop, validated, .. } = &mut self.phase else { return };
        let Some(rank) = team.rank_of(session).filter(|_| report.epoch == stop.finished.held.epoch) else {
            return;
        };
        validated.take(rank, report, now);
        let Some(all) = validated.complete() else { return };
        let held = stop.finished.held;
        let same_state = all.iter().all(|v| v.state_digest == stop.finished.state_digest);
        let scores = match same_state {
            true => {
                scores::aggregate(all.iter().flat_map(|v| &v.units), units, self.job.model.classes as usize)
            }
            false => Err("a rank validated another state than the team's".into()),
        };
        let png = all.iter().map(|v| &v.samples_png).find(|png| !png.is_empty()).cloned();
        let (team, stop) = (team.clone(), *stop);
        let scores = match scores {
            Ok(scores) => scores,
            Err(reason) => return self.abort(AbortCause::ValidationFailed { reason }, now, out),
        };
        let verdict = self.progress.early_stopping.judge(&self.job.early_stopping, held.epoch, &scores);
        self.last_scores = Some(scores);
        let save = self.save_after(verdict, held);
        self.persist_owing(save.as_ref(), out);
        out.push(Action::Emit(RunEvent::Validated { epoch: held.epoch, step: held.applied, scores }));
        if let Some(png) = png {
            let best = save.as_ref().is_some_and(|save| save.is_best);
            out.push(Action::WriteSamples { epoch: held.epoch, png, best });
        }
        if verdict.stop {
            let best_epoch = self.progress.early_stopping.best.map_or(held.epoch, |best| best.epoch);
            out.push(Action::Emit(RunEvent::EarlyStopped { epoch: held.epoch, best_epoch }));
        }
        match save {
            Some(save) => self.save(team, stop, save, now, out),
            None => self.go_on(team, stop, now, out),
        }
    }

    /// The checkpoint that is due after an epoch was judged.
    fn save_after(&self, verdict: Verdict, held: ReplicaLabel) -> Option<SaveRequest> {
        let ReplicaLabel { epoch, applied, .. } = held;
        let finished = self.finished_status();
        let is_last = finished.is_some();
        let then = finished.or(self.stop_requested.then_some(Status::Stopped));
        let every = &self.job.checkpoint;
        let due = every.every_epochs > 0 && epoch.0.is_multiple_of(every.every_epochs)
            || every.every_steps > 0 && applied.0.is_multiple_of(every.every_steps);
        let wanted = due || verdict.new_best || then.is_some();
        // A run that ends before any epoch was judged has its last weights for a result, as with Keras.
        let is_best = verdict.new_best || is_last && self.progress.early_stopping.best.is_none();
        wanted.then_some(SaveRequest { applied, is_best, is_last, then, hold: false })
    }

    /// How the run ends if there is nothing left to train.
    pub(super) fn finished_status(&self) -> Option<Status> {
        self.progress.end(self.job.train.epochs).map(Status::Finished)
    }

    /// Trains on with whoever is to be in the team: those that came meanwhile are taken in and those that
    /// want to go are let go, as the team stands between two steps. A team that can't go on without them
    /// saves first.
    pub(super) fn go_on(&mut self, team: Team, stop: StoppingPoint, now: Time, out: &mut Vec<Action>) {
        let held = stop.finished.held;
        let outsider = |session| team.rank_of(session).is_none();
        let come = self.peers.iter().any(|(&s, peer)| peer.is_ready() && !peer.leaving && outsider(s));
        let go = team.members().any(|(_, session)| self.peers.get(&session).is_some_and(|peer| peer.leaving));
        let enough = self.staying() >= self.job.cluster.min_workers;
        if !come && !go && enough {
            return self.train_from(team, held, now, out);
        }
        if !enough && !self.is_safe(held) {
            let save =
                SaveRequest { applied: held.applied, is_best: false, is_last: false, then: None, hold: true };
            return self.save(team, stop, save, now, out);
        }
        if go && self.checkpoint.as_ref().is_some_and(|open| !open.committing) {
            // Who goes may still have a part to upload.
            self.enter(Phase::Storing { team, stop });
            return;
        }
        for (_, session) in team.members() {
            if let Some(mut peer) = self.peers.get_mut(&session)
                && let Some(join) = &mut peer.join
            {
                join.held = Some(held);
            }
        }
        self.enter(Phase::Gathering(Gathering {
            until: now,
            since: now,
            wanted: self.job.cluster.min_workers,
            pooled: true,
            ..Default::default()
        }));
        if !enough {
            let (joined, wanted) = (self.staying(), self.job.cluster.min_workers);
            out.push(Action::Emit(RunEvent::WaitingForWorkers { joined, wanted }));
        }
        self.dismiss_leaving(now, out);
    }
}
