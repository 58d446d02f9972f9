//! Who makes up a generation, and what each member has reported. Who is connected is [`peers`](super::peers)'s.

use std::collections::BTreeMap;

use musher_proto::ids::{Generation, Rank, Session};

use super::effects::Time;

/// The members of one generation, in rank order, and what each has reported in the current phase.
#[derive(Clone, Debug)]
pub struct Team {
    pub generation: Generation,
    members: Vec<Session>,
    ranks: BTreeMap<Session, Rank>,
}

impl Team {
    pub fn new(generation: Generation, members: Vec<Session>) -> Self {
        let ranks = members.iter().zip(0..).map(|(&session, rank)| (session, Rank(rank))).collect();
        Self { generation, members, ranks }
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
        let Some(rank) = self.ranks.remove(&former) else { return };
        self.members[rank.0 as usize] = session;
        self.ranks.insert(session, rank);
    }

    pub fn rank_of(&self, session: Session) -> Option<Rank> {
        self.ranks.get(&session).copied()
    }
}

/// One reply from each member, as they come.
#[derive(Clone, Debug)]
pub struct Replies<T> {
    by_rank: BTreeMap<Rank, T>,
    world: u32,
    /// When the last came.
    pub moved: Time,
}

impl<T> Replies<T> {
    pub fn expected_from(team: &Team) -> Self {
        Self { by_rank: BTreeMap::new(), world: team.world(), moved: Time::ZERO }
    }

    /// Takes a reply; a repeated one changes nothing.
    pub fn take(&mut self, rank: Rank, reply: T, now: Time) {
        self.by_rank.entry(rank).or_insert(reply);
        self.moved = now;
    }

    /// Whether this member's reply is still awaited.
    pub fn awaits(&self, team: &Team, session: Session) -> bool {
        team.rank_of(session).is_some_and(|rank| !self.by_rank.contains_key(&rank))
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
