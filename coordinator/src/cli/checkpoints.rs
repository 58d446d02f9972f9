//! `musher checkpoints`: look at a run's checkpoints, prove that they are whole, make room, take weights out.

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use bytesize::ByteSize;
use clap::{Args, Subcommand};
use musher_proto::ids::CheckpointId;
use serde_json::{Value, json};

use super::{Exit, Failure, usage};
use crate::{
    run_dir::{RunDir, checkpoints_in},
    store::{CheckpointStore, Listing, Manifest, WEIGHTS},
};

#[derive(Debug, Subcommand)]
pub enum Checkpoints {
    /// Show what checkpoints there are, newest first
    List(List),
    /// Read every byte, and compare it with what was written
    Verify(Verify),
    /// Remove all but the newest and the best
    Prune(Prune),
    /// Write a checkpoint's weights as a file of their own
    Export(Export),
}

#[derive(Debug, Args)]
struct Place {
    /// A run directory, a directory of checkpoints, or the URL of an object store
    #[arg(value_name = "PLACE")]
    place: String,
}

#[derive(Debug, Args)]
pub struct List {
    #[command(flatten)]
    at: Place,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub struct Verify {
    #[command(flatten)]
    at: Place,
    /// Only this one
    #[arg(value_name = "ID")]
    id: Option<String>,
}

#[derive(Debug, Args)]
pub struct Prune {
    #[command(flatten)]
    at: Place,
    /// Newest checkpoints to keep besides the best
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    keep: u32,
    /// Say what would be removed, and remove nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Args)]
pub struct Export {
    #[command(flatten)]
    at: Place,
    /// A checkpoint's name, `best`, or `last`: the newest that has a weights file
    #[arg(value_name = "ID")]
    id: String,
    /// Where the weights go; a file that is there is replaced
    #[arg(value_name = "FILE.safetensors")]
    file: PathBuf,
}

impl Checkpoints {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        match self {
            Checkpoints::List(list) => list.run(),
            Checkpoints::Verify(verify) => verify.run(),
            Checkpoints::Prune(prune) => prune.run(),
            Checkpoints::Export(export) => export.run(),
        }
    }
}

impl Place {
    fn open(&self) -> Result<CheckpointStore, Failure> {
        let place = &self.place;
        if musher_store::is_url(place) {
            return CheckpointStore::connect(place, &musher_store::environment()).map_err(usage);
        }
        let dir = PathBuf::from(place.strip_prefix("file://").unwrap_or(place));
        let inside = checkpoints_in(&dir);
        if inside.is_dir() {
            return CheckpointStore::look_at(inside).map_err(usage);
        }
        if RunDir::is_begun(&dir) {
            let elsewhere = "its run keeps its checkpoints elsewhere, so name its checkpoint.store";
            return Err(usage(anyhow!("there are no checkpoints in {}: {elsewhere}", dir.display())));
        }
        if !dir.is_dir() {
            let what = "name a run directory, a directory of checkpoints, or an object store's URL";
            return Err(usage(anyhow!("there is no directory {}: {what}", dir.display())));
        }
        CheckpointStore::look_at(dir).map_err(usage)
    }
}

impl List {
    fn run(self) -> Result<Exit, Failure> {
        let listing = self.at.open()?.scan()?;
        match self.json {
            true => println!("{:#}", as_json(&listing)),
            false => print!("{}", as_text(&listing)),
        }
        Ok(Exit::Finished)
    }
}

impl Verify {
    fn run(self) -> Result<Exit, Failure> {
        let store = self.at.open()?;
        let Listing { mut manifests, mut skipped } = store.scan()?;
        if let Some(id) = &self.id {
            manifests.retain(|manifest| manifest.id.as_str() == id);
            skipped.retain(|skipped| skipped.id.as_str() == id);
            if manifests.is_empty() && skipped.is_empty() {
                return Err(unknown(id, &store));
            }
        }
        let mut damaged = skipped.len();
        for skipped in skipped {
            println!("{}  DAMAGED  {}", skipped.id, skipped.reason);
        }
        for manifest in manifests {
            let damages = store.damages(&manifest);
            if damages.is_empty() {
                println!("{}  ok       {}", manifest.id, size(&manifest));
            }
            damaged += usize::from(!damages.is_empty());
            for damage in damages {
                println!("{}  DAMAGED  {damage}", manifest.id);
            }
        }
        Ok(if damaged == 0 { Exit::Finished } else { Exit::Failed })
    }
}

impl Prune {
    fn run(self) -> Result<Exit, Failure> {
        let store = self.at.open()?;
        let manifests = store.list()?;
        let best = best_of(&manifests).cloned();
        let keep = self.keep as usize;
        let (told, gone) = match self.dry_run {
            true => ("would remove", store.surplus(keep, best.as_ref())?),
            false => ("removed", store.prune(keep, best.as_ref())?),
        };
        gone.iter().for_each(|id| println!("{told} {id}"));
        if gone.is_empty() {
            println!("there is nothing to remove");
        }
        Ok(Exit::Finished)
    }
}

impl Export {
    fn run(self) -> Result<Exit, Failure> {
        let store = self.at.open()?;
        let manifests = store.list()?;
        let id = match self.id.as_str() {
            "best" => best_of(&manifests).cloned().ok_or_else(|| {
                usage(anyhow!("no checkpoint in {} is the best yet: name one by its id", store.name()))
            })?,
            "last" => {
                manifests.iter().find(|it| has_weights(it)).map(|it| it.id.clone()).ok_or_else(|| {
                    usage(anyhow!("no checkpoint in {} has a weights file yet", store.name()))
                })?
            }
            id => CheckpointId(id.to_owned()),
        };
        let manifest = manifests
            .iter()
            .find(|manifest| manifest.id == id)
            .ok_or_else(|| unknown(id.as_str(), &store))?;
        if !has_weights(manifest) {
            let others: Vec<_> =
                manifests.iter().filter(|it| has_weights(it)).map(|it| it.id.as_str()).collect();
            let others = if others.is_empty() { "none here has yet".into() } else { others.join(", ") };
            return Err(usage(anyhow!(
                "checkpoint {id} holds a state to train on from, and no weights file; those that were the best \
                 or the last have one: {others}"
            )));
        }
        // Who opens the file elsewhere has no digest to compare it with.
        store.verify(&id)?;
        copy(&store, &id, &self.file)?;
        println!("{}: the weights of {id}, after epoch {}", self.file.display(), manifest.epoch);
        Ok(Exit::Finished)
    }
}

fn unknown(id: &str, store: &CheckpointStore) -> Failure {
    let place = store.name();
    usage(anyhow!("there is no checkpoint {id} in {place}; `musher checkpoints list` shows them"))
}

/// As the log of a run has it.
fn size(manifest: &Manifest) -> String {
    ByteSize::b(manifest.bytes()).display().si().to_string()
}

fn copy(store: &CheckpointStore, id: &CheckpointId, to: &Path) -> anyhow::Result<()> {
    store.copy_out(id, WEIGHTS, to).with_context(|| format!("the weights of {id} were not written"))
}

/// As the newest checkpoint tells it.
fn best_of(manifests: &[Manifest]) -> Option<&CheckpointId> {
    manifests.first()?.best.as_ref().map(|best| &best.checkpoint)
}

fn has_weights(manifest: &Manifest) -> bool {
    manifest.files.iter().any(|file| file.file == WEIGHTS)
}

fn as_json(Listing { manifests, skipped }: &Listing) -> Value {
    let best = best_of(manifests);
    let readable = manifests.iter().map(|manifest| {
        json!({
            "id": manifest.id,
            "run": manifest.run,
            "epoch": manifest.epoch.0,
            "step": manifest.applied.0,
            "bytes": manifest.bytes(),
            "parts": manifest.parts.len(),
            "world_size": manifest.world_size,
            "created_unix_ms": manifest.created_unix_ms,
            "best": Some(&manifest.id) == best,
            "weights": has_weights(manifest),
        })
    });
    let damaged = skipped.iter().map(|it| json!({"id": it.id, "damaged": it.reason.to_string()}));
    readable.chain(damaged).collect()
}

fn as_text(Listing { manifests, skipped }: &Listing) -> String {
    if manifests.is_empty() && skipped.is_empty() {
        return "there are no checkpoints\n".into();
    }
    let best = best_of(manifests);
    let width = manifests.iter().map(|it| &it.id).chain(skipped.iter().map(|it| &it.id));
    let width = width.map(|id| id.as_str().len()).max().unwrap_or_default();
    let mut text =
        format!("{:width$}  {:>5}  {:>8}  {:>10}  {:>5}\n", "CHECKPOINT", "EPOCH", "STEP", "SIZE", "PARTS");
    for manifest in manifests {
        let size = size(manifest);
        let (epoch, step, parts) = (manifest.epoch.0, manifest.applied.0, manifest.parts.len());
        let notes = match (Some(&manifest.id) == best, has_weights(manifest)) {
            (true, _) => "  best",
            (false, true) => "  with weights",
            (false, false) => "",
        };
        text += &format!(
            "{:width$}  {epoch:>5}  {step:>8}  {size:>10}  {parts:>5}{notes}\n",
            manifest.id.as_str()
        );
    }
    for damaged in skipped {
        text += &format!("{:width$}  DAMAGED  {}\n", damaged.id.as_str(), damaged.reason);
    }
    text
}
