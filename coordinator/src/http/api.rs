//! What the JSON API says. The shapes are a contract of their own: the core may change
//! behind them.

use musher_proto::job::Monitor;
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::core::{PeerStatus, RunStatus};

/// What the run is doing. A figure that is not known yet is null.
#[derive(Debug, Serialize, ToSchema)]
pub struct Status {
    run: String,
    /// `waiting for workers`, `forming`, `training`, `validating`, `saving` or `ended`
    phase: &'static str,
    /// Lives of the coordinator
    term: u64,
    /// The newest team's number
    generation: u64,
    /// Workers in the team
    team_size: usize,
    /// In hand, from 1; 0 before the first
    epoch: u32,
    epochs: u32,
    /// Optimizer steps in the parameters
    step: u64,
    /// Samples of the epoch that are applied
    cursor: u64,
    /// Training samples of an epoch
    samples: u64,
    /// Of the last applied step
    loss: Option<f64>,
    /// That the last step was made with; an encoder may have its own
    learning_rate: Option<f64>,
    images_per_second: Option<f64>,
    /// To the epoch limit, training only
    eta_s: Option<f64>,
    /// The figure that decides which epoch is best
    #[schema(value_type = String, example = "val_loss")]
    monitor: Monitor,
    best_epoch: Option<u32>,
    best_value: Option<f64>,
    /// The last abort or removal, as a sentence
    last_trouble: Option<String>,
    workers: Vec<Worker>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct Worker {
    worker: String,
    /// In the team; null for one that waits to be taken in
    rank: Option<u32>,
    host: String,
    device: String,
    /// In words
    doing: String,
    /// Since its last sign of progress in that
    doing_s: f64,
    step: Option<u64>,
    /// This rank's own part of a step
    step_ms: Option<f64>,
    /// Waiting for the loader, of a step
    data_wait_ms: Option<f64>,
    /// Waiting for sums over the ranks, of a step
    peers_wait_ms: Option<f64>,
    /// Since its last message
    silent_s: f64,
    /// `well`; `slow`: it holds its team up; `suspect`: its connection broke; `benched`: put out for a while
    health: &'static str,
}

/// What the curves show: flat events as in `events.jsonl`, oldest first.
#[derive(Debug, Serialize, ToSchema)]
pub struct Curves {
    /// `progress` events, thinned out evenly
    #[schema(value_type = Vec<Object>)]
    progress: Vec<Map<String, Value>>,
    /// `epoch_finished` events
    #[schema(value_type = Vec<Object>)]
    epochs: Vec<Map<String, Value>>,
    /// `validated` events
    #[schema(value_type = Vec<Object>)]
    validations: Vec<Map<String, Value>>,
}

impl Status {
    pub fn new(status: RunStatus) -> Self {
        let progress = status.progress;
        Self {
            phase: status.phase.as_str(),
            term: status.term.0,
            generation: status.generation.0,
            team_size: status.team_size(),
            epoch: status.epoch().0,
            epochs: status.epochs,
            step: status.applied().0,
            cursor: status.cursor(),
            samples: status.train_samples,
            loss: progress.map(|progress| progress.loss).filter(|loss| loss.is_finite()),
            learning_rate: status.learning_rate,
            images_per_second: progress.map(|progress| progress.images_per_second),
            eta_s: status.eta_s,
            monitor: status.monitor,
            best_epoch: status.best.map(|best| best.epoch.0),
            best_value: status.best.and_then(|best| best.value),
            last_trouble: status.last_trouble,
            workers: status.peers.into_iter().map(Worker::from).collect(),
            run: status.run,
        }
    }
}

impl From<PeerStatus> for Worker {
    fn from(peer: PeerStatus) -> Self {
        let progress = peer.progress;
        Self {
            worker: peer.worker.0,
            rank: peer.rank.map(|rank| rank.0),
            host: peer.host,
            device: peer.device,
            doing: peer.doing,
            doing_s: peer.doing_for.as_secs_f64(),
            step: progress.map(|progress| progress.applied.0),
            step_ms: progress.map(|progress| progress.step_ms),
            data_wait_ms: progress.map(|progress| progress.waits.data_ms),
            peers_wait_ms: progress.map(|progress| progress.waits.peers_ms),
            silent_s: peer.silent.as_secs_f64(),
            health: peer.health.as_str(),
        }
    }
}

impl From<crate::telemetry::Curves> for Curves {
    fn from(curves: crate::telemetry::Curves) -> Self {
        let plain = |points: Vec<std::sync::Arc<crate::telemetry::Said>>| {
            points.iter().map(|said| said.fields.clone()).collect()
        };
        Self {
            progress: plain(curves.progress),
            epochs: plain(curves.epochs),
            validations: plain(curves.validations),
        }
    }
}
