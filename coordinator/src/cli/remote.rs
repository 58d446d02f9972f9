//! `musher status`, `musher stop` and `musher drain`: commands that ask a running coordinator.

use std::{
    io::{self, IsTerminal, Write},
    time::Duration,
};

use anyhow::{Context, anyhow};
use clap::Args;
use musher_proto::wire::{
    DrainRequest, StatusReply, StatusRequest, StopRequest, control_client::ControlClient,
};
use musher_security::{CredentialsArgs, Link, broken_trust, fault};
use tokio::time;
use tonic::{Code, transport::Endpoint};

use super::{Exit, Failure, runtime};
use crate::telemetry::printable;

/// Between two looks.
const WATCH: Duration = Duration::from_secs(1);
/// For an answer: the coordinator gives it at once.
const PATIENCE: Duration = Duration::from_secs(10);
/// Empties a terminal's screen and begins at its top.
const CLEAR: &str = "\x1b[2J\x1b[H";

#[derive(Debug, Args)]
pub struct Status {
    /// The coordinator, for example http://127.0.0.1:7400
    url: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Look again every second, until the run ends
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    credentials: CredentialsArgs,
}

#[derive(Debug, Args)]
pub struct Stop {
    /// The coordinator, for example http://127.0.0.1:7400
    url: String,
    #[command(flatten)]
    credentials: CredentialsArgs,
}

#[derive(Debug, Args)]
pub struct Drain {
    /// The coordinator, for example http://127.0.0.1:7400
    url: String,
    /// The worker's name, as `musher status` shows it
    worker: String,
    #[command(flatten)]
    credentials: CredentialsArgs,
}

impl Status {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        runtime()?.block_on(async {
            let mut control = connect(&self.url, self.credentials).await?;
            let mut seen = false;
            loop {
                let status = match control.status(StatusRequest {}).await {
                    Ok(status) => status.into_inner(),
                    // The run ended while we looked, or its coordinator is out of reach.
                    Err(status) if seen && status.code() == Code::Unavailable => {
                        eprintln!("musher: the coordinator does not answer any more ({})", status.message());
                        return anyhow::Ok(());
                    }
                    Err(status) => return Err(refused(status)),
                };
                let text = if self.json { format!("{}\n", as_json(&status)) } else { as_text(&status) };
                let fresh = if self.watch && !self.json && io::stdout().is_terminal() { CLEAR } else { "" };
                if write!(io::stdout(), "{fresh}{text}").is_err() || !self.watch {
                    return Ok(()); // or nobody reads any more
                }
                seen = true;
                time::sleep(WATCH).await;
            }
        })?;
        Ok(Exit::Finished)
    }
}

impl Stop {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        runtime()?.block_on(async {
            let mut control = connect(&self.url, self.credentials).await?;
            control.stop(StopRequest {}).await.map_err(refused)
        })?;
        println!("the run ends after a checkpoint; continue it with --resume");
        Ok(Exit::Finished)
    }
}

impl Drain {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let Drain { url, worker, credentials } = self;
        let request = DrainRequest { worker: worker.clone() };
        runtime()?
            .block_on(async { connect(&url, credentials).await?.drain(request).await.map_err(refused) })?;
        println!("worker {worker} leaves between two steps, and exits with 75");
        Ok(Exit::Finished)
    }
}

fn refused(status: tonic::Status) -> anyhow::Error {
    let fault = printable(&fault(&status));
    if fault.contains("CertificateRequired") {
        return anyhow!("the run asks for a certificate: give --tls-cert and --tls-key");
    }
    match ["connection closed", "broken pipe", "h2 protocol error"].iter().any(|sign| fault.contains(sign)) {
        true => anyhow!(
            "the connection was closed ({fault}): is that the page's address, or does the run ask for TLS (--tls-ca)? \
             The coordinator's address is the `address` in `run_started` (server.grpc)"
        ),
        false => anyhow!("{fault}"),
    }
}

async fn connect(url: &str, credentials: CredentialsArgs) -> anyhow::Result<ControlClient<Link>> {
    Ok(ControlClient::new(link(url, credentials).await?))
}

/// To a coordinator, as an operator.
pub(super) async fn link(url: &str, credentials: CredentialsArgs) -> anyhow::Result<Link> {
    let credentials = credentials.read("MUSHER_OPERATOR_TOKEN")?;
    let url = credentials.url(url);
    let endpoint = Endpoint::new(url.clone())
        .with_context(|| format!("{url} is not an address such as http://127.0.0.1:7400"))?
        .connect_timeout(PATIENCE)
        .timeout(PATIENCE);
    let channel = credentials.apply(endpoint)?.connect().await.map_err(|error| {
        if let Some(reason) = broken_trust(&error) {
            return anyhow!("{url}: {reason}");
        }
        let cause = anyhow::Error::from(error);
        let cause = cause.root_cause();
        anyhow!("no coordinator answers at {url} ({cause}): is the run going on, and the address right?")
    })?;
    Ok(credentials.link(channel))
}

/// The fields of `/api/v1/status`, by the same names.
fn as_json(status: &StatusReply) -> serde_json::Value {
    let known = |figure: f64| figure.is_finite().then_some(figure);
    serde_json::json!({
        "run": status.run,
        "phase": status.phase,
        "term": status.term,
        "generation": status.generation,
        "team_size": status.team_size,
        "epoch": status.epoch,
        "epochs": status.epochs,
        "step": status.applied,
        "cursor": status.cursor,
        "samples": status.train_samples,
        "loss": known(status.loss),
        "learning_rate": status.learning_rate,
        "images_per_second": status.images_per_second,
        "eta_s": status.eta_s,
        "monitor": status.monitor,
        "best_epoch": status.best_epoch,
        "best_value": status.best_value,
        "last_trouble": status.last_trouble,
        "workers": status.workers.iter().map(|worker| serde_json::json!({
            "worker": worker.worker,
            "rank": worker.rank,
            "host": worker.host,
            "device": worker.device,
            "doing": worker.phase,
            "doing_s": worker.doing_ms as f64 / 1e3,
            "step": worker.applied,
            "step_ms": worker.step_ms,
            "data_wait_ms": worker.data_wait_ms,
            "peers_wait_ms": worker.peers_wait_ms,
            "silent_s": worker.silent_ms as f64 / 1e3,
            "health": worker.health,
        })).collect::<Vec<_>>(),
    })
}

fn as_text(status: &StatusReply) -> String {
    let mut text = format!(
        "run {}: {}, epoch {}/{}, {}/{} samples, step {}, loss {}, {:.1} images/s\n",
        status.run,
        status.phase,
        status.epoch,
        status.epochs,
        status.cursor,
        status.train_samples,
        status.applied,
        if status.loss.is_finite() { format!("{:.4}", status.loss) } else { "-".into() },
        status.images_per_second,
    );
    if let (Some(epoch), Some(value)) = (status.best_epoch, status.best_value) {
        text += &format!("best so far: epoch {epoch}, {} {value:.4}\n", status.monitor);
    }
    text += &format!(
        "generation {}, term {}, {} workers\n",
        status.generation,
        status.term,
        status.workers.len()
    );
    for worker in &status.workers {
        let rank = worker.rank.map_or("-".into(), |rank| rank.to_string());
        text += &format!(
            "  rank {rank:>3}  {:<24} {:<8} step {:>8}  {:>8.1} ms/step  heard {:.1} s ago  {} for {:.1} s\n",
            printable(&worker.worker),
            printable(&worker.device),
            worker.applied.unwrap_or(0),
            worker.step_ms.unwrap_or(0.0),
            worker.silent_ms as f64 / 1e3,
            worker.phase,
            worker.doing_ms as f64 / 1e3,
        );
    }
    if let Some(trouble) = &status.last_trouble {
        text += &format!("last trouble: {}\n", printable(trouble));
    }
    text
}
