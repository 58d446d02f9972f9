//! The answers to an orchestrator's probes, over HTTP, and how a node's command hears from its workers what to
//! answer. What the answer is, is decided elsewhere.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr as NameAddr, UnixListener as StdUnixListener, UnixStream as StdUnixStream},
    },
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use hyper::{Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use musher_security::WaitingRoom;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, UnixListener, UnixStream},
    task, time,
};
use tracing::info;

use crate::liveness::Liveness;

/// At once; more put out those that have waited longest. Probes come one at a time, and ask at once.
const CONNECTIONS: usize = 64;
/// For a request's head to come.
const PATIENCE: Duration = Duration::from_secs(5);
/// For a worker to say how it is: it does so at once, unless it is stopped.
const ANSWER: Duration = Duration::from_secs(2);
/// Before the next try, when the system gives no connection.
const RETRY: Duration = Duration::from_millis(200);
/// What a worker says that is well.
const ALIVE: &str = "alive";

pub async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let bound = TcpListener::bind(address).await;
    let listener = bound.with_context(|| format!("--probes {address} can't be listened at: give another"))?;
    info!(address = %listener.local_addr()?, "probes are answered");
    Ok(listener)
}

/// Answers `/livez` with what `ask` says, for as long as the process lives.
pub async fn serve<A>(listener: TcpListener, ask: impl Fn() -> A + Clone + Send + 'static)
where
    A: Future<Output = Result<(), String>> + Send + 'static,
{
    let places = WaitingRoom::new(CONNECTIONS);
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            time::sleep(RETRY).await;
            continue;
        };
        let (ask, mut place) = (ask.clone(), places.enter().await);
        task::spawn(async move {
            let answer = service_fn(move |request: Request<Incoming>| {
                let answer = (request.uri().path() == "/livez").then(&ask);
                async move {
                    let (code, text) = match answer {
                        None => (StatusCode::NOT_FOUND, "only /livez is here".to_owned()),
                        Some(answer) => match answer.await {
                            Ok(()) => (StatusCode::OK, ALIVE.to_owned()),
                            Err(why) => (StatusCode::SERVICE_UNAVAILABLE, why),
                        },
                    };
                    let mut response = Response::new(format!("{text}\n"));
                    *response.status_mut() = code;
                    Ok::<_, Infallible>(response)
                }
            });
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), answer);
            tokio::select! {
                _ = served => {} // an error means that the client is gone
                () = place.lost() => {}
            }
        });
    }
}

/// A name that is no file, and gone with the process.
pub fn bind_name(name: &str) -> anyhow::Result<UnixListener> {
    let bind = || {
        let listener = StdUnixListener::bind_addr(&NameAddr::from_abstract_name(name)?)?;
        listener.set_nonblocking(true)?;
        UnixListener::from_std(listener)
    };
    bind().with_context(|| format!("--pulse {name} can't be listened at"))
}

/// Tells everybody who asks at the name how this worker is.
pub async fn tell(listener: UnixListener, liveness: Arc<Liveness>) {
    loop {
        let Ok((mut stream, _)) = listener.accept().await else {
            time::sleep(RETRY).await;
            continue;
        };
        let said = liveness.verdict().err().unwrap_or_else(|| ALIVE.to_owned());
        // An error means that nobody listens any more.
        let _ = time::timeout(ANSWER, stream.write_all(said.as_bytes())).await;
    }
}

/// # Errors
/// What is wrong with the worker of that name. Nothing is where there is none.
pub async fn ask(name: &str) -> Result<(), String> {
    let connect = || -> io::Result<UnixStream> {
        let stream = StdUnixStream::connect_addr(&NameAddr::from_abstract_name(name)?)?;
        stream.set_nonblocking(true)?;
        UnixStream::from_std(stream)
    };
    let Ok(mut stream) = connect() else { return Ok(()) };
    let mut said = String::new();
    match time::timeout(ANSWER, stream.read_to_string(&mut said)).await {
        Err(_) => Err(format!("its process does not answer within {} s", ANSWER.as_secs())),
        Ok(Ok(_)) if !said.is_empty() && said != ALIVE => Err(said),
        // It is well, or has just ended.
        Ok(_) => Ok(()),
    }
}
