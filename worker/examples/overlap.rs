//! What it brings to sum gradients while backward computes: blocks of steps with the exchange alongside, and as many
//! with it afterwards, taking turns in one team of threads over loopback. The last steps go into a trace for
//! <https://ui.perfetto.dev>. Absolute times are the machine's of the moment; the ratio is what counts.
//!
//! Over loopback the exchange costs no waiting, only computing, which has to be done at one time or another. With
//! MBIT_PER_S each call also takes as long as a link of that rate would, asleep.
//!
//! `cargo run --release -p musher-worker --example overlap -- \
//!  [WORLD] [WIDTH] [IMAGE_SIZE] [BATCH] [PAIRS] [MBIT_PER_S] [TRACE]`

use std::{
    error::Error,
    fs::File,
    net::{Ipv4Addr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use musher_collective::{
    Aborter, Collective, CollectiveError, Meter, Phase, Purpose, Ring, RingListener, RingSpec, Secret, Tag,
};
use musher_model::{Mode, ModelOptions, Replica};
use musher_nccl::{OnHost, TensorCollective};
use musher_proto::{ids::Step, job::Compression};
use musher_worker::{
    trace::Trace,
    train::{
        TrainError,
        exchange::{Buckets, Launcher, overlapped},
    },
};
use tch::{Device, Kind, Tensor};
use torch_ext::SideStream;
use tracing::trace_span;
use tracing_subscriber::layer::SubscriberExt;

type Failure = Box<dyn Error + Send + Sync>;

const PATIENCE: Duration = Duration::from_secs(60);
const STEPS_A_BLOCK: usize = 4;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument =
        |index: usize, default: f64| arguments.get(index).and_then(|a| a.parse().ok()).unwrap_or(default);
    let world = argument(0, 2.0) as usize;
    let options = ModelOptions {
        width: argument(1, 1.0),
        image_size: argument(2, 64.0) as usize,
        ..ModelOptions::default()
    };
    let (batch, pairs) = (argument(3, 8.0) as i64, argument(4, 10.0) as usize);
    let bit_per_s = argument(5, f64::INFINITY) * 1e6;
    tch::set_num_threads(1);
    let trace = Trace::default();
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(trace.clone()))?;

    let listeners: Vec<RingListener> =
        (0..world).map(|_| RingListener::bind((Ipv4Addr::LOCALHOST, 0).into())).collect::<Result<_, _>>()?;
    let addresses: Vec<SocketAddr> =
        listeners.iter().map(RingListener::local_addr).collect::<Result<_, _>>()?;
    let of_ranks: Vec<Vec<[f64; 2]>> = thread::scope(|scope| {
        let ranks: Vec<_> = listeners
            .iter()
            .enumerate()
            .map(|(rank, listener)| {
                let spec = RingSpec {
                    generation: 1,
                    purpose: Purpose::Steps,
                    rank: rank as u32,
                    world: world as u32,
                    successor: addresses[(rank + 1) % addresses.len()],
                    secret: Secret([7; 32]),
                    patience: PATIENCE,
                };
                let options = options.clone();
                let work = move || {
                    let ring = listener.form(&spec, Instant::now() + PATIENCE, &Aborter::new()?)?;
                    Rank::new(&options, batch, SlowLink { ring, bit_per_s })?.blocks(pairs)
                };
                thread::Builder::new().name("train".into()).spawn_scoped(scope, work)
            })
            .collect::<Result<_, _>>()?;
        ranks
            .into_iter()
            .map(|rank| rank.join().expect("a rank does not panic"))
            .collect::<Result<_, Failure>>()
    })?;

    // All ranks wait for each other in each step, so one's times are everybody's.
    let blocks = &of_ranks[0];
    let ratios = blocks.iter().map(|[after, alongside]| alongside / after).collect();
    let [after, alongside] = [0, 1].map(|kind| median(blocks.iter().map(|block| block[kind]).collect()));
    println!("after {after:.1} ms, alongside {alongside:.1} ms a step, ratio by pairs {:.4}", median(ratios));
    println!("of the time in all-reduce, {:.0} % within backward", 100.0 * hidden(&trace));
    if let Some(path) = arguments.get(6) {
        trace.write(File::create(path)?)?;
        println!("trace in {path}");
    }
    Ok(())
}

/// The share of the exchange's time in steps with the exchange alongside that lies within the same rank's backward.
fn hidden(trace: &Trace) -> f64 {
    let intervals = trace.intervals();
    let (mut all, mut within) = (Duration::ZERO, Duration::ZERO);
    for sum in intervals.iter().filter(|interval| interval.name == "all_reduce") {
        let of_it = |field| sum.number(field);
        let backward = intervals.iter().find(|interval| {
            interval.name == "backward"
                && ["rank", "step"].iter().all(|field| interval.number(field) == of_it(field))
        });
        all += sum.end - sum.start;
        within += backward.map_or(Duration::ZERO, |b| b.end.min(sum.end).saturating_sub(sum.start));
    }
    within.as_secs_f64() / all.as_secs_f64()
}

/// A ring whose calls take as long as over a link of that rate.
struct SlowLink {
    ring: Ring,
    bit_per_s: f64,
}

impl Collective for SlowLink {
    fn rank(&self) -> u32 {
        self.ring.rank()
    }

    fn world(&self) -> u32 {
        self.ring.world()
    }

    fn all_reduce(&mut self, tag: Tag, data: &mut [f32]) -> Result<(), CollectiveError> {
        let started = Instant::now();
        self.ring.all_reduce(tag, data)?;
        let world = f64::from(self.ring.world());
        let bits = 2.0 * (world - 1.0) / world * (size_of_val(data) * 8) as f64;
        let whole = Duration::from_secs_f64(bits / self.bit_per_s);
        thread::sleep(whole.saturating_sub(started.elapsed()));
        Ok(())
    }

    fn all_reduce_bf16(&mut self, tag: Tag, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.ring.all_reduce_bf16(tag, data)
    }

    fn all_reduce_f64(&mut self, tag: Tag, data: &mut [f64]) -> Result<(), CollectiveError> {
        self.ring.all_reduce_f64(tag, data)
    }

    fn broadcast(&mut self, tag: Tag, root: u32, data: &mut [u8]) -> Result<(), CollectiveError> {
        self.ring.broadcast(tag, root, data)
    }

    fn aborter(&self) -> Aborter {
        self.ring.aborter()
    }

    fn meter(&self) -> Meter {
        self.ring.meter()
    }
}

struct Rank {
    replica: Replica,
    ring: OnHost<SlowLink>,
    images: Tensor,
    masks: Tensor,
    step: u64,
}

impl Rank {
    fn new(options: &ModelOptions, batch: i64, ring: SlowLink) -> Result<Self, Failure> {
        let (size, cpu) = (options.image_size as i64, Device::Cpu);
        Ok(Self {
            replica: Replica::new(options, 0, cpu)?,
            ring: OnHost(ring),
            images: Tensor::rand([batch, 3, size, size], (Kind::Float, cpu)),
            masks: Tensor::randint(3, [batch, size / 2, size / 2], (Kind::Int64, cpu)),
            step: 0,
        })
    }

    /// Milliseconds a step, with the exchange after backward and alongside, of each pair of blocks.
    fn blocks(mut self, pairs: usize) -> Result<Vec<[f64; 2]>, Failure> {
        self.block(false)?;
        (0..pairs)
            .map(|pair| {
                // Who goes first changes, so that a drift favours neither.
                let first = pair % 2 == 0;
                let times = [self.block(first)?, self.block(!first)?];
                Ok(if first { [times[1], times[0]] } else { times })
            })
            .collect()
    }

    fn block(&mut self, alongside: bool) -> Result<f64, Failure> {
        let mut times = Vec::new();
        for _ in 0..STEPS_A_BLOCK {
            let started = Instant::now();
            self.step(alongside)?;
            times.push(started.elapsed().as_secs_f64() * 1e3);
        }
        Ok(median(times))
    }

    fn step(&mut self, alongside: bool) -> Result<(), Failure> {
        self.step += 1;
        self.replica.begin_step()?;
        self.replica.zero_gradients()?;
        let Self { replica, ring, images, masks, step } = self;
        let gradients = replica.bucket_gradients()?;
        let device = replica.device();
        let (stream, compression) = (SideStream::of(device)?, Compression::None);
        let buckets = Buckets { step: Step(*step), gradients, compression, device, stream };
        let scale = 1.0 / masks.numel() as f64;
        let _span = alongside.then(|| trace_span!("step", rank = ring.rank(), step).entered());
        let mut forward_and_backward = |ready: Box<dyn FnMut(usize) + Send>| {
            let logits = replica.forward(images, Mode::Train)?;
            let _span = alongside.then(|| trace_span!("backward").entered());
            replica.backward_last(&logits, masks, scale, ready).map_err(TrainError::from)
        };
        if alongside {
            let launch = |launcher: Launcher| forward_and_backward(Box::new(move |_| launcher.launch()));
            let _ = overlapped(ring, buckets, None, launch)?;
        } else {
            let _ = forward_and_backward(Box::new(|_| ()))?;
            let ranges: Vec<_> = replica.buckets().iter().map(|bucket| bucket.range.clone()).collect();
            replica.with_gradients_mut(|gradients| {
                (0..).zip(ranges).try_for_each(|(index, range)| {
                    ring.0.all_reduce(Tag::new(*step, index, Phase::Gradients), &mut gradients[range])
                })
            })??;
        }
        let applies = self.replica.measure_gradients(None)?.finite.f_to_kind(Kind::Float)?.f_view([1])?;
        self.replica.update(1e-3, &applies, None)?;
        self.replica.settle(applies.f_double_value(&[0])? == 1.0);
        Ok(())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
