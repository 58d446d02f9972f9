//! A coordinator's start, and what of its former life it takes up: the decisions since the newest
//! checkpoint, and the workers that outlived it.

use std::collections::{BTreeMap, BTreeSet};

use musher_proto::{
    ids::{Session, WorkerId},
    message::AtWork,
};

use super::{
    Core, Durable, Gathering, Origin, Pace, Peer, Phase, SaveRequest, Watch,
    effects::{Action, OwedSave, RunEvent, RunProgress, RunState, Status, Time},
    peers::Peers,
    roster::Team,
    seconds,
};

impl Core {
    /// The core and its first actions.
    pub fn start(origin: Origin, now: Time) -> (Self, Vec<Action>) {
        let Origin { job, run, state, resumed, entropy, listen } = origin;
        let listens = listen && !state.roster.is_empty();
        let until = now + seconds(job.cluster.start_timeout_s);
        // A team that was scaled since the job was written comes back as large as it was.
        let former = if listens { state.roster.len() as u32 } else { u32::MAX };
        let wanted = job.cluster.workers.min(former.max(job.cluster.min_workers));
        let gathering = Gathering {
            until,
            wanted,
            give_up: Some(until),
            since: now,
            listening: listens.then(|| now + seconds(job.cluster.heartbeat_timeout_s)),
            ..Gathering::default()
        };
        let durable = resumed.as_ref().map(|point| Durable {
            checkpoint: point.checkpoint.clone(),
            cursor: point.position.cursor,
            progress: point.progress.clone(),
        });
        let ended = durable.as_ref().and_then(|durable| durable.progress.end(job.train.epochs));
        let progress = progress_at_start(&state, durable.as_ref(), ended.is_some());
        let mut core = Self {
            run_id: state.id,
            fences: state.fences,
            peers: Peers::default(),
            watch: Watch::default(),
            data: None,
            started_on: state
                .dataset_digest
                .or_else(|| resumed.as_ref().map(|point| point.dataset_digest.clone())),
            phase: Phase::Gathering(gathering),
            roster: state.roster,
            state_bytes: state.state_bytes,
            bench: BTreeMap::new(),
            removed: None,
            last_trouble: None,
            asked: None,
            forgave: None,
            durable,
            checkpoint: None,
            owed: state.owed.map(|owed| save_again(owed, &progress, job.train.epochs)),
            stop_requested: listens && state.stop_requested,
            barren: 0,
            last_applied: resumed.as_ref().map(|point| point.position.applied).unwrap_or_default(),
            pace: Pace::default(),
            last_scores: state.last_scores,
            data_warnings: BTreeSet::new(),
            unsavable: None,
            job_json: serde_json::to_string(&job).expect("a job is plain data"),
            job,
            run,
            entropy,
            progress,
        };
        let mut actions = Vec::new();
        core.persist(&mut actions);
        actions.push(Action::Emit(RunEvent::RunStarted {
            term: core.fences.term,
            resumed_from: resumed.map(|point| point.checkpoint),
        }));
        if listens {
            actions.push(Action::Emit(RunEvent::CoordinatorRestarted { term: core.fences.term }));
        }
        match ended {
            Some(stopped) => {
                core.finish(Status::Finished(stopped), now, &mut actions);
                if let Phase::Lingering { expecting, .. } = &mut core.phase {
                    *expecting = listens;
                }
                core.time_passed(now, &mut actions);
            }
            None => {
                let wanted = wanted.max(core.job.cluster.min_workers);
                actions.push(Action::Emit(RunEvent::WaitingForWorkers { joined: 0, wanted }));
            }
        }
        (core, actions)
    }

    /// Puts on disk what a next life of the coordinator goes on from.
    pub(super) fn persist(&self, out: &mut Vec<Action>) {
        self.persist_owing(self.owed.as_ref(), out);
    }

    /// [`Core::persist`] with a checkpoint that was decided on just now.
    pub(super) fn persist_owing(&self, owed: Option<&SaveRequest>, out: &mut Vec<Action>) {
        let on_its_way = self
            .checkpoint
            .as_ref()
            .map(|open| OwedSave { applied: open.commit.position.applied, is_best: open.commit.is_best });
        let owed = owed.map(|save| OwedSave { applied: save.applied, is_best: save.is_best });
        let data = self.data.as_ref().map(|data| data.digest.clone());
        out.push(Action::Persist(Box::new(RunState {
            id: self.run_id.clone(),
            fences: self.fences,
            progress: self.progress.clone(),
            last_scores: self.last_scores,
            owed: owed.or(on_its_way),
            roster: self.roster.clone(),
            state_bytes: self.state_bytes,
            stop_requested: self.stop_requested,
            dataset_digest: self.started_on.clone().or(data),
        })));
    }

    /// Whether it is too early to form anything: of the former team, some may still be on their way back.
    ///
    /// A team is never formed from those that were merely the first to come back: the others may hold
    /// steps that these do not.
    pub(super) fn still_listens(&mut self, now: Time, out: &mut Vec<Action>) -> bool {
        let Phase::Gathering(Gathering { listening: Some(until), .. }) = self.phase else { return false };
        if self.peers.count().joined < self.roster.len() as u32 && now < until {
            return true;
        }
        let joined = |worker: &WorkerId| {
            let joined = |(session, peer): (Session, &Peer)| Some((session, peer.join.as_ref()?.at_work));
            self.peers.of_worker(worker).find_map(joined)
        };
        let back: Option<Vec<_>> = self.roster.iter().map(joined).collect();
        match back {
            None if now < until => return true,
            Some(team) if self.continues(&team, now, out) => return true,
            _ => self.stops_listening(back.is_some(), now, out),
        }
        false
    }

    /// The whole team is back, all of it at the same segment of the newest generation: it goes on, and has
    /// not noticed anything.
    fn continues(&mut self, back: &[(Session, Option<AtWork>)], now: Time, out: &mut Vec<Action>) -> bool {
        let Some((_, Some(work))) = back.first() else { return false };
        let generation = self.fences.generation;
        let at_one = back.iter().all(|(_, other)| other.as_ref() == Some(work));
        if !at_one || work.generation != generation || self.fences.lineage != generation {
            return false;
        }
        let team = Team::new(generation, back.iter().map(|(session, _)| *session).collect());
        self.owed = None; // its moment is over
        for (session, _) in back {
            self.is_taken_up(*session);
        }
        let world_size = team.world();
        self.enter_training(team, work.train, false, now);
        self.persist(out);
        out.push(Action::Emit(RunEvent::GenerationContinued { generation, world_size }));
        if self.wants_pause() {
            self.pause_team(out);
        }
        for (session, _) in back {
            if let Some(report) = self.peers.get_mut(session).and_then(|mut peer| peer.finished.take()) {
                self.segment_finished(*session, report, now, out);
            }
        }
        true
    }

    fn stops_listening(&mut self, all_back: bool, now: Time, out: &mut Vec<Action>) {
        let holds = self.newest_held().is_some();
        let working = self.peers.iter().filter_map(|(&session, peer)| Some((session, peer.at_work()?)));
        let working: Vec<(Session, AtWork)> = working.collect();
        if let Phase::Gathering(gathering) = &mut self.phase {
            self.watch.all_changed();
            gathering.listening = None;
            gathering.since = now;
            if all_back || holds || !working.is_empty() {
                // As after an abort: who comes back later is taken in between two steps.
                gathering.wanted = self.job.cluster.min_workers;
            }
        }
        for (session, work) in working {
            self.turn_away(session, work, now, out);
        }
    }
}

/// The decisions of the life before. Where a checkpoint was committed at the last moment, it alone knows
/// that the best weights are durable.
fn progress_at_start(state: &RunState, durable: Option<&Durable>, ended: bool) -> RunProgress {
    let Some(durable) = durable else { return state.progress.clone() };
    if ended || state.roster.is_empty() {
        return durable.progress.clone(); // nothing came after it, or `state.json` is lost
    }
    let newest = [&state.progress, &durable.progress]
        .into_iter()
        .filter_map(|progress| progress.saved_best.as_ref())
        .max_by_key(|best| best.epoch);
    RunProgress { saved_best: newest.cloned(), ..state.progress.clone() }
}

/// A checkpoint that a restart interrupted is taken again when a team stands at its step.
fn save_again(owed: OwedSave, progress: &RunProgress, epoch_limit: u32) -> SaveRequest {
    let then = progress.end(epoch_limit).map(Status::Finished);
    SaveRequest { applied: owed.applied, is_best: owed.is_best, is_last: then.is_some(), then, hold: false }
}
