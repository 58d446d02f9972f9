//! Batches made on the device by a thread of its own, on a stream beside the training thread's, ahead of it.
//! Samples that it has not kept come from decoding threads; of the others it needs nothing of the CPU.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
};

use musher_dataset::{
    BatchPlan, DatasetError, Decoded, Decoder, DecoderOptions, Sample, Split, View, Warnings,
};
use musher_proto::job::JobConfig;
use tch::{Device, Tensor};
use torch_ext::{Mark, SideStream};

use super::{
    DeviceBatch, Input,
    sampler::{Place, sample},
    store::{Pixels, SampleStore},
    torch,
};
use crate::train::TrainError;

/// Batches on the device that are done before they are asked for; with the one being made and the one in
/// use, three hold memory at a time.
const AHEAD: usize = 1;

/// Batches being decoded ahead of the one being made, in host memory.
const DECODED_AHEAD: usize = 4;

/// A running maker of batches. Dropping it makes its threads end after what they are at.
pub(super) struct Prefetcher {
    batches: Receiver<Result<Made, TrainError>>,
}

pub(super) struct PrefetchOptions {
    pub split: Arc<Split>,
    pub view: View,
    pub job: Arc<JobConfig>,
    pub device: Device,
    /// The same for all makers of a store.
    pub stream: SideStream,
    pub store: Arc<SampleStore>,
    /// That decode.
    pub threads: usize,
    pub warnings: Arc<Warnings>,
}

struct Made {
    batch: DeviceBatch,
    /// Behind the work that makes it.
    done: Mark,
}

impl Prefetcher {
    pub fn start(options: PrefetchOptions, plan: impl Iterator<Item = BatchPlan> + Send + 'static) -> Self {
        let store = options.store.clone();
        let decoder = Decoder::start(
            DecoderOptions {
                split: options.split.clone(),
                wanted: move |sample: &Sample| !store.holds(sample),
                threads: options.threads,
                ahead: DECODED_AHEAD,
                read_ahead: options.job.data.read_ahead as usize,
                warnings: options.warnings.clone(),
            },
            plan,
        );
        let (made, batches) = sync_channel(AHEAD);
        let run = move || {
            let work = AssertUnwindSafe(|| options.run(decoder, &made));
            if let Err(panic) = catch_unwind(work) {
                // An end without a word would pass for the plan's.
                let _ = made.send(Err(panicked(&*panic)));
            }
        };
        thread::Builder::new().name("prefetch".into()).spawn(run).expect("the system can start a thread");
        Self { batches }
    }

    /// The next batch in the plan's order, or `None` behind its end. Waits for it to be given to the device,
    /// not for the device.
    pub fn next(&mut self) -> Option<Result<DeviceBatch, TrainError>> {
        let made = self.batches.recv().ok()?;
        Some(made.and_then(|Made { batch, done }| {
            done.take_over(&[&batch.images, &batch.masks]).map_err(torch)?;
            Ok(batch)
        }))
    }
}

impl PrefetchOptions {
    fn run(&self, mut decoder: Decoder, made: &SyncSender<Result<Made, TrainError>>) {
        let input = match self.enter_stream() {
            Ok(input) => input,
            Err(error) => {
                let _ = made.send(Err(error));
                return;
            }
        };
        while let Some(decoded) = decoder.next() {
            let batch = decoded.map_err(TrainError::from).and_then(|decoded| self.make(decoded, &input));
            if made.send(batch).is_err() {
                return; // nobody wants any more
            }
        }
    }

    /// What is allocated from here on is the stream's, the input's tensors too.
    fn enter_stream(&self) -> Result<Input, TrainError> {
        self.stream.enter().map_err(torch)?;
        Input::new(&self.job, self.device)
    }

    fn make(&self, Decoded { plan, samples }: Decoded, input: &Input) -> Result<Made, TrainError> {
        let BatchPlan { key, epoch, sample_ids } = plan;
        let mut places = Vec::with_capacity(samples.len());
        let mut pixels = Vec::with_capacity(samples.len());
        let mut offset = 0;
        for (&id, raster) in sample_ids.iter().zip(samples) {
            let sample = self.split.sample(id)?;
            let found = match raster {
                Some(raster) => self.store.put(sample, &raster)?,
                None => self.store.get(sample)?.expect("what the store holds, it keeps"),
            };
            let Pixels { pixels: tensor, size } = found;
            places.push(Place { offset, size, map: self.view.map(size, epoch, id) });
            offset += tensor.numel() as i64;
            pixels.push(tensor);
        }
        let batch = if places.is_empty() {
            DeviceBatch { key, ..input.black(0)? }
        } else {
            let (images, masks) = sample(&Tensor::f_cat(&pixels, 0)?, &places, &self.view)?;
            input.batch(key, sample_ids, &images, &masks)?
        };
        Ok(Made { batch, done: Mark::set(self.device).map_err(torch)? })
    }
}

fn panicked(panic: &(dyn Any + Send)) -> TrainError {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let message = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message").to_owned();
    DatasetError::LoaderPanicked { at: "a batch on the device".into(), message }.into()
}
