//! Batches of samples that are merely decoded, for a consumer that keeps and augments them itself:
//! what it has already is not decoded again.

use std::sync::Arc;

use crate::decode::decode_bytes;
use crate::pipeline::{BatchPlan, Pace, Pipeline, Recipe};
use crate::read_ahead::ReadAhead;
use crate::{DatasetError, Raster, Sample, Split, Warnings};

/// A running decoder. Dropping it makes its threads end after the sample they are at.
pub struct Decoder(Pipeline<Decoded>);

pub struct DecoderOptions<W> {
    pub split: Arc<Split>,
    /// Whether the consumer needs a sample's pixels; asked for each sample of the plan, from the
    /// decoder's threads.
    pub wanted: W,
    /// At least one is started.
    pub threads: usize,
    /// Batches that may be finished or begun before they are asked for; at least one.
    pub ahead: usize,
    /// Samples of a packed split that may be read before they are decoded.
    pub read_ahead: usize,
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
        let DecoderOptions { split, wanted, threads, ahead, read_ahead, warnings } = options;
        let wanted = Arc::new(wanted);
        let asked = wanted.clone();
        let (plan, read) = ReadAhead::start(
            &split,
            Box::new(move |sample: &Sample| asked(sample)),
            read_ahead,
            &warnings,
            plan,
        );
        Self(Pipeline::start(Decoding { split, wanted, read, warnings }, Pace { threads, ahead }, plan))
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
    wanted: Arc<W>,
    read: Option<ReadAhead>,
    warnings: Arc<Warnings>,
}

impl<W: Fn(&Sample) -> bool + Send + Sync + 'static> Recipe for Decoding<W> {
    type Sample = Option<Raster<4>>;
    type Batch = Decoded;

    fn sample(&self, _epoch: u32, id: u64) -> Result<Option<Raster<4>>, DatasetError> {
        let sample = self.split.sample(id)?;
        // Taken even if it is not wanted any more, to make room for the next.
        let read = self.read.as_ref().and_then(|read| read.take(id));
        if !(self.wanted)(sample) {
            return Ok(None);
        }
        let mut warn = |warning| self.warnings.report(warning);
        let bytes = read.unwrap_or_else(|| sample.read(&mut warn))?;
        Ok(Some(decode_bytes(sample, &bytes, &mut warn)?.interleaved()))
    }

    fn batch(&self, plan: BatchPlan, samples: Vec<Option<Raster<4>>>) -> Decoded {
        Decoded { plan, samples }
    }

    fn list(&self) -> &str {
        &self.split.list
    }
}
