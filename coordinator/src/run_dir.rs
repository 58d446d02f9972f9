//! The run directory: one writer at a time, the fences that outlive a coordinator, and what a resumed
//! run starts from.
//!
//! `events.jsonl` in it belongs to telemetry, `checkpoints/` to the store.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use musher_proto::job::JobConfig;
use serde_json::Value;
use thiserror::Error;
use tracing::warn;

use crate::{
    core::{Position, ResumePoint, RunProgress, RunState},
    store::{self, CheckpointStore, Manifest, StoreError},
};

#[derive(Debug, Error)]
pub enum RunDirError {
    #[error("the run directory {} exists: continue that run with --resume, or choose another with --run-dir", .0.display())]
    Exists(PathBuf),
    #[error("there is no run to resume in {}: leave --resume out to start one", .0.display())]
    NothingToResume(PathBuf),
    #[error("another coordinator uses the run directory {}: wait for it, or end it first", .0.display())]
    InUse(PathBuf),
    #[error("cannot use the run directory {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "{} is damaged ({reason}): remove it and resume again, the checkpoints hold all that is needed",
        path.display()
    )]
    State { path: PathBuf, reason: String },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(
        "{key} is {now} in the job, but the run was started with {then}: set it back to resume, or start a new run"
    )]
    JobChanged { key: &'static str, then: String, now: String },
    #[error(
        "checkpoint {id} holds no readable progress ({reason}): it was written by another version of musher"
    )]
    Progress { id: String, reason: String },
}

/// A run directory that this process alone writes to, for as long as the value lives.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    _lock: File,
}

impl RunDir {
    /// Creates the directory, or with `resume` opens that of an earlier coordinator.
    pub fn open(path: &Path, resume: bool) -> Result<Self, RunDirError> {
        let io = |source| RunDirError::Io { path: path.to_owned(), source };
        match resume {
            true if !path.is_dir() => return Err(RunDirError::NothingToResume(path.to_owned())),
            false if Self::is_begun(path) => return Err(RunDirError::Exists(path.to_owned())),
            _ => fs::create_dir_all(path).map_err(io)?,
        }
        let lock = File::create(path.join("lock")).map_err(io)?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| RunDirError::InUse(path.to_owned()))?;
        fs::create_dir_all(path.join("samples")).map_err(io)?;
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// Whether a run has left its state there.
    pub fn is_begun(path: &Path) -> bool {
        path.join("state.json").exists()
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn events_file(&self) -> PathBuf {
        self.path.join("events.jsonl")
    }

    pub fn best_weights(&self) -> PathBuf {
        self.path.join("best.safetensors")
    }

    pub fn last_weights(&self) -> PathBuf {
        self.path.join("last.safetensors")
    }

    pub fn samples(&self) -> PathBuf {
        self.path.join("samples")
    }

    pub fn tensorboard(&self) -> PathBuf {
        self.path.join("tensorboard")
    }

    pub fn checkpoints(&self, job: &JobConfig) -> Result<CheckpointStore, StoreError> {
        CheckpointStore::open(job.checkpoint.store_path().unwrap_or_else(|| self.path.join("checkpoints")))
    }

    /// The state for a new life of the coordinator: its term is one above the last.
    pub fn next_state(&self) -> Result<RunState, RunDirError> {
        let path = self.state_file();
        let mut state: RunState = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|error| RunDirError::State { path, reason: error.to_string() })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => RunState::default(),
            Err(source) => return Err(RunDirError::Io { path, source }),
        };
        state.fences.term = state.fences.term.next();
        if state.id.is_empty() {
            state.id = hex::encode(rand::random::<[u8; 8]>());
        }
        Ok(state)
    }

    pub fn persist(&self, state: &RunState) -> Result<(), StoreError> {
        let text = serde_json::to_vec_pretty(state).expect("the state is plain data");
        store::write_atomically(&self.state_file(), &text)
    }

    fn state_file(&self) -> PathBuf {
        self.path.join("state.json")
    }
}

/// The newest complete checkpoint as a point to go on from. Generations to come are above its own, also
/// where `state.json` was lost.
///
/// States that workers still hold stay as good as they were: only a team that starts from a checkpoint
/// begins a new lineage.
pub fn resume_point(
    store: &CheckpointStore,
    job: &JobConfig,
    state: &mut RunState,
) -> Result<Option<ResumePoint>, RunDirError> {
    let latest = store.load_latest()?;
    for skipped in &latest.skipped {
        warn!(checkpoint = skipped.id.as_str(), reason = %skipped.reason, "skipping a damaged checkpoint");
    }
    let Some(manifest) = latest.manifest else {
        warn!("there is no complete checkpoint to resume from");
        return Ok(None);
    };
    check_job(&manifest, job)?;
    if state.fences.lineage < manifest.lineage {
        let generation = state.fences.generation.max(manifest.lineage).next();
        (state.fences.generation, state.fences.lineage) = (generation, generation);
    }
    let progress: RunProgress = serde_json::from_value(manifest.progress.clone())
        .map_err(|error| RunDirError::Progress { id: manifest.id.to_string(), reason: error.to_string() })?;
    Ok(Some(ResumePoint {
        position: Position {
            lineage: manifest.lineage,
            applied: manifest.applied,
            epoch: manifest.epoch,
            cursor: manifest.cursor,
        },
        checkpoint: manifest.id,
        progress,
        dataset_digest: manifest.dataset_digest,
    }))
}

/// What may not change between a run's start and its resumption.
const PINNED: [&str; 19] = [
    "seed",
    "data.val_fraction",
    "data.image_size",
    "data.normalize",
    "data.mask_resize",
    "augment.rotate_degrees",
    "augment.horizontal_flip",
    "augment.scale",
    "model.classes",
    "model.encoder",
    "model.width",
    "model.freeze_encoder",
    "model.freeze_batch_norm",
    "model.sync_batch_norm",
    "train.global_batch",
    "train.schedule",
    "train.class_weights",
    "train.dice_weight",
    "early_stopping.monitor",
];

fn check_job(manifest: &Manifest, job: &JobConfig) -> Result<(), RunDirError> {
    // What follows from other keys may not change either; a configuration that does not parse is compared as it is.
    let then = serde_json::from_value::<JobConfig>(manifest.config.clone());
    let then = then.map_or_else(|_| manifest.config.clone(), |job| plain(&job.resolved()));
    let now = plain(&job.resolved());
    let value =
        |job: &Value, key: &str| key.split('.').try_fold(job.clone(), |at, part| at.get(part).cloned());
    for key in PINNED {
        let (then, now) = (value(&then, key), value(&now, key));
        if then != now {
            let show = |value: Option<Value>| value.map_or_else(|| "absent".into(), |v| v.to_string());
            return Err(RunDirError::JobChanged { key, then: show(then), now: show(now) });
        }
    }
    Ok(())
}

fn plain(job: &JobConfig) -> Value {
    serde_json::to_value(job).expect("a job is plain data")
}
