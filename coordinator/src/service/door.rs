//! Who gets as far as a request: TLS where there is any, so many connections at once, and none for those who say
//! nothing. What a caller may then ask for is the gate's to judge.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use musher_security::{Known, Role, TlsServer, WaitingPlace, WaitingRoom};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::{self, Instant, Sleep},
};
use tokio_rustls::server::TlsStream;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use super::gate::Access;
use crate::http::metrics::Metrics;

/// For the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// A connection without a request that was let through lasts so long.
const ADMISSION: Duration = Duration::from_secs(15);
/// Why some are turned away: there are too many connections.
const CROWDED_OUT: &str = "too_many_connections";
/// Connections that have shaken hands and are not served yet.
const QUEUE: usize = 16;
/// For a place to become free, before a caller is turned away.
const ROOM: Duration = Duration::from_millis(100);
/// Between two lines of the log about those who are turned away; all are counted.
const SAID: Duration = Duration::from_secs(1);
/// Before the next try, when the system gives no connection (too many files are open).
const RETRY: Duration = Duration::from_millis(200);

/// What stands between the network and the services.
#[derive(Debug)]
pub struct Door {
    pub tls: Option<TlsServer>,
    pub access: Access,
    pub connections: Connections,
    /// A caller that is known may say nothing for so long; keepalive makes a living one speak.
    pub silence: Duration,
    pub metrics: Arc<Metrics>,
    said: Mutex<Option<Instant>>,
}

/// How many at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connections {
    pub all: usize,
    /// Of them without a request that was let through; more put out those that have waited longest.
    pub strangers: usize,
}

/// Whose connection it is.
#[derive(Clone, Debug)]
pub struct Caller {
    pub address: SocketAddr,
    /// By its certificate.
    pub role: Option<Role>,
    pub known: Known,
}

impl Door {
    pub fn new(tls: Option<TlsServer>, access: Access, connections: Connections, silence: Duration) -> Self {
        Self { tls, access, connections, silence, metrics: Arc::default(), said: Mutex::default() }
    }

    /// Connections that got this far, until the stream is dropped.
    pub(super) fn guests(self: Arc<Self>, listener: TcpListener) -> impl Stream<Item = io::Result<Guest>> {
        let (queue, guests) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            let places = Arc::new(Semaphore::new(self.connections.all));
            let strangers = WaitingRoom::new(self.connections.strangers);
            loop {
                let accepted = tokio::select! {
                    () = queue.closed() => return,
                    accepted = listener.accept() => accepted,
                };
                let (stream, address) = match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        self.refused_by_the_system(&error);
                        time::sleep(RETRY).await;
                        continue;
                    }
                };
                // A stranger that made room is gone in a moment.
                let Ok(Ok(place)) = time::timeout(ROOM, places.clone().acquire_owned()).await else {
                    self.turn_away(address, CROWDED_OUT);
                    continue;
                };
                let (door, queue, mut waiting) = (self.clone(), queue.clone(), strangers.enter().await);
                tokio::spawn(async move {
                    let shaken = tokio::select! {
                        shaken = door.shake_hands(stream) => shaken,
                        () = waiting.lost() => Err(CROWDED_OUT),
                    };
                    let guest = shaken.map(|(stream, role)| Guest {
                        stream,
                        caller: Caller { address, role, known: Known::default() },
                        heard: Instant::now(),
                        patience: Box::pin(time::sleep(ADMISSION)),
                        door: door.clone(),
                        waiting: Some(waiting),
                        _place: place,
                    });
                    match guest {
                        Ok(guest) => drop(queue.send(Ok(guest)).await),
                        Err(cause) => door.turn_away(address, cause),
                    }
                });
            }
        });
        ReceiverStream::new(guests)
    }

    async fn shake_hands(&self, stream: TcpStream) -> Result<(Wire, Option<Role>), &'static str> {
        let _ = stream.set_nodelay(true); // slower without, no worse
        let Some(tls) = &self.tls else { return Ok((Wire::Plain(stream), None)) };
        let complain = |error| warn!(%error, "the changed certificates are not used, those before still are");
        let shaken = time::timeout(HANDSHAKE, tls.accept(stream, complain)).await;
        let stream = shaken.map_err(|_| "handshake_timeout")?.map_err(|why| why.cause())?;
        let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let role = certificate.map(Role::of);
        Ok((Wire::Encrypted(Box::new(stream)), role))
    }

    /// Counts it, and says it if nothing was said just now.
    pub(super) fn turn_away(&self, address: SocketAddr, cause: &'static str) {
        self.metrics.turned_away(cause);
        match self.may_say() {
            true => warn!(%address, cause, "turned away"),
            false => debug!(%address, cause, "turned away"),
        }
    }

    /// The system takes no connection, mostly as too many files are open.
    fn refused_by_the_system(&self, error: &io::Error) {
        self.metrics.turned_away("system");
        match self.may_say() {
            true => warn!(%error, "no connection can be taken: look at the limit on open files (ulimit -n)"),
            false => debug!(%error, "no connection can be taken"),
        }
    }

    /// Whether nothing was said just now.
    fn may_say(&self) -> bool {
        let now = Instant::now();
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let may = said.is_none_or(|said| now - said > SAID);
        if may {
            *said = Some(now);
        }
        may
    }
}

/// A connection that is served. It breaks if it is silent for too long.
pub(super) struct Guest {
    stream: Wire,
    caller: Caller,
    heard: Instant,
    patience: Pin<Box<Sleep>>,
    door: Arc<Door>,
    /// `None` once the caller is known.
    waiting: Option<WaitingPlace>,
    _place: OwnedSemaphorePermit,
}

enum Wire {
    Plain(TcpStream),
    Encrypted(Box<TlsStream<TcpStream>>),
}

impl Connected for Guest {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Guest {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.caller.known.is_known() {
            self.waiting = None;
        } else if let Some(waiting) = &mut self.waiting
            && waiting.poll_lost(context).is_ready()
        {
            self.door.turn_away(self.caller.address, CROWDED_OUT);
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let read = match &mut self.stream {
            Wire::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Wire::Encrypted(stream) => Pin::new(stream).poll_read(context, buffer),
        };
        // What there is to read is read first: after this process was stopped, its clock alone accuses nobody.
        if read.is_ready() {
            self.heard = Instant::now();
            return read;
        }
        ready!(self.patience.as_mut().poll(context));
        let patient_until = self.heard + self.door.silence;
        if self.caller.known.is_known() && Instant::now() < patient_until {
            self.patience.as_mut().reset(patient_until);
            ready!(self.patience.as_mut().poll(context));
        }
        self.door.turn_away(self.caller.address, "silent");
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncWrite for Guest {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Wire::Plain(stream) => Pin::new(stream).poll_write(context, data),
            Wire::Encrypted(stream) => Pin::new(stream).poll_write(context, data),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Wire::Plain(stream) => Pin::new(stream).poll_flush(context),
            Wire::Encrypted(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Wire::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Wire::Encrypted(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
