//! From a job file to a run's end: what `launch` and `serve` share.

use std::{fs, future::Future, io, net::SocketAddr, path::Path, sync::Arc};

use anyhow::{Context, anyhow};
use clap::ValueEnum;
use musher_dataset::{Dataset, DatasetError, HeldOut, Source, reach};
use musher_proto::job::{self, JobConfig};
use serde_json::json;
use tokio::{
    net::{TcpListener, TcpSocket},
    signal::unix,
    task,
    time::{self, Duration, Instant},
};
use tracing::{info, warn};

use super::{Exit, Failure, JobArgs, access, local, usage};
use crate::{
    announce::{Addresses, Announcer, status_name, stopped_name},
    core::{Event, Origin, Outcome, RunPhase, Status},
    http::{self, Guard, Site},
    outlook::{Samples, outlook},
    run_dir::{self, Opening, RunDir, RunDirError},
    service::{Handle, Service},
    store::{CheckpointStore, StoreError},
    telemetry::{self, Feed, Progress, TelemetryOptions},
    traces::Pipeline,
};

/// Connections that wait to be taken; the system may allow fewer (net.core.somaxconn).
const BACKLOG: u32 = 4096;

pub(super) fn load_job(args: &JobArgs) -> Result<JobConfig, Failure> {
    let text = read_job(&args.job)?;
    job::load(&text, &args.job.display().to_string(), &args.overrides).map_err(usage)
}

pub(super) fn read_job(file: &Path) -> Result<String, Failure> {
    fs::read_to_string(file)
        .with_context(|| format!("cannot read the job file {}", file.display()))
        .map_err(usage)
}

/// The resolved job, and in comments below it what it comes to for a team of `world`.
pub(super) fn print_dry(job: &JobConfig, world: u32) {
    let samples = match open_data(job) {
        Ok(data) => {
            Samples::Known { train: data.train().samples.len() as u64, val: data.val().samples.len() as u64 }
        }
        Err(why) => Samples::Unknown(why.to_string()),
    };
    print!("{}\n{}", job.to_toml(), outlook(job, world, &samples));
}

/// The data set where the job says it is.
pub(super) fn open_data(job: &JobConfig) -> Result<Dataset, DatasetError> {
    let data = &job.data;
    let held_out = HeldOut { fraction: data.val_fraction, seed: job.seed };
    reach(&data.root_path())?;
    Dataset::open(&Source {
        root: data.root_path(),
        train_split: data.train_split.clone(),
        val_split: data.val_split.clone(),
        held_out: (data.val_fraction > 0.0).then_some(held_out),
        ..Source::default()
    })
}

/// A run that is about to begin: its directory is ours, its port is bound, its log is open.
pub(super) struct Prepared {
    service: Service,
    listener: TcpListener,
    address: SocketAddr,
    watched: Watched,
    result_weights: String,
    json: bool,
}

/// Where the run can be looked at.
struct Watched {
    site: TcpListener,
    guard: Guard,
    probes: Option<TcpListener>,
    feed: Feed,
}

/// The workers of a run that is resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FormerTeam {
    /// They were this command's children, and died with it.
    IsGone,
    /// They may have outlived their coordinator.
    MayLive,
}

pub(super) async fn prepare(
    args: &JobArgs,
    job: JobConfig,
    former_team: FormerTeam,
) -> Result<Prepared, Failure> {
    let door = access::door(&job, args.insecure)?;
    let guard = access::guard(&job.server, &door, args.insecure)?;
    let listener = bind("server.grpc", job.server.grpc)?;
    let address = listener.local_addr()?;
    let site = bind("server.http", job.server.http)?;
    let probes = match job.server.probes {
        Some(address) => Some(bind("server.probes", address)?),
        None => None,
    };
    let feed = Feed::default();
    let run_dir = args.run_dir.clone().unwrap_or_else(|| job.run_dir());
    local("--run-dir", &run_dir, "checkpoints go to an object store by --set checkpoint.store=URL")?;
    let named_store = task::block_in_place(|| run_dir::named_store(&job, &musher_store::environment()))
        .map_err(of_store)?;
    let opening = opening(args, &run_dir, named_store.as_ref()).map_err(of_store)?;
    let run_dir = RunDir::open(&run_dir, opening).map_err(of_run_dir)?;
    let console = telemetry::init(TelemetryOptions {
        format: args.log_format.map(Into::into),
        events_file: Some(run_dir.events_file()),
        feed: Some(feed.clone()),
        tensorboard: Some(run_dir.tensorboard()),
    })?;
    access::caution(&job, &door, &guard);
    let (store, state, resumed) = task::block_in_place(|| {
        let store = named_store.map_or_else(|| run_dir.checkpoints(), Ok)?;
        let mut state = run_dir.next_state()?;
        run_dir::take_over(&store, &run_dir, &job, opening, &mut state)?;
        let resumed = match opening {
            Opening::Start => None,
            _ => run_dir::resume_point(&store, &run_dir, &job, &mut state)?,
        };
        Ok::<_, RunDirError>((store, state, resumed))
    })
    .map_err(of_run_dir)?;
    let result_weights = match job.early_stopping.restore_best {
        true => run_dir.best_weights(),
        false => run_dir.last_weights(),
    };
    let result_weights = result_weights.display().to_string();
    let announcer = Announcer::new(
        job.name.clone(),
        job.clone(),
        Progress::new(&console),
        Addresses { grpc: address, page: guard.url(site.local_addr()?) },
        result_weights.clone(),
    );
    let origin = Origin {
        run: job.name.clone(),
        job: job.clone(),
        state,
        resumed,
        entropy: rand::random(),
        listen: former_team == FormerTeam::MayLive,
    };
    let collector = Some(&job.telemetry.otlp).filter(|url| !url.is_empty());
    let traces = collector
        .map(|url| Pipeline::open(url, &origin, door.metrics.spans_lost.clone()))
        .transpose()
        .map_err(usage)?
        .map(Arc::new);
    let service = Service { run_dir, store, job, origin, announcer, door, traces };
    let watched = Watched { site, guard, probes, feed };
    Ok(Prepared { service, listener, address, watched, result_weights, json: args.json })
}

/// Whether a run begins here or goes on, by what was asked for and what is there.
fn opening(
    args: &JobArgs,
    run_dir: &Path,
    named_store: Option<&CheckpointStore>,
) -> Result<Opening, StoreError> {
    let has_checkpoints = || match named_store {
        Some(store) => task::block_in_place(|| store.is_empty()).map(|empty| !empty),
        None => Ok(false),
    };
    let is_asked = args.resume || args.resume_or_start && RunDir::is_begun(run_dir);
    Ok(match is_asked {
        // The store is asked only where it makes a difference.
        true if RunDir::is_begun(run_dir) => Opening::Resume,
        true if has_checkpoints()? => Opening::ResumeFromElsewhere,
        true => Opening::Resume,
        false if args.resume_or_start && has_checkpoints()? => Opening::ResumeFromElsewhere,
        false => Opening::Start,
    })
}

/// What a network or another process is at fault for is no bad usage: a scheduler may try again.
fn of_store(error: StoreError) -> Failure {
    match error.may_pass() {
        true => Failure::Later(error.into()),
        false => usage(error),
    }
}

fn of_run_dir(error: RunDirError) -> Failure {
    match error {
        RunDirError::InUse(_) => Failure::Later(error.into()),
        RunDirError::Store(error) => of_store(error),
        _ => usage(error),
    }
}

fn bind(key: &str, address: SocketAddr) -> Result<TcpListener, Failure> {
    let why = |error| {
        anyhow!(
            "cannot listen on {address}: {error}; give another address with --set {key}=IP:PORT, port 0 for any"
        )
    };
    listen(address).map_err(|error| usage(why(error)))
}

/// As tokio does, with a longer queue: thousands of workers may come in one moment, and come back in one.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

impl Prepared {
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether the run is at its end already, so that workers would find nothing to do.
    pub fn is_finished(&self) -> bool {
        let Origin { job, resumed, .. } = &self.service.origin;
        resumed.as_ref().is_some_and(|point| point.progress.end(job.train.epochs).is_some())
    }

    /// Serves until the run ends; `alongside` runs beside it with a handle to it.
    pub async fn run<F: Future<Output = ()> + Send + 'static>(
        self,
        on_sigterm: OnSigterm,
        alongside: impl FnOnce(Handle) -> F,
    ) -> Result<Exit, Failure> {
        let Prepared { service, listener, watched, result_weights, json, .. } = self;
        let metrics = service.door.metrics.clone();
        let samples = service.run_dir.samples();
        let min_workers = service.job.cluster.min_workers as usize;
        let traces = service.traces.clone();
        let outcome = service
            .run(listener, |handle| {
                tokio::spawn(forward_signals(handle.clone(), on_sigterm, min_workers));
                if let Some(probes) = watched.probes {
                    tokio::spawn(http::serve_probes(probes, handle.clone()));
                }
                let site = Site { handle: handle.clone(), feed: watched.feed, metrics, samples };
                tokio::spawn(site.serve(watched.site, watched.guard));
                tokio::spawn(alongside(handle));
            })
            .await;
        if let Some(traces) = traces {
            traces.finish().await;
        }
        let outcome = outcome?;
        let weights = Some(result_weights).filter(|path| Path::new(path).exists());
        if json {
            println!("{}", last_line(&outcome, weights.as_deref()));
        }
        Ok(match outcome.status {
            Status::Finished(_) => Exit::Finished,
            Status::Stopped => Exit::Resumable,
            Status::Failed { reason } => return Err(anyhow!(reason).into()),
        })
    }
}

/// What the first SIGTERM to a coordinator means. SIGINT always stops the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum OnSigterm {
    /// The run is saved and ends, so that it can be resumed.
    Stop,
    /// Workers train on, and the next coordinator goes on with them: for a coordinator that is moved to another machine.
    /// If the workers are told to leave too, it is a stop.
    HandOver,
}

/// Between SIGTERM and the end of a coordinator that hands its run over: who ends workers, too, has told them by then.
const HAND_OVER: Duration = Duration::from_secs(10);
/// Between two looks at who is leaving.
const LOOK: Duration = Duration::from_millis(200);

/// The first SIGTERM or SIGINT stops the run so that it can be resumed, or hands it over; a second ends the process.
async fn forward_signals(handle: Handle, on_sigterm: OnSigterm, min_workers: usize) {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (unix::signal(unix::SignalKind::terminate()), unix::signal(unix::SignalKind::interrupt()))
    else {
        return warn!("signals can't be handled here: SIGTERM will end the run without a checkpoint");
    };
    let mut signal = async || tokio::select! { _ = terminate.recv() => 143, _ = interrupt.recv() => 130 };
    if signal().await == 143 && on_sigterm == OnSigterm::HandOver {
        let seconds = HAND_OVER.as_secs();
        info!(seconds, "the run is left to the next coordinator; a second signal ends this one at once");
        tokio::select! {
            code = signal() => std::process::exit(code),
            () = hand_over(&handle, min_workers) => {}
        }
    }
    info!("stopping after the step in flight; a second signal ends the run at once");
    handle.tell(Event::StopRequested).await;
    std::process::exit(signal().await);
}

/// Ends the process when it is time, and returns if nobody is left to hand over to.
async fn hand_over(handle: &Handle, min_workers: usize) {
    let until = Instant::now() + HAND_OVER;
    loop {
        let Some(status) = handle.status().await.filter(|status| status.phase != RunPhase::Ended) else {
            return std::future::pending().await; // it ends by itself
        };
        if status.peers.iter().filter(|peer| !peer.leaving).count() < min_workers {
            return info!("the workers leave, too");
        }
        if Instant::now() >= until {
            // What counts is on disk at any moment: that is how a killed coordinator costs nothing.
            std::process::exit(75);
        }
        time::sleep(LOOK).await;
    }
}

/// The contract's line of JSON on stdout.
fn last_line(outcome: &Outcome, weights: Option<&str>) -> serde_json::Value {
    let reason = match &outcome.status {
        Status::Failed { reason } => Some(reason.as_str()),
        _ => None,
    };
    json!({
        "status": status_name(outcome),
        "stopped": stopped_name(outcome),
        "reason": reason,
        "epochs": outcome.epochs.0,
        "best_epoch": outcome.best_epoch.map(|epoch| epoch.0),
        "val_loss": outcome.scores.map(|s| s.loss),
        "val_accuracy": outcome.scores.map(|s| s.accuracy),
        "val_miou": outcome.scores.map(|s| s.miou),
        "images_per_second": outcome.images_per_second,
        "best_weights": weights,
    })
}
