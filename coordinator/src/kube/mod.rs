//! A job as Kubernetes manifests: those of `deploy/k8s/base`, with what differs from job to job filled in.
//!
//! What a manifest must say, and why, stands in its file; here is only what is changed. Nothing here speaks with
//! a cluster; [`cluster`] does.

#[cfg(feature = "kube")]
pub mod cluster;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The manifests that are filled in. They are in the order in which they are to be made.
const BASE: [&str; 5] = [
    include_str!("../../../deploy/k8s/base/storage.yaml"),
    include_str!("../../../deploy/k8s/base/network.yaml"),
    include_str!("../../../deploy/k8s/base/service.yaml"),
    include_str!("../../../deploy/k8s/base/coordinator.yaml"),
    include_str!("../../../deploy/k8s/base/workers.yaml"),
];
/// Every name in them that belongs to one run begins so.
const PREFIX: &str = "musher-";
/// Of the job file, at each pod that reads it or trains by it.
const JOB_DIGEST: &str = "musher/job-sha256";
/// Names of things that runs share.
const TOKENS: &str = "musher-tokens";
const DATA: &str = "musher-data";
/// Of CPU and memory, for each GPU.
const CPUS_PER_GPU: u32 = 8;
const GIB_PER_GPU: u32 = 20;
/// Of that memory, what may be in /dev/shm.
const SHM_GIB_PER_GPU: u32 = 2;

/// What differs from job to job.
#[derive(Clone, Debug)]
pub struct Deployment {
    /// Of the run; the names of its objects begin with it.
    pub name: String,
    /// The job file as it is.
    pub job: String,
    pub nodes: u32,
    /// 0: workers compute on CPUs, one to a node.
    pub gpus_per_node: u32,
    pub coordinator_image: String,
    pub worker_image: String,
    /// The claim that holds the data set; `None`: it is in an object store.
    pub data_claim: Option<String>,
    /// A secret whose keys are variables of all pods' environment, such as an object store's credentials.
    pub environment: Option<String>,
    /// The secret that holds the tokens.
    pub tokens: String,
    pub form: Form,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    /// Two Jobs; the number of workers may change.
    Jobs,
    /// One JobSet of a fixed size, admitted as a whole where a Kueue queue is named.
    JobSet { queue: Option<String> },
}

impl Deployment {
    /// A stream of YAML documents.
    pub fn render(&self) -> String {
        self.documents().iter().map(|document| format!("---\n{}", to_yaml(document))).collect()
    }

    /// The manifests, in the order in which they are to be made.
    pub fn documents(&self) -> Vec<Value> {
        let mut documents = vec![self.job_file()];
        documents.extend(BASE.iter().flat_map(|text| parse(text)).map(|mut document| {
            self.adapt(&mut document);
            document
        }));
        if let Form::JobSet { queue } = &self.form {
            let jobs = documents.split_off(documents.len() - 2);
            documents.push(self.job_set(&jobs, queue.as_deref()));
        }
        documents
    }

    /// Workers of the team once all nodes are there.
    fn workers(&self) -> u32 {
        self.nodes * self.gpus_per_node.max(1)
    }

    fn job_file(&self) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": format!("{}-job", self.name), "labels": self.labels()},
            "data": {"job.toml": self.job},
        })
    }

    fn labels(&self) -> Value {
        json!({"app.kubernetes.io/name": "musher", "app.kubernetes.io/instance": self.name})
    }

    fn adapt(&self, document: &mut Value) {
        rename(document, &self.name, &|name| match name {
            TOKENS => Some(self.tokens.clone()),
            DATA => self.data_claim.clone(),
            _ => None,
        });
        add_all(&mut document["metadata"]["labels"], &self.labels());
        // A selector that names the run, as the pods do.
        each_object(document, &mut |object| {
            if object.get("app.kubernetes.io/component").is_some() {
                object.insert("app.kubernetes.io/name".into(), "musher".into());
                object.insert("app.kubernetes.io/instance".into(), self.name.clone().into());
            }
        });
        if document["kind"] == "Service" {
            document["spec"]["selector"]["app.kubernetes.io/instance"] = self.name.clone().into();
        }
        if document["kind"] == "Job" {
            let is_coordinator = document["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
                == "coordinator";
            match is_coordinator {
                true => self.adapt_coordinator(document),
                false => self.adapt_workers(document),
            }
            if let Some(secret) = &self.environment {
                let container = &mut document["spec"]["template"]["spec"]["containers"][0];
                container["envFrom"] = json!([{"secretRef": {"name": secret}}]);
            }
            // A Job's pods never change: so another job is refused, and not found by the next coordinator alone.
            let annotations = &mut document["spec"]["template"]["metadata"]["annotations"];
            annotations[JOB_DIGEST] = hex::encode(Sha256::digest(&self.job)).into();
        }
    }

    fn adapt_coordinator(&self, job: &mut Value) {
        let container = &mut job["spec"]["template"]["spec"]["containers"][0];
        container["image"] = self.coordinator_image.clone().into();
        if let Some(args) = container["args"].as_array_mut() {
            args.push(format!("--set=cluster.workers={}", self.workers()).into());
        }
    }

    fn adapt_workers(&self, job: &mut Value) {
        job["spec"]["parallelism"] = self.nodes.into();
        let pod = &mut job["spec"]["template"]["spec"];
        pod["containers"][0]["image"] = self.worker_image.clone().into();
        if self.data_claim.is_none() {
            without_data_volume(pod);
        }
        let gpus = self.gpus_per_node;
        if gpus == 0 {
            return;
        }
        let gib = |each: u32| format!("{}Gi", each * gpus);
        pod["containers"][0]["resources"] = json!({
            "requests": {"cpu": (CPUS_PER_GPU * gpus / 2).to_string(), "memory": gib(GIB_PER_GPU)},
            "limits": {
                "cpu": (CPUS_PER_GPU * gpus).to_string(),
                "memory": gib(GIB_PER_GPU),
                "nvidia.com/gpu": gpus.to_string(),
            },
        });
        if let Some(tolerations) = pod["tolerations"].as_array_mut() {
            tolerations.push(json!({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}));
        }
        for volume in pod["volumes"].as_array_mut().into_iter().flatten() {
            if volume["name"] == "shm" {
                volume["emptyDir"]["sizeLimit"] = gib(SHM_GIB_PER_GPU).into();
            }
        }
    }

    /// The run is over with its coordinator, and begins again with it alone: by default a failed pod would
    /// begin all of them again.
    fn job_set(&self, jobs: &[Value], queue: Option<&str>) -> Value {
        let mut labels = self.labels();
        if let Some(queue) = queue {
            labels["kueue.x-k8s.io/queue-name"] = queue.into();
        }
        let replicated = |name: &str, job: &Value| {
            let mut spec = job["spec"].clone();
            // A fixed size, which gang admission counts on.
            spec["completions"] = spec["parallelism"].clone();
            json!({"name": name, "replicas": 1, "template": {"spec": spec}})
        };
        json!({
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {"name": self.name, "labels": labels},
            "spec": {
                "suspend": queue.is_some(),
                "successPolicy": {"operator": "All", "targetReplicatedJobs": ["coordinator"]},
                "failurePolicy": {
                    "maxRestarts": 0,
                    "rules": [{
                        "name": "nobodyWouldDoBetter",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }],
                },
                "replicatedJobs": [replicated("coordinator", &jobs[0]), replicated("workers", &jobs[1])],
            },
        })
    }
}

/// The data set is where the job says.
fn without_data_volume(pod: &mut Value) {
    let is_data = |volume: &Value| volume["name"] == "data";
    let container = &mut pod["containers"][0];
    if let Some(mounts) = container["volumeMounts"].as_array_mut() {
        mounts.retain(|mount| !is_data(mount));
    }
    if let Some(args) = container["args"].as_array_mut() {
        args.retain(|arg| !arg.as_str().is_some_and(|arg| arg.starts_with("--data-root")));
    }
    if let Some(volumes) = pod["volumes"].as_array_mut() {
        volumes.retain(|volume| !is_data(volume));
    }
}

fn parse(text: &str) -> Vec<Value> {
    serde_norway::Deserializer::from_str(text)
        .map(|document| {
            serde::Deserialize::deserialize(document).expect("the manifests in this program are YAML")
        })
        .collect()
}

fn to_yaml(document: &Value) -> String {
    serde_norway::to_string(document).expect("a manifest is plain data")
}

/// Gives names of ours the run's name, in all text that holds one.
fn rename(value: &mut Value, run: &str, shared: &impl Fn(&str) -> Option<String>) {
    match value {
        Value::String(text) => {
            if let Some(other) = shared(text) {
                *text = other;
            } else if let Some(rest) = text.strip_prefix(PREFIX) {
                *text = format!("{run}-{rest}");
            }
        }
        Value::Array(values) => values.iter_mut().for_each(|value| rename(value, run, shared)),
        Value::Object(fields) => fields.values_mut().for_each(|value| rename(value, run, shared)),
        _ => {}
    }
}

fn each_object(value: &mut Value, change: &mut impl FnMut(&mut serde_json::Map<String, Value>)) {
    match value {
        Value::Array(values) => values.iter_mut().for_each(|value| each_object(value, change)),
        Value::Object(fields) => {
            change(fields);
            fields.values_mut().for_each(|value| each_object(value, change));
        }
        _ => {}
    }
}

fn add_all(to: &mut Value, fields: &Value) {
    for (name, value) in fields.as_object().into_iter().flatten() {
        to[name] = value.clone();
    }
}

#[cfg(test)]
mod tests;
