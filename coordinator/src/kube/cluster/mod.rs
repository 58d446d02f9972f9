//! A cluster's API, for the objects of runs: made, looked at, scaled and deleted.
//!
//! It takes no decision about a run: what is patched or deleted, and what is said about it, the command decides.
//! What goes wrong is told in [`ClusterError`]'s sentences.

mod error;
mod forward;
mod run;
mod view;

pub use error::ClusterError;
pub use run::{Form, Role, RunObjects};
pub use view::{View, page_port};

use std::{path::PathBuf, pin::Pin, time::Duration};

use ::kube::{
    Api, Client, Config,
    api::{
        ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, LogParams, Patch, PatchParams,
    },
    config::{KubeConfigOptions, Kubeconfig},
};
use futures::AsyncBufRead;
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{PersistentVolumeClaim, Pod, Secret},
};
use musher_proto::causes::causes;
use serde_json::{Value, json};

use error::Doing;

/// Under this name the API server remembers which fields are ours.
const MANAGER: &str = "musher";
/// What all objects of all runs carry.
const OURS: &str = "app.kubernetes.io/name=musher";
/// For a connection, and for an answer: the API server gives one at once.
const CONNECT: Duration = Duration::from_secs(10);
const ANSWER: Duration = Duration::from_secs(30);

/// Which cluster, as whom and where in it.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// `None`: the files of `KUBECONFIG`, or `~/.kube/config`, or in a pod its service account.
    pub kubeconfig: Option<PathBuf>,
    /// `None`: the current one.
    pub context: Option<String>,
    /// `None`: the context's.
    pub namespace: Option<String>,
}

/// A namespace of a cluster.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
    /// Its URL.
    server: String,
    namespace: String,
}

/// What becomes of fields that somebody else set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conflicts {
    Refuse,
    Take,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    Real,
    /// The API server checks everything and keeps nothing.
    Tried,
}

/// Kinds of objects that a run has besides its Jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    ConfigMap,
    Service,
    NetworkPolicy,
    /// It holds the run: its events, checkpoints and weights.
    Claim,
}

impl Kind {
    fn resource(self) -> ApiResource {
        let (group, version, kind) = match self {
            Kind::ConfigMap => ("", "v1", "ConfigMap"),
            Kind::Service => ("", "v1", "Service"),
            Kind::NetworkPolicy => ("networking.k8s.io", "v1", "NetworkPolicy"),
            Kind::Claim => ("", "v1", "PersistentVolumeClaim"),
        };
        ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind))
    }
}

fn job_sets() -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk("jobset.x-k8s.io", "v1alpha2", "JobSet"))
}

impl Cluster {
    /// Reads who and where; nothing is asked of the cluster yet.
    pub async fn open(options: &Options) -> Result<Self, ClusterError> {
        let mut config = configure(options).await?;
        config.connect_timeout = Some(CONNECT);
        let server = config.cluster_url.to_string().trim_end_matches('/').to_owned();
        let namespace = options.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).map_err(|error| ClusterError::Config(causes(&error)))?;
        Ok(Self { client, server, namespace })
    }

    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Makes the objects, or changes them to what the documents say, in their order.
    pub async fn apply(
        &self,
        document: &Value,
        conflicts: Conflicts,
        effect: Effect,
    ) -> Result<(), ClusterError> {
        let object: DynamicObject = serde_json::from_value(document.clone())
            .expect("a manifest that is rendered has a kind and metadata");
        let name = object.metadata.name.clone().expect("a manifest that is rendered has a name");
        let kind = object.types.as_ref().map_or(String::new(), |types| types.kind.clone());
        let types = object.types.as_ref().expect("a manifest that is rendered has a kind");
        let resource = ApiResource::from_gvk(
            &GroupVersionKind::try_from(types).expect("a manifest that is rendered has a version"),
        );
        let mut params = PatchParams { force: conflicts == Conflicts::Take, ..PatchParams::apply(MANAGER) };
        params.dry_run = effect == Effect::Tried;
        let what = format!("{kind} {name}");
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &self.namespace, &resource);
        self.ask("apply", &what, api.patch(&name, &params, &Patch::Apply(&object))).await.map(drop)
    }

    /// Whether a JobSet waits to be admitted; `None` where it is not there.
    pub async fn is_suspended(&self, job_set: &str) -> Result<Option<bool>, ClusterError> {
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &self.namespace, &job_sets());
        let found = self.ask("get", &format!("JobSet {job_set}"), api.get_opt(job_set)).await?;
        Ok(found.map(|set| set.data["spec"]["suspend"] == true))
    }

    /// One run's Jobs, pods and claim.
    pub async fn find(&self, name: &str) -> Result<RunObjects, ClusterError> {
        let mut all = self.all().await?;
        let Some(at) = all.iter().position(|run| run.name == name) else {
            let mut known: Vec<_> = all.into_iter().map(|run| run.name).collect();
            known.sort();
            return Err(ClusterError::NoRun {
                name: name.to_owned(),
                namespace: self.namespace.clone(),
                known,
            });
        };
        let mut run = all.swap_remove(at);
        if let Form::JobSet(set) = &run.form {
            let of_set =
                format!("jobset.sigs.k8s.io/jobset-name={}", set.metadata.name.as_deref().unwrap_or(name));
            run.jobs = self.list::<Job>(&of_set).await?;
        }
        run.jobs.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
        run.pods = self.pods(&run).await?;
        run.claim = self.claim(name).await?;
        Ok(run)
    }

    /// What is there of the run's pods and Jobs.
    pub async fn remains(&self, run: &RunObjects) -> Result<Vec<String>, ClusterError> {
        let pods = self.pods(run).await?;
        let mut left: Vec<_> =
            pods.iter().map(|pod| format!("Pod {}", pod.metadata.name.as_deref().unwrap_or("?"))).collect();
        if self.all().await?.iter().any(|it| it.name == run.name) {
            left.push(format!("the Jobs of {}", run.name));
        }
        Ok(left)
    }

    /// The run's pods as they are now, in the order of their names.
    async fn pods(&self, run: &RunObjects) -> Result<Vec<Pod>, ClusterError> {
        let mut pods = self.list::<Pod>(OURS).await?;
        pods.retain(|pod| run.owns(pod));
        pods.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
        Ok(pods)
    }

    async fn claim(&self, run: &str) -> Result<Option<PersistentVolumeClaim>, ClusterError> {
        let api: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), &self.namespace);
        let name = format!("{run}-run");
        self.ask("get", &format!("PersistentVolumeClaim {name}"), api.get_opt(&name)).await
    }

    /// All runs of this namespace, without pods and claims.
    async fn all(&self) -> Result<Vec<RunObjects>, ClusterError> {
        let jobs = self.list::<Job>(OURS).await?;
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &self.namespace, &job_sets());
        let sets = self.ask("list", "JobSets", api.list(&ListParams::default().labels(OURS))).await;
        let sets = match sets {
            Ok(sets) => sets.items,
            // Most clusters have no JobSets, and who may not see them may have Jobs all the same.
            Err(ClusterError::UnknownKind { .. } | ClusterError::Forbidden { .. }) => Vec::new(),
            Err(error) => return Err(error),
        };
        Ok(run::group(jobs, sets))
    }

    async fn list<K>(&self, labels: &str) -> Result<Vec<K>, ClusterError>
    where
        K: ::kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned,
    {
        let api: Api<K> = Api::namespaced(self.client.clone(), &self.namespace);
        let what = format!("{}s", K::kind(&()));
        Ok(self.ask("list", &what, api.list(&ListParams::default().labels(labels))).await?.items)
    }

    /// Of a Job, how many pods it has at once.
    pub async fn set_parallelism(&self, job: &str, pods: u32) -> Result<(), ClusterError> {
        let api: Api<Job> = Api::namespaced(self.client.clone(), &self.namespace);
        let params = PatchParams { field_manager: Some(MANAGER.into()), ..PatchParams::default() };
        let patch = Patch::Merge(json!({"spec": {"parallelism": pods}}));
        self.ask("patch", &format!("Job {job}"), api.patch(job, &params, &patch)).await.map(drop)
    }

    /// Asks for the end of a run's Jobs, or its JobSet. Their pods get their time to save.
    pub async fn delete_jobs(&self, run: &RunObjects) -> Result<Vec<String>, ClusterError> {
        // The object stays until its pods are gone, so nobody makes another of that name beside them.
        let params = DeleteParams::foreground();
        let mut deleted = Vec::new();
        match &run.form {
            Form::JobSet(set) => {
                let name = set.metadata.name.as_deref().unwrap_or(&run.name);
                let api: Api<DynamicObject> =
                    Api::namespaced_with(self.client.clone(), &self.namespace, &job_sets());
                let what = format!("JobSet {name}");
                self.gone_is_fine(self.ask("delete", &what, api.delete(name, &params)).await)?;
                deleted.push(what);
            }
            Form::Jobs => {
                let api: Api<Job> = Api::namespaced(self.client.clone(), &self.namespace);
                for name in run.jobs.iter().filter_map(|job| job.metadata.name.as_deref()) {
                    let what = format!("Job {name}");
                    self.gone_is_fine(self.ask("delete", &what, api.delete(name, &params)).await)?;
                    deleted.push(what);
                }
            }
        }
        Ok(deleted)
    }

    /// Deletes the run's objects of that kind.
    pub async fn delete_all(&self, kind: Kind, run: &str) -> Result<Vec<String>, ClusterError> {
        let resource = kind.resource();
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &self.namespace, &resource);
        let plural = format!("{}s", resource.kind);
        let all = self.ask("list", &plural, api.list(&ListParams::default().labels(OURS))).await?;
        let mut deleted = Vec::new();
        for object in all.items.iter().filter(|object| run::belongs(&object.metadata, run)) {
            let Some(name) = object.metadata.name.as_deref() else { continue };
            let what = format!("{} {name}", resource.kind);
            self.gone_is_fine(
                self.ask("delete", &what, api.delete(name, &DeleteParams::background())).await,
            )?;
            deleted.push(what);
        }
        Ok(deleted)
    }

    fn gone_is_fine<T>(&self, result: Result<T, ClusterError>) -> Result<(), ClusterError> {
        match result {
            Ok(_) | Err(ClusterError::Gone { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Whether there is a secret of that name, or a claim: what a run's pods wait for. `None` where we may not know.
    pub async fn has_secret(&self, name: &str) -> Option<bool> {
        // Only that it is there is asked, not what it says.
        let api: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        api.get_metadata_opt(name).await.ok().map(|found| found.is_some())
    }

    pub async fn has_claim(&self, name: &str) -> Option<bool> {
        let api: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), &self.namespace);
        api.get_metadata_opt(name).await.ok().map(|found| found.is_some())
    }

    /// What a pod writes, line by line as it comes.
    pub async fn log(
        &self,
        pod: &str,
        params: &LogParams,
    ) -> Result<Pin<Box<dyn AsyncBufRead + Send>>, ClusterError> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let lines = self.ask("read the log of", &format!("Pod {pod}"), api.log_stream(pod, params)).await?;
        Ok(Box::pin(lines))
    }

    /// `GET PATH` of a port on the pod's loopback, through the API server.
    pub async fn get_from_pod(&self, pod: &str, port: u16, path: &str) -> Result<Vec<u8>, ClusterError> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let what = format!("Pod {pod}");
        let forwarder = self.ask("forward a port of", &what, api.portforward(pod, &[port])).await?;
        forward::get(forwarder, port, path)
            .await
            .map_err(|why| ClusterError::Pod { pod: pod.to_owned(), why })
    }

    async fn ask<T>(
        &self,
        verb: &'static str,
        what: &str,
        answer: impl Future<Output = ::kube::Result<T>>,
    ) -> Result<T, ClusterError> {
        let doing = Doing { verb, what, namespace: &self.namespace, server: &self.server };
        match tokio::time::timeout(ANSWER, answer).await {
            Ok(answer) => answer.map_err(|error| doing.failed(error)),
            Err(_) => Err(ClusterError::Unreachable {
                server: self.server.clone(),
                cause: format!("no answer in {} s", ANSWER.as_secs()),
            }),
        }
    }
}

async fn configure(options: &Options) -> Result<Config, ClusterError> {
    let read = match &options.kubeconfig {
        Some(file) => Kubeconfig::read_from(file),
        None => Kubeconfig::read(),
    };
    let file = match read {
        Ok(file) => file,
        Err(error) => {
            let told_where = options.kubeconfig.is_some() || options.context.is_some();
            let in_pod = if told_where { None } else { Config::incluster().ok() };
            return in_pod.ok_or_else(|| ClusterError::NoConfig(causes(&error)));
        }
    };
    let known = |wanted: &str| file.contexts.iter().any(|context| context.name == wanted);
    let context = options.context.clone().or_else(|| file.current_context.clone());
    match context {
        Some(context) if !context.is_empty() && !known(&context) => Err(ClusterError::NoContext {
            context,
            known: file.contexts.into_iter().map(|context| context.name).collect(),
        }),
        _ => {
            let options = KubeConfigOptions { context: options.context.clone(), ..Default::default() };
            Config::from_custom_kubeconfig(file, &options)
                .await
                .map_err(|error| ClusterError::Config(causes(&error)))
        }
    }
}
