//! A coordinator and workers that are started by hand, and the commands that talk to it.

use std::{fs, process::Command};

use musher_proto::{
    ids::{Generation, Term},
    message::{Fenced, FromWorker, Hello, PROTOCOL, ToWorker},
    wire::training_client::TrainingClient,
};
use musher_tests::{DataSet, Job, Scene, binaries::musher_worker, process::until};

#[test]
fn workers_join_a_served_run_which_can_be_asked_and_stopped() {
    let scene = Scene::new();
    let data = scene.data();
    let job = Job::tiny(&data).endless().set("cluster.workers", 2);
    let mut run = scene.serve(&job, "served", &[]);
    let address = run.address();
    let workers = ["ox", "mule"].map(|name| scene.join(&run, name, &[]));
    run.wait_for_nth("validated", 1);

    let status = until(
        || {
            let status = scene.run(&["status", &address, "--json"]).expect_code(0).last_line();
            (status["step"].as_u64() > Some(0)).then_some(status)
        },
        || "the status shows no progress".into(),
    );
    assert_eq!((&status["run"], &status["epochs"]), (&"tiny".into(), &100_000.into()));
    assert_eq!(status["samples"], data.train.len());
    let members = status["workers"].as_array().expect("a list");
    let names: Vec<_> = members.iter().map(|member| member["worker"].as_str()).collect();
    assert!(names.contains(&Some("ox")) && names.contains(&Some("mule")), "{status}");
    let text = scene.run(&["status", &address]).expect_code(0).stdout;
    assert!(text.contains("run tiny: ") && text.contains("mule"), "{text}");

    scene.run(&["stop", &address]).expect_code(0);
    let ended = run.wait().expect_code(75);
    assert_eq!(ended.end.last_line()["status"], "stopped");
    for worker in workers {
        worker.wait().expect_code(75);
    }
    let end = scene.run(&["status", &address]).expect_code(1);
    assert!(end.last_words().contains("no coordinator answers"), "{}", end.stderr);
}

#[test]
fn a_worker_that_comes_later_is_taken_in_between_two_steps() {
    let scene = Scene::new();
    let data = scene.data_of(96, 12);
    let mut run = scene.serve(&Job::tiny(&data).set("train.epochs", 4), "late", &[]);
    let first = scene.join(&run, "first", &[]);
    run.wait_for_nth("epoch_started", 1);
    let second = scene.join(&run, "second", &[]);
    run.wait_for("a generation of two", |event| {
        event.name() == "generation_formed" && event.number("world_size") == 2
    });
    let run = run.wait().expect_code(0);
    first.wait().expect_code(0);
    second.wait().expect_code(0);
    assert!(run.all("generation_aborted").is_empty(), "nothing is aborted for a newcomer");
    crate::checks::nothing_is_lost(&run.events, &data);
}

#[test]
fn workers_that_do_not_fit_are_refused_and_the_run_goes_on() {
    let scene = Scene::new();
    let data = scene.data();
    let mut run = scene.launch(&Job::tiny(&data).set("train.epochs", 8), "picky", 1, &[]);
    run.wait_for_nth("generation_formed", 1);

    let other = DataSet::link(scene.path("other"), 24, 12);
    let other_root = other.root().display().to_string();
    let stranger = scene.join(&run, "stranger", &["--data-root", &other_root]).wait().expect_code(1);
    assert!(stranger.last_words().contains("its data set differs from the team's"), "{}", stranger.stderr);
    let refused = run.wait_for_nth("worker_refused", 1);
    assert_eq!(refused.text("worker"), "stranger");
    assert!(refused.text("reason").contains("24 training and 12 validation samples"), "{refused:?}");

    let lost = scene.join(&run, "lost", &["--data-root", "nowhere"]).wait().expect_code(1);
    let nowhere = format!("no data set at {}", scene.path("nowhere").display());
    assert!(lost.last_words().contains(&nowhere), "{}", lost.stderr);
    let left = run.wait_for_nth("worker_left", 1);
    assert_eq!(left.text("worker"), "lost");
    assert!(left.text("reason").contains(&nowhere), "{left:?}");

    // As one on a processor without AVX2 would.
    if cfg!(target_arch = "x86_64") && std::env::var_os("ATEN_CPU_CAPABILITY").is_none() {
        let mut join = Command::new(musher_worker());
        join.args(["join", &run.address(), "--name", "veteran"]).env("ATEN_CPU_CAPABILITY", "default");
        let veteran = scene.start(join).wait().expect_code(1);
        for said in ["it trains on a CPU (x86_64, default), the team, as", "does, on a CPU with AVX2"] {
            assert!(veteran.last_words().contains(said), "{}", veteran.stderr);
        }
    }

    let answer = greet(&run.address(), PROTOCOL + 1);
    assert!(matches!(&answer, ToWorker::Refused { reason, .. } if reason.contains("protocol")), "{answer:?}");
    let run = run.wait().expect_code(0);
    assert_eq!(run.all("generation_formed").len(), 1, "a stranger does not disturb the team");
}

/// The coordinator's answer to the Hello of a worker of that protocol.
fn greet(address: &str, protocol: u32) -> ToWorker {
    let hello = FromWorker::Hello(Hello {
        protocol,
        worker: "foreigner".into(),
        incarnation: 1,
        host: "elsewhere".into(),
        device: "cpu".into(),
    });
    let hello = Fenced { term: Term(0), generation: Generation(0), body: hello };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let answer = runtime.expect("the system has what tokio needs").block_on(async {
        let endpoint = tonic::transport::Endpoint::new(address.to_owned()).expect("it is a URL");
        let mut client = TrainingClient::new(endpoint.connect().await.expect("it listens"));
        let outgoing = tokio_stream::once(hello.into());
        let mut inbound = client.session(outgoing).await.expect("it takes sessions").into_inner();
        inbound.message().await.expect("it answers").expect("it answers before it ends the session")
    });
    Fenced::<ToWorker>::try_from(answer).expect("it speaks the protocol").body
}

#[test]
fn a_worker_without_a_coordinator_gives_up() {
    let scene = Scene::new();
    let mut command = std::process::Command::new(musher_tests::binaries::musher_worker());
    command.args(["join", "http://127.0.0.1:1", "--connect-timeout-s", "1"]);
    let end = scene.start(command).wait().expect_code(1);
    assert!(end.last_words().contains("no coordinator answered at http://127.0.0.1:1"), "{}", end.stderr);
}

#[test]
fn musher_without_its_worker_says_where_it_looked() {
    let scene = Scene::new();
    let alone = scene.path("musher");
    fs::copy(musher_tests::binaries::musher(), &alone).expect("the scene's directory is writable");
    let job = scene.path("job.toml");
    Job::tiny(&scene.data()).write(&job);
    let mut command = std::process::Command::new(&alone);
    command.arg("launch").arg(&job).current_dir(scene.path("")).env("PATH", "");
    let end = scene.start(command).wait().expect_code(2);
    assert!(end.last_words().contains("install it beside musher"), "{}", end.stderr);
    assert!(!scene.path("runs").exists());
}
