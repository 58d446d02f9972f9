//! A worker's process around the real session, as `worker/src/shell.rs` is: it carries messages, sends
//! heartbeats, breaks exchanges off, looks for a lost coordinator, and ends. Around it, what starts
//! processes again.

use std::{cell::Cell, collections::BTreeSet, rc::Rc};

use musher_proto::{
    ids::{Generation, Rank, WorkerId},
    message::{DataFacts, Failed, Fenced, FromWorker, Join, ToWorker},
};
use musher_session::{Command, Exit, Identity, Input as SessionInput, Output, Report, Session};

use super::{
    clock::{Time, ms, seconds},
    network::{Connection, Item, Node, Side},
    trainer::{Order, Thread},
    world::{Happening, World},
};

const RETRY: Time = ms(200);
/// An attempt over a link that swallows it.
const CONNECT_TIMEOUT: Time = ms(5000);
/// How long a fresh process looks for its coordinator.
const FIRST_PATIENCE: Time = ms(60_000);

#[derive(Debug)]
pub struct Worker {
    pub name: WorkerId,
    pub process: Option<Process>,
    pub starts: u64,
    /// It ended as one that is not started again.
    pub retired: bool,
    /// What its data set is; a stranger's differs.
    pub genuine: bool,
    failures: u32,
    /// Once it was let go.
    pub comes_back_after: Option<Time>,
    /// Its training thread hangs, outside the exchange.
    pub hangs_until: Time,
    /// The last SIGCONT.
    pub resumed_at: Time,
    /// 0: as fast as the others.
    pub slowness: f64,
}

#[derive(Debug)]
pub struct Process {
    pub incarnation: u64,
    pub began: Time,
    /// SIGSTOP.
    pub stopped: bool,
    /// What it will find when it goes on.
    pending: Vec<Input>,
    pub session: Option<Session>,
    pub connection: Option<u64>,
    patience: Time,
    lost_at: Option<Time>,
    /// The generation that an abort is for.
    exchange: Option<Generation>,
    /// Generations whose exchange was broken off, perhaps before the thread came to it.
    pub aborted: BTreeSet<Generation>,
    stop: Rc<Cell<bool>>,
    pub thread: Thread,
    /// When its last report reaches the shell.
    pub reported: Time,
    pub leave_wanted: bool,
    leaving: Option<Leaving>,
}

/// The training thread is to break its generation off, and to come to this order.
#[derive(Debug)]
struct Leaving {
    order: u64,
    /// Until it counts as stuck.
    heartbeats: u32,
}

/// What a process may find to do.
#[derive(Debug)]
pub enum Input {
    Connect { until: Time },
    Received { connection: u64, item: Box<Item> },
    Prepared,
    HeartbeatDue,
    Reported { generation: Generation, report: Box<Report> },
    ThreadWakes { timer: u64 },
    CallDone { generation: Generation, rank: Rank, done: u64 },
    OutOfPatience { generation: Generation, rank: Rank, done: u64 },
    PeerClosed { generation: Generation, rank: Rank, by: Rank },
    Terminate,
}

impl Worker {
    pub fn new(name: String, genuine: bool) -> Self {
        Self {
            name: WorkerId(name),
            process: None,
            starts: 0,
            retired: false,
            genuine,
            failures: 0,
            comes_back_after: None,
            hangs_until: Time::ZERO,
            resumed_at: Time::ZERO,
            slowness: 0.0,
        }
    }

    pub fn runs(&self) -> bool {
        self.process.as_ref().is_some_and(|process| !process.stopped)
    }
}

impl World {
    pub fn start_worker(&mut self, worker: usize) {
        let (now, seed) = (self.now, self.job.seed);
        let host = &mut self.workers[worker];
        if host.process.is_some() || host.retired || self.coordinator.outcome.is_some() {
            return;
        }
        host.starts += 1;
        (host.hangs_until, host.slowness) = (Time::ZERO, 0.0);
        let incarnation = host.starts;
        host.process = Some(Process {
            incarnation,
            began: now,
            stopped: false,
            pending: Vec::new(),
            session: None,
            connection: None,
            patience: FIRST_PATIENCE,
            lost_at: None,
            exchange: None,
            aborted: BTreeSet::new(),
            stop: Rc::default(),
            thread: Thread::new(seed, now),
            reported: now,
            leave_wanted: false,
            leaving: None,
        });
        self.note(|world| format!("{} starts, incarnation {incarnation}", world.workers[worker].name));
        self.later(worker, ms(5), Input::Connect { until: now + FIRST_PATIENCE });
        self.later(worker, self.heartbeat(), Input::HeartbeatDue);
    }

    fn heartbeat(&self) -> Time {
        ms(1000).min(ms(self.scenario.knobs.heartbeat_timeout_ms) / 5)
    }

    pub fn later(&mut self, worker: usize, after: Time, input: Input) {
        let Some(process) = &self.workers[worker].process else { return };
        let incarnation = process.incarnation;
        self.agenda.set(self.now + after, Happening::Process { worker, incarnation, input });
    }

    /// Something for a process to do: at once, or when it goes on. Nothing, if it is another by now.
    pub fn process(&mut self, worker: usize, incarnation: u64, input: Input) {
        let process = self.workers[worker].process.as_mut().filter(|p| p.incarnation == incarnation);
        match process {
            None => {}
            Some(process) if process.stopped => process.pending.push(input),
            Some(_) => self.perform_input(worker, input),
        }
    }

    fn perform_input(&mut self, worker: usize, input: Input) {
        match input {
            Input::Connect { until } => self.connect(worker, until),
            Input::Received { connection, item } => self.worker_receives(worker, connection, *item),
            Input::Prepared => {
                let host = &self.workers[worker];
                let incarnation = host.starts;
                let facts = self.facts(host.genuine);
                let ring_address = format!("{}:{incarnation}", host.name);
                self.tell_session(
                    worker,
                    SessionInput::Prepared(Join::of_newcomer(facts, ring_address, "cpu")),
                );
            }
            Input::HeartbeatDue => {
                let (now, step_ms) = (self.now, self.scenario.knobs.step_ms as f64);
                let step_ms = step_ms * self.workers[worker].slowness.max(1.0);
                if self.thread_is_stuck(worker) {
                    self.coverage.count("processes ended as their thread is stuck");
                    let reason = "the training thread is stuck".into();
                    let report = Report::Failed(Failed { reason, any_worker: false });
                    return self
                        .tell_session(worker, SessionInput::Reported { generation: Generation(0), report });
                }
                let Some(process) = &self.workers[worker].process else { return };
                let progress = process.thread.board.read(&process.thread.replica, step_ms, now);
                if process.session.is_some() {
                    self.tell_session(worker, SessionInput::HeartbeatDue(progress));
                }
                self.later(worker, self.heartbeat(), Input::HeartbeatDue);
            }
            Input::Reported { generation, report } => {
                self.tell_session(worker, SessionInput::Reported { generation, report: *report });
            }
            Input::ThreadWakes { timer } => self.thread_wakes(worker, timer),
            Input::CallDone { generation, rank, done } => self.call_done(worker, generation, rank, done),
            Input::OutOfPatience { generation, rank, done } => {
                if let Some(call) = self.still_waits(generation, rank, done) {
                    use super::exchange::{Call, CallError};
                    self.coverage.count("ring calls out of patience");
                    let error =
                        if call == Call::Connect { CallError::NotFormed } else { CallError::TimedOut };
                    self.fail_call(generation, rank, error);
                }
            }
            Input::PeerClosed { generation, rank, by } => self.peer_closed(generation, rank, by),
            Input::Terminate => {
                let Some(process) = &mut self.workers[worker].process else { return };
                process.leave_wanted = true;
                if process.session.is_some() {
                    self.tell_session(worker, SessionInput::LeaveWanted);
                } else {
                    self.end_process(worker, false);
                }
            }
        }
    }

    /// It was to leave its generation long ago.
    fn thread_is_stuck(&mut self, worker: usize) -> bool {
        let Some(process) = &mut self.workers[worker].process else { return false };
        let Some(leaving) = &mut process.leaving else { return false };
        if process.thread.begun >= leaving.order {
            process.leaving = None;
            return false;
        }
        leaving.heartbeats = leaving.heartbeats.saturating_sub(1);
        leaving.heartbeats == 0
    }

    pub fn facts(&self, genuine: bool) -> DataFacts {
        DataFacts {
            digest: if genuine { "d1" } else { "another" }.into(),
            train_samples: self.scenario.knobs.train_samples,
            val_samples: self.scenario.knobs.val_samples,
        }
    }

    /// Tries to reach the coordinator, again and again until `until`.
    fn connect(&mut self, worker: usize, until: Time) {
        let link = self.links.connects(Node::Worker(worker), Node::Coordinator);
        let Some(process) = &self.workers[worker].process else { return };
        let first = process.session.is_none();
        match &self.coordinator.life {
            Some(life) if link => {
                let (life, incarnation) = (life.id, process.incarnation);
                let connection = self.open_connection(Connection::new(worker, incarnation, life, first));
                let Some(process) = &mut self.workers[worker].process else { return };
                process.connection = Some(connection);
                if !first {
                    return self.tell_session(worker, SessionInput::Connected);
                }
                let identity = Identity {
                    worker: self.workers[worker].name.clone(),
                    incarnation,
                    host: "h".into(),
                    device: "cpu".into(),
                };
                let (session, outputs) = Session::start(identity);
                let Some(process) = &mut self.workers[worker].process else { return };
                process.session = Some(session);
                self.perform_outputs(worker, outputs);
            }
            _ if self.now >= until && first => {
                self.exit(worker, Exit::Failed { reason: "no coordinator".into() })
            }
            _ if self.now >= until => {
                self.tell_session(worker, SessionInput::CoordinatorLost { reason: "no answer".into() });
            }
            _ => {
                let attempt = if link { Time::ZERO } else { CONNECT_TIMEOUT };
                self.later(worker, attempt + RETRY, Input::Connect { until });
            }
        }
    }

    fn worker_receives(&mut self, worker: usize, connection: u64, item: Item) {
        let Some(process) = &mut self.workers[worker].process else { return };
        if process.connection != Some(connection) {
            return;
        }
        match item {
            Item::ToWorker(message) => {
                process.lost_at = None;
                self.tell_session(worker, SessionInput::Received(message));
            }
            Item::FromWorker(_) => {}
            Item::End => {
                process.connection = None;
                self.hang_up(connection, Side::Worker);
                self.tell_session(worker, SessionInput::Disconnected { reason: "the stream ended".into() });
            }
        }
    }

    pub fn tell_session(&mut self, worker: usize, input: SessionInput) {
        if let SessionInput::Received(Fenced { term, generation, body }) = &input {
            self.note(|world| {
                let body: String = format!("{body:?}").chars().take(150).collect();
                format!("{} receives ({term}, {generation}) {body}", world.workers[worker].name)
            });
        }
        let Some(process) = &mut self.workers[worker].process else { return };
        let Some(session) = &mut process.session else { return };
        let outputs = session.handle(input);
        self.perform_outputs(worker, outputs);
    }

    fn perform_outputs(&mut self, worker: usize, outputs: Vec<Output>) {
        for output in outputs {
            let now = self.now;
            let Some(process) = &mut self.workers[worker].process else { return };
            match output {
                Output::Send(message) => self.say(worker, message),
                Output::Reconnect => {
                    let left = process.patience.saturating_sub(now - *process.lost_at.get_or_insert(now));
                    self.coverage.count("workers that lost their coordinator");
                    self.later(worker, RETRY, Input::Connect { until: now + RETRY + left });
                }
                Output::Prepare { job } => {
                    process.patience = seconds(job.cluster.coordinator_timeout_s);
                    let opening = self.dice.delay(&[0x0DA7A, worker as u64, process.incarnation], ms(800));
                    self.later(worker, ms(10) + opening, Input::Prepared);
                }
                Output::Command { generation, command } => self.command(worker, generation, command),
                Output::AbortExchange => {
                    if let Some(generation) = process.exchange.take() {
                        process.aborted.insert(generation);
                        self.abort_exchange(generation, worker);
                    }
                }
                Output::Exit(exit) => self.exit(worker, exit),
            }
        }
    }

    fn say(&mut self, worker: usize, message: Fenced<FromWorker>) {
        let Some(connection) = self.connection_of(worker) else { return };
        self.transmit(connection, Side::Coordinator, Item::FromWorker(message));
    }

    pub fn connection_of(&self, worker: usize) -> Option<u64> {
        self.workers[worker].process.as_ref()?.connection
    }

    fn command(&mut self, worker: usize, generation: Generation, command: Command) {
        let Some(process) = &mut self.workers[worker].process else { return };
        let order = match command {
            Command::Form(form) => {
                process.exchange = Some(generation);
                Order::Form(form)
            }
            Command::Train(train) => {
                process.stop = Rc::default();
                Order::Train { train, stop: process.stop.clone() }
            }
            Command::Pause => return process.stop.set(true),
            Command::Validate(validate) => Order::Validate(validate),
            Command::Save { term, save } => Order::Save { term, save },
            Command::Leave => Order::Leave,
        };
        let breaks_off = matches!(order, Order::Form(_) | Order::Leave);
        let beats = 5.0 * self.bounds.formation.as_secs_f64() / self.heartbeat().as_secs_f64();
        let Some(process) = &mut self.workers[worker].process else { return };
        let begun = process.thread.begun;
        if breaks_off && process.leaving.as_ref().is_none_or(|leaving| begun >= leaving.order) {
            process.leaving = Some(Leaving { order: process.thread.given + 1, heartbeats: beats as u32 + 2 });
        }
        self.order(worker, generation, order);
    }

    fn exit(&mut self, worker: usize, exit: Exit) {
        let now = self.now;
        self.note(|world| format!("{} exits: {exit:?}", world.workers[worker].name));
        let Some(process) = &self.workers[worker].process else { return };
        let lived = now - process.began;
        self.end_process(worker, false);
        let host = &mut self.workers[worker];
        match exit {
            Exit::Resumable if host.comes_back_after.is_some() => {
                let back_after = host.comes_back_after.take().unwrap_or_default();
                self.agenda.set(now + back_after, Happening::WorkerStarts { worker });
            }
            Exit::Finished | Exit::Resumable => host.retired = true,
            Exit::Failed { .. } | Exit::Unfit { .. } if !host.genuine => host.retired = true,
            // Somebody starts it again, if not its launcher.
            Exit::Failed { .. } | Exit::Unfit { .. } | Exit::Broken { .. } => {
                host.failures = if lived > ms(60_000) { 0 } else { (host.failures + 1).min(6) };
                let backoff = ms(250) * (1 << host.failures);
                self.agenda.set(now + backoff, Happening::WorkerStarts { worker });
            }
        }
        self.replace_the_retired();
    }

    /// The process is gone, by itself or by a signal. `vanish`: its machine too.
    pub fn end_process(&mut self, worker: usize, vanish: bool) {
        let Some(process) = self.workers[worker].process.take() else { return };
        if let Some(connection) = process.connection {
            match vanish {
                false => self.hang_up(connection, Side::Worker),
                true => {
                    if let Some(connection) = self.connections.get_mut(&connection) {
                        (connection.at_worker, connection.vanished) = (false, true);
                    }
                }
            }
        }
        for generation in self.exchanges.keys().copied().collect::<Vec<_>>() {
            let seated = self.exchanges.get(&generation).is_some_and(|exchange| {
                exchange
                    .seats
                    .iter()
                    .any(|seat| seat.worker == worker && seat.incarnation == Some(process.incarnation))
            });
            if seated {
                self.close_seat(generation, worker, vanish);
            }
        }
    }

    pub fn stop_process(&mut self, worker: usize) {
        if let Some(process) = &mut self.workers[worker].process {
            process.stopped = true;
        }
    }

    pub fn continue_process(&mut self, worker: usize) {
        let Some(process) = self.workers[worker].process.as_mut().filter(|process| process.stopped) else {
            return;
        };
        process.stopped = false;
        let (incarnation, pending) = (process.incarnation, std::mem::take(&mut process.pending));
        self.workers[worker].resumed_at = self.now;
        self.note(|world| format!("{} goes on after SIGCONT", world.workers[worker].name));
        for input in pending {
            self.process(worker, incarnation, input);
        }
        self.stalled_calls_go_on();
    }

    /// Whether the worker has been told of the message's generation in a way that would make it act.
    pub fn forge_to_worker(&mut self, worker: usize, message: Fenced<ToWorker>) {
        let Some(process) = &mut self.workers[worker].process else { return };
        let Some(session) = &mut process.session else { return };
        let before = format!("{session:?}");
        let outputs = session.handle(SessionInput::Received(message.clone()));
        let after = format!("{session:?}");
        self.check_stale(
            outputs.is_empty() && before == after,
            &format!("{message:?} made a worker {outputs:?}"),
        );
    }
}
