//! `Training.Session`: one bidirectional stream per worker, between the wire and the actor.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use musher_proto::{
    convert::Malformed,
    ids::Session,
    message::{Fenced, FromWorker, ToWorker},
    wire::{self, training_server},
};
use tokio::{sync::mpsc, time};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};
use tracing::debug;

use super::{Handle, Input};
use crate::core::Event;

/// What waits to go out to one worker. A worker is sent a handful of messages an epoch, so a full
/// channel means that it has stopped to read.
const OUTBOX: usize = 64;
/// For a session's first message.
const HELLO: Duration = Duration::from_secs(10);

/// Boxed, as a channel has places for many from the start, and each worker has one.
pub(super) type Outbox = mpsc::Sender<Box<Fenced<ToWorker>>>;

#[derive(Debug)]
pub(super) struct Training {
    handle: Handle,
    sessions: AtomicU64,
}

impl Training {
    pub fn new(handle: Handle) -> Self {
        Self { handle, sessions: AtomicU64::new(0) }
    }
}

#[tonic::async_trait]
impl training_server::Training for Training {
    type SessionStream =
        std::pin::Pin<Box<dyn Stream<Item = Result<wire::CoordinatorMessage, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<wire::WorkerMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut inbound = request.into_inner();
        let first = time::timeout(HELLO, inbound.message())
            .await
            .map_err(|_| Status::deadline_exceeded("a session begins with Hello, and at once"))??
            .ok_or_else(|| Status::invalid_argument("the stream ended before Hello"))?;
        let Fenced { body: FromWorker::Hello(hello), .. } = first.try_into().map_err(malformed)? else {
            return Err(Status::invalid_argument("a session begins with Hello"));
        };
        let session = Session(self.sessions.fetch_add(1, Ordering::Relaxed) + 1);
        let (outbox, outgoing) = mpsc::channel(OUTBOX);
        self.handle
            .send(Input::SessionOpened { event: Event::SessionOpened { session, hello }, session, outbox })
            .await?;
        tokio::spawn(receive(session, inbound, self.handle.clone()));
        let outgoing =
            ReceiverStream::new(outgoing).map(|message: Box<Fenced<ToWorker>>| Ok((*message).into()));
        Ok(Response::new(Box::pin(outgoing)))
    }
}

/// Carries a worker's messages to the actor until the stream ends.
async fn receive(session: Session, mut inbound: Streaming<wire::WorkerMessage>, handle: Handle) {
    let reason = loop {
        let message = match inbound.message().await {
            Ok(Some(message)) => message,
            Ok(None) => break "it closed the connection".to_owned(),
            Err(status) => {
                debug!(%session, %status, "a stream broke");
                break "its connection broke".to_owned();
            }
        };
        match Fenced::<FromWorker>::try_from(message) {
            Ok(message) => handle.tell(Event::MessageReceived { session, message }).await,
            Err(error) => break error.to_string(),
        }
    };
    handle.tell(Event::SessionClosed { session, reason }).await;
}

fn malformed(error: Malformed) -> Status {
    Status::invalid_argument(error.to_string())
}
