//! What it costs a step that its team may break at any moment: the same step with and without the working copy of batch
//! norm's statistics, the control word and the marks of progress, in blocks by turns. The ranks are threads of this
//! process, on random data. Prints the median step of both, in milliseconds, and the median of their ratios by pairs of
//! blocks.
//!
//! `cargo run --release -p musher-worker --example fault_tolerance_cost -- [WORLD] [WIDTH] [IMAGE_SIZE] [BATCH] [PAIRS]`

use std::{
    error::Error,
    net::{Ipv4Addr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use musher_collective::{Aborter, Collective, Phase, Purpose, RingListener, RingSpec, Secret, Tag};
use musher_model::{Mode, ModelOptions, Replica};
use musher_proto::{ids::Step, message::Activity};
use musher_worker::train::{Position, ProgressBoard};
use tch::{Device, Kind, Tensor};

type Failure = Box<dyn Error + Send + Sync>;

const PATIENCE: Duration = Duration::from_secs(60);
const STEPS_A_BLOCK: usize = 8;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument =
        |index: usize, default: f64| arguments.get(index).and_then(|a| a.parse().ok()).unwrap_or(default);
    let world = argument(0, 2.0) as usize;
    let options = ModelOptions {
        width: argument(1, 0.25),
        image_size: argument(2, 64.0) as usize,
        ..ModelOptions::default()
    };
    let (batch, pairs) = (argument(3, 4.0) as i64, argument(4, 20.0) as usize);
    tch::set_num_threads(1);

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
                scope.spawn(move || {
                    let ring = listener.form(&spec, Instant::now() + PATIENCE, &Aborter::new()?)?;
                    Rank::new(&options, batch, ring)?.blocks(pairs)
                })
            })
            .collect();
        ranks
            .into_iter()
            .map(|rank| rank.join().expect("a rank does not panic"))
            .collect::<Result<_, Failure>>()
    })?;

    // All ranks wait for each other in each step, so one's times are everybody's.
    let blocks = &of_ranks[0];
    let ratios = blocks.iter().map(|[bare, tolerant]| tolerant / bare).collect();
    let [bare, tolerant] = [0, 1].map(|kind| median(blocks.iter().map(|block| block[kind]).collect()));
    println!("bare {bare:.3} ms, fault-tolerant {tolerant:.3} ms, ratio by pairs {:.4}", median(ratios));
    Ok(())
}

struct Rank<R> {
    replica: Replica,
    ring: R,
    board: ProgressBoard,
    images: Tensor,
    masks: Tensor,
    step: u64,
}

impl<R: Collective> Rank<R> {
    fn new(options: &ModelOptions, batch: i64, ring: R) -> Result<Self, Failure> {
        let (size, cpu) = (options.image_size as i64, Device::Cpu);
        let board = ProgressBoard::default();
        board.connected(ring.meter());
        Ok(Self {
            replica: Replica::new(options, 0, cpu)?,
            ring,
            board,
            images: Tensor::rand([batch, 3, size, size], (Kind::Float, cpu)),
            masks: Tensor::randint(3, [batch, size / 2, size / 2], (Kind::Int64, cpu)),
            step: 0,
        })
    }

    /// Milliseconds a step, bare and fault-tolerant, of each pair of blocks.
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

    fn block(&mut self, tolerant: bool) -> Result<f64, Failure> {
        let mut times = Vec::new();
        for _ in 0..STEPS_A_BLOCK {
            let started = Instant::now();
            self.step(tolerant)?;
            times.push(started.elapsed().as_secs_f64() * 1e3);
        }
        Ok(median(times))
    }

    fn step(&mut self, tolerant: bool) -> Result<(), Failure> {
        self.step += 1;
        let started = Instant::now();
        if tolerant {
            self.board.mark(Activity::Working);
            self.replica.begin_step()?;
        }
        self.replica.zero_gradients()?;
        let logits = self.replica.forward(&self.images, Mode::Train)?;
        let loss = self.replica.backward_sum_loss(&logits, &self.masks, 1.0 / self.masks.numel() as f64)?;
        let mut loss = loss.f_double_value(&[])?;
        drop(logits);
        if tolerant {
            self.board.mark(Activity::WaitingForPeers);
        }
        let buckets: Vec<_> = self.replica.buckets().iter().map(|bucket| bucket.range.clone()).collect();
        let (step, ring) = (self.step, &mut self.ring);
        self.replica.with_gradients_mut(|gradients| {
            buckets.into_iter().enumerate().try_for_each(|(index, range)| {
                ring.all_reduce(Tag::new(step, index as u32, Phase::Gradients), &mut gradients[range])
            })
        })??;
        if tolerant {
            let mut words = [1.0, 0.0, loss];
            self.ring.all_reduce_f64(Tag::new(step, 0, Phase::Control), &mut words)?;
            assert_eq!(words[0], f64::from(self.ring.world()), "the ranks have lost step");
            loss = words[2];
            self.board.mark(Activity::Working);
        }
        let applies = self.replica.measure_gradients(None)?.finite.f_to_kind(Kind::Float)?.f_view([1])?;
        self.replica.update(1e-3, &applies, None)?;
        self.replica.settle(applies.f_double_value(&[0])? == 1.0);
        if tolerant {
            let position = Position { applied: Step(step), cursor: step, ..Position::default() };
            self.board.stepped(position, loss, 1, started.elapsed());
        }
        Ok(())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
