//! State between this worker and the coordinator's store: parts up, a checkpoint down.

use std::sync::mpsc::SyncSender;

use musher_proto::{
    ids::{CheckpointId, Term, WorkerId},
    message::{PartHeader, PartKind},
    wire::{self, checkpoints_client::CheckpointsClient, upload_chunk::Body},
};
use musher_security::Link;
use tokio_stream as stream;
use tonic::Status;

use crate::train::Snapshot;

const CHUNK: usize = 1 << 20;

/// Uploads a slice of the state with its digest, and the weights file where there is one.
pub async fn upload(
    channel: Link,
    term: Term,
    worker: WorkerId,
    checkpoint: CheckpointId,
    snapshot: Snapshot,
) -> Result<(), Status> {
    let mut client = CheckpointsClient::new(channel);
    let digest = tokio::task::block_in_place(|| snapshot.digest());
    let Snapshot { held, offset, bytes, weights, stall_ms } = snapshot;
    let header = |kind, length: usize| PartHeader {
        term,
        worker: worker.clone(),
        checkpoint: checkpoint.clone(),
        lineage: held.lineage,
        applied: held.applied,
        kind,
        length: length as u64,
        stall_ms,
    };
    let state = header(PartKind::State { offset, digest }, bytes.len());
    send(&mut client, state, bytes).await?;
    if let Some(weights) = weights {
        send(&mut client, header(PartKind::Weights, weights.len()), weights).await?;
    }
    Ok(())
}

async fn send(
    client: &mut CheckpointsClient<Link>,
    header: PartHeader,
    bytes: Vec<u8>,
) -> Result<(), Status> {
    let bytes = bytes::Bytes::from(bytes);
    let first = wire::UploadChunk { body: Some(Body::Header(header.into())) };
    let chunks = (0..bytes.len()).step_by(CHUNK).map(move |start| {
        let data = bytes.slice(start..(start + CHUNK).min(bytes.len()));
        wire::UploadChunk { body: Some(Body::Chunk(wire::Chunk { data })) }
    });
    client.upload(stream::iter(std::iter::once(first).chain(chunks))).await?;
    Ok(())
}

/// Hands a checkpoint's bytes to the training thread as they come; the last item is the error that cut
/// them short, if one did.
pub async fn download(channel: Link, checkpoint: CheckpointId, chunks: SyncSender<Result<Vec<u8>, String>>) {
    let mut client = CheckpointsClient::new(channel);
    let request = wire::DownloadRequest { checkpoint: checkpoint.0 };
    let hand_over = |chunk| tokio::task::block_in_place(|| chunks.send(chunk)).is_ok();
    let mut inbound = match client.download(request).await {
        Ok(response) => response.into_inner(),
        Err(status) => {
            hand_over(Err(status.message().to_owned()));
            return;
        }
    };
    loop {
        let goes_on = match inbound.message().await {
            Ok(Some(chunk)) => hand_over(Ok(chunk.data.into())),
            Ok(None) => false,
            Err(status) => {
                hand_over(Err(status.message().to_owned()));
                false
            }
        };
        if !goes_on {
            return;
        }
    }
}
