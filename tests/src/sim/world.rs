//! The whole of a simulation: the real core and the real sessions, joined by models of what is between
//! them, and one agenda of what happens next.

use std::collections::BTreeMap;

use musher_coordinator::core::{Commit, Event, Outcome};
use musher_proto::{
    ids::{Epoch, Session, Term},
    message::PartHeader,
};
use musher_proto::{
    ids::{Generation, Rank},
    job::JobConfig,
    message::{Fenced, FromWorker, Hello, Interrupted, Join, PROTOCOL, ToWorker, Train, Welcome},
};

use super::{
    clock::{Agenda, Dice, Time, ms},
    coordinator::{Coordinator, Death, Upload},
    coverage::Coverage,
    exchange::Exchange,
    invariants::{Ledger, Violation},
    network::{Connection, Item, Links, Node, Side},
    process::{Input, Worker},
    replica::Replica,
    scenario::{Fault, Scenario, Stale, Stranger},
    store::Store,
};

/// Workers that may come beside the first ones.
const SPARE: usize = 16;
/// HTTP/2's keepalive, of the coordinator and of a worker's first connection: how often it asks, and how
/// long it waits for an answer.
const PING: (Time, Time) = (ms(5000), ms(10_000));

pub struct World {
    pub now: Time,
    pub scenario: Scenario,
    pub job: JobConfig,
    pub dice: Dice,
    pub agenda: Agenda<Happening>,
    pub links: Links,
    pub connections: BTreeMap<u64, Connection>,
    pub coordinator: Coordinator,
    pub workers: Vec<Worker>,
    pub exchanges: BTreeMap<Generation, Exchange>,
    pub store: Store,
    pub uploads: BTreeMap<u64, Upload>,
    pub bounds: Bounds,
    pub ledger: Ledger,
    pub coverage: Coverage,
    pub trace: Option<Vec<String>>,
    pub violation: Option<Violation>,
    pub calm_since: Option<Time>,
    pub ended_at: Option<Time>,
    pub last_step: Time,
    pub last_spin: Time,
    /// Parts that were lost for a reason of the world's, not of the protocol's.
    pub store_failures: u64,
    pub next_id: u64,
}

/// The longest waits that the protocol allows.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub formation: Time,
    /// A call of the ring without any progress.
    pub ring: Time,
    /// From calm to the run's end.
    pub liveness: Time,
}

pub enum Happening {
    Fault(usize),
    FaultEnds(usize),
    Calm,
    Arrival { connection: u64, side: Side },
    Ping { connection: u64, side: Side },
    CoordinatorStarts,
    CoordinatorTimer { life: u64, timer: u64 },
    CommitDue { life: u64, commit: Box<Commit>, parts: Vec<(PartHeader, Replica)> },
    Told { life: u64, event: Box<Event> },
    Upload { id: u64 },
    WorkerStarts { worker: usize },
    Process { worker: usize, incarnation: u64, input: Input },
    PeerClosed { generation: Generation, rank: Rank, by: Rank },
}

/// How a simulation ended.
#[derive(Debug)]
pub struct Report {
    pub violation: Option<Violation>,
    pub outcome: Option<Outcome>,
    pub coverage: Coverage,
    pub trace: Vec<String>,
    /// Virtual time.
    pub took: Time,
}

impl World {
    pub fn new(scenario: Scenario, tracing: bool) -> Self {
        let job = scenario.knobs.job();
        let (heartbeat, step) = (ms(scenario.knobs.heartbeat_timeout_ms), ms(scenario.knobs.step_timeout_ms));
        let steps = u64::from(scenario.knobs.epochs) * scenario.knobs.steps_per_epoch();
        let ring = 6 * step + heartbeat;
        let work = (ms(scenario.knobs.step_ms * 3 + 200) + ms(scenario.knobs.upload_ms)) * steps as u32;
        // Two full waits on the longest bench, and some of all else.
        let liveness = 4 * work + 40 * step + 4 * ring + ms(120_000);
        let mut world = Self {
            now: Time::ZERO,
            dice: Dice(scenario.seed),
            job,
            agenda: Agenda::default(),
            links: Links::default(),
            connections: BTreeMap::new(),
            coordinator: Coordinator::default(),
            workers: (0..scenario.knobs.team).map(|index| Worker::new(format!("w{index}"), true)).collect(),
            exchanges: BTreeMap::new(),
            store: Store::default(),
            uploads: BTreeMap::new(),
            bounds: Bounds { formation: step, ring, liveness },
            ledger: Ledger::default(),
            coverage: Coverage::default(),
            trace: tracing.then(Vec::new),
            violation: None,
            calm_since: None,
            ended_at: None,
            last_step: Time::ZERO,
            last_spin: Time::ZERO,
            store_failures: 0,
            next_id: 0,
            scenario,
        };
        world.agenda.set(Time::ZERO, Happening::CoordinatorStarts);
        for worker in 0..world.workers.len() {
            let after = world.dice.delay(&[0x57A, worker as u64], ms(3000));
            world.agenda.set(after, Happening::WorkerStarts { worker });
        }
        for (index, (at, _)) in world.scenario.faults.iter().enumerate() {
            world.agenda.set(ms(*at), Happening::Fault(index));
        }
        world.agenda.set(ms(world.scenario.calm_ms), Happening::Calm);
        world
    }

    /// Runs until all is over, or an invariant is violated.
    pub fn run(mut self) -> Report {
        while self.violation.is_none() {
            let Some((at, happening)) = self.agenda.next() else { break };
            self.now = at;
            self.happens(happening);
            self.after_happening();
            if self.coordinator.outcome.is_some() && self.ended_at.is_none() {
                self.ended_at = Some(self.now);
                self.calm();
            }
            if self.ended_at.is_some() && self.workers.iter().all(|worker| worker.process.is_none()) {
                break;
            }
        }
        if self.violation.is_none() {
            self.at_the_end();
        }
        Report {
            violation: self.violation,
            outcome: self.coordinator.outcome,
            coverage: self.coverage,
            trace: self.trace.unwrap_or_default(),
            took: self.now,
        }
    }

    fn happens(&mut self, happening: Happening) {
        match happening {
            Happening::Fault(index) => {
                if self.calm_since.is_none()
                    && let Some((_, fault)) = self.scenario.faults.get(index).cloned()
                {
                    self.note(|_| format!("fault: {fault:?}"));
                    self.coverage.count(name_of(&fault));
                    self.fault(index, fault);
                }
            }
            Happening::FaultEnds(index) => {
                if self.calm_since.is_none()
                    && let Some((_, fault)) = self.scenario.faults.get(index).cloned()
                {
                    self.note(|_| format!("over: {fault:?}"));
                    self.fault_ends(fault);
                }
            }
            Happening::Calm => self.calm(),
            Happening::Arrival { connection, side } => self.arrival(connection, side),
            Happening::Ping { connection, side } => self.ping(connection, side),
            Happening::CoordinatorStarts => self.start_coordinator(),
            Happening::CoordinatorTimer { life, timer } => self.coordinator_timer(life, timer),
            Happening::CommitDue { life, commit, parts } => self.commit_due(life, *commit, parts),
            Happening::Told { life, event } => {
                if self.life(life).is_some() {
                    self.tell(*event);
                }
            }
            Happening::Upload { id } => self.upload_moves(id),
            Happening::WorkerStarts { worker } => self.start_worker(worker),
            Happening::Process { worker, incarnation, input } => self.process(worker, incarnation, input),
            Happening::PeerClosed { generation, rank, by } => self.peer_closes(generation, rank, by),
        }
    }

    pub fn note(&mut self, text: impl FnOnce(&Self) -> String) {
        if self.trace.is_some() {
            let line = format!("{:9.3} {}", self.now.as_secs_f64(), text(self));
            self.trace.as_mut().into_iter().for_each(|trace| trace.push(line.clone()));
        }
    }

    // ---- streams -----------------------------------------------------------------------------

    pub fn open_connection(&mut self, connection: Connection) -> u64 {
        self.next_id += 1;
        let id = self.next_id;
        self.connections.insert(id, connection);
        for side in [Side::Worker, Side::Coordinator] {
            let offset = self.keepalive(id, side).0.mul_f64(self.dice.share(&[0x916, id, side as u64]));
            self.agenda.set(self.now + offset, Happening::Ping { connection: id, side });
        }
        id
    }

    /// Sends something to `side`, if the other side still has its end.
    pub fn transmit(&mut self, id: u64, side: Side, item: Item) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if !connection.is_open_at(side.other()) && !matches!(item, Item::End) {
            return;
        }
        let (from, to) = connection.nodes(side);
        let arrives = self.now + self.links.latency(self.dice, from, to);
        let transit = connection.transit_to(side);
        let at = transit.push(item, arrives);
        if !transit.held {
            self.agenda.set(at, Happening::Arrival { connection: id, side });
        }
    }

    fn arrival(&mut self, id: u64, side: Side) {
        let now = self.now;
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let (from, to) = connection.nodes(side);
        let (worker, incarnation, life) = (connection.worker, connection.incarnation, connection.life);
        let is_open = connection.is_open_at(side);
        let transit = connection.transit_to(side);
        if transit.held || transit.items.front().is_none_or(|(at, _)| *at > now) {
            return;
        }
        if !self.links.carries(from, to) {
            transit.held = true;
            return;
        }
        let Some((_, item)) = transit.items.pop_front() else { return };
        if !is_open {
            return;
        }
        match side {
            Side::Coordinator if self.life(life).is_some() => self.coordinator_receives(id, item),
            Side::Coordinator => {}
            Side::Worker => {
                self.process(worker, incarnation, Input::Received { connection: id, item: Box::new(item) });
            }
        }
    }

    /// Ends a side's part of the stream; the other side will find its end.
    pub fn hang_up(&mut self, id: u64, side: Side) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.is_open_at(side) {
            connection.close_at(side);
            self.transmit(id, side.other(), Item::End);
        }
    }

    /// A worker that knows the job asks as often as its heartbeat time-out needs it.
    fn keepalive(&self, id: u64, side: Side) -> (Time, Time) {
        let knows_the_job = self.connections.get(&id).is_some_and(|connection| !connection.first);
        let heartbeat_timeout = ms(self.scenario.knobs.heartbeat_timeout_ms);
        match side {
            Side::Worker if knows_the_job => (heartbeat_timeout / 3, heartbeat_timeout * 2 / 3),
            Side::Worker | Side::Coordinator => PING,
        }
    }

    /// HTTP/2's keepalive, of one side.
    fn ping(&mut self, id: u64, side: Side) {
        let Some(connection) = self.connections.get(&id) else { return };
        if !connection.at_worker && !connection.at_coordinator {
            let empty = connection.to_worker.items.is_empty() && connection.to_coordinator.items.is_empty();
            if empty {
                self.connections.remove(&id);
            }
            return;
        }
        if !connection.is_open_at(side) {
            return;
        }
        let (from, to) = connection.nodes(side);
        let process = self.workers[connection.worker].process.as_ref();
        let process = process.filter(|process| process.incarnation == connection.incarnation);
        let life = self.life(connection.life);
        let (worker_runs, coordinator_runs) =
            (process.is_some_and(|process| !process.stopped), life.is_some_and(|life| !life.stopped));
        let i_run = match side {
            Side::Worker => worker_runs,
            Side::Coordinator => coordinator_runs,
        };
        let answers = self.links.connects(from, to)
            && worker_runs
            && coordinator_runs
            && connection.is_open_at(side.other());
        let now = self.now;
        let (worker, incarnation) = (connection.worker, connection.incarnation);
        let (interval, patience) = self.keepalive(id, side);
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let deaf = &mut connection.deaf[side as usize];
        match (answers, i_run) {
            (true, _) | (_, false) => *deaf = None,
            (false, true) => {
                if now - *deaf.get_or_insert(now) >= patience {
                    self.coverage.count("streams ended by keepalive");
                    return match side {
                        Side::Coordinator => self.coordinator_receives(id, Item::End),
                        Side::Worker => {
                            let item = Box::new(Item::End);
                            self.process(worker, incarnation, Input::Received { connection: id, item });
                        }
                    };
                }
            }
        }
        self.agenda.set(now + interval, Happening::Ping { connection: id, side });
    }

    /// What a cut link held goes on its way.
    fn links_mended(&mut self) {
        let held: Vec<(u64, Side)> = self
            .connections
            .iter()
            .flat_map(|(&id, connection)| {
                let to_worker = connection.to_worker.held.then_some((id, Side::Worker));
                let to_coordinator = connection.to_coordinator.held.then_some((id, Side::Coordinator));
                [to_worker, to_coordinator].into_iter().flatten()
            })
            .collect();
        for (id, side) in held {
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            let (from, to) = connection.nodes(side);
            if !self.links.carries(from, to) {
                continue;
            }
            let at = self.now + self.links.latency(self.dice, from, to);
            let transit = connection.transit_to(side);
            transit.held = false;
            for _ in 0..transit.items.len() {
                let due = transit.items.back().map_or(at, |(last, _)| at.max(*last));
                self.agenda.set(due, Happening::Arrival { connection: id, side });
            }
        }
        self.stalled_calls_go_on();
    }

    // ---- faults ------------------------------------------------------------------------------

    fn fault(&mut self, index: usize, fault: Fault) {
        let ends = |world: &mut Self, for_ms: u64| {
            world.agenda.set(world.now + ms(for_ms), Happening::FaultEnds(index));
        };
        match fault {
            Fault::KillCoordinator { after_actions, back_after_ms, vanish, lose_in_flight } => {
                let death = Death { back_after: ms(back_after_ms), vanish, lose_in_flight };
                match after_actions {
                    Some(left) if self.coordinator.life.is_some() => {
                        self.coordinator.dies_after = Some((left, death));
                    }
                    _ => self.kill_coordinator(death),
                }
            }
            Fault::StopCoordinator { for_ms, .. } => {
                self.stop_coordinator();
                ends(self, for_ms);
            }
            Fault::JumpClock { by_ms } => self.jump_clock(ms(by_ms)),
            Fault::KillWorker { worker, vanish, lose_in_flight, back_after_ms } => {
                let Some(host) = self.workers.get(worker) else { return };
                let connection = host.process.as_ref().and_then(|process| process.connection);
                if let Some(connection) = connection.filter(|_| lose_in_flight)
                    && let Some(connection) = self.connections.get_mut(&connection)
                {
                    connection.to_coordinator.items.clear();
                }
                self.end_process(worker, vanish);
                self.starts_again(worker, back_after_ms);
            }
            Fault::StopWorker { worker, for_ms } if worker < self.workers.len() => {
                self.stop_process(worker);
                ends(self, for_ms);
            }
            Fault::StickThread { worker, for_ms } => {
                let until = for_ms.map_or(Time::MAX, |for_ms| self.now + ms(for_ms));
                if let Some(worker) = self.workers.get_mut(worker).filter(|worker| worker.process.is_some()) {
                    worker.hangs_until = until.max(worker.hangs_until);
                }
            }
            Fault::SlowThread { worker, factor, for_ms } => {
                if let Some(worker) = self.workers.get_mut(worker) {
                    worker.slowness = factor;
                    ends(self, for_ms);
                }
            }
            Fault::Terminate { worker, back_after_ms } if worker < self.workers.len() => {
                self.later(worker, ms(0), Input::Terminate);
                self.workers[worker].comes_back_after = back_after_ms.map(ms);
            }
            Fault::Reset { worker } if worker < self.workers.len() => {
                let Some(connection) = self.connection_of(worker) else { return };
                self.transmit(connection, Side::Worker, Item::End);
                self.transmit(connection, Side::Coordinator, Item::End);
            }
            Fault::Drain { worker } => {
                let worker = self.workers.get(worker).map(|worker| worker.name.clone());
                worker.into_iter().for_each(|worker| self.tell(Event::DrainRequested { worker }));
            }
            Fault::StopRun => {
                self.ledger.stop_requested |= self.coordinator.life.is_some();
                self.tell(Event::StopRequested);
            }
            Fault::Newcomer => self.newcomer(true),
            Fault::Cut { from, to, both_ways, for_ms } => {
                self.links.cut(from, to);
                if both_ways {
                    self.links.cut(to, from);
                }
                ends(self, for_ms);
            }
            Fault::Partition { side, for_ms } => {
                for (inside, outside) in self.across(&side) {
                    self.links.cut(inside, outside);
                    self.links.cut(outside, inside);
                }
                ends(self, for_ms);
            }
            Fault::SlowLink { a, b, for_ms } => {
                self.links.slow_down(a, b);
                ends(self, for_ms);
            }
            Fault::DiskFull { for_ms } => {
                self.store.full += 1;
                self.store_failures += 1;
                ends(self, for_ms);
            }
            Fault::LoseUpload => self.lose_an_upload(),
            Fault::Stranger(stranger) => self.stranger(stranger),
            Fault::Stale { worker, stale, to_worker } => self.stale(worker, stale, to_worker),
            Fault::StopWorker { .. } | Fault::Terminate { .. } | Fault::Reset { .. } => {}
        }
    }

    fn fault_ends(&mut self, fault: Fault) {
        match fault {
            Fault::StopCoordinator { timers_first, .. } => self.continue_coordinator(timers_first),
            Fault::StopWorker { worker, .. } => self.continue_process(worker),
            Fault::SlowThread { worker, .. } => self.workers[worker].slowness = 0.0,
            Fault::Cut { from, to, both_ways, .. } => {
                self.links.mend(from, to);
                if both_ways {
                    self.links.mend(to, from);
                }
                self.links_mended();
            }
            Fault::Partition { side, .. } => {
                for (inside, outside) in self.across(&side) {
                    self.links.mend(inside, outside);
                    self.links.mend(outside, inside);
                }
                self.links_mended();
            }
            Fault::SlowLink { a, b, .. } => self.links.speed_up(a, b),
            Fault::DiskFull { .. } => self.store.full = self.store.full.saturating_sub(1),
            _ => {}
        }
    }

    /// Pairs with one end in `side`; of all machines that there will ever be.
    fn across(&self, side: &[Node]) -> Vec<(Node, Node)> {
        let all = (0..self.scenario.knobs.team + SPARE).map(Node::Worker).chain([Node::Coordinator]);
        let outside: Vec<Node> = all.filter(|node| !side.contains(node)).collect();
        side.iter().flat_map(|&inside| outside.iter().map(move |&outside| (inside, outside))).collect()
    }

    fn starts_again(&mut self, worker: usize, back_after_ms: Option<u64>) {
        if let Some(back_after) = back_after_ms {
            self.agenda.set(self.now + ms(back_after), Happening::WorkerStarts { worker });
        }
    }

    fn newcomer(&mut self, genuine: bool) {
        let worker = self.workers.len();
        if worker < self.scenario.knobs.team + SPARE {
            self.workers.push(Worker::new(format!("w{worker}"), genuine));
            self.start_worker(worker);
        }
    }

    /// Faults are over: all heals, all that stood goes on, and enough workers are there.
    fn calm(&mut self) {
        if self.calm_since.is_some() {
            return;
        }
        self.calm_since = Some(self.now);
        self.note(|_| "calm: from here on nothing bad happens".into());
        self.coordinator.dies_after = None;
        self.store.full = 0;
        self.links.mend_all();
        self.links_mended();
        self.continue_coordinator(false);
        for worker in 0..self.workers.len() {
            self.workers[worker].slowness = 0.0;
            self.continue_process(worker);
            if self.workers[worker].genuine {
                self.agenda.set(self.now + ms(100 * worker as u64), Happening::WorkerStarts { worker });
            }
        }
        self.replace_the_retired();
    }

    /// In calm there are as many workers as the job needs.
    pub fn replace_the_retired(&mut self) {
        if self.calm_since.is_none() || self.coordinator.outcome.is_some() {
            return;
        }
        let sound = self.workers.iter().filter(|worker| worker.genuine && !worker.retired).count();
        for _ in sound..self.scenario.knobs.min_workers as usize {
            self.newcomer(true);
        }
    }

    // ---- those who do not belong -------------------------------------------------------------

    fn stranger(&mut self, stranger: Stranger) {
        match stranger {
            // Whoever comes first says what the run's data is.
            Stranger::OtherData => {
                let begun = self.coordinator.disk.as_ref().is_some_and(|disk| disk.dataset_digest.is_some());
                return if begun {
                    self.newcomer(false)
                };
            }
            Stranger::OtherRun(worker) => return self.other_coordinator(worker),
            Stranger::OtherProtocol | Stranger::OlderIncarnation(_) => {}
        }
        let (worker, incarnation, protocol) = match stranger {
            Stranger::OlderIncarnation(worker) => {
                let Some(host) = self.workers.get(worker).filter(|_| self.is_connected(worker)) else {
                    return;
                };
                (host.name.clone(), host.starts - 1, PROTOCOL)
            }
            _ => ("stranger".into(), 1, PROTOCOL + 1),
        };
        let Some(session) = self.stranger_session() else { return };
        self.coverage.count("strangers turned away");
        let hello = Hello { protocol, worker, incarnation, host: "h".into(), device: "cpu".into() };
        self.tell(Event::SessionOpened { session, hello });
        let data = self.facts(true);
        let join = Join::of_newcomer(data, "stranger:1", "cpu");
        let term = self.coordinator.life.as_ref().map_or(Term(0), |life| life.term);
        let message = Fenced { term, generation: Generation(0), body: FromWorker::Join(join) };
        let (unmoved, actions) = self.core_unmoved_by(Event::MessageReceived { session, message });
        self.check_stranger(unmoved, &format!("{stranger:?} joined: {actions:?}"));
        self.tell(Event::SessionClosed { session, reason: "it closed the connection".into() });
    }

    /// A worker that looks for its coordinator finds another run's.
    fn other_coordinator(&mut self, worker: usize) {
        let Some(process) = self.workers.get_mut(worker).and_then(|worker| worker.process.as_mut()) else {
            return;
        };
        let Some(session) = process.session.as_mut().filter(|_| !process.stopped) else { return };
        let session_says = format!("{session:?}");
        if !session_says.contains("link: Down") || session_says.contains("welcome: None") {
            return; // it is not on its way back to any
        }
        let welcome = Welcome {
            session: Session(1),
            run: "r".into(),
            run_id: "another".into(),
            job_json: serde_json::to_string(&self.job).unwrap_or_default(),
        };
        let _ = session.handle(musher_session::Input::Connected);
        let message =
            Fenced { term: Term(u64::MAX / 2), generation: Generation(0), body: ToWorker::Welcome(welcome) };
        let outputs = session.handle(musher_session::Input::Received(message));
        self.coverage.count("coordinators of another run turned down");
        let exit = outputs.iter().any(|output| matches!(output, musher_session::Output::Exit(_)));
        let says = outputs.iter().any(|output| matches!(output, musher_session::Output::Send(_)));
        self.check_stranger(exit && !says, &format!("a worker told another run's coordinator {outputs:?}"));
        self.end_process(worker, false);
        self.starts_again(worker, Some(500));
    }

    fn is_connected(&self, worker: usize) -> bool {
        let session =
            self.connection_of(worker).and_then(|id| self.connections.get(&id)).and_then(|c| c.session);
        let life = self.coordinator.life.as_ref().filter(|life| !life.stopped);
        session.is_some_and(|session| life.is_some_and(|life| life.sessions.contains_key(&session)))
            && self
                .connection_of(worker)
                .and_then(|id| self.connections.get(&id))
                .is_some_and(|c| c.at_coordinator)
    }

    /// A message with another fence than the live one reaches somebody.
    fn stale(&mut self, worker: usize, stale: Stale, to_worker: bool) {
        if worker >= self.workers.len() || !self.is_connected(worker) {
            return;
        }
        let Some(life) = &self.coordinator.life else { return };
        let current = life.term;
        let newest = self.coordinator.disk.as_ref().map(|disk| disk.fences.generation).unwrap_or_default();
        let (term, generation) = match stale {
            Stale::OlderTerm => (Term(current.0 - 1), newest),
            Stale::OlderGeneration => (current, Generation(newest.0.saturating_sub(1))),
            Stale::NewerGeneration => (current, newest.next()),
        };
        if generation == Generation(0) {
            return;
        }
        self.coverage.count("stale messages");
        if to_worker {
            let Some(process) = self.workers[worker].process.as_ref().filter(|process| !process.stopped)
            else {
                return;
            };
            // What it was last told may be newer than what the coordinator lives by; older is all the same.
            let text = format!("{:?}", process.session);
            if text.contains(&format!("generation: Generation({})", generation.0))
                || text.contains("Greeting")
            {
                return;
            }
            let train = Train { epoch: Epoch(1), cursor: 0, end: 1 };
            for body in [ToWorker::Train(train), ToWorker::Abort { reason: "stale".into() }, ToWorker::Pause]
            {
                let has_heard_of_it = text.contains(&format!("term: Term({})", current.0));
                if has_heard_of_it && self.workers[worker].process.is_some() {
                    self.forge_to_worker(worker, Fenced { term, generation, body });
                }
            }
            return;
        }
        let session = self.connection_of(worker).and_then(|id| self.connections.get(&id)?.session);
        let Some(session) = session else { return };
        // One that comes back at work may still speak of the generation that it is at.
        let at_work = format!("{:?}", self.coordinator.life.as_ref().map(|life| &life.core));
        if at_work.contains("at_work: Some") {
            return;
        }
        let interrupted = Interrupted { held: None, reason: "stale".into(), waited: None };
        let message = Fenced { term, generation, body: FromWorker::Interrupted(interrupted) };
        let (unmoved, actions) = self.core_unmoved_by(Event::MessageReceived { session, message });
        self.check_stale(unmoved, &format!("a message of ({term}, {generation}) made the core {actions:?}"));
    }
}

fn name_of(fault: &Fault) -> &'static str {
    match fault {
        Fault::KillCoordinator { vanish: false, .. } => "fault: coordinator killed",
        Fault::KillCoordinator { vanish: true, .. } => "fault: coordinator's machine gone",
        Fault::StopCoordinator { .. } => "fault: coordinator stopped",
        Fault::JumpClock { .. } => "fault: clock jump",
        Fault::KillWorker { vanish: false, .. } => "fault: worker killed",
        Fault::KillWorker { vanish: true, .. } => "fault: worker's machine gone",
        Fault::StopWorker { .. } => "fault: worker stopped",
        Fault::StickThread { for_ms: Some(_), .. } => "fault: thread stuck for a while",
        Fault::StickThread { for_ms: None, .. } => "fault: thread stuck for ever",
        Fault::SlowThread { .. } => "fault: thread slow",
        Fault::Terminate { .. } => "fault: worker terminated",
        Fault::Reset { .. } => "fault: stream reset",
        Fault::Drain { .. } => "fault: drain",
        Fault::StopRun => "fault: stop requested",
        Fault::Newcomer => "fault: newcomer",
        Fault::Cut { both_ways: true, .. } => "fault: link cut",
        Fault::Cut { both_ways: false, .. } => "fault: link half open",
        Fault::Partition { .. } => "fault: partition",
        Fault::SlowLink { .. } => "fault: link slow",
        Fault::DiskFull { .. } => "fault: disk full",
        Fault::LoseUpload => "fault: upload lost",
        Fault::Stranger(_) => "fault: stranger",
        Fault::Stale { .. } => "fault: stale message",
    }
}
