//! The job configuration: what a run is asked to do.
//!
//! Owns the keys of a job file, their defaults, units and ranges. It reads no files and no
//! environment, opens no sockets and looks at no devices: a valid configuration can still ask for
//! what the machine at hand does not have.
//!
//! [`load`] is the only way from text to a [`JobConfig`]; whoever holds one it returned can trust
//! its ranges. Workers receive it from the coordinator and parse it from JSON.

mod check;
mod load;
mod schedule;
mod schema;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use load::{JobError, Place, load};
pub use schema::known_keys;

/// A whole job file, every key resolved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JobConfig {
    /// Names the run directory `runs/<name>`: letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// Seeds initial weights, shuffling and augmentation; at most 2^63 - 1.
    pub seed: u64,
    pub data: Data,
    pub augment: Augment,
    pub model: Model,
    pub train: Train,
    pub early_stopping: EarlyStopping,
    pub cluster: Cluster,
    pub checkpoint: Checkpoint,
    pub server: Server,
    pub telemetry: Telemetry,
}

/// Where the samples come from and how they become tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Data {
    /// Directory, or `file://` URL, in the Oxford-IIIT Pet layout or packed; or an object store's URL of a packed one.
    pub root: String,
    /// Split file of the training samples, relative to `root`.
    pub train_split: String,
    /// Split file of the validation samples, relative to `root`.
    pub val_split: String,
    /// Share of the training split that is validated on instead of `val_split`, and not trained on; 0: none. Which
    /// samples follows from the seed and their names.
    pub val_fraction: f64,
    /// Side of the square input in pixels, a multiple of 32; masks have half of it.
    pub image_size: u32,
    pub normalize: NormalizeChoice,
    pub mask_resize: MaskResize,
    /// Host memory for decoded images in MiB, per worker; 0: none.
    pub cache_mb: u64,
    /// Where samples are augmented and resized; the bits are the same.
    pub augment_on: AugmentOn,
    /// Memory of the device for decoded images in MiB, where it augments; 0: none. What does not fit
    /// stays in host memory, as far as `cache_mb` goes.
    pub device_cache_mb: u64,
    /// Threads that decode and augment, per worker; 0: chosen from the cores at hand.
    pub loader_threads: u32,
    /// Samples of a packed data set that are read before they are decoded, per worker; 0: none.
    pub read_ahead: u32,
    /// Local disk for what was read of a packed data set in MiB, over all workers of a directory; 0: none.
    pub disk_cache_mb: u64,
    /// Where that is; empty: `musher/data` in the user's cache directory.
    pub disk_cache_dir: String,
}

/// Who augments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AugmentOn {
    /// The device, unless that is the CPU.
    Auto,
    /// The loader's threads.
    Cpu,
    /// The device that trains, by operations on tensors, whichever it is.
    Device,
}

/// What the job asks for; see [`JobConfig::normalize`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NormalizeChoice {
    Unit,
    Imagenet,
    Caffe,
    /// As the pretrained weights were trained: `imagenet` with torchvision's encoder, `caffe` with
    /// Keras'; `unit` from scratch.
    Auto,
}

/// How pixel values of 0..=255 become the network's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Normalize {
    /// Divided by 255.
    Unit,
    /// As `unit`, then ImageNet's mean and standard deviation per channel.
    Imagenet,
    /// BGR order, ImageNet's mean per channel subtracted from 0..255.
    Caffe,
}

/// How a mask is brought to half the input's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MaskResize {
    /// Nearest pixel centre: every pixel keeps a true class.
    Nearest,
    /// Bilinear on class numbers, then truncated, as the recipe's article does.
    Article,
}

/// Random changes to training samples; validation samples are only resized.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Augment {
    /// Half of the images are rotated by up to this many degrees either way, 0..=180; 0: off.
    pub rotate_degrees: f64,
    /// Half of the images are mirrored.
    pub horizontal_flip: bool,
    /// Range of the random crop's area as a fraction of the image's, `0 < low <= high <= 1`.
    pub scale: [f64; 2],
}

/// The network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Model {
    /// Classes a pixel can have, 3..=255; the trimap has pet, background and border.
    pub classes: u32,
    pub encoder: EncoderChoice,
    /// Scales the channels of every layer, above 0 up to 8.
    pub width: f64,
    /// Weights the encoder starts from: a file, a URL or a known name; empty: from scratch.
    pub pretrained: String,
    /// Leaves the encoder's parameters and batch-norm statistics as they are.
    pub freeze_encoder: bool,
    /// Batch norm uses its running statistics in training; parameters still train.
    pub freeze_batch_norm: bool,
    /// Batch norm's statistics are taken over all ranks.
    pub sync_batch_norm: bool,
}

/// What the job asks for; see [`JobConfig::encoder`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EncoderChoice {
    Torchvision,
    Keras,
    /// As the pretrained weights are: Keras' if they come from an HDF5 file, else torchvision's.
    Auto,
}

/// Which ResNet50.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EncoderVariant {
    /// v1.5: stride in the 3x3 convolution, no biases, batch norm eps 1e-5.
    Torchvision,
    /// v1: stride in the block's first 1x1 convolution, biases, batch norm eps 1.001e-5.
    Keras,
}

/// The optimisation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Train {
    /// Samples per step over all ranks, at least 1; the same at every world size.
    pub global_batch: u32,
    /// Samples a rank computes at once; 0: its whole share.
    pub micro_batch: u32,
    /// Passes over the training split, at least 1.
    pub epochs: u32,
    /// Adam's step size, above 0.
    pub learning_rate: f64,
    /// Adam's step size in the encoder, scheduled alike; 0: `learning_rate`.
    pub encoder_learning_rate: f64,
    pub schedule: Schedule,
    /// Epochs, possibly a fraction, over which both rates first rise linearly, below `epochs`; 0: none.
    pub warmup_epochs: f64,
    /// Factor of a pixel's loss by its true class, one a class, each above 0; empty: all count alike.
    pub class_weights: Vec<f64>,
    /// Factor of a Dice loss that is added to the cross-entropy; 0: none.
    pub dice_weight: f64,
    /// Gradients are scaled down to this global L2 norm; 0: off.
    pub clip_norm: f64,
    pub precision: Precision,
    /// MiB of gradients that are summed over the ranks at a time, while the rest are computed; above 0.
    pub bucket_mb: f64,
    pub compress_gradients: Compression,
}

/// The learning rate over a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    Constant,
    /// Half a cosine from the learning rate to 0 over the epochs after the warm-up.
    Cosine,
}

/// What a training step's forward and backward compute in. Parameters, their sums over the ranks and their update are
/// fp32 always, and so is validation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    Fp32,
    /// fp32, but on GPUs the factors of convolutions are rounded to 10 bits of mantissa (validation's, too).
    Tf32,
    /// Convolutions in bf16; the loss in fp32. On GPUs by PyTorch's autocast rules; on the CPU their factors alone are
    /// rounded, and sums and all else are fp32.
    Bf16,
}

/// How gradients travel to be summed over the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// In fp32.
    None,
    /// Rounded, in half the bytes.
    Bf16,
}

/// When to end before the last epoch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EarlyStopping {
    pub monitor: Monitor,
    /// Validations without improvement before the run ends, at least 1.
    pub patience: u32,
    /// Smaller improvements than this count as none, at least 0.
    pub min_delta: f64,
    /// So many first epochs are not judged.
    pub start_from_epoch: u32,
    /// The run's result is its best epoch's weights, not its last's.
    pub restore_best: bool,
}

/// The figure that decides which epoch is best.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Monitor {
    ValLoss,
    ValAccuracy,
    ValMiou,
}

impl Monitor {
    /// As a job file has it, and as events name the figure.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ValLoss => "val_loss",
            Self::ValAccuracy => "val_accuracy",
            Self::ValMiou => "val_miou",
        }
    }
}

/// The team and how long it waits for whom.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cluster {
    pub device: Device,
    /// Workers the first formation waits for, up to `start_timeout_s`; 0: whoever comes.
    pub workers: u32,
    /// Fewest workers to train with, at least 1.
    pub min_workers: u32,
    /// Most workers to admit.
    pub max_workers: u32,
    /// Seconds the first formation waits for `workers`.
    pub start_timeout_s: f64,
    /// Seconds a formation waits for more joiners; 0: not at all.
    pub regroup_window_s: f64,
    /// Seconds of silence after which a worker counts as lost.
    pub heartbeat_timeout_s: f64,
    /// Seconds a steady step may take before its slowest worker is removed.
    pub step_timeout_s: f64,
    /// Seconds workers go on waiting for a lost coordinator.
    pub coordinator_timeout_s: f64,
}

/// What the workers compute on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    Auto,
    Cpu,
    Cuda,
}

/// How often the run's state is made durable, and where.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Checkpoint {
    /// Directory, `file://` URL, or an object store's; empty: `checkpoints` in the run directory.
    pub store: String,
    /// Epochs between checkpoints; 0: none by epochs. Each epoch that is the best so far has one besides, and the last.
    pub every_epochs: u32,
    /// Steps between checkpoints; 0: none by steps.
    pub every_steps: u64,
    /// Newest checkpoints to keep besides the best, at least 1.
    pub keep: u32,
}

/// Where the coordinator listens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Server {
    /// Address workers and the command line connect to; port 0: any free one.
    #[serde(deserialize_with = "address")]
    pub grpc: SocketAddr,
    /// Address of the status page and metrics; port 0: any free one.
    #[serde(deserialize_with = "address")]
    pub http: SocketAddr,
    /// Address of plain `/livez` and `/readyz`, for an orchestrator's probes, which carry no credentials;
    /// empty: none.
    #[serde(with = "optional_address")]
    pub probes: Option<SocketAddr>,
    /// The coordinator's certificate and its chain, a PEM file; with `tls_key` and `tls_client_ca`, gRPC is
    /// mutual TLS.
    pub tls_cert: String,
    /// Its private key, a PEM file.
    pub tls_key: String,
    /// Certificate of the authority that workers' and operators' certificates come from, a PEM file.
    pub tls_client_ca: String,
    /// File with the token that workers must show.
    pub join_token_file: String,
    /// File with the token that operators may show.
    pub operator_token_file: String,
    /// Seconds to wait at the end for workers that have not heard of it yet.
    pub linger_s: f64,
}

/// What is told to other services.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Telemetry {
    /// URL of an OpenTelemetry collector that takes OTLP over gRPC, for traces; empty: none are sent.
    pub otlp: String,
}

impl JobConfig {
    /// Checks every range and contradiction, and refuses what this version does not do.
    ///
    /// [`load`] has done this already; it is for configurations that came another way.
    pub fn validate(&self) -> Result<(), JobError> {
        check::check(self).map_err(|problem| problem.at(Place::Default))
    }

    /// Reads what another process has written of a job, and [checks](Self::validate) it: what a job says is taken for
    /// granted afterwards.
    pub fn from_json(json: &str) -> Result<Self, JobError> {
        let job: Self =
            serde_json::from_str(json).map_err(|error| JobError::Json { reason: error.to_string() })?;
        job.validate()?;
        Ok(job)
    }

    /// Without what only a coordinator goes by: where it listens, what it tells, what it keeps, when it stops.
    pub fn of_workers(&self) -> Self {
        let cluster = Cluster {
            workers: 0,
            min_workers: 1,
            max_workers: Cluster::default().max_workers,
            start_timeout_s: Cluster::default().start_timeout_s,
            regroup_window_s: Cluster::default().regroup_window_s,
            ..self.cluster.clone()
        };
        Self {
            cluster,
            server: Server::default(),
            telemetry: Telemetry::default(),
            checkpoint: Checkpoint::default(),
            early_stopping: EarlyStopping::default(),
            ..self.clone()
        }
    }

    /// The encoder that is built. Tells by the pretrained weights' name alone, so that all sides agree
    /// without the file; whoever reads it refuses what contradicts.
    pub fn encoder(&self) -> EncoderVariant {
        match self.model.encoder {
            EncoderChoice::Torchvision => EncoderVariant::Torchvision,
            EncoderChoice::Keras => EncoderVariant::Keras,
            EncoderChoice::Auto if names_keras(&self.model.pretrained) => EncoderVariant::Keras,
            EncoderChoice::Auto => EncoderVariant::Torchvision,
        }
    }

    /// What is done to pixels.
    pub fn normalize(&self) -> Normalize {
        match (self.data.normalize, self.encoder()) {
            (NormalizeChoice::Unit, _) => Normalize::Unit,
            (NormalizeChoice::Imagenet, _) => Normalize::Imagenet,
            (NormalizeChoice::Caffe, _) => Normalize::Caffe,
            (NormalizeChoice::Auto, _) if self.model.pretrained.is_empty() => Normalize::Unit,
            (NormalizeChoice::Auto, EncoderVariant::Torchvision) => Normalize::Imagenet,
            (NormalizeChoice::Auto, EncoderVariant::Keras) => Normalize::Caffe,
        }
    }

    /// The same job with nothing left to follow from something else.
    pub fn resolved(&self) -> Self {
        let mut job = self.clone();
        job.model.encoder = match self.encoder() {
            EncoderVariant::Torchvision => EncoderChoice::Torchvision,
            EncoderVariant::Keras => EncoderChoice::Keras,
        };
        job.data.normalize = match self.normalize() {
            Normalize::Unit => NormalizeChoice::Unit,
            Normalize::Imagenet => NormalizeChoice::Imagenet,
            Normalize::Caffe => NormalizeChoice::Caffe,
        };
        job
    }

    /// The resolved configuration as a job file that loads to the same value.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("strings, numbers and one level of tables are always TOML")
    }

    /// The most samples that a rank of a team of `world` computes at once.
    pub fn most_at_once(&self, world: u32) -> u64 {
        let largest_share = u64::from(self.train.global_batch).div_ceil(u64::from(world.max(1)));
        match u64::from(self.train.micro_batch) {
            0 => largest_share,
            micro => micro.min(largest_share),
        }
    }

    /// `runs/<name>`, relative to the working directory.
    pub fn run_dir(&self) -> PathBuf {
        PathBuf::from("runs").join(&self.name)
    }
}

impl Data {
    /// `root` as a path; an object store's URL as it is.
    pub fn root_path(&self) -> PathBuf {
        local_path(&self.root)
    }

    /// Whether `root` is in an object store.
    pub fn is_remote(&self) -> bool {
        check::is_object_store(&self.root)
    }
}

impl Model {
    /// `pretrained`, if it is a file's name: known names and URLs have a colon.
    pub fn pretrained_file(&self) -> Option<&Path> {
        let is_file = !self.pretrained.is_empty() && !self.pretrained.contains(':');
        is_file.then(|| Path::new(&self.pretrained))
    }
}

impl Checkpoint {
    /// `store` as a path; `None` where it is left to the run directory, or is an object store.
    pub fn store_path(&self) -> Option<PathBuf> {
        (!self.store.is_empty() && !check::is_object_store(&self.store)).then(|| local_path(&self.store))
    }
}

impl Default for JobConfig {
    fn default() -> Self {
        Self {
            name: "pets".into(),
            seed: 44,
            data: Data::default(),
            augment: Augment::default(),
            model: Model::default(),
            train: Train::default(),
            early_stopping: EarlyStopping::default(),
            cluster: Cluster::default(),
            checkpoint: Checkpoint::default(),
            server: Server::default(),
            telemetry: Telemetry::default(),
        }
    }
}

impl Default for Data {
    fn default() -> Self {
        Self {
            root: "data/pets".into(),
            train_split: "annotations/trainval.txt".into(),
            val_split: "annotations/test.txt".into(),
            val_fraction: 0.0,
            image_size: 224,
            normalize: NormalizeChoice::Unit,
            mask_resize: MaskResize::Nearest,
            cache_mb: 4096,
            augment_on: AugmentOn::Auto,
            device_cache_mb: 4096,
            loader_threads: 0,
            read_ahead: 64,
            disk_cache_mb: 0,
            disk_cache_dir: String::new(),
        }
    }
}

impl Default for Augment {
    fn default() -> Self {
        Self { rotate_degrees: 30.0, horizontal_flip: true, scale: [0.7, 1.0] }
    }
}

impl Default for Model {
    fn default() -> Self {
        Self {
            classes: 3,
            encoder: EncoderChoice::Auto,
            width: 1.0,
            pretrained: String::new(),
            freeze_encoder: false,
            freeze_batch_norm: false,
            sync_batch_norm: false,
        }
    }
}

impl Default for Train {
    fn default() -> Self {
        Self {
            global_batch: 32,
            micro_batch: 0,
            epochs: 100,
            learning_rate: 1e-3,
            encoder_learning_rate: 0.0,
            schedule: Schedule::Constant,
            warmup_epochs: 0.0,
            class_weights: Vec::new(),
            dice_weight: 0.0,
            clip_norm: 0.0,
            precision: Precision::Fp32,
            bucket_mb: 25.0,
            compress_gradients: Compression::None,
        }
    }
}

impl Default for EarlyStopping {
    fn default() -> Self {
        Self {
            monitor: Monitor::ValLoss,
            patience: 5,
            min_delta: 0.0,
            start_from_epoch: 0,
            restore_best: true,
        }
    }
}

impl Default for Cluster {
    fn default() -> Self {
        Self {
            device: Device::Auto,
            workers: 0,
            min_workers: 1,
            max_workers: 1024,
            start_timeout_s: 300.0,
            regroup_window_s: 2.0,
            heartbeat_timeout_s: 10.0,
            step_timeout_s: 60.0,
            coordinator_timeout_s: 600.0,
        }
    }
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self { store: String::new(), every_epochs: 1, every_steps: 0, keep: 3 }
    }
}

impl Default for Server {
    fn default() -> Self {
        Self {
            grpc: SocketAddr::from(([127, 0, 0, 1], 7400)),
            http: SocketAddr::from(([127, 0, 0, 1], 7401)),
            probes: None,
            tls_cert: String::new(),
            tls_key: String::new(),
            tls_client_ca: String::new(),
            join_token_file: String::new(),
            operator_token_file: String::new(),
            linger_s: 5.0,
        }
    }
}

/// Bytes of so many MiB, or all that can be counted.
pub fn mebibytes(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX).saturating_mul(1 << 20)
}

/// Whether weights of this name are Keras'.
fn names_keras(pretrained: &str) -> bool {
    let file = pretrained.split(['?', '#']).next().unwrap_or_default().to_ascii_lowercase();
    file.starts_with("keras:") || file.ends_with(".h5") || file.ends_with(".hdf5")
}

fn local_path(place: &str) -> PathBuf {
    PathBuf::from(place.strip_prefix("file://").unwrap_or(place))
}

fn address<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_address(&text)
}

fn parse_address<E: serde::de::Error>(text: &str) -> Result<SocketAddr, E> {
    text.parse().map_err(|_| {
        E::custom(format!(
            "\"{text}\" is not an address; write an IP address and a port, such as 127.0.0.1:7400"
        ))
    })
}

/// An address, or an empty string for none.
mod optional_address {
    use super::*;

    pub fn serialize<S: serde::Serializer>(
        address: &Option<SocketAddr>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&address.map(|address| address.to_string()).unwrap_or_default())
    }

    pub fn deserialize<'de, D: serde::Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<SocketAddr>, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.is_empty() { Ok(None) } else { parse_address(&text).map(Some) }
    }
}

#[cfg(test)]
mod tests;
