//! `musher serve`: the coordinator alone.

use clap::Args;

use super::{
    Exit, Failure, JobArgs,
    run::{self, OnSigterm},
    runtime,
};

#[derive(Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    job: JobArgs,
    /// What SIGTERM means: the run's end, saved first, or that the next coordinator goes on with it
    #[arg(long, value_enum, default_value_t = OnSigterm::Stop)]
    on_sigterm: OnSigterm,
}

impl Serve {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let job = run::load_job(&self.job)?;
        if self.job.dry_run {
            run::print_dry(&job, job.cluster.workers.max(job.cluster.min_workers));
            return Ok(Exit::Finished);
        }
        runtime()?.block_on(async {
            let prepared = run::prepare(&self.job, job, run::FormerTeam::MayLive).await?;
            prepared.run(self.on_sigterm, |_| std::future::ready(())).await
        })
    }
}
