//! Who is connected.
//!
//! What the core asks of all of them at each message is counted as they change: to go through ten thousand at each of
//! their ten thousand messages a second would be a core's work and more.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    ops::{Deref, DerefMut},
};

use musher_proto::{
    ids::{Session, WorkerId},
    message::{AtWork, Hello, Join, Progress, ReplicaLabel, SegmentFinished},
};

use super::{effects::Time, slowness::Slowness};

/// One connected worker.
#[derive(Clone, Debug)]
pub struct Peer {
    pub hello: Hello,
    /// `None` until it has read its data and asked for work.
    pub join: Option<Join>,
    /// Its last report.
    pub progress: Option<Progress>,
    /// When that came.
    pub progressed: Time,
    /// When its last message came.
    pub heard: Time,
    /// It is to be let go between two steps.
    pub leaving: bool,
    /// A member whose stream has ended, and that may be back in a moment.
    pub suspect: Option<Suspect>,
    /// The end of its segment, told while the rest of its team was still awaited.
    pub finished: Option<SegmentFinished>,
    /// It was put out, and is not taken in again before then.
    pub benched: Option<Time>,
    /// How often in a row its steps were slow.
    pub slow: Slowness,
}

#[derive(Clone, Debug)]
pub struct Suspect {
    pub until: Time,
    /// How its stream ended.
    pub detail: String,
}

impl Peer {
    pub fn new(hello: Hello, now: Time) -> Self {
        Self {
            hello,
            join: None,
            progress: None,
            progressed: now,
            heard: now,
            leaving: false,
            suspect: None,
            finished: None,
            benched: None,
            slow: Slowness::default(),
        }
    }

    pub fn worker(&self) -> &WorkerId {
        &self.hello.worker
    }

    /// It has joined and can be formed into a generation.
    pub fn is_ready(&self) -> bool {
        let stands = self.join.as_ref().is_some_and(|join| join.at_work.is_none());
        stands && self.suspect.is_none() && self.benched.is_none()
    }

    /// The generation that it comes back with, until it is taken up or has left it.
    pub fn at_work(&self) -> Option<AtWork> {
        self.join.as_ref().and_then(|join| join.at_work)
    }

    pub fn held(&self) -> Option<ReplicaLabel> {
        self.join.as_ref().and_then(|join| join.held)
    }
}

/// All of them, in the order in which they came.
#[derive(Clone, Debug, Default)]
pub struct Peers {
    by_session: BTreeMap<Session, Peer>,
    of_worker: BTreeMap<WorkerId, BTreeSet<Session>>,
    count: Count,
    touched: Vec<Session>,
}

/// How many of them are what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub joined: u32,
    /// Ready, and not about to go.
    pub staying: u32,
    pub leaving: u32,
    pub benched: u32,
    pub suspect: u32,
    /// What those that are ready hold.
    held: BTreeMap<ReplicaLabel, u32>,
    /// What those that stay hold.
    kept: BTreeMap<ReplicaLabel, u32>,
}

/// What of one peer is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Standing {
    joined: bool,
    ready: bool,
    leaving: bool,
    benched: bool,
    suspect: bool,
    held: Option<ReplicaLabel>,
}

/// A peer that may be changed; it is counted anew when this is dropped.
#[derive(Debug)]
pub struct PeerMut<'a> {
    peer: &'a mut Peer,
    count: &'a mut Count,
    before: Standing,
}

impl Peers {
    pub fn get(&self, session: &Session) -> Option<&Peer> {
        self.by_session.get(session)
    }

    pub fn contains_key(&self, session: &Session) -> bool {
        self.by_session.contains_key(session)
    }

    pub fn get_mut(&mut self, session: &Session) -> Option<PeerMut<'_>> {
        let peer = self.by_session.get_mut(session)?;
        if self.touched.last() != Some(session) {
            self.touched.push(*session);
        }
        let before = Standing::of(peer);
        Some(PeerMut { peer, count: &mut self.count, before })
    }

    pub fn insert(&mut self, session: Session, peer: Peer) {
        self.remove(&session);
        self.count.add(Standing::of(&peer));
        self.of_worker.entry(peer.worker().clone()).or_default().insert(session);
        self.by_session.insert(session, peer);
        self.touched.push(session);
    }

    pub fn remove(&mut self, session: &Session) -> Option<Peer> {
        let peer = self.by_session.remove(session)?;
        self.count.take_out(Standing::of(&peer));
        if let Some(sessions) = self.of_worker.get_mut(peer.worker()) {
            sessions.remove(session);
            if sessions.is_empty() {
                self.of_worker.remove(peer.worker());
            }
        }
        self.touched.push(*session);
        Some(peer)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&Session, &Peer)> {
        self.by_session.iter()
    }

    pub fn values(&self) -> impl Iterator<Item = &Peer> {
        self.by_session.values()
    }

    pub fn is_empty(&self) -> bool {
        self.by_session.is_empty()
    }

    /// The sessions of one worker: usually one, and more while it connects anew.
    pub fn of_worker(&self, worker: &WorkerId) -> impl Iterator<Item = (Session, &Peer)> {
        let sessions = self.of_worker.get(worker).into_iter().flatten();
        sessions.filter_map(|session| Some((*session, self.by_session.get(session)?)))
    }

    pub fn count(&self) -> &Count {
        &self.count
    }

    /// Those that came, went or may have changed since this was asked last; some more than once.
    pub fn take_touched(&mut self) -> Vec<Session> {
        mem::take(&mut self.touched)
    }

    /// All of them, for what is not counted.
    pub fn change_times(&mut self, mut change: impl FnMut(&mut Peer)) {
        self.by_session.values_mut().for_each(&mut change);
    }
}

impl Count {
    /// The different states that those hold that are ready.
    pub fn held(&self) -> impl Iterator<Item = ReplicaLabel> {
        self.held.keys().copied()
    }

    /// Whether one that stays holds this state.
    pub fn keeps(&self, held: ReplicaLabel) -> bool {
        self.kept.contains_key(&held)
    }

    fn add(&mut self, standing: Standing) {
        for (number, is_it) in self.numbers(standing) {
            *number += u32::from(is_it);
        }
        for (labels, label) in self.labels(standing) {
            *labels.entry(label).or_default() += 1;
        }
    }

    fn take_out(&mut self, standing: Standing) {
        for (number, is_it) in self.numbers(standing) {
            *number -= u32::from(is_it);
        }
        for (labels, label) in self.labels(standing) {
            if let Some(number) = labels.get_mut(&label) {
                *number -= 1;
                if *number == 0 {
                    labels.remove(&label);
                }
            }
        }
    }

    fn numbers(&mut self, standing: Standing) -> [(&mut u32, bool); 5] {
        let Self { joined, staying, leaving, benched, suspect, .. } = self;
        [
            (joined, standing.joined),
            (staying, standing.stays()),
            (leaving, standing.leaving),
            (benched, standing.benched),
            (suspect, standing.suspect),
        ]
    }

    fn labels(
        &mut self,
        standing: Standing,
    ) -> impl Iterator<Item = (&mut BTreeMap<ReplicaLabel, u32>, ReplicaLabel)> {
        let held = standing.held.filter(|_| standing.ready).map(|label| (&mut self.held, label));
        let kept = standing.held.filter(|_| standing.stays()).map(|label| (&mut self.kept, label));
        held.into_iter().chain(kept)
    }
}

impl Standing {
    fn of(peer: &Peer) -> Self {
        Self {
            joined: peer.join.is_some(),
            ready: peer.is_ready(),
            leaving: peer.leaving,
            benched: peer.benched.is_some(),
            suspect: peer.suspect.is_some(),
            held: peer.held(),
        }
    }

    fn stays(&self) -> bool {
        self.ready && !self.leaving
    }
}

impl Deref for PeerMut<'_> {
    type Target = Peer;

    fn deref(&self) -> &Peer {
        self.peer
    }
}

impl DerefMut for PeerMut<'_> {
    fn deref_mut(&mut self) -> &mut Peer {
        self.peer
    }
}

impl Drop for PeerMut<'_> {
    fn drop(&mut self) {
        let after = Standing::of(self.peer);
        if after != self.before {
            self.count.take_out(self.before);
            self.count.add(after);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use musher_proto::{
        ids::{Epoch, Generation, Step},
        message::DataFacts,
    };
    use proptest::prelude::*;

    use super::*;

    fn hello(worker: u8) -> Hello {
        Hello {
            protocol: 1,
            worker: format!("w{worker}").as_str().into(),
            incarnation: 1,
            host: "h".into(),
            device: "cpu".into(),
        }
    }

    fn label(applied: u8) -> ReplicaLabel {
        let applied = Step(u64::from(applied));
        ReplicaLabel { lineage: Generation(1), applied, epoch: Epoch(1), cursor: 0 }
    }

    fn counted(peers: &Peers) -> Count {
        let mut count = Count::default();
        peers.values().for_each(|peer| count.add(Standing::of(peer)));
        count
    }

    proptest! {
        /// Whatever is done to them, the counts are what counting them all would give.
        #[test]
        fn the_counts_are_those_of_all_peers(changes in prop::collection::vec((0u8..9, 0u64..6, 0u8..3), 1..80)) {
            let mut peers = Peers::default();
            for (change, session, number) in changes {
                let session = Session(session);
                match change {
                    0 => peers.insert(session, Peer::new(hello(number), Duration::ZERO)),
                    1 => drop(peers.remove(&session)),
                    _ => if let Some(mut peer) = peers.get_mut(&session) {
                        let at = Duration::from_secs(u64::from(number));
                        match change {
                            2 => peer.join = Some(Join {
                                held: (number > 0).then(|| label(number)),
                                ..Join::of_newcomer(DataFacts { digest: "d".into(), train_samples: 1, val_samples: 1 }, "a", "cpu")
                            }),
                            3 => peer.leaving = number > 0,
                            4 => peer.benched = (number > 0).then_some(at),
                            5 => peer.suspect = (number > 0).then(|| Suspect { until: at, detail: "d".into() }),
                            6 => if let Some(join) = &mut peer.join { join.held = Some(label(number)) },
                            _ => peer.heard = at,
                        }
                    },
                }
                prop_assert_eq!(peers.count(), &counted(&peers));
                for worker in 0..3 {
                    let worker = hello(worker).worker;
                    let found: Vec<Session> = peers.of_worker(&worker).map(|(session, _)| session).collect();
                    let all = peers.iter().filter(|(_, peer)| *peer.worker() == worker);
                    prop_assert_eq!(found, all.map(|(session, _)| *session).collect::<Vec<_>>());
                }
            }
        }
    }
}
