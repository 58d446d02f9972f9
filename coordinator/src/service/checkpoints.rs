//! `Checkpoints.Upload` and `Download`: replicas' state between workers and the store.

use std::{
    collections::BTreeMap,
    io::Read,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use musher_proto::{
    ids::{CheckpointId, Generation, Term},
    job::JobConfig,
    message::{PartHeader, PartKind},
    wire::{self, checkpoints_server, upload_chunk::Body},
};
use tokio::{
    sync::{Semaphore, mpsc},
    task, time,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::Handle;
use crate::{
    core::{Commit, Event},
    run_dir::RunDir,
    store::{
        Best, CheckpointStore, FileWriter, MANIFEST_VERSION, Manifest, Part, PartWriter, PendingCheckpoint,
        StoreError, StoredFile, WEIGHTS,
    },
    telemetry::warn_of,
};

/// Between two chunks of an upload, or until one of a download is taken.
const STALL: Duration = Duration::from_secs(60);
const DOWNLOAD_CHUNK: usize = 1 << 20;
/// Chunks read ahead of a download: enough to keep disk and network both busy.
const DOWNLOAD_AHEAD: usize = 4;

/// States that are read at once; the others wait.
const DOWNLOADS: usize = 8;

/// Parts that are written at once; the others wait. Each occupies a thread, and on its way to an object store
/// some 24 MiB.
const UPLOADS: usize = 8;

/// The checkpoints that parts may come for.
#[derive(Debug)]
pub(super) struct Uploads {
    store: CheckpointStore,
    open: Mutex<BTreeMap<CheckpointId, Open>>,
    /// `best.safetensors` could not be written, and is an earlier epoch's or none.
    best_is_owed: AtomicBool,
}

/// A checkpoint that parts may come for.
#[derive(Debug)]
pub(super) struct Open {
    /// Parts of an earlier attempt under the same name are refused.
    lineage: Generation,
    pending: PendingCheckpoint,
    parts: Vec<Part>,
    files: Vec<StoredFile>,
}

impl Uploads {
    pub fn new(store: CheckpointStore) -> Self {
        Self { store, open: Mutex::default(), best_is_owed: AtomicBool::new(false) }
    }

    pub fn open(&self, id: &CheckpointId, lineage: Generation, state_bytes: u64) -> Result<(), StoreError> {
        drop(self.abandon(id));
        let pending = self.store.begin(id, state_bytes)?;
        self.lock().insert(id.clone(), Open { lineage, pending, parts: Vec::new(), files: Vec::new() });
        Ok(())
    }

    /// What is left of it, if it was open: dropping that removes its files, which takes a while.
    pub fn abandon(&self, id: &CheckpointId) -> Option<Open> {
        self.lock().remove(id)
    }

    /// Makes the checkpoint visible, updates the run's weights files, and prunes older checkpoints.
    /// Returns its size in bytes.
    pub fn commit(&self, commit: &Commit, job: &JobConfig, run_dir: &RunDir) -> Result<u64, StoreError> {
        let id = &commit.checkpoint;
        let open = self.lock().remove(id).ok_or_else(|| StoreError::WrongCheckpoint {
            expected: id.to_string(),
            found: "one that is not open".into(),
        })?;
        let manifest = manifest(commit, job, open.parts, open.files);
        let bytes = manifest.bytes();
        open.pending.commit(&manifest)?;
        // From here on the checkpoint stands, whatever becomes of the rest.
        self.tidy_up(commit, job, run_dir);
        Ok(bytes)
    }

    fn tidy_up(&self, commit: &Commit, job: &JobConfig, run_dir: &RunDir) {
        let id = &commit.checkpoint;
        let best = commit.progress.saved_best.as_ref().map(|best| &best.checkpoint);
        if let Some(best) = best.filter(|_| commit.is_best || self.best_is_owed.load(Ordering::Relaxed)) {
            let copied = self.store.copy_out(best, WEIGHTS, &run_dir.best_weights());
            self.best_is_owed.store(copied.is_err(), Ordering::Relaxed);
            if let Err(error) = copied {
                let reason = format!(
                    "best.safetensors is not that of checkpoint {best} yet: {error}; the next one, or --resume, tries again"
                );
                warn_of(&job.name, "weights_missing", reason);
            }
        }
        if commit.is_last
            && let Err(error) = self.store.copy_out(id, WEIGHTS, &run_dir.last_weights())
        {
            let reason =
                format!("checkpoint {id} is complete, but last.safetensors was not written: {error}");
            warn_of(&job.name, "weights_missing", reason);
        }
        if let Err(error) = self.store.prune(job.checkpoint.keep as usize, best) {
            let reason = format!("checkpoint {id} is complete, but older ones could not be removed: {error}");
            warn_of(&job.name, "not_pruned", reason);
        }
    }

    fn writer(&self, header: &PartHeader) -> Result<Writer, Status> {
        let mut open = self.lock();
        let open = open_for(&mut open, header)?;
        Ok(match header.kind {
            PartKind::State { offset, digest } => {
                Writer::State(open.pending.part(offset, header.length).map_err(refused)?, digest)
            }
            PartKind::Weights => Writer::Weights(open.pending.file(WEIGHTS, header.length).map_err(refused)?),
        })
    }

    /// Makes the part durable and takes note of it.
    fn finish(&self, header: &PartHeader, writer: Writer) -> Result<(), Status> {
        enum Stored {
            Part(Part),
            File(StoredFile),
        }
        let stored = match writer {
            Writer::State(writer, digest) => Stored::Part(writer.finish(digest).map_err(refused)?),
            Writer::Weights(writer) => Stored::File(writer.finish().map_err(refused)?),
        };
        let mut open = self.lock();
        let open = open_for(&mut open, header)?;
        match stored {
            // A part that is sent again replaces its file.
            Stored::Part(part) => {
                open.parts.retain(|former| former.file != part.file);
                open.parts.push(part);
            }
            Stored::File(file) => {
                open.files.retain(|former| former.file != file.file);
                open.files.push(file);
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<CheckpointId, Open>> {
        self.open.lock().expect("no holder of this lock panics")
    }
}

fn open_for<'a>(
    open: &'a mut BTreeMap<CheckpointId, Open>,
    header: &PartHeader,
) -> Result<&'a mut Open, Status> {
    let id = &header.checkpoint;
    open.get_mut(id).filter(|open| open.lineage == header.lineage).ok_or_else(|| {
        let lineage = header.lineage;
        Status::failed_precondition(format!(
            "checkpoint {id} of generation {lineage} is not open, it was abandoned or is unknown"
        ))
    })
}

enum Writer {
    State(PartWriter, u64),
    Weights(FileWriter),
}

impl Writer {
    fn write(&mut self, bytes: &[u8]) -> Result<(), Status> {
        match self {
            Writer::State(writer, _) => writer.write(bytes),
            Writer::Weights(writer) => writer.write(bytes),
        }
        .map_err(refused)
    }
}

fn refused(error: StoreError) -> Status {
    match error {
        StoreError::DiskFull { .. } => Status::resource_exhausted(error.to_string()),
        _ => Status::internal(error.to_string()),
    }
}

fn manifest(commit: &Commit, job: &JobConfig, parts: Vec<Part>, files: Vec<StoredFile>) -> Manifest {
    let best = commit.progress.saved_best.as_ref();
    Manifest {
        version: MANIFEST_VERSION,
        id: commit.checkpoint.clone(),
        run: job.name.clone(),
        created_unix_ms: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_millis() as u64),
        state_bytes: commit.state_bytes,
        state_digest: commit.state_digest,
        parts,
        files,
        lineage: commit.position.lineage,
        applied: commit.position.applied,
        epoch: commit.position.epoch,
        cursor: commit.position.cursor,
        seed: job.seed,
        world_size: commit.world_size,
        dataset_digest: commit.dataset_digest.clone(),
        config: serde_json::to_value(job).expect("a job is plain data"),
        progress: serde_json::to_value(&commit.progress).expect("progress is plain data"),
        best: best.map(|best| Best { checkpoint: best.checkpoint.clone(), epoch: best.epoch }),
    }
}

#[derive(Debug)]
pub(super) struct Checkpoints {
    handle: Handle,
    uploads: Arc<Uploads>,
    places: Semaphore,
    downloads: Arc<Semaphore>,
    term: Term,
}

impl Checkpoints {
    pub fn new(handle: Handle, uploads: Arc<Uploads>, term: Term) -> Self {
        Self {
            handle,
            uploads,
            places: Semaphore::new(UPLOADS),
            downloads: Arc::new(Semaphore::new(DOWNLOADS)),
            term,
        }
    }

    async fn receive(
        &self,
        header: &PartHeader,
        mut inbound: Streaming<wire::UploadChunk>,
    ) -> Result<(), Status> {
        let _place = self.places.acquire().await.expect("nobody closes it");
        let mut writer = task::block_in_place(|| self.uploads.writer(header))?;
        while let Some(wire::UploadChunk { body }) = soon(inbound.message()).await? {
            let Some(Body::Chunk(chunk)) = body else {
                return Err(Status::invalid_argument("an upload has one header, then chunks"));
            };
            task::block_in_place(|| writer.write(&chunk.data))?;
        }
        task::block_in_place(|| self.uploads.finish(header, writer))
    }
}

/// `None` at the end.
fn next_chunk(state: &mut impl Read, id: &CheckpointId) -> Option<Result<wire::Chunk, Status>> {
    let mut data = Vec::with_capacity(DOWNLOAD_CHUNK);
    match state.take(DOWNLOAD_CHUNK as u64).read_to_end(&mut data) {
        Ok(0) => None,
        Ok(_) => Some(Ok(wire::Chunk { data: data.into() })),
        Err(error) => Some(Err(Status::data_loss(format!("checkpoint {id} could not be read: {error}")))),
    }
}

/// An upload that stands still is given up.
async fn soon<T>(message: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let stalled = |_| Status::deadline_exceeded(format!("nothing came for {} s", STALL.as_secs()));
    time::timeout(STALL, message).await.map_err(stalled)?
}

#[tonic::async_trait]
impl checkpoints_server::Checkpoints for Checkpoints {
    async fn upload(
        &self,
        request: Request<Streaming<wire::UploadChunk>>,
    ) -> Result<Response<wire::UploadReceipt>, Status> {
        let mut inbound = request.into_inner();
        let Some(wire::UploadChunk { body: Some(Body::Header(header)) }) = soon(inbound.message()).await?
        else {
            return Err(Status::invalid_argument("an upload begins with its header"));
        };
        let header =
            PartHeader::try_from(header).map_err(|error| Status::invalid_argument(error.to_string()))?;
        if header.term != self.term {
            return Err(Status::failed_precondition(format!(
                "the upload is of term {}, this is {}",
                header.term, self.term
            )));
        }
        match self.receive(&header, inbound).await {
            Ok(()) => {
                self.handle.tell(Event::PartStored { header }).await;
                Ok(Response::new(wire::UploadReceipt {}))
            }
            Err(status) => {
                let reason = status.message().to_owned();
                self.handle.tell(Event::PartFailed { header, reason }).await;
                Err(status)
            }
        }
    }

    type DownloadStream = ReceiverStream<Result<wire::Chunk, Status>>;

    async fn download(
        &self,
        request: Request<wire::DownloadRequest>,
    ) -> Result<Response<Self::DownloadStream>, Status> {
        let id = CheckpointId(request.into_inner().checkpoint);
        let place = self.downloads.clone().acquire_owned().await.expect("nobody closes it");
        let mut reader = task::block_in_place(|| self.uploads.store.open_state(&id))
            .map_err(|error| Status::not_found(error.to_string()))?;
        let (sender, chunks) = mpsc::channel(DOWNLOAD_AHEAD);
        tokio::spawn(async move {
            while let Some(chunk) = task::block_in_place(|| next_chunk(&mut reader, &id)) {
                let failed = chunk.is_err();
                // Whoever takes nothing for so long has gone, or means no good.
                if !matches!(time::timeout(STALL, sender.send(chunk)).await, Ok(Ok(()))) || failed {
                    break;
                }
            }
            drop(place);
        });
        Ok(Response::new(ReceiverStream::new(chunks)))
    }
}
