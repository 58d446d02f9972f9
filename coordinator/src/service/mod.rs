//! The shell around the core: gRPC services and timers feed events to one actor, which owns the core
//! and performs its actions.

mod actor;
mod checkpoints;
mod control;
mod door;
mod gate;
mod sessions;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::Context;
use musher_proto::{
    job::JobConfig,
    wire::{
        self, checkpoints_server::CheckpointsServer, control_server::ControlServer,
        training_server::TrainingServer,
    },
};
use musher_security::Role;
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
};
use tonic::{service::interceptor::InterceptedService, transport::Server};

use crate::{
    announce::Announcer,
    core::{Core, Event, Origin, Outcome, RunStatus},
    run_dir::RunDir,
    store::CheckpointStore,
    traces::{Pipeline, Tracer},
};
use actor::Actor;
use checkpoints::Uploads;
pub use door::{Connections, Door};
use gate::Gate;
pub use gate::{Access, Refusal};

/// Events wait here for the actor. A worker sends about one a second, so this is some seconds of
/// a thousand workers; beyond it, their streams wait.
const INBOX: usize = 4096;
/// Requests at once on one connection: a session, uploads and a download, and some to spare.
const STREAMS: u32 = 32;
/// Streams that were reset and are not taken note of yet: one that goes on is a flood.
const RESETS: usize = 32;
/// Bytes of a request's headers.
const HEADERS: u32 = 16 << 10;
/// Bytes of a worker's message; the largest is validation's with its picture.
const MESSAGE: usize = 16 << 20;
/// Bytes of an upload's message: a chunk and what frames it.
const UPLOAD: usize = 2 << 20;
/// Bytes of an operator's message.
const QUESTION: usize = 64 << 10;

/// A coordinator that is ready to serve one run.
#[derive(Debug)]
pub struct Service {
    pub run_dir: RunDir,
    pub store: CheckpointStore,
    pub job: JobConfig,
    pub origin: Origin,
    pub announcer: Announcer,
    pub door: Door,
    /// Where the run's spans go, if anywhere.
    pub traces: Option<Arc<Pipeline>>,
}

/// Talks to a running coordinator from the same process.
#[derive(Clone, Debug)]
pub struct Handle {
    inbox: mpsc::Sender<Input>,
}

/// What reaches the actor.
#[derive(Debug)]
enum Input {
    Event(Event),
    /// A worker's stream began; what the core sends to that session goes out by `outbox`.
    SessionOpened {
        event: Event,
        session: musher_proto::ids::Session,
        outbox: sessions::Outbox,
    },
    Status {
        reply: oneshot::Sender<RunStatus>,
    },
    /// Another coordinator has taken the store over.
    Fenced {
        reason: String,
    },
}

impl Handle {
    /// Returns when the actor has it, or is gone.
    pub async fn tell(&self, event: Event) {
        let _ = self.inbox.send(Input::Event(event)).await;
    }

    /// `None` once the run has ended.
    pub async fn status(&self) -> Option<RunStatus> {
        let (reply, answer) = oneshot::channel();
        self.inbox.send(Input::Status { reply }).await.ok()?;
        answer.await.ok()
    }

    async fn send(&self, input: Input) -> Result<(), tonic::Status> {
        self.inbox.send(input).await.map_err(|_| tonic::Status::unavailable("the run has ended"))
    }
}

impl Service {
    /// Serves until the run has ended. `with_handle` is given the handle before the first worker can
    /// come.
    pub async fn run(
        self,
        listener: TcpListener,
        with_handle: impl FnOnce(Handle),
    ) -> anyhow::Result<Outcome> {
        let (sender, inbox) = mpsc::channel(INBOX);
        let handle = Handle { inbox: sender };
        let uploads = Arc::new(Uploads::new(self.store));
        let term = self.origin.state.fences.term;
        let heartbeat_timeout_s = self.job.cluster.heartbeat_timeout_s;
        let started = tokio::time::Instant::now();
        let tracer = self.traces.map(|pipeline| Tracer::new(pipeline, &self.origin, SystemTime::now()));
        let (core, first_actions) = Core::start(self.origin, Duration::ZERO);
        let actor = Actor::new(
            core,
            self.job,
            self.run_dir,
            uploads.clone(),
            actor::Audience { announcer: self.announcer, metrics: self.door.metrics.clone(), tracer },
            handle.clone(),
            started,
        );
        with_handle(handle.clone());

        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<TrainingServer<sessions::Training>>().await;
        // Many clients still ask for the older of the two.
        let described = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(wire::DESCRIPTORS)
        };
        let damaged = "the services' descriptors are damaged";
        let reflection = described().build_v1().context(damaged)?;
        let older_reflection = described().build_v1alpha().context(damaged)?;
        let patience = Duration::from_secs_f64(heartbeat_timeout_s);
        let (ended, end) = oneshot::channel::<()>();
        let door = Arc::new(self.door);
        let gate = |needs| Gate { door: door.clone(), needs };
        let training =
            TrainingServer::new(sessions::Training::new(handle.clone())).max_decoding_message_size(MESSAGE);
        let checkpoints =
            CheckpointsServer::new(checkpoints::Checkpoints::new(handle.clone(), uploads, term))
                .max_decoding_message_size(UPLOAD);
        let control = ControlServer::new(control::Control::new(handle)).max_decoding_message_size(QUESTION);
        let server = Server::builder()
            // Only links that are gone for good: who is silent is the core's to judge.
            .http2_keepalive_interval(Some(patience))
            .http2_keepalive_timeout(Some(patience))
            .max_concurrent_streams(STREAMS)
            .http2_max_pending_accept_reset_streams(Some(RESETS))
            .http2_max_header_list_size(HEADERS)
            .add_service(health_service)
            .add_service(reflection)
            .add_service(older_reflection)
            .add_service(InterceptedService::new(training, gate(Role::Worker)))
            .add_service(InterceptedService::new(checkpoints, gate(Role::Worker)))
            .add_service(InterceptedService::new(control, gate(Role::Operator)))
            .serve_with_incoming_shutdown(door.guests(listener), async {
                let _ = end.await;
            });
        let server = tokio::spawn(server);
        // A task like those that bring it messages: to wake one costs a thread nothing, to wake another thread for each
        // message took more than all else.
        let outcome = tokio::spawn(actor.run(inbox, first_actions)).await;
        let _ = ended.send(());
        // Streams that workers left open do not hold the coordinator up.
        let _ = tokio::time::timeout(Duration::from_secs(1), server).await;
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
    }
}
