//! What a run in a cluster looks like, for people and for programs. Pure.

use k8s_openapi::{
    api::{
        batch::v1::Job,
        core::v1::{ContainerState, Pod},
    },
    apimachinery::pkg::apis::meta::v1::Time,
};
use serde::Serialize;
use serde_json::Value;

use super::{Form, Role, RunObjects};

/// Where a coordinator's page is, unless its arguments say otherwise.
const PAGE: u16 = 7401;

#[derive(Debug, Serialize)]
pub struct View {
    run: String,
    namespace: String,
    form: &'static str,
    queue: Option<String>,
    suspended: bool,
    jobs: Vec<JobView>,
    pods: Vec<PodView>,
    claim: Option<ClaimView>,
    /// What the coordinator says of the run, as its page's API.
    status: Option<Value>,
    /// Why there is no status.
    status_unknown: Option<String>,
}

#[derive(Debug, Serialize)]
struct JobView {
    job: String,
    role: &'static str,
    wanted: i32,
    ready: i32,
    active: i32,
    succeeded: i32,
    failed: i32,
    /// Those that hold: Complete, Failed, Suspended, ...
    conditions: Vec<String>,
}

#[derive(Debug, Serialize)]
struct PodView {
    pod: String,
    role: &'static str,
    phase: String,
    ready: bool,
    restarts: i32,
    node: Option<String>,
    since: Option<String>,
    /// Why it is as it is, where it is not well.
    trouble: Option<String>,
}

#[derive(Debug, Serialize)]
struct ClaimView {
    claim: String,
    phase: String,
    size: Option<String>,
}

/// The port of the page, as the coordinator's pod is told it.
pub fn page_port(pod: &Pod) -> u16 {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let args = containers.filter_map(|container| container.args.as_ref()).flatten();
    // The last one counts, as in the command.
    let mut ports =
        args.filter_map(|arg| arg.strip_prefix("--set=server.http=")?.rsplit(':').next()?.parse().ok());
    ports.next_back().unwrap_or(PAGE)
}

impl View {
    pub fn new(run: &RunObjects, namespace: &str, status: Result<Value, String>) -> Self {
        let (status, status_unknown) = match status {
            Ok(status) => (Some(status), None),
            Err(why) => (None, Some(why)),
        };
        Self {
            run: run.name.clone(),
            namespace: namespace.to_owned(),
            form: match run.form {
                Form::Jobs => "Jobs",
                Form::JobSet(_) => "JobSet",
            },
            queue: run.queue().map(str::to_owned),
            suspended: run.is_suspended(),
            jobs: run.jobs.iter().map(JobView::new).collect(),
            pods: run.pods.iter().map(PodView::new).collect(),
            claim: run.claim.as_ref().map(|claim| ClaimView {
                claim: claim.metadata.name.clone().unwrap_or_default(),
                phase: claim
                    .status
                    .as_ref()
                    .and_then(|it| it.phase.clone())
                    .unwrap_or_else(|| "Pending".into()),
                size: claim
                    .spec
                    .as_ref()
                    .and_then(|spec| spec.resources.as_ref()?.requests.as_ref()?.get("storage").cloned())
                    .map(|size| size.0),
            }),
            status,
            status_unknown,
        }
    }

    pub fn to_json(&self) -> Value {
        serde_json::to_value(self).expect("a view is plain data")
    }

    pub fn to_text(&self) -> String {
        let mut text = format!("run {} in the namespace {}, as {}", self.run, self.namespace, self.form);
        if let Some(queue) = &self.queue {
            text += &format!(", in Kueue's queue {queue}");
        }
        text += if self.suspended { ", suspended\n" } else { "\n" };
        let width = |names: &mut dyn Iterator<Item = &String>| names.map(String::len).max().unwrap_or(0);
        let jobs = width(&mut self.jobs.iter().map(|job| &job.job));
        for job in &self.jobs {
            text += &format!("  {:<jobs$}  {} of {} pods ready", job.job, job.ready, job.wanted);
            for (count, what) in [(job.succeeded, "succeeded"), (job.failed, "failed")] {
                if count > 0 {
                    text += &format!(", {count} {what}");
                }
            }
            for condition in &job.conditions {
                text += &format!("; {condition}");
            }
            text += "\n";
        }
        let pods = width(&mut self.pods.iter().map(|pod| &pod.pod));
        text += if self.pods.is_empty() { "no pods\n" } else { "pods\n" };
        for pod in &self.pods {
            let ready = if pod.ready { "ready" } else { "not ready" };
            text += &format!("  {:<pods$}  {:<11}  {:<9}  {ready:<9}", pod.pod, pod.role, pod.phase);
            if let Some(node) = &pod.node {
                text += &format!("  on {node}");
            }
            if let Some(since) = &pod.since {
                text += &format!("  since {since}");
            }
            if pod.restarts > 0 {
                text += &format!("  {} restarts", pod.restarts);
            }
            if let Some(trouble) = &pod.trouble {
                text += &format!("  {trouble}");
            }
            text += "\n";
        }
        if let Some(claim) = &self.claim {
            text += &format!(
                "claim {}: {}, {}\n",
                claim.claim,
                claim.phase,
                claim.size.as_deref().unwrap_or("?")
            );
        }
        match (&self.status, &self.status_unknown) {
            (Some(status), _) => text += &said_of_itself(status),
            (None, Some(why)) => text += &format!("what the run itself says is not known: {why}\n"),
            (None, None) => {}
        }
        text
    }
}

impl JobView {
    fn new(job: &Job) -> Self {
        let status = job.status.clone().unwrap_or_default();
        let spec = job.spec.as_ref();
        Self {
            job: job.metadata.name.clone().unwrap_or_default(),
            role: Role::of_job(job).name(),
            wanted: spec.and_then(|spec| spec.parallelism).unwrap_or(1),
            ready: status.ready.unwrap_or(0),
            active: status.active.unwrap_or(0),
            succeeded: status.succeeded.unwrap_or(0),
            failed: status.failed.unwrap_or(0),
            conditions: status
                .conditions
                .into_iter()
                .flatten()
                .filter(|condition| condition.status == "True")
                .map(|condition| because(&condition.type_, condition.reason, condition.message))
                .collect(),
        }
    }
}

impl PodView {
    fn new(pod: &Pod) -> Self {
        let status = pod.status.clone().unwrap_or_default();
        let holds =
            |name: &str| status.conditions.iter().flatten().any(|it| it.type_ == name && it.status == "True");
        let leaving = pod.metadata.deletion_timestamp.is_some();
        let phase =
            if leaving { "Terminating".into() } else { status.phase.clone().unwrap_or("Unknown".into()) };
        let containers = status.container_statuses.iter().flatten();
        Self {
            pod: pod.metadata.name.clone().unwrap_or_default(),
            role: Role::of_pod(pod).name(),
            phase,
            ready: holds("Ready"),
            restarts: containers.map(|container| container.restart_count).sum(),
            node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
            since: status.start_time.as_ref().map(|Time(time)| time.to_string()),
            trouble: trouble(pod),
        }
    }
}

fn trouble(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let all = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
    let of_containers = all.filter_map(|container| match container.state.as_ref()? {
        ContainerState { waiting: Some(waiting), .. } => {
            let reason = waiting.reason.clone().unwrap_or_default();
            let is_well = ["PodInitializing", "ContainerCreating"].contains(&reason.as_str());
            (!is_well).then(|| because(&reason, None, waiting.message.clone()))
        }
        ContainerState { terminated: Some(ended), .. } if ended.exit_code != 0 => {
            Some(because(&meaning(ended.exit_code), ended.reason.clone(), ended.message.clone()))
        }
        _ => None,
    });
    let unscheduled =
        status.conditions.iter().flatten().find(|it| it.type_ == "PodScheduled" && it.status == "False");
    let unscheduled = unscheduled
        .map(|it| because(it.reason.as_deref().unwrap_or("Unschedulable"), None, it.message.clone()));
    of_containers.chain(unscheduled).chain(status.reason.clone()).next()
}

/// The contract's exit codes, and the signals of Kubernetes.
fn meaning(exit_code: i32) -> String {
    let said = match exit_code {
        2 => ", bad usage or configuration",
        75 => ", stopped or drained",
        137 => ", killed",
        143 => ", stopped before it had begun",
        _ => "",
    };
    format!("ended with {exit_code}{said}")
}

fn because(what: &str, reason: Option<String>, message: Option<String>) -> String {
    let mut text = what.to_owned();
    for more in [reason, message].into_iter().flatten().filter(|more| !more.is_empty()) {
        text += &format!(": {}", more.trim());
    }
    text
}

/// From the JSON of the page's API.
fn said_of_itself(status: &Value) -> String {
    let text = |field: &str| status[field].as_str().unwrap_or("?").to_owned();
    let count = |field: &str| status[field].as_u64().unwrap_or(0);
    let mut said = format!(
        "{}: epoch {}/{}, {}/{} samples, step {}",
        text("phase"),
        count("epoch"),
        count("epochs"),
        count("cursor"),
        count("samples"),
        count("step"),
    );
    if let Some(loss) = status["loss"].as_f64() {
        said += &format!(", loss {loss:.4}");
    }
    if let Some(rate) = status["images_per_second"].as_f64() {
        said += &format!(", {rate:.1} images/s");
    }
    said += &format!("\ngeneration {}, {} in the team\n", count("generation"), count("team_size"));
    for worker in status["workers"].as_array().into_iter().flatten() {
        let rank = worker["rank"].as_u64().map_or("-".into(), |rank| rank.to_string());
        said += &format!(
            "  rank {rank:>3}  {:<32} {:<8} {}, {}\n",
            worker["worker"].as_str().unwrap_or("?"),
            worker["device"].as_str().unwrap_or("?"),
            worker["doing"].as_str().unwrap_or("?"),
            worker["health"].as_str().unwrap_or("?"),
        );
    }
    if let Some(trouble) = status["last_trouble"].as_str() {
        said += &format!("last trouble: {trouble}\n");
    }
    said
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(fields: Value) -> Pod {
        serde_json::from_value(fields).expect("it is a pod")
    }

    #[test]
    fn a_pod_that_is_not_well_says_why() {
        let waiting = |reason: &str| {
            json!({"status": {"phase": "Pending", "containerStatuses": [{
                "name": "worker", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                "state": {"waiting": {"reason": reason, "message": "back-off pulling"}},
            }]}})
        };
        let why = |fields| trouble(&pod(fields));
        assert_eq!(why(waiting("ImagePullBackOff")).as_deref(), Some("ImagePullBackOff: back-off pulling"));
        assert_eq!(why(waiting("ContainerCreating")), None);
        let unschedulable = json!({"status": {"phase": "Pending", "conditions": [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no nodes"},
        ]}});
        assert_eq!(why(unschedulable).as_deref(), Some("Unschedulable: no nodes"));
        let ended = |code: i32| {
            json!({"status": {"phase": "Failed", "containerStatuses": [{
                "name": "worker", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                "state": {"terminated": {"exitCode": code}},
            }]}})
        };
        assert_eq!(why(ended(75)).as_deref(), Some("ended with 75, stopped or drained"));
        assert_eq!(why(ended(0)), None);
    }

    #[test]
    fn the_page_s_port_is_the_one_told_last() {
        let told = |args: &[&str]| {
            page_port(&pod(json!({"spec": {"containers": [{"name": "coordinator", "args": args}]}})))
        };
        assert_eq!(told(&["serve"]), 7401);
        assert_eq!(told(&["--set=server.http=127.0.0.1:7401", "--set=server.http=0.0.0.0:80"]), 80);
    }
}
