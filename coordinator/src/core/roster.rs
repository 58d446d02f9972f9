//! Who is connected, and who of them makes up a generation.

use std::collections::BTreeMap;

use musher_proto::{
    ids::{Generation, Rank, Session, WorkerId},
    message::{Hello, Join, Progress, ReplicaLabel},
};

use super::effects::Time;

/// One connected worker.
#[derive(Clone, Debug)]
pub struct Peer {
    pub hello: Hello,
    /// `None` until it has read its data and asked for work.
    pub join: Option<Join>,
    /// Its last report.
    pub progress: Option<Progress>,
    /// When its last message came.
    pub heard: Time,
    /// It is to be let go between two steps.
    pub leaving: bool,
}

impl Peer {
    pub fn worker(&self) -> &WorkerId {
        &self.hello.worker
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

    /// All replies in rank order, once the last is there.
    pub fn complete(&self) -> Option<Vec<&T>> {
        (self.by_rank.len() as u32 == self.world).then(|| self.by_rank.values().collect())
    }
}
