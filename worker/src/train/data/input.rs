//! What the network gets: bytes on the device, normalised, and classes.

use musher_dataset::Batch;
use musher_proto::job::{JobConfig, Normalize};
use tch::{Device, Kind, TchError, Tensor};

use super::send;
use crate::train::TrainError;

/// A rank's share of a global batch, or a unit of validation; possibly without samples.
pub struct DeviceBatch {
    /// The plan's.
    pub key: u64,
    pub sample_ids: Vec<u64>,
    /// [N, 3, S, S] f32, channels last, normalised.
    pub images: Tensor,
    /// [N, S/2, S/2] i64, classes.
    pub masks: Tensor,
}

impl DeviceBatch {
    /// Samples `start..start + len`.
    pub fn slice(&self, start: i64, len: i64) -> Result<Self, TrainError> {
        Ok(Self {
            key: self.key,
            sample_ids: self.sample_ids[start as usize..(start + len) as usize].to_vec(),
            images: self.images.f_narrow(0, start, len)?,
            masks: self.masks.f_narrow(0, start, len)?,
        })
    }
}

/// How bytes become a batch.
pub(crate) struct Input {
    /// S.
    pub image_size: u32,
    pub device: Device,
    scale: Scale,
}

impl Input {
    pub fn new(job: &JobConfig, device: Device) -> Result<Self, TrainError> {
        Ok(Self { image_size: job.data.image_size, device, scale: Scale::new(job.normalize(), device)? })
    }

    /// Sends a batch to the device.
    pub fn of_bytes(&self, batch: &Batch) -> Result<DeviceBatch, TrainError> {
        let (n, side) = (batch.sample_ids.len() as i64, i64::from(self.image_size));
        let images = Tensor::f_from_data_size(&batch.images, &[n, side, side, 3], Kind::Uint8)?;
        let masks = Tensor::f_from_data_size(&batch.masks, &[n, side / 2, side / 2], Kind::Uint8)?;
        self.batch(
            batch.key,
            batch.sample_ids.clone(),
            &send(&images, self.device)?,
            &send(&masks, self.device)?,
        )
    }

    /// So many black images, all foreground.
    pub fn black(&self, samples: usize) -> Result<DeviceBatch, TrainError> {
        let pixels = samples * self.image_size as usize * self.image_size as usize;
        self.of_bytes(&Batch {
            key: 0,
            sample_ids: (0..samples as u64).collect(),
            images: vec![0; pixels * 3],
            masks: vec![0; pixels / 4],
        })
    }

    /// Images [N, S, S, 3] of whole numbers on the device to [N, 3, S, S], normalised.
    pub fn images(&self, bytes: &Tensor) -> Result<Tensor, TchError> {
        self.scale.apply(bytes)?.f_permute([0, 3, 1, 2])
    }

    /// Of images [N, S, S, 3] and masks [N, S/2, S/2] on the device, both in whole numbers.
    pub fn batch(
        &self,
        key: u64,
        sample_ids: Vec<u64>,
        images: &Tensor,
        masks: &Tensor,
    ) -> Result<DeviceBatch, TrainError> {
        Ok(DeviceBatch {
            key,
            sample_ids,
            images: self.images(images)?,
            masks: masks.f_to_kind(Kind::Int64)?,
        })
    }
}

/// ImageNet's channel means and standard deviations, RGB of 0..1, as torchvision's models use them.
const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];
/// ImageNet's channel means, BGR of 0..255, as Keras' `caffe` preprocessing subtracts them.
const CAFFE_MEAN: [f32; 3] = [103.939, 116.779, 123.68];

/// What is done to values of 0..=255. Its numbers lie on the device, one a channel: to a number of the host, CUDA
/// divides by multiplying with its inverse, and that rounds otherwise than the CPU.
enum Scale {
    Unit { white: Tensor },
    Imagenet { white: Tensor, mean: Tensor, deviation: Tensor },
    Caffe { mean: Tensor },
}

impl Scale {
    fn new(normalize: Normalize, device: Device) -> Result<Self, TchError> {
        let channels = |values: [f32; 3]| Tensor::f_from_slice(&values)?.f_to_device(device);
        let white = channels([255.0; 3])?;
        Ok(match normalize {
            Normalize::Unit => Self::Unit { white },
            Normalize::Imagenet => {
                Self::Imagenet { white, mean: channels(IMAGENET_MEAN)?, deviation: channels(IMAGENET_STD)? }
            }
            Normalize::Caffe => Self::Caffe { mean: channels(CAFFE_MEAN)? },
        })
    }

    /// Images [N, S, S, 3] of whole numbers 0..=255, RGB, to the network's input, of the same shape.
    fn apply(&self, images: &Tensor) -> Result<Tensor, TchError> {
        let images = images.f_to_kind(Kind::Float)?;
        match self {
            Self::Unit { white } => images.f_div(white),
            Self::Imagenet { white, mean, deviation } => images.f_div(white)?.f_sub(mean)?.f_div(deviation),
            Self::Caffe { mean } => images.f_flip([3])?.f_sub(mean),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn pixel(normalize: Normalize) -> Vec<f32> {
        let bytes = Tensor::from_slice(&[255u8, 0, 51]).view([1, 1, 1, 3]);
        let scale = Scale::new(normalize, Device::Cpu).unwrap();
        Vec::try_from(scale.apply(&bytes).unwrap().flatten(0, -1)).unwrap()
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
