//! `musher kube render`, and the flags that say what a job's manifests are.

use clap::Args;
use musher_proto::job::{self, JobConfig};

use crate::{
    cli::{Exit, Failure, run, usage},
    kube::{Deployment, Form},
};

const DATA_CLAIM: &str = "musher-data";

#[derive(Debug, Args)]
pub struct Render {
    #[command(flatten)]
    manifests: Manifests,
}

impl Render {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        print!("{}", self.manifests.deployment()?.render());
        Ok(Exit::Finished)
    }
}

#[derive(Debug, Args)]
pub struct Manifests {
    /// The job file
    job: std::path::PathBuf,
    /// Worker pods, one to a node
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    nodes: u32,
    /// GPUs of each, with a worker for each; 0: a worker on CPUs
    #[arg(long, value_name = "N")]
    gpus_per_node: u32,
    /// Begins the names of all objects [default: the job's name]
    #[arg(long, value_parser = label)]
    name: Option<String>,
    /// The coordinator's image
    #[arg(long, value_name = "IMAGE", default_value = "musher-coordinator")]
    coordinator_image: String,
    /// The workers' image
    #[arg(long, value_name = "IMAGE", default_value = "musher-worker")]
    worker_image: String,
    /// The claim that holds the data set [default: musher-data; none where data.root is in an object store]
    #[arg(long, value_name = "CLAIM")]
    data_claim: Option<String>,
    /// A secret whose keys become variables of all pods' environment, such as an object store's AWS_ACCESS_KEY_ID
    #[arg(long, value_name = "SECRET")]
    env_secret: Option<String>,
    /// The secret with the tokens, under the keys `join` and `operator`
    #[arg(long, value_name = "SECRET", default_value = "musher-tokens")]
    tokens: String,
    /// One JobSet of a fixed size, where Jobs could be scaled
    #[arg(long)]
    jobset: bool,
    /// The Kueue queue that admits the JobSet as a whole
    #[arg(long, value_name = "QUEUE", requires = "jobset")]
    queue: Option<String>,
}

impl Manifests {
    pub(super) fn deployment(self) -> Result<Deployment, Failure> {
        let text = run::read_job(&self.job)?;
        let job = job::load(&text, &self.job.display().to_string(), &[]).map_err(usage)?;
        fits(&job, self.nodes, self.gpus_per_node)?;
        let name = match self.name {
            Some(name) => name,
            None => label(&job.name)
                .map_err(|why| usage(anyhow::anyhow!("the job's name {why}; give --name NAME")))?,
        };
        let form = match self.jobset {
            true => Form::JobSet { queue: self.queue },
            false => Form::Jobs,
        };
        let data_claim = match (job.data.is_remote(), self.data_claim) {
            (true, Some(_)) => {
                let why =
                    "data.root is in an object store, so no claim holds the data set: leave --data-claim out";
                return Err(usage(anyhow::anyhow!(why)));
            }
            (true, None) => None,
            (false, claim) => Some(claim.unwrap_or_else(|| DATA_CLAIM.into())),
        };
        Ok(Deployment {
            name,
            job: text,
            nodes: self.nodes,
            gpus_per_node: self.gpus_per_node,
            coordinator_image: self.coordinator_image,
            worker_image: self.worker_image,
            data_claim,
            environment: self.env_secret,
            tokens: self.tokens,
            form,
        })
    }
}

/// What runs on one machine need not run in pods.
fn fits(job: &JobConfig, nodes: u32, gpus_per_node: u32) -> Result<(), Failure> {
    let refuse = |why: String| Err(usage(anyhow::anyhow!(why)));
    let workers = nodes * gpus_per_node.max(1);
    if job.cluster.min_workers > workers {
        let min = job.cluster.min_workers;
        return refuse(format!(
            "cluster.min_workers is {min}, and {nodes} nodes are {workers} workers: no team would ever form; give more \
             --nodes"
        ));
    }
    if workers > job.cluster.max_workers {
        let max = job.cluster.max_workers;
        return refuse(format!(
            "{nodes} nodes are {workers} workers, and cluster.max_workers is {max}: raise it"
        ));
    }
    if gpus_per_node == 0 && job.cluster.device == job::Device::Cuda {
        return refuse("cluster.device is \"cuda\", and pods get no GPUs: give --gpus-per-node".into());
    }
    if job.checkpoint.store_path().is_some() {
        let store = &job.checkpoint.store;
        return refuse(format!(
            "checkpoint.store is {store}, a directory that no pod has: leave it out for the run's claim, or name an object \
             store"
        ));
    }
    if !job.server.tls_cert.is_empty() {
        return refuse(
            "server.tls_cert is a file that no pod has: leave it out, and see deploy/k8s/components/tls"
                .into(),
        );
    }
    if let Some(file) = job.model.pretrained_file().filter(|file| !file.starts_with("/data")) {
        return refuse(format!(
            "model.pretrained is {}, a file that no pod has: put it beside the data set, which is at /data, or name a URL \
             or torchvision:resnet50",
            file.display()
        ));
    }
    if workers > job.train.global_batch {
        let batch = job.train.global_batch;
        eprintln!(
            "musher: {workers} workers share a global batch of {batch}: {} have nothing to do; raise train.global_batch",
            workers - batch
        );
    }
    Ok(())
}

/// Of a DNS label, with room for what is added to it.
fn label(text: &str) -> Result<String, String> {
    let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let starts_well = text.starts_with(|c: char| c.is_ascii_lowercase());
    match starts_well && text.len() <= 40 && text.chars().all(is_plain) && !text.ends_with('-') {
        true => Ok(text.to_owned()),
        false => Err(format!("\"{text}\" is none for Kubernetes, which takes up to 40 of a-z, 0-9 and `-`")),
    }
}
