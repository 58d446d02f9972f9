//! The real gRPC service with hand-written workers: everything of a run but the training.

#![allow(clippy::unwrap_used)]

use std::{fs, net::SocketAddr, path::Path, sync::OnceLock, time::Duration};

use musher_coordinator::{
    announce::{Addresses, Announcer},
    core::{Origin, Outcome, Status, Stopped},
    run_dir::{self, Opening, RunDir, RunDirError},
    service::{Access, Connections, Door, Service},
    store::CheckpointStore,
    telemetry::{self, Console, LogFormat, Progress, TelemetryOptions},
};
use musher_proto::{
    digest,
    ids::{Epoch, Generation, Step, Term},
    job::JobConfig,
    message::{
        EpochTotals, Fenced, Finish, Form, FromWorker, Hello, Join, PROTOCOL, PartHeader, PartKind,
        ReplicaLabel, Save, SegmentFinished, Start, Synced, ToWorker, UnitResult, Validated,
    },
    shard::ValidationUnits,
    wire::{
        self, checkpoints_client::CheckpointsClient, control_client::ControlClient,
        training_client::TrainingClient, upload_chunk::Body,
    },
};
use tempfile::TempDir;
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming, transport::Channel};

const SAMPLES: u64 = 8;
const BATCH: u64 = 4;
const STATE_BYTES: u64 = 40;
const WEIGHTS: &[u8] = b"not really safetensors";

// ---- a coordinator -------------------------------------------------------------------------------

fn job(name: &str, workers: u32) -> JobConfig {
    let mut job = JobConfig { name: name.into(), ..JobConfig::default() };
    job.train.global_batch = BATCH as u32;
    job.train.epochs = 2;
    job.cluster.workers = workers;
    job
}

/// The process's one event file; each test's run has a name of its own in it.
fn telemetry() -> &'static (TempDir, Console) {
    static TELEMETRY: OnceLock<(TempDir, Console)> = OnceLock::new();
    TELEMETRY.get_or_init(|| {
        let dir = TempDir::new().unwrap();
        let events_file = Some(dir.path().join("events.jsonl"));
        let console = telemetry::init(TelemetryOptions {
            format: Some(LogFormat::Json),
            events_file,
            feed: None,
            tensorboard: None,
        })
        .unwrap();
        (dir, console)
    })
}

/// Names of the run's events so far.
fn events(run: &str) -> Vec<String> {
    let text = fs::read_to_string(telemetry().0.path().join("events.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    lines.filter(|line| line["run"] == run).map(|line| line["event"].as_str().unwrap().to_owned()).collect()
}

struct Coordinator {
    address: SocketAddr,
    run: JoinHandle<anyhow::Result<Outcome>>,
}

impl Coordinator {
    async fn start(dir: &Path, job: JobConfig, resume: bool) -> Result<Self, RunDirError> {
        let run_dir = RunDir::open(dir, if resume { Opening::Resume } else { Opening::Start })?;
        let store = run_dir.checkpoints()?;
        let mut state = run_dir.next_state()?;
        let mut resumed = None;
        if resume {
            resumed = run_dir::resume_point(&store, &run_dir, &job, &mut state)?;
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let bar = Progress::new(&telemetry().1);
        let announcer = Announcer::new(
            job.name.clone(),
            job.clone(),
            bar,
            Addresses { grpc: address, page: String::new() },
            "best".into(),
        );
        let (run, entropy, listen) = (job.name.clone(), [1; 32], false);
        let origin = Origin { run, job: job.clone(), state, resumed, entropy, listen };
        let door = Door::new(
            None,
            Access::default(),
            Connections { all: 64, strangers: 32 },
            Duration::from_secs(30),
        );
        let service = Service { run_dir, store, job, origin, announcer, door, traces: None };
        let run = tokio::spawn(service.run(listener, |_| ()));
        Ok(Self { address, run })
    }

    async fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.address)).unwrap().connect().await.unwrap()
    }

    async fn worker(&self, name: &'static str, habits: Habits) -> JoinHandle<Worker> {
        let mut worker = Worker::connect(self.channel().await, name, habits).await;
        tokio::spawn(async move {
            worker.work().await;
            worker
        })
    }

    async fn ended(self) -> Outcome {
        self.run.await.unwrap().unwrap()
    }
}

// ---- a worker ------------------------------------------------------------------------------------

/// What is wrong with a worker, or worth looking at.
#[derive(Clone, Copy, Debug, Default)]
struct Habits {
    /// It trains until it is asked to pause.
    trains_until_paused: bool,
    /// The upload of this checkpoint has a wrong digest.
    wrong_digest: Option<&'static str>,
    /// The upload of this checkpoint is cut short.
    cut_short: Option<&'static str>,
}

/// A replica whose parameters are its label.
struct Worker {
    name: &'static str,
    habits: Habits,
    channel: Channel,
    inbound: Streaming<wire::CoordinatorMessage>,
    outbound: mpsc::Sender<wire::WorkerMessage>,
    term: Term,
    form: Option<Form>,
    held: ReplicaLabel,
    trained_steps: u64,
    uploads: Vec<Result<(), Code>>,
    finish: Option<Finish>,
}

impl Worker {
    async fn connect(channel: Channel, name: &'static str, habits: Habits) -> Self {
        let (outbound, outgoing) = mpsc::channel(16);
        let hello = Hello {
            protocol: PROTOCOL,
            worker: name.into(),
            incarnation: 1,
            host: "h".into(),
            device: "cpu".into(),
        };
        let first = Fenced { term: Term(0), generation: Generation(0), body: FromWorker::Hello(hello) };
        outbound.send(first.into()).await.unwrap();
        let inbound = TrainingClient::new(channel.clone())
            .session(ReceiverStream::new(outgoing))
            .await
            .unwrap()
            .into_inner();
        let held = ReplicaLabel { lineage: Generation(0), applied: Step(0), epoch: Epoch(0), cursor: 0 };
        Self {
            name,
            habits,
            channel,
            inbound,
            outbound,
            term: Term(0),
            form: None,
            held,
            trained_steps: 0,
            uploads: Vec::new(),
            finish: None,
        }
    }

    async fn work(&mut self) {
        while let Some(message) = self.inbound.message().await.unwrap() {
            let Fenced { term, generation, body } = Fenced::<ToWorker>::try_from(message).unwrap();
            self.term = term;
            if self.obey(generation, body).await {
                return;
            }
        }
    }

    /// True when there is nothing left to do.
    async fn obey(&mut self, generation: Generation, order: ToWorker) -> bool {
        match order {
            ToWorker::Welcome(_) => {
                let data = musher_proto::message::DataFacts {
                    digest: "d".into(),
                    train_samples: SAMPLES,
                    val_samples: SAMPLES,
                };
                let join = Join::of_newcomer(data, "127.0.0.1:1", "cpu");
                self.say(Generation(0), FromWorker::Join(join)).await;
            }
            ToWorker::Form(form) => {
                if let Start::Checkpoint(id) = &form.start {
                    self.held = self.download(id.as_str()).await;
                }
                self.held.lineage = generation;
                self.form = Some(form);
                let synced = Synced {
                    held: self.held,
                    state_digest: digest::of_slice(0, &self.state()),
                    state_bytes: STATE_BYTES,
                    pretrained: None,
                };
                self.say(generation, FromWorker::Synced(synced)).await;
            }
            ToWorker::Train(_) if self.habits.trains_until_paused => {}
            ToWorker::Train(train) => {
                let steps = (train.end - train.cursor).div_ceil(BATCH);
                self.trained_steps += steps;
                (self.held.epoch, self.held.cursor) = (train.epoch, train.end);
                self.held.applied.0 += steps;
                self.segment_finished(generation, false).await;
            }
            ToWorker::Pause => {
                self.held = ReplicaLabel { applied: Step(1), epoch: Epoch(1), cursor: BATCH, ..self.held };
                self.segment_finished(generation, true).await;
            }
            ToWorker::Validate(validate) => {
                let form = self.form.as_ref().unwrap();
                let units = ValidationUnits { samples: SAMPLES, unit: BATCH }.of_rank(form.rank, form.world);
                let loss_sum = 9.0 / f64::from(validate.epoch.0);
                let report = Validated {
                    epoch: validate.epoch,
                    state_digest: digest::of_slice(0, &self.state()),
                    units: units
                        .map(|index| UnitResult { index, samples: BATCH, loss_sum, confusion: vec![1; 9] })
                        .collect(),
                    samples_png: if form.rank.0 == 0 { b"png".to_vec() } else { Vec::new() },
                };
                self.say(generation, FromWorker::Validated(report)).await;
            }
            ToWorker::Save(save) => self.save(save).await,
            ToWorker::Finish(finish) => {
                self.finish = Some(finish);
                self.say(Generation(0), FromWorker::Goodbye).await;
                return true;
            }
            ToWorker::Refused { .. } | ToWorker::Abort { .. } => panic!("{}: {order:?}", self.name),
        }
        false
    }

    async fn say(&self, generation: Generation, body: FromWorker) {
        let _ = self.outbound.send(Fenced { term: self.term, generation, body }.into()).await;
    }

    async fn segment_finished(&self, generation: Generation, paused: bool) {
        let state_digest = digest::of_slice(0, &self.state());
        let totals = EpochTotals { loss_sum: 1.0, steps_skipped: 0 };
        self.say(
            generation,
            FromWorker::SegmentFinished(SegmentFinished { held: self.held, paused, totals, state_digest }),
        )
        .await;
    }

    fn state(&self) -> Vec<u8> {
        let mut bytes = [self.held.applied.0, u64::from(self.held.epoch.0), self.held.cursor]
            .map(u64::to_le_bytes)
            .concat();
        bytes.resize(STATE_BYTES as usize, 7);
        bytes
    }

    async fn download(&self, checkpoint: &str) -> ReplicaLabel {
        let request = wire::DownloadRequest { checkpoint: checkpoint.into() };
        let mut chunks =
            CheckpointsClient::new(self.channel.clone()).download(request).await.unwrap().into_inner();
        let mut state = Vec::new();
        while let Some(chunk) = chunks.message().await.unwrap() {
            state.extend(chunk.data);
        }
        assert_eq!(state.len() as u64, STATE_BYTES);
        let number = |at: usize| u64::from_le_bytes(state[at * 8..][..8].try_into().unwrap());
        ReplicaLabel {
            lineage: Generation(0),
            applied: Step(number(0)),
            epoch: Epoch(number(1) as u32),
            cursor: number(2),
        }
    }

    async fn save(&mut self, save: Save) {
        let slice = &self.state()[save.offset as usize..][..save.length as usize];
        let digest = digest::of_slice(save.offset / 4, slice);
        let is = |habit: Option<&str>| habit == Some(save.checkpoint.as_str());
        let digest = if is(self.habits.wrong_digest) { digest + 1 } else { digest };
        let sent = if is(self.habits.cut_short) { &slice[..8] } else { slice };
        let header = self.header(
            save.checkpoint.as_str(),
            PartKind::State { offset: save.offset, digest },
            save.length,
        );
        self.uploads.push(upload(&self.channel, header, sent).await);
        if let Some(metadata) = save.weights {
            assert!(metadata.contains("val_loss"));
            let header = self.header(save.checkpoint.as_str(), PartKind::Weights, WEIGHTS.len() as u64);
            self.uploads.push(upload(&self.channel, header, WEIGHTS).await);
        }
    }

    fn header(&self, checkpoint: &str, kind: PartKind, length: u64) -> PartHeader {
        PartHeader {
            term: self.term,
            worker: self.name.into(),
            checkpoint: checkpoint.into(),
            lineage: self.held.lineage,
            applied: self.held.applied,
            kind,
            length,
            stall_ms: 1.5,
        }
    }
}

/// In chunks of eight bytes.
async fn upload(channel: &Channel, header: PartHeader, bytes: &[u8]) -> Result<(), Code> {
    let header = Body::Header(header.into());
    let chunks = bytes.chunks(8).map(|data| Body::Chunk(wire::Chunk { data: data.to_vec().into() }));
    let parts: Vec<_> =
        std::iter::once(header).chain(chunks).map(|body| wire::UploadChunk { body: Some(body) }).collect();
    let sent = CheckpointsClient::new(channel.clone()).upload(tokio_stream::iter(parts)).await;
    sent.map(|_| ()).map_err(|status| status.code())
}

// ---- scenarios -----------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn a_run_leaves_its_results_on_disk_and_can_be_resumed() {
    let dir = TempDir::new().unwrap();
    let coordinator = Coordinator::start(dir.path(), job("whole", 2), false).await.unwrap();
    let workers =
        [coordinator.worker("a", Habits::default()).await, coordinator.worker("b", Habits::default()).await];
    for worker in workers {
        let worker = worker.await.unwrap();
        assert_eq!((worker.finish, worker.trained_steps), (Some(Finish::Finished), 4));
        assert!(worker.uploads.iter().all(Result::is_ok));
    }
    let outcome = coordinator.ended().await;
    assert_eq!((outcome.status, outcome.best_epoch), (Status::Finished(Stopped::EpochLimit), Some(Epoch(2))));
    for file in ["best.safetensors", "last.safetensors"] {
        assert_eq!(fs::read(dir.path().join(file)).unwrap(), WEIGHTS);
    }
    for file in ["epoch-0001.png", "epoch-0002.png", "best.png"] {
        assert_eq!(fs::read(dir.path().join("samples").join(file)).unwrap(), b"png");
    }
    let store = CheckpointStore::open(dir.path().join("checkpoints")).unwrap();
    let newest = store.load_latest().unwrap().manifest.unwrap();
    assert_eq!((newest.id.as_str(), newest.applied, newest.world_size), ("e0002-s00000004", Step(4), 2));
    assert_eq!((newest.parts.len(), newest.best.unwrap().epoch), (2, Epoch(2)));
    assert_eq!(events("whole").iter().filter(|event| *event == "checkpoint_committed").count(), 2);

    // One more epoch, from the state on disk, by a team of another size.
    let mut more = job("whole-again", 1);
    more.train.epochs = 3;
    let coordinator = Coordinator::start(dir.path(), more, true).await.unwrap();
    let worker = coordinator.worker("c", Habits::default()).await.await.unwrap();
    assert_eq!((worker.trained_steps, worker.held.applied, worker.term), (2, Step(6), Term(2)));
    assert_eq!(coordinator.ended().await.epochs, Epoch(3));
    assert_eq!(store.load_latest().unwrap().manifest.unwrap().id.as_str(), "e0003-s00000006");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_saves_and_ends_and_status_says_what_goes_on() {
    let dir = TempDir::new().unwrap();
    let coordinator = Coordinator::start(dir.path(), job("stopped", 1), false).await.unwrap();
    let mut control = ControlClient::new(coordinator.channel().await);
    let waiting = control.status(wire::StatusRequest {}).await.unwrap().into_inner();
    assert_eq!((waiting.phase.as_str(), waiting.term, waiting.workers.len()), ("waiting for workers", 1, 0));

    let mut worker = Worker::connect(
        coordinator.channel().await,
        "a",
        Habits { trains_until_paused: true, ..Habits::default() },
    )
    .await;
    // Up to Train, which is sent when the phase is entered.
    for _ in 0..3 {
        let message = Fenced::<ToWorker>::try_from(worker.inbound.message().await.unwrap().unwrap()).unwrap();
        worker.term = message.term;
        worker.obey(message.generation, message.body).await;
    }
    let training = control.status(wire::StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(
        (training.phase.as_str(), training.generation, training.train_samples),
        ("training", 1, SAMPLES)
    );
    assert_eq!((training.workers[0].worker.as_str(), training.workers[0].rank), ("a", Some(0)));

    control.stop(wire::StopRequest {}).await.unwrap();
    worker.work().await;
    assert_eq!(worker.finish, Some(Finish::Stopped));
    assert_eq!(coordinator.ended().await.status, Status::Stopped);
    let store = CheckpointStore::open(dir.path().join("checkpoints")).unwrap();
    assert_eq!(store.list().unwrap()[0].id.as_str(), "e0001-s00000001");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_upload_fails_its_checkpoint_and_the_run_goes_on() {
    for (name, habits) in [
        ("wrong-digest", Habits { wrong_digest: Some("e0001-s00000002"), ..Habits::default() }),
        ("cut-short", Habits { cut_short: Some("e0001-s00000002"), ..Habits::default() }),
    ] {
        let dir = TempDir::new().unwrap();
        let coordinator = Coordinator::start(dir.path(), job(name, 1), false).await.unwrap();
        let worker = coordinator.worker("a", habits).await.await.unwrap();
        assert_eq!(worker.uploads[0], Err(Code::Internal), "{name}");
        assert_eq!(worker.finish, Some(Finish::Finished), "{name}");
        assert_eq!(coordinator.ended().await.status, Status::Finished(Stopped::EpochLimit), "{name}");
        let ids: Vec<_> = CheckpointStore::open(dir.path().join("checkpoints"))
            .unwrap()
            .list()
            .unwrap()
            .into_iter()
            .map(|m| m.id.0)
            .collect();
        assert_eq!(ids, ["e0002-s00000004"], "{name}");
        let events = events(name);
        assert!(
            events.contains(&"checkpoint_failed".to_owned()) && events.contains(&"run_finished".to_owned()),
            "{events:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_nobody_asked_for_is_refused() {
    let dir = TempDir::new().unwrap();
    let coordinator = Coordinator::start(dir.path(), job("unasked", 1), false).await.unwrap();
    let channel = coordinator.channel().await;
    let header = |term| PartHeader {
        term: Term(term),
        worker: "x".into(),
        checkpoint: "e0009-s00000009".into(),
        lineage: Generation(1),
        applied: Step(9),
        kind: PartKind::Weights,
        length: 3,
        stall_ms: 0.0,
    };
    assert_eq!(upload(&channel, header(1), b"abc").await, Err(Code::FailedPrecondition));
    assert_eq!(upload(&channel, header(7), b"abc").await, Err(Code::FailedPrecondition));
    let headless =
        wire::UploadChunk { body: Some(Body::Chunk(wire::Chunk { data: b"abc".to_vec().into() })) };
    let status =
        CheckpointsClient::new(channel.clone()).upload(tokio_stream::iter([headless])).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let absent = wire::DownloadRequest { checkpoint: "../state.json".into() };
    assert_eq!(
        CheckpointsClient::new(channel.clone()).download(absent).await.unwrap_err().code(),
        Code::NotFound
    );
    ControlClient::new(channel).stop(wire::StopRequest {}).await.unwrap();
    assert_eq!(coordinator.ended().await.status, Status::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_begins_with_hello_and_health_and_reflection_answer() {
    use tonic_health::pb::{
        HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
    };
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };

    let dir = TempDir::new().unwrap();
    let coordinator = Coordinator::start(dir.path(), job("manners", 1), false).await.unwrap();
    let channel = coordinator.channel().await;
    let goodbye = Fenced { term: Term(1), generation: Generation(0), body: FromWorker::Goodbye };
    for first in [wire::WorkerMessage::default(), goodbye.into()] {
        let refused =
            TrainingClient::new(channel.clone()).session(tokio_stream::iter([first])).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }

    let request = HealthCheckRequest { service: "musher.v1.Training".into() };
    let health = HealthClient::new(channel.clone()).check(request).await.unwrap().into_inner();
    assert_eq!(health.status(), ServingStatus::Serving);

    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = ServerReflectionClient::new(channel.clone())
        .server_reflection_info(tokio_stream::iter([request]))
        .await
        .unwrap()
        .into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) =
        answers.message().await.unwrap().unwrap().message_response
    else {
        panic!("services are listed")
    };
    let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
    for service in ["musher.v1.Training", "musher.v1.Checkpoints", "musher.v1.Control"] {
        assert!(names.iter().any(|name| name == service), "{names:?}");
    }
    ControlClient::new(channel).stop(wire::StopRequest {}).await.unwrap();
    coordinator.ended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_directory_has_one_writer_and_one_run() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("run");
    let job = job("directory", 1);
    let failure = |result: Result<Coordinator, RunDirError>| result.err().expect("it is refused");
    assert!(matches!(
        failure(Coordinator::start(&path, job.clone(), true).await),
        RunDirError::NothingToResume(_)
    ));

    let first = Coordinator::start(&path, job.clone(), false).await.unwrap();
    // A reply means that the first state is on disk.
    let mut control = ControlClient::new(first.channel().await);
    control.status(wire::StatusRequest {}).await.unwrap();
    assert!(matches!(failure(Coordinator::start(&path, job.clone(), true).await), RunDirError::InUse(_)));
    assert!(matches!(failure(Coordinator::start(&path, job.clone(), false).await), RunDirError::Exists(_)));
    let worker = first.worker("a", Habits::default()).await;
    assert_eq!(first.ended().await.epochs, Epoch(2));
    drop(worker.await.unwrap());

    let mut changed = job.clone();
    changed.train.global_batch = 2;
    let error = failure(Coordinator::start(&path, changed, true).await);
    assert!(matches!(error, RunDirError::JobChanged { key: "train.global_batch", .. }), "{error}");

    let state = path.join("state.json");
    let text = fs::read_to_string(&state).unwrap();
    fs::write(&state, &text[..text.len() / 2]).unwrap();
    let error = failure(Coordinator::start(&path, job.clone(), true).await);
    assert!(
        matches!(error, RunDirError::State { .. }) && error.to_string().contains("remove it and resume"),
        "{error}"
    );
    fs::remove_file(&state).unwrap();
    let outcome = Coordinator::start(&path, job, true).await.unwrap().ended().await;
    assert_eq!(
        outcome.status,
        Status::Finished(Stopped::EpochLimit),
        "the checkpoints hold all that is needed"
    );
}
