//! Who is connected, and who of them makes up a generation.

use std::collections::BTreeMap;

use musher_proto::{
    ids::{Generation, Rank, Session, WorkerId},
    message::{AtWork, Hello, Join, Progress, ReplicaLabel},
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

pub type Peers = BTreeMap<Session, Peer>;

/// The members of one generation, in rank order, and what each has reported in the current phase.
#[derive(Clone, Debug)]
pub struct Team {
    pub generation: Generation,
    members: Vec<Session>,
}

impl Team {
    pub fn new(generation: Generation, members: Vec<Session>) -> Self {
        Self { generation, members }
    }

    pub fn world(&self) -> u32 {
        self.members.len() as u32
    }

    pub fn members(&self) -> impl Iterator<Item = (Rank, Session)> + '_ {
        self.members.iter().enumerate().map(|(rank, &session)| (Rank(rank as u32), session))
    }

    pub fn session_of(&self, rank: Rank) -> Option<Session> {
        self.members.get(rank.0 as usize).copied()
    }

    /// A member goes on under a new session.
    pub fn replace(&mut self, former: Session, session: Session) {
        for member in self.members.iter_mut().filter(|member| **member == former) {
            *member = session;
        }
    }

    pub fn rank_of(&self, session: Session) -> Option<Rank> {
        self.members().find_map(|(rank, member)| (member == session).then_some(rank))
    }
}

/// One reply from each member, as they come.
#[derive(Clone, Debug)]
pub struct Replies<T> {
    by_rank: BTreeMap<Rank, T>,
    world: u32,
}

impl<T> Replies<T> {
    pub fn expected_from(team: &Team) -> Self {
        Self { by_rank: BTreeMap::new(), world: team.world() }
    }

    /// Takes a reply; a repeated one changes nothing.
    pub fn take(&mut self, rank: Rank, reply: T) {
        self.by_rank.entry(rank).or_insert(reply);
    }

    /// Whose reply is still awaited.
    pub fn missing(&self, team: &Team) -> Vec<Session> {
        team.members()
            .filter(|(rank, _)| !self.by_rank.contains_key(rank))
            .map(|(_, session)| session)
            .collect()
    }

    /// All replies in rank order, once the last is there.
    pub fn complete(&self) -> Option<Vec<&T>> {
        (self.by_rank.len() as u32 == self.world).then(|| self.by_rank.values().collect())
    }
}
