//! What a replica is built from.

use crate::Error;

/// Which ResNet50 encodes the image. They differ in more than their weights' origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Encoder {
    /// v1.5: a stage's stride is in the 3x3 convolution; no convolution biases; batch norm's epsilon is 1e-5, its
    /// momentum 0.1.
    #[default]
    Torchvision,
    /// v1: a stage's stride is in its first 1x1 convolution; convolutions have biases; epsilon is 1.001e-5, and
    /// Keras' momentum of 0.99 is 0.01 in torch's terms.
    Keras,
}

/// How a replica computes: the same to rounding, and each best on its kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// By this project's kernels for CPUs, which add to the flat gradient where it lies.
    Host,
    /// By libtorch's kernels, channels-last, by few launches: a bucket's gradients are copied into the flat gradient
    /// together, and convolutions' weights are rounded to bf16 all at once.
    Device,
}

impl Manner {
    pub fn of(device: tch::Device) -> Self {
        if device == tch::Device::Cpu { Self::Host } else { Self::Device }
    }
}

/// The network's shape and what of it learns.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelOptions {
    /// Classes to tell apart, 2 to 256.
    pub classes: usize,
    pub encoder: Encoder,
    /// Scales all channels: a count `c` becomes `max(1, round(c * width))`, halves to even.
    pub width: f64,
    /// The encoder's parameters and its batch-norm statistics stay as they are.
    pub freeze_encoder: bool,
    /// Every batch norm uses its running statistics and leaves them alone; its parameters still train.
    pub freeze_batch_norm: bool,
    /// Height and width of the images in pixels, a multiple of 32. Logits and masks have half of it.
    pub image_size: usize,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            classes: 3,
            encoder: Encoder::default(),
            width: 1.0,
            freeze_encoder: false,
            freeze_batch_norm: false,
            image_size: 224,
        }
    }
}

impl ModelOptions {
    pub(crate) fn validate(&self) -> Result<(), Error> {
        let refuse = |reason: String| Err(Error::Options(reason));
        if !(2..=256).contains(&self.classes) {
            return refuse(format!("2 to 256 classes are possible, not {}", self.classes));
        }
        if !(self.width > 0.0 && self.width <= 16.0) {
            return refuse(format!("its width must be above 0 and at most 16, not {}", self.width));
        }
        if self.image_size == 0 || !self.image_size.is_multiple_of(32) || self.image_size > 1 << 14 {
            return refuse(format!(
                "the image size must be a multiple of 32 up to 16384, not {}",
                self.image_size
            ));
        }
        Ok(())
    }

    /// `channels` of the full network, scaled.
    pub(crate) fn scaled(&self, channels: i64) -> i64 {
        ((channels as f64 * self.width).round_ties_even() as i64).max(1)
    }
}
