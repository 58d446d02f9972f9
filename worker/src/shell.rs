//! The async shell: carries messages between the coordinator, the session and the training thread.

use std::{
    net::SocketAddr,
    sync::{Arc, mpsc as sync_mpsc},
    time::{Duration, Instant},
};

use anyhow::Context;
use musher_collective::{Aborter, RingListener};
use musher_dataset::{Dataset, DatasetError, ImageCache, Source as DataSource, Warnings};
use musher_proto::{
    convert::Malformed,
    ids::Generation,
    job::JobConfig,
    message::{DataFacts, DataWarning, Fenced, FromWorker, Start, ToWorker},
    wire::{self, training_client::TrainingClient},
};
use musher_session::{Command, Exit, Identity, Input, Output, Session};
use rustix::process::{Pid, getppid};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task, time,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tracing::{info, warn};

use crate::{
    connection,
    train::{ProgressBoard, Source, StopFlag, TrainingData},
    trainer::{self, Order, Product},
    transfer,
};

const HEARTBEAT: Duration = Duration::from_secs(1);
/// Messages to the coordinator that are not sent yet; a worker has a handful in flight.
const OUTBOX: usize = 64;
/// Orders that the training thread has not begun; the coordinator sends at most three in a row.
const ORDERS: usize = 16;
/// What the training thread has done and nobody has taken yet.
const PRODUCTS: usize = 16;
/// A checkpoint's chunks on their way to the training thread.
const CHUNKS: usize = 8;
/// Exit code of a process that SIGTERM ended.
const TERMINATED: i32 = 143;
/// For the last words to reach the coordinator.
const FAREWELL: Duration = Duration::from_secs(3);

pub struct Options {
    pub identity: Identity,
    /// The coordinator.
    pub url: String,
    pub channel: Channel,
    /// The process that started this one, with which it is to end.
    pub parent: Option<Pid>,
    /// Where peers connect; port 0 takes any.
    pub ring_address: SocketAddr,
    /// Where the data is, if not where the job says.
    pub data_root: Option<String>,
    /// Of libtorch.
    pub threads: usize,
}

/// Serves one run, to its end.
pub async fn run(options: Options) -> anyhow::Result<Exit> {
    let (session, first) = Session::start(options.identity.clone());
    let (inputs, mut input) = mpsc::channel(OUTBOX);
    let (connections, mut connected) = mpsc::channel(1);
    let (products, mut produced) = mpsc::channel(PRODUCTS);
    let mut shell = Shell {
        link: Link::open(options.channel.clone(), inputs.clone()),
        options,
        session,
        inputs,
        connections,
        patience: Duration::ZERO,
        lost_at: None,
        products,
        board: Arc::new(ProgressBoard::default()),
        orders: None,
        opened: None,
        exchange: None,
        stop: StopFlag::default(),
    };
    let mut exit = shell.perform(first).await?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut terminated = false;
    let mut heartbeat = time::interval(HEARTBEAT);
    heartbeat.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    while exit.is_none() {
        let input = tokio::select! {
            Some(input) = input.recv() => {
                if let Input::Received(_) = input {
                    shell.lost_at = None;
                }
                input
            }
            Some(channel) = connected.recv() => shell.connected(channel),
            Some(product) = produced.recv() => match product {
                Product::Report { generation, report } => Input::Reported { generation, report },
                Product::Part { term, checkpoint, offset, snapshot, weights } => {
                    let worker = shell.options.identity.worker.clone();
                    let channel = shell.options.channel.clone();
                    let upload = transfer::upload(channel, term, worker, checkpoint.clone(), offset, snapshot, weights);
                    task::spawn(async move {
                        if let Err(status) = upload.await {
                            warn!(checkpoint = checkpoint.as_str(), reason = status.message(), "a part was not stored");
                        }
                    });
                    continue;
                }
            },
            _ = terminate.recv() => {
                if std::mem::replace(&mut terminated, true) {
                    std::process::exit(TERMINATED);
                }
                Input::LeaveWanted
            }
            _ = heartbeat.tick() => {
                if shell.options.parent.is_some_and(|parent| getppid() != Some(parent)) {
                    return Ok(Exit::Failed { reason: "the process that started this one is gone".into() });
                }
                Input::HeartbeatDue(shell.board.read())
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
    fn open(channel: Channel, inputs: mpsc::Sender<Input>) -> Self {
        let (outgoing, outbox) = mpsc::channel(OUTBOX);
        Self { outgoing, reader: task::spawn(read(channel, outbox, inputs)) }
    }
}

/// Carries the coordinator's messages to the session until the stream ends. It opens once the first
/// message is in the outbox.
async fn read(channel: Channel, outbox: mpsc::Receiver<wire::WorkerMessage>, inputs: mpsc::Sender<Input>) {
    let opened = TrainingClient::new(channel).session(ReceiverStream::new(outbox)).await;
    let mut inbound = match opened {
        Ok(response) => response.into_inner(),
        Err(status) => {
            let reason = format!("it took no session: {}", status.message());
            let _ = inputs.send(Input::Disconnected { reason }).await;
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
    connections: mpsc::Sender<anyhow::Result<Channel>>,
    /// How long a lost coordinator is waited for.
    patience: Duration,
    /// When it was lost; `None` once it has spoken again.
    lost_at: Option<Instant>,
    products: mpsc::Sender<Product>,
    board: Arc<ProgressBoard>,
    orders: Option<sync_mpsc::SyncSender<(Generation, Order)>>,
    /// What the training thread starts with, until it does.
    opened: Option<sync_mpsc::Receiver<trainer::Start>>,
    exchange: Option<Aborter>,
    stop: StopFlag,
}

impl Shell {
    async fn perform(&mut self, outputs: Vec<Output>) -> anyhow::Result<Option<Exit>> {
        for output in outputs {
            match output {
                Output::Send(message) => self.send(message).await,
                Output::Reconnect => self.reconnect(),
                Output::OpenData { job } => self.open_data(*job),
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
        let lost_at = *self.lost_at.get_or_insert_with(Instant::now);
        let left = self.patience.saturating_sub(lost_at.elapsed());
        warn!(
            patience_s = left.as_secs_f64(),
            "the coordinator is gone: training goes on, and it is looked for"
        );
        let (url, connections) = (self.options.url.clone(), self.connections.clone());
        task::spawn(async move {
            // A coordinator that ends each stream at once is not to be rushed.
            time::sleep(connection::RETRY).await;
            let _ = connections.send(connection::connect(&url, left).await).await;
        });
    }

    fn connected(&mut self, channel: anyhow::Result<Channel>) -> Input {
        match channel {
            Ok(channel) => {
                self.options.channel = channel.clone();
                self.link = Link::open(channel, self.inputs.clone());
                Input::Connected
            }
            Err(error) => Input::CoordinatorLost { reason: format!("{error:#}") },
        }
    }

    /// Reads the lists on a thread of its own; the session hears how it went.
    fn open_data(&mut self, job: JobConfig) {
        self.patience = Duration::from_secs_f64(job.cluster.coordinator_timeout_s);
        let inputs = self.inputs.clone();
        let warnings = self.inputs.clone();
        let root = self.options.data_root.clone().map_or_else(|| job.data.root_path(), Into::into);
        let (ring_address, threads, board) =
            (self.options.ring_address, self.options.threads, self.board.clone());
        let (ready, opened) = sync_mpsc::sync_channel(1);
        self.opened = Some(opened);
        task::spawn_blocking(move || {
            let source = DataSource {
                root,
                train_split: job.data.train_split.clone(),
                val_split: job.data.val_split.clone(),
            };
            let input = match open(&source, ring_address) {
                Ok((dataset, listener)) => {
                    let facts = DataFacts {
                        digest: dataset.digest().to_owned(),
                        train_samples: dataset.train().samples.len() as u64,
                        val_samples: dataset.val().samples.len() as u64,
                    };
                    let address =
                        listener.local_addr().map(|address| address.to_string()).unwrap_or_default();
                    let warn = move |warning: musher_dataset::DataWarning| {
                        let warning = DataWarning {
                            file: warning.file.display().to_string(),
                            problem: warning.problem,
                        };
                        let _ = warnings.blocking_send(Input::DataWarned(warning));
                    };
                    let data = TrainingData {
                        dataset: Arc::new(dataset),
                        cache: Arc::new(ImageCache::new(job.data.cache_mb as usize * (1 << 20))),
                        warnings: Arc::new(Warnings::new(warn)),
                        threads: match job.data.loader_threads {
                            0 => threads,
                            chosen => chosen as usize,
                        },
                    };
                    let job = Arc::new(job);
                    let _ =
                        ready.send(trainer::Start { job, data, listener, board, threads: threads as i32 });
                    Input::DataOpened { facts, ring_address: address }
                }
                Err(error) => Input::DataFailed { reason: format!("{error:#}") },
            };
            let _ = inputs.blocking_send(input);
        });
    }

    fn command(&mut self, generation: Generation, command: Command) -> anyhow::Result<()> {
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
        let taken = self.orders()?.try_send((generation, order)).is_ok();
        anyhow::ensure!(taken, "the training thread does not take orders any more");
        Ok(())
    }

    /// The training thread's inbox; the thread starts with the first order.
    fn orders(&mut self) -> anyhow::Result<&sync_mpsc::SyncSender<(Generation, Order)>> {
        if self.orders.is_none() {
            let start = self.opened.take().and_then(|opened| opened.try_recv().ok());
            let start = start.context("the coordinator gave orders before this worker joined")?;
            info!(threads = start.threads, loader_threads = start.data.threads, "the training thread starts");
            let (orders, inbox) = sync_mpsc::sync_channel(ORDERS);
            trainer::start(start, inbox, self.products.clone());
            self.orders = Some(orders);
        }
        self.orders.as_ref().context("the training thread was started above")
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

fn open(source: &DataSource, ring_address: SocketAddr) -> anyhow::Result<(Dataset, RingListener)> {
    let dataset = Dataset::open(source).map_err(|error: DatasetError| anyhow::anyhow!(error))?;
    let listener = RingListener::bind(ring_address).with_context(|| {
        format!("peers can't be heard at {ring_address}: give an address of this machine with --advertise")
    })?;
    Ok((dataset, listener))
}
