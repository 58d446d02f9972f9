//! The coordinator's decisions as a pure state machine: events and the time go in, actions come out.
//!
//! No I/O, no clock, no randomness; ordered collections only. The shell around it persists first,
//! then sends. The rules of the protocol and their reasons are in ARCHITECTURE.md.

mod benching;
mod checkpointing;
pub mod early_stopping;
pub mod effects;
mod ending;
mod evidence;
mod forming;
mod hangs;
mod leaving;
mod median;
mod peers;
pub mod reasons;
mod restart;
mod returning;
mod roster;
mod saving;
mod slowness;
mod status;
mod time;
mod training;
mod watch;

#[cfg(test)]
pub(crate) mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use musher_proto::{
    ids::{CheckpointId, Generation, Rank, Session, Step, WorkerId},
    job::JobConfig,
    message::{
        DataFacts, DataWarning, Fenced, FromWorker, Hello, Join, PROTOCOL, SegmentFinished, Synced, ToWorker,
        Train, Validated, Waited, Welcome,
    },
    scores::Scores,
};

use checkpointing::OpenCheckpoint;
pub use early_stopping::Best;
pub use effects::{
    Action, Commit, Event, Fences, Outcome, OwedSave, Position, RunEvent, RunProgress, RunState, Status,
    Stopped, Time,
};
use median::Median;
use peers::{Peer, Peers, Suspect};
use reasons::Wait;
pub use reasons::{AbortCause, Departure};
use roster::{Replies, Team};
pub use status::{Health, PeerStatus, RunPhase, RunStatus};
use watch::Watch;

/// What a coordinator starts from.
#[derive(Clone, Debug)]
pub struct Origin {
    pub job: JobConfig,
    pub run: String,
    /// Read from disk, its term already raised for this life.
    pub state: RunState,
    pub resumed: Option<ResumePoint>,
    /// Workers of the life before may still be there: they are listened for before anything is formed.
    pub listen: bool,
    /// Generations' secrets are derived from it.
    pub entropy: [u8; 32],
}

/// A complete, verified checkpoint.
#[derive(Clone, Debug)]
pub struct ResumePoint {
    pub checkpoint: CheckpointId,
    pub position: Position,
    pub progress: RunProgress,
    /// The data set that the run was started with.
    pub dataset_digest: String,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Core {
    job: JobConfig,
    /// The same as workers are told of it.
    job_json: String,
    run: String,
    run_id: String,
    fences: Fences,
    entropy: [u8; 32],
    peers: Peers,
    /// When one of them is overdue next.
    watch: Watch,
    /// What all workers' data must be; set by the first to join.
    data: Option<DataFacts>,
    /// Digest of the data set that the run was started on, in an earlier life of the coordinator.
    started_on: Option<String>,
    phase: Phase,
    progress: RunProgress,
    /// Who was in the newest generation, in rank order.
    roster: Vec<WorkerId>,
    /// Of a replica; 0 until one was synced.
    state_bytes: u64,
    /// Workers that were put out lately: until when, and how often in a row.
    bench: BTreeMap<WorkerId, Bench>,
    /// When a worker was put out last that may live, and come back.
    removed: Option<Time>,
    /// What went wrong last, for people who ask.
    last_trouble: Option<String>,
    /// When `handle` was asked to be called again at the latest.
    asked: Option<Time>,
    /// When it last found itself late.
    forgave: Option<Time>,
    /// Where a team starts that no holder of the lineage's state is in.
    durable: Option<Durable>,
    checkpoint: Option<OpenCheckpoint>,
    /// Decided on, and waiting for the one before it or for its own end. A team that breaks meanwhile
    /// takes it again.
    owed: Option<SaveRequest>,
    stop_requested: bool,
    /// Generations in a row that were aborted before a step was applied.
    barren: u32,
    last_applied: Step,
    pace: Pace,
    last_scores: Option<Scores>,
    /// (file, problem) pairs that were reported.
    data_warnings: BTreeSet<(String, String)>,
    /// A state whose checkpoint failed while it was held for: it is not tried again.
    unsavable: Option<CheckpointId>,
}

/// Different ones that are told; who has more has heard enough.
const DATA_WARNINGS: usize = 10_000;

/// How fast this coordinator's life has trained.
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    samples: u64,
    time: Duration,
}

/// Why a worker is not let in.
struct Refusal {
    reason: String,
    may_pass: bool,
}

impl Refusal {
    fn lasting(reason: String) -> Self {
        Self { reason, may_pass: false }
    }
}

/// What the run is doing. Each phase's data lives in its variant.
#[derive(Debug)]
enum Phase {
    /// Waiting for workers to form the next generation from.
    Gathering(Gathering),
    /// The members connect to each other and take the donor's state.
    Forming {
        team: Team,
        donor: Rank,
        /// Nobody in it held the lineage's state.
        anew: bool,
        /// Until the last is connected.
        connecting: Option<Replies<()>>,
        synced: Replies<Synced>,
        since: Time,
    },
    Training {
        team: Team,
        train: Train,
        finished: Replies<SegmentFinished>,
        /// What a step takes each of them.
        step_ms: Median<Session>,
        /// They have been told to stop before the segment's end.
        pausing: bool,
        /// It was seen from its start.
        whole: bool,
        since: Time,
    },
    Validating {
        team: Team,
        stop: StoppingPoint,
        validated: Replies<Validated>,
        since: Time,
    },
    /// A checkpoint on its way must be durable before the next can be taken, or before the run ends.
    Storing {
        team: Team,
        stop: StoppingPoint,
    },
    /// The last checkpoint is committed; the workers are told and may leave.
    Lingering {
        outcome: Outcome,
        until: Time,
        /// Workers that are not connected now may come to hear of it.
        expecting: bool,
    },
    Ended,
}

#[derive(Debug, Default)]
struct Gathering {
    /// Former members that have not yet said what they hold.
    awaiting: BTreeSet<Session>,
    /// When to form with whoever is there, or to give up on those that are awaited.
    until: Time,
    /// Form at once when so many are there.
    wanted: u32,
    /// The run's first formation: too few at this time is a failure. Later ones wait.
    give_up: Option<Time>,
    /// After a restart: until then nothing is formed without the whole former team.
    listening: Option<Time>,
    /// The former team stands between two steps with its batch-norm statistics pooled, so equal labels
    /// mean equal states. In mid-segment each rank has running statistics of its own.
    pooled: bool,
    since: Time,
    /// Whose generation was aborted.
    former: Option<Team>,
    /// After an abort for which no lost member accounts, what the members saw of their exchange: whose
    /// links are cut?
    inquest: Option<Vec<(Rank, Waited)>>,
}

/// A worker that was put out.
#[derive(Clone, Copy, Debug)]
struct Bench {
    until: Time,
    times: u32,
}

/// The newest committed checkpoint.
#[derive(Clone, Debug)]
struct Durable {
    checkpoint: CheckpointId,
    /// Samples of its epoch that are applied in it.
    cursor: u64,
    progress: RunProgress,
}

/// The team stands still between two steps, at one state.
#[derive(Clone, Copy, Debug)]
struct StoppingPoint {
    finished: SegmentFinished,
}

/// A checkpoint that is due at the stopping point after `applied` steps.
#[derive(Clone, Debug, PartialEq)]
struct SaveRequest {
    applied: Step,
    is_best: bool,
    is_last: bool,
    /// How the run ends once it is durable.
    then: Option<Status>,
    /// Training waits until it is durable: part of the team is about to go.
    hold: bool,
}

impl Core {
    pub fn handle(&mut self, now: Time, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        let out = &mut actions;
        self.forgive_lateness(now);
        match event {
            Event::SessionOpened { session, hello } => self.session_opened(session, hello, now, out),
            Event::MessageReceived { session, message } => self.message_received(session, message, now, out),
            Event::SessionClosed { session, reason } => self.stream_ended(session, reason, now, out),
            Event::PartStored { header } => self.part_stored(&header, now, out),
            Event::PartFailed { header, reason } => self.part_failed(&header, &reason, now, out),
            Event::CheckpointCommitted { checkpoint, bytes } => self.committed(&checkpoint, bytes, now, out),
            Event::CheckpointFailed { checkpoint, reason } => {
                if self.checkpoint.as_ref().is_some_and(|open| *open.id() == checkpoint) {
                    self.checkpoint_failed(&reason, now, out);
                }
            }
            Event::DrainRequested { worker } => {
                // One whose link is broken for a moment, too: it is let go once it is back.
                let connected = self.session_of(&worker);
                let session = connected.or_else(|| Some(self.peers.of_worker(&worker).next()?.0));
                if let Some(session) = session {
                    self.leaving(session, now, out);
                }
            }
            Event::StopRequested => self.stop_requested(now, out),
            Event::TeamLost { reason } => {
                let before = self.last_trouble.take().map(|trouble| format!("; before, {trouble}"));
                self.fail(reason + &before.unwrap_or_default(), now, out);
            }
            Event::TimePassed => {}
        }
        self.time_passed(now, out);
        self.keep_watch();
        self.asked = self.next_deadline();
        actions
    }

    /// When `handle` wants to hear of the time again.
    pub fn next_deadline(&self) -> Option<Time> {
        let phase = match &self.phase {
            Phase::Gathering(gathering) => self.gathering_deadline(gathering),
            Phase::Lingering { until, .. } => Some(*until),
            Phase::Ended => return None,
            _ => None,
        };
        let checkpoint = self.checkpoint.as_ref().and_then(|open| open.deadline());
        [phase, checkpoint, self.overdue_at()].into_iter().flatten().min()
    }

    /// When to look for peers that are overdue.
    fn overdue_at(&self) -> Option<Time> {
        [self.watch.next(), self.standstill_deadline()].into_iter().flatten().min()
    }

    /// Takes note of what has changed about peers.
    fn keep_watch(&mut self) {
        let touched = self.peers.take_touched();
        let changed: Vec<Session> = match self.watch.begins_anew() {
            true => self.peers.iter().map(|(&session, _)| session).collect(),
            false => touched,
        };
        for session in changed {
            let entry = self.watched(session);
            self.watch.set(session, entry);
        }
    }

    fn somebody_is_overdue(&mut self, now: Time) -> bool {
        self.keep_watch();
        if self.overdue_at().is_none_or(|at| now < at) {
            return false;
        }
        self.watch.all_changed(); // what is noted may be too early
        self.keep_watch();
        self.overdue_at().is_some_and(|at| now >= at)
    }

    /// The run is at something else.
    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.watch.all_changed();
    }

    fn session_opened(&mut self, session: Session, hello: Hello, now: Time, out: &mut Vec<Action>) {
        if hello.protocol != PROTOCOL {
            let reason = format!(
                "it speaks protocol {}, the coordinator {PROTOCOL}: install the same version of musher and musher-worker",
                hello.protocol
            );
            return self.refuse(session, &hello, Refusal::lasting(reason), out);
        }
        if let Err(newer) = self.check_incarnation(&hello) {
            return self.refuse(session, &hello, newer, out);
        }
        self.give_way(&hello, now, out);
        if let Err(full) = self.check_room(&hello.worker) {
            return self.refuse(session, &hello, full, out);
        }
        self.peers.insert(session, Peer::new(hello, now));
        self.send(
            session,
            ToWorker::Welcome(Welcome {
                session,
                run: self.run.clone(),
                run_id: self.run_id.clone(),
                job_json: self.job_json.clone(),
            }),
            out,
        );
        if let Phase::Lingering { outcome, .. } = &self.phase {
            self.send(session, ToWorker::Finish(outcome.status.goodbye()), out);
        }
    }

    /// # Errors
    /// If a later process of that worker is there.
    fn check_incarnation(&self, hello: &Hello) -> Result<(), Refusal> {
        let peers = self.peers.of_worker(&hello.worker).map(|(_, peer)| peer);
        let mut newer = peers.filter(|peer| peer.hello.incarnation > hello.incarnation).peekable();
        if newer.peek().is_none() {
            return Ok(());
        }
        // Or the clock by which they count was set back, and that process is dead.
        let may_pass = newer.all(|peer| peer.suspect.is_some());
        let reason = format!(
            "a newer process of worker {} is connected already: if it is another worker, give each its own --name",
            hello.worker
        );
        Err(Refusal { reason, may_pass })
    }

    /// # Errors
    /// If the team is full without that worker.
    fn check_room(&self, worker: &WorkerId) -> Result<(), Refusal> {
        let own = self.peers.of_worker(worker).filter(|(_, peer)| peer.join.is_some()).count();
        let most = self.job.cluster.max_workers;
        match self.peers.count().joined - (own as u32) < most {
            true => Ok(()),
            false => Err(Refusal {
                reason: format!("the team has cluster.max_workers = {most} members already"),
                may_pass: true,
            }),
        }
    }

    fn refuse(&mut self, session: Session, hello: &Hello, refusal: Refusal, out: &mut Vec<Action>) {
        let Refusal { reason, may_pass } = refusal;
        out.push(Action::Emit(RunEvent::WorkerRefused {
            worker: hello.worker.clone(),
            reason: reason.clone(),
        }));
        self.send(session, ToWorker::Refused { reason, may_pass }, out);
        out.push(Action::CloseSession { session });
    }

    fn message_received(
        &mut self,
        session: Session,
        message: Fenced<FromWorker>,
        now: Time,
        out: &mut Vec<Action>,
    ) {
        if message.term != self.fences.term {
            return;
        }
        let live = self.live_generation();
        let Some(mut peer) = self.peers.get_mut(&session) else { return };
        peer.heard = now;
        let outside = message.generation == Generation(0) && may_stand_outside(&message.body);
        let leaves_its_own = matches!(message.body, FromWorker::Interrupted(_))
            && peer.at_work().is_some_and(|work| work.generation == message.generation);
        drop(peer);
        if !outside && !leaves_its_own && live != Some(message.generation) {
            return; // another generation's message changes nothing
        }
        match message.body {
            FromWorker::Hello(_) => {}
            FromWorker::Join(join) => self.joined(session, join, now, out),
            FromWorker::Synced(synced) => self.synced(session, synced, now, out),
            FromWorker::Progress(progress) => self.progressed(session, progress, now, out),
            FromWorker::SegmentFinished(finished) => self.segment_finished(session, finished, now, out),
            FromWorker::Validated(validated) => self.validated(session, validated, now, out),
            FromWorker::Interrupted(interrupted) => self.interrupted(session, interrupted, now, out),
            FromWorker::DataWarning(DataWarning { file, problem }) => {
                // Each worker meets the file in its time; people hear of it once.
                let room = self.data_warnings.len() < DATA_WARNINGS;
                if room && self.data_warnings.insert((file.clone(), problem.clone())) {
                    let Some(worker) = self.name_of(session) else { return };
                    out.push(Action::Emit(RunEvent::DataWarning { worker, file, problem }));
                }
            }
            FromWorker::Failed(failed) if failed.any_worker => {
                let Some(worker) = self.name_of(session) else { return };
                self.fail(format!("worker {worker}: {}", failed.reason), now, out);
            }
            FromWorker::Failed(failed) => {
                out.push(Action::CloseSession { session });
                self.peer_lost(session, Departure::Failed { reason: failed.reason }, now, out);
            }
            FromWorker::Leaving => self.leaving(session, now, out),
            FromWorker::Goodbye => {
                out.push(Action::CloseSession { session });
                self.peer_lost(session, Departure::Left, now, out);
            }
        }
    }

    fn joined(&mut self, session: Session, join: Join, now: Time, out: &mut Vec<Action>) {
        let Some(peer) = self.peers.get(&session).filter(|peer| peer.join.is_none()) else { return };
        let worker = peer.worker().clone();
        let fits = self.check_data(&join.data).and_then(|()| self.check_arithmetic(&join.arithmetic));
        // Many may have come while this one prepared.
        if let Err(refusal) = fits.map_err(Refusal::lasting).and_then(|()| self.check_room(&worker)) {
            let Some(peer) = self.peers.remove(&session) else { return };
            return self.refuse(session, &peer.hello, refusal, out);
        }
        let Some(mut peer) = self.peers.get_mut(&session) else { return };
        self.data.get_or_insert_with(|| join.data.clone());
        let at_work = join.at_work;
        peer.join = Some(join);
        drop(peer);
        match at_work {
            Some(work) => self.came_back(session, work, now, out),
            None => {
                self.former_is_lost(session, now, out);
                self.is_ready(session, now, out);
            }
        }
    }

    /// A worker has joined, holds what it says, and can be formed into a generation.
    fn is_ready(&mut self, session: Session, now: Time, out: &mut Vec<Action>) {
        let Some(mut peer) = self.peers.get_mut(&session) else { return };
        let benched = self.bench.get(peer.worker()).map(|bench| bench.until);
        peer.benched = benched.filter(|until| *until > now);
        let is_benched = peer.benched.is_some();
        out.push(Action::Emit(RunEvent::WorkerJoined {
            worker: peer.worker().clone(),
            host: peer.hello.host.clone(),
            device: peer.hello.device.clone(),
        }));
        drop(peer);
        if !is_benched {
            self.is_there(now, out);
        }
    }

    /// One more could be in the team.
    fn is_there(&mut self, now: Time, out: &mut Vec<Action>) {
        if let Phase::Gathering(gathering) = &mut self.phase
            && gathering.awaiting.is_empty()
            && (gathering.give_up.is_none() || self.job.cluster.workers == 0)
        {
            // Whoever comes: form when nobody has come for a while.
            gathering.until = now + seconds(self.job.cluster.regroup_window_s);
        }
        self.pause_team(out); // taken in between two steps; nobody aborts anything
    }

    /// # Errors
    /// What differs, and what to do about it.
    fn check_data(&self, found: &DataFacts) -> Result<(), String> {
        if found.train_samples == 0 || found.val_samples == 0 {
            return Err("its data set has no training or no validation samples".into());
        }
        if let Some(data) = &self.data
            && data != found
        {
            return Err(format!(
                "its data set differs from the team's: it has {} training and {} validation samples with digest {:.12}, \
                 the team {} and {} with {:.12}; give every worker the same files",
                found.train_samples,
                found.val_samples,
                found.digest,
                data.train_samples,
                data.val_samples,
                data.digest,
            ));
        }
        match &self.started_on {
            Some(digest) if *digest != found.digest => Err(format!(
                "its data set has digest {:.12}, the run was started on one with {digest:.12}; \
                 give it the same files, or start a new run",
                found.digest
            )),
            _ => Ok(()),
        }
    }

    /// # Errors
    /// As [`Self::check_data`].
    fn check_arithmetic(&self, found: &str) -> Result<(), String> {
        // All who have joined have the same: the first to be met speaks for them.
        let member =
            self.peers.values().find_map(|peer| Some((peer.worker(), &peer.join.as_ref()?.arithmetic)));
        match member {
            Some((member, team)) if team != found => Err(format!(
                "it trains on {found}, the team, as {member} does, on {team}: these round differently, so that their \
                 replicas would not stay equal; give all workers the same kind of device (cluster.device), and start \
                 them with ATEN_CPU_CAPABILITY=default where not all of their processors have AVX2"
            )),
            _ => Ok(()),
        }
    }

    /// Ends the session of a worker that is still there, and tells it why.
    fn remove(&mut self, session: Session, departure: Departure, now: Time, out: &mut Vec<Action>) {
        let generation = self.live_generation().unwrap_or_default();
        let reason = departure.to_string();
        let message = Fenced { term: self.fences.term, generation, body: ToWorker::Abort { reason } };
        out.push(Action::Send { session, message });
        out.push(Action::CloseSession { session });
        self.removed = Some(now);
        self.peer_lost(session, departure, now, out);
    }

    /// A worker is gone for good.
    fn peer_lost(&mut self, session: Session, departure: Departure, now: Time, out: &mut Vec<Action>) {
        let Some(peer) = self.peers.remove(&session) else { return };
        let worker = peer.worker().clone();
        let rank = self.team().and_then(|team| team.rank_of(session));
        let former_rank = match &self.phase {
            Phase::Gathering(Gathering { former: Some(team), .. }) => team.rank_of(session),
            _ => None,
        };
        if !matches!(self.phase, Phase::Lingering { .. } | Phase::Ended) {
            out.push(Action::Emit(RunEvent::WorkerLeft {
                worker: worker.clone(),
                rank: rank.or(former_rank),
                departure: departure.clone(),
            }));
        }
        if self.fences.generation == Generation(0) && self.peers.count().joined == 0 {
            self.data = None; // nothing was trained on the first one's data set: it binds nobody
        }
        let lost =
            |rank| AbortCause::MemberLost { worker: worker.clone(), rank, departure: departure.clone() };
        if let Phase::Gathering(Gathering { inquest, .. }) = &mut self.phase
            && let Some(rank) = former_rank
        {
            *inquest = None; // a member that is lost accounts for a broken exchange
            self.last_trouble = Some(aborted(self.fences.generation, &lost(rank)));
        }
        self.settled(session, now, out);
        if let Some(rank) = rank {
            self.abort(lost(rank), now, out);
        }
        if self.checkpoint.as_ref().is_some_and(|open| !open.committing && open.awaits(&worker)) {
            self.checkpoint_failed(&format!("worker {worker} left before its part was stored"), now, out);
        }
    }

    fn time_passed(&mut self, now: Time, out: &mut Vec<Action>) {
        if self.somebody_is_overdue(now) {
            self.lose_the_silent(now, out);
            self.look_for_hangs(now, out);
            self.end_benches(now, out);
        }
        if let Some(open) = &self.checkpoint
            && open.deadline().is_some_and(|deadline| now >= deadline)
        {
            let reason = open.overdue();
            self.checkpoint_failed(&reason, now, out);
        }
        if let Phase::Gathering(_) = self.phase {
            self.dismiss_leaving(now, out);
            self.form_if_ready(now, out);
        }
        if let Phase::Lingering { outcome, until, expecting } = &self.phase
            && (self.peers.is_empty() && !expecting || now >= *until)
        {
            out.push(Action::End(outcome.clone()));
            self.enter(Phase::Ended);
        }
    }

    /// Those whose stream is up and says nothing, and those whose stream did not come back.
    fn lose_the_silent(&mut self, now: Time, out: &mut Vec<Action>) {
        let timeout = self.heartbeat_timeout();
        let overdue = |peer: &Peer| match &peer.suspect {
            Some(suspect) => now >= suspect.until,
            None => now >= peer.heard + timeout,
        };
        let lost: Vec<(Session, Departure)> = self
            .peers
            .iter()
            .filter(|(_, peer)| overdue(peer))
            .map(|(&session, peer)| match &peer.suspect {
                Some(Suspect { detail, .. }) => (session, Departure::Disconnected { detail: detail.clone() }),
                None => {
                    let waited = now.saturating_sub(peer.heard);
                    (session, Departure::Silent(Wait::of(peer.progress.as_ref(), waited)))
                }
            })
            .collect();
        for (session, departure) in lost {
            match departure {
                Departure::Silent(_) => self.remove(session, departure, now, out),
                _ => self.peer_lost(session, departure, now, out),
            }
        }
    }

    /// The session under which a worker can be talked to.
    fn session_of(&self, worker: &WorkerId) -> Option<Session> {
        self.peers.of_worker(worker).find(|(_, peer)| peer.suspect.is_none()).map(|(session, _)| session)
    }

    fn name_of(&self, session: Session) -> Option<WorkerId> {
        self.peers.get(&session).map(|peer| peer.worker().clone())
    }

    fn team(&self) -> Option<&Team> {
        match &self.phase {
            Phase::Forming { team, .. }
            | Phase::Training { team, .. }
            | Phase::Validating { team, .. }
            | Phase::Storing { team, .. } => Some(team),
            Phase::Gathering(_) | Phase::Lingering { .. } | Phase::Ended => None,
        }
    }

    /// The generation whose messages count: the team's, or after an abort the one being wound up.
    fn live_generation(&self) -> Option<Generation> {
        match &self.phase {
            Phase::Gathering(_) => Some(self.fences.generation),
            _ => self.team().map(|team| team.generation),
        }
    }

    fn send(&self, session: Session, body: ToWorker, out: &mut Vec<Action>) {
        let generation = self.team().map(|team| team.generation).unwrap_or_default();
        out.push(Action::Send { session, message: Fenced { term: self.fences.term, generation, body } });
    }

    fn send_team(&self, body: &ToWorker, out: &mut Vec<Action>) {
        let Some(team) = self.team() else { return };
        for (_, session) in team.members() {
            self.send(session, body.clone(), out);
        }
    }

    /// Tells a team at its steps, once, to stop between two of them.
    fn pause_team(&mut self, out: &mut Vec<Action>) {
        if let Phase::Training { pausing, .. } = &mut self.phase
            && !std::mem::replace(pausing, true)
        {
            self.send_team(&ToWorker::Pause, out);
        }
    }

    fn heartbeat_timeout(&self) -> Duration {
        seconds(self.job.cluster.heartbeat_timeout_s)
    }
}

/// What a worker may also say outside any generation; all else must be of the live one.
fn may_stand_outside(message: &FromWorker) -> bool {
    match message {
        FromWorker::Hello(_)
        | FromWorker::Join(_)
        | FromWorker::Progress(_)
        | FromWorker::DataWarning(_)
        | FromWorker::Failed(_)
        | FromWorker::Leaving
        | FromWorker::Goodbye => true,
        FromWorker::Synced(_)
        | FromWorker::SegmentFinished(_)
        | FromWorker::Validated(_)
        | FromWorker::Interrupted(_) => false,
    }
}

/// For people who ask what went wrong last.
fn aborted(generation: Generation, cause: &AbortCause) -> String {
    format!("generation {generation} was aborted: {cause}")
}

fn seconds(value: f64) -> Duration {
    Duration::from_secs_f64(value)
}
