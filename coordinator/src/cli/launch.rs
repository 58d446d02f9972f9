//! `musher launch`: the coordinator and its workers on this machine.

use std::num::NonZeroUsize;

use anyhow::anyhow;
use clap::Args;
use musher_launcher::{RestartPolicy, visible_gpus};
use musher_proto::job;
use musher_security::CredentialsArgs;
use tracing::warn;

use super::{Exit, Failure, JobArgs, run, runtime, usage, workers};

#[derive(Debug, Args)]
pub struct Launch {
    #[command(flatten)]
    job: JobArgs,
    /// Worker processes [default: cluster.workers; where that is 0, one per visible GPU, or one]
    #[arg(long, value_name = "N")]
    workers: Option<u32>,
    /// Threads that each worker computes with; another number changes results in their last bits
    /// [default: the cores, shared out among the workers]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Restarts in a row before a worker that keeps dying is given up
    #[arg(long, value_name = "N", default_value_t = RestartPolicy::default().limit)]
    max_restarts: u32,
    /// What the workers show.
    #[command(flatten)]
    credentials: CredentialsArgs,
}

impl Launch {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let mut job = run::load_job(&self.job)?;
        let mut credentials = self.credentials;
        if credentials.token_file.is_none() && !job.server.join_token_file.is_empty() {
            credentials.token_file = Some((&job.server.join_token_file).into());
        }
        if !job.server.tls_cert.is_empty() && credentials.tls_ca.is_none() {
            return Err(usage(anyhow!(
                "the workers need certificates for this job's TLS: give --tls-ca, --tls-cert and --tls-key"
            )));
        }
        let wanted = self.workers.or(Some(job.cluster.workers).filter(|&workers| workers > 0));
        if wanted == Some(0) {
            return Err(usage(anyhow!(
                "--workers must be at least 1; `musher serve` runs a coordinator alone"
            )));
        }
        let gpus = visible_gpus();
        let Placement { count, device } =
            Placement::of(wanted, job.cluster.device, gpus).map_err(|why| usage(anyhow!(why)))?;
        let leaves_gpus_idle = gpus > 0 && device == "cpu" && job.cluster.device == job::Device::Auto;
        job.cluster.workers = count;
        if count > job.cluster.max_workers {
            let most = job.cluster.max_workers;
            return Err(usage(anyhow!(
                "{count} workers are more than cluster.max_workers = {most}: raise that by --set"
            )));
        }
        job.validate().map_err(usage)?;
        if self.job.dry_run {
            run::print_dry(&job, count);
            return Ok(Exit::Finished);
        }
        let program = workers::find_program().map_err(usage)?;
        // The workers read this very directory: what is wrong with it is found before there is a run.
        run::open_data(&job).map_err(usage)?;
        // A run that goes on needs none.
        let begins = !self.job.resume && !self.job.resume_or_start;
        if let Some(file) = job.model.pretrained_file().filter(|file| begins && !file.is_file()) {
            return Err(usage(anyhow!(
                "there is no file {}, which `model.pretrained` names: use a file, a URL or torchvision:resnet50",
                file.display()
            )));
        }
        runtime()?.block_on(async {
            let prepared = run::prepare(&self.job, job, run::FormerTeam::IsGone).await?;
            let count = if prepared.is_finished() { 0 } else { count };
            let (team, farewell) = workers::LocalWorkers::start(&workers::Plan {
                program,
                coordinator: credentials
                    .clone()
                    .read("MUSHER_JOIN_TOKEN")?
                    .url(&prepared.address().to_string()),
                credentials: credentials.to_flags(),
                count,
                device,
                threads: self.threads.map_or_else(|| musher_launcher::shared_cores(count), NonZeroUsize::get),
                log_format: self.job.log_format,
                max_restarts: self.max_restarts,
            })?;
            if leaves_gpus_idle {
                warn!(workers = count, gpus, "there is not a GPU for each worker: all train on the CPU");
            }
            let exit = prepared.run(run::OnSigterm::Stop, |handle| team.watch(handle)).await;
            farewell.finish().await;
            exit
        })
    }
}

/// How many workers, and what each is told to train on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Placement {
    count: u32,
    /// For `musher-worker join --device`.
    device: &'static str,
}

impl Placement {
    /// One GPU a worker, or the CPU for all: a team is as slow as its slowest.
    fn of(wanted: Option<u32>, device: job::Device, gpus: u32) -> Result<Self, String> {
        let count = wanted.unwrap_or(if device == job::Device::Cpu { 1 } else { gpus.max(1) });
        let device = match device {
            job::Device::Cpu => "cpu",
            job::Device::Auto if gpus < count => "cpu",
            job::Device::Auto => "auto",
            job::Device::Cuda if gpus == 0 => {
                return Err("cluster.device is \"cuda\", but no NVIDIA GPU is visible on this machine: see \
                            whether nvidia-smi shows one, or use \"auto\""
                    .into());
            }
            job::Device::Cuda if gpus < count => {
                return Err(format!(
                    "{count} workers need a GPU each, but {gpus} are visible: use --workers {gpus}, or \
                     cluster.device = \"cpu\""
                ));
            }
            job::Device::Cuda => "cuda",
        };
        Ok(Self { count, device })
    }
}

#[cfg(test)]
mod tests {
    use job::Device::{Auto, Cpu, Cuda};

    use super::*;

    #[test]
    fn workers_have_a_gpu_each_or_all_the_cpu() {
        let place =
            |wanted, device, gpus| Placement::of(wanted, device, gpus).map(|it| (it.count, it.device));
        assert_eq!(place(None, Auto, 0), Ok((1, "cpu")));
        assert_eq!(place(None, Auto, 4), Ok((4, "auto")));
        assert_eq!(place(Some(2), Auto, 4), Ok((2, "auto")));
        assert_eq!(place(Some(2), Auto, 1), Ok((2, "cpu")));
        assert_eq!(place(None, Cpu, 4), Ok((1, "cpu")));
        assert_eq!(place(Some(3), Cpu, 0), Ok((3, "cpu")));
        assert_eq!(place(None, Cuda, 2), Ok((2, "cuda")));
        assert!(place(None, Cuda, 0).is_err_and(|why| why.contains("no NVIDIA GPU is visible")));
        assert!(place(Some(3), Cuda, 2).is_err_and(|why| why.contains("--workers 2")));
    }
}
