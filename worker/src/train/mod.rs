//! The step, and what happens between two steps: one replica and its team, on one thread.
//!
//! It knows nothing of the coordinator, of messages or of async code; the tests of the whole team's
//! arithmetic drive it directly.

mod control;
mod data;
pub mod exchange;
mod member;
mod outcome;
mod position;
mod pretrained;
mod progress;
mod segment;
mod step;
mod sync;
mod sync_norm;
mod validate;

use std::sync::Arc;

use musher_collective::CollectiveError;
use musher_dataset::DatasetError;
use musher_model::{Encoder, LossOptions, ModelOptions, Replica};
use musher_nccl::ExchangeError;
use musher_proto::{
    ids::Generation,
    job::{self, JobConfig},
    message::ReplicaLabel,
};
use tch::Device;
use thiserror::Error;
use torch_ext::SideStream;
use tracing::warn;

pub(crate) use data::Input;
pub use data::{Batches, DeviceBatch, Feed, KeptBytes, TrainingData};
pub use member::Membership;
pub use position::Position;
pub use pretrained::PretrainedError;
pub use progress::ProgressBoard;
pub use segment::{SegmentEnd, Snapshot, StopFlag};
pub use sync::Source;
pub use sync_norm::SyncBatchNorm;
pub use validate::{evaluate, validation_units};

use step::InFlight;

/// Why the work of a generation, or of the whole run, can't go on.
#[derive(Debug, Error)]
pub enum TrainError {
    /// The exchange with the peers broke; the replica holds its last applied step.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The exchange between GPUs broke, or can't be had.
    #[error(transparent)]
    Gpu(ExchangeError),
    /// The control word did not add up: some rank was not at this step, or was leaving.
    #[error("step {step} was not completed by all ranks")]
    Incomplete { step: u64 },
    /// Going on would use samples twice, or leave some out.
    #[error("ordered to train from sample {ordered} of the epoch, but {cursor} are applied")]
    OutOfOrder { cursor: u64, ordered: u64 },
    #[error("the state received in the sync has digest {found:016x}, the donor's is {expected:016x}")]
    TornSync { expected: u64, found: u64 },
    #[error(transparent)]
    Pretrained(#[from] PretrainedError),
    #[error(
        "the coordinator's words about the weights can't be read ({0}): install the same version on both sides"
    )]
    Metadata(serde_json::Error),
    #[error("the checkpoint could not be downloaded: {0}")]
    Download(String),
    #[error(transparent)]
    Data(#[from] DatasetError),
    #[error(
        "the gradient was not finite in {0} steps in a row: lower train.learning_rate, or set train.clip_norm"
    )]
    NotFinite(u32),
    #[error(transparent)]
    Model(#[from] musher_model::Error),
    #[error(transparent)]
    Torch(#[from] tch::TchError),
    #[error(transparent)]
    Extension(#[from] torch_ext::Error),
}

impl From<ExchangeError> for TrainError {
    fn from(error: ExchangeError) -> Self {
        match error {
            ExchangeError::Host(error) => Self::Collective(error),
            ExchangeError::Aborted(None) => Self::Collective(CollectiveError::Aborted(None)),
            ExchangeError::Torch(error) => Self::Extension(error),
            ExchangeError::Tensor(error) => Self::Torch(error),
            other => Self::Gpu(other),
        }
    }
}

impl TrainError {
    /// Whether the worker is sound and only its generation is over.
    pub fn ends_generation_only(&self) -> bool {
        match self {
            TrainError::Collective(_)
            | TrainError::Incomplete { .. }
            | TrainError::OutOfOrder { .. }
            | TrainError::TornSync { .. }
            | TrainError::Download(_) => true,
            TrainError::Gpu(error) => error.ends_generation_only(),
            TrainError::Data(_)
            | TrainError::NotFinite(_)
            | TrainError::Pretrained(_)
            | TrainError::Metadata(_)
            | TrainError::Model(_)
            | TrainError::Torch(_)
            | TrainError::Extension(_) => false,
        }
    }

    /// Whether any other worker would fail in the same way.
    pub fn any_worker(&self) -> bool {
        match self {
            // Its network perhaps: another may reach the store.
            TrainError::Data(DatasetError::Store { .. }) => false,
            TrainError::Data(_)
            | TrainError::NotFinite(_)
            | TrainError::Pretrained(_)
            | TrainError::Metadata(_) => true,
            TrainError::Collective(_)
            | TrainError::Gpu(_)
            | TrainError::Incomplete { .. }
            | TrainError::OutOfOrder { .. }
            | TrainError::TornSync { .. }
            | TrainError::Download(_)
            | TrainError::Model(_)
            | TrainError::Torch(_)
            | TrainError::Extension(_) => false,
        }
    }
}

/// A replica and what it needs to train.
pub struct Trainer {
    job: Arc<JobConfig>,
    data: Feed,
    replica: Replica,
    /// Where a GPU's buckets are handed to the exchange, beside the main stream.
    exchange_stream: SideStream,
    /// The generation whose sync this replica's state completed last; 0: it holds nothing of the run.
    lineage: Generation,
    /// Samples that moved this replica's running statistics since they were last pooled.
    unpooled_samples: u64,
    /// Steps in a row whose gradient was not finite.
    bad_streak: u32,
    /// A step that the device works on, and whose outcome is to be seen.
    in_flight: Option<InFlight>,
    /// Lets each step's outcome be seen in the midst of the next only, also where it is there at once.
    pub looks_late: bool,
    pub board: Arc<ProgressBoard>,
}

impl Trainer {
    /// A trainer with a replica initialised from the job's seed.
    pub fn new(
        job: Arc<JobConfig>,
        data: TrainingData,
        device: Device,
        board: Arc<ProgressBoard>,
    ) -> Result<Self, TrainError> {
        tune(device, job.train.precision)?;
        let replica = seeded_replica(&job, device)?;
        let data = Feed::new(job.clone(), data, device)?;
        Ok(Self {
            job,
            data,
            replica,
            exchange_stream: SideStream::of(device)?,
            lineage: Generation(0),
            unpooled_samples: 0,
            bad_streak: 0,
            in_flight: None,
            looks_late: false,
            board,
        })
    }

    pub fn replica(&self) -> &Replica {
        &self.replica
    }

    /// Whether batch norm needs an exchange of its own.
    pub fn synchronises_batch_norm(&self) -> bool {
        self.job.model.sync_batch_norm
    }

    pub fn position(&self) -> Position {
        Position::from_counters(self.replica.counters())
    }

    /// What the replica holds; `None` before its first sync.
    pub fn held(&self) -> Option<ReplicaLabel> {
        (self.lineage != Generation(0)).then(|| self.label())
    }

    pub fn label(&self) -> ReplicaLabel {
        let position = self.position();
        ReplicaLabel {
            lineage: self.lineage,
            applied: position.applied,
            epoch: position.epoch,
            cursor: position.cursor,
        }
    }
}

/// For the whole process, which has one device.
pub(crate) fn tune(device: Device, precision: job::Precision) -> Result<(), torch_ext::Error> {
    match device.is_cuda() {
        true => torch_ext::allow_tf32(precision != job::Precision::Fp32),
        false => {
            if precision == job::Precision::Tf32 {
                warn!("train.precision = \"tf32\" is for GPUs: here, on the CPU, fp32 is computed in");
            }
            Ok(())
        }
    }
}

/// A replica initialised from the job's seed.
fn seeded_replica(job: &JobConfig, device: Device) -> Result<Replica, TrainError> {
    let mut replica = Replica::new(&model_options(job), job.seed, device)?;
    replica.use_bf16(job.train.precision == job::Precision::Bf16)?;
    replica.plan_buckets((job.train.bucket_mb * f64::from(1 << 20)) as usize)?;
    if job.train.encoder_learning_rate > 0.0 {
        replica.set_encoder_rate(job.train.encoder_learning_rate / job.train.learning_rate);
    }
    replica.set_loss(&LossOptions {
        class_weights: job.train.class_weights.clone(),
        dice_weight: job.train.dice_weight,
    })?;
    Ok(replica)
}

/// The network that a job describes.
pub(crate) fn model_options(job: &JobConfig) -> ModelOptions {
    ModelOptions {
        classes: job.model.classes as usize,
        encoder: match job.encoder() {
            job::EncoderVariant::Torchvision => Encoder::Torchvision,
            job::EncoderVariant::Keras => Encoder::Keras,
        },
        width: job.model.width,
        freeze_encoder: job.model.freeze_encoder,
        freeze_batch_norm: job.model.freeze_batch_norm,
        image_size: job.data.image_size as usize,
    }
}
