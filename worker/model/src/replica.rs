//! One replica: ties network, flat buffers, optimizer and state together behind checked entry points.

use std::collections::BTreeMap;
use std::io::{Read, Seek};
use std::ops::Range;

use musher_weights::WeightsFile;
use tch::{Device, Kind, Tensor, no_grad};
use torch_ext::Factors;

use crate::buckets::{self, Bucket, DEFAULT_BUCKET_BYTES, Readiness, Report};
use crate::flat::Flat;
use crate::gradients::{self, GradientMeasure};
use crate::layers::{Normalise, Pass};
use crate::layout::LayoutBuilder;
use crate::loss::{Loss, LossOptions};
use crate::state::{self, COUNTERS, StateLayout, StateStaging, StateTensors};
use crate::unet::{Taps, Unet};
use crate::{Error, Manner, ModelOptions, OverRanks, digest, metrics, pooling, weights};

/// Adam's decay rates and epsilon, as in the recipe.
const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPSILON: f64 = 1e-7;

/// The encoder halves the image's height and width this many times.
const HALVINGS: u32 = 5;

/// How batch norm behaves, and whether gradients will be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Normalise by the batch and move the working statistics, except where frozen; keep what backward needs.
    Train,
    /// Normalise by the live statistics; no gradients.
    Eval,
}

/// The network with all its state on one device.
pub struct Replica {
    options: ModelOptions,
    network: Unet,
    flat: Flat,
    buckets: Vec<Bucket>,
    readiness: Readiness,
    loss: Loss,
    /// The encoder's learning rate over that of the rest.
    encoder_rate: f64,
    manner: Manner,
    /// Training computes in bf16 what gains by it.
    bf16: bool,
    /// The flat gradient is that of no pass yet: zero.
    fresh: bool,
    adam_steps: u64,
    counters: [u64; COUNTERS],
}

impl Replica {
    /// A replica with parameters drawn from `seed`: the same bits on every device.
    pub fn new(options: &ModelOptions, seed: u64, device: Device) -> Result<Self, Error> {
        Self::computing(options, seed, device, Manner::of(device))
    }

    /// Such a replica that computes in a `manner` of another device: what a GPU does can be tried on a CPU.
    pub fn computing(
        options: &ModelOptions,
        seed: u64,
        device: Device,
        manner: Manner,
    ) -> Result<Self, Error> {
        options.validate()?;
        let mut layout = LayoutBuilder::default();
        let network = Unet::declare(options, &mut layout);
        let flat = Flat::new(layout.finish(), seed, device, manner)?;
        let buckets = buckets::plan(&flat.layout, DEFAULT_BUCKET_BYTES);
        let readiness = Readiness::install(&flat, &buckets, manner)?;
        let options = options.clone();
        Ok(Self {
            options,
            network,
            flat,
            buckets,
            readiness,
            loss: Loss::default(),
            encoder_rate: 1.0,
            manner,
            bf16: false,
            fresh: true,
            adam_steps: 0,
            counters: [0; COUNTERS],
        })
    }

    pub fn options(&self) -> &ModelOptions {
        &self.options
    }

    /// What backward is of from now on; at first, the plain cross-entropy.
    pub fn set_loss(&mut self, options: &LossOptions) -> Result<(), Error> {
        self.loss = Loss::new(options, self.options.classes, self.device())?;
        Ok(())
    }

    /// The encoder learns with this multiple of the rate that [`Self::update`] is given; at first, 1.
    pub fn set_encoder_rate(&mut self, factor: f64) {
        self.encoder_rate = factor;
    }

    pub fn device(&self) -> Device {
        self.flat.parameters.device()
    }

    /// From now on training computes in bf16 what gains by it; parameters, their gradients and evaluation stay f32. On a
    /// GPU that is as PyTorch's autocast does it. On the CPU it is the convolutions' factors, and all else is f32.
    pub fn use_bf16(&mut self, bf16: bool) -> Result<(), Error> {
        self.bf16 = bf16;
        self.flat.keep_rounded(bf16 && self.manner == Manner::Device)?;
        self.hook()
    }

    /// All parameters, frozen ones included, without padding.
    pub fn parameter_count(&self) -> usize {
        self.flat.layout.parameters.iter().map(|spec| spec.range.len()).sum()
    }

    /// Parameters by name, in the order of use: views of the flat buffers.
    pub fn parameters(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.flat.parameters().map(|(spec, tensor)| (spec.name.as_str(), tensor))
    }

    // --- one step -------------------------------------------------------------------------------------------------

    /// Drops what an unapplied step did to batch norm's statistics.
    pub fn begin_step(&mut self) -> Result<(), Error> {
        Ok(self.flat.working.f_copy_(&self.flat.live)?)
    }

    /// Images [N, 3, S, S] f32, normalised, in any memory order, to logits [N, classes, S/2, S/2].
    pub fn forward(&self, images: &Tensor, mode: Mode) -> Result<Tensor, Error> {
        let images = self.checked(images, mode)?;
        match mode {
            Mode::Train => self.train_forward(&images, Normalise::ByBatch),
            Mode::Eval => {
                no_grad(|| self.network.forward(&self.flat, &images, self.exactly(Normalise::ByLive)))
            }
        }
    }

    /// [`Self::forward`] in training, with batch norm over the batches of all ranks; so is the backward pass that
    /// follows. All ranks must do both, as often; one without samples does it with any others, and a scale of 0.
    pub fn forward_over_ranks(&self, images: &Tensor, ranks: &OverRanks) -> Result<Tensor, Error> {
        let images = self.checked(images, Mode::Train)?;
        self.train_forward(&images, Normalise::OverRanks(ranks))
    }

    /// The logits are f32, whatever they were computed in.
    fn train_forward(&self, images: &Tensor, norm: Normalise) -> Result<Tensor, Error> {
        self.flat.round()?;
        let forward = |on_host| {
            let pass = Pass { norm, on_host, rounded: self.flat.is_rounded() };
            self.network.forward(&self.flat, images, pass)
        };
        match (self.manner, self.bf16) {
            (Manner::Host, false) => forward(Some(Factors::F32)),
            (Manner::Host, true) => forward(Some(Factors::Bf16)),
            (Manner::Device, false) => forward(None),
            (Manner::Device, true) => {
                Ok(torch_ext::autocast_bf16(self.device(), || forward(None))??.f_to_kind(Kind::Float)?)
            }
        }
    }

    /// The encoder's outputs for such images, from fine to coarse.
    pub fn encode(&self, images: &Tensor, mode: Mode) -> Result<Taps, Error> {
        let images = self.checked(images, mode)?;
        self.in_mode(mode, |norm| self.network.encode(&self.flat, &images, self.exactly(norm)))
    }

    /// Adds the gradient of `scale` times the loss summed over pixels; returns the unscaled sum, an f64 [] on the device
    /// that nobody has waited for. The loss is that of [`Self::set_loss`], in nats.
    ///
    /// `logits` come from [`Self::forward`] in training; `masks` are i64 classes [N, S/2, S/2]. With a `scale` of one
    /// over the global batch's pixels, gradients summed over ranks are those of the global mean.
    pub fn backward_sum_loss(
        &mut self,
        logits: &Tensor,
        masks: &Tensor,
        scale: f64,
    ) -> Result<Tensor, Error> {
        self.backward(logits, masks, scale, None)
    }

    /// [`Self::backward_sum_loss`] of a step's last micro-batch. `ready` hears of each bucket as soon as the last of
    /// its gradients is accumulated, bucket k after k-1.
    ///
    /// It runs inside the backward pass, on the CPU on this thread: it should hand the bucket to somebody else and
    /// return. If it panics, the pass fails. It is dropped when the pass is over.
    pub fn backward_last(
        &mut self,
        logits: &Tensor,
        masks: &Tensor,
        scale: f64,
        ready: impl FnMut(usize) + Send + 'static,
    ) -> Result<Tensor, Error> {
        self.backward(logits, masks, scale, Some(Box::new(ready)))
    }

    fn backward(
        &mut self,
        logits: &Tensor,
        masks: &Tensor,
        scale: f64,
        ready: Option<Report>,
    ) -> Result<Tensor, Error> {
        metrics::check_masks(logits, masks)?;
        let losses = self.loss.per_pixel(logits, masks)?;
        self.backward_of(&(losses.f_sum(Kind::Float)? * scale), ready)?;
        Ok(losses.f_detach()?.f_sum(Kind::Double)?)
    }

    /// Adds the gradient of `loss`, a scalar computed from what [`Self::forward`] or [`Self::encode`] gave in training.
    pub fn backward_sum(&mut self, loss: &Tensor) -> Result<(), Error> {
        self.backward_of(loss, None)
    }

    fn backward_of(&mut self, loss: &Tensor, ready: Option<Report>) -> Result<(), Error> {
        let adds = !std::mem::take(&mut self.fresh);
        self.readiness.during(adds, ready, || Ok(loss.f_backward()?))
    }

    /// If `applies`, an f32 [1] on the device, is exactly 1.0: Adam's update of all that trains, from the gradient
    /// divided by `scale` (f32 [1]), with epsilon before bias correction as in Keras; and the step's batch-norm
    /// statistics become the live ones. If it is exactly 0.0, nothing changes.
    ///
    /// Waits for nothing. Whether it applied, the caller [says](Self::settle) before the next update.
    pub fn update(
        &mut self,
        learning_rate: f64,
        applies: &Tensor,
        scale: Option<&Tensor>,
    ) -> Result<(), Error> {
        let step = (self.adam_steps + 1) as f64;
        let step = torch_ext::AdamStep {
            lr: learning_rate,
            beta1: BETA1,
            beta2: BETA2,
            eps: EPSILON / (1.0 - BETA2.powf(step)).sqrt(),
            step,
        };
        let found_inf = applies.f_neg()?.f_add_scalar(1.0)?;
        let decided = torch_ext::OnDevice { grad_scale: scale, found_inf: Some(&found_inf) };
        let Flat { layout, parameters, gradients, exp_avg, exp_avg_sq, .. } = &self.flat;
        let update = |range: Range<usize>, lr: f64| {
            let part = |flat: &Tensor| flat.f_narrow(0, range.start as i64, range.len() as i64);
            let (parameters, gradients) = (part(parameters)?, part(gradients)?);
            let (exp_avg, exp_avg_sq) = (part(exp_avg)?, part(exp_avg_sq)?);
            let step = torch_ext::AdamStep { lr, ..step };
            torch_ext::fused_adam(&parameters, &gradients, &exp_avg, &exp_avg_sq, step, decided)
                .map_err(Error::from)
        };
        let encoder = layout.trainable_encoder();
        if self.encoder_rate == 1.0 || encoder.is_empty() {
            update(0..layout.trainable_len, learning_rate)?;
        } else {
            update(0..encoder.start, learning_rate)?;
            update(encoder, learning_rate * self.encoder_rate)?;
        }
        let Flat { live, working, .. } = &mut self.flat;
        Ok(live.f_copy_(&working.f_where_self(&applies.f_eq(1.0)?, live)?)?)
    }

    /// Whether the last [update](Self::update) applied.
    pub fn settle(&mut self, applied: bool) {
        self.adam_steps += u64::from(applied);
    }

    /// Channels of the batch norm that has the most.
    pub fn widest_batch_norm(&self) -> usize {
        let layers = &self.flat.layout.statistics;
        layers.iter().map(|layer| layer.range.len()).max().unwrap_or(0)
    }

    /// Updates applied so far.
    pub fn adam_steps(&self) -> u64 {
        self.adam_steps
    }

    // --- gradients ------------------------------------------------------------------------------------------------

    /// The flat gradient of all that trains, padding included.
    pub fn gradients(&self) -> &Tensor {
        &self.flat.gradients
    }

    /// Lends the flat gradient in host memory: its own on the CPU, a copy that is taken back on other devices.
    pub fn with_gradients_mut<R>(&mut self, exchange: impl FnOnce(&mut [f32]) -> R) -> Result<R, Error> {
        let mut host = self.flat.gradients.f_to_device(Device::Cpu)?;
        let result = torch_ext::with_f32_mut(&mut host, exchange)?;
        if self.device() != Device::Cpu {
            self.flat.gradients.f_copy_(&host)?;
        }
        Ok(result)
    }

    pub fn zero_gradients(&mut self) -> Result<(), Error> {
        let _ = self.flat.gradients.f_zero_()?;
        self.fresh = true;
        Ok(())
    }

    /// Whether the gradient is finite, and what it is to be divided by for its norm to be at most `max_norm`.
    pub fn measure_gradients(&self, max_norm: Option<f64>) -> Result<GradientMeasure, Error> {
        GradientMeasure::of(&self.flat.gradients, max_norm)
    }

    /// Euclidean norm of the gradient: an f64 [], not finite if an element is not.
    pub fn gradient_norm(&self) -> Result<Tensor, Error> {
        gradients::norm(&self.flat.gradients)
    }

    /// The buckets of the flat gradient, in the order they become ready.
    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    /// Views of the buckets, in their order, which may go to another thread; see [`torch_ext::with_f32_mut`].
    pub fn bucket_gradients(&self) -> Result<Vec<Tensor>, Error> {
        let view = |Bucket { range }: &Bucket| {
            Ok(self.flat.gradients.f_narrow(0, range.start as i64, range.len() as i64)?)
        };
        self.buckets.iter().map(view).collect()
    }

    /// Cuts new buckets of about `bytes`, the first smaller: a function of the model and `bytes` alone.
    pub fn plan_buckets(&mut self, bytes: usize) -> Result<(), Error> {
        self.buckets = buckets::plan(&self.flat.layout, bytes);
        self.hook()
    }

    fn hook(&mut self) -> Result<(), Error> {
        self.readiness = Readiness::install(&self.flat, &self.buckets, self.manner)?;
        Ok(())
    }

    // --- batch norm -----------------------------------------------------------------------------------------------

    /// This replica's part of the pooled batch-norm statistics: the caller sums these element by element over all
    /// ranks and hands the sums to [`Self::set_pooled`]. `samples` weighs it: those seen since the last pooling.
    pub fn pooled_moments(&self, samples: u64) -> Result<Vec<f64>, Error> {
        let (channels, live) = (self.flat.layout.channel_len, self.flat.layout.live_channel_len);
        let host = self.flat.live.f_to_device(Device::Cpu)?;
        Ok(torch_ext::with_f32(&host, |host| {
            pooling::moments(&host[..live], &host[channels..channels + live], samples)
        })?)
    }

    /// Makes the pooled statistics of `world_size` replicas the live ones. A single replica's, and those of no samples,
    /// stay bit for bit.
    pub fn set_pooled(&mut self, sums: &[f64], world_size: usize) -> Result<(), Error> {
        let (channels, live) = (self.flat.layout.channel_len, self.flat.layout.live_channel_len);
        let (expected, found) = (pooling::moments_len(live), sums.len());
        if found != expected {
            return Err(Error::PooledLength { expected, found });
        }
        if world_size == 1 || sums[0] == 0.0 {
            return Ok(());
        }
        let mut host = self.flat.live.f_to_device(Device::Cpu)?.f_detach_copy()?;
        torch_ext::with_f32_mut(&mut host, |host| {
            let (mean, var) = host.split_at_mut(channels);
            pooling::pool(sums, &mut mean[..live], &mut var[..live]);
        })?;
        self.flat.live.f_copy_(&host)?;
        self.begin_step()
    }

    // --- state ----------------------------------------------------------------------------------------------------

    /// The caller's counters, part of the state.
    pub fn counters(&self) -> [u64; COUNTERS] {
        self.counters
    }

    pub fn set_counters(&mut self, counters: [u64; COUNTERS]) {
        self.counters = counters;
    }

    pub fn state_layout(&self) -> StateLayout {
        StateLayout::new(&self.flat.layout)
    }

    /// Bytes of the state.
    pub fn state_len(&self) -> u64 {
        self.state_layout().total_bytes()
    }

    /// `len` bytes of the state from `offset`.
    pub fn read_state(&self, offset: u64, len: usize) -> Result<Vec<u8>, Error> {
        let end = offset.saturating_add(len as u64);
        if end > self.state_len() {
            return Err(Error::StateLength { expected: end, found: self.state_len() });
        }
        let mut bytes = Vec::with_capacity(len);
        self.visit_state(offset..end, |_, piece| bytes.extend_from_slice(piece))?;
        Ok(bytes)
    }

    /// The bytes of the state from `offset`, as many as `target` has room for.
    pub fn copy_state(&self, offset: u64, target: &mut [u8]) -> Result<(), Error> {
        let end = offset.saturating_add(target.len() as u64);
        if end > self.state_len() {
            return Err(Error::StateLength { expected: end, found: self.state_len() });
        }
        self.visit_state(offset..end, |at, piece| {
            let start = (at - offset) as usize;
            target[start..start + piece.len()].copy_from_slice(piece);
        })
    }

    /// Digest of the whole state; see [`musher_proto::digest`].
    pub fn state_digest(&self) -> Result<u64, Error> {
        self.digest_of(0..self.state_len())
    }

    /// The part of the state's digest that a range of it makes up: those of disjoint ranges add up, wrapping. Its
    /// ends must be multiples of four bytes, as those of all of [`StateLayout`] are.
    pub fn digest_of(&self, range: Range<u64>) -> Result<u64, Error> {
        if range.end > self.state_len() {
            return Err(Error::StateLength { expected: range.end, found: self.state_len() });
        }
        let mut digest = 0u64;
        let layout = self.state_layout();
        for (flat, part) in self.parts(&layout) {
            let wanted = range.start.max(part.start)..range.end.min(part.end);
            if !wanted.is_empty() {
                let words = (wanted.start - part.start) / 4..(wanted.end - part.start) / 4;
                digest = digest.wrapping_add(digest::of(flat, words, part.start / 4)?);
            }
        }
        self.visit_counters(range, &layout, |offset, piece| {
            digest = digest.wrapping_add(musher_proto::digest::of_slice(offset / 4, piece));
        });
        Ok(digest)
    }

    /// The state as a peer's replica takes it over: its tensors, which are this one's own, and its counters.
    pub fn state_tensors(&self) -> StateTensors {
        let layout = self.state_layout();
        let tensors = self.parts(&layout).map(|(tensor, _)| tensor.shallow_clone());
        StateTensors { tensors, counters: state::counter_words(self.adam_steps, &self.counters) }
    }

    /// Room for a peer's state on this device; what is in it is of no meaning.
    pub fn room_for_tensors(&self) -> Result<StateTensors, Error> {
        let StateTensors { tensors, counters } = self.state_tensors();
        let [a, b, c, d] = tensors.map(|tensor| tensor.f_empty_like());
        Ok(StateTensors { tensors: [a?, b?, c?, d?], counters })
    }

    /// The digest of such a state.
    pub fn digest_of_tensors(&self, state: &StateTensors) -> Result<u64, Error> {
        let layout = self.state_layout();
        let counters = state::words_to_bytes(&state.counters);
        let mut digest = musher_proto::digest::of_slice(layout.counters.start / 4, &counters);
        for (tensor, (_, part)) in state.tensors.iter().zip(self.parts(&layout)) {
            digest = digest.wrapping_add(digest::of(tensor, 0..tensor.numel() as u64, part.start / 4)?);
        }
        Ok(digest)
    }

    /// Replaces the whole state by one that was received into [room for it](Self::room_for_tensors).
    pub fn adopt_tensors(&mut self, state: &StateTensors) -> Result<(), Error> {
        let Flat { parameters, exp_avg, exp_avg_sq, live, .. } = &mut self.flat;
        for (own, new) in [parameters, exp_avg, exp_avg_sq, live].into_iter().zip(&state.tensors) {
            own.f_copy_(new)?;
        }
        (self.adam_steps, self.counters) = state::from_words(&state.counters);
        self.begin_step()
    }

    /// Room for a state to come from elsewhere.
    pub fn staging(&self) -> StateStaging {
        StateStaging::new(&self.state_layout())
    }

    /// Replaces the whole state by a complete staged one. On an error nothing has changed.
    pub fn adopt(&mut self, staging: StateStaging) -> Result<(), Error> {
        self.load_state(staging.complete()?)
    }

    /// Replaces the whole state. On an error of length nothing has changed.
    pub fn load_state(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let layout = self.state_layout();
        let (expected, found) = (layout.total_bytes(), bytes.len() as u64);
        if found != expected {
            return Err(Error::StateLength { expected, found });
        }
        let part = |range: Range<u64>| &bytes[range.start as usize..range.end as usize];
        for (flat, range) in [
            (&mut self.flat.parameters, layout.parameters),
            (&mut self.flat.exp_avg, layout.exp_avg),
            (&mut self.flat.exp_avg_sq, layout.exp_avg_sq),
            (&mut self.flat.live, layout.batch_norm),
        ] {
            state::write(flat, part(range))?;
        }
        let (words, _) = part(layout.counters).as_chunks::<8>();
        (self.adam_steps, self.counters) =
            state::from_words(&std::array::from_fn(|i| u64::from_le_bytes(words[i])));
        self.begin_step()
    }

    /// Hands the state's bytes in `range` to `visit` in order, each piece with its offset in the state.
    fn visit_state(&self, range: Range<u64>, mut visit: impl FnMut(u64, &[u8])) -> Result<(), Error> {
        let layout = self.state_layout();
        for (flat, part) in self.parts(&layout) {
            let wanted = range.start.max(part.start)..range.end.min(part.end);
            if !wanted.is_empty() {
                let offset = part.start;
                state::visit(flat, wanted.start - offset..wanted.end - offset, |at, piece| {
                    visit(offset + at, piece)
                })?;
            }
        }
        self.visit_counters(range, &layout, visit);
        Ok(())
    }

    fn visit_counters(&self, range: Range<u64>, layout: &StateLayout, mut visit: impl FnMut(u64, &[u8])) {
        let counters = state::words_to_bytes(&state::counter_words(self.adam_steps, &self.counters));
        let wanted = range.start.max(layout.counters.start)..range.end;
        if !wanted.is_empty() {
            let start = (wanted.start - layout.counters.start) as usize;
            visit(wanted.start, &counters[start..(wanted.end - layout.counters.start) as usize]);
        }
    }

    /// The tensors that the state is made of, with their places in it.
    fn parts<'a>(&'a self, layout: &StateLayout) -> [(&'a Tensor, Range<u64>); 4] {
        let Flat { parameters, exp_avg, exp_avg_sq, live, .. } = &self.flat;
        [
            (parameters, layout.parameters.clone()),
            (exp_avg, layout.exp_avg.clone()),
            (exp_avg_sq, layout.exp_avg_sq.clone()),
            (live, layout.batch_norm.clone()),
        ]
    }

    // --- weights --------------------------------------------------------------------------------------------------

    /// Parameters and live statistics as a safetensors file with `metadata` in its header: the same of both, the same
    /// bytes.
    pub fn weights_safetensors(&self, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>, Error> {
        weights::save(&self.flat, metadata)
    }

    /// Takes over parameters and statistics of such a file: no tensor missing, none surplus, all of the right shape.
    /// Optimizer state and counters stay. On an error nothing has changed.
    pub fn load_weights(&mut self, file: &[u8]) -> Result<(), Error> {
        weights::load(&mut self.flat, file)?;
        self.begin_step()
    }

    /// Takes over the encoder's tensors, as of a ResNet50 classifier: none missing, none of another shape, and none that
    /// no ResNet50 has. Returns what the file has besides them, as in `fc.* (2)`. On an error nothing has changed.
    pub fn load_encoder_weights<R: Read + Seek>(
        &mut self,
        file: &mut WeightsFile<R>,
    ) -> Result<Vec<String>, Error> {
        let ignored = weights::load_encoder(&mut self.flat, self.options.encoder, file)?;
        self.begin_step()?;
        Ok(ignored)
    }

    fn in_mode<T>(&self, mode: Mode, compute: impl FnOnce(Normalise) -> T) -> T {
        match mode {
            Mode::Train => compute(Normalise::ByBatch),
            Mode::Eval => no_grad(|| compute(Normalise::ByLive)),
        }
    }

    fn exactly<'a>(&self, norm: Normalise<'a>) -> Pass<'a> {
        let on_host = (self.manner == Manner::Host).then_some(Factors::F32);
        Pass { norm, on_host, rounded: false }
    }

    /// The images in the device's better memory order, if they fit the model.
    ///
    /// Activations follow it. On CUDA that is channels-last, cuDNN's own; on the CPU oneDNN's kernels for row-major
    /// tensors are faster in all of convolution, batch norm and their backward passes (measured: a fifth of a step).
    fn checked(&self, images: &Tensor, mode: Mode) -> Result<Tensor, Error> {
        let size = self.options.image_size as i64;
        let found = images.size();
        let samples = match *found {
            [n, 3, h, w] if n > 0 && h == size && w == size && images.kind() == Kind::Float => n,
            _ => {
                let (expected, found) =
                    (format!("f32 [N, 3, {size}, {size}]"), format!("{:?} {found:?}", images.kind()));
                return Err(Error::Shape { what: "images", expected, found });
            }
        };
        let coarsest = size >> HALVINGS;
        let normalises_by_batch = mode == Mode::Train && self.flat.layout.live_channel_len > 0;
        if normalises_by_batch && samples * coarsest * coarsest < 2 {
            return Err(Error::TooFewValues { samples, image_size: size });
        }
        Ok(match self.manner {
            Manner::Host => images.f_contiguous()?,
            Manner::Device => images.f_permute([0, 2, 3, 1])?.f_contiguous()?.f_permute([0, 3, 1, 2])?,
        })
    }
}
