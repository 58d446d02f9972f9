//! A worker without a replica: it says over a real stream what a worker would say, at once. Its parameters are its
//! label.

use std::mem;

use anyhow::{Context, bail};
use musher_proto::{
    digest,
    ids::{Epoch, Generation, Rank, Step, Term},
    message::{
        Activity, DataFacts, EpochTotals, Fenced, Form, FromWorker, Hello, Interrupted, Join, PROTOCOL,
        Phase, Progress, ReplicaLabel, SegmentFinished, StepWaits, Synced, ToWorker, Train, UnitResult,
        Validated,
    },
    shard::ValidationUnits,
    wire::{self, training_client::TrainingClient},
};
use tokio::{
    sync::{mpsc, watch},
    time::{self, Duration, Instant},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Endpoint};

use super::{Conduct, Crowd};

/// Between two heartbeats.
const HEARTBEAT: Duration = Duration::from_secs(1);
const STATE_BYTES: u64 = 40;

pub(super) struct Worker {
    number: usize,
    crowd: Crowd,
    conduct: watch::Receiver<Conduct>,
    inbound: Streaming<wire::CoordinatorMessage>,
    outbound: mpsc::Sender<wire::WorkerMessage>,
    term: Term,
    /// The generation, this worker's rank, and of how many.
    form: Option<(Generation, Rank, u32)>,
    train: Option<(Generation, Train)>,
    held: ReplicaLabel,
    /// How many it has noticed to be gone.
    noticed: usize,
    began: Instant,
}

impl Worker {
    /// Connects, a connection of its own, up to the coordinator's Welcome.
    pub async fn connect(
        number: usize,
        url: &str,
        crowd: Crowd,
        conduct: watch::Receiver<Conduct>,
    ) -> anyhow::Result<Self> {
        let channel = Endpoint::from_shared(url.to_owned())?.connect().await?;
        let (outbound, outgoing) = mpsc::channel(16);
        let hello = Hello {
            protocol: PROTOCOL,
            worker: format!("node{:04}.{}", number / 8, number % 8).as_str().into(),
            incarnation: 1,
            host: format!("node{:04}", number / 8),
            device: format!("cuda:{}", number % 8),
        };
        let first = Fenced { term: Term(0), generation: Generation(0), body: FromWorker::Hello(hello) };
        outbound.send(first.into()).await?;
        let mut inbound =
            TrainingClient::new(channel).session(ReceiverStream::new(outgoing)).await?.into_inner();
        let welcome = inbound.message().await?.context("the stream ended before Welcome")?;
        let Fenced { term, body: ToWorker::Welcome(_), .. } = Fenced::<ToWorker>::try_from(welcome)? else {
            bail!("a session begins with Welcome");
        };
        let held = ReplicaLabel { lineage: Generation(0), applied: Step(0), epoch: Epoch(0), cursor: 0 };
        let noticed = conduct.borrow().gone.len();
        let (form, train, began) = (None, None, Instant::now());
        Ok(Self { number, crowd, conduct, inbound, outbound, term, form, train, held, noticed, began })
    }

    /// Until it is told to go, or sent away.
    pub async fn work(mut self) -> anyhow::Result<()> {
        // Heartbeats of all are spread over the second.
        let first = Instant::now() + HEARTBEAT.mul_f64(self.number as f64 * 0.618_034 % 1.0);
        let mut heartbeat = time::interval_at(first, HEARTBEAT);
        self.join().await?;
        loop {
            tokio::select! {
                message = self.inbound.message() => {
                    let message = message?.context("the coordinator ended the stream")?;
                    let Fenced { term, generation, body } = Fenced::<ToWorker>::try_from(message)?;
                    self.term = term;
                    if self.obey(generation, body).await? {
                        return Ok(());
                    }
                }
                _ = heartbeat.tick() => {
                    let progress = self.progress();
                    let generation = self.form.map_or(Generation(0), |(generation, ..)| generation);
                    self.say(generation, FromWorker::Progress(progress)).await?;
                }
                changed = self.conduct.changed() => {
                    changed?;
                    if self.conduct.borrow().gone.contains(&self.number) {
                        return Ok(());
                    }
                    self.notice_the_gone().await?;
                    self.end_segment_if_due().await?;
                }
            }
        }
    }

    async fn join(&self) -> anyhow::Result<()> {
        let data = DataFacts {
            digest: "d".into(),
            train_samples: self.crowd.train_samples,
            val_samples: self.crowd.val_samples,
        };
        let ring_address = format!("10.{}.{}.1:29400", self.number >> 8, self.number & 255);
        self.say(Generation(0), FromWorker::Join(Join::of_newcomer(data, ring_address, "cpu"))).await
    }

    /// True when there is nothing left to do.
    async fn obey(&mut self, generation: Generation, order: ToWorker) -> anyhow::Result<bool> {
        match order {
            ToWorker::Form(form) => self.synced(generation, &form).await?,
            ToWorker::Train(train) => {
                self.train = Some((generation, train));
                self.crowd.board.trains(generation, train.epoch);
                self.end_segment_if_due().await?;
            }
            ToWorker::Pause => {
                if let Some((generation, train)) = self.train.take() {
                    self.segment_finished(generation, train.cursor + self.crowd.batch, train, true).await?;
                }
            }
            ToWorker::Validate(validate) => {
                let (_, rank, world) = self.form.context("who validates is in a generation")?;
                let units = ValidationUnits { samples: self.crowd.val_samples, unit: self.crowd.batch }
                    .of_rank(rank, world);
                let result = |index| UnitResult {
                    index,
                    samples: self.crowd.batch,
                    loss_sum: f64::from(validate.epoch.0),
                    confusion: vec![1; 9],
                };
                let report = Validated {
                    epoch: validate.epoch,
                    state_digest: self.digest(),
                    units: units.map(result).collect(),
                    samples_png: Vec::new(),
                };
                self.say(generation, FromWorker::Validated(report)).await?;
            }
            // One that noticed by itself has said so.
            ToWorker::Abort { .. } => {
                if self.train.take().is_some() {
                    self.leave(generation, "").await?;
                }
            }
            ToWorker::Finish(_) => {
                self.say(Generation(0), FromWorker::Goodbye).await?;
                return Ok(true);
            }
            ToWorker::Refused { reason, .. } => bail!("worker {}: {reason}", self.number),
            ToWorker::Save(_) | ToWorker::Welcome(_) => {
                bail!("worker {} did not expect {order:?}", self.number)
            }
        }
        Ok(false)
    }

    /// An exchange breaks for all its members, whoever is gone.
    async fn notice_the_gone(&mut self) -> anyhow::Result<()> {
        let gone = self.conduct.borrow().gone.len();
        if gone > mem::replace(&mut self.noticed, gone)
            && let Some((generation, _)) = self.train.take()
        {
            self.leave(generation, "a peer closed its connection").await?;
        }
        Ok(())
    }

    async fn leave(&self, generation: Generation, reason: &str) -> anyhow::Result<()> {
        let left = Interrupted { held: Some(self.held), reason: reason.into(), waited: None };
        self.say(generation, FromWorker::Interrupted(left)).await
    }

    async fn synced(&mut self, generation: Generation, form: &Form) -> anyhow::Result<()> {
        self.form = Some((generation, form.rank, form.world));
        // What the donor would have given.
        self.held = ReplicaLabel { lineage: generation, ..self.crowd.board.newest().unwrap_or(self.held) };
        let synced = Synced {
            held: self.held,
            state_digest: self.digest(),
            state_bytes: STATE_BYTES,
            pretrained: None,
        };
        self.say(generation, FromWorker::Synced(synced)).await
    }

    /// When the crowd is told to end the epoch.
    async fn end_segment_if_due(&mut self) -> anyhow::Result<()> {
        let due = self.conduct.borrow().ended;
        if let Some((generation, train)) = self.train.take_if(|(_, train)| train.epoch <= due) {
            self.segment_finished(generation, train.end, train, false).await?;
        }
        Ok(())
    }

    async fn segment_finished(
        &mut self,
        generation: Generation,
        cursor: u64,
        train: Train,
        paused: bool,
    ) -> anyhow::Result<()> {
        let steps = (cursor - train.cursor).div_ceil(self.crowd.batch);
        self.held = ReplicaLabel {
            applied: Step(self.held.applied.0 + steps),
            epoch: train.epoch,
            cursor,
            ..self.held
        };
        self.crowd.board.advance(self.held);
        let report = SegmentFinished {
            held: self.held,
            paused,
            totals: EpochTotals { loss_sum: 1.0, steps_skipped: 0 },
            state_digest: self.digest(),
        };
        self.say(generation, FromWorker::SegmentFinished(report)).await
    }

    fn progress(&self) -> Progress {
        Progress {
            phase: if self.train.is_some() { Phase::Training } else { Phase::Idle },
            activity: Activity::Working,
            in_activity_ms: 10,
            warm: true,
            applied: self.held.applied,
            epoch: self.held.epoch,
            cursor: self.held.cursor,
            loss: 1.0 / (1.0 + self.began.elapsed().as_secs_f64()),
            images_per_second: 1e5,
            waits: StepWaits { data_ms: 0.1, peers_ms: 3.0 },
            step_ms: 100.0,
            steps_skipped: 0,
        }
    }

    fn digest(&self) -> u64 {
        let words = [self.held.applied.0, u64::from(self.held.epoch.0), self.held.cursor];
        digest::of_slice(0, &words.map(u64::to_le_bytes).concat())
    }

    async fn say(&self, generation: Generation, body: FromWorker) -> anyhow::Result<()> {
        let message = Fenced { term: self.term, generation, body };
        self.outbound.send(message.into()).await.context("the coordinator does not listen any more")
    }
}
