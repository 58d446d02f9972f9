//! The run over HTTP, to look at and not to touch: probes, metrics, a JSON API with a live stream, and a page
//! that shows all of it.
//!
//! It asks the actor for the run's status and the telemetry's feed for its events; it knows nothing else of
//! either.

mod api;
mod guard;
pub mod metrics;
mod server;

pub use guard::Guard;
pub use server::CONNECTIONS;

use std::{convert::Infallible, path::PathBuf, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    middleware,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
    routing::get,
};
use serde::Serialize;
use tokio::{fs, net::TcpListener, sync::watch, time};
use tokio_stream::{
    Stream, StreamExt,
    wrappers::{BroadcastStream, WatchStream},
};
use utoipa::OpenApi;

use crate::{
    service::Handle,
    telemetry::{Feed, Said},
};
use metrics::Metrics;

/// Between two looks at the run's status, for those who follow it.
const PULSE: Duration = Duration::from_secs(1);
/// In which a coordinator that lives says how it is.
const ALIVE: Duration = Duration::from_secs(5);
/// The page brings everything along and reaches nobody else.
const CONTENT_SECURITY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src 'self' data: blob:; \
     connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The description at `/api/v1/openapi.json`.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Musher",
        description = "One run of a coordinator, to look at. Nothing can be changed here."
    ),
    paths(status_now, curves, events, stream, sample, scrape, livez, readyz),
    components(schemas(api::Status, api::Worker, api::Curves))
)]
struct Description;

/// What the site shows.
#[derive(Clone, Debug)]
pub struct Site {
    pub handle: Handle,
    pub feed: Feed,
    pub metrics: Arc<Metrics>,
    /// Where the run's pictures are.
    pub samples: PathBuf,
}

impl Site {
    /// Serves the page, the API, metrics and probes, for as long as the process lives.
    pub async fn serve(self, listener: TcpListener, guard: Guard) {
        let (status, followed) = watch::channel(String::new());
        let router = Router::new()
            .route("/", get(page))
            .route("/metrics", get(scrape))
            .route("/api/v1/status", get(status_now))
            .route("/api/v1/curves", get(curves))
            .route("/api/v1/events", get(events))
            .route("/api/v1/stream", get(stream))
            .route("/api/v1/samples/latest.png", get(sample))
            .route("/api/v1/openapi.json", get(description))
            .with_state(Viewed { site: self.clone(), status: followed })
            .layer(middleware::from_fn_with_state(Arc::new(guard.clone()), guard::admit))
            .merge(probes(self.handle.clone()));
        let router = match listener.local_addr() {
            Ok(address) if address.ip().is_loopback() => {
                router.layer(middleware::from_fn(guard::by_local_name))
            }
            _ => router,
        };
        tokio::join!(server::serve(listener, guard.tls, router), self.follow(status));
    }

    /// One look a second serves all who follow.
    async fn follow(&self, status: watch::Sender<String>) {
        let mut pulse = time::interval(PULSE);
        pulse.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        loop {
            pulse.tick().await;
            // One receiver is the router's own.
            if status.receiver_count() > 1
                && let Some(now) = self.status().await
            {
                status.send_replace(json(&now));
            }
        }
    }

    /// `None` once the run has ended.
    async fn status(&self) -> Option<api::Status> {
        Some(api::Status::new(self.handle.status().await?))
    }
}

/// Serves `/livez` and `/readyz` alone, for as long as the process lives.
pub async fn serve_probes(listener: TcpListener, handle: Handle) {
    server::serve(listener, None, probes(handle)).await;
}

/// Whether workers are there is no part of either: a coordinator that waits for them is well.
fn probes(handle: Handle) -> Router {
    Router::new().route("/livez", get(livez)).route("/readyz", get(readyz)).with_state(handle)
}

#[utoipa::path(get, path = "/livez", responses(
    (status = 200, description = "The coordinator answers"), (status = 503, description = "It does not")
))]
async fn livez(State(handle): State<Handle>) -> Response {
    probe(handle).await
}

#[utoipa::path(get, path = "/readyz", responses(
    (status = 200, description = "Workers may come"), (status = 503, description = "The run has ended")
))]
async fn readyz(State(handle): State<Handle>) -> Response {
    probe(handle).await
}

async fn probe(handle: Handle) -> Response {
    match time::timeout(ALIVE, handle.status()).await {
        Ok(Some(_)) => "ok\n".into_response(),
        Ok(None) => (StatusCode::SERVICE_UNAVAILABLE, "the run has ended\n").into_response(),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "the coordinator does not answer\n").into_response(),
    }
}

#[derive(Clone)]
struct Viewed {
    site: Site,
    status: watch::Receiver<String>,
}

async fn page() -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY),
        (header::CACHE_CONTROL, "no-cache"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (headers, include_str!("page.html")).into_response()
}

#[utoipa::path(get, path = "/metrics", responses((status = 200, content_type = "application/openmetrics-text")))]
async fn scrape(State(viewed): State<Viewed>) -> Response {
    let Some(status) = viewed.site.handle.status().await else { return ended() };
    match viewed.site.metrics.text(&status) {
        Ok(text) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

#[utoipa::path(get, path = "/api/v1/status", responses((status = 200, body = api::Status)))]
async fn status_now(State(viewed): State<Viewed>) -> Response {
    match viewed.site.status().await {
        Some(status) => as_json(&status),
        None => ended(),
    }
}

#[utoipa::path(get, path = "/api/v1/curves", responses((status = 200, body = api::Curves)))]
async fn curves(State(viewed): State<Viewed>) -> Response {
    as_json(&api::Curves::from(viewed.site.feed.curves()))
}

#[utoipa::path(get, path = "/api/v1/events", responses(
    (status = 200, description = "The newest 500 events but for `progress`, as in `events.jsonl`", body = Vec<Object>)
))]
async fn events(State(viewed): State<Viewed>) -> Response {
    let (recent, _) = viewed.site.feed.follow(None);
    as_json(&recent.iter().map(|said| &said.fields).collect::<Vec<_>>())
}

async fn description() -> Response {
    as_json(&Description::openapi())
}

#[utoipa::path(get, path = "/api/v1/samples/latest.png", responses(
    (status = 200, content_type = "image/png", description = "Images, truth and prediction of the last validation"),
    (status = 404, description = "Nothing was validated yet")
))]
async fn sample(State(viewed): State<Viewed>) -> Response {
    match newest(&viewed.site.samples).await {
        Some(png) => {
            ([(header::CONTENT_TYPE, "image/png"), (header::CACHE_CONTROL, "no-cache")], png).into_response()
        }
        None => (StatusCode::NOT_FOUND, "nothing was validated yet\n").into_response(),
    }
}

/// The picture of the latest epoch; their names sort by it.
async fn newest(samples: &std::path::Path) -> Option<Vec<u8>> {
    let mut entries = fs::read_dir(samples).await.ok()?;
    let mut newest: Option<PathBuf> = None;
    while let Ok(Some(entry)) = entries.next_entry().await {
        let path = entry.path();
        let name = path.file_name()?.to_str()?;
        if name.starts_with("epoch-") && name.ends_with(".png") {
            newest = newest.max(Some(path));
        }
    }
    fs::read(newest?).await.ok()
}

#[utoipa::path(get, path = "/api/v1/stream",
    params(("Last-Event-ID" = Option<u64>, Header, description = "the last one that was heard")),
    responses((status = 200, content_type = "text/event-stream", description =
        "Server-sent events: `status` about once a second, with what /api/v1/status says, and `event` for each \
         event of the run, the recent ones first"))
)]
async fn stream(
    State(viewed): State<Viewed>,
    headers: HeaderMap,
) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let heard = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse().ok());
    let (past, live) = viewed.site.feed.follow(heard);
    let past = tokio_stream::iter(past).map(|said| Some(happened(&said)));
    // One that was too slow misses some, and hears the next.
    let live = BroadcastStream::new(live).map(|said| said.ok().map(|said| happened(&said)));
    let status = WatchStream::new(viewed.status)
        .map(|status| (!status.is_empty()).then(|| Event::default().event("status").data(status)));
    let first = viewed.site.status().await.map(|status| Event::default().event("status").data(json(&status)));
    let all = tokio_stream::once(first).chain(past.chain(live).merge(status));
    Sse::new(all.filter_map(|event| event.map(Ok))).keep_alive(KeepAlive::default())
}

fn happened(said: &Said) -> Event {
    Event::default().event("event").id(said.id.to_string()).data(json(&said.fields))
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("what the API says is plain data")
}

fn as_json(value: &impl Serialize) -> Response {
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")];
    (headers, json(value)).into_response()
}

fn ended() -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, "the run has ended\n").into_response()
}
