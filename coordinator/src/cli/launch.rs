//! `musher launch`: the coordinator and its workers on this machine.

use std::num::NonZeroUsize;

use anyhow::anyhow;
use clap::Args;
use musher_dataset::{Dataset, DatasetError, Source};
use musher_launcher::RestartPolicy;
use musher_proto::job;

use super::{Exit, Failure, JobArgs, run, runtime, usage, workers};

#[derive(Debug, Args)]
pub struct Launch {
    #[command(flatten)]
    job: JobArgs,
    /// Worker processes [default: cluster.workers, or 1 where that is 0]
    #[arg(long, value_name = "N")]
    workers: Option<u32>,
    /// Threads that each worker computes with; another number changes results in their last bits
    /// [default: the cores, shared out among the workers]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Restarts in a row before a worker that keeps dying is given up
    #[arg(long, value_name = "N", default_value_t = RestartPolicy::default().limit)]
    max_restarts: u32,
}

impl Launch {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let mut job = run::load_job(&self.job)?;
        let count = self.workers.unwrap_or(job.cluster.workers.max(1));
        if count == 0 {
            return Err(usage(anyhow!(
                "--workers must be at least 1; `musher serve` runs a coordinator alone"
            )));
        }
        job.cluster.workers = count;
        job.validate().map_err(usage)?;
        if self.job.dry_run {
            print!("{}", job.to_toml());
            return Ok(Exit::Finished);
        }
        let program = workers::find_program().map_err(usage)?;
        // The workers read this very directory: what is wrong with it is found before there is a run.
        check_data(&job.data).map_err(usage)?;
        runtime()?.block_on(async {
            let prepared = run::prepare(&self.job, job, run::FormerTeam::IsGone).await?;
            let count = if prepared.is_finished() { 0 } else { count };
            let (team, farewell) = workers::LocalWorkers::start(&workers::Plan {
                program,
                coordinator: prepared.address(),
                count,
                threads: self.threads.map_or_else(|| workers::shared_cores(count), NonZeroUsize::get),
                log_format: self.job.log_format,
                max_restarts: self.max_restarts,
            })?;
            let exit = prepared.run(|handle| team.watch(handle)).await;
            farewell.finish().await;
            exit
        })
    }
}

fn check_data(data: &job::Data) -> Result<(), DatasetError> {
    let source = Source {
        root: data.root_path(),
        train_split: data.train_split.clone(),
        val_split: data.val_split.clone(),
    };
    Dataset::open(&source).map(drop)
}
