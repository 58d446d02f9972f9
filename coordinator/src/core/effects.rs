//! What goes into the core and what comes out of it: [`Event`]s in the past tense, [`Action`]s in the
//! imperative, and the [`RunEvent`]s that people read.

use std::time::Duration;

use musher_proto::{
    ids::{CheckpointId, Epoch, Generation, Rank, Session, Step, Term, WorkerId},
    message::{Fenced, Finish, FromWorker, Hello, PartHeader, ToWorker},
    scores::Scores,
};
use serde::{Deserialize, Serialize};

use super::{
    early_stopping::EarlyStopping,
    reasons::{AbortCause, Departure},
};

/// Time since the coordinator's start. The core has no clock of its own.
pub type Time = Duration;

#[derive(Clone, Debug)]
pub enum Event {
    /// A worker's stream began with `hello`.
    SessionOpened {
        session: Session,
        hello: Hello,
    },
    MessageReceived {
        session: Session,
        message: Fenced<FromWorker>,
    },
    /// The stream ended, for the reason given.
    SessionClosed {
        session: Session,
        reason: String,
    },
    /// A part of the open checkpoint is in the store, its length and digest verified.
    PartStored {
        header: PartHeader,
    },
    /// A part of a checkpoint could not be taken, or its upload broke off.
    PartFailed {
        header: PartHeader,
        reason: String,
    },
    CheckpointCommitted {
        checkpoint: CheckpointId,
        bytes: u64,
    },
    /// Nothing of the checkpoint is visible; those before it stand.
    CheckpointFailed {
        checkpoint: CheckpointId,
        reason: String,
    },
    /// Somebody wants a worker to be let go between two steps.
    DrainRequested {
        worker: WorkerId,
    },
    /// Somebody wants the run to end so that it can be resumed.
    StopRequested,
    /// No worker is left and none will come.
    TeamLost {
        reason: String,
    },
    /// A deadline that `next_deadline` named has come.
    TimePassed,
}

/// What the shell does, in this order. A `Persist` is on disk before anything after it happens.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    Persist(Box<RunState>),
    Send {
        session: Session,
        message: Fenced<ToWorker>,
    },
    /// End the stream once what was sent before is out.
    CloseSession {
        session: Session,
    },
    /// Open a checkpoint for the parts of this lineage that will be uploaded. One that was abandoned
    /// may be taken again under its name, in a later lineage.
    OpenCheckpoint {
        checkpoint: CheckpointId,
        lineage: Generation,
        state_bytes: u64,
    },
    /// All parts are stored: write the manifest, make it visible, prune older ones.
    CommitCheckpoint(Box<Commit>),
    AbandonCheckpoint {
        checkpoint: CheckpointId,
    },
    WriteSamples {
        epoch: Epoch,
        png: Vec<u8>,
        best: bool,
    },
    Emit(RunEvent),
    /// The run is over and the workers know it.
    End(Outcome),
}

/// What fences messages across restarts of the coordinator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fences {
    pub term: Term,
    /// The newest generation ever formed.
    pub generation: Generation,
    /// The newest generation that began to train.
    pub lineage: Generation,
}

/// What outlives a coordinator besides checkpoints: `state.json`. Live workers go on from it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunState {
    /// Tells this run from another of the same name.
    pub id: String,
    pub fences: Fences,
    pub progress: RunProgress,
    /// Of the last epoch that was judged.
    pub last_scores: Option<Scores>,
    /// A checkpoint that was decided on and is not durable yet.
    pub owed: Option<OwedSave>,
    /// Who was in the newest generation, in rank order.
    pub roster: Vec<WorkerId>,
    /// Of a replica.
    pub state_bytes: u64,
    /// Somebody wants the run to end so that it can be resumed, and it has not ended yet.
    pub stop_requested: bool,
    /// The data set that the run was started with.
    pub dataset_digest: Option<String>,
}

/// A checkpoint that a team owes which stands after `applied` steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwedSave {
    pub applied: Step,
    pub is_best: bool,
}

/// A checkpoint's manifest, as far as the core knows it.
#[derive(Clone, Debug, PartialEq)]
pub struct Commit {
    pub checkpoint: CheckpointId,
    pub position: Position,
    pub state_bytes: u64,
    pub state_digest: u64,
    pub world_size: u32,
    pub dataset_digest: String,
    pub progress: RunProgress,
    /// Its weights are the run's best so far: `best.safetensors` becomes a copy of them.
    pub is_best: bool,
    /// Its weights are the run's last: `last.safetensors` becomes a copy of them.
    pub is_last: bool,
}

/// Where the run stands in the training split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    pub lineage: Generation,
    pub applied: Step,
    pub epoch: Epoch,
    pub cursor: u64,
}

/// What a resumed run takes from its checkpoint besides the replicas' state.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunProgress {
    pub early_stopping: EarlyStopping,
    /// The last epoch that was announced as finished.
    pub announced: Epoch,
    /// The best epoch whose weights are durable.
    pub saved_best: Option<SavedBest>,
}

impl RunProgress {
    /// Why there is nothing left to train, if so.
    pub fn end(&self, epoch_limit: u32) -> Option<Stopped> {
        match &self.early_stopping {
            judged if judged.stopped => Some(Stopped::Early),
            judged if judged.judged.0 >= epoch_limit => Some(Stopped::EpochLimit),
            _ => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SavedBest {
    /// The checkpoint that holds the weights.
    pub checkpoint: CheckpointId,
    pub epoch: Epoch,
    pub scores: Scores,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub status: Status,
    /// The last epoch that was finished.
    pub epochs: Epoch,
    pub best_epoch: Option<Epoch>,
    /// Of the weights that are the run's result.
    pub scores: Option<Scores>,
    /// Training only, mean over this coordinator's life.
    pub images_per_second: f64,
    /// Files of the data set that something is wrong with, and that are used all the same.
    pub data_warnings: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    Finished(Stopped),
    /// On request; can be resumed.
    Stopped,
    Failed {
        reason: String,
    },
}

impl Status {
    /// What the workers are told.
    pub fn goodbye(&self) -> Finish {
        match self {
            Status::Finished(_) => Finish::Finished,
            Status::Stopped => Finish::Stopped,
            Status::Failed { reason } => Finish::Failed { reason: reason.clone() },
        }
    }
}

/// Why a finished run did not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    Early,
    EpochLimit,
}

/// What happened, for people and their tools: the names and fields of `events.jsonl`.
#[derive(Clone, Debug, PartialEq)]
pub enum RunEvent {
    RunStarted {
        term: Term,
        resumed_from: Option<CheckpointId>,
    },
    /// Workers of the life before may still be there, and are waited for.
    CoordinatorRestarted {
        term: Term,
    },
    WaitingForWorkers {
        joined: u32,
        wanted: u32,
    },
    WorkerJoined {
        worker: WorkerId,
        host: String,
        device: String,
    },
    WorkerRefused {
        worker: WorkerId,
        reason: String,
    },
    WorkerLeft {
        worker: WorkerId,
        rank: Option<Rank>,
        departure: Departure,
    },
    /// A member whose stream had broken goes on.
    WorkerReturned {
        worker: WorkerId,
        rank: Rank,
    },
    /// Its own part of a step, and its team-mates' median.
    WorkerSlow {
        worker: WorkerId,
        rank: Rank,
        step_ms: f64,
        median_ms: f64,
    },
    /// All members are connected to each other and take the donor's state; the forming began `elapsed` ago.
    /// Only traces tell of it.
    TeamConnected {
        generation: Generation,
        elapsed: Duration,
    },
    GenerationFormed {
        generation: Generation,
        world_size: u32,
        donor: WorkerId,
        applied: Step,
        elapsed: Duration,
    },
    /// A restarted coordinator found its whole team at work.
    GenerationContinued {
        generation: Generation,
        world_size: u32,
    },
    GenerationAborted {
        generation: Generation,
        cause: AbortCause,
    },
    /// The encoder starts from these weights.
    PretrainedLoaded {
        generation: Generation,
        file: String,
        /// Of the file, in hex.
        sha256: String,
        /// What else was in the file.
        ignored: Vec<String>,
    },
    /// Steps that a worker had reported are lost with it, and will be taken again.
    StepsLost {
        generation: Generation,
        reported: Step,
        applied: Step,
    },
    EpochStarted {
        generation: Generation,
        epoch: Epoch,
        step: Step,
        samples: u64,
    },
    Progress(ProgressReport),
    StepSkipped {
        generation: Generation,
        epoch: Epoch,
        step: Step,
        in_epoch: u64,
    },
    EpochFinished {
        epoch: Epoch,
        step: Step,
        samples: u64,
        train_loss: f64,
        images_per_second: f64,
        state_digest: u64,
    },
    Validated {
        epoch: Epoch,
        step: Step,
        scores: Scores,
    },
    CheckpointCommitted {
        checkpoint: CheckpointId,
        epoch: Epoch,
        step: Step,
        bytes: u64,
        elapsed: Duration,
        stall_ms: f64,
    },
    CheckpointFailed {
        checkpoint: CheckpointId,
        reason: String,
    },
    DataWarning {
        worker: WorkerId,
        file: String,
        problem: String,
    },
    EarlyStopped {
        epoch: Epoch,
        best_epoch: Epoch,
    },
    RunFinished {
        outcome: Outcome,
    },
    RunFailed {
        reason: String,
    },
}

/// The team's progress, about once a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProgressReport {
    pub generation: Generation,
    pub epoch: Epoch,
    pub step: Step,
    /// Samples of the epoch that are applied.
    pub cursor: u64,
    pub samples: u64,
    pub loss: f64,
    /// Of the newest applied step, and not of an encoder that has its own.
    pub learning_rate: f64,
    pub images_per_second: f64,
    /// To the epoch limit, training only; NaN while the rate is unknown.
    pub eta_s: f64,
}
