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
    reasons::{AbortCause, Departure, Wait},
    roster::Peer,
    seconds,
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
struct Awaited {
    /// Since when.
    ordered: Time,
    members: Vec<Session>,
    /// When one of them was done with it: a sign that the exchange moves.
    moved: Time,
    /// They exchange something with each other, and may wait for it.
    exchange: bool,
}

impl Core {
    /// Removes who is past its budget, and aborts an exchange in which nothing moves.
    pub(super) fn look_for_hangs(&mut self, now: Time, out: &mut Vec<Action>) {
        let Some(awaited) = self.awaited() else { return };
        let stuck: Vec<(Session, Departure)> = self
            .suspected(&awaited)
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
        if let Some((due, wait)) = self.standstill(&awaited, now)
            && now >= due
        {
            self.abort(AbortCause::ExchangeStuck(wait), now, out);
        }
    }

    pub(super) fn hang_deadline(&self) -> Option<Time> {
        let awaited = self.awaited()?;
        let stuck = self.suspected(&awaited).map(|(_, _, began, budget)| began + budget).min();
        let standstill = self.standstill(&awaited, Time::ZERO).map(|(due, _)| due);
        [stuck, standstill].into_iter().flatten().min()
    }

    fn awaited(&self) -> Option<Awaited> {
        let of = |ordered, members, moved, exchange| Some(Awaited { ordered, members, moved, exchange });
        match &self.phase {
            Phase::Forming { team, synced, since, .. } => {
                of(*since, synced.missing(team), synced.moved, true)
            }
            Phase::Training { team, finished, since, .. } => {
                of(*since, finished.missing(team), finished.moved, true)
            }
            Phase::Validating { team, validated, since, .. } => {
                of(*since, validated.missing(team), validated.moved, false)
            }
            Phase::Gathering(gathering) => {
                of(gathering.since, gathering.awaiting.iter().copied().collect(), Time::ZERO, false)
            }
            Phase::Storing { .. } | Phase::Lingering { .. } | Phase::Ended => None,
        }
    }

    /// Those that do not wait for their peers: each with since when, and for how long it may.
    fn suspected<'a>(
        &'a self,
        awaited: &'a Awaited,
    ) -> impl Iterator<Item = (Session, &'a Peer, Time, Duration)> {
        let connected = |peer: &&Peer| peer.suspect.is_none();
        awaited
            .members
            .iter()
            .filter_map(move |session| Some((*session, self.peers.get(session).filter(connected)?)))
            .filter(|(_, peer)| !(awaited.exchange && waits_for_peers(peer)))
            .map(|(session, peer)| {
                let budget = budget(peer.progress.as_ref(), &self.job.cluster);
                (session, peer, since(peer, awaited.ordered), budget)
            })
    }

    /// When an exchange in which everybody waits counts as stuck.
    fn standstill(&self, awaited: &Awaited, now: Time) -> Option<(Time, Wait)> {
        let peers: Vec<&Peer> = awaited.members.iter().filter_map(|s| self.peers.get(s)).collect();
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
