//! Links between machines, and the streams over them: in order within a stream, each message with a
//! latency of its own; a cut link holds what is sent until it is mended, or until a side gives up.

use std::collections::{BTreeMap, VecDeque};

use musher_proto::{
    ids::Session,
    message::{Fenced, FromWorker, ToWorker},
};
use serde::{Deserialize, Serialize};

use super::clock::{Dice, Time, ms};

/// A machine: the coordinator's, or that of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Node {
    Coordinator,
    Worker(usize),
}

/// Which links are cut or slow, in one direction each. Faults overlap, so they are counted.
#[derive(Debug, Default)]
pub struct Links {
    cut: BTreeMap<(Node, Node), u32>,
    slow: BTreeMap<(Node, Node), u32>,
    sent: u64,
}

impl Links {
    pub fn cut(&mut self, from: Node, to: Node) {
        *self.cut.entry((from, to)).or_default() += 1;
    }

    pub fn mend(&mut self, from: Node, to: Node) {
        release(&mut self.cut, (from, to));
    }

    pub fn slow_down(&mut self, a: Node, b: Node) {
        for link in [(a, b), (b, a)] {
            *self.slow.entry(link).or_default() += 1;
        }
    }

    pub fn speed_up(&mut self, a: Node, b: Node) {
        release(&mut self.slow, (a, b));
        release(&mut self.slow, (b, a));
    }

    pub fn mend_all(&mut self) {
        self.cut.clear();
        self.slow.clear();
    }

    pub fn carries(&self, from: Node, to: Node) -> bool {
        !self.cut.contains_key(&(from, to))
    }

    /// TCP needs both directions.
    pub fn connects(&self, a: Node, b: Node) -> bool {
        self.carries(a, b) && self.carries(b, a)
    }

    pub fn is_slow(&self, from: Node, to: Node) -> bool {
        self.slow.contains_key(&(from, to))
    }

    pub fn latency(&mut self, dice: Dice, from: Node, to: Node) -> Time {
        self.sent += 1;
        let longest = if self.is_slow(from, to) { ms(1500) } else { ms(40) };
        ms(1) + dice.delay(&[0x1A7, self.sent], longest)
    }
}

fn release(counts: &mut BTreeMap<(Node, Node), u32>, link: (Node, Node)) {
    if let Some(count) = counts.get_mut(&link) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&link);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Coordinator,
    Worker,
}

impl Side {
    pub fn other(self) -> Self {
        match self {
            Side::Coordinator => Side::Worker,
            Side::Worker => Side::Coordinator,
        }
    }
}

#[derive(Clone, Debug)]
pub enum Item {
    FromWorker(Fenced<FromWorker>),
    ToWorker(Fenced<ToWorker>),
    End,
}

/// One stream between a worker's process and a life of the coordinator.
#[derive(Debug)]
pub struct Connection {
    pub worker: usize,
    pub incarnation: u64,
    /// Of the coordinator.
    pub life: u64,
    /// Of its process.
    pub first: bool,
    /// Known once `Hello` has arrived.
    pub session: Option<Session>,
    /// Whether each side's process still has its end.
    pub at_worker: bool,
    pub at_coordinator: bool,
    /// One side's machine is gone, and the other is told nothing.
    pub vanished: bool,
    /// By the side that receives.
    pub to_coordinator: Transit,
    pub to_worker: Transit,
    /// Since when a side's pings are not answered.
    pub deaf: [Option<Time>; 2],
}

#[derive(Debug, Default)]
pub struct Transit {
    pub items: VecDeque<(Time, Item)>,
    /// The link was cut when the first was due.
    pub held: bool,
    last: Time,
}

impl Transit {
    /// When it will arrive, if the link carries it then.
    pub fn push(&mut self, item: Item, arrives: Time) -> Time {
        self.last = self.last.max(arrives);
        self.items.push_back((self.last, item));
        self.last
    }
}

impl Connection {
    pub fn new(worker: usize, incarnation: u64, life: u64, first: bool) -> Self {
        Self {
            worker,
            incarnation,
            life,
            first,
            session: None,
            at_worker: true,
            at_coordinator: true,
            vanished: false,
            to_coordinator: Transit::default(),
            to_worker: Transit::default(),
            deaf: [None; 2],
        }
    }

    pub fn transit_to(&mut self, side: Side) -> &mut Transit {
        match side {
            Side::Coordinator => &mut self.to_coordinator,
            Side::Worker => &mut self.to_worker,
        }
    }

    pub fn is_open_at(&self, side: Side) -> bool {
        match side {
            Side::Coordinator => self.at_coordinator,
            Side::Worker => self.at_worker,
        }
    }

    pub fn close_at(&mut self, side: Side) {
        match side {
            Side::Coordinator => self.at_coordinator = false,
            Side::Worker => self.at_worker = false,
        }
    }

    pub fn nodes(&self, to: Side) -> (Node, Node) {
        let worker = Node::Worker(self.worker);
        match to {
            Side::Coordinator => (worker, Node::Coordinator),
            Side::Worker => (Node::Coordinator, worker),
        }
    }
}
