//! Batches of samples as the network gets them, in bytes: decoded or from the cache, augmented and
//! resized on a pipeline's threads.

use std::sync::Arc;

use crate::pipeline::{BatchPlan, Pace, Pipeline, Recipe};
use crate::read_ahead::ReadAhead;
use crate::{DatasetError, ImageCache, Sample, Split, View, Warnings};

/// A running loader. Dropping it makes its threads end after the sample they are at.
pub struct Loader(Pipeline<Batch>);

pub struct LoaderOptions {
    pub split: Arc<Split>,
    pub view: View,
    /// At least one is started.
    pub threads: usize,
    /// Batches that may be finished or begun before they are asked for; at least one.
    pub ahead: usize,
    /// Samples of a packed split that may be read before they are decoded.
    pub read_ahead: usize,
    pub cache: Arc<ImageCache>,
    pub warnings: Arc<Warnings>,
}

/// What a plan became.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    pub key: u64,
    pub sample_ids: Vec<u64>,
    /// [N, S, S, 3], RGB, 0..=255.
    pub images: Vec<u8>,
    /// [N, S/2, S/2], class indices.
    pub masks: Vec<u8>,
}

impl Loader {
    /// Starts the threads; they work until the plan ends or the loader is dropped.
    ///
    /// The plan is asked from these threads, one at a time. It may wait, for instance on a channel.
    pub fn start(options: LoaderOptions, plan: impl Iterator<Item = BatchPlan> + Send + 'static) -> Self {
        let LoaderOptions { split, view, threads, ahead, read_ahead, cache, warnings } = options;
        let kept = cache.clone();
        let wanted = Box::new(move |sample: &Sample| !kept.holds(sample));
        let (plan, read) = ReadAhead::start(&split, wanted, read_ahead, &warnings, plan);
        Self(Pipeline::start(Rendering { split, view, cache, read, warnings }, Pace { threads, ahead }, plan))
    }

    /// The next batch in the plan's order, or `None` behind its end. Waits for it.
    ///
    /// # Errors
    /// Of a sample of this batch (the first in its order); the batches behind it still follow.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Option<Result<Batch, DatasetError>> {
        self.0.next()
    }
}

struct Rendering {
    split: Arc<Split>,
    view: View,
    cache: Arc<ImageCache>,
    read: Option<ReadAhead>,
    warnings: Arc<Warnings>,
}

struct Rendered {
    image: Vec<u8>,
    mask: Vec<u8>,
}

impl Recipe for Rendering {
    type Sample = Rendered;
    type Batch = Batch;

    fn sample(&self, epoch: u32, id: u64) -> Result<Rendered, DatasetError> {
        let sample = self.split.sample(id)?;
        // Taken even if it came into the cache meanwhile, to make room for the next.
        let pair = match self.read.as_ref().and_then(|read| read.take(id)) {
            Some(bytes) => self.cache.get_or_decode(sample, || bytes, &self.warnings)?,
            None => self.cache.get(sample, &self.warnings)?,
        };
        let mut rendered =
            Rendered { image: vec![0; self.view.image_bytes()], mask: vec![0; self.view.mask_bytes()] };
        self.view.render(&pair, epoch, id, &mut rendered.image, &mut rendered.mask);
        Ok(rendered)
    }

    fn batch(&self, plan: BatchPlan, samples: Vec<Rendered>) -> Batch {
        let mut images = Vec::with_capacity(samples.len() * self.view.image_bytes());
        let mut masks = Vec::with_capacity(samples.len() * self.view.mask_bytes());
        for Rendered { image, mask } in &samples {
            images.extend_from_slice(image);
            masks.extend_from_slice(mask);
        }
        Batch { key: plan.key, sample_ids: plan.sample_ids, images, masks }
    }

    fn list(&self) -> &str {
        &self.split.list
    }
}
