//! What coordinator and worker say to each other, in the words of the domain. The wire's own types
//! stop at [`crate::convert`].

use crate::ids::{CheckpointId, Epoch, Generation, Rank, Session, Step, Term, WorkerId};

/// Coordinator and worker must agree on this number. It grows with every change that an older
/// binary would misread.
pub const PROTOCOL: u32 = 5;

/// A message with its fences.
#[derive(Clone, Debug, PartialEq)]
pub struct Fenced<T> {
    pub term: Term,
    /// 0 for what stands outside any generation.
    pub generation: Generation,
    pub body: T,
}

#[derive(Clone, Debug, PartialEq)]
pub enum FromWorker {
    Hello(Hello),
    Join(Join),
    Synced(Synced),
    Progress(Progress),
    SegmentFinished(SegmentFinished),
    Validated(Validated),
    Interrupted(Interrupted),
    DataWarning(DataWarning),
    Failed(Failed),
    /// It was told to go, and wants to be let go between two steps.
    Leaving,
    Goodbye,
}

#[derive(Clone, Debug, PartialEq)]
pub enum ToWorker {
    Welcome(Welcome),
    Refused {
        reason: String,
        /// Later it may be let in.
        may_pass: bool,
    },
    Form(Form),
    Train(Train),
    /// Stop between two steps.
    Pause,
    Validate(Validate),
    Save(Save),
    Abort {
        reason: String,
    },
    Finish(Finish),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    pub protocol: u32,
    pub worker: WorkerId,
    /// Grows with each start of the worker's process.
    pub incarnation: u64,
    pub host: String,
    /// `cpu` or `cuda:K`.
    pub device: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Join {
    pub data: DataFacts,
    /// Where its predecessor in the ring connects.
    pub ring_address: String,
    /// By what its updates are rounded, as in `cuda`: replicas stay equal only where all members have the same.
    pub arithmetic: String,
    /// `None`: it holds no state, or is at work and can't say.
    pub held: Option<ReplicaLabel>,
    /// It comes back on a new connection while its training thread goes on.
    pub at_work: Option<AtWork>,
}

impl Join {
    /// Of a worker that holds nothing yet.
    pub fn of_newcomer(
        data: DataFacts,
        ring_address: impl Into<String>,
        arithmetic: impl Into<String>,
    ) -> Self {
        let (ring_address, arithmetic) = (ring_address.into(), arithmetic.into());
        Self { data, ring_address, arithmetic, held: None, at_work: None }
    }
}

/// The order that a member's training thread is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AtWork {
    pub generation: Generation,
    pub train: Train,
}

/// What a worker found in its copy of the data set. All members must have the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFacts {
    /// SHA-256, hex, over the split lists and the files' sizes.
    pub digest: String,
    pub train_samples: u64,
    pub val_samples: u64,
}

/// What a replica's parameters contain. Orders by (lineage, applied); epoch and cursor follow from
/// these two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ReplicaLabel {
    /// The last generation whose sync completed.
    pub lineage: Generation,
    /// Optimizer steps in the parameters.
    pub applied: Step,
    pub epoch: Epoch,
    /// Samples of the epoch that are applied.
    pub cursor: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Synced {
    pub held: ReplicaLabel,
    pub state_digest: u64,
    pub state_bytes: u64,
    /// Of a donor that has just read them.
    pub pretrained: Option<Pretrained>,
}

/// Where the encoder's first weights are from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pretrained {
    pub file: String,
    /// Of the file, in hex.
    pub sha256: String,
    /// Parts of the file that are no encoder's, with the number of their arrays: `fc.* (2)`.
    pub ignored: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    pub phase: Phase,
    /// What the training thread does in that phase just now.
    pub activity: Activity,
    /// Since the last sign of progress in it: a step, a validation unit, a piece of the state.
    pub in_activity_ms: u64,
    /// It has completed a step of its generation: what is slow once is behind it.
    pub warm: bool,
    pub applied: Step,
    pub epoch: Epoch,
    pub cursor: u64,
    /// Of the last applied step: mean over the global batch's pixels, natural log.
    pub loss: f64,
    /// Of the whole team, over the last seconds.
    pub images_per_second: f64,
    /// This rank's median step, waiting for peers not counted.
    pub step_ms: f64,
    pub waits: StepWaits,
    /// Steps with a non-finite gradient in this epoch.
    pub steps_skipped: u64,
}

/// What a step spends on waiting, in milliseconds: means over this rank's last steps.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepWaits {
    /// For the loader.
    pub data_ms: f64,
    /// For sums over the ranks, as far as the backward pass does not hide them.
    pub peers_ms: f64,
}

/// A rank that waits for its peers is never the one that holds the team up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    Working,
    WaitingForData,
    WaitingForPeers,
}

impl Activity {
    pub fn name(self) -> &'static str {
        match self {
            Activity::Working => "working",
            Activity::WaitingForData => "waiting for data",
            Activity::WaitingForPeers => "waiting for peers",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Loading,
    Idle,
    Connecting,
    Syncing,
    Training,
    Validating,
    Saving,
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Phase::Loading => "loading",
            Phase::Idle => "idle",
            Phase::Connecting => "connecting",
            Phase::Syncing => "syncing",
            Phase::Training => "training",
            Phase::Validating => "validating",
            Phase::Saving => "saving",
        }
    }
}

/// The team stopped between two steps; its batch-norm statistics are pooled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SegmentFinished {
    pub held: ReplicaLabel,
    /// Stopped before the segment's end, because it was asked to.
    pub paused: bool,
    pub totals: EpochTotals,
    pub state_digest: u64,
}

/// Sums over the epoch's applied steps so far, all ranks included. They are part of the replica's
/// state, so a change of the team or a restart loses none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EpochTotals {
    /// Sum over the samples of their mean pixel loss.
    pub loss_sum: f64,
    /// Steps with a non-finite gradient: counted, their update left out.
    pub steps_skipped: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Validated {
    pub epoch: Epoch,
    pub state_digest: u64,
    pub units: Vec<UnitResult>,
    /// Images, truth and prediction as a PNG; empty from ranks that were not asked for it.
    pub samples_png: Vec<u8>,
}

/// One validation unit's sums.
#[derive(Clone, Debug, PartialEq)]
pub struct UnitResult {
    pub index: u64,
    pub samples: u64,
    /// Cross-entropy summed over pixels.
    pub loss_sum: f64,
    /// Pixels, `classes x classes`; row: truth, column: prediction.
    pub confusion: Vec<u64>,
}

/// The worker has left its generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interrupted {
    /// `None`: it holds no complete state.
    pub held: Option<ReplicaLabel>,
    /// Empty when it was told to.
    pub reason: String,
    /// Whom it waited for when its part in the exchange ended, if for anybody.
    pub waited: Option<Waited>,
}

/// What one rank saw of an exchange that did not complete: evidence, no verdict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waited {
    /// The neighbour.
    pub peer: Rank,
    pub step: Step,
    /// `connecting`, or the exchange's phase, such as `gradients`.
    pub phase: String,
    /// Without any progress.
    pub ms: u64,
    /// Bytes of the generation's exchange that this rank has by now. All ranks are due the same, so those
    /// with the fewest are next to where it is stuck.
    pub received: u64,
    /// Bytes that it gave to its successor, counted alike. A rank in the exchange takes all that arrives, so
    /// what one sent and the next has not received got stuck between them.
    pub sent: u64,
    /// The neighbour ended the connection: it has left, or is gone.
    pub closed: bool,
    /// In the ring of synchronised batch norm. Its bytes do not compare with those of the other.
    pub batch_norm: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataWarning {
    pub file: String,
    pub problem: String,
}

/// It can't go on and exits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    pub reason: String,
    /// Any other worker would fail alike (the data, the job), so the run ends.
    pub any_worker: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    pub session: Session,
    pub run: String,
    /// Tells this run from another of the same name.
    pub run_id: String,
    /// The resolved job configuration.
    pub job_json: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Form {
    pub rank: Rank,
    /// Ranks.
    pub world: u32,
    /// Where the next rank listens. Nobody is told of all members: that would be n^2 addresses in all.
    pub successor: String,
    /// Authenticates the ring.
    pub secret: [u8; 32],
    /// The rank whose state the others take.
    pub donor: Rank,
    /// False: all hold the donor's state already.
    pub broadcast: bool,
    /// This rank holds the donor's state already, and only passes it on.
    pub holds_it: bool,
    pub start: Start,
}

/// What the donor's state is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// Initialised from the job's seed.
    Seeded,
    /// What it holds.
    Held,
    Checkpoint(CheckpointId),
}

/// Train from the cursor to the segment's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Train {
    pub epoch: Epoch,
    pub cursor: u64,
    pub end: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validate {
    pub epoch: Epoch,
    /// Samples in the picture; 0: no picture.
    pub samples_wanted: u32,
}

/// Snapshot a slice of the state, and upload it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Save {
    pub checkpoint: CheckpointId,
    /// Bytes of the logical state; a multiple of 4.
    pub offset: u64,
    pub length: u64,
    /// Also upload the network's weights, with this metadata.
    pub weights: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    Finished,
    /// Stopped on request; can be resumed.
    Stopped,
    Failed {
        reason: String,
    },
}

/// What a worker says of a part before its bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct PartHeader {
    pub term: Term,
    pub worker: WorkerId,
    pub checkpoint: CheckpointId,
    pub lineage: Generation,
    pub applied: Step,
    pub kind: PartKind,
    /// Bytes that follow.
    pub length: u64,
    /// How long the training thread was held for the snapshot.
    pub stall_ms: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartKind {
    /// A slice of the logical state from `offset`, a multiple of 4.
    State { offset: u64, digest: u64 },
    /// The network's weights as a safetensors file.
    Weights,
}
