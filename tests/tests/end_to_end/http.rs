//! A live run over HTTP.

use std::net::TcpListener;

use musher_tests::{
    Job, Scene,
    http::{follow, get},
    process::until,
};

#[test]
fn a_live_run_can_be_looked_at() {
    let scene = Scene::new();
    let probes = TcpListener::bind("127.0.0.1:0").and_then(|port| port.local_addr()).expect("a port is free");
    let job = Job::tiny(&scene.data()).endless().set("server.probes", format!("\"{probes}\""));
    let mut run = scene.launch(&job, "seen", 2, &[]);
    let page = run.wait_for_nth("run_started", 1).text("page").to_owned();
    run.wait_for_nth("validated", 1);

    for path in ["/livez", "/readyz"] {
        assert_eq!(get(&page, path).code, 200);
        assert_eq!(get(&probes.to_string(), path).text(), "ok\n");
    }
    assert_eq!(get(&probes.to_string(), "/metrics").code, 404, "the probes' port is for probes alone");

    let status = get(&page, "/api/v1/status").json();
    assert_eq!((&status["run"], &status["team_size"]), (&"tiny".into(), &2.into()));
    assert!(status["workers"][0]["step_ms"].is_number(), "{status}");
    assert!(status["workers"][0]["peers_wait_ms"].is_number(), "{status}");
    assert!(get(&page, "/api/v1/curves").json()["validations"][0]["val_loss"].is_number());
    assert_eq!(get(&page, "/api/v1/events").json()[0]["event"], "run_started");
    assert!(get(&page, "/metrics").text().contains("\nmusher_team_size 2.0\n"));
    let sample = get(&page, "/api/v1/samples/latest.png");
    assert!(sample.body.starts_with(b"\x89PNG"), "{}", sample.head);

    let asked = until(
        || Some(scene.status(&run)).filter(|status| status["eta_s"].as_f64() > Some(0.0)),
        || "the status does not say how long it will take".into(),
    );
    assert_eq!(keys(&asked), keys(&status), "the command line and the API call things alike");
    assert_eq!(keys(&asked["workers"][0]), keys(&status["workers"][0]));
    assert_eq!(asked["monitor"], "val_loss");
    assert!(asked["learning_rate"].as_f64() > Some(0.0), "{asked}");

    the_stream_is_live(&page);
    all_that_is_described_is_there(&page);
    nothing_can_be_changed(&page);
    run.kill();
}

fn keys(object: &serde_json::Value) -> Vec<&String> {
    object.as_object().expect("an object").keys().collect()
}

/// Past events, the status as it is, and what comes.
fn the_stream_is_live(page: &str) {
    let mut steps = Vec::new();
    let (mut past, mut told) = (false, false);
    let mut kind = String::new();
    for line in follow(page, "/api/v1/stream") {
        if let Some(event) = line.strip_prefix("event: ") {
            kind = event.to_owned();
        } else if let Some(data) = line.strip_prefix("data: ") {
            let data: serde_json::Value = serde_json::from_str(data).expect("events are JSON");
            match kind.as_str() {
                "status" => steps.extend(data["step"].as_u64()),
                _ if data["event"] == "run_started" => past = true,
                _ => told |= data["event"] == "progress",
            }
        }
        if past && told && steps.first() < steps.last() {
            return;
        }
    }
    panic!("the stream ended: {steps:?}");
}

fn all_that_is_described_is_there(page: &str) {
    let description = get(page, "/api/v1/openapi.json").json();
    let paths = description["paths"].as_object().expect("a description has paths");
    assert_eq!(paths.len(), 8);
    for path in paths.keys().filter(|path| !path.ends_with("/stream")) {
        assert_eq!(get(page, path).code, 200, "{path}");
    }
    let described = description["components"]["schemas"]["Status"]["properties"].as_object();
    let described: Vec<_> = described.expect("the status is described").keys().collect();
    let status = get(page, "/api/v1/status").json();
    let mut said: Vec<_> = status.as_object().expect("the status is an object").keys().collect();
    said.sort();
    assert_eq!(described, said);
}

/// The page is whole in itself, and there are but questions.
fn nothing_can_be_changed(page: &str) {
    let whole = get(page, "/");
    assert!(whole.head.contains("default-src 'none'"), "{}", whole.head);
    for outside in ["src=\"http", "href=\"http", "@import", "url("] {
        assert!(!whole.text().contains(outside), "the page reaches out: {outside}");
    }
    let description = get(page, "/api/v1/openapi.json").json();
    for (path, methods) in description["paths"].as_object().into_iter().flatten() {
        assert!(methods.as_object().is_some_and(|m| m.keys().all(|method| method == "get")), "{path}");
    }
}

#[test]
fn a_port_that_is_taken_is_named() {
    let scene = Scene::new();
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = taken.local_addr().expect("it has an address");
    let job = Job::tiny(&scene.data()).set("server.http", format!("\"{address}\""));
    let end = scene.serve(&job, "taken", &[]).wait().expect_code(2).end;
    assert!(end.stderr.contains(&format!("cannot listen on {address}")), "{}", end.stderr);
    assert!(end.stderr.contains("--set server.http="), "{}", end.stderr);
}
