//! The core's run events as `tracing` events: the names and fields of `events.jsonl`.

use std::{net::SocketAddr, path::Path};

use musher_proto::{ids::Epoch, job::JobConfig};
use tracing::{debug, error, info, warn};

use crate::{
    core::{Outcome, RunEvent, Status, Stopped},
    telemetry::{EVENT_TARGET, Progress, warn_of},
};

/// Samples a rank below which batch norm's statistics are poor.
const SMALL_SHARE: u32 = 16;

/// Says what happens: in the log, the event file and on the progress bar.
#[derive(Debug)]
pub struct Announcer {
    run: String,
    job: JobConfig,
    bar: Progress,
    addresses: Addresses,
    /// Where the resulting weights are, for the last event.
    weights: String,
    /// The epoch that the bar shows.
    bar_epoch: Option<Epoch>,
    /// Small shares are warned of once.
    warned: bool,
}

/// Where the coordinator listens.
#[derive(Clone, Debug)]
pub struct Addresses {
    /// Workers and the command line.
    pub grpc: SocketAddr,
    /// URL of the page and metrics.
    pub page: String,
}

macro_rules! event {
    ($level:ident, $name:literal, $self:ident, $($fields:tt)*) => {
        $level!(target: EVENT_TARGET, event = $name, run = $self.run, $($fields)*)
    };
}

impl Announcer {
    pub fn new(run: String, job: JobConfig, bar: Progress, addresses: Addresses, weights: String) -> Self {
        Self { run, job, bar, addresses, weights, bar_epoch: None, warned: false }
    }

    pub fn announce(&mut self, event: &RunEvent) {
        let epochs = self.job.train.epochs;
        match event {
            RunEvent::RunStarted { term, resumed_from } => event!(
                info,
                "run_started",
                self,
                term = term.0,
                resumed_from = resumed_from.as_ref().map(|id| id.as_str()),
                epochs,
                global_batch = self.job.train.global_batch,
                seed = self.job.seed,
                address = %self.addresses.grpc,
                page = self.addresses.page,
            ),
            RunEvent::CoordinatorRestarted { term } => {
                event!(info, "coordinator_restarted", self, term = term.0)
            }
            RunEvent::WaitingForWorkers { joined, wanted } => {
                event!(
                    info,
                    "waiting_for_workers",
                    self,
                    present = joined,
                    expected = wanted,
                    address = %self.addresses.grpc
                )
            }
            RunEvent::WorkerJoined { worker, host, device } => {
                event!(info, "worker_joined", self, worker = worker.as_str(), host, device)
            }
            RunEvent::WorkerRefused { worker, reason } => {
                event!(warn, "worker_refused", self, worker = worker.as_str(), reason)
            }
            RunEvent::WorkerLeft { worker, rank, departure } => {
                let wait = departure.wait();
                event!(
                    warn,
                    "worker_left",
                    self,
                    worker = worker.as_str(),
                    rank = rank.map(|r| r.0),
                    cause = departure.cause(),
                    reason = departure.to_string(),
                    phase = wait.map(|wait| wait.phase.as_str()),
                    step = wait.map(|wait| wait.step.0),
                    waited_s = wait.map(|wait| wait.waited.as_secs_f64()),
                )
            }
            RunEvent::WorkerReturned { worker, rank } => {
                event!(info, "worker_returned", self, worker = worker.as_str(), rank = rank.0)
            }
            RunEvent::WorkerSlow { worker, rank, step_ms, median_ms } => {
                event!(warn, "worker_slow", self, worker = worker.as_str(), rank = rank.0, step_ms, median_ms,)
            }
            RunEvent::TeamConnected { generation, elapsed } => {
                debug!(%generation, elapsed_ms = elapsed.as_secs_f64() * 1e3, "the team is connected");
            }
            RunEvent::GenerationFormed { generation, world_size, donor, applied, elapsed } => {
                event!(
                    info,
                    "generation_formed",
                    self,
                    generation = generation.0,
                    world_size,
                    donor = donor.as_str(),
                    applied_step = applied.0,
                    elapsed_ms = elapsed.as_secs_f64() * 1e3,
                );
                self.warn_of_small_shares(*world_size);
            }
            RunEvent::GenerationContinued { generation, world_size } => {
                event!(info, "generation_continued", self, generation = generation.0, world_size)
            }
            RunEvent::GenerationAborted { generation, cause } => {
                let (member, wait) = (cause.member(), cause.wait());
                event!(
                    warn,
                    "generation_aborted",
                    self,
                    generation = generation.0,
                    cause = cause.cause(),
                    reason = cause.to_string(),
                    worker = member.map(|(worker, _)| worker.as_str()),
                    rank = member.map(|(_, rank)| rank.0),
                    phase = wait.map(|wait| wait.phase.as_str()),
                    step = wait.map(|wait| wait.step.0),
                    waited_s = wait.map(|wait| wait.waited.as_secs_f64()),
                )
            }
            RunEvent::PretrainedLoaded { generation, file, sha256, ignored } => event!(
                info,
                "pretrained_loaded",
                self,
                generation = generation.0,
                file,
                sha256,
                ignored = ignored.join(", "),
            ),
            RunEvent::StepsLost { generation, reported, applied } => event!(
                warn,
                "steps_lost",
                self,
                generation = generation.0,
                reported_step = reported.0,
                applied_step = applied.0,
            ),
            RunEvent::EpochStarted { generation, epoch, step, samples } => {
                self.show_epoch(*epoch, *samples);
                event!(
                    info,
                    "epoch_started",
                    self,
                    generation = generation.0,
                    epoch = epoch.0,
                    step = step.0,
                    epochs,
                    samples
                );
            }
            RunEvent::Progress(report) => {
                self.show_epoch(report.epoch, report.samples);
                self.bar.update(report.cursor, report.loss, report.images_per_second, report.eta_s);
                event!(
                    info,
                    "progress",
                    self,
                    generation = report.generation.0,
                    epoch = report.epoch.0,
                    step = report.step.0,
                    epochs,
                    cursor = report.cursor,
                    samples = report.samples,
                    loss = report.loss,
                    learning_rate = report.learning_rate,
                    images_per_second = report.images_per_second,
                    eta_s = report.eta_s,
                );
            }
            RunEvent::StepSkipped { generation, epoch, step, in_epoch } => event!(
                warn,
                "step_skipped",
                self,
                generation = generation.0,
                epoch = epoch.0,
                step = step.0,
                in_epoch,
                reason = "a gradient was not finite",
            ),
            RunEvent::EpochFinished { epoch, step, samples, train_loss, images_per_second, state_digest } => {
                event!(
                    info,
                    "epoch_finished",
                    self,
                    epoch = epoch.0,
                    step = step.0,
                    epochs,
                    samples,
                    train_loss,
                    images_per_second,
                    state_digest = format!("{state_digest:016x}"),
                )
            }
            RunEvent::Validated { epoch, step, scores } => event!(
                info,
                "validated",
                self,
                epoch = epoch.0,
                step = step.0,
                epochs,
                samples = scores.samples,
                val_loss = scores.loss,
                val_accuracy = scores.accuracy,
                val_miou = scores.miou,
                val_iou_foreground = scores.class_iou[0],
                val_iou_background = scores.class_iou[1],
                val_iou_boundary = scores.class_iou[2],
            ),
            RunEvent::CheckpointCommitted { checkpoint, epoch, step, bytes, elapsed, stall_ms } => event!(
                info,
                "checkpoint_committed",
                self,
                id = checkpoint.as_str(),
                epoch = epoch.0,
                step = step.0,
                bytes,
                seconds = elapsed.as_secs_f64(),
                stall_ms,
            ),
            RunEvent::CheckpointFailed { checkpoint, reason } => {
                event!(warn, "checkpoint_failed", self, id = checkpoint.as_str(), reason)
            }
            RunEvent::DataWarning { worker, file, problem } => {
                event!(warn, "data_warning", self, worker = worker.as_str(), file, reason = problem)
            }
            RunEvent::EarlyStopped { epoch, best_epoch } => {
                event!(info, "early_stopped", self, epoch = epoch.0, best_epoch = best_epoch.0)
            }
            RunEvent::RunFinished { outcome } => {
                self.bar.finish();
                event!(
                    info,
                    "run_finished",
                    self,
                    status = status_name(outcome),
                    stopped = stopped_name(outcome),
                    epochs = outcome.epochs.0,
                    best_epoch = outcome.best_epoch.map(|epoch| epoch.0),
                    val_loss = outcome.scores.map(|s| s.loss),
                    val_accuracy = outcome.scores.map(|s| s.accuracy),
                    val_miou = outcome.scores.map(|s| s.miou),
                    images_per_second = outcome.images_per_second,
                    data_warnings = outcome.data_warnings,
                    best_weights = Some(self.weights.as_str()).filter(|file| Path::new(file).exists()),
                );
            }
            RunEvent::RunFailed { reason } => {
                self.bar.finish();
                event!(error, "run_failed", self, reason);
            }
        }
    }

    /// A resumed run begins in mid-epoch, without an event for its start.
    fn show_epoch(&mut self, epoch: Epoch, samples: u64) {
        if self.bar_epoch.replace(epoch) != Some(epoch) {
            self.bar.set_epoch(epoch.0, self.job.train.epochs, samples);
        }
    }

    /// Batch norm over few samples learns worse, and shows it late.
    fn warn_of_small_shares(&mut self, world_size: u32) {
        let share = self.job.train.global_batch / world_size.max(1);
        let model = &self.job.model;
        let small = share < SMALL_SHARE && !model.freeze_batch_norm && !model.sync_batch_norm;
        if world_size > 1 && small && !std::mem::replace(&mut self.warned, true) {
            let reason = format!(
                "batch norm sees {share} samples a rank: below {SMALL_SHARE} it learns worse; raise train.global_batch, \
                 use fewer workers, or set model.sync_batch_norm"
            );
            warn_of(&self.run, "small_shares", reason);
        }
    }
}

pub fn status_name(outcome: &Outcome) -> &'static str {
    match outcome.status {
        Status::Finished(_) => "finished",
        Status::Stopped => "stopped",
        Status::Failed { .. } => "failed",
    }
}

/// Why a run that did not fail did not go on.
pub fn stopped_name(outcome: &Outcome) -> Option<&'static str> {
    match outcome.status {
        Status::Finished(Stopped::Early) => Some("early"),
        Status::Finished(Stopped::EpochLimit) => Some("epoch_limit"),
        Status::Stopped => Some("request"),
        Status::Failed { .. } => None,
    }
}
