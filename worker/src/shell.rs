//! The async shell: carries messages between the coordinator, the session and the training thread.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{Arc, mpsc as sync_mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow};
use musher_collective::{Aborter, RingListener};
use musher_dataset::{Dataset, DatasetError, ImageCache, Source as DataSource, Warnings};
use musher_proto::{
    causes::causes,
    convert::Malformed,
    ids::Generation,
    job::{Cluster, JobConfig, mebibytes},
    message::{DataFacts, DataWarning, Failed, Fenced, FromWorker, Join, Start, ToWorker},
    wire::{self, training_client::TrainingClient},
};
use musher_security::{Credentials, Link as CoordinatorLink, fault};
use musher_session::{Command, Exit, Identity, Input, Output, Report, Session};
use rustix::process::{Pid, Signal, getpid, getppid, kill_process};
use tokio::{
    signal::unix::{Signal as UnixSignal, SignalKind, signal},
    sync::mpsc,
    task, time,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tracing::{info, warn};

use crate::{
    connection::{self, Keepalive},
    device::{self, Found},
    job_data,
    liveness::Liveness,
    train::{ProgressBoard, Source, StopFlag, TrainingData},
    trainer::{self, Order, OrderNumber, Orders, Product},
    transfer,
};

/// The longest time between two heartbeats.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Heartbeats within the time after which a silent worker is removed.
const HEARTBEATS: u32 = 5;
/// So many step time-outs after it was told to leave its generation, the training thread counts as stuck.
const STEP_TIMEOUTS_TO_LEAVE: f64 = 5.0;
/// Messages to the coordinator that are not sent yet; a worker has a handful in flight.
const OUTBOX: usize = 64;
/// What the training thread has done and nobody has taken yet.
const PRODUCTS: usize = 16;
/// A checkpoint's chunks on their way to the training thread.
const CHUNKS: usize = 8;
/// Exit codes of a process that SIGTERM or SIGINT ended.
const TERMINATED: u8 = 143;
const INTERRUPTED: u8 = 130;
/// For the coordinator to take a session. It does so at once.
const OPENING: Duration = Duration::from_secs(10);
/// For the last words to reach the coordinator.
const FAREWELL: Duration = Duration::from_secs(3);

pub struct Options {
    pub identity: Identity,
    /// The coordinator.
    pub url: String,
    pub channel: CoordinatorLink,
    pub credentials: Credentials,
    /// How long a coordinator is looked for that has not given its job yet.
    pub connect_timeout: Duration,
    /// The process that started this one, with which it is to end.
    pub parent: Option<Pid>,
    /// Where peers connect; port 0 takes any.
    pub ring_address: SocketAddr,
    /// What there is to train on.
    pub device: Found,
    /// Where the data is, if not where the job says.
    pub data_root: Option<String>,
    /// Of libtorch.
    pub threads: usize,
    /// Asked by probes.
    pub liveness: Arc<Liveness>,
}

/// Serves one run, to its end.
pub async fn run(options: Options) -> anyhow::Result<Exit> {
    let (session, first) = Session::start(options.identity.clone());
    let (inputs, mut input) = mpsc::channel(OUTBOX);
    let (connections, mut connected) = mpsc::channel(1);
    let (products, mut produced) = mpsc::channel(PRODUCTS);
    let mut shell = Shell {
        link: Link::open(options.channel.clone(), inputs.clone()),
        patience: options.connect_timeout,
        board: options.liveness.board(),
        options,
        session,
        inputs,
        connections,
        keepalive: Keepalive::default(),
        lost_at: None,
        lost_because: String::new(),
        told_to_leave: None,
        heartbeat: pulse(HEARTBEAT),
        time_to_leave: Duration::MAX,
        leaving: None,
        products,
        orders: None,
        prepared: None,
        exchange: None,
        stop: StopFlag::default(),
    };
    let mut exit = shell.perform(first).await?;
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut told = false;
    while exit.is_none() {
        let input = tokio::select! {
            Some(input) = input.recv() => {
                shell.hear(&input);
                input
            }
            Some(channel) = connected.recv() => shell.connected(channel),
            Some(product) = produced.recv() => match product {
                Product::Connected => Input::HeartbeatDue(shell.board.read()),
                Product::Report { generation, report } => Input::Reported { generation, report },
                Product::Part { term, checkpoint, snapshot } => {
                    let worker = shell.options.identity.worker.clone();
                    let channel = shell.options.channel.clone();
                    let upload = transfer::upload(channel, term, worker, checkpoint.clone(), snapshot);
                    task::spawn(async move {
                        if let Err(status) = upload.await {
                            warn!(checkpoint = checkpoint.as_str(), reason = status.message(), "a part was not stored");
                        }
                    });
                    continue;
                }
            },
            code = first_of(&mut terminate, &mut interrupt) => {
                if std::mem::replace(&mut told, true) {
                    torch_ext::exit_at_once(code);
                }
                if code == INTERRUPTED {
                    eprintln!("musher-worker: leaving after this step; again to end at once");
                }
                Input::LeaveWanted
            }
            _ = shell.heartbeat.tick() => {
                if shell.options.parent.is_some_and(|parent| getppid() != Some(parent)) {
                    return Ok(Exit::Failed { reason: "the process that started this one is gone".into() });
                }
                match shell.stuck() {
                    Some(reason) => Input::Reported {
                        generation: Generation(0),
                        report: Report::Failed(Failed { reason, any_worker: false }),
                    },
                    None => Input::HeartbeatDue(shell.board.read()),
                }
            }
        };
        let outputs = shell.session.handle(input);
        exit = shell.perform(outputs).await?;
    }
    let Link { outgoing, reader } = shell.link;
    drop(outgoing);
    drop(input);
    let _ = time::timeout(FAREWELL, reader).await;
    exit.context("the loop above ends with an exit")
}

/// One stream to the coordinator.
struct Link {
    outgoing: mpsc::Sender<wire::WorkerMessage>,
    /// Ends with the stream.
    reader: task::JoinHandle<()>,
}

impl Link {
    fn open(channel: CoordinatorLink, inputs: mpsc::Sender<Input>) -> Self {
        let (outgoing, outbox) = mpsc::channel(OUTBOX);
        Self { outgoing, reader: task::spawn(read(channel, outbox, inputs)) }
    }
}

/// Carries the coordinator's messages to the session until the stream ends. It opens once the first
/// message is in the outbox.
async fn read(
    channel: CoordinatorLink,
    outbox: mpsc::Receiver<wire::WorkerMessage>,
    inputs: mpsc::Sender<Input>,
) {
    let mut client = TrainingClient::new(channel);
    let opening = client.session(ReceiverStream::new(outbox));
    // A connection that is refused in the midst of its handshake may leave the request without an answer.
    let mut inbound = match time::timeout(OPENING, opening).await {
        Ok(Ok(response)) => response.into_inner(),
        Err(_) => {
            let reason = format!("it took no session within {} s", OPENING.as_secs());
            let _ = inputs.send(Input::Disconnected { reason }).await;
            return;
        }
        Ok(Err(status)) => {
            let reason = format!("it took no session: {}", fault(&status));
            let input = match status.code() {
                Code::Unimplemented => Input::NoCoordinator {
                    reason: "what answers at this address is no coordinator of Musher: correct the address"
                        .into(),
                },
                Code::Unauthenticated | Code::PermissionDenied => Input::NoCoordinator { reason },
                _ => Input::Disconnected { reason },
            };
            let _ = inputs.send(input).await;
            return;
        }
    };
    loop {
        let input = received(inbound.message().await);
        let ended = matches!(input, Input::Disconnected { .. });
        // An error means that the session is over; the stream's end is still waited for.
        let _ = inputs.send(input).await;
        if ended {
            return;
        }
    }
}

fn received(message: Result<Option<wire::CoordinatorMessage>, tonic::Status>) -> Input {
    let disconnected = |reason: String| Input::Disconnected { reason };
    match message {
        Ok(Some(message)) => match Fenced::<ToWorker>::try_from(message) {
            Ok(message) => Input::Received(message),
            Err(error @ Malformed { .. }) => disconnected(error.to_string()),
        },
        Ok(None) => disconnected("it closed the connection".into()),
        Err(status) => disconnected(status.message().to_owned()),
    }
}

struct Shell {
    options: Options,
    session: Session,
    link: Link,
    inputs: mpsc::Sender<Input>,
    /// Where attempts to reach the coordinator again end.
    connections: mpsc::Sender<anyhow::Result<CoordinatorLink>>,
    /// Of the connections after the first, which was made before the job was known.
    keepalive: Keepalive,
    /// How long a lost coordinator is waited for.
    patience: Duration,
    /// When it was lost; `None` once it has spoken again.
    lost_at: Option<Instant>,
    lost_because: String,
    /// Why, by the coordinator's last message.
    told_to_leave: Option<String>,
    heartbeat: time::Interval,
    /// For the training thread.
    time_to_leave: Duration,
    leaving: Option<Leaving>,
    products: mpsc::Sender<Product>,
    board: Arc<ProgressBoard>,
    orders: Option<Orders>,
    /// Where the training thread's inbox comes from, once.
    prepared: Option<sync_mpsc::Receiver<Orders>>,
    exchange: Option<Aborter>,
    stop: StopFlag,
}

/// The training thread is to break its generation off.
struct Leaving {
    /// What it is to do then.
    order: OrderNumber,
    /// Heartbeats until it counts as stuck. They stand still with the process, where a clock does not.
    heartbeats: u32,
}

impl Shell {
    async fn perform(&mut self, outputs: Vec<Output>) -> anyhow::Result<Option<Exit>> {
        for output in outputs {
            match output {
                Output::Send(message) => self.send(message).await,
                Output::Reconnect => self.reconnect(),
                Output::Prepare { job } => self.prepare(*job),
                Output::Command { generation, command } => self.command(generation, command)?,
                Output::AbortExchange => {
                    if let Some(aborter) = self.exchange.take() {
                        aborter.abort();
                    }
                }
                Output::Exit(exit) => return Ok(Some(exit)),
            }
        }
        Ok(None)
    }

    async fn send(&self, message: Fenced<FromWorker>) {
        // An error means that the stream has ended, of which the session will hear.
        let _ = self.link.outgoing.send(message.into()).await;
    }

    fn reconnect(&mut self) {
        let reason = std::mem::take(&mut self.lost_because);
        if self.lost_at.is_none() {
            let patience_s = self.patience.as_secs_f64();
            warn!(
                patience_s,
                reason, "the coordinator is gone: it is looked for, and work that can go on does"
            );
        }
        let lost_at = *self.lost_at.get_or_insert_with(Instant::now);
        let left = self.patience.saturating_sub(lost_at.elapsed());
        let (url, keepalive, patience) = (self.options.url.clone(), self.keepalive, self.patience);
        let (connections, credentials) = (self.connections.clone(), self.options.credentials.clone());
        task::spawn(async move {
            // One that ends each stream at once is not to be rushed, nor to be tried for ever.
            time::sleep(connection::RETRY).await;
            let connected = match left.is_zero() {
                true => Err(anyhow!("{url} answers, and for {:.0} s {reason}", patience.as_secs_f64())),
                false => connection::connect(&url, &credentials, left, keepalive).await,
            };
            let _ = connections.send(connected).await;
        });
    }

    /// Notes when the coordinator speaks, and logs why it ends a generation or this worker's part in it.
    fn hear(&mut self, input: &Input) {
        match input {
            Input::Received(Fenced { generation, body, .. }) => {
                self.lost_at = None;
                self.told_to_leave = None;
                match body {
                    ToWorker::Welcome(welcome) => {
                        info!(run = welcome.run, "the coordinator knows this worker")
                    }
                    ToWorker::Form(form) => {
                        info!(%generation, rank = form.rank.0, world_size = form.world, "in a team");
                    }
                    ToWorker::Abort { reason } => {
                        info!(%generation, reason, "the generation is over");
                        self.told_to_leave = Some(reason.clone());
                    }
                    ToWorker::Refused { .. }
                    | ToWorker::Train(_)
                    | ToWorker::Pause
                    | ToWorker::Validate(_)
                    | ToWorker::Save(_)
                    | ToWorker::Finish(_) => {}
                }
            }
            Input::Disconnected { reason } => {
                self.lost_because.clone_from(reason);
                if let Some(reason) = self.told_to_leave.take() {
                    warn!(reason, "the coordinator removed this worker: it joins again as a newcomer");
                }
            }
            _ => {}
        }
    }

    /// What to fail with, if the training thread does not leave its generation. Called at each heartbeat.
    fn stuck(&mut self) -> Option<String> {
        let leaving = self.leaving.as_mut()?;
        if self.orders.as_ref()?.is_begun(leaving.order) {
            self.leaving = None;
            return None;
        }
        leaving.heartbeats = leaving.heartbeats.saturating_sub(1);
        if leaving.heartbeats > 0 {
            return None;
        }
        thread::spawn(|| {
            // What holds the thread up may hold the process's orderly exit up too.
            thread::sleep(FAREWELL * 2);
            let _ = kill_process(getpid(), Signal::KILL);
        });
        let board = self.board.read();
        Some(format!(
            "the training thread is stuck: in phase {}, {}, it did not leave its generation within {:.1} s \
             (5 x cluster.step_timeout_s); start this worker again",
            board.phase.name(),
            board.activity.name(),
            self.time_to_leave.as_secs_f64(),
        ))
    }

    fn follow(&mut self, cluster: &Cluster) {
        let heartbeat_timeout = Duration::from_secs_f64(cluster.heartbeat_timeout_s);
        self.heartbeat = pulse(HEARTBEAT.min(heartbeat_timeout / HEARTBEATS));
        self.keepalive = Keepalive::within(heartbeat_timeout);
        self.patience = Duration::from_secs_f64(cluster.coordinator_timeout_s);
        self.time_to_leave = Duration::from_secs_f64(STEP_TIMEOUTS_TO_LEAVE * cluster.step_timeout_s);
    }

    fn connected(&mut self, channel: anyhow::Result<CoordinatorLink>) -> Input {
        match channel {
            Ok(channel) => {
                self.options.channel = channel.clone();
                self.link = Link::open(channel, self.inputs.clone());
                Input::Connected
            }
            Err(error) => Input::CoordinatorLost { reason: causes(error.as_ref()) },
        }
    }

    /// Reads the lists, and has the training thread build its replica; the session hears how it went.
    fn prepare(&mut self, job: JobConfig) {
        self.follow(&job.cluster);
        self.options.liveness.follow(&job.cluster);
        let inputs = self.inputs.clone();
        let data_root = self.options.data_root.clone();
        let (ring_address, threads) = (self.options.ring_address, self.options.threads);
        let device = self.options.device.for_job(job.cluster.device);
        let (board, products) = (self.board.clone(), self.products.clone());
        let (hand_over, prepared) = sync_mpsc::sync_channel(1);
        self.prepared = Some(prepared);
        task::spawn_blocking(move || {
            let device = match device {
                Ok(device) => device,
                Err(reason) => {
                    let _ = inputs.blocking_send(Input::NotPrepared { reason, may_pass: false });
                    return;
                }
            };
            let source = job_data::source(&job, data_root.as_deref().map(Path::new));
            let (dataset, listener) = match source.and_then(|source| open(&source, ring_address)) {
                Ok(opened) => opened,
                Err(error) => {
                    let may_pass = matches!(error.downcast_ref(), Some(DatasetError::Store { .. }));
                    let reason = causes(error.as_ref());
                    let _ = inputs.blocking_send(Input::NotPrepared { reason, may_pass });
                    return;
                }
            };
            let facts = DataFacts {
                digest: dataset.digest().to_owned(),
                train_samples: dataset.train().samples.len() as u64,
                val_samples: dataset.val().samples.len() as u64,
            };
            let ring_address = listener.local_addr().map(|address| address.to_string()).unwrap_or_default();
            let warnings = inputs.clone();
            let warn = move |warning: musher_dataset::DataWarning| {
                let warning =
                    DataWarning { file: warning.file.display().to_string(), problem: warning.problem };
                let _ = warnings.blocking_send(Input::DataWarned(warning));
            };
            let loader_threads = match job.data.loader_threads {
                0 => threads,
                chosen => chosen as usize,
            };
            let data = TrainingData {
                dataset: Arc::new(dataset),
                cache: Arc::new(ImageCache::new(mebibytes(job.data.cache_mb))),
                warnings: Arc::new(Warnings::new(warn)),
                threads: loader_threads,
            };
            info!(threads, loader_threads, ?device, "the training thread starts");
            let arithmetic = device::arithmetic(device);
            let (job, threads) = (Arc::new(job), threads as i32);
            let start = trainer::Start { job, device, data, listener, board, threads };
            // Without a replica it has said why.
            if let Some(orders) = trainer::start(start, products) {
                let _ = hand_over.send(orders);
                let _ =
                    inputs.blocking_send(Input::Prepared(Join::of_newcomer(facts, ring_address, arithmetic)));
            }
        });
    }

    fn command(&mut self, generation: Generation, command: Command) -> anyhow::Result<()> {
        let breaks_off = matches!(command, Command::Form(_) | Command::Leave) && self.orders.is_some();
        let order = match command {
            Command::Form(form) => {
                let aborter = Aborter::new()?;
                self.exchange = Some(aborter.clone());
                let source = self.source(&form.start, form.rank == form.donor);
                Order::Form { form, source, aborter }
            }
            Command::Train(order) => {
                self.stop = StopFlag::default();
                Order::Train { order, stop: self.stop.clone() }
            }
            Command::Pause => {
                self.stop.raise();
                return Ok(());
            }
            Command::Validate(order) => Order::Validate(order),
            Command::Save { term, save } => Order::Save { term, save },
            Command::Leave => Order::Leave,
        };
        let given = self.orders()?.give(generation, order);
        let order = given.context("the training thread does not take orders any more")?;
        if breaks_off {
            self.breaks_off(order);
        }
        Ok(())
    }

    /// The training thread has so long to come to `order`, or to the one for which it was to leave before.
    fn breaks_off(&mut self, order: OrderNumber) {
        let is_begun = |order| self.orders.as_ref().is_some_and(|orders| orders.is_begun(order));
        if self.leaving.as_ref().is_none_or(|leaving| is_begun(leaving.order)) {
            let heartbeats = self.time_to_leave.as_secs_f64() / self.heartbeat.period().as_secs_f64();
            self.leaving = Some(Leaving { order, heartbeats: heartbeats.ceil() as u32 + 1 });
        }
    }

    /// The training thread's inbox.
    fn orders(&mut self) -> anyhow::Result<&mut Orders> {
        if let Some(orders) = self.prepared.as_ref().and_then(|prepared| prepared.try_recv().ok()) {
            (self.orders, self.prepared) = (Some(orders), None);
        }
        self.orders.as_mut().context("the coordinator gave orders before this worker joined")
    }

    fn source(&self, start: &Start, donor: bool) -> Source {
        match start {
            Start::Seeded => Source::Seeded,
            Start::Held => Source::Held,
            Start::Checkpoint(id) if donor => {
                let (sender, chunks) = sync_mpsc::sync_channel(CHUNKS);
                task::spawn(transfer::download(self.options.channel.clone(), id.clone(), sender));
                Source::Checkpoint(chunks)
            }
            Start::Checkpoint(_) => Source::Held, // comes by broadcast
        }
    }
}

fn pulse(interval: Duration) -> time::Interval {
    let mut pulse = time::interval(interval);
    pulse.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    pulse
}

/// The exit code of the signal that comes first.
async fn first_of(terminate: &mut UnixSignal, interrupt: &mut UnixSignal) -> u8 {
    tokio::select! {
        _ = terminate.recv() => TERMINATED,
        _ = interrupt.recv() => INTERRUPTED,
    }
}

fn open(source: &DataSource, ring_address: SocketAddr) -> anyhow::Result<(Dataset, RingListener)> {
    let dataset = Dataset::open(source).map_err(|error: DatasetError| anyhow::anyhow!(error))?;
    let listener = RingListener::bind(ring_address).with_context(|| {
        format!("peers can't be heard at {ring_address}: give an address of this machine with --advertise")
    })?;
    Ok((dataset, listener))
}
