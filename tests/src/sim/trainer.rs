//! The training thread of `worker/src/trainer.rs`: it takes orders one after another, works, enters the
//! calls of the exchange, and reports.

use std::{cell::Cell, collections::VecDeque, rc::Rc};

use musher_proto::{
    ids::{CheckpointId, Generation, Rank, Step, Term},
    message::{
        Activity, Form, Interrupted, Phase, Progress, Save, SegmentFinished, Start, StepWaits, Synced, Train,
        UnitResult, Validate, Validated, Waited,
    },
    shard::{Permutation, Segment, StepShard, ValidationUnits},
};
use musher_session::Report;

use super::{
    clock::{Time, ms},
    exchange::{Call, CallError, CallResult, Contribution, Exchange},
    process::Input,
    replica::{Replica, STATE_BYTES},
    world::{Happening, World},
};

#[derive(Debug)]
pub struct Thread {
    pub orders: VecDeque<(Generation, Order)>,
    pub task: Option<Task>,
    pub replica: Replica,
    pub board: Board,
    member: Option<Member>,
    /// Of the timer that counts.
    timer: u64,
    /// Orders that were given to it, and of these how many it has begun.
    pub given: u64,
    pub begun: u64,
}

#[derive(Clone, Debug)]
pub enum Order {
    Form(Box<Form>),
    Train { train: Train, stop: Rc<Cell<bool>> },
    Validate(Validate),
    Save { term: Term, save: Save },
    Leave,
}

#[derive(Clone, Debug)]
pub struct Task {
    pub generation: Generation,
    order: Order,
    pub stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// On its own, until a timer.
    Working,
    InCall,
    /// Over this connection.
    Downloading(u64),
}

#[derive(Clone, Copy, Debug)]
struct Member {
    generation: Generation,
    rank: Rank,
    world: u32,
}

/// What the heartbeat reads.
#[derive(Clone, Copy, Debug)]
pub struct Board {
    pub phase: Phase,
    pub activity: Activity,
    /// Of the last sign of progress.
    pub since: Time,
    pub warm: bool,
}

impl Board {
    pub fn read(&self, replica: &Replica, step_ms: f64, now: Time) -> Progress {
        Progress {
            phase: self.phase,
            activity: self.activity,
            in_activity_ms: (now - self.since).as_millis() as u64,
            warm: self.warm,
            applied: replica.label.applied,
            epoch: replica.label.epoch,
            cursor: replica.label.cursor,
            loss: 1.0,
            images_per_second: 1.0,
            step_ms,
            waits: StepWaits::default(),
            steps_skipped: 0,
        }
    }
}

/// What makes a task go on.
#[derive(Debug)]
enum Cue {
    Begun,
    Worked,
    Called(Call, Box<CallResult>),
    Downloaded(Box<Replica>),
}

/// Why a task ends without its product.
#[derive(Debug)]
enum Broken {
    Call(CallError),
    Other(String),
}

impl Thread {
    pub fn new(seed: u64, now: Time) -> Self {
        Self {
            orders: VecDeque::new(),
            task: None,
            replica: Replica::seeded(seed),
            board: Board { phase: Phase::Loading, activity: Activity::Working, since: now, warm: false },
            member: None,
            timer: 0,
            given: 0,
            begun: 0,
        }
    }

    fn show(&mut self, phase: Phase, activity: Activity, now: Time) {
        let warm = self.board.warm;
        self.board = Board { phase, activity, since: now, warm };
    }
}

impl World {
    pub fn order(&mut self, worker: usize, generation: Generation, order: Order) {
        let Some(thread) = self.thread(worker) else { return };
        thread.orders.push_back((generation, order));
        thread.given += 1;
        self.take_orders(worker);
    }

    fn take_orders(&mut self, worker: usize) {
        let now = self.now;
        loop {
            let Some(thread) = self.thread(worker).filter(|thread| thread.task.is_none()) else { return };
            thread.show(Phase::Idle, Activity::WaitingForPeers, now);
            let Some((generation, order)) = thread.orders.pop_front() else { return };
            thread.task = Some(Task { generation, order, stage: Stage::Working });
            thread.begun += 1;
            self.go_on(worker, Cue::Begun);
        }
    }

    /// A timer of the thread is due. A thread that hangs does not notice.
    pub fn thread_wakes(&mut self, worker: usize, timer: u64) {
        let now = self.now;
        let hangs_until = self.workers[worker].hangs_until;
        let Some(thread) = self.thread(worker).filter(|thread| thread.timer == timer) else { return };
        if hangs_until > now {
            if hangs_until < Time::MAX {
                self.set_timer(worker, hangs_until - now);
            }
            return;
        }
        let Some(task) = &thread.task else { return };
        match task.stage {
            Stage::Working => self.go_on(worker, Cue::Worked),
            Stage::Downloading(connection) => self.download(worker, connection),
            Stage::InCall => {}
        }
        self.take_orders(worker);
    }

    pub fn call_done(&mut self, worker: usize, generation: Generation, rank: Rank, done: u64) {
        let Some((call, result)) = self.take_result(generation, rank, done) else { return };
        self.go_on(worker, Cue::Called(call, Box::new(result)));
        self.take_orders(worker);
    }

    pub fn call_failed(
        &mut self,
        worker: usize,
        generation: Generation,
        error: CallError,
        waited: Option<Waited>,
    ) {
        let Some(thread) = self.thread(worker) else { return };
        if thread
            .task
            .as_ref()
            .is_some_and(|task| task.generation == generation && task.stage == Stage::InCall)
        {
            self.break_off(worker, Broken::Call(error), waited);
            self.take_orders(worker);
        }
    }

    fn go_on(&mut self, worker: usize, cue: Cue) {
        let Some(Task { generation, order, .. }) = self.thread(worker).and_then(|thread| thread.task.clone())
        else {
            return;
        };
        let went = match order {
            Order::Form(form) => self.form(worker, generation, &form, cue),
            Order::Train { train, stop } => self.train(worker, train, &stop, cue),
            Order::Validate(validate) => self.validate(worker, validate, cue),
            Order::Save { term, save } => self.save(worker, term, &save, cue),
            Order::Leave => {
                self.drop_membership(worker);
                let held = self.thread(worker).and_then(|thread| thread.replica.held());
                self.product(worker, Report::Left(Interrupted { held, reason: String::new(), waited: None }));
                Ok(())
            }
        };
        if let Err(broken) = went {
            self.break_off(worker, broken, None);
        }
    }

    // ---- the orders --------------------------------------------------------------------------

    fn form(&mut self, worker: usize, generation: Generation, form: &Form, cue: Cue) -> Result<(), Broken> {
        let (now, seed, connection) = (self.now, self.job.seed, self.connection_of(worker));
        let mine = form.rank == form.donor;
        match cue {
            Cue::Begun => {
                self.drop_membership(worker);
                self.take_seat(worker, generation, form);
                let member = Member { generation, rank: form.rank, world: form.world };
                let Some(thread) = self.thread(worker) else { return Ok(()) };
                thread.member = Some(member);
                thread.board.warm = false;
                thread.show(Phase::Connecting, Activity::Working, now);
                self.call(worker, Call::Connect, Contribution::default())
            }
            Cue::Called(Call::Connect, _) => {
                let Some(thread) = self.thread(worker) else { return Ok(()) };
                thread.show(Phase::Syncing, Activity::Working, now);
                match (&form.start, mine) {
                    (Start::Seeded, true) => {
                        thread.replica = Replica::seeded(seed);
                        self.work(worker, ms(20));
                        Ok(())
                    }
                    (Start::Checkpoint(_), true) => {
                        let Some(connection) = connection else {
                            return Err(Broken::Other("the checkpoint could not be downloaded".into()));
                        };
                        thread.show(Phase::Syncing, Activity::WaitingForData, now);
                        self.set_stage(worker, Stage::Downloading(connection));
                        self.set_timer(worker, ms(100));
                        Ok(())
                    }
                    _ => self.broadcast(worker, form),
                }
            }
            Cue::Worked => self.broadcast(worker, form),
            Cue::Downloaded(state) => {
                let Some(thread) = self.thread(worker) else { return Ok(()) };
                thread.replica = Replica::adopted(&state, Generation(0)); // until the sync is complete
                self.broadcast(worker, form)
            }
            Cue::Called(_, result) => {
                let Some(thread) = self.thread(worker) else { return Ok(()) };
                if let Some(state) = result.state.filter(|_| !mine && !form.holds_it) {
                    thread.replica = Replica::adopted(&state, thread.replica.label.lineage);
                }
                self.synced(worker, generation);
                Ok(())
            }
        }
    }

    fn broadcast(&mut self, worker: usize, form: &Form) -> Result<(), Broken> {
        let Some(thread) = self.thread(worker) else { return Ok(()) };
        if !form.broadcast {
            let generation = thread.member.map_or(Generation(0), |member| member.generation);
            self.synced(worker, generation);
            return Ok(());
        }
        let state = (form.rank == form.donor).then(|| Box::new(thread.replica.clone()));
        self.call(worker, Call::Broadcast, Contribution { state, ..Contribution::default() })
    }

    fn synced(&mut self, worker: usize, generation: Generation) {
        let Some(thread) = self.thread(worker) else { return };
        thread.replica.label.lineage = generation;
        let held = thread.replica.label;
        let state_digest = thread.replica.digest();
        let synced = Synced { held, state_digest, state_bytes: STATE_BYTES, pretrained: None };
        self.product(worker, Report::Synced(synced));
    }

    fn train(&mut self, worker: usize, train: Train, stop: &Cell<bool>, cue: Cue) -> Result<(), Broken> {
        let now = self.now;
        let member = self.member(worker)?;
        let segment = self.segment(train);
        let Some(thread) = self.thread(worker) else { return Ok(()) };
        match cue {
            Cue::Begun => {
                thread.show(Phase::Training, Activity::Working, now);
                if thread.replica.label.epoch != train.epoch {
                    thread.replica.begin_epoch(train.epoch);
                }
                let cursor = thread.replica.label.cursor;
                if cursor != train.cursor {
                    self.check_order(worker, train, cursor);
                    return Err(Broken::Other(format!(
                        "ordered to train from {}, not {cursor}",
                        train.cursor
                    )));
                }
                self.next_step(worker, train)
            }
            Cue::Worked => {
                let applied = thread.replica.label.applied;
                let contribution = Contribution { stop: stop.get(), ..Contribution::default() };
                self.call(worker, Call::Step(applied.0), contribution)
            }
            Cue::Called(Call::Step(_), result) => {
                let cursor = thread.replica.label.cursor;
                let Some(shard) =
                    Segment { cursor, ..segment.clone() }.steps(member.rank, member.world).next()
                else {
                    return Err(Broken::Other("there is no step left".into()));
                };
                self.apply(worker, &segment, &shard, member.rank);
                let Some(thread) = self.thread(worker) else { return Ok(()) };
                thread.board.warm = true;
                thread.show(Phase::Training, Activity::Working, now);
                match result.stop {
                    true => self.stand(worker, train),
                    false => self.next_step(worker, train),
                }
            }
            Cue::Called(_, result) => {
                thread.replica.pool(result.statistics);
                self.segment_done(worker, train);
                Ok(())
            }
            Cue::Downloaded(_) => Ok(()),
        }
    }

    fn next_step(&mut self, worker: usize, train: Train) -> Result<(), Broken> {
        let Some(thread) = self.thread(worker) else { return Ok(()) };
        let label = thread.replica.label;
        if label.cursor >= train.end {
            return self.stand(worker, train);
        }
        let first = if thread.board.warm { 1.0 } else { 2.0 };
        let spread = 0.7 + 0.6 * self.dice.share(&[0x57E9, worker as u64, label.applied.0, label.lineage.0]);
        let factor = self.workers[worker].slowness.max(1.0);
        self.work(worker, ms(self.scenario.knobs.step_ms).mul_f64(first * spread * factor));
        Ok(())
    }

    /// Between two steps: the statistics are pooled once.
    fn stand(&mut self, worker: usize, train: Train) -> Result<(), Broken> {
        let Some(thread) = self.thread(worker) else { return Ok(()) };
        let applied = thread.replica.label.applied.0;
        match thread.replica.unpooled() {
            Some(statistics) => {
                self.call(worker, Call::Pool(applied), Contribution { statistics, ..Contribution::default() })
            }
            None => {
                self.segment_done(worker, train);
                Ok(())
            }
        }
    }

    fn segment_done(&mut self, worker: usize, train: Train) {
        let Some(thread) = self.thread(worker) else { return };
        let replica = &thread.replica;
        let report = SegmentFinished {
            held: replica.label,
            paused: replica.label.cursor < train.end,
            totals: replica.totals(),
            state_digest: replica.digest(),
        };
        self.product(worker, Report::SegmentFinished(report));
    }

    fn validate(&mut self, worker: usize, validate: Validate, cue: Cue) -> Result<(), Broken> {
        let now = self.now;
        let member = self.member(worker)?;
        let knobs = self.scenario.knobs.clone();
        let units = ValidationUnits { samples: knobs.val_samples, unit: u64::from(knobs.global_batch) };
        let mine = units.of_rank(member.rank, member.world);
        let Some(thread) = self.thread(worker) else { return Ok(()) };
        if let Cue::Begun = cue {
            thread.show(Phase::Validating, Activity::Working, now);
            self.work(worker, ms(knobs.step_ms / 3) * (mine.end - mine.start) as u32);
            return Ok(());
        }
        let at = (validate.epoch.0 as usize).saturating_sub(1).min(knobs.curve.len() - 1);
        let loss = knobs.curve[at];
        let results = mine.map(|index| {
            let positions = units.positions(index);
            let samples = positions.end - positions.start;
            UnitResult { index, samples, loss_sum: loss * 9.0 * samples as f64, confusion: vec![samples; 9] }
        });
        let report = Validated {
            epoch: validate.epoch,
            state_digest: thread.replica.digest(),
            units: results.collect(),
            samples_png: if member.rank == Rank(0) { b"png".to_vec() } else { Vec::new() },
        };
        self.product(worker, Report::Validated(report));
        Ok(())
    }

    fn save(&mut self, worker: usize, term: Term, save: &Save, cue: Cue) -> Result<(), Broken> {
        let now = self.now;
        let Some(thread) = self.thread(worker) else { return Ok(()) };
        if let Cue::Begun = cue {
            thread.show(Phase::Saving, Activity::Working, now);
            self.work(worker, ms(2));
            return Ok(());
        }
        let state = thread.replica.clone();
        thread.task = None;
        self.upload(worker, term, save.clone(), state);
        Ok(())
    }

    // ---- what they are made of ---------------------------------------------------------------

    /// The donor's download goes on or is over; a cut link or a coordinator that stands holds it up.
    fn download(&mut self, worker: usize, connection: u64) {
        let generation_start = self.thread(worker).and_then(|thread| match &thread.task {
            Some(Task { order: Order::Form(form), .. }) => Some(form.start.clone()),
            _ => None,
        });
        let Some(Start::Checkpoint(id)) = generation_start else { return };
        match self.transfer_state(connection) {
            Transfer::Broken => {
                let reason = "the checkpoint could not be downloaded: the connection broke";
                self.break_off(worker, Broken::Other(reason.into()), None);
            }
            Transfer::Stalled => self.set_timer(worker, ms(300)),
            Transfer::Flows => match self.checkpoint_state(&id) {
                Some(state) => self.go_on(worker, Cue::Downloaded(Box::new(state))),
                None => self.break_off(worker, Broken::Other(format!("there is no checkpoint {id}")), None),
            },
        }
    }

    fn checkpoint_state(&self, id: &CheckpointId) -> Option<Replica> {
        self.store.committed.get(id).map(|checkpoint| checkpoint.state.clone())
    }

    fn apply(&mut self, worker: usize, segment: &Segment, shard: &StepShard, rank: Rank) {
        let now = self.now;
        let order = Permutation::new(segment.seed, segment.epoch, segment.samples);
        let Some(thread) = self.thread(worker) else { return };
        thread.replica.apply(&order, shard, rank);
        let Step(applied) = thread.replica.label.applied;
        self.coverage.count("steps applied by a rank");
        self.last_step = now;
        self.note(|world| format!("{} applies step {applied}", world.workers[worker].name));
        self.check_applied(worker);
    }

    fn segment(&self, train: Train) -> Segment {
        let knobs = &self.scenario.knobs;
        Segment {
            seed: self.job.seed,
            epoch: train.epoch,
            cursor: train.cursor,
            end: train.end,
            samples: knobs.train_samples,
            global_batch: u64::from(knobs.global_batch),
        }
    }

    fn member(&mut self, worker: usize) -> Result<Member, Broken> {
        let member = self.thread(worker).and_then(|thread| thread.member);
        member.ok_or(Broken::Call(CallError::Aborted))
    }

    fn take_seat(&mut self, worker: usize, generation: Generation, form: &Form) {
        let workers = self.ledger.teams.get(&generation).cloned().unwrap_or_default();
        let process = self.workers[worker].process.as_ref();
        let incarnation = process.map(|process| process.incarnation);
        let aborted = process.is_some_and(|process| process.aborted.contains(&generation));
        let in_use = |exchange: &Exchange| exchange.seats.iter().any(|s| s.incarnation.is_some() && !s.left);
        self.exchanges.retain(|_, exchange| in_use(exchange));
        let exchange = self.exchanges.entry(generation).or_insert_with(|| Exchange::new(workers));
        if let Some(seat) = exchange.seats.get_mut(form.rank.0 as usize) {
            (seat.incarnation, seat.aborted) = (incarnation, aborted);
        }
    }

    fn call(&mut self, worker: usize, call: Call, contribution: Contribution) -> Result<(), Broken> {
        let now = self.now;
        let Member { generation, rank, .. } = self.member(worker)?;
        self.set_stage(worker, Stage::InCall);
        if let Some(thread) = self.thread(worker) {
            thread.show(thread.board.phase, Activity::WaitingForPeers, now);
        }
        self.enter(generation, rank, call, contribution).map_err(Broken::Call)
    }

    fn work(&mut self, worker: usize, time: Time) {
        self.set_stage(worker, Stage::Working);
        self.set_timer(worker, time);
    }

    fn set_stage(&mut self, worker: usize, stage: Stage) {
        if let Some(task) = self.thread(worker).and_then(|thread| thread.task.as_mut()) {
            task.stage = stage;
        }
    }

    fn set_timer(&mut self, worker: usize, after: Time) {
        let now = self.now;
        let Some(process) = self.workers[worker].process.as_mut() else { return };
        process.thread.timer += 1;
        let input = Input::ThreadWakes { timer: process.thread.timer };
        let incarnation = process.incarnation;
        self.agenda.set(now + after, Happening::Process { worker, incarnation, input });
    }

    fn drop_membership(&mut self, worker: usize) {
        if let Some(member) = self.thread(worker).and_then(|thread| thread.member.take()) {
            self.close_seat(member.generation, worker, false);
        }
    }

    /// The generation is over for this worker.
    fn break_off(&mut self, worker: usize, broken: Broken, waited: Option<Waited>) {
        self.drop_membership(worker);
        let held = self.thread(worker).and_then(|thread| thread.replica.held());
        let reason = match broken {
            Broken::Call(CallError::Aborted) => String::new(),
            Broken::Call(error) => format!("{error:?}"),
            Broken::Other(reason) => reason,
        };
        self.product(worker, Report::Left(Interrupted { held, reason, waited }));
    }

    /// The order is carried out; the shell hears of it in a moment.
    fn product(&mut self, worker: usize, report: Report) {
        let Some(task) = self.thread(worker).and_then(|thread| thread.task.take()) else { return };
        let generation = task.generation;
        self.note(|world| {
            format!("{} reports {report:?} of generation {generation}", world.workers[worker].name)
        });
        let Some(process) = self.workers[worker].process.as_mut() else { return };
        process.reported = process.reported.max(self.now) + ms(1);
        let (at, incarnation) = (process.reported, process.incarnation);
        let input = Input::Reported { generation, report: Box::new(report) };
        self.agenda.set(at, Happening::Process { worker, incarnation, input });
    }

    pub fn thread(&mut self, worker: usize) -> Option<&mut Thread> {
        self.workers.get_mut(worker)?.process.as_mut().map(|process| &mut process.thread)
    }
}

/// A transfer between a worker and the store, as it is just now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    Flows,
    Stalled,
    Broken,
}
