//! What the data costs: samples a second, and milliseconds of CPU time a batch, of the loader's threads and of the
//! device's own augmentation, with all samples kept in memory. Nothing is trained; on a GPU this is the rate that a
//! network could be fed at.
//!
//! `cargo run --release -p musher-worker --example data_rate -- [--device cpu|cuda:K] [--root DIR] [--batch N]
//! [--threads N] [--device-cache-mb N] [--epochs N] [--size PIXELS]...`
//!
//! Without `--root` a data set of photographs' size is drawn.

use std::{
    error::Error,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use clap::Parser;
use musher_dataset::{
    BatchPlan, Dataset, ImageCache, Source, Warnings,
    synth::{self, SynthOptions},
};
use musher_proto::job::{AugmentOn, JobConfig};
use musher_worker::train::{Batches, Feed, TrainingData};
use rustix::time::{ClockId, clock_gettime};
use tch::{Device, Tensor};

#[derive(Parser)]
struct Arguments {
    #[arg(long, default_value = "cpu", value_parser = device)]
    device: Device,
    #[arg(long)]
    root: Option<PathBuf>,
    #[arg(long, default_value_t = 32)]
    batch: u64,
    /// That decode, and augment where the device does not.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// What does not fit stays in host memory.
    #[arg(long, default_value_t = 4096)]
    device_cache_mb: u64,
    /// Measured, after one that decodes.
    #[arg(long, default_value_t = 4)]
    epochs: u32,
    #[arg(long = "size", default_values_t = [64, 224])]
    sizes: Vec<u32>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let drawn = tempfile::tempdir()?;
    let root = match &arguments.root {
        Some(root) => root.clone(),
        None => {
            synth::draw(drawn.path(), &SynthOptions { train: 128, val: 1, seed: 1, sides: [330, 500] })?;
            drawn.path().to_owned()
        }
    };
    let dataset = open(&root)?;
    println!("{} samples, batches of {}, on {:?}", dataset.train().len(), arguments.batch, arguments.device);
    for &size in &arguments.sizes {
        let rates = [("threads", AugmentOn::Cpu), ("device", AugmentOn::Device)].map(|(name, augment_on)| {
            let rate = Rate::measure(&arguments, &dataset, size, augment_on)?;
            println!(
                "{size:>4} pixels, by {name:<7}: {:>8.0} samples/s, CPU a batch {:>7.2} ms, of it the consumer's \
                 {:>6.2} ms",
                rate.samples_per_second, rate.cpu_ms, rate.consumer_ms
            );
            Ok::<_, Box<dyn Error>>(rate.samples_per_second)
        });
        let [threads, device] = rates;
        println!("{size:>4} pixels, device / threads: {:.2}", device? / threads?);
    }
    Ok(())
}

struct Rate {
    samples_per_second: f64,
    /// A batch, of all threads.
    cpu_ms: f64,
    /// A batch, of the thread that takes it.
    consumer_ms: f64,
}

impl Rate {
    fn measure(
        arguments: &Arguments,
        dataset: &Arc<Dataset>,
        size: u32,
        augment_on: AugmentOn,
    ) -> Result<Self, Box<dyn Error>> {
        let mut job = JobConfig::default();
        (job.data.image_size, job.data.augment_on) = (size, augment_on);
        job.data.device_cache_mb = arguments.device_cache_mb;
        let data = TrainingData {
            dataset: dataset.clone(),
            cache: Arc::new(ImageCache::new(4 << 30)),
            warnings: Arc::new(Warnings::new(|_| {})),
            threads: arguments.threads,
        };
        let feed = Feed::new(Arc::new(job), data, arguments.device)?;
        let (samples, batch) = (feed.train_samples(), arguments.batch);
        take_all(feed.training(plan(0..1, samples, batch))?, arguments.device)?;

        let started = (Instant::now(), cpu_ms(ClockId::ProcessCPUTime), cpu_ms(ClockId::ThreadCPUTime));
        let epochs = arguments.epochs;
        let batches = take_all(feed.training(plan(1..epochs + 1, samples, batch))?, arguments.device)? as f64;
        Ok(Self {
            samples_per_second: samples as f64 * f64::from(epochs) / started.0.elapsed().as_secs_f64(),
            cpu_ms: (cpu_ms(ClockId::ProcessCPUTime) - started.1) / batches,
            consumer_ms: (cpu_ms(ClockId::ThreadCPUTime) - started.2) / batches,
        })
    }
}

fn plan(
    epochs: std::ops::Range<u32>,
    samples: u64,
    batch: u64,
) -> impl Iterator<Item = BatchPlan> + Send + 'static {
    epochs.flat_map(move |epoch| {
        (0..samples).step_by(batch as usize).map(move |start| BatchPlan {
            key: start,
            epoch,
            sample_ids: (start..samples.min(start + batch)).collect(),
        })
    })
}

/// How many they were; the device is done with them.
fn take_all(mut batches: Batches, device: Device) -> Result<usize, Box<dyn Error>> {
    let (mut count, mut last) = (0, Tensor::new());
    while let Some(batch) = batches.next() {
        last = batch?.images;
        count += 1;
    }
    // Reading a value waits for all that was given to the stream.
    let _ = last.to_device(device).sum(tch::Kind::Float).double_value(&[]);
    Ok(count)
}

fn cpu_ms(clock: ClockId) -> f64 {
    let time = clock_gettime(clock);
    time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 / 1e6
}

fn open(root: &Path) -> Result<Arc<Dataset>, Box<dyn Error>> {
    Ok(Arc::new(Dataset::open(&Source::at(root))?))
}

fn device(name: &str) -> Result<Device, String> {
    match (name, name.strip_prefix("cuda:").map(str::parse)) {
        ("cpu", _) => Ok(Device::Cpu),
        (_, Some(Ok(index))) => {
            torch_ext::open_cuda().map(|()| Device::Cuda(index)).map_err(|e| e.to_string())
        }
        _ => Err("name `cpu` or a GPU such as `cuda:0`".into()),
    }
}
