//! When somebody is overdue next, kept up to date with each message: to ask all of them for it at each would cost the
//! square of their number.
//!
//! What is overdue, and what then happens, is said where it belongs ([`hangs`](super::hangs), silence, benches); this
//! says only when to look. It may be too early, never too late.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, mem,
};

use musher_proto::ids::Session;

use super::effects::Time;

#[derive(Clone, Default)]
pub struct Watch {
    entries: BTreeMap<Session, Entry>,
    due: BTreeSet<(Time, Session)>,
    /// Those that are awaited ...
    awaited: u32,
    /// ... and among them those that wait for their peers, by since when.
    waiting: BTreeSet<(Time, Session)>,
    /// What all entries stand on has changed.
    stale: bool,
}

/// One peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub due: Time,
    /// The team's work can't go on without it.
    pub awaited: bool,
    /// It is awaited, and waits for its peers since then.
    pub waits_since: Option<Time>,
}

impl Entry {
    /// Whether to look by this one is to look in time for the other.
    fn serves_for(self, other: Self) -> bool {
        let waits = match (self.waits_since, other.waits_since) {
            (Some(noted), Some(since)) => noted <= since,
            (None, None) => true,
            _ => false,
        };
        waits && self.awaited == other.awaited && self.due <= other.due
    }
}

impl Watch {
    pub fn set(&mut self, session: Session, entry: Option<Entry>) {
        if let (Some(new), Some(noted)) = (entry, self.entries.get(&session))
            && noted.serves_for(new)
        {
            return; // most messages only put deadlines off
        }
        let before = match entry {
            Some(entry) => self.entries.insert(session, entry),
            None => self.entries.remove(&session),
        };
        if let Some(Entry { due, awaited, waits_since }) = before {
            self.due.remove(&(due, session));
            self.awaited -= u32::from(awaited);
            waits_since.map(|since| self.waiting.remove(&(since, session)));
        }
        if let Some(Entry { due, awaited, waits_since }) = entry {
            self.due.insert((due, session));
            self.awaited += u32::from(awaited);
            waits_since.map(|since| self.waiting.insert((since, session)));
        }
    }

    /// The team is at something else, or what it does began at another time.
    pub fn all_changed(&mut self) {
        self.stale = true;
    }

    /// Whether all are to be set anew, which is then up to the caller.
    pub fn begins_anew(&mut self) -> bool {
        let stale = mem::take(&mut self.stale);
        if stale {
            *self = Self::default();
        }
        stale
    }

    pub fn next(&self) -> Option<Time> {
        self.due.first().map(|(at, _)| *at)
    }

    /// If all that are awaited wait for each other: since when the last of them does.
    pub fn standstill(&self) -> Option<Time> {
        let all = self.awaited > 0 && self.waiting.len() == self.awaited as usize;
        self.waiting.last().filter(|_| all).map(|(since, _)| *since)
    }
}

/// It follows from what the core knows otherwise, and is as long.
impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch(..)")
    }
}
