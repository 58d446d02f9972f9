//! Images a second of one rank's training, as a run does it: the step alone on one batch that stays, and with the data
//! path. A JSON line for each batch size, to be held against a peer's on the same device in the same run. `enqueue_ms` is
//! what the host needs to give an idle device a step, `idle_ms` until that is done: where they are close, the host is what
//! limits. `--trace DIR` leaves there a trace of three steps of each batch size, by libtorch's profiler.
//!
//! `cargo run --release -p musher-worker --example step_rate -- [--device cpu|cuda:K] [--precision fp32|tf32|bf16]
//! [--size PIXELS] [--width W] [--steps N] [--root DIR | --alone] [--trace DIR] [--batch N]...`

use std::{
    error::Error,
    net::Ipv4Addr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Parser;
use musher_collective::{Aborter, Purpose, RingListener, RingSpec, Secret};
use musher_dataset::{
    Dataset, ImageCache, Source, Warnings,
    synth::{self, SynthOptions},
};
use musher_model::{Mode, ModelOptions, Replica};
use musher_proto::{
    ids::{Epoch, Generation},
    job::{JobConfig, Precision},
    message::Train,
};
use musher_worker::train::{Membership, ProgressBoard, StopFlag, Trainer, TrainingData};
use serde_json::json;
use tch::{Device, Kind, Tensor};

#[derive(Parser)]
struct Arguments {
    #[arg(long, default_value = "cpu", value_parser = device)]
    device: Device,
    #[arg(long, default_value = "fp32", value_parser = precision)]
    precision: Precision,
    #[arg(long, default_value_t = 224)]
    size: u32,
    #[arg(long, default_value_t = 1.0)]
    width: f64,
    /// Measured, after some to warm up.
    #[arg(long, default_value_t = 50)]
    steps: u32,
    /// A data set; drawn if there is none.
    #[arg(long)]
    root: Option<PathBuf>,
    /// Leave the data path out.
    #[arg(long)]
    alone: bool,
    /// Where to leave traces.
    #[arg(long)]
    trace: Option<PathBuf>,
    /// Of the CPU's; 0: libtorch's choice.
    #[arg(long, default_value_t = 0)]
    threads: i32,
    #[arg(long = "batch", default_values_t = [4, 8, 32, 64])]
    batches: Vec<u32>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    if arguments.threads > 0 {
        tch::set_num_threads(arguments.threads);
    }
    let drawn = tempfile::tempdir()?;
    let root = match &arguments.root {
        Some(root) => root.clone(),
        None => {
            synth::draw(drawn.path(), &SynthOptions { train: 256, val: 1, seed: 1, sides: [330, 500] })?;
            drawn.path().to_owned()
        }
    };
    let dataset = Arc::new(Dataset::open(&Source::at(root))?);
    for &batch in &arguments.batches {
        let StepAlone { rate, enqueue_ms, idle_ms } = step_alone(&arguments, batch)?;
        let with_data = match arguments.alone {
            true => None,
            false => Some(with_data(&arguments, &dataset, batch)?),
        };
        let precision = format!("{:?}", arguments.precision).to_lowercase();
        println!(
            "{}",
            json!({ "batch": batch, "size": arguments.size, "precision": precision, "step": rate, "with_data": with_data,
                    "enqueue_ms": enqueue_ms, "idle_ms": idle_ms })
        );
    }
    Ok(())
}

/// What one step costs by itself.
struct StepAlone {
    /// Images a second.
    rate: f64,
    enqueue_ms: f64,
    idle_ms: f64,
}

/// Forward, backward and update, given to the device one after the other.
fn step_alone(arguments: &Arguments, batch: u32) -> Result<StepAlone, Box<dyn Error>> {
    let (device, size) = (arguments.device, i64::from(arguments.size));
    let image_size = arguments.size as usize;
    let options = ModelOptions { width: arguments.width, image_size, ..ModelOptions::default() };
    torch_ext::allow_tf32(arguments.precision != Precision::Fp32)?;
    torch_ext::try_kernels(true)?;
    let mut replica = Replica::new(&options, 1, device)?;
    replica.use_bf16(arguments.precision == Precision::Bf16)?;
    let images = Tensor::f_rand([i64::from(batch), 3, size, size], (Kind::Float, device))?;
    let masks = Tensor::f_randint(3, [i64::from(batch), size / 2, size / 2], (Kind::Int64, device))?;
    let scale = 1.0 / masks.numel() as f64;
    let mut enqueue = || -> Result<Tensor, Box<dyn Error>> {
        replica.begin_step()?;
        replica.zero_gradients()?;
        let logits = replica.forward(&images, Mode::Train)?;
        let loss = replica.backward_last(&logits, &masks, scale, |_| ())?;
        let applies = replica.measure_gradients(None)?.finite.f_to_kind(Kind::Float)?.f_view([1])?;
        replica.update(1e-3, &applies, None)?;
        replica.settle(true);
        Ok(loss)
    };
    // Until the host had given all of it, and until all of it was done.
    let mut run = |steps: u32| -> Result<[Duration; 2], Box<dyn Error>> {
        let started = Instant::now();
        let mut loss = Tensor::new();
        for _ in 0..steps {
            loss = enqueue()?;
        }
        let enqueued = started.elapsed();
        let _ = loss.f_double_value(&[])?; // waits
        Ok([enqueued, started.elapsed()])
    };
    run(2 + arguments.steps.min(10) / 2)?;
    let [_, time] = run(arguments.steps)?;
    let alone = (0..arguments.steps.min(10)).map(|_| run(1)).collect::<Result<Vec<_>, _>>()?;
    if let Some(dir) = &arguments.trace {
        let path = dir.join(format!("step-{batch}.json"));
        torch_ext::profile(device, &path, || run(3))??;
    }
    let least_ms =
        |which: usize| alone.iter().map(|times| times[which]).min().unwrap_or_default().as_secs_f64() * 1e3;
    let rate = rate(arguments.steps, batch, time);
    Ok(StepAlone { rate, enqueue_ms: least_ms(0), idle_ms: least_ms(1) })
}

/// A rank alone, as the worker trains: samples from the data set, decoded once, augmented for each step.
fn with_data(arguments: &Arguments, dataset: &Arc<Dataset>, batch: u32) -> Result<f64, Box<dyn Error>> {
    let mut job = JobConfig::default();
    job.data.image_size = arguments.size;
    job.model.width = arguments.width;
    job.train.global_batch = batch;
    job.train.precision = arguments.precision;
    let data = TrainingData {
        dataset: dataset.clone(),
        cache: Arc::new(ImageCache::new(4 << 30)),
        warnings: Arc::new(Warnings::new(|_| {})),
        threads: std::thread::available_parallelism()?.get(),
    };
    let mut trainer =
        Trainer::new(Arc::new(job), data, arguments.device, Arc::new(ProgressBoard::default()))?;
    let listener = RingListener::bind((Ipv4Addr::LOCALHOST, 0).into())?;
    let spec = RingSpec {
        generation: 1,
        purpose: Purpose::Steps,
        rank: 0,
        world: 1,
        successor: listener.local_addr()?,
        secret: Secret([0; 32]),
        patience: Duration::MAX,
    };
    let ring = Box::new(listener.form(&spec, Instant::now(), &Aborter::new()?)?);
    let mut member = Membership::new(Generation(1), ring, None, None, arguments.device)?;
    let samples = dataset.train().samples.len() as u64;
    let per_epoch = samples.div_ceil(u64::from(batch)) as u32;
    let mut epoch = 0;
    let mut run = |epochs: u32| -> Result<(u32, Duration), Box<dyn Error>> {
        let started = Instant::now();
        for _ in 0..epochs {
            epoch += 1;
            let order = Train { epoch: Epoch(epoch), cursor: 0, end: samples };
            trainer.train(&mut member, order, &StopFlag::default(), |_| ())?;
        }
        Ok((epochs * per_epoch, started.elapsed()))
    };
    run(1 + 5 / per_epoch)?; // decodes
    let (steps, time) = run(arguments.steps.div_ceil(per_epoch))?;
    let images = f64::from(steps) / f64::from(per_epoch) * samples as f64;
    Ok(images / time.as_secs_f64())
}

fn rate(steps: u32, batch: u32, time: Duration) -> f64 {
    f64::from(steps) * f64::from(batch) / time.as_secs_f64()
}

fn precision(name: &str) -> Result<Precision, String> {
    match name {
        "fp32" => Ok(Precision::Fp32),
        "tf32" => Ok(Precision::Tf32),
        "bf16" => Ok(Precision::Bf16),
        _ => Err("name `fp32`, `tf32` or `bf16`".into()),
    }
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
