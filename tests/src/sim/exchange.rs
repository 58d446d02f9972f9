//! The ring of one generation: calls that complete only when all members are in them, each rank at a
//! moment of its own, and what each rank sees when they do not.
//!
//! Who enters which call is the training thread's business ([`super::trainer`]).

use musher_proto::{
    ids::{Generation, Rank},
    message::Waited,
};

use super::{
    clock::{Time, ms},
    network::Node,
    process::Input,
    replica::Replica,
    world::{Happening, World},
};

/// Bytes that a rank receives in one round of a call.
const ROUND: u64 = 100;
/// More than any call has rounds.
const CALL: u64 = 10_000;

#[derive(Debug)]
pub struct Exchange {
    /// The worker and its process, once it is there.
    pub seats: Vec<Seat>,
}

#[derive(Debug)]
pub struct Seat {
    pub worker: usize,
    pub incarnation: Option<u64>,
    /// Calls that it has completed.
    pub done: u64,
    pub inside: Option<Inside>,
    /// It has closed its connections.
    pub left: bool,
    pub aborted: bool,
    /// A neighbour has closed its end.
    closed_by: Option<Rank>,
}

#[derive(Debug)]
pub struct Inside {
    pub call: Call,
    pub since: Time,
    contribution: Contribution,
    /// What it will find when its moment comes.
    result: Option<CallResult>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Connect,
    Broadcast,
    /// On the state after so many steps.
    Step(u64),
    Pool(u64),
}

impl Call {
    fn phase(self) -> &'static str {
        match self {
            Call::Connect => "connecting",
            Call::Broadcast => "state",
            Call::Step(_) => "gradients",
            Call::Pool(_) => "batch norm",
        }
    }

    fn step(self) -> u64 {
        match self {
            Call::Connect | Call::Broadcast => 0,
            Call::Step(step) | Call::Pool(step) => step,
        }
    }
}

/// What one rank brings into a call.
#[derive(Clone, Debug, Default)]
pub struct Contribution {
    pub stop: bool,
    pub statistics: u64,
    /// The donor's.
    pub state: Option<Box<Replica>>,
}

/// What all ranks find.
#[derive(Clone, Debug, Default)]
pub struct CallResult {
    pub stop: bool,
    pub statistics: u64,
    pub state: Option<Box<Replica>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallError {
    Aborted,
    PeerClosed(Rank),
    TimedOut,
    NotFormed,
    /// The ranks are in different calls.
    OutOfStep,
}

impl Exchange {
    pub fn new(workers: Vec<usize>) -> Self {
        let seat = |worker| Seat {
            worker,
            incarnation: None,
            done: 0,
            inside: None,
            left: false,
            aborted: false,
            closed_by: None,
        };
        Self { seats: workers.into_iter().map(seat).collect() }
    }

    fn neighbours(&self, rank: usize) -> [usize; 2] {
        let world = self.seats.len();
        [(rank + world - 1) % world, (rank + 1) % world]
    }
}

impl World {
    fn seat(&mut self, generation: Generation, rank: Rank) -> Option<&mut Seat> {
        self.exchanges.get_mut(&generation)?.seats.get_mut(rank.0 as usize)
    }

    /// The training thread of `rank` enters a call.
    ///
    /// # Errors
    /// The exchange is known to be over already.
    pub fn enter(
        &mut self,
        generation: Generation,
        rank: Rank,
        call: Call,
        contribution: Contribution,
    ) -> Result<(), CallError> {
        let now = self.now;
        let patience = match call {
            Call::Connect => self.bounds.formation,
            _ => self.bounds.ring,
        };
        let Some(seat) = self.seat(generation, rank) else { return Err(CallError::Aborted) };
        if seat.aborted || seat.left {
            return Err(CallError::Aborted);
        }
        if let Some(peer) = seat.closed_by {
            return Err(CallError::PeerClosed(peer));
        }
        seat.inside = Some(Inside { call, since: now, contribution, result: None });
        let (worker, incarnation, done) = (seat.worker, seat.incarnation.unwrap_or_default(), seat.done);
        let input = Input::OutOfPatience { generation, rank, done };
        self.agenda.set(now + patience, Happening::Process { worker, incarnation, input });
        self.complete_if_possible(generation);
        Ok(())
    }

    pub fn complete_if_possible(&mut self, generation: Generation) {
        self.connect_if_possible(generation);
        self.call_if_possible(generation);
    }

    /// A rank is connected once both its neighbours are there.
    fn connect_if_possible(&mut self, generation: Generation) {
        let Some(exchange) = self.exchanges.get(&generation) else { return };
        let connects = |seat: &Seat| {
            seat.inside.as_ref().is_some_and(|inside| inside.call == Call::Connect && inside.result.is_none())
        };
        let ready: Vec<usize> = (0..exchange.seats.len())
            .filter(|&rank| connects(&exchange.seats[rank]) && self.runs(&exchange.seats[rank]))
            .filter(|&rank| self.missing_neighbour(exchange, rank).is_none())
            .collect();
        for rank in ready {
            self.comes_through(generation, rank, CallResult::default());
        }
    }

    /// The neighbour that a rank that connects waits for.
    fn missing_neighbour(&self, exchange: &Exchange, rank: usize) -> Option<usize> {
        let [predecessor, successor] = exchange.neighbours(rank);
        let there = |seat: &Seat| self.runs(seat) && (seat.inside.is_some() || seat.done > 0);
        let links = |first: usize| self.link_to_successor(exchange, first);
        if !there(&exchange.seats[predecessor]) || !links(predecessor) {
            return Some(predecessor);
        }
        (!there(&exchange.seats[successor]) || !links(rank)).then_some(successor)
    }

    /// All members are in the same call, run, and reach their neighbours.
    fn call_if_possible(&mut self, generation: Generation) {
        let Some(exchange) = self.exchanges.get(&generation) else { return };
        let world = exchange.seats.len();
        let awaited = |seat: &Seat| {
            seat.inside.as_ref().is_some_and(|inside| inside.call != Call::Connect && inside.result.is_none())
        };
        if !exchange.seats.iter().all(|seat| awaited(seat) && self.runs(seat)) {
            return;
        }
        if (0..world).any(|rank| !self.link_to_successor(exchange, rank)) {
            return;
        }
        let calls: Vec<(u64, Call)> =
            exchange.seats.iter().filter_map(|seat| Some((seat.done, seat.inside.as_ref()?.call))).collect();
        if calls.iter().any(|call| *call != calls[0]) {
            for rank in 0..world {
                self.fail_call(generation, Rank(rank as u32), CallError::OutOfStep);
            }
            return;
        }
        let inside = || exchange.seats.iter().filter_map(|seat| Some(&seat.inside.as_ref()?.contribution));
        let result = CallResult {
            stop: inside().any(|given| given.stop),
            statistics: inside()
                .fold(0, |all: u64, given| all.rotate_left(9).wrapping_add(given.statistics | 1)),
            state: inside().find_map(|given| given.state.clone()),
        };
        for rank in 0..world {
            self.comes_through(generation, rank, result.clone());
        }
    }

    /// A rank's call is complete, and it will find so at a moment of its own.
    fn comes_through(&mut self, generation: Generation, rank: usize, result: CallResult) {
        let Some(exchange) = self.exchanges.get(&generation) else { return };
        let node = |rank: usize| Node::Worker(exchange.seats[rank].worker);
        let slow =
            exchange.neighbours(rank).into_iter().any(|next| self.links.is_slow(node(rank), node(next)));
        let longest = match (exchange.seats.len(), slow) {
            (1, _) => Time::ZERO,
            (_, false) => ms(60),
            (_, true) => ms(2000),
        };
        let Some(seat) = self.seat(generation, Rank(rank as u32)) else { return };
        let Some(inside) = &mut seat.inside else { return };
        inside.result = Some(result);
        let (worker, incarnation, done) = (seat.worker, seat.incarnation.unwrap_or_default(), seat.done);
        let moment = self.dice.delay(&[0xE8, generation.0, rank as u64, done], longest);
        let input = Input::CallDone { generation, rank: Rank(rank as u32), done };
        self.agenda.set(self.now + moment, Happening::Process { worker, incarnation, input });
    }

    fn runs(&self, seat: &Seat) -> bool {
        let process = self.workers.get(seat.worker).and_then(|worker| worker.process.as_ref());
        process.is_some_and(|process| Some(process.incarnation) == seat.incarnation && !process.stopped)
            && !seat.left
    }

    fn link_to_successor(&self, exchange: &Exchange, rank: usize) -> bool {
        let [_, next] = exchange.neighbours(rank);
        let node = |rank: usize| Node::Worker(exchange.seats[rank].worker);
        rank == next || self.links.connects(node(rank), node(next))
    }

    /// The rank's own moment has come, unless its call ended otherwise before.
    pub fn take_result(
        &mut self,
        generation: Generation,
        rank: Rank,
        done: u64,
    ) -> Option<(Call, CallResult)> {
        let seat = self.seat(generation, rank).filter(|seat| seat.done == done)?;
        let Inside { call, result: Some(result), .. } = seat.inside.take()? else { return None };
        seat.done += 1;
        Some((call, result))
    }

    /// Whether the call that it entered is still the one it is in.
    pub fn still_waits(&mut self, generation: Generation, rank: Rank, done: u64) -> Option<Call> {
        let seat = self.seat(generation, rank).filter(|seat| seat.done == done)?;
        seat.inside.as_ref().filter(|inside| inside.result.is_none()).map(|inside| inside.call)
    }

    /// Another thread of the process breaks the exchange off.
    pub fn abort_exchange(&mut self, generation: Generation, worker: usize) {
        let Some(exchange) = self.exchanges.get_mut(&generation) else { return };
        let Some(rank) = exchange.seats.iter().position(|seat| seat.worker == worker) else { return };
        exchange.seats[rank].aborted = true;
        if exchange.seats[rank].inside.is_some() {
            self.fail_call(generation, Rank(rank as u32), CallError::Aborted);
        }
    }

    /// A neighbour's connection has ended, as this rank's kernel tells it.
    pub fn peer_closed(&mut self, generation: Generation, rank: Rank, by: Rank) {
        let Some(seat) = self.seat(generation, rank) else { return };
        seat.closed_by.get_or_insert(by);
        // While the ring forms, whoever is not there is waited for.
        if seat.inside.as_ref().is_some_and(|inside| inside.call != Call::Connect) {
            self.fail_call(generation, rank, CallError::PeerClosed(by));
        }
    }

    pub fn fail_call(&mut self, generation: Generation, rank: Rank, error: CallError) {
        let waited = self.waited(generation, rank, error);
        let Some(seat) = self.seat(generation, rank) else { return };
        seat.inside = None;
        let worker = seat.worker;
        self.call_failed(worker, generation, error, waited);
    }

    /// The evidence of one rank.
    fn waited(&self, generation: Generation, rank: Rank, error: CallError) -> Option<Waited> {
        let exchange = self.exchanges.get(&generation)?;
        let at = rank.0 as usize;
        let seat = exchange.seats.get(at)?;
        let inside = seat.inside.as_ref()?;
        let [predecessor, _] = exchange.neighbours(at);
        let connecting = inside.call == Call::Connect;
        let peer = match error {
            CallError::PeerClosed(peer) => peer,
            _ if connecting => Rank(self.missing_neighbour(exchange, at).unwrap_or(predecessor) as u32),
            _ => Rank(predecessor as u32),
        };
        // What came in one round goes out in the next, and one's own part in the first.
        let (before, last) = (seat.done.saturating_sub(1) * CALL, 2 * (exchange.seats.len() as u64 - 1));
        let rounds = self.rounds_received(exchange, at).min(last);
        let (received, sent) = (before + rounds * ROUND, before + (rounds + 1).min(last) * ROUND);
        Some(Waited {
            peer,
            step: musher_proto::ids::Step(inside.call.step()),
            phase: inside.call.phase().into(),
            ms: (self.now - inside.since).as_millis() as u64,
            received: if connecting { 0 } else { received },
            // The kernel takes it, whatever the link does.
            sent: if connecting { 0 } else { sent },
            closed: matches!(error, CallError::PeerClosed(_)),
            batch_norm: false,
        })
    }

    /// As far as the call got: data goes round the ring, and each rank that is not in the call, and each
    /// cut link, stops what should go through it.
    fn rounds_received(&self, exchange: &Exchange, rank: usize) -> u64 {
        let world = exchange.seats.len();
        let mut at = rank;
        for rounds in 0..world as u64 {
            let [predecessor, _] = exchange.neighbours(at);
            let seat = &exchange.seats[predecessor];
            let same_call = seat.done == exchange.seats[rank].done && seat.inside.is_some();
            if !same_call || !self.runs(seat) || !self.link_to_successor(exchange, predecessor) {
                return rounds;
            }
            at = predecessor;
        }
        2 * world as u64
    }

    /// The rank closes its connections; its neighbours' kernels hear of it, unless the machine is gone.
    pub fn close_seat(&mut self, generation: Generation, worker: usize, vanish: bool) {
        let now = self.now;
        let Some(exchange) = self.exchanges.get_mut(&generation) else { return };
        let Some(rank) = exchange.seats.iter().position(|seat| seat.worker == worker) else { return };
        let neighbours = exchange.neighbours(rank);
        let seat = &mut exchange.seats[rank];
        seat.inside = None;
        if std::mem::replace(&mut seat.left, true) {
            return;
        }
        for neighbour in neighbours.into_iter().filter(|&neighbour| !vanish && neighbour != rank) {
            let latency = self.links.latency(self.dice, Node::Worker(worker), Node::Worker(neighbour));
            let (rank, by) = (Rank(neighbour as u32), Rank(rank as u32));
            self.agenda.set(now + latency, Happening::PeerClosed { generation, rank, by });
        }
        if self.exchanges.get(&generation).is_some_and(|exchange| exchange.seats.iter().all(|seat| seat.left))
        {
            self.exchanges.remove(&generation);
        }
    }

    /// The end of a connection is on its way to `rank`; a cut link holds it.
    pub fn peer_closes(&mut self, generation: Generation, rank: Rank, by: Rank) {
        let Some(exchange) = self.exchanges.get(&generation) else { return };
        let worker = exchange.seats[rank.0 as usize].worker;
        let Some(incarnation) = exchange.seats[rank.0 as usize].incarnation else { return };
        let from = Node::Worker(exchange.seats[by.0 as usize].worker);
        if !self.links.carries(from, Node::Worker(worker)) {
            return self.agenda.set(self.now + ms(500), Happening::PeerClosed { generation, rank, by });
        }
        self.process(worker, incarnation, Input::PeerClosed { generation, rank, by });
    }

    /// Links were mended, or a process goes on.
    pub fn stalled_calls_go_on(&mut self) {
        for generation in self.exchanges.keys().copied().collect::<Vec<_>>() {
            self.complete_if_possible(generation);
        }
    }
}
