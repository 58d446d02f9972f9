//! Who gets as far as a request: TLS where there is any, so many connections at once, and none for those who say
//! nothing. What a caller may then ask for is the gate's to judge.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use musher_security::{Role, TlsServer};
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
/// Connections that have shaken hands and are not served yet.
const QUEUE: usize = 16;
/// Between two lines of the log about those who are turned away; all are counted.
const SAID: Duration = Duration::from_secs(1);
/// Before the next try, when the system gives no connection (too many files are open).
const RETRY: Duration = Duration::from_millis(200);

/// What stands between the network and the services.
#[derive(Debug)]
pub struct Door {
    pub tls: Option<TlsServer>,
    pub access: Access,
    /// At once.
    pub connections: usize,
    /// A caller that is known may say nothing for so long; keepalive makes a living one speak.
    pub silence: Duration,
    pub metrics: Arc<Metrics>,
    said: Mutex<Option<Instant>>,
}

/// Whose connection it is.
#[derive(Clone, Debug)]
pub struct Caller {
    pub address: SocketAddr,
    /// By its certificate.
    pub role: Option<Role>,
    known: Arc<AtomicBool>,
}

impl Caller {
    /// A request of it was let through.
    pub fn is_welcome(&self) {
        self.known.store(true, Ordering::Relaxed);
    }
}

impl Door {
    pub fn new(tls: Option<TlsServer>, access: Access, connections: usize, silence: Duration) -> Self {
        Self { tls, access, connections, silence, metrics: Arc::default(), said: Mutex::default() }
    }

    /// Connections that got this far, until the stream is dropped.
    pub(super) fn guests(self: Arc<Self>, listener: TcpListener) -> impl Stream<Item = io::Result<Guest>> {
        let (queue, guests) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            let places = Arc::new(Semaphore::new(self.connections));
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
                let Ok(place) = places.clone().try_acquire_owned() else {
                    self.turn_away(address, "too_many_connections");
                    continue;
                };
                let (door, queue) = (self.clone(), queue.clone());
                tokio::spawn(async move {
                    match door.clone().admit(stream, address, place).await {
                        Ok(guest) => drop(queue.send(Ok(guest)).await),
                        Err(cause) => door.turn_away(address, cause),
                    }
                });
            }
        });
        ReceiverStream::new(guests)
    }

    async fn admit(
        self: Arc<Self>,
        stream: TcpStream,
        address: SocketAddr,
        place: OwnedSemaphorePermit,
    ) -> Result<Guest, &'static str> {
        let _ = stream.set_nodelay(true); // slower without, no worse
        let mut role = None;
        let stream = match &self.tls {
            None => Wire::Plain(stream),
            Some(tls) => {
                let complain =
                    |error| warn!(%error, "the changed certificates are not used, those before still are");
                let shaken = time::timeout(HANDSHAKE, tls.accept(stream, complain)).await;
                let stream = shaken.map_err(|_| "handshake_timeout")?.map_err(|why| why.cause())?;
                role = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first()).map(Role::of);
                Wire::Encrypted(Box::new(stream))
            }
        };
        let caller = Caller { address, role, known: Arc::default() };
        let patience = Box::pin(time::sleep(ADMISSION));
        Ok(Guest { stream, caller, heard: Instant::now(), patience, door: self, _place: place })
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
        if self.caller.known.load(Ordering::Relaxed) && Instant::now() < patient_until {
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
