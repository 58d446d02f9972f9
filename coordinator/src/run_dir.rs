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
use musher_store::Variables;
use serde_json::Value;
use thiserror::Error;

use crate::{
    core::{Position, ResumePoint, RunProgress, RunState},
    store::{self, CheckpointStore, Manifest, Owner, StoreError},
    telemetry::warn_of,
};

#[derive(Debug, Error)]
pub enum RunDirError {
    #[error("the run directory {} exists: continue that run with --resume, or choose another with --run-dir", .0.display())]
    Exists(PathBuf),
    #[error("there is no run to resume in {}: name its directory with --run-dir, or leave --resume out to start one", .0.display())]
    NothingToResume(PathBuf),
    #[error(
        "{0} holds the checkpoints of a run already: continue that one with --resume, or give this one another checkpoint.store"
    )]
    StoreInUse(String),
    #[error(
        "{place} holds checkpoints of another run than {}: give the job the checkpoint.store that this run began with, or the run directory that goes with that store",
        path.display()
    )]
    OtherRun { place: String, path: PathBuf },
    #[error("the run directory {} is a file: name a directory with --run-dir", .0.display())]
    IsFile(PathBuf),
    #[error("another coordinator uses the run directory {}: wait for it, or end it first", .0.display())]
    InUse(PathBuf),
    #[error("cannot use the run directory {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "{} is damaged ({reason}): remove it and resume again, the checkpoints hold all that is needed",
        path.display()
    )]
    State { path: PathBuf, reason: String },
    #[error(
        "none of the {count} checkpoints in {place} is intact ({reason}): put a good copy back, or start a new run in \
         another --run-dir"
    )]
    NothingIntact { place: String, count: usize, reason: String },
    #[error(
        "checkpoint {best} was saved, but {place} holds none any more: put it back, or start a new run in another \
         --run-dir"
    )]
    NothingLeft { place: String, best: String },
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

/// What a run directory is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    Start,
    Resume,
    /// The checkpoints lie elsewhere, and are what counts: the directory itself may be new.
    ResumeFromElsewhere,
}

impl RunDir {
    pub fn open(path: &Path, opening: Opening) -> Result<Self, RunDirError> {
        let io = |source| RunDirError::Io { path: path.to_owned(), source };
        if path.is_file() {
            return Err(RunDirError::IsFile(path.to_owned()));
        }
        match opening {
            Opening::Resume if !Self::holds_a_run(path) => {
                return Err(RunDirError::NothingToResume(path.to_owned()));
            }
            Opening::Start if Self::is_begun(path) => return Err(RunDirError::Exists(path.to_owned())),
            _ => fs::create_dir_all(path).map_err(io)?,
        }
        let lock = File::create(path.join("lock")).map_err(io)?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|error| {
            match error {
                rustix::io::Errno::WOULDBLOCK => RunDirError::InUse(path.to_owned()),
                other => io(other.into()),
            }
        })?;
        fs::create_dir_all(path.join("samples")).map_err(io)?;
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// Whether a run has left its state there.
    pub fn is_begun(path: &Path) -> bool {
        path.join("state.json").exists()
    }

    /// A state may be lost where checkpoints are not.
    fn holds_a_run(path: &Path) -> bool {
        Self::is_begun(path) || checkpoints_in(path).is_dir()
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

    /// Where the checkpoints are, unless the job says otherwise.
    pub fn checkpoints(&self) -> Result<CheckpointStore, StoreError> {
        CheckpointStore::open(checkpoints_in(&self.path))
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

/// Where the run in `dir` keeps its checkpoints, unless its job says otherwise.
pub fn checkpoints_in(dir: &Path) -> PathBuf {
    dir.join("checkpoints")
}

/// The store that the job names; `None` where it leaves the checkpoints to the run directory.
pub fn named_store(job: &JobConfig, variables: &Variables) -> Result<Option<CheckpointStore>, StoreError> {
    let store = &job.checkpoint.store;
    match job.checkpoint.store_path() {
        _ if musher_store::is_url(store) => CheckpointStore::connect(store, variables).map(Some),
        Some(dir) => CheckpointStore::open(dir).map(Some),
        None => Ok(None),
    }
}

/// Makes this coordinator the one that writes checkpoints, and `state` that of the run whose they are.
///
/// The run directory's lock keeps a second coordinator out of this directory, but not out of a store that both
/// reach. There the newest term is the one that counts; it is above `state`'s and above the store's.
pub fn take_over(
    store: &CheckpointStore,
    run_dir: &RunDir,
    job: &JobConfig,
    opening: Opening,
    state: &mut RunState,
) -> Result<(), RunDirError> {
    let place = store.name();
    if opening == Opening::Start && !store.is_empty()? {
        return Err(RunDirError::StoreInUse(place));
    }
    if let Some(owner) = store.owner()? {
        state.fences.term = state.fences.term.max(owner.term.next());
        let is_begun = RunDir::is_begun(run_dir.path());
        match opening {
            // It never came to a checkpoint.
            Opening::Start => {}
            _ if !is_begun => state.id = owner.run_id,
            _ if state.id == owner.run_id => {}
            _ => return Err(RunDirError::OtherRun { place, path: run_dir.path().to_owned() }),
        }
    }
    let (run, run_id, term) = (job.name.clone(), state.id.clone(), state.fences.term);
    Ok(store.take_over(Owner { run, run_id, term })?)
}

/// The newest complete checkpoint as a point to go on from. Generations to come are above its own, also
/// where `state.json` was lost.
///
/// States that workers still hold stay as good as they were: only a team that starts from a checkpoint
/// begins a new lineage.
pub fn resume_point(
    store: &CheckpointStore,
    run_dir: &RunDir,
    job: &JobConfig,
    state: &mut RunState,
) -> Result<Option<ResumePoint>, RunDirError> {
    let latest = store.load_latest()?;
    let Some(manifest) = latest.manifest else {
        // To start anew here would write over what may be mended, and over the best weights.
        if let Some(first) = latest.skipped.first() {
            let (place, reason) = (store.name(), first.reason.to_string());
            return Err(RunDirError::NothingIntact { place, count: latest.skipped.len(), reason });
        }
        if let Some(best) = &state.progress.saved_best {
            return Err(RunDirError::NothingLeft { place: store.name(), best: best.checkpoint.to_string() });
        }
        warn_of(
            &job.name,
            "no_checkpoint",
            "there is no complete checkpoint to resume from: the run begins anew",
        );
        return Ok(None);
    };
    check_job(&manifest, job)?;
    for skipped in &latest.skipped {
        let reason = format!("checkpoint {} is skipped: {}", skipped.id, skipped.reason);
        warn_of(&job.name, "checkpoint_damaged", reason);
    }
    if state.fences.lineage < manifest.lineage {
        let generation = state.fences.generation.max(manifest.lineage).next();
        (state.fences.generation, state.fences.lineage) = (generation, generation);
    }
    let progress: RunProgress = serde_json::from_value(manifest.progress.clone())
        .map_err(|error| RunDirError::Progress { id: manifest.id.to_string(), reason: error.to_string() })?;
    fetch_best(store, run_dir, &progress, &job.name);
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

/// A run directory that is new, where the checkpoints lie elsewhere, has no best weights yet; one whose disk was full
/// may have an earlier epoch's.
fn fetch_best(store: &CheckpointStore, run_dir: &RunDir, progress: &RunProgress, run: &str) {
    let Some(best) = &progress.saved_best else { return };
    let (id, place) = (&best.checkpoint, run_dir.best_weights());
    let fetched = match store.is_copy(id, store::WEIGHTS, &place) {
        Ok(true) => Ok(()),
        Ok(false) => store.copy_out(id, store::WEIGHTS, &place),
        Err(error) => Err(error),
    };
    if let Err(error) = fetched {
        let reason = format!("the best epoch's weights, of checkpoint {id}, could not be fetched: {error}");
        warn_of(run, "weights_missing", reason);
    }
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
    for (key, then, now) in changed_recipe(&then, &now) {
        let reason = format!("the run goes on with {key} = {now}, and began with {then}");
        warn_of(&job.name, "recipe_changed", reason);
    }
    Ok(())
}

/// Keys of the sections that decide what is learned, with their values then and now, where these differ.
fn changed_recipe(then: &Value, now: &Value) -> Vec<(String, Value, Value)> {
    let mut changed = Vec::new();
    for section in ["augment", "model", "train", "early_stopping"] {
        let Some(keys) = now[section].as_object() else { continue };
        for (key, now) in keys {
            let then = &then[section][key];
            if then != now {
                changed.push((format!("{section}.{key}"), then.clone(), now.clone()));
            }
        }
    }
    changed
}

fn plain(job: &JobConfig) -> Value {
    serde_json::to_value(job).expect("a job is plain data")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_names_what_may_not_change() {
        let text = include_str!("../../docs/checkpoints.md");
        for key in PINNED {
            assert!(text.contains(&format!("`{key}`")), "{key} is not in docs/checkpoints.md");
        }
    }

    #[test]
    fn what_changed_of_the_recipe_is_named_and_nothing_else() {
        let (then, mut now) = (JobConfig::default(), JobConfig::default());
        (now.train.learning_rate, now.cluster.workers) = (0.5, 7);
        let changed = changed_recipe(&plain(&then), &plain(&now));
        let rate = serde_json::json!(then.train.learning_rate);
        assert_eq!(changed, [("train.learning_rate".into(), rate, serde_json::json!(0.5))]);
    }
}
