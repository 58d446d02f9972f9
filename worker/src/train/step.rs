//! One optimizer step: local gradients, their sum over the ranks, the control word, the update. All of it is given to
//! the device; what it came to is seen when it is there, on a GPU in the midst of the next step.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use musher_collective::{Phase, Tag};
use musher_model::{Mode, OverRanks};
use musher_proto::{ids::Step, message::Activity};
use tch::{Kind, Tensor};
use tracing::{debug, trace_span};

use super::{
    Membership, SyncBatchNorm, TrainError, Trainer,
    data::DeviceBatch,
    exchange::{Before, Buckets, overlapped, sum_bucket},
    member::tensors,
    outcome::{Milestone, Outcome, Seen},
};

/// So many steps in a row without a finite gradient end the run.
const BAD_STREAK_LIMIT: u32 = 20;

/// What the loop over a segment's steps is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Go,
    /// Some rank wanted the last step to be the last.
    Stop,
}

/// A step whose outcome nobody has seen.
pub(super) struct InFlight {
    step: Step,
    positions: Range<u64>,
    /// Of this rank.
    samples: u64,
    /// Of the global batch.
    pixels: f64,
    outcome: Outcome,
    /// When this rank had nothing else to do any more.
    began: Instant,
    /// In the midst of its own part, for peers.
    waited: Duration,
    /// For the host to give the update to the device; on the CPU, to make it.
    update: Duration,
}

/// What all ranks do in a step whose batch norm is over all their batches: as many passes as the largest share
/// needs.
#[derive(Clone, Copy)]
struct Together<'a> {
    norm: &'a SyncBatchNorm,
    largest_share: u64,
}

impl Trainer {
    /// Trains on one global batch, of which `batch` is this rank's share, possibly empty. `after_step` sees the loss of
    /// each step that is found to be applied.
    ///
    /// On an error, or if it is to stop, the step leaves no trace in the replica.
    pub(super) fn step(
        &mut self,
        member: &mut Membership,
        batch: &DeviceBatch,
        positions: Range<u64>,
        stop: bool,
        after_step: &mut impl FnMut(f64),
    ) -> Result<Next, TrainError> {
        if member.batch_norm.is_some() && self.finish_step(member, after_step)? == Next::Stop {
            return Ok(Next::Stop); // its forward pass has exchanges already
        }
        self.board.mark(Activity::Working);
        let started = Instant::now();
        let step = Step(self.position().applied.0 + u64::from(self.in_flight.is_some()));
        let samples = positions.end - positions.start;
        let mask_side = u64::from(self.job.data.image_size / 2);
        let pixels = (samples * mask_side * mask_side) as f64;
        let _span = trace_span!("step", rank = member.rank().0, step = step.0).entered();

        self.replica.begin_step()?;
        self.replica.zero_gradients()?;
        let buckets = Buckets {
            step,
            gradients: self.replica.bucket_gradients()?,
            compression: self.job.train.compress_gradients,
            device: self.replica.device(),
            stream: self.exchange_stream,
        };
        let world = u64::from(member.world());
        let Membership { hosts, gpus, batch_norm, control, .. } = member;
        let exchange = tensors(hosts, gpus);
        let together =
            batch_norm.as_ref().map(|norm| Together { norm, largest_share: samples.div_ceil(world) });

        let mut in_flight = self.in_flight.take();
        let board = self.board.clone();
        let before = in_flight.as_mut().map(|flight| Before { outcome: &mut flight.outcome, board: &board });
        let summed = overlapped(exchange, buckets, before, |launcher| {
            if let Some(Together { norm, .. }) = together {
                norm.begin(step);
            }
            let ready = move |_| launcher.launch();
            let loss_sum =
                self.accumulate(batch, 1.0 / pixels, together, ready).map_err(|error| match together {
                    Some(Together { norm, .. }) => norm.reason(error),
                    None => error,
                })?;
            let mut own_part = Milestone::set(self.replica.device())?;
            if own_part.is_reached()? {
                self.board.mark(Activity::WaitingForPeers);
            }
            let waited = together.map_or(Duration::ZERO, |together| together.norm.waited());
            Ok((loss_sum, own_part, waited))
        });
        // What is seen of the step before counts, whatever became of this one.
        self.in_flight = in_flight;
        let summed = summed?;
        // Until then the device was at the step before.
        let free = self.in_flight.as_ref().and_then(|flight| flight.outcome.seen());
        if self.in_flight.is_some() && self.settle(after_step)? == Next::Stop {
            return Ok(Next::Stop);
        }
        let Some((loss_sum, own_part, waited)) = summed else {
            return Err(TrainError::Incomplete { step: step.0 });
        };

        let words = control.words(step, stop, &loss_sum)?;
        trace_span!("control").in_scope(|| {
            exchange.all_reduce(Tag::new(step.0, 0, Phase::Control), &words)?;
            exchange.fence()
        })?;
        self.board.mark(Activity::Working);
        let updating = Instant::now();
        let complete = control.complete(step, &words)?;
        let finite = self.update(step, &complete)?;
        let outcome = Outcome::follow(own_part, &complete, &finite, &words)?;
        let began = free.map_or(started, |free| free.max(started));
        self.in_flight = Some(InFlight {
            step,
            positions,
            samples: batch.sample_ids.len() as u64,
            pixels,
            outcome,
            began,
            waited,
            update: updating.elapsed(),
        });
        match self.is_outcome_there()? && !self.looks_late {
            true => self.settle(after_step),
            false => Ok(Next::Go),
        }
    }

    /// Waits for the outcome of the step in flight, if there is one.
    pub(super) fn finish_step(
        &mut self,
        member: &mut Membership,
        after_step: &mut impl FnMut(f64),
    ) -> Result<Next, TrainError> {
        let Some(flight) = &mut self.in_flight else { return Ok(Next::Go) };
        flight.outcome.wait(member.tensors(), &self.board)?;
        self.settle(after_step)
    }

    /// After an error: breaks the exchanges off, and finds out what became of the step in flight.
    ///
    /// # Errors
    /// If this process should end.
    pub(super) fn abandon(
        &mut self,
        member: &mut Membership,
        after_step: &mut impl FnMut(f64),
    ) -> Result<(), TrainError> {
        member.leave()?;
        if self.is_outcome_there()? {
            // That it was not complete is no news, and what else is wrong shows in the next generation.
            let _ = self.settle(after_step);
        }
        self.in_flight = None;
        Ok(())
    }

    fn is_outcome_there(&mut self) -> Result<bool, TrainError> {
        Ok(self.in_flight.as_mut().map_or(Ok(false), |flight| flight.outcome.is_there())?)
    }

    /// Computes the gradient of black images and forgets it: what is slow once is behind this replica before a team
    /// waits for it.
    ///
    /// On a GPU they are as many as its share of a whole team will be, and cuDNN tries its best kernels on them. It
    /// remembers the fastest; in the run itself it tries none, as a team that changes, or an epoch's last batch, brings
    /// shapes that it would spend seconds on, each time, while others wait.
    pub fn warm_up(&mut self) -> Result<(), TrainError> {
        let cuda = self.replica.device().is_cuda();
        let cluster = &self.job.cluster;
        let team = cluster.workers.max(cluster.min_workers);
        let samples = if cuda { self.job.most_at_once(team).max(2) } else { 2 };
        torch_ext::try_kernels(cuda)?;
        let warmed = self.warm_up_with(samples);
        torch_ext::try_kernels(false)?;
        warmed
    }

    fn warm_up_with(&mut self, samples: u64) -> Result<(), TrainError> {
        let batch = self.data.input.black(samples as usize)?;
        self.replica.begin_step()?;
        let _ = self.accumulate(&batch, 0.0, None, |_| ())?;
        Ok(self.replica.zero_gradients()?)
    }

    /// Exchanges what a step will, before any counts: so nothing has to be connected in the midst of the run.
    pub fn warm_up_exchange(&mut self, member: &mut Membership) -> Result<(), TrainError> {
        if member.gpus.is_none() {
            return Ok(()); // hosts are connected
        }
        self.replica.zero_gradients()?;
        let loss_sum = Tensor::f_zeros([], (Kind::Double, self.replica.device()))?;
        let words = member.control.words(Step(0), false, &loss_sum)?;
        if let Some(batch_norm) = &member.batch_norm {
            let most = 1 + 2 * self.replica.widest_batch_norm() as i64;
            batch_norm.warm_up(&words)?;
            batch_norm.warm_up(&Tensor::f_zeros([most], (Kind::Double, self.replica.device()))?)?;
        }
        let exchange = member.tensors();
        let buckets = self.replica.bucket_gradients()?;
        for (index, bucket) in (0..).zip(&buckets) {
            let compression = self.job.train.compress_gradients;
            sum_bucket(exchange, compression, Tag::new(0, index, Phase::Warmup), bucket)?;
        }
        exchange.all_reduce(Tag::new(0, buckets.len() as u32, Phase::Warmup), &words)?;
        exchange.wait()?;
        Ok(())
    }

    /// Adds the gradient of this rank's share; returns its loss summed over pixels, f64 []. An empty share adds
    /// nothing and leaves batch norm alone. `ready` hears of each bucket that is complete; it is dropped once all
    /// are.
    fn accumulate(
        &mut self,
        batch: &DeviceBatch,
        scale: f64,
        together: Option<Together>,
        ready: impl FnMut(usize) + Send + 'static,
    ) -> Result<Tensor, TrainError> {
        let share = batch.sample_ids.len() as u64;
        let micro = match u64::from(self.job.train.micro_batch) {
            0 => together.map_or(share, |together| together.largest_share).max(1),
            micro => micro,
        };
        let passes = together.map_or(share, |together| together.largest_share).div_ceil(micro);
        let mut ready = Some(ready);
        let mut loss_sum = Tensor::f_zeros([], (Kind::Double, self.replica.device()))?;
        for pass in 0..passes {
            let samples = share.min(pass * micro)..share.min((pass + 1) * micro);
            let ready = ready.take_if(|_| pass + 1 == passes);
            if samples.is_empty() {
                // Only together are there more passes than samples: one that counts for nothing.
                let black = self.data.input.black(1)?;
                let over_ranks = together.map(|together| together.norm.over_ranks(false));
                let _ = self.forward_backward(&black, 0.0, over_ranks, ready)?;
            } else {
                let part = batch.slice(samples.start as i64, (samples.end - samples.start) as i64)?;
                let over_ranks = together.map(|together| together.norm.over_ranks(true));
                let _ = loss_sum.f_add_(&self.forward_backward(&part, scale, over_ranks, ready)?)?;
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
    ) -> Result<Tensor, musher_model::Error> {
        let logits = trace_span!("forward").in_scope(|| match &over_ranks {
            None => self.replica.forward(&batch.images, Mode::Train),
            Some(ranks) => self.replica.forward_over_ranks(&batch.images, ranks),
        })?;
        trace_span!("backward").in_scope(|| match ready {
            None => self.replica.backward_sum_loss(&logits, &batch.masks, scale),
            Some(ready) => self.replica.backward_last(&logits, &batch.masks, scale, ready),
        })
    }

    /// Changes the parameters if the step is `complete` and its gradient finite, which the device decides; returns the
    /// latter, f64 []. All ranks hold the same gradient, so they agree without asking.
    fn update(&mut self, step: Step, complete: &Tensor) -> Result<Tensor, TrainError> {
        let _span = trace_span!("update").entered();
        let clip_norm = self.job.train.clip_norm;
        let measure = self.replica.measure_gradients((clip_norm > 0.0).then_some(clip_norm))?;
        let applies = complete.f_mul(&measure.finite)?.f_to_kind(Kind::Float)?;
        let rate = self.job.train.rate_after(step, self.data.train_samples());
        self.replica.update(rate, &applies, measure.scale.as_ref())?;
        Ok(measure.finite)
    }

    /// Counts the step whose outcome is there: it was applied if it was complete, and moved the parameters if its
    /// gradient was finite, too.
    fn settle(&mut self, after_step: &mut impl FnMut(f64)) -> Result<Next, TrainError> {
        let flight = self.in_flight.take().expect("there is a step to be settled");
        let Seen { complete, finite, stop, loss_sum } = flight.outcome.read();
        let InFlight { step, positions, samples, pixels, .. } = flight;
        self.replica.settle(complete && finite);
        if !complete {
            return Err(TrainError::Incomplete { step: step.0 });
        }
        let mut position = self.position();
        if finite {
            self.unpooled_samples += samples;
            self.bad_streak = 0;
        } else {
            position.totals.steps_skipped += 1;
            self.bad_streak += 1;
        }
        let (loss, batch) = (loss_sum / pixels, positions.end - positions.start);
        position.applied = position.applied.next();
        position.cursor = positions.end;
        position.totals.loss_sum += loss * batch as f64;
        self.replica.set_counters(position.to_counters());
        let own_part = flight.outcome.own_part_seen().unwrap_or(flight.began);
        let compute = own_part.saturating_duration_since(flight.began).saturating_sub(flight.waited);
        self.board.stepped(position, loss, batch, compute + flight.update);
        debug!(generation = self.lineage.0, step = position.applied.0, "step applied");
        after_step(loss);
        match (self.bad_streak, stop) {
            (BAD_STREAK_LIMIT.., _) => Err(TrainError::NotFinite(self.bad_streak)),
            (_, true) => Ok(Next::Stop),
            (_, false) => Ok(Next::Go),
        }
    }
}
