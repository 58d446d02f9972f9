//! What the manifests must say for a run to survive what clusters do: each line here is a trap that somebody fell
//! into.

use serde_json::{Value, json};

use super::*;

fn deployment(gpus_per_node: u32, form: Form) -> Deployment {
    Deployment {
        name: "pets".into(),
        job: "name = \"pets\"\n".into(),
        nodes: 3,
        gpus_per_node,
        coordinator_image: "registry/coordinator:1".into(),
        worker_image: "registry/worker:1".into(),
        data_claim: Some("images".into()),
        environment: None,
        tokens: "secrets".into(),
        form,
    }
}

fn rendered(gpus_per_node: u32, form: Form) -> Vec<Value> {
    parse(&deployment(gpus_per_node, form).render())
}

fn find<'a>(documents: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let found = documents.iter().find(|it| it["kind"] == kind && it["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("no {kind} {name} in {documents:#?}"))
}

#[test]
fn workers_are_replaced_until_the_run_has_finished() {
    let documents = rendered(8, Form::Jobs);
    let job = &find(&documents, "Job", "pets-workers")["spec"];
    assert_eq!(job["parallelism"], 3);
    assert!(job.get("completions").is_none(), "with a number, that many successes would be waited for");
    assert_eq!(job["backoffLimit"], i32::MAX);
    assert_eq!(job["podReplacementPolicy"], "Failed");
    let rules = job["podFailurePolicy"]["rules"].as_array().cloned().unwrap_or_default();
    let actions: Vec<_> = rules.iter().map(|rule| rule["action"].as_str().unwrap_or_default()).collect();
    assert_eq!(actions, ["FailJob", "Ignore", "Ignore"]);
    assert_eq!(rules[0]["onExitCodes"]["values"], json!([2, 3]), "bad usage, or a run that failed");
    assert_eq!(rules[1]["onPodConditions"][0]["type"], "DisruptionTarget");
    assert_eq!(rules[2]["onExitCodes"]["values"], json!([75, 143]));
    let pod = &job["template"]["spec"];
    assert_eq!(pod["restartPolicy"], "Never", "a pod failure policy asks for it");
    let patience = pod["tolerations"].as_array().into_iter().flatten();
    assert_eq!(patience.filter(|toleration| toleration["tolerationSeconds"] == 30).count(), 2);
}

#[test]
fn a_node_s_pod_has_all_its_gpus_and_shared_memory_within_its_limit() {
    let documents = rendered(8, Form::Jobs);
    let pod = &find(&documents, "Job", "pets-workers")["spec"]["template"]["spec"];
    let worker = &pod["containers"][0];
    assert_eq!(worker["resources"]["limits"]["nvidia.com/gpu"], "8");
    assert!(worker["resources"]["requests"].get("nvidia.com/gpu").is_none());
    let shm = pod["volumes"].as_array().into_iter().flatten().find(|volume| volume["name"] == "shm");
    assert_eq!(shm.map(|shm| &shm["emptyDir"]), Some(&json!({"medium": "Memory", "sizeLimit": "16Gi"})));
    assert_eq!(worker["resources"]["limits"]["memory"], "160Gi");
    assert!(worker["args"].as_array().is_some_and(|args| args.contains(&"--workers-per-node=auto".into())));
    let coordinator =
        &find(&documents, "Job", "pets-coordinator")["spec"]["template"]["spec"]["containers"][0];
    let args = coordinator["args"].as_array().cloned().unwrap_or_default();
    assert!(args.contains(&"--set=cluster.workers=24".into()), "{args:?}");
}

#[test]
fn data_in_an_object_store_needs_no_volume_and_credentials_come_from_a_secret() {
    let deployment =
        Deployment { data_claim: None, environment: Some("bucket".into()), ..deployment(8, Form::Jobs) };
    let documents = parse(&deployment.render());
    for name in ["pets-coordinator", "pets-workers"] {
        let pod = &find(&documents, "Job", name)["spec"]["template"]["spec"];
        assert_eq!(pod["containers"][0]["envFrom"], json!([{"secretRef": {"name": "bucket"}}]));
        for gone in ["\"data\"", "--data-root", "musher-data"] {
            assert!(!pod.to_string().contains(gone), "{gone} in {pod:#}");
        }
    }
    let pod = &find(&documents, "Job", "pets-workers")["spec"]["template"]["spec"];
    assert_eq!(pod["volumes"].as_array().map(Vec::len), Some(3), "the others stay");
}

/// What ends it for good is the run's own word; whatever else happens to it, the next pod goes on.
#[test]
fn a_coordinator_that_is_moved_hands_over_and_one_whose_run_failed_is_not_replaced() {
    let documents = rendered(8, Form::Jobs);
    let job = &find(&documents, "Job", "pets-coordinator")["spec"];
    let rules = job["podFailurePolicy"]["rules"].as_array().cloned().unwrap_or_default();
    assert_eq!(rules[0]["action"], "FailJob");
    assert_eq!(rules[0]["onExitCodes"]["values"], json!([1, 2]));
    assert_eq!(rules[1]["onPodConditions"][0]["type"], "DisruptionTarget");
    assert_eq!(rules[2]["onExitCodes"]["values"], json!([75, 143]));
    let args = job["template"]["spec"]["containers"][0]["args"].as_array().cloned().unwrap_or_default();
    assert!(args.contains(&json!("--on-sigterm=hand-over")));
    let digests = ["pets-coordinator", "pets-workers"].map(|name| {
        find(&documents, "Job", name)["spec"]["template"]["metadata"]["annotations"][JOB_DIGEST].clone()
    });
    assert_eq!(digests[0], digests[1]);
    assert_eq!(digests[0].as_str().map(str::len), Some(64));
}

#[test]
fn probes_need_no_credentials_and_readiness_no_workers() {
    let documents = rendered(0, Form::Jobs);
    let pod = &find(&documents, "Job", "pets-coordinator")["spec"]["template"]["spec"];
    let coordinator = &pod["containers"][0];
    assert_eq!(coordinator["livenessProbe"]["httpGet"], json!({"path": "/livez", "port": "probes"}));
    assert_eq!(coordinator["readinessProbe"]["httpGet"], json!({"path": "/readyz", "port": "probes"}));
    assert_eq!(pod["restartPolicy"], "Never", "a pod failure policy asks for it");
    let claim = &find(&documents, "PersistentVolumeClaim", "pets-run")["spec"];
    assert_eq!(claim["accessModes"], json!(["ReadWriteOncePod"]));
    assert!(
        !documents.iter().any(|it| it["kind"] == "PodDisruptionBudget"),
        "a drain would wait for the run"
    );
}

#[test]
fn pods_have_no_more_rights_than_they_need() {
    for (name, documents) in
        [("pets-coordinator", rendered(0, Form::Jobs)), ("pets-workers", rendered(8, Form::Jobs))]
    {
        let pod = &find(&documents, "Job", name)["spec"]["template"]["spec"];
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["automountServiceAccountToken"], false);
        let security = &pod["containers"][0]["securityContext"];
        assert_eq!(security["readOnlyRootFilesystem"], true);
        assert_eq!(security["allowPrivilegeEscalation"], false);
        assert_eq!(security["capabilities"], json!({"drop": ["ALL"]}));
    }
    let documents = rendered(0, Form::Jobs);
    let volumes = &find(&documents, "Job", "pets-workers")["spec"]["template"]["spec"]["volumes"];
    let tokens = volumes.as_array().into_iter().flatten().find(|volume| volume["name"] == "worker-tokens");
    let items = tokens.map(|tokens| &tokens["secret"]["items"]);
    assert_eq!(
        items,
        Some(&json!([{"key": "join", "path": "join"}])),
        "the operator's token is not a worker's"
    );
}

#[test]
fn runs_in_one_namespace_keep_apart() {
    let text = deployment(8, Form::Jobs).render();
    assert!(!text.contains("musher-"), "{text}");
    for expected in
        ["claimName: images", "secretName: secrets", "image: registry/worker:1", "- pets-coordinator:7400"]
    {
        assert!(text.contains(expected), "{expected} in {text}");
    }
    let documents = rendered(8, Form::Jobs);
    let named = "app.kubernetes.io/instance";
    assert_eq!(find(&documents, "Service", "pets-coordinator")["spec"]["selector"][named], "pets");
    for policy in ["pets-coordinator", "pets-workers"] {
        let policy = &find(&documents, "NetworkPolicy", policy)["spec"];
        assert_eq!(policy["podSelector"]["matchLabels"][named], "pets");
        assert_eq!(policy["ingress"][0]["from"][0]["podSelector"]["matchLabels"][named], "pets");
    }
    let workers = &find(&documents, "Job", "pets-workers")["spec"]["template"];
    assert_eq!(workers["metadata"]["labels"][named], "pets");
    assert_eq!(
        workers["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"][named],
        "pets"
    );
}

#[test]
fn a_job_set_ends_with_its_coordinator_and_restarts_nobody_for_a_worker() {
    let documents = rendered(8, Form::JobSet { queue: Some("gpus".into()) });
    assert!(!documents.iter().any(|document| document["kind"] == "Job"));
    let set = find(&documents, "JobSet", "pets");
    assert_eq!(set["metadata"]["labels"]["kueue.x-k8s.io/queue-name"], "gpus");
    assert_eq!(set["spec"]["suspend"], true, "Kueue admits it");
    assert_eq!(set["spec"]["successPolicy"]["targetReplicatedJobs"], json!(["coordinator"]));
    assert_eq!(set["spec"]["failurePolicy"]["maxRestarts"], 0);
    let workers = &set["spec"]["replicatedJobs"][1]["template"]["spec"];
    assert_eq!((&workers["completions"], &workers["parallelism"]), (&3.into(), &3.into()));
}

#[test]
fn the_overlay_s_job_set_is_what_is_rendered() {
    let deployment = Deployment {
        name: "musher".into(),
        nodes: 2,
        coordinator_image: "musher-coordinator".into(),
        worker_image: "musher-worker".into(),
        data_claim: Some(DATA.into()),
        environment: None,
        tokens: TOKENS.into(),
        ..deployment(8, Form::JobSet { queue: Some("gpus".into()) })
    };
    let kept = parse(include_str!("../../../deploy/k8s/overlays/jobset/jobset.yaml"));
    let mut rendered = find(&parse(&deployment.render()), "JobSet", "musher").clone();
    // The overlay's job file is whatever is put beside it.
    for job in rendered["spec"]["replicatedJobs"].as_array_mut().expect("it has two") {
        let metadata = job["template"]["spec"]["template"]["metadata"].as_object_mut();
        metadata.expect("pods have labels").remove("annotations").expect("pods tell their job's digest");
    }
    assert_eq!(kept[..], [rendered]);
}

/// What a type does not know is dropped, and would be missed.
#[cfg(feature = "kube")]
#[test]
fn all_fields_are_those_of_kubernetes_own_types() {
    use k8s_openapi::api::{
        batch::v1::Job,
        core::v1::{ConfigMap, PersistentVolumeClaim, Service},
        networking::v1::NetworkPolicy,
    };
    fn again<K: serde::de::DeserializeOwned + serde::Serialize>(document: &Value) -> Value {
        let typed: K = serde_json::from_value(document.clone())
            .unwrap_or_else(|error| panic!("{error} in {document:#?}"));
        serde_json::to_value(typed).expect("a manifest is plain data")
    }
    for document in rendered(8, Form::Jobs).iter().chain(&rendered(0, Form::Jobs)) {
        let typed = match document["kind"].as_str() {
            Some("ConfigMap") => again::<ConfigMap>(document),
            Some("Job") => again::<Job>(document),
            Some("NetworkPolicy") => again::<NetworkPolicy>(document),
            Some("PersistentVolumeClaim") => again::<PersistentVolumeClaim>(document),
            Some("Service") => again::<Service>(document),
            other => panic!("{other:?} is a kind that nobody checks"),
        };
        assert_eq!(&typed, document);
    }
    let job = find(&rendered(8, Form::Jobs), "Job", "pets-workers").clone();
    let mut misspelt = job.clone();
    misspelt["spec"]["template"]["spec"]["tolerationz"] = json!([]);
    assert_ne!(again::<Job>(&misspelt), misspelt);
}
