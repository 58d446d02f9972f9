//! From the data set's bytes to the network's input, by one of two ways that give the same bits: samples are
//! augmented on the loader's threads and sent to the device, or they are kept there and augmented there.

mod input;
mod prefetch;
mod sampler;
mod store;

use std::sync::Arc;

use musher_dataset::{
    AugmentOptions, BatchPlan, Dataset, ImageCache, Loader, LoaderOptions, MaskResize, Split, Transform,
    View, Warnings,
};
use musher_proto::job::{self, AugmentOn, JobConfig};
use tch::{Device, TchError, Tensor};
use torch_ext::SideStream;
use tracing::info;

use super::TrainError;
use prefetch::{PrefetchOptions, Prefetcher};
use store::{Budgets, SampleStore};

pub(crate) use input::Input;

pub use input::DeviceBatch;
pub use store::KeptBytes;

/// Batches made ahead of the one in use: the deeper, the steadier; two steps' worth of bytes each way
/// is all that it costs.
const AHEAD: usize = 4;

/// A data set and who decodes it.
#[derive(Clone)]
pub struct TrainingData {
    pub dataset: Arc<Dataset>,
    pub cache: Arc<ImageCache>,
    pub warnings: Arc<Warnings>,
    /// Threads that decode, and augment where the device doesn't.
    pub threads: usize,
}

/// Where a replica's batches come from.
pub struct Feed {
    /// Into which samples become batches.
    pub(super) input: Input,
    job: Arc<JobConfig>,
    data: TrainingData,
    /// `None` if samples are augmented on the CPU.
    on_device: Option<OnDevice>,
}

/// Samples that are kept near the device, and the stream that makes batches of them.
struct OnDevice {
    store: Arc<SampleStore>,
    stream: SideStream,
}

impl Feed {
    pub fn new(job: Arc<JobConfig>, data: TrainingData, device: Device) -> Result<Self, TrainError> {
        let on_device = match job.data.augment_on {
            AugmentOn::Auto => device.is_cuda(),
            AugmentOn::Cpu => false,
            AugmentOn::Device => true,
        };
        let budgets = Budgets {
            device: job::mebibytes(job.data.device_cache_mb),
            host: job::mebibytes(job.data.cache_mb),
        };
        info!(on_device, device_cache_mb = job.data.device_cache_mb, "where samples are augmented");
        let on_device = match on_device {
            true => Some(OnDevice {
                store: Arc::new(SampleStore::new(device, budgets)),
                stream: SideStream::of(device).map_err(torch)?,
            }),
            false => None,
        };
        Ok(Self { input: Input::new(&job, device)?, job, data, on_device })
    }

    pub fn train_samples(&self) -> u64 {
        self.data.dataset.train().samples.len() as u64
    }

    pub fn val_samples(&self) -> u64 {
        self.data.dataset.val().samples.len() as u64
    }

    /// What is kept of the samples seen so far; nothing where the device does not augment.
    pub fn kept_bytes(&self) -> KeptBytes {
        self.on_device.as_ref().map_or_else(KeptBytes::default, |kept| kept.store.kept_bytes())
    }

    /// Training samples, augmented.
    pub fn training(
        &self,
        plan: impl Iterator<Item = BatchPlan> + Send + 'static,
    ) -> Result<Batches, TrainError> {
        let augment = AugmentOptions {
            rotate_degrees: self.job.augment.rotate_degrees,
            horizontal_flip: self.job.augment.horizontal_flip,
            scale: self.job.augment.scale,
        };
        self.batches(self.data.dataset.train(), Transform::Augment(augment), plan)
    }

    /// Validation samples, stretched to the image size.
    pub fn validation(
        &self,
        plan: impl Iterator<Item = BatchPlan> + Send + 'static,
    ) -> Result<Batches, TrainError> {
        self.batches(self.data.dataset.val(), Transform::Stretch, plan)
    }

    /// Validation samples as bytes, to be looked at.
    pub(super) fn pictures(&self, plan: impl Iterator<Item = BatchPlan> + Send + 'static) -> Loader {
        self.load(self.data.dataset.val(), self.view(Transform::Stretch), plan)
    }

    fn batches(
        &self,
        split: Arc<Split>,
        transform: Transform,
        plan: impl Iterator<Item = BatchPlan> + Send + 'static,
    ) -> Result<Batches, TrainError> {
        let (view, job, device) = (self.view(transform), self.job.clone(), self.input.device);
        let maker = match &self.on_device {
            None => Maker::Loader { loader: self.load(split, view, plan), input: Input::new(&job, device)? },
            Some(OnDevice { store, stream }) => {
                let TrainingData { warnings, threads, .. } = self.data.clone();
                let (store, stream) = (store.clone(), *stream);
                let options = PrefetchOptions { split, view, job, device, stream, store, threads, warnings };
                Maker::Prefetcher(Prefetcher::start(options, plan))
            }
        };
        Ok(Batches(maker))
    }

    fn load(
        &self,
        split: Arc<Split>,
        view: View,
        plan: impl Iterator<Item = BatchPlan> + Send + 'static,
    ) -> Loader {
        let TrainingData { cache, warnings, threads, .. } = self.data.clone();
        let read_ahead = self.job.data.read_ahead as usize;
        let options = LoaderOptions { split, view, threads, ahead: AHEAD, read_ahead, cache, warnings };
        Loader::start(options, plan)
    }

    fn view(&self, transform: Transform) -> View {
        let mask_resize = match self.job.data.mask_resize {
            job::MaskResize::Nearest => MaskResize::Nearest,
            job::MaskResize::Article => MaskResize::Article,
        };
        View { transform, mask_resize, image_size: self.job.data.image_size, seed: self.job.seed }
    }
}

/// Batches in the order of a plan, made ahead.
pub struct Batches(Maker);

enum Maker {
    Loader { loader: Loader, input: Input },
    Prefetcher(Prefetcher),
}

impl Batches {
    /// The next batch, or `None` behind the plan's end. Waits for it.
    ///
    /// # Errors
    /// Of a sample that can't be used, or of the device.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Option<Result<DeviceBatch, TrainError>> {
        match &mut self.0 {
            Maker::Prefetcher(prefetcher) => prefetcher.next(),
            Maker::Loader { loader, input } => {
                let batch = loader.next()?.map_err(TrainError::from);
                Some(batch.and_then(|batch| input.of_bytes(&batch)))
            }
        }
    }
}

/// Sends a tensor of the host to the device without waiting for it, nor for what the device does.
fn send(on_host: &Tensor, device: Device) -> Result<Tensor, TchError> {
    if !device.is_cuda() {
        return on_host.f_to_device(device);
    }
    let pinned = torch_ext::pin(on_host).map_err(torch)?;
    pinned.f_to_device_(device, pinned.kind(), true, false)
}

fn torch(error: torch_ext::Error) -> TchError {
    TchError::Torch(error.to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
