//! `Control`: status, stop and drain, for people and their tools.

use musher_proto::{
    ids::WorkerId,
    wire::{self, control_server},
};
use tonic::{Request, Response, Status};

use super::Handle;
use crate::core::{Event, RunStatus};

#[derive(Debug)]
pub(super) struct Control {
    handle: Handle,
}

impl Control {
    pub fn new(handle: Handle) -> Self {
        Self { handle }
    }
}

#[tonic::async_trait]
impl control_server::Control for Control {
    async fn status(&self, _: Request<wire::StatusRequest>) -> Result<Response<wire::StatusReply>, Status> {
        let status = self.handle.status().await.ok_or_else(|| Status::unavailable("the run has ended"))?;
        Ok(Response::new(reply(status)))
    }

    async fn stop(&self, _: Request<wire::StopRequest>) -> Result<Response<wire::StopReply>, Status> {
        self.handle.tell(Event::StopRequested).await;
        Ok(Response::new(wire::StopReply {}))
    }

    async fn drain(
        &self,
        request: Request<wire::DrainRequest>,
    ) -> Result<Response<wire::DrainReply>, Status> {
        let worker = WorkerId(request.into_inner().worker);
        let status = self.handle.status().await.ok_or_else(|| Status::unavailable("the run has ended"))?;
        if !status.peers.iter().any(|peer| peer.worker == worker) {
            let known: Vec<_> = status.peers.iter().map(|peer| peer.worker.as_str()).collect();
            let there = if known.is_empty() { "is none".into() } else { format!("are {}", known.join(", ")) };
            return Err(Status::not_found(format!("no worker {worker} here; there {there}")));
        }
        self.handle.tell(Event::DrainRequested { worker }).await;
        Ok(Response::new(wire::DrainReply {}))
    }
}

fn reply(status: RunStatus) -> wire::StatusReply {
    let (progress, cursor) = (status.progress, status.cursor());
    wire::StatusReply {
        epoch: status.epoch().0,
        applied: status.applied().0,
        team_size: status.team_size() as u32,
        run: status.run,
        phase: status.phase.as_str().into(),
        term: status.term.0,
        generation: status.generation.0,
        epochs: status.epochs,
        cursor,
        train_samples: status.train_samples,
        loss: progress.map_or(f64::NAN, |p| p.loss),
        images_per_second: progress.map_or(0.0, |p| p.images_per_second),
        best_epoch: status.best.map(|best| best.epoch.0),
        best_value: status.best.and_then(|best| best.value),
        last_trouble: status.last_trouble,
        learning_rate: status.learning_rate,
        eta_s: status.eta_s,
        monitor: status.monitor.as_str().into(),
        workers: status
            .peers
            .into_iter()
            .map(|peer| wire::WorkerStatus {
                worker: peer.worker.0,
                rank: peer.rank.map(|rank| rank.0),
                host: peer.host,
                device: peer.device,
                phase: peer.doing,
                doing_ms: peer.doing_for.as_millis() as u64,
                applied: peer.progress.map(|p| p.applied.0),
                step_ms: peer.progress.map(|p| p.step_ms),
                data_wait_ms: peer.progress.map(|p| p.waits.data_ms),
                peers_wait_ms: peer.progress.map(|p| p.waits.peers_ms),
                silent_ms: peer.silent.as_millis() as u64,
                health: peer.health.as_str().into(),
            })
            .collect(),
    }
}
