//! Which data set a job means on this machine.

use std::path::{Path, PathBuf};

use anyhow::Context;
use musher_dataset::{DiskCacheOptions, HeldOut, Source};
use musher_proto::job::{Data, JobConfig, mebibytes};
use musher_weights::source::user_cache;

/// The job's data set, at `root` instead of where the job says if that is given.
pub fn source(job: &JobConfig, root: Option<&Path>) -> anyhow::Result<Source> {
    let data = &job.data;
    Ok(Source {
        root: root.map_or_else(|| data.root_path(), PathBuf::from),
        train_split: data.train_split.clone(),
        val_split: data.val_split.clone(),
        held_out: (data.val_fraction > 0.0)
            .then_some(HeldOut { fraction: data.val_fraction, seed: job.seed }),
        disk_cache: disk_cache(data)?,
        store: None,
    })
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
