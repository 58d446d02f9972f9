//! Connections of HTTP clients: so many at once, and none that keeps us waiting.

use std::{sync::Arc, time::Duration};

use axum::Router;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use musher_security::TlsServer;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::Semaphore,
    time,
};
use tracing::{debug, warn};

/// At once. A page keeps one open; more than these are left waiting in the system's queue.
const CONNECTIONS: usize = 256;
/// For a request's head to come.
const PATIENCE: Duration = Duration::from_secs(10);
/// Before the next try, when the system gives no connection (too many files are open).
const RETRY: Duration = Duration::from_millis(200);

/// Serves for as long as the process lives.
pub async fn serve(listener: TcpListener, tls: Option<TlsServer>, router: Router) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
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
        let (tls, router) = (tls.clone(), router.clone());
        tokio::spawn(async move {
            match tls {
                None => answer(stream, router).await,
                Some(tls) => {
                    let complain = |error| warn!(%error, "the changed certificates are not used, those before still are");
                    match time::timeout(PATIENCE, tls.accept(stream, complain)).await {
                        Ok(Ok(stream)) => answer(stream, router).await,
                        Ok(Err(why)) => debug!(cause = why.cause(), "no TLS handshake"),
                        Err(_) => debug!("no TLS handshake in time"),
                    }
                }
            }
            drop(place);
        });
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
