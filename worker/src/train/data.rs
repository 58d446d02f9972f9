//! From the data set's bytes to the network's input.

use std::sync::Arc;

use musher_dataset::{
    AugmentOptions, Batch, BatchPlan, Dataset, ImageCache, Loader, LoaderOptions, MaskResize, Split,
    Transform, View, Warnings,
};
use musher_proto::job::{self, JobConfig, Normalize};
use tch::{Device, Kind, Tensor};

use super::TrainError;

/// Batches made ahead of the one in use: the deeper, the steadier; two steps' worth of bytes each way
/// is all that it costs.
const AHEAD: usize = 4;

/// ImageNet's channel means and standard deviations, RGB of 0..1, as torchvision's models use them.
const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];
/// ImageNet's channel means, BGR of 0..255, as Keras' `caffe` preprocessing subtracts them.
const CAFFE_MEAN: [f32; 3] = [103.939, 116.779, 123.68];

/// A data set and how its samples become tensors.
pub struct TrainingData {
    pub dataset: Arc<Dataset>,
    pub cache: Arc<ImageCache>,
    pub warnings: Arc<Warnings>,
    /// Threads that decode and augment.
    pub threads: usize,
}

impl TrainingData {
    /// Training samples, augmented.
    pub(super) fn training(
        &self,
        job: &JobConfig,
        plan: impl Iterator<Item = BatchPlan> + Send + 'static,
    ) -> Loader {
        let augment = AugmentOptions {
            rotate_degrees: job.augment.rotate_degrees,
            horizontal_flip: job.augment.horizontal_flip,
            scale: job.augment.scale,
        };
        self.load(job, self.dataset.train(), Transform::Augment(augment), plan)
    }

    /// Validation samples, stretched to the image size.
    pub(super) fn validation(
        &self,
        job: &JobConfig,
        plan: impl Iterator<Item = BatchPlan> + Send + 'static,
    ) -> Loader {
        self.load(job, self.dataset.val(), Transform::Stretch, plan)
    }

    fn load(
        &self,
        job: &JobConfig,
        split: Arc<Split>,
        transform: Transform,
        plan: impl Iterator<Item = BatchPlan> + Send + 'static,
    ) -> Loader {
        let mask_resize = match job.data.mask_resize {
            job::MaskResize::Nearest => MaskResize::Nearest,
            job::MaskResize::Article => MaskResize::Article,
        };
        let options = LoaderOptions {
            split,
            view: View { transform, mask_resize, image_size: job.data.image_size, seed: job.seed },
            threads: self.threads,
            ahead: AHEAD,
            cache: self.cache.clone(),
            warnings: self.warnings.clone(),
        };
        Loader::start(options, plan)
    }
}

/// Images [N, 3, S, S] f32, channels last, normalised; masks [N, S/2, S/2] i64 classes.
pub(super) struct DeviceBatch {
    pub images: Tensor,
    pub masks: Tensor,
}

impl DeviceBatch {
    pub fn new(batch: &Batch, job: &JobConfig, device: Device) -> Result<Self, TrainError> {
        let n = batch.sample_ids.len() as i64;
        let side = i64::from(job.data.image_size);
        let bytes = Tensor::f_from_data_size(&batch.images, &[n, side, side, 3], Kind::Uint8)?;
        let masks = Tensor::f_from_data_size(&batch.masks, &[n, side / 2, side / 2], Kind::Uint8)?;
        Ok(Self {
            images: normalise(&bytes.f_to_device(device)?, job.data.normalize)?.f_permute([0, 3, 1, 2])?,
            masks: masks.f_to_device(device)?.f_to_kind(Kind::Int64)?,
        })
    }

    /// Samples `start..start + len`.
    pub fn slice(&self, start: i64, len: i64) -> Result<Self, TrainError> {
        Ok(Self { images: self.images.f_narrow(0, start, len)?, masks: self.masks.f_narrow(0, start, len)? })
    }
}

/// Bytes [N, S, S, 3] RGB to the network's input, of the same shape.
fn normalise(bytes: &Tensor, normalize: Normalize) -> Result<Tensor, TrainError> {
    let images = bytes.f_to_kind(Kind::Float)?;
    let channels = |values: [f32; 3]| Tensor::from_slice(&values).to_device(bytes.device());
    Ok(match normalize {
        // Without pretrained weights there is nothing to follow.
        Normalize::Unit | Normalize::Auto => images.f_div_scalar(255.0)?,
        Normalize::Imagenet => {
            let unit = images.f_div_scalar(255.0)?;
            unit.f_sub(&channels(IMAGENET_MEAN))?.f_div(&channels(IMAGENET_STD))?
        }
        Normalize::Caffe => images.f_flip([3])?.f_sub(&channels(CAFFE_MEAN))?,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn pixel(normalize: Normalize) -> Vec<f32> {
        let bytes = Tensor::from_slice(&[255u8, 0, 51]).view([1, 1, 1, 3]);
        Vec::try_from(normalise(&bytes, normalize).unwrap().flatten(0, -1)).unwrap()
    }

    fn assert_close(found: &[f32], expected: [f32; 3]) {
        assert!(
            found.iter().zip(expected).all(|(f, e)| (f - e).abs() < 1e-4),
            "{found:?} is not {expected:?}"
        );
    }

    #[test]
    fn pixels_are_normalised_as_the_weights_expect() {
        assert_close(&pixel(Normalize::Unit), [1.0, 0.0, 0.2]);
        assert_close(&pixel(Normalize::Imagenet), [2.2489083, -2.0357143, -0.9155556]);
        assert_close(&pixel(Normalize::Caffe), [51.0 - 103.939, -116.779, 255.0 - 123.68]);
    }
}
