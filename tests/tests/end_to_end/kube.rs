//! `musher kube` against an API server, with a kubeconfig, over TLS.

use std::{fs, process::Command};

use musher_tests::{DataSet, Job, Scene, cluster::Cluster, process::until};
use rustix::process::Signal;
use serde_json::{Value, json};

/// A scene with a cluster and a job named `tiny`.
struct Told {
    scene: Scene,
    cluster: Cluster,
    data: DataSet,
}

const SIZE: [&str; 3] = ["tiny.toml", "--nodes=2", "--gpus-per-node=0"];

impl Told {
    fn new() -> Self {
        let scene = Scene::new();
        let data = scene.data();
        Job::tiny(&data).write(&scene.path("tiny.toml"));
        let cluster = Cluster::start(&scene.path("cluster"));
        Self { scene, cluster, data }
    }

    /// `musher kube ARGS` as Ann.
    fn kube(&self, args: &[&str]) -> Command {
        let mut command = self.scene.musher(&[&["kube"], args].concat());
        command.env("KUBECONFIG", self.scene.path("cluster/config"));
        command
    }

    /// Its standard output.
    #[track_caller]
    fn run(&self, args: &[&str]) -> String {
        self.scene.start(self.kube(args)).wait().expect_code(0).stdout
    }

    /// What it says when it ends with that code.
    #[track_caller]
    fn refused(&self, code: i32, args: &[&str]) -> String {
        self.scene.start(self.kube(args)).wait().expect_code(code).last_words().to_owned()
    }

    #[track_caller]
    fn apply(&self, more: &[&str]) -> String {
        self.run(&[&["apply"], &SIZE[..], more].concat())
    }

    fn pods(&self, of: &str) -> Vec<String> {
        let pods = self.cluster.objects().names("pods");
        pods.into_iter().filter(|pod| pod.contains(of)).collect()
    }
}

#[track_caller]
fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "no \"{part}\" in: {text}");
    }
}

#[test]
fn what_is_applied_is_what_is_rendered_and_again_changes_nothing() {
    let told = Told::new();
    let said = told.apply(&[]);
    let rendered = told.run(&[&["render"], &SIZE[..]].concat());
    let documents: Vec<Value> = rendered
        .split("---\n")
        .filter(|document| !document.is_empty())
        .map(|document| serde_norway::from_str(document).expect("what is rendered is YAML"))
        .collect();
    assert_eq!(documents.len(), 7);
    for document in &documents {
        let (kind, name) = (document["kind"].as_str(), document["metadata"]["name"].as_str());
        let (kind, name) = (kind.expect("it has a kind"), name.expect("it has a name"));
        says(&said, &[&format!("{kind} {name} applied")]);
        let plural = match kind {
            "NetworkPolicy" => "networkpolicies".to_owned(),
            kind => format!("{}s", kind.to_lowercase()),
        };
        let kept = told.cluster.object(&plural, name);
        assert_eq!(kept["spec"], document["spec"], "{kind} {name}");
        assert_eq!(kept["data"], document["data"], "{kind} {name}");
        assert_eq!(kept["metadata"]["labels"], document["metadata"]["labels"], "{kind} {name}");
    }
    assert_eq!((told.pods("workers").len(), told.pods("coordinator").len()), (2, 1));
    let before = told.cluster.object("jobs", "tiny-workers")["spec"].clone();
    told.apply(&[]);
    assert_eq!(told.cluster.object("jobs", "tiny-workers")["spec"], before);
    assert_eq!(told.pods("workers").len(), 2);
}

#[test]
fn what_pods_would_wait_for_is_said() {
    let told = Told::new();
    let end = told.scene.start(told.kube(&[&["apply"], &SIZE[..]].concat())).wait().expect_code(0);
    says(&end.stderr, &["secret musher-tokens", "claim musher-data", "namespace train"]);
    let tried =
        told.kube(&["apply", "tiny.toml", "--name=other", "--nodes=1", "--gpus-per-node=8", "--dry-run"]);
    let end = told.scene.start(tried).wait().expect_code(0);
    says(&end.stdout, &["Job other-workers applied (tried, and not kept)"]);
    assert!(!told.cluster.objects().names("jobs").contains(&"other-workers".to_owned()));
}

#[test]
fn what_no_pod_could_do_is_refused() {
    let told = Told::new();
    let wrong = [
        ("cluster.min_workers", "40", "no team would ever form"),
        ("cluster.max_workers", "1", "cluster.max_workers is 1: raise it"),
        ("cluster.device", "\"cuda\"", "give --gpus-per-node"),
        ("checkpoint.store", "\"/mnt/checkpoints\"", "a directory that no pod has"),
        ("model.pretrained", "\"encoder.pth\"", "a file that no pod has"),
    ];
    for (key, value, expected) in wrong {
        Job::tiny(&told.data).set(key, value).write(&told.scene.path("wrong.toml"));
        says(&told.refused(2, &["render", "wrong.toml", "--nodes=2", "--gpus-per-node=0"]), &[expected]);
    }
}

#[test]
fn another_template_and_other_owners_are_refused_with_what_to_do() {
    let told = Told::new();
    told.apply(&[]);
    let other = told.refused(2, &["apply", "tiny.toml", "--nodes=3", "--gpus-per-node=0"]);
    says(&other, &["Job tiny-coordinator", "musher kube scale", "musher kube delete"]);
    // Nor is another job, of which only the next coordinator would read; and nothing has changed.
    let file = told.scene.path("tiny.toml");
    let text = std::fs::read_to_string(&file).expect("the job is there");
    std::fs::write(&file, format!("seed = 45\n{text}")).expect("it can be written");
    let kept = told.cluster.object("configmaps", "tiny-job");
    let other = told.refused(2, &[&["apply"], &SIZE[..]].concat());
    says(&other, &["Job tiny-coordinator", "musher kube delete"]);
    assert_eq!(told.cluster.object("configmaps", "tiny-job")["data"], kept["data"]);
    std::fs::write(&file, text).expect("it can be written");
    // One that was scaled is not scaled back by the way.
    told.run(&["scale", "tiny", "--nodes=5"]);
    let conflict = told.refused(2, &[&["apply"], &SIZE[..]].concat());
    says(&conflict, &["Job tiny-workers", "--force-conflicts", "spec.parallelism"]);
    told.apply(&["--force-conflicts"]);
    assert_eq!(told.cluster.object("jobs", "tiny-workers")["spec"]["parallelism"], 2);
}

#[test]
fn a_run_is_scaled_by_its_workers_job_alone() {
    let told = Told::new();
    told.apply(&[]);
    let coordinator = told.cluster.object("jobs", "tiny-coordinator")["spec"].clone();
    says(&told.run(&["scale", "tiny", "--nodes", "4"]), &["tiny-workers: 4 nodes, was 2", "newcomers"]);
    assert_eq!(told.pods("workers").len(), 4);
    says(&told.run(&["scale", "tiny", "--nodes", "1"]), &["1 nodes, was 4", "finish their step"]);
    until(|| (told.run(&["status", "tiny"]).matches("worker  ").count() == 1).then_some(()), || "".into());
    assert_eq!(told.cluster.object("jobs", "tiny-coordinator")["spec"], coordinator);
    says(
        &told.refused(2, &["scale", "huge", "--nodes", "4"]),
        &["no run \"huge\"", "namespace train", "there is tiny"],
    );
    let ended = json!([{"type": "Complete", "status": "True"}]);
    told.cluster.objects().change("jobs", "tiny-workers", |job| job["status"]["conditions"] = ended);
    says(&told.refused(2, &["scale", "tiny", "--nodes", "4"]), &["has ended (Complete)"]);
}

#[test]
fn what_kueue_admitted_is_scaled_only_where_it_is_elastic() {
    let told = Told::new();
    told.apply(&[]);
    told.cluster.objects().change("jobs", "tiny-workers", |job| {
        job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "gpus".into();
    });
    let said = told.refused(2, &["scale", "tiny", "--nodes", "4"]);
    says(
        &said,
        &[
            "Kueue",
            "queue gpus",
            "alpha",
            "ElasticJobsViaWorkloadSlices",
            "musher kube delete tiny",
            "--nodes 4",
        ],
    );
    assert_eq!(told.cluster.object("jobs", "tiny-workers")["spec"]["parallelism"], 2);
    told.cluster.objects().change("jobs", "tiny-workers", |job| {
        job["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"] = "true".into();
    });
    told.run(&["scale", "tiny", "--nodes", "4"]);
    assert_eq!(told.cluster.object("jobs", "tiny-workers")["spec"]["parallelism"], 4);
}

#[test]
fn a_job_set_waits_for_its_queue_and_keeps_its_size() {
    let told = Told::new();
    let unknown = told.refused(1, &[&["apply"], &SIZE[..], &["--jobset"]].concat());
    says(&unknown, &["does not know the kind of JobSet tiny", "installed"]);
    told.cluster.objects().install_job_sets();
    told.apply(&["--jobset", "--queue=gpus"]);
    says(&told.run(&["status", "tiny"]), &["as JobSet, in Kueue's queue gpus, suspended", "no pods"]);
    // Kueue admits it.
    told.cluster.objects().change("jobsets", "tiny", |set| set["spec"]["suspend"] = false.into());
    says(&told.run(&["status", "tiny"]), &["tiny-workers-0", "2 of 2 pods ready", "worker       Running"]);
    told.apply(&["--jobset", "--queue=gpus"]);
    assert_eq!(told.pods("workers").len(), 2, "who applies again takes nothing back from the queue");
    says(
        &told.refused(2, &["scale", "tiny", "--nodes", "4"]),
        &["JobSet", "fixed", "musher kube delete tiny"],
    );
    told.run(&["delete", "tiny"]);
    let objects = told.cluster.objects();
    assert_eq!([objects.names("jobsets"), objects.names("jobs"), objects.names("pods")], [[""; 0]; 3]);
}

#[test]
fn a_status_shows_pods_what_ails_them_and_what_the_run_says_itself() {
    let told = Told::new();
    told.apply(&[]);
    let ill = told.pods("workers")[0].clone();
    told.cluster.objects().change("pods", &ill, |pod| {
        pod["status"] = json!({"phase": "Pending", "conditions": [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"},
        ]});
    });
    // Nothing listens in the coordinator's pod yet.
    let said = told.run(&["status", "tiny"]);
    says(
        &said,
        &["run tiny in the namespace train, as Jobs", "0/3 nodes are available", "claim tiny-run", "20Gi"],
    );
    says(&said, &["what the run itself says is not known", "connection refused"]);
    // The coordinator's pod, for once, is one of flesh and blood.
    let mut run = told.scene.serve(&Job::tiny(&told.data).endless(), "tiny", &[]);
    let worker = told.scene.join(&run, "w", &[]);
    let page = run.wait_for_nth("run_started", 1).text("page").to_owned();
    let page =
        page.trim_start_matches("http://").trim_end_matches('/').parse().expect("a page has an address");
    let pod = told.pods("coordinator")[0].clone();
    told.cluster.objects().ports.insert((pod, 7401), page);
    run.wait_for_nth("epoch_started", 1);
    let seen = told.run(&["status", "tiny", "--json"]);
    let seen: Value = serde_json::from_str(&seen).expect("it is JSON");
    assert_eq!(seen["status"]["run"], "tiny", "{seen}");
    assert_eq!(seen["status"]["samples"], 40);
    assert_eq!(seen["pods"].as_array().map(Vec::len), Some(3));
    says(
        &told.run(&["status", "tiny"]),
        &["/40 samples, step ", "generation 1, 1 in the team", "rank   0  w"],
    );
    run.signal(Signal::TERM);
    run.wait().expect_code(75);
    worker.wait().expect_code(75);
}

#[test]
fn logs_are_the_coordinator_s_or_of_whom_is_asked() {
    let told = Told::new();
    told.apply(&[]);
    let (coordinator, worker) = (told.pods("coordinator")[0].clone(), told.pods("workers")[0].clone());
    for line in ["one", "two", "three"] {
        told.cluster.say(&coordinator, line);
    }
    told.cluster.say(&worker, "joined");
    assert_eq!(told.run(&["logs", "tiny"]), "one\ntwo\nthree\n");
    assert_eq!(told.run(&["logs", "tiny", "--tail", "1"]), "three\n");
    assert_eq!(told.run(&["logs", "tiny", &worker]), "joined\n");
    let all = told.run(&["logs", "tiny", "--all"]);
    says(&all, &[&format!("{coordinator}  two"), "joined"]);
    let unknown = told.refused(2, &["logs", "tiny", "tiny-workers-0"]);
    says(&unknown, &["no pod tiny-workers-0", &worker]);
    // What comes is followed until the pod ends.
    let following = told.scene.start(told.kube(&["logs", "tiny", "--follow"]));
    until(|| following.said().contains("three").then_some(()), || following.said());
    told.cluster.say(&coordinator, "four");
    until(|| following.said().contains("four").then_some(()), || following.said());
    told.cluster.fall_silent(&coordinator);
    following.wait().expect_code(0);
    told.cluster.objects().change("pods", &worker, |pod| pod["status"]["phase"] = "Pending".into());
    says(&told.refused(1, &["logs", "tiny", &worker]), &["waiting to start: ContainerCreating"]);
}

#[test]
fn a_deleted_run_saves_before_its_network_goes_and_keeps_its_claim() {
    let told = Told::new();
    told.apply(&[]);
    let said = told.run(&["delete", "tiny"]);
    says(&said, &["Job tiny-workers ends", "Service tiny-coordinator deleted", "kept: the claim tiny-run"]);
    {
        let objects = told.cluster.objects();
        for plural in ["jobs", "pods", "services", "networkpolicies", "configmaps"] {
            assert_eq!(objects.names(plural), [""; 0], "{plural}");
        }
        assert_eq!(objects.names("persistentvolumeclaims"), ["tiny-run"]);
        let asked = |what: &str| objects.requests.iter().position(|request| request == what);
        let (job, service) = (asked("delete jobs/tiny-workers"), asked("delete services/tiny-coordinator"));
        let (job, service) = (job.expect("it was deleted"), service.expect("it was deleted"));
        let looks = objects.requests[job..service].iter().filter(|request| *request == "list pods/");
        assert!(looks.count() > 1, "pods take a while to leave: {:?}", objects.requests);
    }
    says(&told.run(&["delete", "tiny", "--with-claim"]), &["PersistentVolumeClaim tiny-run deleted"]);
    says(&told.refused(2, &["delete", "tiny"]), &["no run \"tiny\"", "there is none at all"]);
}

#[test]
fn two_runs_in_one_namespace_are_kept_apart() {
    let told = Told::new();
    told.apply(&[]);
    told.apply(&["--name=other"]);
    assert!(!told.run(&["status", "tiny"]).contains("other"));
    told.run(&["delete", "other"]);
    assert_eq!((told.pods("workers").len(), told.pods("coordinator").len()), (2, 1));
    assert_eq!(told.cluster.objects().names("services"), ["tiny-coordinator"]);
}

#[test]
fn who_may_not_and_what_is_not_there_is_told_in_a_sentence() {
    let told = Told::new();
    told.apply(&[]);
    let status = ["status", "tiny"];
    told.cluster.objects().forbidden = vec![("list", "pods"), ("patch", "jobs")];
    says(
        &told.refused(1, &status),
        &["not allowed to list Pods", "namespace train", "User \"ann\" cannot list"],
    );
    says(&told.refused(1, &["scale", "tiny", "--nodes=3"]), &["not allowed to list Pods"]);
    told.cluster.objects().forbidden.remove(0);
    says(&told.refused(1, &["scale", "tiny", "--nodes=3"]), &["not allowed to patch Job tiny-workers"]);
    // A port that may not be forwarded costs the run's own words alone.
    told.cluster.objects().forbidden = vec![("get", "pods/portforward")];
    says(&told.run(&status), &["tiny-workers", "is not known: not allowed to forward a port of Pod"]);
    let with = |flags: &[&str]| told.refused(2, &[&status, flags].concat());
    says(
        &with(&["--context=nowhere", "--namespace=x", "--kubeconfig=missing"]),
        &["no cluster is configured", "missing"],
    );
    says(&with(&["--context=there"]), &["no context \"there\"", "it has here, nowhere"]);
    says(&with(&["--namespace=default"]), &["no run \"tiny\" in the namespace default", "none at all"]);
    let apply = [&["apply"], &SIZE[..], &["--namespace=elsewhere"]].concat();
    says(&told.refused(2, &apply), &["no namespace elsewhere", "kubectl create namespace elsewhere"]);
    let away = told.refused(1, &["status", "tiny", "--context=nowhere"]);
    says(&away, &["no API server answers at https://127.0.0.1:1", "refused", "context"]);
    let stranger = told.cluster.kubeconfig("strangers", "another-token");
    let stranger = told.refused(1, &["status", "tiny", "--kubeconfig", &stranger.display().to_string()]);
    says(&stranger, &["does not know who asks"]);
    // A server that another authority vouches for is none of ours.
    fs::copy(told.scene.path("cluster/server.pem"), told.scene.path("cluster/ca.pem"))
        .expect("both are files");
    says(&told.refused(1, &status), &["no API server answers", "certificate"]);
    let none = told.scene.start({
        let mut command = told.scene.musher(&["kube", "status", "tiny"]);
        command.env_remove("KUBECONFIG").env("HOME", told.scene.path("home"));
        command
    });
    says(none.wait().expect_code(2).last_words(), &["no cluster is configured", "--kubeconfig"]);
}
