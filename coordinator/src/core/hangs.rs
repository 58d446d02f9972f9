//! Who holds the team up: what each member may take for what it does, by its heartbeats.
//!
//! A rank that waits for its peers is never accused. If all of them wait for each other, none is to blame
//! by this evidence, and the exchange itself is stuck.

use std::time::Duration;

use musher_proto::{
    ids::Session,
    job::Cluster,
    message::{Activity, Phase as WorkerPhase, Progress},
    patience::{self, SLOW},
};

use super::{
    Core, Phase,
    effects::{Action, Time},
    peers::Peer,
    reasons::{AbortCause, Departure, Wait},
    seconds,
    watch::Entry,
};

/// What somebody who holds the team up may take for it.
fn budget(progress: Option<&Progress>, cluster: &Cluster) -> Duration {
    let step = seconds(cluster.step_timeout_s);
    let Some(progress) = progress else { return step * SLOW };
    match (progress.phase, progress.activity) {
        (WorkerPhase::Idle, _) => step, // it has its order, and has not begun
        // There is nobody to wait for any more, and the wait can be interrupted.
        (_, Activity::WaitingForPeers) => step.min(seconds(cluster.heartbeat_timeout_s)),
        _ => patience::budget(progress, cluster),
    }
}

/// Since when it does what it does, as far as the order given at `ordered` is concerned.
fn since(peer: &Peer, ordered: Time) -> Time {
    let began = |p: &Progress| peer.progressed.saturating_sub(Duration::from_millis(p.in_activity_ms));
    peer.progress.as_ref().map_or(ordered, |p| began(p).max(ordered))
}

fn waits_for_peers(peer: &Peer) -> bool {
    peer.progress.is_some_and(|p| p.activity == Activity::WaitingForPeers && p.phase != WorkerPhase::Idle)
}

/// It has not come to the exchange that the others wait in.
pub(super) fn is_elsewhere(peer: &Peer) -> bool {
    peer.progress.is_some_and(|p| p.activity != Activity::WaitingForPeers && p.phase != WorkerPhase::Idle)
}

/// What the coordinator waits for from its members.
#[derive(Clone, Copy, Debug)]
struct Awaited {
    /// Since when.
    ordered: Time,
    /// When one of them was done with it: a sign that the exchange moves.
    moved: Time,
    /// They exchange something with each other, and may wait for it.
    exchange: bool,
}

impl Core {
    /// Removes who is past its budget, and aborts an exchange in which nothing moves.
    pub(super) fn look_for_hangs(&mut self, now: Time, out: &mut Vec<Action>) {
        let Some(awaited) = self.awaited() else { return };
        let members = self.awaited_members();
        let stuck: Vec<(Session, Departure)> = members
            .iter()
            .filter_map(|&session| Some((session, self.peers.get(&session)?)))
            .filter_map(|(session, peer)| {
                let (began, budget) = self.suspicion(awaited, peer)?;
                Some((session, peer, began, budget))
            })
            .filter(|(_, _, began, budget)| now >= *began + *budget)
            .map(|(session, peer, began, budget)| {
                let wait = Wait::of(peer.progress.as_ref(), now.saturating_sub(began));
                match self.phase {
                    Phase::Gathering(_) => (session, Departure::Unresponsive(wait)),
                    _ => (session, Departure::Stuck { wait, budget }),
                }
            })
            .collect();
        for (session, departure) in stuck {
            self.remove(session, departure, now, out);
        }
        if let Some((due, wait)) = self.standstill(awaited, &members, now)
            && now >= due
        {
            self.abort(AbortCause::ExchangeStuck(wait), now, out);
        }
    }

    /// When this peer is overdue, by this evidence and by its silence, and what it is to the team.
    pub(super) fn watched(&self, session: Session) -> Option<Entry> {
        let peer = self.peers.get(&session)?;
        let lost = match &peer.suspect {
            Some(suspect) => suspect.until,
            None => peer.heard + self.heartbeat_timeout(),
        };
        let awaited = self.awaited().filter(|_| self.awaits(session));
        let suspicion = awaited.and_then(|awaited| self.suspicion(awaited, peer));
        let hung = suspicion.map(|(began, budget)| began + budget);
        Some(Entry {
            due: [Some(lost), peer.benched, hung].into_iter().flatten().min().unwrap_or(lost),
            awaited: awaited.is_some(),
            waits_since: awaited
                .filter(|awaited| awaited.exchange && peer.suspect.is_none() && waits_for_peers(peer))
                .map(|awaited| since(peer, awaited.ordered)),
        })
    }

    /// When an exchange in which everybody waits counts as stuck.
    pub(super) fn standstill_deadline(&self) -> Option<Time> {
        let began = self.watch.standstill()?.max(self.awaited()?.moved);
        Some(began + seconds(self.job.cluster.step_timeout_s))
    }

    fn awaited(&self) -> Option<Awaited> {
        let of = |ordered, moved, exchange| Some(Awaited { ordered, moved, exchange });
        match &self.phase {
            Phase::Forming { synced, since, .. } => of(*since, synced.moved, true),
            Phase::Training { finished, since, .. } => of(*since, finished.moved, true),
            Phase::Validating { validated, since, .. } => of(*since, validated.moved, false),
            Phase::Gathering(gathering) => of(gathering.since, Time::ZERO, false),
            Phase::Storing { .. } | Phase::Lingering { .. } | Phase::Ended => None,
        }
    }

    fn awaits(&self, session: Session) -> bool {
        match &self.phase {
            Phase::Forming { team, synced, .. } => synced.awaits(team, session),
            Phase::Training { team, finished, .. } => finished.awaits(team, session),
            Phase::Validating { team, validated, .. } => validated.awaits(team, session),
            Phase::Gathering(gathering) => gathering.awaiting.contains(&session),
            Phase::Storing { .. } | Phase::Lingering { .. } | Phase::Ended => false,
        }
    }

    fn awaited_members(&self) -> Vec<Session> {
        match &self.phase {
            Phase::Forming { team, synced, .. } => synced.missing(team),
            Phase::Training { team, finished, .. } => finished.missing(team),
            Phase::Validating { team, validated, .. } => validated.missing(team),
            Phase::Gathering(gathering) => gathering.awaiting.iter().copied().collect(),
            Phase::Storing { .. } | Phase::Lingering { .. } | Phase::Ended => Vec::new(),
        }
    }

    /// For one that is awaited and does not wait for its peers: since when, and for how long it may.
    fn suspicion(&self, awaited: Awaited, peer: &Peer) -> Option<(Time, Duration)> {
        let innocent = peer.suspect.is_some() || awaited.exchange && waits_for_peers(peer);
        let budget = budget(peer.progress.as_ref(), &self.job.cluster);
        (!innocent).then(|| (since(peer, awaited.ordered), budget))
    }

    /// When an exchange in which everybody waits counts as stuck, and who came to it last.
    fn standstill(&self, awaited: Awaited, members: &[Session], now: Time) -> Option<(Time, Wait)> {
        let peers: Vec<&Peer> = members.iter().filter_map(|s| self.peers.get(s)).collect();
        let waiting = |peer: &&Peer| peer.suspect.is_none() && waits_for_peers(peer);
        if !awaited.exchange || peers.is_empty() || !peers.iter().all(waiting) {
            return None;
        }
        let last = peers.iter().max_by_key(|peer| since(peer, awaited.ordered))?;
        let began = since(last, awaited.ordered).max(awaited.moved);
        let wait = Wait::of(last.progress.as_ref(), now.saturating_sub(began));
        Some((began + seconds(self.job.cluster.step_timeout_s), wait))
    }
}
