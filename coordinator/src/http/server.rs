//! Connections of HTTP clients: so many at once, and none that keeps us waiting.

use std::{sync::Arc, time::Duration};

use axum::Router;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{net::TcpListener, sync::Semaphore, time};
use tracing::debug;

/// At once. A page keeps one open; more than these are left waiting in the system's queue.
const CONNECTIONS: usize = 256;
/// For a request's head to come.
const PATIENCE: Duration = Duration::from_secs(10);
/// Before the next try, when the system gives no connection (too many files are open).
const RETRY: Duration = Duration::from_millis(200);

/// Serves for as long as the process lives.
pub async fn serve(listener: TcpListener, router: Router) {
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
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .max_headers(64)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                debug!(%error, "an HTTP connection broke");
            }
            drop(place);
        });
    }
}
