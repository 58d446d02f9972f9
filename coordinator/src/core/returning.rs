//! A member whose stream broke while its training thread goes on: for a moment it is merely suspect, and
//! if it comes back in time with the order that the team is at, it takes its place again and nobody aborts.

use std::time::Duration;

use musher_proto::{
    ids::{Session, WorkerId},
    message::{AtWork, Fenced, Hello, ToWorker},
};

use super::{
    Core, Departure, Phase, Suspect,
    effects::{Action, RunEvent, Time},
    slowness::is_steady,
};

/// A broken stream is connected again in a fraction of it; a process that died is confirmed by its peers.
const LONGEST_GRACE: Duration = Duration::from_secs(1);

impl Core {
    /// A stream has ended. In mid-segment the worker may be well, and only its link be broken.
    pub(super) fn stream_ended(
        &mut self,
        session: Session,
        detail: String,
        now: Time,
        out: &mut Vec<Action>,
    ) {
        match self.trains(session) {
            true => self.suspect(session, detail, now),
            false => self.peer_lost(session, Departure::Disconnected { detail }, now, out),
        }
    }

    /// Former sessions of a worker that connects anew. A new process is proof that the old one is gone.
    pub(super) fn give_way(&mut self, hello: &Hello, now: Time, out: &mut Vec<Action>) {
        let former: Vec<(Session, bool)> = self
            .peers
            .of_worker(&hello.worker)
            .map(|(session, peer)| (session, peer.hello.incarnation == hello.incarnation))
            .collect();
        for (session, same_process) in former {
            out.push(Action::CloseSession { session });
            match same_process {
                true if self.trains(session) => {
                    self.suspect(session, "its connection broke".into(), now);
                }
                true => {
                    let detail = "it connected anew".into();
                    self.peer_lost(session, Departure::Disconnected { detail }, now, out);
                }
                false => self.peer_lost(session, Departure::Replaced, now, out),
            }
        }
    }

    fn trains(&self, session: Session) -> bool {
        matches!(&self.phase, Phase::Training { team, .. } if team.rank_of(session).is_some())
    }

    fn suspect(&mut self, session: Session, detail: String, now: Time) {
        let grace = LONGEST_GRACE.min(self.heartbeat_timeout() / 4);
        if let Some(mut peer) = self.peers.get_mut(&session) {
            peer.suspect.get_or_insert(Suspect { until: now + grace, detail });
        }
    }

    /// Peers found their exchange broken: who was merely suspect is gone.
    pub(super) fn suspects_are_lost(&mut self, now: Time, out: &mut Vec<Action>) {
        if self.peers.count().suspect == 0 {
            return;
        }
        let suspects = self.peers.iter().filter_map(|(&session, peer)| {
            Some((session, Departure::Disconnected { detail: peer.suspect.as_ref()?.detail.clone() }))
        });
        for (session, departure) in suspects.collect::<Vec<_>>() {
            self.peer_lost(session, departure, now, out);
        }
    }

    /// It joins anew without going on: its place in the team is empty.
    pub(super) fn former_is_lost(&mut self, session: Session, now: Time, out: &mut Vec<Action>) {
        let Some(worker) = self.name_of(session) else { return };
        if let Some(former) = self.former_session(&worker, session) {
            let detail = "its connection broke".into();
            self.peer_lost(former, Departure::Disconnected { detail }, now, out);
        }
    }

    fn former_session(&self, worker: &WorkerId, session: Session) -> Option<Session> {
        self.peers.of_worker(worker).find_map(|(other, _)| (other != session).then_some(other))
    }

    /// It joins while its training thread goes on with `work`.
    pub(super) fn came_back(&mut self, session: Session, work: AtWork, now: Time, out: &mut Vec<Action>) {
        let Some(worker) = self.name_of(session) else { return };
        let former = self.former_session(&worker, session);
        if let Phase::Gathering(gathering) = &self.phase
            && gathering.listening.is_some()
        {
            return; // the whole former team may come back so
        }
        if let Phase::Training { team, train, step_ms, .. } = &mut self.phase
            && (team.generation, *train) == (work.generation, work.train)
            && let Some((former, rank)) = former.and_then(|former| Some((former, team.rank_of(former)?)))
        {
            team.replace(former, session);
            step_ms.remove(former);
            let before = self.peers.remove(&former);
            if let Some(mut peer) = self.peers.get_mut(&session) {
                peer.leaving |= before.as_ref().is_some_and(|peer| peer.leaving);
                peer.progress = before.and_then(|peer| peer.progress);
                peer.progress.filter(is_steady).inspect(|progress| step_ms.set(session, progress.step_ms));
            }
            self.is_taken_up(session);
            out.push(Action::Emit(RunEvent::WorkerReturned { worker, rank }));
            if self.wants_pause() {
                self.send(session, ToWorker::Pause, out); // it may not have come through
            }
            return;
        }
        if let Some(former) = former {
            let detail = "its connection broke, and it came back to another order".into();
            self.peer_lost(former, Departure::Disconnected { detail }, now, out);
        }
        self.turn_away(session, work, now, out);
    }

    /// The generation that it comes back with can't go on: it is to leave it, and say what it holds.
    pub(super) fn turn_away(&mut self, session: Session, work: AtWork, now: Time, out: &mut Vec<Action>) {
        let reason = format!("generation {} went on without this worker, or is over", work.generation);
        let message =
            Fenced { term: self.fences.term, generation: work.generation, body: ToWorker::Abort { reason } };
        out.push(Action::Send { session, message });
        if let Phase::Gathering(gathering) = &mut self.phase
            && work.generation >= self.fences.lineage
        {
            gathering.since = now;
            gathering.awaiting.insert(session); // it may hold a step that no other does
        }
    }

    /// It is a member like any other from here on.
    pub(super) fn is_taken_up(&mut self, session: Session) {
        if let Some(mut peer) = self.peers.get_mut(&session)
            && let Some(join) = &mut peer.join
        {
            join.at_work = None;
        }
    }

    /// Whether the team is to stop between two steps before its segment's end.
    pub(super) fn wants_pause(&self) -> bool {
        let Some(team) = self.team() else { return false };
        let comes = |(session, peer): (&Session, &super::Peer)| {
            peer.is_ready() && !peer.leaving && team.rank_of(*session).is_none()
        };
        self.stop_requested || self.peers.count().leaving > 0 || self.peers.iter().any(comes)
    }
}
