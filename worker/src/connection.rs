//! The worker's connection to the coordinator, and the address its peers reach it at.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow};
use musher_security::{Credentials, Link, broken_trust};
use tokio::time;
use tonic::transport::Endpoint;
use tracing::debug;

/// Between two attempts to reach a coordinator that is not there yet.
pub const RETRY: Duration = Duration::from_millis(200);

/// When a link on which nothing comes back is given up: after a ping each `interval`, by `timeout` later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    interval: Duration,
    timeout: Duration,
}

impl Default for Keepalive {
    /// While the job is not known.
    fn default() -> Self {
        Self { interval: Duration::from_secs(5), timeout: Duration::from_secs(10) }
    }
}

impl Keepalive {
    /// A dead link is noticed within that time, as the coordinator notices a silent worker.
    pub fn within(heartbeat_timeout: Duration) -> Self {
        Self { interval: heartbeat_timeout / 3, timeout: heartbeat_timeout * 2 / 3 }
    }
}

/// Whether it is worth a try.
///
/// # Errors
/// If `url` is none, or does not go with the credentials.
pub fn check(url: &str, credentials: &Credentials) -> anyhow::Result<()> {
    endpoint(url, credentials).map(drop)
}

fn endpoint(url: &str, credentials: &Credentials) -> anyhow::Result<Endpoint> {
    let endpoint = Endpoint::new(url.to_owned())
        .with_context(|| format!("{url} is not an address such as http://127.0.0.1:7400"))?;
    Ok(credentials.apply(endpoint)?)
}

/// Connects, waiting up to `patience` for the coordinator to come up.
///
/// One that can't be trusted is not waited for.
pub async fn connect(
    url: &str,
    credentials: &Credentials,
    patience: Duration,
    keepalive: Keepalive,
) -> anyhow::Result<Link> {
    let endpoint = endpoint(url, credentials)?
        .connect_timeout(Duration::from_secs(5))
        .tcp_nodelay(true)
        .http2_keep_alive_interval(keepalive.interval)
        .keep_alive_timeout(keepalive.timeout);
    let deadline = Instant::now() + patience;
    loop {
        match endpoint.connect().await {
            Ok(channel) => return Ok(credentials.link(channel)),
            Err(error) if Instant::now() >= deadline || broken_trust(&error).is_some() => {
                if let Some(reason) = broken_trust(&error) {
                    return Err(anyhow!("{url}: {reason}"));
                }
                let cause = anyhow!(error);
                return Err(anyhow!(
                    "no coordinator answered at {url} for {} s ({}): start it, or correct the address",
                    patience.as_secs(),
                    cause.root_cause(),
                ));
            }
            Err(error) => debug!(%error, "the coordinator is not there yet"),
        }
        time::sleep(RETRY).await;
    }
}

/// The address of this machine that the coordinator's network reaches: the one that the system would
/// send from. Nothing is sent.
pub fn local_address_towards(url: &str) -> anyhow::Result<IpAddr> {
    let uri: tonic::codegen::http::Uri = url.parse().with_context(|| format!("{url} is no URL"))?;
    let host = uri.host().with_context(|| format!("{url} names no host"))?.trim_matches(['[', ']']);
    let port = uri.port_u16().unwrap_or(80);
    let route = |from: &str| -> std::io::Result<SocketAddr> {
        let socket = UdpSocket::bind(from)?;
        socket.connect((host, port))?;
        socket.local_addr()
    };
    let address = route("0.0.0.0:0").or_else(|_| route("[::]:0"));
    Ok(address
        .with_context(|| format!("no route to {host}: give this worker's address with --advertise"))?
        .ip())
}
