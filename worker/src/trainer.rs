//! The training thread: it owns the replica and its membership, takes commands, and reports. The async
//! shell never waits for it, and it never waits for the shell.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use musher_collective::{
    Aborter, Collective, CollectiveError, Purpose, Ring, RingListener, RingSpec, Secret,
};
use musher_nccl::{OnHost, Place, TensorCollective};
use musher_proto::{
    ids::{CheckpointId, Generation, Rank, Term},
    job::JobConfig,
    message::{Failed, Form, Interrupted, Phase, Save, SegmentFinished, Waited},
};
use musher_session::Report;
use tokio::sync::mpsc::Sender;
use tracing::debug;

use crate::{
    gpus::Gpus,
    train::{
        Membership, ProgressBoard, Snapshot, Source, StopFlag, SyncBatchNorm, TrainError, Trainer,
        TrainingData,
    },
};

/// A command with what the shell adds to it.
pub enum Order {
    Form { form: Box<Form>, source: Source, aborter: Aborter },
    Train { order: musher_proto::message::Train, stop: StopFlag },
    Validate(musher_proto::message::Validate),
    Save { term: Term, save: Save },
    Leave,
}

/// What comes back.
pub enum Product {
    /// It is connected to its peers, and turns to their state: worth a heartbeat at once.
    Connected,
    Report {
        generation: Generation,
        report: Report,
    },
    /// A part of a checkpoint, to be uploaded.
    Part {
        term: Term,
        checkpoint: CheckpointId,
        snapshot: Snapshot,
    },
}

pub struct Start {
    pub job: Arc<JobConfig>,
    pub device: tch::Device,
    pub data: TrainingData,
    pub listener: RingListener,
    pub board: Arc<ProgressBoard>,
    /// Of libtorch, for this replica.
    pub threads: i32,
}

/// For NCCL to end an aborted communicator. The process ends where that is not enough.
const ABORT_TIMEOUT: Duration = Duration::from_secs(20);

/// Orders that the thread has not begun; the coordinator sends at most three in a row.
const ORDERS: usize = 16;

/// The way to the thread, which ends with it.
pub struct Orders {
    inbox: SyncSender<(Generation, Order)>,
    given: u64,
    begun: Arc<AtomicU64>,
}

/// One of the orders that were given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OrderNumber(u64);

impl Orders {
    /// `None` if the thread does not take orders any more.
    pub fn give(&mut self, generation: Generation, order: Order) -> Option<OrderNumber> {
        self.inbox.try_send((generation, order)).ok()?;
        self.given += 1;
        Some(OrderNumber(self.given))
    }

    /// Whether the thread has come to this order, and so is done with what it did before.
    pub fn is_begun(&self, order: OrderNumber) -> bool {
        OrderNumber(self.begun.load(Ordering::Relaxed)) >= order
    }
}

/// Starts the thread, and waits until its replica is built and warm. `None` if that failed, which the thread
/// reports.
pub fn start(start: Start, products: Sender<Product>) -> Option<Orders> {
    let (inbox, orders) = sync_channel(ORDERS);
    let (ready, built) = sync_channel(1);
    let begun = Arc::new(AtomicU64::new(0));
    let counter = begun.clone();
    let run = move || {
        let products_of_panic = products.clone();
        let work = AssertUnwindSafe(|| run(start, orders, &counter, products, ready));
        if let Err(panic) = catch_unwind(work) {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            let reason = format!("the training thread panicked: {text}");
            let report = Report::Failed(Failed { reason, any_worker: false });
            let _ = products_of_panic.blocking_send(Product::Report { generation: Generation(0), report });
        }
    };
    thread::Builder::new().name("train".into()).spawn(run).expect("the system can start a thread");
    built.recv().ok()?;
    Some(Orders { inbox, given: 0, begun })
}

struct Worker {
    trainer: Trainer,
    listener: RingListener,
    /// For the ring to be formed.
    step_timeout: Duration,
    /// For a call within it. The coordinator removes whoever holds the team up much sooner.
    patience: Duration,
    member: Option<Membership>,
    gpus: Gpus,
    products: Sender<Product>,
}

fn run(
    start: Start,
    orders: Receiver<(Generation, Order)>,
    begun: &AtomicU64,
    products: Sender<Product>,
    ready: SyncSender<()>,
) {
    tch::set_num_threads(start.threads);
    let cluster = &start.job.cluster;
    let step_timeout = Duration::from_secs_f64(cluster.step_timeout_s);
    let patience = 6 * step_timeout + Duration::from_secs_f64(cluster.heartbeat_timeout_s);
    let gpus = Gpus::of(start.device);
    let built = Trainer::new(start.job, start.data, start.device, start.board)
        .and_then(|mut trainer| trainer.warm_up().map(|()| trainer));
    let mut worker = match built {
        Ok(trainer) => {
            let (listener, products) = (start.listener, products.clone());
            Worker { trainer, listener, step_timeout, patience, member: None, gpus, products }
        }
        Err(error) => {
            let report = Report::Failed(Failed { reason: error.to_string(), any_worker: true });
            let _ = products.blocking_send(Product::Report { generation: Generation(0), report });
            return;
        }
    };
    worker.trainer.board.enter(Phase::Idle);
    let _ = ready.send(());
    while let Ok((generation, order)) = orders.recv() {
        begun.fetch_add(1, Ordering::Relaxed);
        let product = match worker.perform(generation, order) {
            Ok(product) => product,
            Err(error) => Product::Report { generation, report: worker.broken_off(error) },
        };
        worker.trainer.board.enter(Phase::Idle);
        if products.blocking_send(product).is_err() {
            return; // the shell has ended
        }
    }
}

impl Worker {
    fn perform(&mut self, generation: Generation, order: Order) -> Result<Product, TrainError> {
        let report = match order {
            Order::Form { form, source, aborter } => {
                self.let_go()?;
                let member = self.connect(generation, &form, &aborter)?;
                let member = self.member.insert(member);
                self.trainer.board.enter(Phase::Syncing);
                let _ = self.products.blocking_send(Product::Connected); // an error: the shell has ended
                Report::Synced(self.trainer.sync(member, &form, source)?)
            }
            Order::Train { order, stop } => {
                let member = self.member.as_mut().ok_or(CollectiveError::Aborted(None))?;
                let end = self.trainer.train(member, order, &stop, |_| ())?;
                Report::SegmentFinished(SegmentFinished {
                    held: end.held,
                    paused: end.paused,
                    totals: end.totals,
                    state_digest: end.state_digest,
                })
            }
            Order::Validate(order) => {
                let member = self.member.as_ref().ok_or(CollectiveError::Aborted(None))?;
                Report::Validated(self.trainer.validate(member, order)?)
            }
            Order::Save { term, save } => {
                let metadata: Option<BTreeMap<String, String>> = save
                    .weights
                    .map(|json| serde_json::from_str(&json))
                    .transpose()
                    .map_err(TrainError::Metadata)?;
                let snapshot = self.trainer.snapshot(save.offset, save.length, metadata.as_ref())?;
                return Ok(Product::Part { term, checkpoint: save.checkpoint, snapshot });
            }
            Order::Leave => {
                self.let_go()?;
                Report::Left(Interrupted { held: self.trainer.held(), reason: String::new(), waited: None })
            }
        };
        Ok(Product::Report { generation, report })
    }

    fn connect(
        &mut self,
        generation: Generation,
        form: &Form,
        aborter: &Aborter,
    ) -> Result<Membership, TrainError> {
        self.trainer.board.connects();
        let successor = form.successor.parse::<SocketAddr>().map_err(|_| {
            CollectiveError::Invalid(format!("{} is no address of the next rank", form.successor))
        })?;
        let spec = RingSpec {
            generation: generation.0,
            purpose: Purpose::Steps,
            rank: form.rank.0,
            world: form.world,
            successor,
            secret: Secret(form.secret),
            patience: self.patience,
        };
        let deadline = Instant::now() + self.step_timeout;
        let mut ring = Box::new(self.listener.form(&spec, deadline, aborter)?);
        let place = Place {
            rank: form.rank.0,
            world: ring.world(),
            connect_timeout: self.step_timeout,
            patience: self.patience,
            abort_timeout: ABORT_TIMEOUT,
        };
        let runtime = self.gpus.for_team(&mut *ring)?;
        let connect = |ring: &mut Ring| {
            runtime.map(|runtime| runtime.connect(&runtime.agree_on_id(ring)?, place, aborter)).transpose()
        };
        let gpus = connect(&mut ring)?;
        let batch_norm: Option<Box<dyn TensorCollective>> = match self.trainer.synchronises_batch_norm() {
            false => None,
            true => Some(match connect(&mut ring)? {
                Some(gpus) => Box::new(gpus),
                None => {
                    let spec = RingSpec { purpose: Purpose::BatchNorm, ..spec };
                    Box::new(OnHost(self.listener.form(&spec, deadline, aborter)?))
                }
            }),
        };
        let batch_norm = batch_norm.map(|exchange| SyncBatchNorm::new(exchange, self.trainer.board.clone()));
        let device = self.trainer.replica().device();
        let mut member = Membership::new(generation, ring, gpus, batch_norm, device)?;
        self.trainer.warm_up_exchange(&mut member)?;
        Ok(member)
    }

    /// Leaves the generation, if there is one.
    fn let_go(&mut self) -> Result<(), TrainError> {
        match self.member.take() {
            Some(mut member) => member.leave(),
            None => Ok(()),
        }
    }

    /// The generation is over for this worker, or the worker itself is.
    fn broken_off(&mut self, error: TrainError) -> Report {
        debug!(%error, "leaving the generation");
        let error = self.let_go().err().unwrap_or(error);
        if !error.ends_generation_only() {
            return Report::Failed(Failed { reason: error.to_string(), any_worker: error.any_worker() });
        }
        let reason = match &error {
            TrainError::Collective(CollectiveError::Aborted(_)) => String::new(),
            other => other.to_string(),
        };
        Report::Left(Interrupted { held: self.trainer.held(), reason, waited: self.waited(&error) })
    }

    /// Each call is about the step that comes after those applied.
    fn waited(&self, error: &TrainError) -> Option<Waited> {
        let TrainError::Collective(error) = error else { return None };
        let waited = error.waited()?;
        Some(Waited {
            peer: Rank(waited.rank),
            step: self.trainer.position().applied,
            phase: waited.call.map_or_else(|| "connecting".into(), |call| call.phase.to_string()),
            ms: waited.idle.as_millis() as u64,
            received: waited.received,
            sent: waited.sent,
            closed: waited.closed,
            batch_norm: waited.call.is_some_and(|call| call.phase == musher_collective::Phase::SyncBatchNorm),
        })
    }
}
