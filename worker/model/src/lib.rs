//! One replica of the segmentation network, on one device: a ResNet50 U-Net, its gradients and optimizer, its batch
//! norm, its state as bytes and its weights as a file.
//!
//! It trains nothing by itself: batches, the learning rate, the exchange of gradients between replicas and the
//! decision to apply a step are the caller's. A step reads
//!
//! ```text
//! begin_step · zero_gradients · forward · backward_last · [exchange] · measure_gradients · update · settle
//! ```
//!
//! and one that is not applied leaves no trace. From `forward` to `update` nothing waits for the device: what a step
//! comes to is decided there, by scalars that are read when they are there. There is no global state: any number of replicas live in a process.

mod options;

mod layers;
mod layout;
mod over_ranks;
mod unet;

mod flat;
mod init;

mod buckets;
mod digest;
mod gradients;
mod loss;
mod pooling;
mod state;
mod weights;

mod replica;

pub mod metrics;

pub use buckets::{Bucket, DEFAULT_BUCKET_BYTES};
pub use gradients::GradientMeasure;
pub use loss::LossOptions;
pub use options::{Encoder, Manner, ModelOptions};
pub use over_ranks::{OverRanks, SumOverRanks};
pub use replica::{Mode, Replica};
pub use state::{COUNTERS, CounterWords, StateLayout, StateStaging, StateTensors};
pub use unet::Taps;
pub use weights::WeightsError;

/// Why a replica refuses or fails.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the model cannot be built: {0}")]
    Options(String),
    #[error("{what} must be {expected}, not {found}")]
    Shape { what: &'static str, expected: String, found: String },
    #[error(
        "batch norm needs two values a channel, but a share of {samples} at {image_size} pixels leaves one: use larger images, larger batches or frozen statistics"
    )]
    TooFewValues { samples: i64, image_size: i64 },
    #[error("a state of {expected} bytes is needed, {found} are here: both sides must run the same model")]
    StateLength { expected: u64, found: u64 },
    #[error(
        "pooled moments of {expected} numbers are needed, {found} are here: all ranks must run the same model"
    )]
    PooledLength { expected: usize, found: usize },
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Extension(#[from] torch_ext::Error),
    #[error(transparent)]
    Torch(#[from] tch::TchError),
}
