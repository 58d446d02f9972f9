//! Workers that are told to go are let go between two steps, and not before what only they hold is safe.

use musher_proto::{ids::Session, message::ToWorker};

use super::{
    Core, Phase,
    effects::{Action, RunEvent, Status, Time},
    reasons::Departure,
};

impl Core {
    /// A worker wants to go, or is wanted gone.
    pub(super) fn leaving(&mut self, session: Session, now: Time, out: &mut Vec<Action>) {
        let is_member = self.team().is_some_and(|team| team.rank_of(session).is_some());
        let Some(mut peer) = self.peers.get_mut(&session) else { return };
        if std::mem::replace(&mut peer.leaving, true) {
            return;
        }
        drop(peer);
        match (is_member, &self.phase) {
            (true, Phase::Training { .. }) => self.pause_team(out),
            (true, _) => {} // at the next stopping point
            (false, _) => self.dismiss_leaving(now, out),
        }
    }

    /// Lets those go that are no members and hold nothing that nobody else has.
    pub(super) fn dismiss_leaving(&mut self, now: Time, out: &mut Vec<Action>) {
        if self.peers.count().leaving == 0 {
            return;
        }
        let done: Vec<Session> = self
            .peers
            .iter()
            .filter(|(session, peer)| peer.leaving && !self.is_needed(**session))
            .map(|(&session, _)| session)
            .collect();
        for session in done {
            self.send(session, ToWorker::Finish(Status::Stopped.goodbye()), out);
            out.push(Action::CloseSession { session });
            let Some(peer) = self.peers.remove(&session) else { continue };
            let worker = peer.worker().clone();
            out.push(Action::Emit(RunEvent::WorkerLeft {
                worker,
                rank: None,
                departure: Departure::Drained,
            }));
            self.settled(session, now, out);
        }
    }

    fn is_needed(&self, session: Session) -> bool {
        let held = self.peers.get(&session).and_then(|peer| peer.held());
        let newest = held.filter(|_| held == self.newest_held());
        // What could not be saved is handed on where there is a team to take it.
        let durable = |held| {
            self.is_safe(held) && !(self.is_unsavable(held) && self.staying() >= self.job.cluster.min_workers)
        };
        let elsewhere = |held| durable(held) || self.peers.count().keeps(held);
        let is_member = self.team().is_some_and(|team| team.rank_of(session).is_some());
        let awaited =
            matches!(&self.phase, Phase::Gathering(gathering) if gathering.awaiting.contains(&session));
        is_member || awaited || newest.is_some_and(|held| !elsewhere(held))
    }

    /// Workers that have joined and want to stay.
    pub(super) fn staying(&self) -> u32 {
        self.peers.count().staying
    }
}
