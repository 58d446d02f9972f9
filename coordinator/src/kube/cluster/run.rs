//! Which objects of a namespace are which run's. Pure.
//!
//! Rendered manifests name their run in a label; those that kustomize builds from `deploy/k8s` do not, and are
//! known by their names.

use ::kube::api::DynamicObject;
use k8s_openapi::{
    api::{
        batch::v1::Job,
        core::v1::{PersistentVolumeClaim, Pod},
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

const INSTANCE: &str = "app.kubernetes.io/instance";
const COMPONENT: &str = "app.kubernetes.io/component";
const OF_JOB: &str = "batch.kubernetes.io/job-name";
const QUEUE: &str = "kueue.x-k8s.io/queue-name";
const ELASTIC: &str = "kueue.x-k8s.io/elastic-job";

/// A run as its cluster has it.
#[derive(Clone, Debug)]
pub struct RunObjects {
    pub name: String,
    pub form: Form,
    /// Of a JobSet: those that it made.
    pub jobs: Vec<Job>,
    pub pods: Vec<Pod>,
    pub claim: Option<PersistentVolumeClaim>,
}

#[derive(Clone, Debug)]
pub enum Form {
    Jobs,
    JobSet(Box<DynamicObject>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Coordinator,
    Worker,
}

impl Role {
    pub fn name(self) -> &'static str {
        match self {
            Role::Coordinator => "coordinator",
            Role::Worker => "worker",
        }
    }

    pub fn of_pod(pod: &Pod) -> Self {
        match label(&pod.metadata, COMPONENT) {
            Some("coordinator") => Role::Coordinator,
            _ => Role::Worker,
        }
    }

    /// A Job's is that of its pods.
    pub fn of_job(job: &Job) -> Self {
        let template = job.spec.as_ref().and_then(|spec| spec.template.metadata.as_ref());
        match template.and_then(|metadata| label(metadata, COMPONENT)) {
            Some("coordinator") => Role::Coordinator,
            _ => Role::Worker,
        }
    }
}

impl RunObjects {
    /// The Kueue queue that it was put into.
    pub fn queue(&self) -> Option<&str> {
        match &self.form {
            Form::JobSet(set) => label(&set.metadata, QUEUE),
            Form::Jobs => self.jobs.iter().find_map(|job| label(&job.metadata, QUEUE)),
        }
    }

    /// Whether Kueue was told that it may resize the workers' Job while it runs.
    pub fn is_elastic(&self) -> bool {
        let annotations = self.workers().and_then(|job| job.metadata.annotations.as_ref());
        annotations.and_then(|all| all.get(ELASTIC)).is_some_and(|value| value == "true")
    }

    /// Whether it waits to be admitted, or was put off.
    pub fn is_suspended(&self) -> bool {
        match &self.form {
            Form::JobSet(set) => set.data["spec"]["suspend"] == true,
            Form::Jobs => {
                let suspended = |job: &Job| job.spec.as_ref().and_then(|spec| spec.suspend) == Some(true);
                self.jobs.iter().any(suspended)
            }
        }
    }

    pub fn workers(&self) -> Option<&Job> {
        self.jobs.iter().find(|job| Role::of_job(job) == Role::Worker)
    }

    /// The newest one.
    pub fn coordinator_pod(&self) -> Option<&Pod> {
        let coordinators = self.pods.iter().filter(|pod| Role::of_pod(pod) == Role::Coordinator);
        coordinators.max_by_key(|pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0))
    }

    pub(super) fn owns(&self, pod: &Pod) -> bool {
        match label(&pod.metadata, INSTANCE) {
            Some(instance) => instance == self.name,
            None => label(&pod.metadata, OF_JOB)
                .is_some_and(|job| self.jobs.iter().any(|it| it.metadata.name.as_deref() == Some(job))),
        }
    }
}

/// Whether an object of ours is of this run.
pub(super) fn belongs(metadata: &ObjectMeta, run: &str) -> bool {
    match label(metadata, INSTANCE) {
        Some(instance) => instance == run,
        None => run_of_name(metadata) == Some(run),
    }
}

/// Runs of what was found, without pods.
pub(super) fn group(jobs: Vec<Job>, sets: Vec<DynamicObject>) -> Vec<RunObjects> {
    let begun =
        |name: String, form| RunObjects { name, form, jobs: Vec::new(), pods: Vec::new(), claim: None };
    let mut runs: Vec<RunObjects> = Vec::new();
    for set in sets {
        let Some(name) = label(&set.metadata, INSTANCE).or(set.metadata.name.as_deref()) else { continue };
        runs.push(begun(name.to_owned(), Form::JobSet(Box::new(set))));
    }
    for job in jobs {
        let Some(name) = label(&job.metadata, INSTANCE).or(run_of_name(&job.metadata)) else { continue };
        let at = runs.iter().position(|run| run.name == name).unwrap_or_else(|| {
            runs.push(begun(name.to_owned(), Form::Jobs));
            runs.len() - 1
        });
        runs[at].jobs.push(job);
    }
    runs
}

fn run_of_name(metadata: &ObjectMeta) -> Option<&str> {
    let name = metadata.name.as_deref()?;
    ["-coordinator", "-workers", "-job", "-run"].iter().find_map(|end| name.strip_suffix(end))
}

fn label<'a>(metadata: &'a ObjectMeta, name: &str) -> Option<&'a str> {
    metadata.labels.as_ref()?.get(name).map(String::as_str)
}
