//! Which data set a job means on this machine.

use std::path::{Path, PathBuf, absolute};

use anyhow::Context;
use musher_dataset::{DiskCacheOptions, HeldOut, Source};
use musher_proto::job::{Data, JobConfig, mebibytes};
use musher_weights::source::user_cache;

/// The job's data set, at `root` instead of where the job says if that is given.
pub fn source(job: &JobConfig, root: Option<&Path>) -> anyhow::Result<Source> {
    let data = &job.data;
    let root = root.map_or_else(|| data.root_path(), PathBuf::from);
    Ok(Source {
        root: whole(root),
        train_split: data.train_split.clone(),
        val_split: data.val_split.clone(),
        held_out: (data.val_fraction > 0.0)
            .then_some(HeldOut { fraction: data.val_fraction, seed: job.seed }),
        disk_cache: disk_cache(data)?,
        store: None,
    })
}

/// For messages: whoever reads them may be in another directory. An object store's URL is whole as it is.
fn whole(root: PathBuf) -> PathBuf {
    match root.to_string_lossy().contains("://") {
        true => root,
        false => absolute(&root).unwrap_or(root),
    }
}

fn disk_cache(data: &Data) -> anyhow::Result<Option<DiskCacheOptions>> {
    if data.disk_cache_mb == 0 {
        return Ok(None);
    }
    let directory = match data.disk_cache_dir.as_str() {
        "" => user_cache().map(|musher| musher.join("data")).context(
            "there is no place for data.disk_cache_mb: set data.disk_cache_dir, XDG_CACHE_HOME or HOME",
        )?,
        named => named.into(),
    };
    Ok(Some(DiskCacheOptions { directory, budget_bytes: mebibytes(data.disk_cache_mb) as u64 }))
}
