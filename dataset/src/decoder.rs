//! Batches of samples that are merely decoded, for a consumer that keeps and augments them itself:
//! what it has already is not decoded again.

use std::sync::Arc;

use crate::pipeline::{BatchPlan, Pace, Pipeline, Recipe};
use crate::{DatasetError, Raster, Sample, Split, Warnings, decode_pair};

/// A running decoder. Dropping it makes its threads end after the sample they are at.
pub struct Decoder(Pipeline<Decoded>);

pub struct DecoderOptions<W> {
    pub split: Arc<Split>,
    /// Whether the consumer needs a sample's pixels; asked once for each sample of the plan, from the
    /// decoder's threads.
    pub wanted: W,
    /// At least one is started.
    pub threads: usize,
    /// Batches that may be finished or begun before they are asked for; at least one.
    pub ahead: usize,
    pub warnings: Arc<Warnings>,
}

/// What a plan became.
#[derive(Debug)]
pub struct Decoded {
    pub plan: BatchPlan,
    /// Red, green, blue and class of each sample; `None` where it was not wanted.
    pub samples: Vec<Option<Raster<4>>>,
}

impl Decoder {
    /// Starts the threads; they work until the plan ends or the decoder is dropped.
    ///
    /// The plan is asked from these threads, one at a time. It may wait, for instance on a channel.
    pub fn start(
        options: DecoderOptions<impl Fn(&Sample) -> bool + Send + Sync + 'static>,
        plan: impl Iterator<Item = BatchPlan> + Send + 'static,
    ) -> Self {
        let DecoderOptions { split, wanted, threads, ahead, warnings } = options;
        Self(Pipeline::start(Decoding { split, wanted, warnings }, Pace { threads, ahead }, plan))
    }

    /// The next batch in the plan's order, or `None` behind its end. Waits for it.
    ///
    /// # Errors
    /// Of a sample of this batch (the first in its order); the batches behind it still follow.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Option<Result<Decoded, DatasetError>> {
        self.0.next()
    }
}

struct Decoding<W> {
    split: Arc<Split>,
    wanted: W,
    warnings: Arc<Warnings>,
}

impl<W: Fn(&Sample) -> bool + Send + Sync + 'static> Recipe for Decoding<W> {
    type Sample = Option<Raster<4>>;
    type Batch = Decoded;

    fn sample(&self, _epoch: u32, id: u64) -> Result<Option<Raster<4>>, DatasetError> {
        let sample = self.split.sample(id)?;
        if !(self.wanted)(sample) {
            return Ok(None);
        }
        let pair = decode_pair(sample, &mut |warning| self.warnings.report(warning))?;
        Ok(Some(pair.interleaved()))
    }

    fn batch(&self, plan: BatchPlan, samples: Vec<Option<Raster<4>>>) -> Decoded {
        Decoded { plan, samples }
    }

    fn list(&self) -> &str {
        &self.split.list
    }
}
