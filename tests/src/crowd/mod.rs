//! The coordinator alone, under as many workers as one likes: sessions over real streams, a connection each, from
//! workers that have no replica ([`worker`]). Measures what the coordinator takes for what it does to all of them.
//!
//! Coordinator and crowd are two processes. On a machine of few cores they share them, so that a time is also the
//! crowd's own; the coordinator's processor time, which is told beside each, is not.

mod board;
mod meter;
mod worker;

use std::{
    collections::BTreeSet,
    fmt,
    path::Path,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow};
use musher_proto::ids::{Epoch, Generation};
use tokio::{
    sync::{Semaphore, watch},
    task::JoinSet,
    time,
};

use crate::{Process, Run, binaries};
use board::Board;
use meter::Meter;
use worker::Worker;

/// Connections that are made at a time.
const CONNECTING: usize = 64;

#[derive(Clone, Debug)]
pub struct Options {
    pub workers: usize,
    /// Of the data set that they say they have.
    pub train_samples: u64,
    /// How long the steady state is watched.
    pub steady: Duration,
}

/// What all workers know.
#[derive(Clone, Debug)]
struct Crowd {
    board: Arc<Board>,
    batch: u64,
    train_samples: u64,
    val_samples: u64,
}

/// What they are told to do.
#[derive(Clone, Debug, Default)]
struct Conduct {
    /// Epochs up to this one end as soon as they are begun.
    ended: Epoch,
    /// These vanish.
    gone: BTreeSet<usize>,
}

/// What was measured of one thing that the coordinator does.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    pub what: &'static str,
    /// Until the last worker had its order.
    pub seconds: f64,
    /// The coordinator's processor time meanwhile.
    pub cpu_seconds: f64,
}

#[derive(Clone, Debug)]
pub struct Report {
    pub workers: usize,
    pub measured: Vec<Measured>,
    /// In the steady state, heartbeats and progress at 1 Hz: share of one core.
    pub steady_share: f64,
    /// The coordinator's most, MiB.
    pub memory_mb: f64,
}

/// Runs `musher serve` in `dir`, and the crowd against it.
pub fn run(options: &Options, dir: &Path) -> anyhow::Result<Report> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(measure(options, dir))
}

async fn measure(options: &Options, dir: &Path) -> anyhow::Result<Report> {
    let workers = options.workers;
    let mut run = serve(options, dir)?;
    let url = run.address();
    let meter = Meter::of(run.id());
    let mut measured = Vec::new();
    let mut note = |what, began: (Instant, f64), ended: Instant| {
        let seconds = ended.saturating_duration_since(began.0).as_secs_f64();
        measured.push(Measured { what, seconds, cpu_seconds: meter.cpu_seconds() - began.1 });
    };
    let now = || (Instant::now(), meter.cpu_seconds());

    let batch = workers as u64;
    let board = Arc::new(Board::default());
    let crowd =
        Crowd { board: board.clone(), batch, train_samples: options.train_samples, val_samples: 100 * batch };
    let (conduct, told) = watch::channel(Conduct::default());
    let began = now();
    let mut connected = Vec::new();
    for worker in connect(0..workers, &url, &crowd, &told).await? {
        connected.push(worker);
    }
    note("connect", began, Instant::now());

    let mut at_work = JoinSet::new();
    let began = now();
    for worker in connected {
        at_work.spawn(worker.work());
    }
    let watched =
        async |count: usize, epoch: u32, former: Generation, at_work: &mut JoinSet<anyhow::Result<()>>| {
            tokio::select! {
                trains = board.training(count, Epoch(epoch), former) => trains,
                failed = first_failure(at_work) => Err(failed),
            }
        };
    let (generation, ended) = watched(workers, 1, Generation(0), &mut at_work).await?;
    note("form", began, ended);

    let (start, cpu) = now();
    time::sleep(options.steady).await;
    let steady_share = (meter.cpu_seconds() - cpu) / start.elapsed().as_secs_f64();

    let began = now();
    conduct.send_modify(|conduct| {
        conduct.gone.insert(workers / 2);
    });
    let (generation, ended) = watched(workers - 1, 1, generation, &mut at_work).await?;
    note("reform", began, ended);

    let newcomer = connect(workers..workers + 1, &url, &crowd, &told).await?.pop().context("one connects")?;
    let began = now();
    at_work.spawn(newcomer.work());
    let (generation, ended) = watched(workers, 1, generation, &mut at_work).await?;
    note("join", began, ended);

    let began = now();
    conduct.send_modify(|conduct| conduct.ended = Epoch(1));
    let (_, ended) = watched(workers, 2, Generation(generation.0 - 1), &mut at_work).await?;
    note("epoch turn-over", began, ended);

    let memory_mb = meter.peak_mb();
    if run.has_ended() {
        return Err(anyhow!("the coordinator has ended: {}", run.said()));
    }
    run.kill();
    Ok(Report { workers, measured, steady_share, memory_mb })
}

fn serve(options: &Options, dir: &Path) -> anyhow::Result<Run> {
    let run_dir = dir.join("run");
    let job = format!(
        r#"
        name = "crowd"
        train = {{ global_batch = {workers}, epochs = 1000 }}
        early_stopping = {{ start_from_epoch = 999 }}
        checkpoint = {{ every_epochs = 0 }}
        cluster = {{ workers = {workers}, max_workers = {most}, start_timeout_s = 600.0, regroup_window_s = 0.0 }}
        server = {{ grpc = "127.0.0.1:0", http = "127.0.0.1:0" }}
        "#,
        workers = options.workers,
        most = options.workers + 1,
    );
    let path = dir.join("job.toml");
    std::fs::write(&path, job).with_context(|| format!("{} can't be written", path.display()))?;
    let mut command = Command::new(binaries::musher());
    command.arg("serve").arg(&path).arg("--run-dir").arg(&run_dir);
    Ok(Run::follow(Process::start(command, dir.join("serve")), run_dir, 0))
}

async fn connect(
    numbers: std::ops::Range<usize>,
    url: &str,
    crowd: &Crowd,
    told: &watch::Receiver<Conduct>,
) -> anyhow::Result<Vec<Worker>> {
    let turns = Arc::new(Semaphore::new(CONNECTING));
    let mut connecting = JoinSet::new();
    for number in numbers {
        let (url, crowd, told, turns) = (url.to_owned(), crowd.clone(), told.clone(), turns.clone());
        connecting.spawn(async move {
            let _turn = turns.acquire().await?;
            Worker::connect(number, &url, crowd, told).await.with_context(|| format!("worker {number}"))
        });
    }
    let mut connected = Vec::new();
    while let Some(worker) = connecting.join_next().await {
        connected.push(worker??);
    }
    Ok(connected)
}

/// Why a worker could not go on. Those that were told to go are no failures.
async fn first_failure(at_work: &mut JoinSet<anyhow::Result<()>>) -> anyhow::Error {
    loop {
        match at_work.join_next().await {
            Some(Ok(Ok(()))) => {}
            Some(Ok(Err(error))) => return error,
            Some(Err(panic)) => return panic.into(),
            None => return anyhow!("no worker is left"),
        }
    }
}

impl fmt::Display for Report {
    /// Rows of Markdown: workers, what, seconds, processor seconds.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for Measured { what, seconds, cpu_seconds } in &self.measured {
            writeln!(f, "| {} | {what} | {seconds:.2} s | {cpu_seconds:.2} s |", self.workers)?;
        }
        writeln!(f, "| {} | steady, share of a core | | {:.1} % |", self.workers, self.steady_share * 100.0)?;
        write!(f, "| {} | memory, most | | {:.0} MiB |", self.workers, self.memory_mb)
    }
}
