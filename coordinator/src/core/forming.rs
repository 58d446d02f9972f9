//! From connected workers to a generation that holds one state: gathering, forming, aborting.

use std::collections::BTreeSet;

use musher_proto::{
    ids::{Generation, Rank, Session},
    message::{Form, Interrupted, Pretrained, ReplicaLabel, Start, Synced, ToWorker},
};
use sha2::{Digest, Sha256};

use super::{
    Core, Gathering, Phase, aborted, benching,
    effects::{Action, Fences, RunEvent, Status, Time},
    reasons::AbortCause,
    roster::{Replies, Team},
    seconds,
};

/// A team that fails so often in a row without a step between is not going to succeed.
const BARREN_LIMIT: u32 = 5;

impl Core {
    /// Forms the next generation when enough workers are there, or when waiting longer is pointless.
    pub(super) fn form_if_ready(&mut self, now: Time, out: &mut Vec<Action>) {
        if self.still_listens(now, out) {
            return;
        }
        let Phase::Gathering(gathering) = &self.phase else { return };
        if !gathering.awaiting.is_empty() || self.awaits_commit() {
            return;
        }
        self.call_holders_back();
        let Phase::Gathering(gathering) = &self.phase else { return };
        let due = now >= gathering.until;
        let pooled = gathering.pooled;
        if self.stop_requested {
            return match self.newest_held() {
                Some(held) if !self.is_safe(held) => self.form(pooled, now, out),
                _ => self.finish(Status::Stopped, now, out),
            };
        }
        let joined = self.staying();
        let cluster = &self.job.cluster;
        let unsaved = self.newest_held().is_some_and(|held| !self.is_safe(held));
        if joined < cluster.min_workers && unsaved {
            return self.form(pooled, now, out); // to save what they hold; then it waits
        }
        let complete = gathering.wanted > 0 && joined >= gathering.wanted;
        if complete || (due && joined >= cluster.min_workers) {
            self.form(pooled, now, out);
        } else if gathering.give_up.is_some_and(|at| now >= at) {
            let wanted = gathering.wanted.max(cluster.min_workers);
            let reason = format!(
                "{joined} of {wanted} workers joined within {} s (cluster.start_timeout_s): look at the workers' logs, \
                 or ask for fewer with cluster.workers",
                cluster.start_timeout_s
            );
            self.fail(reason, now, out);
        }
    }

    /// Who alone holds the newest state is needed, whatever its links are like.
    fn call_holders_back(&mut self) {
        if self.peers.count().benched == 0 {
            return;
        }
        let known = self.newest_held().map(|held| held.applied);
        let is_newer = |held: ReplicaLabel| Some(held.applied) > known && !self.is_safe(held);
        let benched = self.peers.iter().filter(|(_, peer)| peer.benched.is_some());
        let holders: Vec<Session> = benched
            .filter(|(_, peer)| self.eligible(peer.held()).is_some_and(is_newer))
            .map(|(&session, _)| session)
            .collect();
        for session in holders {
            if let Some(mut peer) = self.peers.get_mut(&session) {
                peer.benched = None;
            }
        }
    }

    /// When the wait's end changes anything; below `min_workers` a run that once trained waits on.
    pub(super) fn gathering_deadline(&self, gathering: &Gathering) -> Option<Time> {
        if !gathering.awaiting.is_empty() {
            return None; // their budgets bound the wait
        }
        if gathering.listening.is_some() {
            return gathering.listening;
        }
        match self.staying() >= self.job.cluster.min_workers {
            _ if self.awaits_commit() => None,
            true => Some(gathering.until),
            false => gathering.give_up,
        }
    }

    /// A checkpoint that is being committed is about to be the newest: a team that nobody in holds the
    /// lineage's state starts from that one, not from the one before.
    fn awaits_commit(&self) -> bool {
        self.newest_held().is_none() && self.checkpoint.as_ref().is_some_and(|open| open.committing)
    }

    /// The most advanced state that a worker holds and may hand on.
    ///
    /// Eligible states are all of one history, so steps count before lineage: a generation that only
    /// synced, from a checkpoint, has a newer name for an older state.
    pub(super) fn newest_held(&self) -> Option<ReplicaLabel> {
        let held = self.peers.count().held();
        held.filter_map(|held| self.eligible(Some(held))).max_by_key(|held| (held.applied, held.lineage))
    }

    /// `pooled`: equal labels mean equal states, so nothing needs to be sent to those who hold the donor's.
    fn form(&mut self, pooled: bool, now: Time, out: &mut Vec<Action>) {
        let generation = self.newest_generation().next();
        let mut joined: Vec<(Session, Option<ReplicaLabel>)> = self
            .peers
            .iter()
            .filter(|(_, peer)| peer.is_ready())
            .map(|(&session, peer)| (session, self.eligible(peer.held())))
            .collect();
        // By name, so that a team of the same workers has the same ranks whoever was first.
        joined.sort_by_key(|(session, _)| self.peers.get(session).map(|peer| peer.worker().clone()));

        let best = self.newest_held();
        let donor = joined.iter().position(|(_, held)| best.is_some() && *held == best).unwrap_or(0);
        let start = match (best, &self.durable) {
            (Some(_), _) => Start::Held,
            (None, Some(durable)) => Start::Checkpoint(durable.checkpoint.clone()),
            (None, None) => Start::Seeded,
        };
        let broadcast = !pooled || best.is_none() || joined.iter().any(|(_, held)| *held != best);

        let team = Team::new(generation, joined.iter().map(|(session, _)| *session).collect());
        let members = || team.members().filter_map(|(_, session)| self.peers.get(&session));
        let addresses: Vec<String> =
            members().filter_map(|peer| Some(peer.join.as_ref()?.ring_address.clone())).collect();
        self.fences.generation = generation;
        self.roster = members().map(|peer| peer.worker().clone()).collect();
        self.persist(out);
        let secret = self.secret(generation);
        self.enter(Phase::Forming {
            team: team.clone(),
            donor: Rank(donor as u32),
            anew: best.is_none(),
            connecting: Some(Replies::expected_from(&team)),
            synced: Replies::expected_from(&team),
            since: now,
        });
        let successors = addresses.into_iter().cycle().skip(1);
        for ((rank, session), successor) in team.members().zip(successors) {
            let held = self.peers.get(&session).and_then(|peer| self.eligible(peer.held()));
            let form = Form {
                rank,
                world: team.world(),
                successor,
                secret,
                donor: Rank(donor as u32),
                broadcast,
                holds_it: pooled && best.is_some() && held == best,
                start: start.clone(),
            };
            self.send(session, ToWorker::Form(form), out);
        }
    }

    /// Only a state of the newest generation of this run that began to train, or of one that completed its
    /// sync on top of that, may be handed on; any other counts as a newcomer's, however many steps it has.
    fn eligible(&self, held: Option<ReplicaLabel>) -> Option<ReplicaLabel> {
        let Fences { lineage, generation, .. } = self.fences;
        held.filter(|label| (lineage..=generation).contains(&label.lineage) && label.lineage != Generation(0))
    }

    fn newest_generation(&self) -> Generation {
        let reported = self.peers.values().filter_map(|peer| peer.held()).map(|held| held.lineage).max();
        self.fences.generation.max(reported.unwrap_or_default())
    }

    fn secret(&self, generation: Generation) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(self.entropy);
        hash.update(self.fences.term.0.to_le_bytes());
        hash.update(generation.0.to_le_bytes());
        hash.finalize().into()
    }

    /// A member is connected to its neighbours, and is at the donor's state or beyond.
    pub(super) fn connected(&mut self, session: Session, now: Time, out: &mut Vec<Action>) {
        let Phase::Forming { team, connecting, since, .. } = &mut self.phase else { return };
        let (Some(replies), Some(rank)) = (connecting.as_mut(), team.rank_of(session)) else { return };
        replies.take(rank, (), now);
        if replies.complete().is_some() {
            *connecting = None;
            let (generation, elapsed) = (team.generation, now.saturating_sub(*since));
            out.push(Action::Emit(RunEvent::TeamConnected { generation, elapsed }));
        }
    }

    pub(super) fn synced(&mut self, session: Session, synced: Synced, now: Time, out: &mut Vec<Action>) {
        self.connected(session, now, out);
        let Phase::Forming { team, donor, anew, synced: replies, since, .. } = &mut self.phase else {
            return;
        };
        let Some(rank) = team.rank_of(session) else { return };
        replies.take(rank, synced, now);
        let Some(all) = replies.complete() else { return };
        let first = all[0].clone();
        if let Some(odd) = all
            .iter()
            .position(|s| (s.state_digest, s.state_bytes) != (first.state_digest, first.state_bytes))
        {
            let rank = Rank(odd as u32);
            let worker = team.session_of(rank).and_then(|session| self.peers.get(&session));
            let worker = worker.map_or_else(|| "unknown".into(), |peer| peer.worker().clone());
            return self.abort(AbortCause::StatesDiffer { worker, rank }, now, out);
        }
        let pretrained = all.iter().find_map(|synced| synced.pretrained.clone());
        let (team, donor, anew, since) = (team.clone(), *donor, *anew, *since);
        let generation = team.generation;
        let donor = team.session_of(donor).and_then(|session| self.peers.get(&session));
        out.push(Action::Emit(RunEvent::GenerationFormed {
            generation,
            world_size: team.world(),
            donor: donor.map(|peer| peer.worker().clone()).unwrap_or_else(|| "none".into()),
            applied: first.held.applied,
            elapsed: now.saturating_sub(since),
        }));
        if let Some(Pretrained { file, sha256, ignored }) = pretrained {
            out.push(Action::Emit(RunEvent::PretrainedLoaded { generation, file, sha256, ignored }));
        }
        if first.held.applied < self.last_applied {
            let (reported, applied) = (self.last_applied, first.held.applied);
            out.push(Action::Emit(RunEvent::StepsLost { generation, reported, applied }));
        }
        self.state_bytes = first.state_bytes;
        self.fences.lineage = generation;
        if anew || self.is_behind(first.held) {
            self.roll_back(first.held);
        }
        self.persist(out);
        self.resume_work(team, first, now, out);
    }

    /// The generation can't go on. Survivors drop the step in flight and say what they hold.
    pub(super) fn abort(&mut self, cause: AbortCause, now: Time, out: &mut Vec<Action>) {
        let Some(team) = self.team().cloned() else { return };
        let reason = cause.to_string();
        let accounted_for = match cause {
            AbortCause::ExchangeBroken { .. } | AbortCause::ExchangeStuck(_) => false,
            AbortCause::MemberLost { .. }
            | AbortCause::StatesDiffer { .. }
            | AbortCause::ValidationFailed { .. } => true,
        };
        // A member that was at something else accounts for it, too: it never came.
        let late = team
            .members()
            .filter_map(|(_, session)| self.peers.get(&session))
            .any(super::hangs::is_elsewhere);
        self.last_trouble = Some(aborted(team.generation, &cause));
        out.push(Action::Emit(RunEvent::GenerationAborted { generation: team.generation, cause }));
        let awaiting: BTreeSet<Session> =
            team.members().map(|(_, session)| session).filter(|s| self.peers.contains_key(s)).collect();
        for &session in &awaiting {
            self.send(session, ToWorker::Abort { reason: reason.clone() }, out);
        }
        let nobody_is_left = awaiting.is_empty();
        self.enter(Phase::Gathering(Gathering {
            awaiting,
            until: now + seconds(self.job.cluster.regroup_window_s),
            // The survivors go on at once; who comes back is taken in between two steps.
            wanted: self.job.cluster.min_workers,
            since: now,
            inquest: (!accounted_for && !late).then(Vec::new),
            former: Some(team),
            ..Gathering::default()
        }));
        if nobody_is_left {
            self.tell_of_waiting(out);
        }
        self.suspects_are_lost(now, out);
        self.barren += 1;
        if self.barren >= BARREN_LIMIT {
            self.fail(
                format!(
                    "{BARREN_LIMIT} generations in a row ended without a step, the last because {reason}"
                ),
                now,
                out,
            );
        }
    }

    pub(super) fn interrupted(
        &mut self,
        session: Session,
        report: Interrupted,
        now: Time,
        out: &mut Vec<Action>,
    ) {
        let Some(mut peer) = self.peers.get_mut(&session) else { return };
        let worker = peer.worker().clone();
        let returns = peer.at_work().is_some();
        if let Some(join) = &mut peer.join {
            join.held = report.held;
            join.at_work = None;
        }
        drop(peer);
        if let Some(held) = self.eligible(report.held) {
            self.advanced_to(held.applied);
        }
        let rank = self.team().and_then(|team| team.rank_of(session));
        if rank.is_some() {
            self.suspects_are_lost(now, out); // which aborts the generation, too
        }
        if let Some(rank) = rank.filter(|_| self.team().is_some()) {
            let wait = report.waited.as_ref().map(benching::wait);
            let reason = report.reason.clone();
            self.abort(AbortCause::ExchangeBroken { worker, rank, reason, wait }, now, out);
        }
        if let Some(waited) = report.waited {
            self.hear(session, waited);
        }
        if returns {
            self.is_ready(session, now, out);
        }
        self.settled(session, now, out);
    }

    /// A former member has said what it holds, or is gone. After the last, others have a while to come.
    pub(super) fn settled(&mut self, session: Session, now: Time, out: &mut Vec<Action>) {
        let Phase::Gathering(gathering) = &mut self.phase else { return };
        if gathering.awaiting.remove(&session) && gathering.awaiting.is_empty() {
            gathering.until = now + seconds(self.job.cluster.regroup_window_s);
            if let (Some(testimony), Some(team)) = (gathering.inquest.take(), gathering.former.clone()) {
                self.put_out(&team, &testimony, now, out);
            }
            self.tell_of_waiting(out);
        }
    }

    /// If there are too few to go on, and they have nothing to save first.
    fn tell_of_waiting(&self, out: &mut Vec<Action>) {
        let (joined, wanted) = (self.staying(), self.job.cluster.min_workers);
        let saves_first = self.newest_held().is_some_and(|held| !self.is_safe(held));
        if joined < wanted && !saves_first {
            out.push(Action::Emit(RunEvent::WaitingForWorkers { joined, wanted }));
        }
    }
}
