//! Connections of HTTP clients: so many at once, and none that keeps us waiting.

use std::{future::pending, sync::Arc, time::Duration};

use axum::{Extension, Router};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use musher_security::{Known, TlsServer, WaitingPlace, WaitingRoom};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time,
};
use tracing::{debug, warn};

/// At once. A page keeps one open; more than these are left waiting in the system's queue.
pub const CONNECTIONS: usize = 128;
/// Of them without a request that was let through: more put out those that have waited longest.
const STRANGERS: usize = CONNECTIONS / 2;
/// For a request's head to come.
const PATIENCE: Duration = Duration::from_secs(10);
/// Before the next try, when the system gives no connection (too many files are open).
const RETRY: Duration = Duration::from_millis(200);

/// Serves for as long as the process lives.
pub async fn serve(listener: TcpListener, tls: Option<TlsServer>, router: Router) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let strangers = WaitingRoom::new(STRANGERS);
    loop {
        let place = places.clone().acquire_owned().await.expect("the semaphore is never closed");
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                debug!(%error, "no connection");
                time::sleep(RETRY).await;
                continue;
            }
        };
        let (known, waiting) = (Known::default(), strangers.enter().await);
        let (tls, router) = (tls.clone(), router.clone().layer(Extension(known.clone())));
        tokio::spawn(async move {
            tokio::select! {
                () = shake_hands(stream, tls, router) => {}
                () = is_put_out(known, waiting) => debug!("an HTTP connection made room for others"),
            }
            drop(place);
        });
    }
}

/// Returns if another needs the place of a connection that is nobody's we know.
async fn is_put_out(known: Known, mut waiting: WaitingPlace) {
    waiting.lost().await;
    if known.is_known() {
        pending().await
    }
}

async fn shake_hands(stream: TcpStream, tls: Option<TlsServer>, router: Router) {
    let Some(tls) = tls else { return answer(stream, router).await };
    let complain = |error| warn!(%error, "the changed certificates are not used, those before still are");
    match time::timeout(PATIENCE, tls.accept(stream, complain)).await {
        Ok(Ok(stream)) => answer(stream, router).await,
        Ok(Err(why)) => debug!(cause = why.cause(), "no TLS handshake"),
        Err(_) => debug!("no TLS handshake in time"),
    }
}

async fn answer(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, router: Router) {
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_headers(64)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .await;
    if let Err(error) = served {
        debug!(%error, "an HTTP connection broke");
    }
}
