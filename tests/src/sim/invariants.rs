//! The nine invariants of the protocol, each a function that says what must hold and, if it does not, what
//! was seen. They judge by the truth, which no single process knows.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    rc::Rc,
};

use musher_coordinator::core::{
    Action, Commit, Fences, ResumePoint, RunEvent, RunState, Status, Stopped, early_stopping::EarlyStopping,
    reasons::Departure,
};
use musher_proto::{
    ids::{CheckpointId, Epoch, Generation, Session, Step, WorkerId},
    message::{Fenced, Form, FromWorker, PartHeader, PartKind, ReplicaLabel, Start, ToWorker, Train},
    scores::Scores,
};

use super::{
    clock::{Time, ms, seconds},
    replica::{AppliedStep, Replica},
    world::World,
};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// 1 to 9, as in ARCHITECTURE.md; 0: a panic.
    pub invariant: u8,
    pub what: String,
}

type Verdict = Result<(), Violation>;

/// What holds if `true`; else which invariant does not, and why.
macro_rules! holds {
    ($invariant:literal, $condition:expr, $($why:tt)+) => {
        if !$condition {
            return Err(Violation { invariant: $invariant, what: format!($($why)+) });
        }
    };
}

/// What the invariants remember of the run so far.
#[derive(Debug, Default)]
pub struct Ledger {
    newest: Generation,
    /// The newest one that was told to train.
    trained: Generation,
    /// What it began with.
    history: Rc<Vec<AppliedStep>>,
    judged: BTreeMap<Epoch, Step>,
    announced: BTreeMap<Epoch, Step>,
    /// The last epoch that was judged when a checkpoint was taken.
    judged_before: BTreeMap<CheckpointId, Epoch>,
    start: Option<Start>,
    /// Whether a generation's history begins at a checkpoint or anew, not with the team that trained before.
    anew: BTreeMap<Generation, bool>,
    committed: BTreeSet<CheckpointId>,
    joined: BTreeSet<Session>,
    pub stop_requested: bool,
    restart: Option<Restart>,
    /// Since when the core is in its phase, and in which.
    phase: (&'static str, Generation, Time),
    /// The last message was a Form: its like go out to the whole roster.
    forming: bool,
    forming_anew: bool,
    /// The workers of each generation, in rank order.
    pub teams: BTreeMap<Generation, Vec<usize>>,
}

/// A coordinator that was started again and has not formed or continued a team yet.
#[derive(Debug)]
struct Restart {
    listens_until: Time,
    roster: Vec<WorkerId>,
    fences: Fences,
    /// What came back while it listened.
    returned: BTreeMap<WorkerId, u64>,
}

impl World {
    fn check(&mut self, verdict: Verdict) {
        if let (Err(violation), None) = (verdict, &self.violation) {
            self.note(|_| format!("VIOLATED: {violation:?}"));
            self.violation = Some(violation);
        }
    }

    // ---- 1: at most one generation is live ----------------------------------------------------

    /// Generations grow, only the newest is told to work, and what a generation stands on is on disk before
    /// anybody hears of it.
    fn invariant_1_one_generation_is_live(
        &self,
        session: Session,
        message: &Fenced<ToWorker>,
        forming: bool,
    ) -> Verdict {
        let Fenced { term, generation, body } = message;
        let newest = self.ledger.newest;
        let disk = self.coordinator.disk.as_ref().map(|disk| disk.fences).unwrap_or_default();
        holds!(1, *term == disk.term, "session {session} is told of term {term}, on disk is {}", disk.term);
        match body {
            ToWorker::Form(_) => {
                let grows = *generation > newest || forming && *generation == newest;
                holds!(1, grows, "generation {generation} is formed after {newest}");
                holds!(
                    1,
                    *generation == disk.generation,
                    "{generation} is formed, on disk is {}",
                    disk.generation
                );
            }
            ToWorker::Train(_) | ToWorker::Validate(_) | ToWorker::Save(_) | ToWorker::Pause => {
                holds!(
                    1,
                    *generation == newest,
                    "generation {generation} is told to work, but {newest} was formed"
                );
                holds!(1, *generation == disk.lineage, "{generation} works, on disk {} trains", disk.lineage);
            }
            ToWorker::Abort { .. } => {
                let known = newest.max(disk.generation); // it was persisted, and perhaps nobody was told of it
                holds!(1, *generation <= known, "generation {generation} is aborted, {known} is the newest");
            }
            ToWorker::Welcome(_) | ToWorker::Refused { .. } | ToWorker::Finish(_) => {}
        }
        Ok(())
    }

    /// A message of another term or generation changes nothing.
    pub fn check_stale(&mut self, unmoved: bool, what: &str) {
        let verdict = invariant_1_a_stale_message_changes_nothing(unmoved, what);
        self.check(verdict);
    }

    // ---- 2: applied steps never go back -------------------------------------------------------

    /// A team takes the most advanced state that a worker holds which the coordinator can talk to and that
    /// is of its lineage. Lost may be only what nobody else held: of processes that died, that are cut off,
    /// silent or stuck, and were given up. One that its peers can't reach is not: others are put out first.
    fn invariant_2_applied_never_falls_behind_a_live_holder(
        &self,
        form: &Form,
        donor: Option<usize>,
        given_up: &[Session],
    ) -> Verdict {
        let fences = self.coordinator.disk.as_ref().map(|disk| disk.fences).unwrap_or_default();
        let best = (0..self.workers.len())
            .filter(|&worker| self.is_reachable(worker, given_up))
            .filter_map(|worker| Some((self.eligible(worker, fences)?.applied, worker)))
            .max();
        let Some((applied, holder)) = best.filter(|(applied, _)| *applied > Step(0)) else { return Ok(()) };
        let name = &self.workers[holder].name;
        if let Start::Checkpoint(id) = &form.start {
            // A holder may be let go once what it holds is durable.
            let saved = self.store.committed.get(id).map(|checkpoint| checkpoint.commit.position.applied);
            holds!(2, saved >= Some(applied), "{name} holds step {applied}, but the team starts from {id}");
            return Ok(());
        }
        holds!(
            2,
            form.start == Start::Held,
            "{name} holds step {applied}, but the team starts from the seed"
        );
        let Some(donor) = donor else { return Ok(()) }; // it has died meanwhile
        let given = self.eligible(donor, fences).map(|label| label.applied);
        holds!(2, given >= Some(applied), "{name} holds step {applied}, the donor {donor} {given:?}");
        Ok(())
    }

    /// Each applied step is the next one of the replica's history.
    fn invariant_2_no_step_is_applied_twice(&self, replica: &Replica) -> Verdict {
        let ReplicaLabel { applied, .. } = replica.label;
        holds!(2, applied.0 == replica.steps.len() as u64, "step {applied} is the {}th", replica.steps.len());
        Ok(())
    }

    /// A team goes on from the history of the one that trained before it, unless it starts from a checkpoint
    /// or anew.
    fn invariant_2_histories_do_not_fork(&self, generation: Generation, history: &[AppliedStep]) -> Verdict {
        let went_on = self.ledger.anew.get(&generation) != Some(&true);
        let descends = history.starts_with(&self.ledger.history);
        let before = self.ledger.history.len();
        holds!(
            2,
            descends || !went_on,
            "generation {generation} has another history than the first {before} steps"
        );
        Ok(())
    }

    // ---- 3: each sample once ------------------------------------------------------------------

    fn invariant_3_a_step_uses_fresh_samples(&self, replica: &Replica) -> Verdict {
        let mut of_epoch = replica.steps.iter().rev().take_while(|step| step.epoch == replica.label.epoch);
        let Some(last) = of_epoch.next() else { return Ok(()) };
        let used_before =
            last.samples.iter().find(|sample| of_epoch.clone().any(|step| step.samples.contains(sample)));
        holds!(3, used_before.is_none(), "sample {used_before:?} is used twice in epoch {}", last.epoch);
        Ok(())
    }

    /// All samples of each epoch up to `epochs`.
    fn invariant_3_epochs_are_whole(&self, replica: &Replica, epochs: Epoch) -> Verdict {
        let samples = self.scenario.knobs.train_samples;
        for epoch in (1..=epochs.0).map(Epoch) {
            let steps = replica.steps.iter().filter(|step| step.epoch == epoch);
            let mut used: Vec<u64> = steps.flat_map(|step| step.samples.clone()).collect();
            used.sort_unstable();
            holds!(3, used == (0..samples).collect::<Vec<_>>(), "epoch {epoch} used {used:?} of {samples}");
        }
        Ok(())
    }

    fn invariant_3_validation_counts_each_sample_once(
        &mut self,
        epoch: Epoch,
        step: Step,
        samples: u64,
    ) -> Verdict {
        let expected = self.scenario.knobs.val_samples;
        holds!(3, samples == expected, "epoch {epoch} was validated on {samples} of {expected} samples");
        let before = self.ledger.judged.insert(epoch, step);
        holds!(3, before.is_none(), "epoch {epoch} is judged after step {step} and was after {before:?}");
        Ok(())
    }

    /// Whatever happens to the team, the run is judged by its curve, epoch by epoch.
    fn invariant_3_faults_do_not_change_the_verdict(&self, epochs: Epoch, stopped: Stopped) -> Verdict {
        let curve = &self.scenario.knobs.curve;
        let mut judged = EarlyStopping::default();
        let expected = (1..=self.job.train.epochs).map(Epoch).find_map(|epoch| {
            let loss = curve[(epoch.0 as usize - 1).min(curve.len() - 1)];
            judged.judge(&self.job.early_stopping, epoch, &Scores { loss, ..Scores::default() });
            judged.stopped.then_some((epoch, Stopped::Early))
        });
        let expected = expected.unwrap_or((Epoch(self.job.train.epochs), Stopped::EpochLimit));
        let found = (epochs, stopped);
        holds!(
            3,
            found == expected,
            "the run ends as {found:?}, by its validation losses {curve:?} as {expected:?}"
        );
        Ok(())
    }

    // ---- 4: one state -------------------------------------------------------------------------

    /// When a generation is told to train for the first time, all its members hold the same.
    fn invariant_4_members_hold_one_state_after_a_sync(&self, generation: Generation) -> Verdict {
        let mut first: Option<(&WorkerId, &Replica)> = None;
        for worker in &self.workers {
            let Some(process) = &worker.process else { continue };
            let replica = &process.thread.replica;
            if replica.label.lineage != generation {
                continue;
            }
            match first {
                None => first = Some((&worker.name, replica)),
                Some((other, state)) => {
                    let same = state.bytes() == replica.bytes() && state.steps == replica.steps;
                    holds!(
                        4,
                        same,
                        "in generation {generation} {} and {other} hold different states",
                        worker.name
                    );
                }
            }
        }
        Ok(())
    }

    fn invariant_4_a_checkpoint_is_of_one_state(
        &self,
        commit: &Commit,
        parts: &[(PartHeader, Replica)],
    ) -> Verdict {
        for (header, state) in parts {
            let same = state.bytes() == parts[0].1.bytes();
            holds!(4, same, "{}'s part of {} is of another state", header.worker, commit.checkpoint);
        }
        let digest = parts.first().map(|(_, state)| state.digest());
        holds!(
            4,
            digest == Some(commit.state_digest),
            "{} has another digest than its state",
            commit.checkpoint
        );
        Ok(())
    }

    // ---- 5: checkpoints -----------------------------------------------------------------------

    fn invariant_5_a_visible_checkpoint_is_complete(
        &self,
        commit: &Commit,
        parts: &[(PartHeader, Replica)],
    ) -> Verdict {
        let Commit { checkpoint, position, .. } = commit;
        let mut covered = 0;
        for (header, state) in parts {
            let label = (header.lineage, header.applied);
            holds!(5, label == (position.lineage, position.applied), "{checkpoint} has a part of {label:?}");
            let place = (state.label.epoch, state.label.cursor);
            holds!(
                5,
                place == (position.epoch, position.cursor),
                "{checkpoint} is of {place:?}, not {position:?}"
            );
            if let PartKind::State { .. } = header.kind {
                covered += header.length;
            }
        }
        holds!(
            5,
            covered == commit.state_bytes,
            "{checkpoint} has {covered} of {} bytes",
            commit.state_bytes
        );
        let weights = parts.iter().filter(|(header, _)| header.kind == PartKind::Weights).count();
        let wanted = usize::from(commit.is_best || commit.is_last);
        holds!(5, weights == wanted, "{checkpoint} has {weights} files of weights");
        Ok(())
    }

    /// There is always something to resume from once there was, and the best weights stay.
    fn invariant_5_a_commit_endangers_none_before(&self, best: Option<&CheckpointId>) -> Verdict {
        holds!(
            5,
            !self.store.committed.is_empty() || self.ledger.committed.is_empty(),
            "no checkpoint is left"
        );
        if let Some(best) = best {
            holds!(5, self.store.committed.contains_key(best), "the best checkpoint, {best}, is gone");
        }
        Ok(())
    }

    fn invariant_5_only_a_visible_checkpoint_is_told_of(&self, checkpoint: &CheckpointId) -> Verdict {
        let visible = self.store.committed.contains_key(checkpoint);
        holds!(5, visible, "checkpoint {checkpoint} is told of, but it is not there");
        Ok(())
    }

    // ---- 6: a restart -------------------------------------------------------------------------

    /// Until the new coordinator has listened for long enough, nothing goes on without those of the former
    /// team that live; and what came back in time is not rolled back.
    fn invariant_6_a_restart_rolls_back_nothing_that_came_back(
        &self,
        generation: Generation,
        applied: Option<u64>,
        given_up: &[Session],
    ) -> Verdict {
        let Some(restart) = &self.ledger.restart else { return Ok(()) };
        let holds_it = |name: &WorkerId| {
            let worker = self.index_of(name)?;
            Some((worker, self.eligible(worker, restart.fences)?.applied.0))
        };
        if self.now < restart.listens_until {
            for name in restart.roster.iter().filter(|name| !restart.returned.contains_key(name)) {
                let missing = holds_it(name);
                holds!(
                    6,
                    missing.is_none(),
                    "generation {generation} goes on before {name} was listened for"
                );
            }
        }
        let held = restart.returned.iter().filter_map(|(name, held)| {
            let (worker, now_held) = holds_it(name)?;
            (self.is_reachable(worker, given_up) && now_held >= *held).then_some((*held, name))
        });
        let (Some((held, name)), Some(applied)) = (held.max(), applied) else { return Ok(()) }; // the donor may be dead
        holds!(
            6,
            applied >= held,
            "{name} came back in time with step {held}, but step {applied} is gone on from"
        );
        Ok(())
    }

    // ---- 7: nobody waits for ever -------------------------------------------------------------

    /// A thread in the exchange gets an answer, or loses its patience; a stopped process' time does not count.
    fn invariant_7_calls_of_the_exchange_are_bounded(&self) -> Verdict {
        for exchange in self.exchanges.values() {
            for seat in &exchange.seats {
                let Some(inside) = &seat.inside else { continue };
                if !self.workers[seat.worker].runs() || self.workers[seat.worker].resumed_at > inside.since {
                    continue;
                }
                let waited = self.now.saturating_sub(inside.since);
                let bound = self.bounds.ring + ms(5000);
                holds!(
                    7,
                    waited <= bound,
                    "{} is in {:?} since {waited:?}",
                    self.workers[seat.worker].name,
                    inside.call
                );
            }
        }
        Ok(())
    }

    /// Whatever the core does, it asks to be called again, unless it is over or nobody is there.
    fn invariant_7_the_core_has_a_deadline(&self) -> Verdict {
        let Some(life) = &self.coordinator.life else { return Ok(()) };
        let waits_for_nobody = life.sessions.is_empty() || self.coordinator.outcome.is_some();
        let asks = life.core.next_deadline().is_some();
        let committing = life.commits > 0;
        holds!(7, asks || waits_for_nobody || committing, "the core waits without a deadline");
        Ok(())
    }

    /// Once all is calm, nothing that a live process waits for takes longer than the longest bound.
    fn invariant_7_the_core_moves_on_when_all_is_calm(&self) -> Verdict {
        let Some(calm) = self.calm_since else { return Ok(()) };
        let (phase, generation, since) = self.ledger.phase;
        let resting = ["waiting for workers", "ended"].contains(&phase);
        let waited = self.now.saturating_sub(since.max(calm).max(self.last_step));
        // A checkpoint whose part never came, and the one that waited for it: ten step time-outs each.
        let bound = (self.bounds.ring * 2).max(self.bounds.formation * 20) + ms(60_000);
        holds!(
            7,
            resting || waited <= bound,
            "the core is {phase} in generation {generation} since {waited:?}"
        );
        Ok(())
    }

    /// A deadline ends the wait for one that does not do its part, never that of one that waits itself.
    fn invariant_7_nobody_is_accused_without_cause(
        &self,
        worker: &WorkerId,
        departure: &Departure,
    ) -> Verdict {
        let (Some(wait), Some(calm)) = (departure.wait(), self.calm_since) else { return Ok(()) };
        let Some(index) = self.index_of(worker) else { return Ok(()) };
        let connection = self.connection_of(index).and_then(|id| self.connections.get(&id));
        let is_it =
            connection.is_some_and(|connection| connection.session.is_some() && connection.at_coordinator);
        let worker = &self.workers[index];
        let began = worker.process.as_ref().map_or(self.now, |process| process.began);
        let undisturbed_since = calm.max(worker.resumed_at).max(worker.hangs_until).max(began);
        let all_in_calm = undisturbed_since.saturating_add(wait.waited) < self.now;
        let innocent = worker.runs() && is_it && all_in_calm;
        holds!(7, !innocent, "{} did its part and is removed: {departure}", worker.name);
        Ok(())
    }

    fn invariant_7_timers_do_not_spin(spins: u32) -> Verdict {
        holds!(7, spins < 200, "the core asks to be called again and again and does nothing");
        Ok(())
    }

    // ---- 8: nobody who does not belong --------------------------------------------------------

    fn invariant_8_members_belong_to_the_run(&self, team: &[String]) -> Verdict {
        for address in team {
            let found = self.found_at(address);
            let genuine = found.is_some_and(|(worker, _)| self.workers[worker].genuine);
            holds!(8, genuine, "{address} is taken into the team");
            let existed =
                found.is_some_and(|(worker, incarnation)| incarnation <= self.workers[worker].starts);
            holds!(8, existed, "{address} is nobody's");
        }
        Ok(())
    }

    pub fn stranger_is_sent(&mut self, message: &Fenced<ToWorker>) {
        let verdict = invariant_8_a_stranger_gets_no_orders(message);
        self.check(verdict);
    }

    pub fn check_stranger(&mut self, turned_down: bool, what: &str) {
        let verdict = invariant_8_a_stranger_changes_nothing(turned_down, what);
        self.check(verdict);
    }

    // ---- 9: it ends ---------------------------------------------------------------------------

    fn invariant_9_the_run_ends_once_all_is_calm(&self) -> Verdict {
        let Some(calm) = self.calm_since else { return Ok(()) };
        let over = self.now.saturating_sub(self.ended_at.unwrap_or(calm));
        match self.ended_at {
            None => {
                let status = self.coordinator.life.as_ref().map(|life| {
                    let status = life.core.status(self.core_now());
                    (status.phase.as_str(), status.generation, status.peers.len())
                });
                let idle = self.now.saturating_sub(self.last_step.max(calm));
                holds!(
                    9,
                    over <= self.bounds.liveness,
                    "the run has not ended {over:?} after all was calm, last step {idle:?} ago, core: {status:?}"
                );
            }
            Some(_) => {
                let bound = seconds(self.job.cluster.coordinator_timeout_s) + ms(90_000);
                let left: Vec<_> =
                    self.workers.iter().filter(|w| w.process.is_some()).map(|w| &w.name).collect();
                holds!(7, over <= bound, "the run ended {over:?} ago, but {left:?} are still there");
            }
        }
        Ok(())
    }

    /// Ends that faults may well lead to; any other is the protocol's fault.
    fn invariant_9_the_end_is_an_allowed_one(&self) -> Verdict {
        let Some(outcome) = &self.coordinator.outcome else {
            return Err(Violation {
                invariant: 9,
                what: "nothing happens any more, and the run has not ended".into(),
            });
        };
        let disturbed = !self.scenario.faults.is_empty();
        match &outcome.status {
            Status::Finished(_) => {}
            Status::Stopped => {
                holds!(9, self.ledger.stop_requested, "the run was stopped, though nobody asked for it")
            }
            Status::Failed { reason } => {
                // The run's result is not safe: its last checkpoint lost a part with a worker, or the disk.
                let unsafe_result = reason.contains("could not be written");
                // A run of bad luck that no team could train through.
                let barren = reason.contains("ended without a step");
                // Nobody could join in time, as links or processes were down.
                let nobody = reason.contains("cluster.start_timeout_s");
                let excused = disturbed && (unsafe_result || barren || nobody);
                holds!(9, excused, "the run failed: {reason}");
            }
        }
        Ok(())
    }

    // ---- where they are asked ----------------------------------------------------------------

    pub fn after_happening(&mut self) {
        if let Some(life) = &self.coordinator.life {
            let status = life.core.status(self.core_now()).phase.as_str();
            let generation =
                self.coordinator.disk.as_ref().map(|disk| disk.fences.generation).unwrap_or_default();
            if (self.ledger.phase.0, self.ledger.phase.1) != (status, generation) {
                self.ledger.phase = (status, generation, self.now);
            }
        }
        let verdict = self
            .invariant_7_calls_of_the_exchange_are_bounded()
            .and_then(|()| self.invariant_7_the_core_has_a_deadline())
            .and_then(|()| self.invariant_7_the_core_moves_on_when_all_is_calm())
            .and_then(|()| self.invariant_9_the_run_ends_once_all_is_calm());
        self.check(verdict);
    }

    pub fn check_spins(&mut self, spins: u32) {
        self.check(Self::invariant_7_timers_do_not_spin(spins));
    }

    pub fn life_begins(&mut self, state: &RunState, resumed: Option<&ResumePoint>) {
        let verdict = match resumed {
            None if !self.ledger.committed.is_empty() => {
                Err(Violation { invariant: 5, what: "there is no checkpoint to resume from".into() })
            }
            // `state.json` may not have heard of the newest yet.
            _ => self.invariant_5_a_commit_endangers_none_before(
                resumed.and_then(|point| point.progress.saved_best.as_ref()).map(|best| &best.checkpoint),
            ),
        };
        self.check(verdict);
        self.ledger.joined.clear();
        let listens = self.coordinator.lives > 1 && !state.roster.is_empty();
        self.ledger.restart = listens.then(|| Restart {
            listens_until: self.now + seconds(self.job.cluster.heartbeat_timeout_s),
            roster: state.roster.clone(),
            fences: state.fences,
            returned: BTreeMap::new(),
        });
    }

    /// By the coordinator's clock, which jumped, its time to listen may be over.
    pub fn listening_cut_short(&mut self) {
        if let Some(restart) = &mut self.ledger.restart {
            restart.listens_until = self.now;
        }
    }

    pub fn before_message(&mut self, session: Session, worker: usize, message: &Fenced<FromWorker>) {
        if let FromWorker::Join(_) = &message.body {
            self.ledger.joined.insert(session);
            let name = self.workers[worker].name.clone();
            let now = self.now;
            let fences = self.ledger.restart.as_ref().map(|restart| restart.fences);
            let held = fences.and_then(|fences| self.eligible(worker, fences)).map(|label| label.applied.0);
            if let (Some(held), Some(restart)) = (held, &mut self.ledger.restart)
                && now < restart.listens_until
                && restart.roster.contains(&name)
            {
                restart.returned.insert(name, held);
            }
        }
    }

    pub fn before_actions(&mut self, actions: &VecDeque<Action>) {
        let forms: Vec<(Generation, &Form)> = actions
            .iter()
            .filter_map(|action| match action {
                Action::Send { message: Fenced { generation, body: ToWorker::Form(form), .. }, .. } => {
                    Some((*generation, form))
                }
                _ => None,
            })
            .collect();
        let Some(&(generation, form)) = forms.first() else { return };
        let team = addresses(&forms);
        // Removed just now; one that is let go would still be there to hand on what it holds.
        let given_up: Vec<Session> = actions
            .iter()
            .filter_map(|action| match action {
                Action::Send { session, message: Fenced { body: ToWorker::Abort { .. }, .. } } => {
                    Some(*session)
                }
                _ => None,
            })
            .collect();
        self.coverage.count("generations begun");
        self.coverage.count(match form.start {
            Start::Held => "starts from a worker's state",
            Start::Checkpoint(_) => "starts from a checkpoint",
            Start::Seeded => "starts from the seed",
        });
        let donor = team.get(form.donor.0 as usize).and_then(|address| self.living_at(address));
        let donated = match &form.start {
            Start::Held => {
                donor.and_then(|donor| self.thread(donor).map(|thread| thread.replica.label.applied.0))
            }
            Start::Checkpoint(id) => self.store.committed.get(id).map(|c| c.commit.position.applied.0),
            Start::Seeded => Some(0),
        };
        let visible = match &form.start {
            Start::Checkpoint(id) => self.invariant_5_only_a_visible_checkpoint_is_told_of(id),
            Start::Held | Start::Seeded => Ok(()),
        };
        let verdict = self
            .invariant_2_applied_never_falls_behind_a_live_holder(form, donor, &given_up)
            .and_then(|()| {
                self.invariant_6_a_restart_rolls_back_nothing_that_came_back(
                    self.ledger.newest.next(),
                    donated,
                    &given_up,
                )
            })
            .and(visible)
            .and_then(|()| self.invariant_8_members_belong_to_the_run(&team));
        let given_by = donor.and_then(|donor| self.thread(donor).map(|thread| thread.replica.label.lineage));
        let anew = match form.start {
            Start::Held => given_by.is_some_and(|lineage| self.ledger.anew.get(&lineage) == Some(&true)),
            Start::Checkpoint(_) | Start::Seeded => true,
        };
        self.ledger.forming_anew = anew;
        self.ledger.start = Some(form.start.clone());
        let members = team.iter().filter_map(|address| Some(self.found_at(address)?.0)).collect();
        self.ledger.teams.insert(generation, members);
        self.check(verdict);
        self.ledger.restart = None;
    }

    pub fn before_action(&mut self, action: &Action) {
        let verdict = match action {
            Action::Send { session, message } => {
                let verdict = self.invariant_1_one_generation_is_live(*session, message, self.ledger.forming);
                match &message.body {
                    ToWorker::Form(_) => {
                        self.ledger.anew.insert(message.generation, self.ledger.forming_anew);
                        self.ledger.newest = message.generation;
                        self.ledger.forming = true;
                    }
                    ToWorker::Train(_) if self.ledger.trained != message.generation => {
                        let generation = message.generation;
                        self.ledger.trained = generation;
                        let one = self.invariant_4_members_hold_one_state_after_a_sync(generation);
                        return self.check(verdict.and(one));
                    }
                    _ => self.ledger.forming = false,
                }
                verdict
            }
            Action::Persist(state) => {
                self.ledger.forming = false;
                let disk = self.coordinator.disk.as_ref().map(|disk| disk.fences).unwrap_or_default();
                let verdict = invariant_1_fences_never_fall(disk, state.fences);
                match state.fences.lineage {
                    lineage if lineage != disk.lineage => verdict.and(self.lineage_begins(lineage)),
                    _ => verdict,
                }
            }
            Action::CommitCheckpoint(commit) => {
                let judged = commit.progress.early_stopping.judged;
                self.ledger.judged_before.insert(commit.checkpoint.clone(), judged);
                Ok(())
            }
            _ => Ok(()),
        };
        self.check(verdict);
    }

    /// From here on its members' states are the ones to go on from.
    fn lineage_begins(&mut self, lineage: Generation) -> Verdict {
        let members = self.workers.iter().filter_map(|worker| worker.process.as_ref());
        let mut replicas = members.map(|process| &process.thread.replica);
        let Some(replica) = replicas.find(|replica| replica.label.lineage == lineage) else { return Ok(()) };
        let history = replica.steps.clone();
        let verdict = self.invariant_2_histories_do_not_fork(lineage, &history);
        self.ledger.history = history;
        self.ledger.anew.clear();
        verdict
    }

    pub fn event_told(&mut self, event: &RunEvent) {
        self.coverage.count(match event {
            RunEvent::GenerationFormed { .. } => "generations formed",
            RunEvent::GenerationContinued { .. } => "generations continued by a new coordinator",
            RunEvent::GenerationAborted { cause, .. } => match cause.cause() {
                "member_lost" => "aborts: member lost",
                "exchange_broken" => "aborts: exchange broken",
                "exchange_stuck" => "aborts: exchange stuck",
                "states_differ" => "aborts: states differ",
                _ => "aborts: other",
            },
            RunEvent::WorkerLeft { departure, .. } => match departure.cause() {
                "disconnected" => "left: disconnected",
                "silent" => "left: silent",
                "stuck" => "left: stuck",
                "unreachable" => "left: unreachable",
                "unresponsive" => "left: unresponsive",
                "replaced" => "left: replaced",
                "drained" => "left: drained",
                _ => "left: other",
            },
            RunEvent::WorkerReturned { .. } => "workers that returned to their place",
            RunEvent::StepsLost { .. } => "steps lost with their only holder",
            RunEvent::CheckpointCommitted { .. } => "checkpoints committed",
            RunEvent::CheckpointFailed { .. } => "checkpoints failed",
            RunEvent::Validated { .. } => "epochs validated",
            RunEvent::EarlyStopped { .. } => "early stops",
            RunEvent::WorkerRefused { .. } => "workers refused",
            RunEvent::RunFailed { .. } => "runs failed",
            RunEvent::RunFinished { .. } => "runs finished or stopped",
            _ => "other events",
        });
        let verdict = match event {
            RunEvent::GenerationFormed { applied, .. } => {
                // What was lost with its last holder happens again.
                self.ledger.judged.retain(|_, step| *step <= *applied);
                self.ledger.announced.retain(|_, step| *step <= *applied);
                if let Some(Start::Checkpoint(id)) = &self.ledger.start {
                    let judged = self.ledger.judged_before.get(id).copied().unwrap_or_default();
                    self.ledger.judged.retain(|epoch, _| *epoch <= judged);
                }
                Ok(())
            }
            RunEvent::GenerationContinued { generation, .. } => {
                let applied = self.workers.iter().filter_map(|worker| worker.process.as_ref());
                let applied = applied.map(|process| process.thread.replica.label);
                let applied = applied.filter(|label| label.lineage == *generation).map(|l| l.applied.0).max();
                let verdict =
                    self.invariant_6_a_restart_rolls_back_nothing_that_came_back(*generation, applied, &[]);
                self.ledger.restart = None;
                verdict
            }
            RunEvent::EpochFinished { epoch, step, .. } => {
                let again = self.ledger.announced.insert(*epoch, *step);
                let holders = self.workers.iter().filter_map(|worker| worker.process.as_ref());
                let holder = holders.map(|process| process.thread.replica.clone()).find(|replica| {
                    replica.label.applied == *step
                        && replica.label.epoch == *epoch
                        && replica.label.lineage == self.ledger.trained
                });
                match (again, holder) {
                    (Some(before), _) => Err(Violation {
                        invariant: 3,
                        what: format!("epoch {epoch} is finished at step {step} and was at {before}"),
                    }),
                    (None, Some(replica)) => self.invariant_3_epochs_are_whole(&replica, *epoch),
                    (None, None) => Ok(()),
                }
            }
            RunEvent::Validated { epoch, step, scores } => {
                self.invariant_3_validation_counts_each_sample_once(*epoch, *step, scores.samples)
            }
            RunEvent::CheckpointCommitted { checkpoint, .. } => {
                // A later one may have pruned it between its commit and now.
                match self.ledger.committed.contains(checkpoint) {
                    true => Ok(()),
                    false => self.invariant_5_only_a_visible_checkpoint_is_told_of(checkpoint),
                }
            }
            RunEvent::WorkerLeft { worker, departure, .. } => {
                self.invariant_7_nobody_is_accused_without_cause(worker, departure)
            }
            RunEvent::RunFinished { outcome } => match outcome.status {
                Status::Finished(stopped) => self
                    .invariant_3_faults_do_not_change_the_verdict(outcome.epochs, stopped)
                    .and_then(|()| self.result_is_whole(outcome.epochs)),
                Status::Stopped | Status::Failed { .. } => Ok(()),
            },
            _ => Ok(()),
        };
        self.check(verdict);
    }

    fn result_is_whole(&self, epochs: Epoch) -> Verdict {
        let Some(newest) = self.store.newest() else {
            return Err(Violation { invariant: 5, what: "the run finished without a checkpoint".into() });
        };
        let judged = newest.commit.progress.early_stopping.judged;
        holds!(
            5,
            judged == epochs,
            "the run finished after epoch {epochs}, its newest checkpoint is of {judged}"
        );
        self.invariant_3_epochs_are_whole(&newest.state, epochs)
    }

    pub fn check_applied(&mut self, worker: usize) {
        let Some(process) = &self.workers[worker].process else { return };
        let replica = &process.thread.replica;
        let verdict = self
            .invariant_2_no_step_is_applied_twice(replica)
            .and_then(|()| self.invariant_3_a_step_uses_fresh_samples(replica));
        self.check(verdict);
    }

    /// A member was ordered to train from where it does not stand.
    pub fn check_order(&mut self, worker: usize, train: Train, cursor: u64) {
        let name = &self.workers[worker].name;
        let what = format!("{name} stands at sample {cursor}, and is ordered to train {train:?}");
        self.check(Err(Violation { invariant: 3, what }));
    }

    pub fn checkpoint_visible(&mut self, commit: &Commit, parts: &[(PartHeader, Replica)]) {
        self.ledger.committed.insert(commit.checkpoint.clone());
        self.coverage.count("checkpoints visible");
        let verdict = self
            .invariant_5_a_visible_checkpoint_is_complete(commit, parts)
            .and_then(|()| self.invariant_4_a_checkpoint_is_of_one_state(commit, parts));
        self.check(verdict);
    }

    pub fn store_pruned(&mut self, commit: &Commit) {
        let best = commit.progress.saved_best.as_ref().map(|best| &best.checkpoint);
        let verdict = self.invariant_5_a_commit_endangers_none_before(best);
        self.check(verdict);
    }

    pub fn at_the_end(&mut self) {
        let verdict = self.invariant_9_the_end_is_an_allowed_one();
        self.check(verdict);
    }

    // ---- the truth ----------------------------------------------------------------------------

    fn index_of(&self, name: &WorkerId) -> Option<usize> {
        self.workers.iter().position(|worker| worker.name == *name)
    }

    /// The worker at an address, and the process of it that said so.
    fn found_at(&self, address: &str) -> Option<(usize, u64)> {
        let (name, incarnation) = address.rsplit_once(':')?;
        Some((self.index_of(&name.into())?, incarnation.parse().ok()?))
    }

    /// The same, if that process still lives.
    fn living_at(&self, address: &str) -> Option<usize> {
        let (worker, incarnation) = self.found_at(address)?;
        (self.workers[worker].process.as_ref()?.incarnation == incarnation).then_some(worker)
    }

    /// The process lives and runs, and the coordinator has heard it join on a stream that is up.
    fn is_reachable(&self, worker: usize, given_up: &[Session]) -> bool {
        let host = &self.workers[worker];
        let connection = self.connection_of(worker).and_then(|id| self.connections.get(&id));
        let Some(connection) = connection.filter(|_| host.runs()) else { return false };
        let Some(life) =
            self.life(connection.life).filter(|_| connection.at_coordinator && connection.at_worker)
        else {
            return false;
        };
        let session = connection.session.filter(|session| life.sessions.contains_key(session));
        host.genuine
            && session
                .is_some_and(|session| self.ledger.joined.contains(&session) && !given_up.contains(&session))
    }

    fn eligible(&self, worker: usize, fences: Fences) -> Option<ReplicaLabel> {
        let thread = &self.workers[worker].process.as_ref()?.thread;
        thread.replica.held().filter(|label| (fences.lineage..=fences.generation).contains(&label.lineage))
    }
}

/// Either side ignores what is of another term or generation.
fn invariant_1_a_stale_message_changes_nothing(unmoved: bool, what: &str) -> Verdict {
    holds!(1, unmoved, "{what}");
    Ok(())
}

fn invariant_1_fences_never_fall(disk: Fences, next: Fences) -> Verdict {
    let grows = next.generation >= disk.generation && next.lineage >= disk.lineage && next.term >= disk.term;
    holds!(1, grows, "the fences fall from {disk:?} to {next:?}");
    Ok(())
}

fn invariant_8_a_stranger_gets_no_orders(message: &Fenced<ToWorker>) -> Verdict {
    let harmless =
        matches!(message.body, ToWorker::Refused { .. } | ToWorker::Finish(_) | ToWorker::Abort { .. });
    holds!(8, harmless, "a stranger is sent {:?}", message.body);
    Ok(())
}

fn invariant_8_a_stranger_changes_nothing(turned_down: bool, what: &str) -> Verdict {
    holds!(8, turned_down, "{what}");
    Ok(())
}

/// Where the members of a new team listen, in rank order: each is told of the next one.
fn addresses(forms: &[(Generation, &Form)]) -> Vec<String> {
    let world = forms.len();
    let mut addresses = vec![String::new(); world];
    for (_, form) in forms {
        addresses[(form.rank.0 as usize + 1) % world].clone_from(&form.successor);
    }
    addresses
}
