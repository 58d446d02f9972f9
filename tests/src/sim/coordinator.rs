//! The coordinator's process around the real core, as `coordinator/src/service` is: sessions, uploads,
//! commits and timers feed events in, actions are performed in order, and it may die between any two.

use std::collections::{BTreeMap, VecDeque};

use musher_coordinator::core::{Action, Commit, Core, Event, Origin, Outcome, RunState};
use musher_proto::{
    ids::{CheckpointId, Generation, Session, Term},
    message::{Fenced, FromWorker, PartHeader, PartKind, Save, ToWorker},
};

use super::{
    clock::{Time, ms},
    network::{Item, Node, Side},
    replica::Replica,
    trainer::Transfer,
    world::{Happening, World},
};

#[derive(Debug, Default)]
pub struct Coordinator {
    pub life: Option<Life>,
    pub lives: u64,
    /// `state.json`.
    pub disk: Option<RunState>,
    pub outcome: Option<Outcome>,
    /// It dies when so many more actions are performed, and is back after a while.
    pub dies_after: Option<(u32, Death)>,
}

#[derive(Clone, Copy, Debug)]
pub struct Death {
    pub back_after: Time,
    /// Its machine is gone too: nobody's kernel is told.
    pub vanish: bool,
    pub lose_in_flight: bool,
}

#[derive(Debug)]
pub struct Life {
    pub id: u64,
    pub term: Term,
    pub core: Core,
    pub began: Time,
    /// Its clock is ahead of the world's.
    pub ahead: Time,
    /// SIGSTOP.
    pub stopped: bool,
    pending: VecDeque<Found>,
    pub sessions: BTreeMap<Session, Target>,
    next_session: u64,
    open: BTreeMap<CheckpointId, Open>,
    follow_ups: VecDeque<Event>,
    timer: u64,
    /// On their way, on threads of their own.
    pub commits: u32,
    /// How often its timer fired since time went on.
    spins: u32,
}

/// Where what is sent to a session goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Connection(u64),
    Stranger,
}

/// What a process that stood finds when it goes on.
#[derive(Debug)]
enum Found {
    Item { connection: u64, item: Item },
    Event(Event),
}

#[derive(Debug)]
struct Open {
    lineage: Generation,
    parts: Vec<(PartHeader, Replica)>,
}

/// A slice of a replica's state on its way up.
#[derive(Debug)]
pub struct Upload {
    header: PartHeader,
    /// Comes after it.
    weights: bool,
    state: Replica,
    connection: u64,
    /// The coordinator has its header.
    begun: bool,
}

impl World {
    pub fn start_coordinator(&mut self) {
        if self.coordinator.life.is_some() || self.coordinator.outcome.is_some() {
            return;
        }
        self.coordinator.lives += 1;
        let id = self.coordinator.lives;
        let mut state = self.coordinator.disk.clone().unwrap_or_default();
        state.fences.term = state.fences.term.next();
        if state.id.is_empty() {
            state.id = format!("run-{id}");
        }
        let resumed = if id > 1 { self.store.resume_point(&mut state) } else { None };
        let term = state.fences.term;
        self.note(|_| format!("the coordinator starts, term {term}, {:?}", state.fences));
        self.life_begins(&state, resumed.as_ref());
        let origin = Origin {
            job: self.job.clone(),
            run: "r".into(),
            state,
            resumed,
            listen: id > 1,
            entropy: [id as u8; 32],
        };
        let (core, actions) = Core::start(origin, Time::ZERO);
        self.coordinator.life = Some(Life {
            id,
            term,
            core,
            began: self.now,
            ahead: Time::ZERO,
            stopped: false,
            pending: VecDeque::new(),
            sessions: BTreeMap::new(),
            next_session: 0,
            open: BTreeMap::new(),
            follow_ups: VecDeque::new(),
            timer: 0,
            commits: 0,
            spins: 0,
        });
        self.perform_all(actions);
        self.arm_timer();
    }

    pub fn kill_coordinator(&mut self, death: Death) {
        let Death { back_after, vanish, lose_in_flight } = death;
        let Some(life) = self.coordinator.life.take() else { return };
        self.coordinator.dies_after = None;
        self.coverage.count("coordinator crashes");
        self.note(|_| format!("the coordinator dies: {death:?}"));
        let mut open = Vec::new();
        for (&id, connection) in &mut self.connections {
            if connection.life == life.id && connection.at_coordinator {
                if lose_in_flight {
                    connection.to_worker.items.clear();
                }
                open.push(id);
                (connection.at_coordinator, connection.vanished) = (!vanish, vanish);
            }
        }
        for connection in open {
            self.hang_up(connection, Side::Coordinator);
        }
        self.agenda.set(self.now + back_after, Happening::CoordinatorStarts);
    }

    pub fn life(&self, id: u64) -> Option<&Life> {
        self.coordinator.life.as_ref().filter(|life| life.id == id)
    }

    pub fn stop_coordinator(&mut self) {
        if let Some(life) = &mut self.coordinator.life {
            life.stopped = true;
        }
    }

    pub fn continue_coordinator(&mut self, timers_first: bool) {
        let Some(life) = self.coordinator.life.as_mut().filter(|life| life.stopped) else { return };
        life.stopped = false;
        let id = life.id;
        self.note(|_| "the coordinator goes on after SIGCONT".into());
        if timers_first {
            self.timer_fires();
        }
        while let Some(life) = self.coordinator.life.as_mut().filter(|life| life.id == id) {
            let Some(found) = life.pending.pop_front() else { break };
            match found {
                Found::Item { connection, item } => self.coordinator_receives(connection, item),
                Found::Event(event) => self.tell(event),
            }
        }
        self.arm_timer();
    }

    pub fn jump_clock(&mut self, by: Time) {
        if let Some(life) = &mut self.coordinator.life {
            life.ahead += by;
            self.coverage.count("clock jumps");
            self.listening_cut_short();
        }
        self.arm_timer();
    }

    pub fn core_now(&self) -> Time {
        self.coordinator.life.as_ref().map_or(Time::ZERO, |life| self.now - life.began + life.ahead)
    }

    /// An item of a stream arrives at the coordinator's machine.
    pub fn coordinator_receives(&mut self, connection: u64, item: Item) {
        let Some(open) = self.connections.get_mut(&connection) else { return };
        let Some(life) = self.coordinator.life.as_mut().filter(|life| life.id == open.life) else { return };
        if life.stopped {
            return life.pending.push_back(Found::Item { connection, item });
        }
        match item {
            Item::FromWorker(Fenced { body: FromWorker::Hello(hello), .. }) if open.session.is_none() => {
                life.next_session += 1;
                let session = Session(life.next_session);
                open.session = Some(session);
                life.sessions.insert(session, Target::Connection(connection));
                self.tell(Event::SessionOpened { session, hello });
            }
            Item::FromWorker(message) => {
                let (Some(session), worker) = (open.session, open.worker) else { return };
                self.message_arrives(session, worker, message);
            }
            Item::ToWorker(_) => {}
            Item::End => {
                let session = open.session;
                if let Some(session) = session {
                    life.sessions.remove(&session);
                }
                self.hang_up(connection, Side::Coordinator);
                if let Some(session) = session {
                    let reason = "its connection broke".into();
                    self.tell(Event::SessionClosed { session, reason });
                }
            }
        }
    }

    fn message_arrives(&mut self, session: Session, worker: usize, message: Fenced<FromWorker>) {
        self.before_message(session, worker, &message);
        self.tell(Event::MessageReceived { session, message });
    }

    /// The core hears of something, now or when the process goes on.
    pub fn tell(&mut self, event: Event) {
        let now = self.core_now();
        let Some(life) = &mut self.coordinator.life else { return };
        if life.stopped {
            return life.pending.push_back(Found::Event(event));
        }
        if self.trace.is_some()
            && !matches!(&event, Event::MessageReceived { message, .. } if matches!(message.body, FromWorker::Progress(_)))
        {
            let text: String = format!("core <- {event:?}").chars().take(330).collect();
            self.note(|_| text);
        }
        let Some(life) = &mut self.coordinator.life else { return };
        let actions = life.core.handle(now, event);
        self.perform_all(actions);
        self.arm_timer();
    }

    /// A stranger's or stale message: what the core does with it, and what it changes.
    pub fn core_unmoved_by(&mut self, event: Event) -> (bool, Vec<Action>) {
        let now = self.core_now();
        self.tell(Event::TimePassed);
        let Some(life) = self.coordinator.life.as_mut().filter(|life| !life.stopped) else {
            return (true, Vec::new());
        };
        // That it was heard of, and the deadline that follows, are allowed to change.
        let without_heard = |core: &Core| {
            let text = format!("{core:?}").replace("asked: Some(", "heard: ");
            let mut parts = text.split("heard: ");
            let first = parts.next().unwrap_or_default().to_owned();
            parts.fold(first, |all, part| all + part.split_once(',').map_or(part, |(_, rest)| rest))
        };
        let before = without_heard(&life.core);
        let actions = life.core.handle(now, event);
        let after = without_heard(&life.core);
        let differs = before.bytes().zip(after.bytes()).position(|(a, b)| a != b);
        if let Some(at) = differs {
            self.note(|_| {
                format!(
                    "the core was {:.200}, is {:.200}",
                    &before[at.saturating_sub(60)..],
                    &after[at.saturating_sub(60)..]
                )
            });
        }
        (before == after && actions.is_empty(), actions)
    }

    fn arm_timer(&mut self) {
        let Some(life) = &mut self.coordinator.life else { return };
        life.timer += 1;
        let Some(deadline) = life.core.next_deadline() else { return };
        // Timers fire a moment late, never early.
        let at = (life.began + deadline.saturating_sub(life.ahead)).max(self.now) + ms(1);
        let (life, timer) = (life.id, life.timer);
        self.agenda.set(at, Happening::CoordinatorTimer { life, timer });
    }

    pub fn coordinator_timer(&mut self, id: u64, timer: u64) {
        let now = self.now;
        let Some(life) = &mut self.coordinator.life else { return };
        if life.id != id || life.timer != timer || life.stopped {
            return;
        }
        life.spins = if now - self.last_spin > ms(1) { 0 } else { life.spins + 1 };
        self.last_spin = now;
        let spins = life.spins;
        self.check_spins(spins);
        self.timer_fires();
    }

    fn timer_fires(&mut self) {
        self.tell(Event::TimePassed);
    }

    fn perform_all(&mut self, actions: Vec<Action>) {
        let mut queue = VecDeque::from(actions);
        loop {
            self.before_actions(&queue);
            while let Some(action) = queue.pop_front() {
                if let Some((left, death)) = &mut self.coordinator.dies_after {
                    if *left == 0 {
                        let death = *death;
                        self.coverage.count("coordinator crashes between two actions");
                        return self.kill_coordinator(death);
                    }
                    *left -= 1;
                }
                self.before_action(&action);
                self.perform(action);
                if self.coordinator.life.is_none() {
                    return;
                }
            }
            let now = self.core_now();
            let Some(life) = &mut self.coordinator.life else { return };
            let Some(event) = life.follow_ups.pop_front() else { return };
            queue.extend(life.core.handle(now, event));
        }
    }

    fn perform(&mut self, action: Action) {
        if self.trace.is_some()
            && !matches!(action, Action::Emit(musher_coordinator::core::RunEvent::Progress(_)))
        {
            let text: String = format!("core -> {action:?}").chars().take(330).collect();
            self.note(|_| text);
        }
        let Some(life) = &mut self.coordinator.life else { return };
        match action {
            Action::Persist(state) => self.coordinator.disk = Some(*state),
            Action::Send { session, message } => self.send(session, message),
            Action::CloseSession { session } => {
                if let Some(Target::Connection(connection)) = life.sessions.remove(&session) {
                    // Its inbound half is read on until the worker hangs up too.
                    self.transmit(connection, Side::Worker, Item::End);
                }
            }
            Action::OpenCheckpoint { checkpoint, lineage, .. } => {
                life.open.remove(&checkpoint);
                if self.store.full > 0 || self.store.committed.contains_key(&checkpoint) {
                    let reason = "the checkpoint can't be begun".into();
                    life.follow_ups.push_back(Event::CheckpointFailed { checkpoint, reason });
                } else {
                    life.open.insert(checkpoint, Open { lineage, parts: Vec::new() });
                }
            }
            Action::CommitCheckpoint(commit) => self.commit(*commit),
            Action::AbandonCheckpoint { checkpoint } => {
                life.open.remove(&checkpoint);
            }
            Action::WriteSamples { .. } => {}
            Action::Emit(event) => self.event_told(&event),
            Action::End(outcome) => {
                self.coordinator.outcome = Some(outcome);
                self.kill_coordinator(Death { back_after: Time::ZERO, vanish: false, lose_in_flight: false });
                self.coverage.take_back("coordinator crashes");
            }
        }
    }

    fn send(&mut self, session: Session, message: Fenced<ToWorker>) {
        let target = self.coordinator.life.as_ref().and_then(|life| life.sessions.get(&session).copied());
        match target {
            Some(Target::Connection(connection)) => {
                self.transmit(connection, Side::Worker, Item::ToWorker(message));
            }
            Some(Target::Stranger) => self.stranger_is_sent(&message),
            None => {}
        }
    }

    // ---- checkpoints -------------------------------------------------------------------------

    /// On a thread of its own: it becomes visible at one moment, and is told of at a later one.
    fn commit(&mut self, commit: Commit) {
        let Some(life) = &mut self.coordinator.life else { return };
        let Some(Open { parts, .. }) = life.open.remove(&commit.checkpoint) else {
            let (checkpoint, reason) = (commit.checkpoint, "it is not open".into());
            return life.follow_ups.push_back(Event::CheckpointFailed { checkpoint, reason });
        };
        life.commits += 1;
        let life = life.id;
        let key = [0xC0, life, commit.position.applied.0, commit.position.lineage.0];
        let takes = ms(1) + self.dice.delay(&key, ms(self.scenario.knobs.upload_ms));
        self.agenda.set(self.now + takes, Happening::CommitDue { life, commit: Box::new(commit), parts });
    }

    pub fn commit_due(&mut self, id: u64, commit: Commit, parts: Vec<(PartHeader, Replica)>) {
        match self.life(id) {
            None => return, // it died before
            Some(life) if life.stopped => {
                let happening = Happening::CommitDue { life: id, commit: Box::new(commit), parts };
                return self.agenda.set(self.now + ms(200), happening);
            }
            Some(_) => {}
        }
        if let Some(life) = &mut self.coordinator.life {
            life.commits -= 1;
        }
        let checkpoint = commit.checkpoint.clone();
        let event = match self.store.commit(&commit, &parts) {
            Ok(()) => {
                self.checkpoint_visible(&commit, &parts);
                let best = commit.progress.saved_best.as_ref().map(|best| &best.checkpoint);
                self.store.prune(self.job.checkpoint.keep as usize, best);
                self.store_pruned(&commit);
                Event::CheckpointCommitted { checkpoint, bytes: commit.state_bytes }
            }
            Err(reason) => Event::CheckpointFailed { checkpoint, reason },
        };
        let told = self.dice.delay(&[0xC1, id, commit.position.applied.0], ms(100));
        self.agenda.set(self.now + told, Happening::Told { life: id, event: Box::new(event) });
    }

    /// A worker's training thread has copied its slice: it goes up beside the session's stream.
    pub fn upload(&mut self, worker: usize, term: Term, save: Save, state: Replica) {
        let Some(connection) = self.connection_of(worker) else {
            return self.coverage.count("uploads that found no coordinator");
        };
        let header = PartHeader {
            term,
            worker: self.workers[worker].name.clone(),
            checkpoint: save.checkpoint,
            lineage: state.label.lineage,
            applied: state.label.applied,
            kind: PartKind::State { offset: save.offset, digest: state.digest_of(save.offset, save.length) },
            length: save.length,
            stall_ms: 2.0,
        };
        let weights = save.weights.is_some();
        self.upload_starts(Upload { header, weights, state, connection, begun: false });
    }

    fn upload_starts(&mut self, upload: Upload) {
        self.next_id += 1;
        let id = self.next_id;
        let from = self.connections.get(&upload.connection).map_or(0, |connection| connection.worker);
        let latency = self.links.latency(self.dice, Node::Worker(from), Node::Coordinator);
        self.uploads.insert(id, upload);
        self.agenda.set(self.now + latency, Happening::Upload { id });
    }

    /// The header, or the last byte, of an upload arrives.
    pub fn upload_moves(&mut self, id: u64) {
        let Some(upload) = self.uploads.get_mut(&id) else { return };
        let connection = upload.connection;
        let Upload { header, begun, .. } = &*upload;
        let (header, begun) = (header.clone(), *begun);
        match self.transfer_state(connection) {
            Transfer::Stalled => return self.agenda.set(self.now + ms(300), Happening::Upload { id }),
            Transfer::Broken => {
                self.uploads.remove(&id);
                self.coverage.count("uploads that broke off");
                return if begun {
                    self.part_failed(connection, header, "the upload broke off")
                };
            }
            Transfer::Flows => {}
        }
        if !begun {
            let Some(life) = &self.coordinator.life else { return };
            if header.term != life.term {
                self.uploads.remove(&id);
                return;
            }
            if let Some(upload) = self.uploads.get_mut(&id) {
                upload.begun = true;
            }
            let takes = self.dice.delay(&[0x0B, id], ms(self.scenario.knobs.upload_ms));
            return self.agenda.set(self.now + ms(1) + takes, Happening::Upload { id });
        }
        let Some(Upload { weights, state, .. }) = self.uploads.remove(&id) else { return };
        if self.store.full > 0 {
            return self.part_failed(connection, header, "no space left on the device");
        }
        let Some(life) = &mut self.coordinator.life else { return };
        let Some(open) = life.open.get_mut(&header.checkpoint).filter(|open| open.lineage == header.lineage)
        else {
            return self.part_failed(connection, header, "the checkpoint is not open");
        };
        open.parts.retain(|(former, _)| slot(former) != slot(&header));
        open.parts.push((header.clone(), state.clone()));
        self.tell(Event::PartStored { header: header.clone() });
        if weights {
            let header = PartHeader { kind: PartKind::Weights, length: 8, ..header };
            self.upload_starts(Upload { header, weights: false, state, connection, begun: false });
        }
    }

    pub fn lose_an_upload(&mut self) {
        let Some((&id, _)) = self.uploads.iter().next() else { return };
        let Some(Upload { header, connection, .. }) = self.uploads.remove(&id) else { return };
        self.part_failed(connection, header, "no space left on the device");
    }

    fn part_failed(&mut self, connection: u64, header: PartHeader, reason: &str) {
        let life = self.connections.get(&connection).map(|connection| connection.life);
        if life.and_then(|id| self.life(id)).is_some() {
            self.store_failures += 1;
            self.tell(Event::PartFailed { header, reason: reason.into() });
        }
    }

    /// How a transfer over a connection's link fares just now.
    pub fn transfer_state(&self, id: u64) -> Transfer {
        let Some(connection) = self.connections.get(&id) else { return Transfer::Broken };
        if connection.vanished && (connection.at_worker || connection.at_coordinator) {
            return Transfer::Stalled; // whoever is left has not noticed
        }
        let worker = &self.workers[connection.worker];
        let process = worker.process.as_ref().filter(|process| process.incarnation == connection.incarnation);
        let (Some(life), Some(process)) = (self.life(connection.life), process) else {
            return Transfer::Broken;
        };
        if !connection.at_worker || !connection.at_coordinator {
            return Transfer::Broken;
        }
        let link = self.links.connects(Node::Worker(connection.worker), Node::Coordinator);
        match link && !life.stopped && !process.stopped {
            true => Transfer::Flows,
            false => Transfer::Stalled,
        }
    }

    /// A session that no worker of the simulation is behind.
    pub fn stranger_session(&mut self) -> Option<Session> {
        let life = self.coordinator.life.as_mut().filter(|life| !life.stopped)?;
        life.next_session += 1;
        let session = Session(life.next_session);
        life.sessions.insert(session, Target::Stranger);
        Some(session)
    }
}

fn slot(header: &PartHeader) -> Option<u64> {
    match header.kind {
        PartKind::State { offset, .. } => Some(offset),
        PartKind::Weights => None,
    }
}
