//! Checks NCCL on real GPUs; each rank is a process, and several may share one GPU.
//!
//! ```text
//! nccl_check sum     [--ranks N] [--gpus G]                            sums are exact, for each dtype and many lengths
//! nccl_check abort   [--ranks N] [--gpus G]                            a wait that nothing ends is aborted from another
//!                                                                      thread; the same processes connect anew, and sum
//! nccl_check kill    [--ranks N] [--gpus G] [--proto LL|LL128|Simple]  the last rank is killed in mid-bucket after 50
//!                                                                      steps; the others abort and go on without it
//! ```
//!
//! NCCL takes ranks of one host for GPUs of their own, so each gets a host id of its own and they speak over sockets:
//! right for correctness, useless for timing. Ends with 0 if all is as expected, 77 where there is no GPU.

use std::{
    env,
    net::{Ipv4Addr, SocketAddr},
    process::{Child, Command, ExitCode, Stdio},
    sync::mpsc::channel,
    thread,
    time::{Duration, Instant},
};

use musher_collective::{Aborter, Collective, Phase, Ring, RingListener, RingSpec, Secret, Tag};
use musher_nccl::{ExchangeError, GpuCollective, NcclRuntime, OnHost, Place, TensorCollective};
use tch::{Device, Kind, Tensor};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const STEPS_BEFORE_THE_KILL: u64 = 50;
/// 4 MiB, which take many chunks of any protocol; a job's buckets take long over the sockets of one host.
const BUCKET: i64 = 1 << 20;
const CONNECT: Duration = Duration::from_secs(60);
const ABORT: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let args: Vec<_> = env::args().skip(1).collect();
    let Some(check) = args.first().filter(|check| ["sum", "abort", "kill"].contains(&check.as_str())) else {
        eprintln!("usage: nccl_check sum|abort|kill [--ranks N] [--gpus G] [--proto LL|LL128|Simple]");
        return ExitCode::from(2);
    };
    if let Err(torch_ext::Error(reason)) = torch_ext::open_cuda() {
        println!("skipped: {reason}");
        return ExitCode::from(77);
    }
    let option = |name: &str| args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1));
    let number = |name, default| option(name).map_or(Ok(default), |text| text.parse());
    let outcome = match (number("--ranks", 2), number("--gpus", 1), number("--rank", u32::MAX)) {
        (Ok(ranks), Ok(gpus), Ok(u32::MAX)) => start_ranks(&args, ranks, gpus, option("--proto")),
        (Ok(ranks), Ok(gpus), Ok(rank)) => Rank::new(rank, ranks, rank % gpus).and_then(|it| it.run(check)),
        _ => Err("--ranks, --gpus and --rank are numbers".into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("FAILED: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The parent: each rank is this program again.
fn start_ranks(args: &[String], ranks: u32, gpus: u32, proto: Option<&String>) -> Outcome<()> {
    let available = tch::Cuda::device_count() as u32;
    if gpus == 0 || gpus > available {
        return Err(format!("--gpus {gpus}: {available} can be used").into());
    }
    let addresses = free_addresses(2 * ranks)?;
    let start = |rank: u32| {
        let mut command = Command::new(env::current_exe()?);
        command.args(args).args(["--rank", &rank.to_string()]).env("MUSHER_CHECK_ADDRESSES", &addresses);
        if gpus < ranks {
            // Up to NCCL 2.29 this is what lets ranks share a GPU; it is read at the first call.
            command.env("NCCL_HOSTID", format!("musher-{rank}"));
        }
        if let Some(proto) = proto {
            command.env("NCCL_PROTO", proto);
        }
        command.stdin(Stdio::null()).spawn()
    };
    let children = (0..ranks).map(start).collect::<Result<Vec<Child>, _>>()?;
    let victim = (args[0] == "kill").then(|| ranks - 1);
    let mut failed = Vec::new();
    for (rank, mut child) in (0..).zip(children) {
        let status = child.wait()?;
        if !status.success() && Some(rank) != victim {
            failed.push(format!("rank {rank}: {status}"));
        }
    }
    if !failed.is_empty() {
        return Err(failed.join(", ").into());
    }
    println!("{}: as expected", args[0]);
    Ok(())
}

/// On loopback, for the exchanges between the processes: one each for two generations.
fn free_addresses(count: u32) -> Outcome<String> {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let listeners = (0..count).map(|_| RingListener::bind(any)).collect::<Result<Vec<_>, _>>()?;
    let addresses = listeners.iter().map(|it| it.local_addr().map(|address| address.to_string()));
    Ok(addresses.collect::<Result<Vec<_>, _>>()?.join(","))
}

struct Rank {
    rank: u32,
    world: u32,
    runtime: NcclRuntime,
    device: Device,
}

impl Rank {
    fn new(rank: u32, world: u32, gpu: u32) -> Outcome<Self> {
        let gpu = gpu as usize;
        let runtime = NcclRuntime::open(gpu)?;
        if rank == 0 {
            println!("NCCL {}, {}, {world} ranks", runtime.version(), musher_nccl::device_name(gpu)?);
        }
        Ok(Self { rank, world, runtime, device: Device::Cuda(gpu) })
    }

    fn run(&self, check: &str) -> Outcome<()> {
        match check {
            "sum" => {
                let (mut exchange, mut hosts) = self.connect(1, self.world, CONNECT)?;
                self.sums_are_exact(&mut exchange)?;
                hosts.barrier()?;
                Ok(exchange.finish()?)
            }
            "abort" => self.abort_and_connect_anew(),
            _ => self.survive_a_kill(),
        }
    }

    /// Joins generation `number` of `world` ranks, whose id travels over the hosts' ring.
    fn connect(&self, number: u32, world: u32, patience: Duration) -> Outcome<(GpuCollective, Hosts)> {
        let all = env::var("MUSHER_CHECK_ADDRESSES")?;
        let all = all.split(',').map(str::parse).collect::<Result<Vec<SocketAddr>, _>>()?;
        let first = ((number - 1) * self.world) as usize;
        let addresses = &all[first..first + world as usize];
        let aborter = Aborter::new()?;
        let spec = RingSpec {
            generation: u64::from(number),
            rank: self.rank,
            purpose: musher_collective::Purpose::Steps,
            secret: Secret([number as u8; 32]),
            patience: CONNECT,
            world,
            successor: addresses[(self.rank as usize + 1) % addresses.len()],
        };
        let listener = RingListener::bind(addresses[self.rank as usize])?;
        let mut ring = listener.form(&spec, Instant::now() + CONNECT, &aborter)?;
        let id = self.runtime.agree_on_id(&mut ring)?;
        let place =
            Place { rank: self.rank, world, connect_timeout: CONNECT, patience, abort_timeout: ABORT };
        // An aborter of its own: the hosts still speak with each other after it.
        let exchange = self.runtime.connect(&id, place, &Aborter::new()?)?;
        Ok((exchange, Hosts(OnHost(ring))))
    }

    /// Whole numbers small enough that any order of summation gives the same bits.
    fn sums_are_exact(&self, exchange: &mut GpuCollective) -> Outcome<()> {
        let world = f64::from(exchange.world());
        let ranks = world * (world + 1.0) / 2.0;
        let mut checked = 0;
        for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
            for length in [1, 3, 1000, 65_537, BUCKET] {
                let ramp = Tensor::arange(length, (Kind::Int64, self.device)).remainder(16);
                let mine = (&ramp * i64::from(exchange.rank() + 1)).to_kind(kind);
                let expected = ramp.to_kind(kind) * ranks;
                exchange.all_reduce(tag(0, checked), &mine)?;
                exchange.fence()?;
                let differing = mine.not_equal_tensor(&expected).sum(Kind::Int64);
                exchange.wait()?;
                let differing = differing.int64_value(&[]);
                if differing != 0 {
                    return Err(format!("{differing} of {length} sums of {kind:?} are wrong").into());
                }
                checked += 1;
            }
        }
        let root = exchange.world() - 1;
        let bytes = Tensor::full([1001], i64::from(exchange.rank()), (Kind::Uint8, self.device));
        exchange.broadcast(tag(0, checked), root, &bytes)?;
        exchange.wait()?;
        if bytes.not_equal(i64::from(root)).any().int64_value(&[]) != 0 {
            return Err("a broadcast did not arrive".into());
        }
        println!("rank {}: {checked} sums and a broadcast are exact", self.rank);
        Ok(())
    }

    /// Rank 0 launches a sum that nobody joins.
    fn abort_and_connect_anew(&self) -> Outcome<()> {
        let (mut exchange, mut hosts) = self.connect(1, self.world, Duration::from_secs(600))?;
        self.sums_are_exact(&mut exchange)?;
        hosts.barrier()?;
        let aborter = exchange.aborter();
        let began = if self.rank == 0 {
            let lonely = Tensor::ones([BUCKET], (Kind::Float, self.device));
            exchange.all_reduce(tag(1, 0), &lonely)?;
            let (aborting, aborted_at) = channel();
            thread::spawn(move || {
                thread::sleep(Duration::from_secs(1));
                let _ = aborting.send(Instant::now());
                aborter.abort();
            });
            match exchange.wait() {
                Err(ExchangeError::Aborted(Some(wait))) => println!("rank 0: aborted {wait}"),
                other => return Err(format!("the wait ended with {other:?}").into()),
            }
            aborted_at.recv()?
        } else {
            thread::sleep(Duration::from_secs(1));
            aborter.abort();
            Instant::now()
        };
        exchange.leave()?;
        println!("rank {}: let go in {} ms", self.rank, began.elapsed().as_millis());
        hosts.barrier()?;
        self.go_on(self.world, began)
    }

    fn survive_a_kill(&self) -> Outcome<()> {
        let victim = self.world - 1;
        let (mut exchange, _hosts) = self.connect(1, self.world, Duration::from_secs(10))?;
        let gradient = Tensor::ones([BUCKET], (Kind::Float, self.device));
        let sum = |exchange: &mut GpuCollective, step| -> Result<f64, ExchangeError> {
            let bucket = gradient.shallow_clone().fill_(f64::from(self.rank + 1));
            exchange.all_reduce(tag(step, 0), &bucket)?;
            exchange.wait()?;
            Ok(bucket.mean(Kind::Double).double_value(&[]))
        };
        for step in 0..STEPS_BEFORE_THE_KILL {
            let (found, expected) = (sum(&mut exchange, step)?, f64::from(self.world * (self.world + 1) / 2));
            if found != expected {
                return Err(format!("step {step}: {found} instead of {expected}").into());
            }
        }
        if self.rank == victim {
            let bucket = gradient.shallow_clone();
            exchange.all_reduce(tag(STEPS_BEFORE_THE_KILL, 0), &bucket)?;
            // In the middle of the bucket, which takes tens of milliseconds over sockets.
            thread::sleep(Duration::from_millis(3));
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)?;
        }
        let error = match (STEPS_BEFORE_THE_KILL..).find_map(|step| sum(&mut exchange, step).err()) {
            Some(error) => error,
            None => return Err("nobody noticed".into()),
        };
        let began = Instant::now();
        println!("rank {}: {error}", self.rank);
        exchange.leave()?;
        println!("rank {}: let go in {} ms", self.rank, began.elapsed().as_millis());
        self.go_on(self.world - 1, began)
    }

    /// In the same process, under a fresh id.
    fn go_on(&self, world: u32, began: Instant) -> Outcome<()> {
        let (mut exchange, mut hosts) = self.connect(2, world, CONNECT)?;
        println!("rank {}: in generation 2 after {} ms", self.rank, began.elapsed().as_millis());
        self.sums_are_exact(&mut exchange)?;
        hosts.barrier()?;
        Ok(exchange.finish()?)
    }
}

/// What the processes do together beside the GPUs.
struct Hosts(OnHost<Ring>);

impl Hosts {
    fn barrier(&mut self) -> Outcome<()> {
        Ok(self.0.0.all_reduce(Tag::new(0, 0, Phase::Warmup), &mut [0.0])?)
    }
}

fn tag(step: u64, bucket: u32) -> Tag {
    Tag::new(step, bucket, Phase::Gradients)
}
