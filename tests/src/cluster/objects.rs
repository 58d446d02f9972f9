//! What a cluster has, and the Job controller: pods for Jobs, and Jobs for JobSets.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::fields::Owners;

/// How long a pod takes to leave.
const LEAVING: Duration = Duration::from_millis(700);

/// Plural, namespace, name.
pub type Key = (String, String, String);

/// A kind that the API server knows: group, version, plural, kind.
pub type Kind = (&'static str, &'static str, &'static str, &'static str);

const KINDS: [Kind; 7] = [
    ("", "v1", "configmaps", "ConfigMap"),
    ("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim"),
    ("", "v1", "pods", "Pod"),
    ("", "v1", "secrets", "Secret"),
    ("", "v1", "services", "Service"),
    ("batch", "v1", "jobs", "Job"),
    ("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy"),
];
const JOB_SETS: Kind = ("jobset.x-k8s.io", "v1alpha2", "jobsets", "JobSet");

/// See the module's documentation.
#[derive(Debug)]
pub struct Objects {
    kinds: Vec<Kind>,
    pub namespaces: Vec<String>,
    pub(super) all: BTreeMap<Key, Value>,
    pub(super) owners: HashMap<Key, Owners>,
    /// Verb and plural of what Ann may not do.
    pub forbidden: Vec<(&'static str, &'static str)>,
    /// `VERB PLURAL/NAME` of all requests that were let in, in order.
    pub requests: Vec<String>,
    /// What is at a pod's port.
    pub ports: HashMap<(String, u16), SocketAddr>,
    pub(super) logs: HashMap<String, Log>,
    leaving: HashMap<Key, Instant>,
    version: u64,
}

#[derive(Debug, Default)]
pub(super) struct Log {
    pub lines: Vec<String>,
    pub is_over: bool,
}

impl Objects {
    pub(super) fn new() -> Self {
        Self {
            kinds: KINDS.to_vec(),
            namespaces: vec!["default".into(), "train".into()],
            all: BTreeMap::new(),
            owners: HashMap::new(),
            forbidden: Vec::new(),
            requests: Vec::new(),
            ports: HashMap::new(),
            logs: HashMap::new(),
            leaving: HashMap::new(),
            version: 0,
        }
    }

    /// JobSet is installed.
    pub fn install_job_sets(&mut self) {
        self.kinds.push(JOB_SETS);
    }

    pub(super) fn kind(&self, group: &str, version: &str, plural: &str) -> Option<Kind> {
        self.kinds.iter().find(|kind| (kind.0, kind.1, kind.2) == (group, version, plural)).copied()
    }

    pub fn get(&self, plural: &str, namespace: &str, name: &str) -> Option<Value> {
        self.all.get(&(plural.to_owned(), namespace.to_owned(), name.to_owned())).cloned()
    }

    /// Names of that kind's objects in `train`.
    pub fn names(&self, plural: &str) -> Vec<String> {
        self.all.keys().filter(|key| key.0 == plural && key.1 == "train").map(|key| key.2.clone()).collect()
    }

    /// Changes an object of `train`, past the API.
    #[track_caller]
    pub fn change(&mut self, plural: &str, name: &str, change: impl FnOnce(&mut Value)) {
        let key = (plural.to_owned(), "train".to_owned(), name.to_owned());
        change(self.all.get_mut(&key).unwrap_or_else(|| panic!("there is no {name} among {plural}")));
        self.control();
    }

    /// Keeps an object, new or changed.
    pub(super) fn put(&mut self, key: Key, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        if object["metadata"]["uid"].is_null() {
            object["metadata"]["uid"] = format!("uid-{}", self.version).into();
            let (minutes, seconds) = (self.version / 60 % 60, self.version % 60);
            object["metadata"]["creationTimestamp"] =
                format!("2026-01-01T00:{minutes:02}:{seconds:02}Z").into();
        }
        self.all.insert(key.clone(), object);
        self.control();
        self.all.get(&key).cloned().expect("it was put there just now")
    }

    pub(super) fn delete(&mut self, key: &Key, propagation: &str) {
        match (key.0.as_str(), propagation) {
            ("pods", _) => self.let_go(key.clone()),
            ("jobs" | "jobsets", "Foreground") => self.let_go(key.clone()),
            (_, "Orphan") => {
                let uid = self.all.remove(key).map(|object| object["metadata"]["uid"].clone());
                for object in self.all.values_mut() {
                    if uid.is_some() && Some(&object["metadata"]["ownerReferences"][0]["uid"]) == uid.as_ref()
                    {
                        object["metadata"]["ownerReferences"] = json!([]);
                    }
                }
            }
            _ => {
                self.all.remove(key);
            }
        }
        self.owners.remove(key);
        self.control();
    }

    fn let_go(&mut self, key: Key) {
        if let Some(object) = self.all.get_mut(&key)
            && object["metadata"]["deletionTimestamp"].is_null()
        {
            object["metadata"]["deletionTimestamp"] = "2026-01-01T01:00:00Z".into();
            self.leaving.insert(key, Instant::now() + LEAVING);
        }
    }

    pub(super) fn say(&mut self, pod: &str, line: &str) {
        self.logs.entry(pod.to_owned()).or_default().lines.push(line.to_owned());
    }

    pub(super) fn fall_silent(&mut self, pod: &str) {
        self.logs.entry(pod.to_owned()).or_default().is_over = true;
    }

    /// What controllers do, once, and what has happened since.
    pub(super) fn control(&mut self) {
        let sets: Vec<_> = self.of("jobsets");
        for (key, set) in &sets {
            self.jobs_of(key, set);
        }
        for (key, job) in self.of("jobs") {
            self.pods_of(&key, &job);
        }
        // Whose owner is gone goes, too, and an owner in the foreground goes last.
        let uids: Vec<Value> = self.all.values().map(|object| object["metadata"]["uid"].clone()).collect();
        let orphans: Vec<_> = self
            .all
            .iter()
            .filter(|(_, object)| {
                let owner = &object["metadata"]["ownerReferences"][0]["uid"];
                !owner.is_null() && !uids.contains(owner)
            })
            .map(|(key, _)| key.clone())
            .collect();
        for key in orphans {
            match key.0.as_str() {
                "pods" => self.let_go(key),
                _ => {
                    self.all.remove(&key);
                }
            }
        }
        let now = Instant::now();
        let due: Vec<_> =
            self.leaving.iter().filter(|(_, at)| **at <= now).map(|(key, _)| key.clone()).collect();
        for key in due {
            let uid = self.all.get(&key).map(|object| object["metadata"]["uid"].clone());
            let is_owner = self.all.values().any(|object| {
                uid.is_some() && Some(&object["metadata"]["ownerReferences"][0]["uid"]) == uid.as_ref()
            });
            if !is_owner {
                self.all.remove(&key);
                self.leaving.remove(&key);
            }
        }
    }

    fn of(&self, plural: &str) -> Vec<(Key, Value)> {
        let of_kind = self.all.iter().filter(|(key, _)| key.0 == plural);
        of_kind.map(|(key, object)| (key.clone(), object.clone())).collect()
    }

    fn jobs_of(&mut self, key: &Key, set: &Value) {
        let is_leaving = !set["metadata"]["deletionTimestamp"].is_null();
        let name = key.2.as_str();
        for replicated in set["spec"]["replicatedJobs"].as_array().into_iter().flatten() {
            let job = format!("{name}-{}-0", replicated["name"].as_str().unwrap_or_default());
            let job_key = ("jobs".to_owned(), key.1.clone(), job.clone());
            if is_leaving {
                self.let_go(job_key);
                continue;
            }
            if set["spec"]["suspend"] == true || self.all.contains_key(&job_key) {
                continue;
            }
            let mut spec = replicated["template"]["spec"].clone();
            spec["template"]["metadata"]["labels"]["jobset.sigs.k8s.io/jobset-name"] = name.into();
            self.version += 1;
            let made = json!({
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {
                    "name": job,
                    "namespace": key.1,
                    "uid": format!("uid-{}", self.version),
                    "labels": {"jobset.sigs.k8s.io/jobset-name": name},
                    "ownerReferences": [{"kind": "JobSet", "name": name, "uid": set["metadata"]["uid"]}],
                },
                "spec": spec,
            });
            self.all.insert(job_key, made);
        }
    }

    fn pods_of(&mut self, key: &Key, job: &Value) {
        let uid = &job["metadata"]["uid"];
        let mine: Vec<_> = self
            .of("pods")
            .into_iter()
            .filter(|(_, pod)| &pod["metadata"]["ownerReferences"][0]["uid"] == uid)
            .collect();
        let is_leaving = !job["metadata"]["deletionTimestamp"].is_null() || job["spec"]["suspend"] == true;
        let at_once = job["spec"]["parallelism"].as_u64().unwrap_or(1);
        let wanted =
            if is_leaving { 0 } else { at_once.min(job["spec"]["completions"].as_u64().unwrap_or(u64::MAX)) };
        let staying: Vec<_> =
            mine.iter().filter(|(_, pod)| pod["metadata"]["deletionTimestamp"].is_null()).collect();
        for _ in staying.len() as u64..wanted {
            self.start_pod(key, job);
        }
        for (pod, _) in staying.iter().skip(wanted as usize) {
            self.let_go(pod.clone());
        }
        if let Some(job) = self.all.get_mut(key) {
            job["status"]["active"] = wanted.into();
            job["status"]["ready"] = wanted.into();
        }
    }

    fn start_pod(&mut self, key: &Key, job: &Value) {
        self.version += 1;
        let name = format!("{}-{:05}", key.2, self.version);
        let mut labels = job["spec"]["template"]["metadata"]["labels"].clone();
        labels["batch.kubernetes.io/job-name"] = key.2.as_str().into();
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "namespace": key.1,
                "uid": format!("uid-{}", self.version),
                "creationTimestamp": format!("2026-01-01T00:{:02}:{:02}Z", self.version / 60 % 60, self.version % 60),
                "labels": labels,
                "ownerReferences": [{"kind": "Job", "name": key.2, "uid": job["metadata"]["uid"]}],
            },
            "spec": job["spec"]["template"]["spec"],
            "status": {
                "phase": "Running",
                "startTime": "2026-01-01T00:00:00Z",
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        });
        let mut pod = pod;
        pod["spec"]["nodeName"] = "node-a".into();
        self.all.insert(("pods".into(), key.1.clone(), name), pod);
    }
}
