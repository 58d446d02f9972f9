//! A team of simulated workers around the real core: queues instead of streams, a virtual clock,
//! replicas whose parameters are the list of the steps that were applied to them.
//!
//! Nothing moves by itself. A test performs [`Move`]s: in order, or in the order that a seed gives.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use musher_proto::{
    digest,
    ids::{CheckpointId, Epoch, Generation, Rank, Session, Step, Term},
    job::JobConfig,
    message::{
        Activity, DataFacts, EpochTotals, Fenced, Form, FromWorker, Hello, Interrupted, Join, PROTOCOL,
        PartHeader, PartKind, Phase as WorkerPhase, Progress, ReplicaLabel, Save, SegmentFinished, Start,
        StepWaits, Synced, ToWorker, Train, UnitResult, Validate, Validated,
    },
    shard::{Segment, ValidationUnits},
};

use super::invariants::{Ledger, invariant_applied_never_falls_behind_a_live_holder};
use crate::core::{
    Action, Commit, Core, Event, Fences, Origin, Outcome, ResumePoint, RunEvent, RunState, Time,
};
use crate::traces::spans::{Span, Spans};

pub const TRAIN_SAMPLES: u64 = 7;
pub const VAL_SAMPLES: u64 = 4;
pub const STATE_BYTES: u64 = 40;

/// Three steps an epoch, two validation units; it forms as soon as two seconds bring nobody.
pub fn job() -> JobConfig {
    let mut job = JobConfig::default();
    job.train.global_batch = 3;
    job.train.epochs = 3;
    job
}

pub fn facts() -> DataFacts {
    DataFacts { digest: "d1".into(), train_samples: TRAIN_SAMPLES, val_samples: VAL_SAMPLES }
}

/// What a replica holds: its label, and per applied step the epoch and the samples it used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub label: ReplicaLabel0,
    pub steps: Vec<(Epoch, Vec<u64>)>,
}

/// [`ReplicaLabel`] with a default: nothing applied, outside any lineage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaLabel0(pub ReplicaLabel);

impl Default for ReplicaLabel0 {
    fn default() -> Self {
        Self(ReplicaLabel { lineage: Generation(0), applied: Step(0), epoch: Epoch(0), cursor: 0 })
    }
}

impl State {
    fn digest(&self) -> u64 {
        let words = self.steps.iter().flat_map(|(epoch, samples)| {
            [u64::from(epoch.0)].into_iter().chain(samples.iter().map(|s| s + 100)).collect::<Vec<_>>()
        });
        digest::of_slice(0, &words.flat_map(u64::to_le_bytes).collect::<Vec<u8>>())
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Doing {
    Nothing,
    Syncing,
    Training { train: Train, pause: bool },
}

/// One worker's process on one connection.
#[derive(Clone, Debug)]
pub struct Worker {
    pub name: String,
    incarnation: u64,
    pub state: Option<State>,
    /// The process lives and its stream is up.
    pub connected: bool,
    /// The stream ends when what was sent before is read.
    closed: bool,
    pub generation: Generation,
    form: Option<Form>,
    doing: Doing,
    to_core: VecDeque<Fenced<FromWorker>>,
    to_worker: VecDeque<Fenced<ToWorker>>,
    /// What it has said, for repeating it.
    pub said: Vec<Fenced<FromWorker>>,
    /// Its last words, as it heard them.
    pub finish: Option<ToWorker>,
    pub refused: Option<String>,
}

/// A part on its way to the store, or the store's answer on its way to the core.
#[derive(Clone, Debug)]
enum InStore {
    Upload(PartHeader, State),
    Answer(Event),
}

/// A thing that can happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    ToWorker(Session),
    ToCore(Session),
    /// A member takes the donor's state.
    Sync(Session),
    /// All members apply a step.
    Step(Generation),
    /// A member finds its exchange broken.
    Notice(Session),
    /// The core hears that the stream ended.
    Close(Session),
    Store(usize),
    /// A worker that outlived its coordinator reaches the new one.
    Return(usize),
}

pub struct Sim {
    pub core: Core,
    pub now: Time,
    pub workers: BTreeMap<Session, Worker>,
    pub events: Vec<RunEvent>,
    /// All actions but `Emit`, as they came.
    pub actions: Vec<Action>,
    pub committed: BTreeMap<CheckpointId, (Commit, State)>,
    pub outcome: Option<Outcome>,
    pub ledger: Ledger,
    pub tracer: Spans,
    /// All that have ended.
    pub spans: Vec<Span>,
    /// Validation loss by epoch, from 1; the last one goes on.
    pub curve: Vec<f64>,
    pub fences: Fences,
    /// What a coordinator started now would find.
    pub disk: RunState,
    /// Worker processes that outlived their coordinator and have not found the new one yet.
    pub away: Vec<Worker>,
    /// The coordinator dies after so many more actions, and is started again at once.
    pub dies_after: Option<usize>,
    /// Until then nothing may be formed without all that may come back.
    listens_until: Time,
    job: JobConfig,
    open: BTreeMap<CheckpointId, (Generation, Vec<(PartHeader, State)>)>,
    store: Vec<InStore>,
    /// What the donor of a generation hands out.
    donated: BTreeMap<Generation, State>,
    next_session: u64,
    incarnation: u64,
}

impl Worker {
    fn hang_up_if_closed(&mut self) {
        if self.closed && self.to_worker.is_empty() {
            self.connected = false;
            self.doing = Doing::Nothing;
        }
    }
}

impl Sim {
    pub fn new(job: JobConfig) -> Self {
        let fences = Fences { term: Term(1), ..Fences::default() };
        Self::started(job, RunState { fences, ..RunState::default() }, None)
    }

    /// The next coordinator's life on what this one left, resumed from its newest checkpoint.
    pub fn resumed(self, job: JobConfig) -> Self {
        let mut next = Self::started(job, self.next_state(), self.resume_point());
        next.committed = self.committed;
        next.curve = self.curve;
        next
    }

    fn next_state(&self) -> RunState {
        let mut state = self.disk.clone();
        state.fences.term = state.fences.term.next();
        state
    }

    fn resume_point(&self) -> Option<ResumePoint> {
        let newest = self
            .committed
            .values()
            .max_by_key(|(commit, _)| (commit.position.applied, commit.position.lineage));
        newest.map(|(commit, _)| ResumePoint {
            checkpoint: commit.checkpoint.clone(),
            position: commit.position,
            progress: commit.progress.clone(),
            dataset_digest: commit.dataset_digest.clone(),
        })
    }

    fn started(job: JobConfig, state: RunState, resumed: Option<ResumePoint>) -> Self {
        let fences = state.fences;
        let origin = Origin {
            job: job.clone(),
            run: "r".into(),
            state: state.clone(),
            resumed,
            entropy: [7; 32],
            listen: false,
        };
        let tracer = Spans::of(&origin);
        let (core, actions) = Core::start(origin, Duration::ZERO);
        let mut sim = Self {
            core,
            now: Duration::ZERO,
            workers: BTreeMap::new(),
            events: Vec::new(),
            actions: Vec::new(),
            committed: BTreeMap::new(),
            outcome: None,
            ledger: Ledger::default(),
            tracer,
            spans: Vec::new(),
            curve: vec![1.0, 0.9, 0.8, 0.7, 0.6],
            fences,
            disk: state,
            away: Vec::new(),
            dies_after: None,
            listens_until: Duration::ZERO,
            job,
            open: BTreeMap::new(),
            store: Vec::new(),
            donated: BTreeMap::new(),
            next_session: 0,
            incarnation: 0,
        };
        sim.perform_all(actions);
        sim
    }

    // ---- what tests do -----------------------------------------------------------------------

    /// A new process of `name` connects; it joins when the moves get to it.
    pub fn connect(&mut self, name: &str) -> Session {
        self.incarnation += 1;
        self.connect_as(name, self.incarnation, PROTOCOL, None)
    }

    pub fn connect_as(
        &mut self,
        name: &str,
        incarnation: u64,
        protocol: u32,
        state: Option<State>,
    ) -> Session {
        self.next_session += 1;
        let session = Session(self.next_session);
        let worker = Worker {
            name: name.into(),
            incarnation,
            state,
            connected: true,
            closed: false,
            generation: Generation(0),
            form: None,
            doing: Doing::Nothing,
            to_core: VecDeque::new(),
            to_worker: VecDeque::new(),
            said: Vec::new(),
            finish: None,
            refused: None,
        };
        self.workers.insert(session, worker);
        let hello =
            Hello { protocol, worker: name.into(), incarnation, host: "h".into(), device: "cpu".into() };
        self.tell(Event::SessionOpened { session, hello });
        session
    }

    /// Connects and joins, before anything else moves.
    pub fn join(&mut self, name: &str) -> Session {
        let session = self.connect(name);
        self.perform(Move::ToWorker(session));
        self.perform(Move::ToCore(session));
        session
    }

    pub fn tell(&mut self, event: Event) {
        let actions = self.core.handle(self.now, event);
        assert_watch_is_in_time(&self.core);
        self.perform_all(actions);
    }

    pub fn say(&mut self, session: Session, generation: Generation, body: FromWorker) {
        self.tell(Event::MessageReceived {
            session,
            message: Fenced { term: self.fences.term, generation, body },
        });
    }

    /// The worker's process dies. The core hears of it when the moves get to it.
    pub fn kill(&mut self, session: Session) {
        if let Some(worker) = self.workers.get_mut(&session) {
            worker.connected = false;
            worker.to_worker.clear();
            worker.doing = Doing::Nothing;
            worker.state = None;
        }
        let name = self.workers.get(&session).map(|worker| worker.name.clone()).unwrap_or_default();
        // Uploads of a dead process break off.
        for item in &mut self.store {
            if let InStore::Upload(header, _) = item
                && header.worker.as_str() == name
            {
                let reason = "the upload broke off".into();
                *item = InStore::Answer(Event::PartFailed { header: header.clone(), reason });
            }
        }
    }

    /// The link breaks; the same process comes back on a new one with what it holds.
    pub fn reconnect(&mut self, session: Session) -> Option<Session> {
        let worker = self.workers.get_mut(&session).filter(|worker| worker.connected)?;
        worker.connected = false;
        worker.to_worker.clear();
        worker.doing = Doing::Nothing;
        let (name, state) = (worker.name.clone(), worker.state.take());
        let incarnation = worker.incarnation;
        Some(self.connect_as(&name, incarnation, PROTOCOL, state))
    }

    /// The coordinator dies and is started again. Workers live on; what was under way is lost.
    pub fn restart(&mut self) {
        self.dies_after = None;
        if self.outcome.is_some() {
            return;
        }
        let workers = std::mem::take(&mut self.workers);
        self.away.extend(
            workers
                .into_values()
                .filter(|worker| worker.connected && !worker.closed && worker.finish.is_none()),
        );
        self.store.clear();
        self.open.clear();
        let origin = Origin {
            job: self.job.clone(),
            run: "r".into(),
            state: self.next_state(),
            resumed: self.resume_point(),
            entropy: [7; 32],
            listen: true,
        };
        self.listens_until = self.now + Duration::from_secs_f64(self.job.cluster.heartbeat_timeout_s);
        self.tracer = Spans::of(&origin); // what it had begun is lost
        let (core, actions) = Core::start(origin, self.now);
        self.core = core;
        self.perform_all(actions);
    }

    /// The `pick`th worker that outlived its coordinator dies before it finds the new one.
    pub fn kill_away(&mut self, pick: usize) {
        if !self.away.is_empty() {
            self.away.remove(pick % self.away.len());
        }
    }

    /// The worker's session says again what it said before.
    pub fn repeat(&mut self, session: Session, pick: usize) {
        let said = self.workers.get(&session).map(|w| w.said.clone()).unwrap_or_default();
        if let Some(message) = said.get(pick % said.len().max(1)) {
            self.tell(Event::MessageReceived { session, message: message.clone() });
        }
    }

    /// The first `survivors_ahead` ranks apply the step in flight, the others do not, and `victim` dies.
    pub fn break_step(&mut self, generation: Generation, ahead: usize, victim: Session) {
        let members = self.members(generation);
        self.apply(&members.iter().copied().take(ahead % (members.len() + 1)).collect::<Vec<_>>(), &members);
        self.kill(victim);
    }

    /// The `pick`th thing on its way to the store is lost.
    pub fn lose_upload(&mut self, pick: usize) {
        let uploads: Vec<usize> =
            (0..self.store.len()).filter(|&i| matches!(self.store[i], InStore::Upload(..))).collect();
        let Some(&at) = uploads.get(pick % uploads.len().max(1)) else { return };
        if let InStore::Upload(header, _) = self.store.remove(at) {
            self.tell(Event::PartFailed { header, reason: "no space left".into() });
        }
    }

    pub fn uploads(&self) -> usize {
        self.store.iter().filter(|item| matches!(item, InStore::Upload(..))).count()
    }

    /// Time passes; who is connected is heard of.
    pub fn advance(&mut self, by: Duration) {
        let end = self.now + by;
        while self.now < end && self.outcome.is_none() {
            self.now = end.min(self.now + Duration::from_secs(1));
            let alive: Vec<Session> =
                self.workers.iter().filter(|(_, w)| w.connected).map(|(&s, _)| s).collect();
            for session in alive {
                self.say(session, Generation(0), FromWorker::Progress(heartbeat()));
            }
            self.tell(Event::TimePassed);
        }
    }

    /// All that can happen next, in the order in which an undisturbed team would do it.
    pub fn moves(&self) -> Vec<Move> {
        let mut moves = Vec::new();
        for (&session, worker) in &self.workers {
            if worker.connected && !worker.to_worker.is_empty() {
                moves.push(Move::ToWorker(session));
            }
            if !worker.to_core.is_empty() {
                moves.push(Move::ToCore(session));
            } else if !worker.connected {
                moves.push(Move::Close(session));
            }
        }
        moves.extend((0..self.store.len()).map(Move::Store));
        moves.extend((0..self.away.len()).map(Move::Return));
        for (&session, worker) in self.workers.iter().filter(|(_, w)| w.connected) {
            let broken = self.is_broken(worker);
            match &worker.doing {
                Doing::Nothing => {}
                _ if broken => moves.push(Move::Notice(session)),
                Doing::Syncing if self.can_sync(worker) => moves.push(Move::Sync(session)),
                Doing::Syncing => {}
                Doing::Training { .. } => {
                    let step = Move::Step(worker.generation);
                    let ready = self.members(worker.generation).iter().all(|m| self.is_training(*m));
                    if ready && !moves.contains(&step) {
                        moves.push(step);
                    }
                }
            }
        }
        moves
    }

    pub fn perform(&mut self, step: Move) {
        match step {
            Move::ToWorker(session) => self.worker_receives(session),
            Move::ToCore(session) => {
                let message = self.workers.get_mut(&session).and_then(|w| w.to_core.pop_front());
                if let Some(message) = message {
                    self.tell(Event::MessageReceived { session, message });
                }
            }
            Move::Sync(session) => self.sync(session),
            Move::Step(generation) => {
                let members = self.members(generation);
                self.apply(&members, &members);
            }
            Move::Notice(session) => self.leave_generation(session, "a peer closed its connection"),
            Move::Close(session) => {
                self.workers.remove(&session);
                self.tell(Event::SessionClosed { session, reason: "it closed the connection".into() });
            }
            Move::Return(at) => {
                let Worker { name, incarnation, state, finish, .. } = self.away.remove(at);
                if finish.is_none() {
                    self.connect_as(&name, incarnation, PROTOCOL, state);
                }
            }
            Move::Store(at) => match self.store.remove(at) {
                InStore::Upload(header, state) => {
                    let open = self
                        .open
                        .get_mut(&header.checkpoint)
                        .filter(|(lineage, _)| *lineage == header.lineage);
                    let answer = match open {
                        Some((_, parts)) => {
                            parts.push((header.clone(), state));
                            Event::PartStored { header }
                        }
                        None => Event::PartFailed { header, reason: "it is not open".into() },
                    };
                    self.tell(answer);
                }
                InStore::Answer(event) => self.tell(event),
            },
        }
    }

    /// Performs moves in their order until `done`, letting time pass only when nothing else can.
    ///
    /// # Panics
    /// If that takes unreasonably long: somebody waits for ever.
    pub fn until(&mut self, done: impl Fn(&Sim) -> bool) {
        for _ in 0..3000 {
            if done(self) {
                return;
            }
            match self.moves().first() {
                Some(&step) => self.perform(step),
                None => self.advance(Duration::from_secs(1)),
            }
        }
        panic!("it never came to it; status {:?}, events {:#?}", self.core.status(self.now), self.events);
    }

    /// Performs all moves that need no time.
    pub fn settle(&mut self) {
        while let Some(&step) = self.moves().first() {
            self.perform(step);
        }
    }

    /// Workers read all that they were sent.
    pub fn settle_orders(&mut self) {
        while let Some(step) = self.moves().into_iter().find(|step| matches!(step, Move::ToWorker(_))) {
            self.perform(step);
        }
    }

    pub fn until_event(&mut self, wanted: impl Fn(&RunEvent) -> bool) {
        let seen = self.events.len();
        self.until(|sim| sim.events[seen..].iter().any(&wanted));
    }

    pub fn run(&mut self) -> Outcome {
        self.until(|sim| sim.outcome.is_some());
        self.outcome.clone().expect("the loop above ends with it")
    }

    pub fn phase(&self) -> &'static str {
        self.core.status(self.now).phase.as_str()
    }

    pub fn session_of(&self, name: &str) -> Option<Session> {
        self.workers
            .iter()
            .find(|(_, w)| w.name == name && w.connected && !w.closed && w.finish.is_none())
            .map(|(&s, _)| s)
    }

    pub fn live_generation(&self) -> Generation {
        self.workers.values().filter(|w| w.connected).map(|w| w.generation).max().unwrap_or_default()
    }

    /// Sessions of the generation's members that are still in it.
    pub fn members(&self, generation: Generation) -> Vec<Session> {
        let in_it = self
            .workers
            .iter()
            .filter(|(_, w)| w.connected && w.generation == generation && generation.0 > 0);
        let mut members: Vec<(Rank, Session)> =
            in_it.filter_map(|(&s, w)| Some((w.form.as_ref()?.rank, s))).collect();
        members.sort();
        members.into_iter().map(|(_, session)| session).collect()
    }

    // ---- what the shell does -----------------------------------------------------------------

    fn perform_all(&mut self, actions: Vec<Action>) {
        invariant_applied_never_falls_behind_a_live_holder(&actions, &self.fences, &self.workers);
        self.invariant_nothing_is_formed_from_early_returners(&actions);
        for action in actions {
            match &mut self.dies_after {
                Some(0) => return self.restart(),
                Some(left) => *left -= 1,
                None => {}
            }
            self.ledger.check(&action, &self.fences);
            self.spans.extend(self.tracer.observe(self.now, &action));
            match action.clone() {
                Action::Persist(state) => {
                    self.fences = state.fences;
                    self.disk = *state;
                }
                Action::Send { session, message } => {
                    if let Some(worker) = self.workers.get_mut(&session).filter(|w| w.connected) {
                        worker.to_worker.push_back(message);
                    }
                }
                Action::CloseSession { session } => {
                    if let Some(worker) = self.workers.get_mut(&session) {
                        worker.closed = true;
                        worker.hang_up_if_closed();
                    }
                }
                Action::WriteSamples { .. } => {}
                Action::OpenCheckpoint { checkpoint, lineage, .. } => {
                    self.open.insert(checkpoint, (lineage, Vec::new()));
                }
                Action::AbandonCheckpoint { checkpoint } => {
                    self.open.remove(&checkpoint);
                }
                Action::CommitCheckpoint(commit) => {
                    let checkpoint = commit.checkpoint.clone();
                    let (_, parts) =
                        self.open.remove(&checkpoint).expect("only an open checkpoint is committed");
                    Ledger::invariant_a_commit_has_all_its_parts(&commit, &parts);
                    let state = parts[0].1.clone();
                    self.committed.insert(checkpoint.clone(), (*commit, state));
                    self.store
                        .push(InStore::Answer(Event::CheckpointCommitted { checkpoint, bytes: STATE_BYTES }));
                }
                Action::Emit(event) => {
                    self.ledger.check_event(&event, &self.workers);
                    self.events.push(event);
                }
                Action::End(outcome) => self.outcome = Some(outcome),
            }
            if !matches!(action, Action::Emit(_)) {
                self.actions.push(action);
            }
        }
    }

    /// A worker that comes back in time with a step that no other holds must find that nothing went on
    /// without it.
    fn invariant_nothing_is_formed_from_early_returners(&mut self, actions: &[Action]) {
        let forms = actions.iter().any(|action| {
            matches!(action, Action::Send { message: Fenced { body: ToWorker::Form(_), .. }, .. })
        });
        if forms && self.now < std::mem::take(&mut self.listens_until) {
            let replaced = |name: &str| self.workers.values().any(|worker| worker.name == name);
            let missing = self.away.iter().find(|worker| {
                let name = worker.name.as_str();
                worker.finish.is_none() && !replaced(name) && self.disk.roster.contains(&name.into())
            });
            assert!(missing.is_none(), "formed before {:?} was back", missing.map(|worker| &worker.name));
        }
    }

    // ---- what workers do ---------------------------------------------------------------------

    fn worker_says(&mut self, session: Session, generation: Generation, body: FromWorker) {
        let term = self.fences.term;
        if let Some(worker) = self.workers.get_mut(&session) {
            let message = Fenced { term, generation, body };
            worker.said.push(message.clone());
            worker.to_core.push_back(message);
        }
    }

    fn worker_receives(&mut self, session: Session) {
        let Some(worker) = self.workers.get_mut(&session) else { return };
        let Some(message) = worker.to_worker.pop_front() else { return };
        self.obey(session, message);
        if let Some(worker) = self.workers.get_mut(&session) {
            worker.hang_up_if_closed();
        }
    }

    fn obey(&mut self, session: Session, Fenced { generation, body, .. }: Fenced<ToWorker>) {
        let Some(worker) = self.workers.get_mut(&session) else { return };
        match body {
            ToWorker::Welcome(_) => {
                let held = worker.state.as_ref().map(|state| state.label.0);
                let newcomer = Join::of_newcomer(facts(), format!("{}:1", worker.name), "cpu");
                let join = Join { held, ..newcomer };
                self.worker_says(session, Generation(0), FromWorker::Join(join));
            }
            ToWorker::Refused { reason, .. } => {
                worker.refused = Some(reason);
                worker.connected = false;
            }
            ToWorker::Form(form) => {
                worker.generation = generation;
                worker.form = Some(form);
                worker.doing = Doing::Syncing;
            }
            ToWorker::Train(train) if worker.generation == generation => {
                let label = worker.state.as_ref().expect("only who synced is sent on").label.0;
                let next = label.epoch < train.epoch && train.cursor == 0;
                assert!(
                    next || (label.epoch, label.cursor) == (train.epoch, train.cursor),
                    "{label:?} {train:?}"
                );
                worker.doing = Doing::Training { train, pause: false };
                if train.cursor == train.end {
                    self.finish_segment(session, false);
                }
            }
            ToWorker::Pause if worker.generation == generation => {
                if let Doing::Training { pause, .. } = &mut worker.doing {
                    *pause = true;
                }
            }
            ToWorker::Validate(validate) if worker.generation == generation => {
                self.validate(session, validate)
            }
            ToWorker::Save(save) if worker.generation == generation => self.save(session, save),
            ToWorker::Abort { .. } if worker.generation == generation => self.leave_generation(session, ""),
            ToWorker::Train(_)
            | ToWorker::Pause
            | ToWorker::Validate(_)
            | ToWorker::Save(_)
            | ToWorker::Abort { .. } => {}
            ToWorker::Finish(_) => {
                worker.finish = Some(body);
                worker.doing = Doing::Nothing;
                self.worker_says(session, Generation(0), FromWorker::Goodbye);
            }
        }
    }

    fn leave_generation(&mut self, session: Session, reason: &str) {
        let Some(worker) = self.workers.get_mut(&session) else { return };
        worker.doing = Doing::Nothing;
        let held = worker.state.as_ref().map(|state| state.label.0).filter(|label| label.lineage.0 > 0);
        let generation = worker.generation;
        let report = Interrupted { held, reason: reason.into(), waited: None };
        self.worker_says(session, generation, FromWorker::Interrupted(report));
    }

    fn is_training(&self, session: Session) -> bool {
        self.workers.get(&session).is_some_and(|w| matches!(w.doing, Doing::Training { .. }))
    }

    /// A member is gone, or has left for another generation.
    fn is_broken(&self, worker: &Worker) -> bool {
        let Some(form) = &worker.form else { return false };
        let here = self.members(worker.generation);
        let left = here
            .iter()
            .filter_map(|s| self.workers.get(s))
            .any(|w| w.doing == Doing::Nothing && self.has_left(w));
        let unformed = self.workers.values().filter(|w| {
            w.connected
                && w.to_worker
                    .iter()
                    .any(|m| m.generation == worker.generation && matches!(m.body, ToWorker::Form(_)))
        });
        left || here.len() + unformed.count() < form.world as usize
    }

    fn has_left(&self, worker: &Worker) -> bool {
        worker
            .said
            .iter()
            .any(|m| m.generation == worker.generation && matches!(m.body, FromWorker::Interrupted(_)))
    }

    fn can_sync(&self, worker: &Worker) -> bool {
        let Some(form) = &worker.form else { return false };
        self.members(worker.generation).len() == form.world as usize
            && (form.rank == form.donor || self.donated.contains_key(&worker.generation))
    }

    fn sync(&mut self, session: Session) {
        let Some(worker) = self.workers.get_mut(&session) else { return };
        let form = worker.form.clone().expect("it syncs because it was formed");
        let generation = worker.generation;
        let mut state = match (&form.start, form.rank == form.donor) {
            (_, false) => self.donated.get(&generation).cloned().expect("the donor goes first"),
            (Start::Seeded, true) => State::default(),
            (Start::Held, true) => worker.state.clone().expect("a donor holds a state"),
            (Start::Checkpoint(id), true) => {
                self.committed.get(id).expect("only a committed one is named").1.clone()
            }
        };
        if !form.broadcast || form.holds_it {
            assert_eq!(worker.state.as_ref(), Some(&state), "without a broadcast all hold the donor's state");
        }
        if form.rank == form.donor {
            self.donated.insert(generation, state.clone());
        }
        state.label.0.lineage = generation;
        let synced = Synced {
            held: state.label.0,
            state_digest: state.digest(),
            state_bytes: STATE_BYTES,
            pretrained: None,
        };
        worker.state = Some(state);
        worker.doing = Doing::Nothing;
        self.worker_says(session, generation, FromWorker::Synced(synced));
    }

    /// `who` of the `team` has the next step's update in its parameters.
    fn apply(&mut self, who: &[Session], team: &[Session]) {
        let pause = team
            .iter()
            .filter_map(|s| self.workers.get(s))
            .any(|w| matches!(w.doing, Doing::Training { pause: true, .. }));
        for &session in who {
            let Some(worker) = self.workers.get_mut(&session) else { continue };
            let Doing::Training { train, .. } = worker.doing else { continue };
            let Some(state) = &mut worker.state else { continue };
            let label = &mut state.label.0;
            if label.epoch < train.epoch {
                (label.epoch, label.cursor) = (train.epoch, 0);
            }
            let batch = u64::from(self.job.train.global_batch);
            let segment = Segment {
                seed: self.job.seed,
                epoch: train.epoch,
                cursor: label.cursor,
                end: train.end,
                samples: TRAIN_SAMPLES,
                global_batch: batch,
            };
            let world = team.len() as u32;
            let samples = (0..world)
                .filter_map(|r| segment.steps(Rank(r), world).next())
                .flat_map(|s| s.sample_ids)
                .collect();
            state.steps.push((train.epoch, samples));
            label.applied = label.applied.next();
            label.cursor = (label.cursor + batch).min(train.end);
            let ended = label.cursor == train.end;
            if ended || pause {
                self.finish_segment(session, !ended);
            }
        }
    }

    fn finish_segment(&mut self, session: Session, paused: bool) {
        let Some(worker) = self.workers.get_mut(&session) else { return };
        worker.doing = Doing::Nothing;
        let generation = worker.generation;
        let state = worker.state.as_ref().expect("it trained");
        let totals = EpochTotals { loss_sum: state.label.0.cursor as f64, steps_skipped: 0 };
        let report = SegmentFinished { held: state.label.0, paused, totals, state_digest: state.digest() };
        self.worker_says(session, generation, FromWorker::SegmentFinished(report));
    }

    fn validate(&mut self, session: Session, validate: Validate) {
        let Some(worker) = self.workers.get(&session) else { return };
        let form = worker.form.as_ref().expect("it is a member");
        let units = ValidationUnits { samples: VAL_SAMPLES, unit: u64::from(self.job.train.global_batch) };
        let at = (validate.epoch.0 as usize - 1).min(self.curve.len() - 1);
        let loss = self.curve[at];
        let units = units.of_rank(form.rank, form.world as usize as u32).map(|index| {
            let samples = units.positions(index);
            UnitResult {
                index,
                samples: samples.end - samples.start,
                loss_sum: loss * 9.0,
                confusion: vec![1; 9],
            }
        });
        let report = Validated {
            epoch: validate.epoch,
            state_digest: worker.state.as_ref().expect("it trained").digest(),
            units: units.collect(),
            samples_png: if form.rank == Rank(0) { b"png".to_vec() } else { Vec::new() },
        };
        self.worker_says(session, worker.generation, FromWorker::Validated(report));
    }

    fn save(&mut self, session: Session, save: Save) {
        let Some(worker) = self.workers.get(&session) else { return };
        let state = worker.state.clone().expect("it trained");
        let part = |kind, length| PartHeader {
            term: self.fences.term,
            worker: worker.name.as_str().into(),
            checkpoint: save.checkpoint.clone(),
            lineage: state.label.0.lineage,
            applied: state.label.0.applied,
            kind,
            length,
            stall_ms: 2.0,
        };
        let slice = part(PartKind::State { offset: save.offset, digest: state.digest() }, save.length);
        let weights = save.weights.as_ref().map(|_| part(PartKind::Weights, 8));
        self.store.push(InStore::Upload(slice, state.clone()));
        self.store.extend(weights.map(|header| InStore::Upload(header, state)));
    }
}

pub fn heartbeat() -> Progress {
    Progress {
        phase: WorkerPhase::Idle,
        activity: Activity::WaitingForPeers,
        in_activity_ms: 3_600_000,
        warm: false,
        applied: Step(0),
        epoch: Epoch(0),
        cursor: 0,
        loss: f64::NAN,
        images_per_second: 0.0,
        step_ms: 0.0,
        waits: StepWaits::default(),
        steps_skipped: 0,
    }
}

/// Of all peers asked one by one, none is overdue before the core looks.
fn assert_watch_is_in_time(core: &Core) {
    let dues = core.peers.iter().filter_map(|(&session, _)| Some(core.watched(session)?.due));
    if let Some(first) = dues.min() {
        let looks = core.overdue_at();
        assert!(looks.is_some_and(|at| at <= first), "it looks at {looks:?}, and is to at {first:?}");
    }
}
