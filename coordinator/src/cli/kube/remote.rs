//! `musher kube apply`, `scale`, `status`, `logs` and `delete`: a run in a cluster.

use std::{
    io::{self, Write},
    path::PathBuf,
    time::{Duration, Instant},
};

use ::kube::api::LogParams;
use anyhow::anyhow;
use clap::Args;
use futures::{AsyncBufReadExt, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use tokio::time;

use super::render::Manifests;
use crate::{
    cli::{Exit, Failure, runtime, usage},
    kube::cluster::{
        Cluster, ClusterError, Conflicts, Effect, Form, Kind, Options, RunObjects, View, page_port,
    },
};

/// Between two looks at pods that are leaving.
const LOOK: Duration = Duration::from_millis(500);
/// For pods to leave: their grace of 120 s, and some for their nodes.
const LEAVING: Duration = Duration::from_secs(180);

#[derive(Debug, Args)]
struct Where {
    /// The kubeconfig file [default: those of KUBECONFIG, or ~/.kube/config, or a pod's service account]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// The kubeconfig's context [default: its current one]
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
    /// The namespace [default: the context's, or `default`]
    #[arg(long, short, value_name = "NAME")]
    namespace: Option<String>,
}

#[derive(Debug, Args)]
pub struct Apply {
    #[command(flatten)]
    manifests: Manifests,
    /// Take over fields that somebody else set to other values
    #[arg(long)]
    force_conflicts: bool,
    /// Let the API server check everything, and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    cluster: Where,
}

#[derive(Debug, Args)]
pub struct Scale {
    /// The run
    name: String,
    /// Worker pods, one to a node
    #[arg(long, value_name = "N")]
    nodes: u32,
    #[command(flatten)]
    cluster: Where,
}

#[derive(Debug, Args)]
pub struct Status {
    /// The run
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    cluster: Where,
}

#[derive(Debug, Args)]
pub struct Logs {
    /// The run
    name: String,
    /// The pod [default: the coordinator's newest]
    pod: Option<String>,
    /// Of all pods, each line after its pod's name
    #[arg(long, conflicts_with = "pod")]
    all: bool,
    /// Go on until the pods end
    #[arg(long, short)]
    follow: bool,
    /// Of the container that was restarted
    #[arg(long)]
    previous: bool,
    /// At most so many lines that are there already
    #[arg(long, value_name = "N")]
    tail: Option<u32>,
    #[command(flatten)]
    cluster: Where,
}

#[derive(Debug, Args)]
pub struct Delete {
    /// The run
    name: String,
    /// The run's claim as well, with its checkpoints and weights
    #[arg(long)]
    with_claim: bool,
    #[command(flatten)]
    cluster: Where,
}

impl Where {
    async fn open(self) -> Result<Cluster, Failure> {
        let Where { kubeconfig, context, namespace } = self;
        Cluster::open(&Options { kubeconfig, context, namespace }).await.map_err(failed)
    }
}

/// What the user can mend by asking otherwise is bad usage.
fn failed(error: ClusterError) -> Failure {
    match error {
        ClusterError::NoConfig(_)
        | ClusterError::Config(_)
        | ClusterError::NoContext { .. }
        | ClusterError::NoNamespace { .. }
        | ClusterError::NoRun { .. }
        | ClusterError::Conflict { .. }
        | ClusterError::Immutable { .. } => usage(error),
        other => Failure::Other(other.into()),
    }
}

impl Apply {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let deployment = self.manifests.deployment()?;
        let conflicts = if self.force_conflicts { Conflicts::Take } else { Conflicts::Refuse };
        let effect = if self.dry_run { Effect::Tried } else { Effect::Real };
        runtime()?.block_on(async {
            let cluster = self.cluster.open().await?;
            let mut documents = deployment.documents();
            for document in documents.iter_mut().filter(|document| document["kind"] == "JobSet") {
                // Once it is there, its queue alone says whether it runs.
                if let Some(suspended) = cluster.is_suspended(&deployment.name).await.map_err(failed)? {
                    document["spec"]["suspend"] = suspended.into();
                }
            }
            // All of it or nothing: what is refused later must not have changed the job file.
            for document in documents.iter().filter(|_| effect == Effect::Real) {
                cluster.apply(document, conflicts, Effect::Tried).await.map_err(failed)?;
            }
            for document in documents {
                cluster.apply(&document, conflicts, effect).await.map_err(failed)?;
                let tried = if self.dry_run { " (tried, and not kept)" } else { "" };
                let (kind, name) = (&document["kind"], &document["metadata"]["name"]);
                println!("{} {} applied{tried}", kind.as_str().unwrap_or("?"), name.as_str().unwrap_or("?"));
            }
            let namespace = cluster.namespace();
            if cluster.has_secret(&deployment.tokens).await == Some(false) {
                eprintln!(
                    "musher: the pods wait for the secret {0}, which is not in the namespace {namespace}: kubectl -n \
                     {namespace} create secret generic {0} --from-literal=join=$(openssl rand -hex 32) \
                     --from-literal=operator=$(openssl rand -hex 32)",
                    deployment.tokens
                );
            }
            if let Some(claim) = &deployment.data_claim
                && cluster.has_claim(claim).await == Some(false)
            {
                eprintln!(
                    "musher: the workers wait for the claim {claim} with the data set, which is not in the namespace \
                     {namespace}; --data-claim names another"
                );
            }
            if let Some(secret) = &deployment.environment
                && cluster.has_secret(secret).await == Some(false)
            {
                eprintln!(
                    "musher: the pods wait for the secret {secret} with their environment, which is not in the \
                     namespace {namespace}: kubectl -n {namespace} create secret generic {secret} \
                     --from-literal=AWS_ACCESS_KEY_ID=... and so on"
                );
            }
            Ok(Exit::Finished)
        })
    }
}

impl Scale {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let Scale { name, nodes, cluster } = self;
        runtime()?.block_on(async {
            let cluster = cluster.open().await?;
            let run = cluster.find(&name).await.map_err(failed)?;
            let job = scalable(&run, nodes).map_err(|why| usage(anyhow!(why)))?;
            cluster.set_parallelism(&job.name, nodes).await.map_err(failed)?;
            let what_happens = match nodes.cmp(&job.nodes) {
                std::cmp::Ordering::Greater => "newcomers are taken in between two steps",
                std::cmp::Ordering::Less => "those that leave finish their step",
                std::cmp::Ordering::Equal => "as before",
            };
            println!("Job {}: {} nodes, was {}; {what_happens}", job.name, nodes, job.nodes);
            Ok(Exit::Finished)
        })
    }
}

/// A Job of workers that may have another number of pods.
#[derive(Debug, PartialEq, Eq)]
struct Scalable {
    name: String,
    /// As it is now.
    nodes: u32,
}

fn scalable(run: &RunObjects, nodes: u32) -> Result<Scalable, String> {
    let name = &run.name;
    let again = format!(
        "end it with `musher kube delete {name}`, which saves first and keeps its claim, and `apply` it with --nodes \
         {nodes}"
    );
    if let Form::JobSet(_) = run.form {
        return Err(format!("the run {name} is a JobSet, whose size is fixed: {again}"));
    }
    let Some(job) = run.workers() else {
        return Err(format!("the run {name} has no workers' Job: `apply` it again"));
    };
    let ended = job.status.iter().flat_map(|status| &status.conditions).flatten().find(|condition| {
        ["Complete", "Failed"].contains(&condition.type_.as_str()) && condition.status == "True"
    });
    if let Some(ended) = ended {
        return Err(format!(
            "the workers' Job of the run {name} has ended ({}): nothing is left to scale",
            ended.type_
        ));
    }
    if let Some(queue) = run.queue()
        && !run.is_suspended()
        && !run.is_elastic()
    {
        return Err(format!(
            "Kueue admitted the run {name} from its queue {queue}, and resizes an admitted Job only as an elastic \
             workload (alpha: its feature gate ElasticJobsViaWorkloadSlices, and on the Job the annotation \
             kueue.x-k8s.io/elastic-job=true before it is admitted); any other it suspends, and queues anew: {again}"
        ));
    }
    let spec = job.spec.as_ref();
    Ok(Scalable {
        name: job.metadata.name.clone().unwrap_or_default(),
        nodes: spec.and_then(|spec| spec.parallelism).map_or(1, |pods| pods.unsigned_abs()),
    })
}

impl Status {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        runtime()?.block_on(async {
            let cluster = self.cluster.open().await?;
            let run = cluster.find(&self.name).await.map_err(failed)?;
            let view = View::new(&run, cluster.namespace(), own_status(&cluster, &run).await);
            match self.json {
                true => println!("{}", view.to_json()),
                false => print!("{}", view.to_text()),
            }
            Ok(Exit::Finished)
        })
    }
}

/// What the run says of itself.
async fn own_status(cluster: &Cluster, run: &RunObjects) -> Result<serde_json::Value, String> {
    let pod = run.coordinator_pod().ok_or("it has no coordinator's pod")?;
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Pending");
    if phase != "Running" {
        return Err(format!("its coordinator's pod is {phase}"));
    }
    let name = name_of(pod);
    let answer = cluster.get_from_pod(name, page_port(pod), "/api/v1/status").await;
    let answer = answer.map_err(|error| error.to_string())?;
    serde_json::from_slice(&answer).map_err(|error| format!("its coordinator's answer is no JSON: {error}"))
}

impl Logs {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let Logs { name, pod, all, follow, previous, tail, cluster } = self;
        let params = LogParams { follow, previous, tail_lines: tail.map(i64::from), ..LogParams::default() };
        runtime()?.block_on(async {
            let cluster = cluster.open().await?;
            let run = cluster.find(&name).await.map_err(failed)?;
            if all {
                let width = run.pods.iter().map(|pod| name_of(pod).len()).max().unwrap_or(0);
                let copies = run.pods.iter().map(|pod| {
                    let pod = name_of(pod);
                    copy(&cluster, pod, &params, format!("{pod:<width$}  "))
                });
                // One that has nothing to say yet keeps nobody else's from being read.
                for result in futures::future::join_all(copies).await {
                    if let Err(error) = result {
                        eprintln!("musher: {error}");
                    }
                }
                return Ok(Exit::Finished);
            }
            let pod = chosen(&run, pod.as_deref()).map_err(|why| usage(anyhow!(why)))?;
            copy(&cluster, name_of(pod), &params, String::new()).await.map_err(failed)?;
            Ok(Exit::Finished)
        })
    }
}

fn chosen<'a>(run: &'a RunObjects, wanted: Option<&str>) -> Result<&'a Pod, String> {
    let Some(wanted) = wanted else {
        return run
            .coordinator_pod()
            .ok_or_else(|| format!("the run {} has no coordinator's pod now", run.name));
    };
    run.pods.iter().find(|pod| name_of(pod) == wanted).ok_or_else(|| {
        let there: Vec<_> = run.pods.iter().map(name_of).collect();
        let there = if there.is_empty() { "none".to_owned() } else { there.join(", ") };
        format!("the run {} has no pod {wanted}; it has {there}", run.name)
    })
}

/// Until the log ends, or nobody reads any more.
async fn copy(cluster: &Cluster, pod: &str, params: &LogParams, before: String) -> Result<(), ClusterError> {
    let mut lines = cluster.log(pod, params).await?.lines();
    while let Some(line) = lines.next().await {
        let line = line.map_err(|source| ClusterError::LogBroke { pod: pod.to_owned(), source })?;
        if writeln!(io::stdout(), "{before}{line}").is_err() {
            return Ok(());
        }
    }
    Ok(())
}

impl Delete {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let Delete { name, with_claim, cluster } = self;
        runtime()?.block_on(async {
            let cluster = cluster.open().await?;
            let mut deleted = 0;
            let found = cluster.find(&name).await;
            if let Ok(run) = &found {
                deleted += end_pods(&cluster, run).await?;
            }
            let kinds = [Kind::Service, Kind::NetworkPolicy, Kind::ConfigMap];
            for kind in kinds.into_iter().chain(with_claim.then_some(Kind::Claim)) {
                for what in cluster.delete_all(kind, &name).await.map_err(failed)? {
                    println!("{what} deleted");
                    deleted += 1;
                }
            }
            match found {
                // Of a run whose Jobs are gone, the rest may have been left.
                Err(ClusterError::NoRun { .. }) if deleted > 0 => {}
                Err(error) => return Err(failed(error)),
                Ok(run) if run.claim.is_some() && !with_claim => println!(
                    "kept: the claim {name}-run with the run's checkpoints and weights; the same `apply` goes on with \
                     it, `musher kube delete {name} --with-claim` gives it up"
                ),
                Ok(_) => {}
            }
            Ok(Exit::Finished)
        })
    }
}

/// Ends the Jobs, and waits for their pods, as the rest is theirs to use until they are gone. Returns how many
/// objects were deleted.
async fn end_pods(cluster: &Cluster, run: &RunObjects) -> Result<usize, Failure> {
    let deleted = cluster.delete_jobs(run).await.map_err(failed)?;
    for what in &deleted {
        println!("{what} ends: its pods save, and leave");
    }
    let deadline = Instant::now() + LEAVING;
    loop {
        let left = cluster.remains(run).await.map_err(failed)?;
        if left.is_empty() {
            return Ok(deleted.len());
        }
        if Instant::now() >= deadline {
            return Err(anyhow!(
                "there after {} s still: {}; so nothing else is deleted: see what holds them, and delete again",
                LEAVING.as_secs(),
                left.join(", ")
            )
            .into());
        }
        time::sleep(LOOK).await;
    }
}

fn name_of(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}
