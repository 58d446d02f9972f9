//! One optimizer step: local gradients, their sum over the ranks, the control word, the update.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use musher_collective::{Phase, Tag};
use musher_model::{Mode, OverRanks};
use musher_proto::{
    ids::{Generation, Step},
    message::Activity,
    shard::scramble,
};

use tracing::trace_span;

use super::{
    Membership, SyncBatchNorm, TrainError, Trainer,
    data::DeviceBatch,
    exchange::{Buckets, overlapped},
    schedule::learning_rate,
};

/// So many steps in a row without a finite gradient end the run.
const BAD_STREAK_LIMIT: u32 = 20;

pub(super) struct StepOutcome {
    /// Mean over the global batch's pixels.
    pub loss: f64,
    /// Some rank wants this to be the last step.
    pub stop: bool,
    /// This rank's own work, waiting for peers not counted.
    pub compute: Duration,
}

/// What the ranks sum at the end of each step, after the last gradient.
struct ControlWord {
    /// Adds up to world x nonce only if all ranks are at this very step of this generation.
    nonce: f64,
    stop: f64,
    loss_sum: f64,
}

/// What all ranks do in a step whose batch norm is over all their batches: as many passes as the largest share
/// needs.
#[derive(Clone, Copy)]
struct Together<'a> {
    norm: &'a SyncBatchNorm,
    largest_share: u64,
}

impl Trainer {
    /// Trains on one global batch, of which `batch` is this rank's share, possibly empty.
    ///
    /// On an error the step leaves no trace in the replica.
    pub(super) fn step(
        &mut self,
        member: &mut Membership,
        batch: &DeviceBatch,
        positions: Range<u64>,
        stop: bool,
    ) -> Result<StepOutcome, TrainError> {
        self.board.mark(Activity::Working);
        let started = Instant::now();
        let position = self.position();
        let samples = positions.end - positions.start;
        let mask_side = u64::from(self.job.data.image_size / 2);
        let pixels = (samples * mask_side * mask_side) as f64;

        let step = position.applied;
        let _span = trace_span!("step", rank = member.rank().0, step = step.0).entered();

        self.replica.begin_step()?;
        self.replica.zero_gradients()?;
        let gradients = self.replica.bucket_gradients()?;
        let buckets = Buckets { step, gradients, compression: self.job.train.compress_gradients };
        let together = member.batch_norm.as_ref().map(|norm| Together {
            norm,
            largest_share: samples.div_ceil(u64::from(member.collective.world())),
        });
        let (loss_sum, local) = overlapped(member.collective.as_mut(), buckets, |launcher| {
            if let Some(Together { norm, .. }) = together {
                norm.begin(step);
            }
            let ready = move |_| launcher.launch();
            let loss_sum =
                self.accumulate(batch, 1.0 / pixels, together, ready).map_err(|error| match together {
                    Some(Together { norm, .. }) => norm.reason(error),
                    None => error,
                })?;
            self.board.mark(Activity::WaitingForPeers);
            let waited = together.map_or(Duration::ZERO, |together| together.norm.waited());
            Ok((loss_sum, started.elapsed().saturating_sub(waited)))
        })?;
        let nonce = nonce(member.generation, step);
        let mine = ControlWord { nonce, stop: f64::from(u8::from(stop)), loss_sum };
        let sum = trace_span!("control").in_scope(|| mine.sum(member, step))?;
        if sum.nonce != nonce * f64::from(member.world()) {
            return Err(TrainError::Incomplete { step: step.0 });
        }

        self.board.mark(Activity::Working);
        let updating = Instant::now();
        let loss = sum.loss_sum / pixels;
        self.update(positions, samples, loss, batch.sample_ids.len() as u64)?;
        Ok(StepOutcome { loss, stop: sum.stop > 0.0, compute: local + updating.elapsed() })
    }

    /// Computes the gradient of two black images and forgets it: what is slow once is behind this replica
    /// before a team waits for it.
    pub fn warm_up(&mut self) -> Result<(), TrainError> {
        let batch = self.data.input.black(2)?;
        self.replica.begin_step()?;
        self.accumulate(&batch, 0.0, None, |_| ())?;
        Ok(self.replica.zero_gradients()?)
    }

    /// Adds the gradient of this rank's share; returns its loss summed over pixels. An empty share adds
    /// nothing and leaves batch norm alone. `ready` hears of each bucket that is complete; it is dropped once all
    /// are.
    fn accumulate(
        &mut self,
        batch: &DeviceBatch,
        scale: f64,
        together: Option<Together>,
        ready: impl FnMut(usize) + Send + 'static,
    ) -> Result<f64, TrainError> {
        let share = batch.sample_ids.len() as u64;
        let micro = match u64::from(self.job.train.micro_batch) {
            0 => together.map_or(share, |together| together.largest_share).max(1),
            micro => micro,
        };
        let passes = together.map_or(share, |together| together.largest_share).div_ceil(micro);
        let mut ready = Some(ready);
        let mut loss_sum = 0.0;
        for pass in 0..passes {
            let samples = share.min(pass * micro)..share.min((pass + 1) * micro);
            let ready = ready.take_if(|_| pass + 1 == passes);
            if samples.is_empty() {
                // Only together are there more passes than samples: one that counts for nothing.
                let black = self.data.input.black(1)?;
                let over_ranks = together.map(|together| together.norm.over_ranks(false));
                self.forward_backward(&black, 0.0, over_ranks, ready)?;
            } else {
                let part = batch.slice(samples.start as i64, (samples.end - samples.start) as i64)?;
                let over_ranks = together.map(|together| together.norm.over_ranks(true));
                loss_sum += self.forward_backward(&part, scale, over_ranks, ready)?;
            }
        }
        Ok(loss_sum)
    }

    /// Forward and backward of images and masks; batch norm may be over the batches of all ranks.
    fn forward_backward(
        &mut self,
        batch: &DeviceBatch,
        scale: f64,
        over_ranks: Option<OverRanks>,
        ready: Option<impl FnMut(usize) + Send + 'static>,
    ) -> Result<f64, musher_model::Error> {
        let logits = trace_span!("forward").in_scope(|| match &over_ranks {
            None => self.replica.forward(&batch.images, Mode::Train),
            Some(ranks) => self.replica.forward_over_ranks(&batch.images, ranks),
        })?;
        trace_span!("backward").in_scope(|| match ready {
            None => self.replica.backward_sum_loss(&logits, &batch.masks, scale),
            Some(ready) => self.replica.backward_last(&logits, &batch.masks, scale, ready),
        })
    }

    /// The step is complete on all ranks: it counts, and changes the parameters if its gradient is
    /// finite. All ranks hold the same gradient, so they agree without asking.
    fn update(
        &mut self,
        positions: Range<u64>,
        samples: u64,
        loss: f64,
        own_samples: u64,
    ) -> Result<(), TrainError> {
        let _span = trace_span!("update").entered();
        let mut position = self.position();
        let gradient = self.replica.gradient_norm_and_finite()?;
        if gradient.finite {
            let clip_norm = self.job.train.clip_norm;
            if clip_norm > 0.0 {
                self.replica.clip_gradients(gradient, clip_norm)?;
            }
            let rate = self.learning_rate(position.applied);
            self.replica.adam_step(rate, false)?;
            self.replica.commit()?;
            self.unpooled_samples += own_samples;
            self.bad_streak = 0;
        } else {
            position.totals.steps_skipped += 1;
            self.bad_streak += 1;
        }
        position.applied = position.applied.next();
        position.cursor = positions.end;
        position.totals.loss_sum += loss * samples as f64;
        self.replica.set_counters(position.to_counters());
        match self.bad_streak {
            BAD_STREAK_LIMIT.. => Err(TrainError::NotFinite(self.bad_streak)),
            _ => Ok(()),
        }
    }

    /// That of the step which follows `applied` steps.
    fn learning_rate(&self, applied: Step) -> f64 {
        let train = &self.job.train;
        let epoch = self.data.train_samples().div_ceil(u64::from(train.global_batch));
        let warmup = (train.warmup_epochs * epoch as f64).round() as u64;
        learning_rate(train, applied, warmup, epoch * u64::from(train.epochs))
    }
}

impl ControlWord {
    fn sum(self, member: &mut Membership, step: Step) -> Result<Self, TrainError> {
        let mut words = [self.nonce, self.stop, self.loss_sum];
        member.collective.all_reduce_f64(Tag::new(step.0, 0, Phase::Control), &mut words)?;
        let [nonce, stop, loss_sum] = words;
        Ok(Self { nonce, stop, loss_sum })
    }
}

/// A number that belongs to this step of this generation alone, small enough for its sums over any team
/// to be exact in f64.
fn nonce(generation: Generation, step: Step) -> f64 {
    let bits = scramble(scramble(generation.0) ^ step.0) >> 32;
    (bits | 1) as f64
}
