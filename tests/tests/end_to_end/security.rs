//! Who gets in, and who does not: each stranger is refused with its reason, counted, and leaves the run alone.

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
};

use musher_security::{Authority, Leaf, Role, Validity, write};
use musher_tests::{Job, Run, Scene, http::get, process::until};

const JOIN: &str = "a-secret-that-workers-know";
const OPERATE: &str = "a-secret-that-operators-know";

/// What a scene's parties show.
struct Secrets {
    dir: PathBuf,
}

impl Secrets {
    /// Made by `musher certs`, and tokens.
    fn make(scene: &Scene) -> Self {
        let dir = scene.path("secrets");
        scene.run(&["certs", &dir.display().to_string()]).expect_code(0);
        fs::write(dir.join("join"), JOIN).expect("the scene's directory is writable");
        fs::write(dir.join("operate"), OPERATE).expect("the scene's directory is writable");
        Self { dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    fn guarded(&self, job: Job) -> Job {
        [
            ("server.tls_cert", "coordinator.pem"),
            ("server.tls_key", "coordinator-key.pem"),
            ("server.tls_client_ca", "ca.pem"),
            ("server.join_token_file", "join"),
            ("server.operator_token_file", "operate"),
        ]
        .into_iter()
        .fold(job, |job, (key, name)| job.set(key, format!("{:?}", self.path(name))))
    }

    /// Flags of one with this certificate, if any, and this token, if any.
    fn flags(&self, certificate: Option<&str>, token: Option<&str>) -> Vec<String> {
        let mut flags = vec!["--tls-ca".to_owned(), self.path("ca.pem")];
        if let Some(name) = certificate {
            flags.extend(["--tls-cert".into(), self.path(&format!("{name}.pem"))]);
            flags.extend(["--tls-key".into(), self.path(&format!("{name}-key.pem"))]);
        }
        flags.extend(token.into_iter().flat_map(|name| ["--token-file".into(), self.path(name)]));
        flags
    }

    /// Those of another authority, under the same names.
    fn of_strangers(dir: &Path) -> Authority {
        fs::create_dir_all(dir).expect("the scene's directory is writable");
        let authority = Authority::new().expect("keys can be made");
        write(&dir.join("ca.pem"), &authority.pem(), 0o644).expect("the directory is writable");
        for (name, leaf) in [
            ("coordinator", Leaf::Coordinator { names: vec!["127.0.0.1".into()] }),
            ("worker", Leaf::Holder(Role::Worker)),
        ] {
            let issued = authority.issue(&leaf, Validity::Long).expect("certificates can be made");
            issued.write(dir, name).expect("the directory is writable");
        }
        authority
    }
}

fn turned_away(run: &Run, cause: &str) -> u64 {
    let page = run.events().into_iter().find(|e| e.name() == "run_started").expect("it has started");
    let metrics = get(page.text("page"), "/metrics");
    let series = format!("musher_turned_away_total{{cause=\"{cause}\"}} ");
    metrics.text().lines().find_map(|line| line.strip_prefix(&series)?.parse().ok()).unwrap_or(0)
}

fn as_args(flags: &[String]) -> Vec<&str> {
    flags.iter().map(String::as_str).collect()
}

#[test]
fn strangers_are_refused_each_with_its_reason_and_friends_are_not() {
    let scene = Scene::new();
    let secrets = Secrets::make(&scene);
    let authority = Secrets::of_strangers(&scene.path("strangers"));
    // An expired certificate of an authority that is trusted: trusted are both.
    let expired = authority.issue(&Leaf::Holder(Role::Worker), Validity::Expired).expect("it can be made");
    expired.write(&secrets.dir, "expired").expect("the directory is writable");
    let other = Authority::new().and_then(|other| other.issue(&Leaf::Holder(Role::Worker), Validity::Long));
    other.expect("it can be made").write(&secrets.dir, "foreign").expect("the directory is writable");
    let both = [secrets.path("ca.pem"), scene.path("strangers/ca.pem").display().to_string()]
        .map(|file| fs::read_to_string(file).expect("it was written"));
    fs::write(secrets.dir.join("both.pem"), both.concat()).expect("the directory is writable");
    fs::write(secrets.dir.join("wrong"), "some other secret of somebody".replace(' ', "-"))
        .expect("the directory is writable");

    let job = secrets
        .guarded(Job::tiny(&scene.data()))
        .set("server.tls_client_ca", format!("{:?}", secrets.path("both.pem")))
        .set("cluster.workers", 1);
    let run = scene.serve(&job, "guarded", &[]);
    let url = run.address().replace("http://", "https://");
    // A handshake's alert may come after the client has given its connection up: the coordinator knows the reason
    // for sure, and its client not always.
    for (certificate, token, cause, told) in [
        (None, Some("join"), "certificate_missing", ""),
        (Some("foreign"), Some("join"), "certificate_unknown_ca", ""),
        (Some("expired"), Some("join"), "certificate_expired", ""),
        (Some("worker"), None, "token_missing", "this run asks for a token"),
        (Some("worker"), Some("wrong"), "token_wrong", "the token is not one of this run's"),
    ] {
        let flags = secrets.flags(certificate, token);
        let patience = ["--connect-timeout-s", "1"];
        let stranger = scene.join_at(&url, "stranger", &[&as_args(&flags)[..], &patience].concat());
        let end = stranger.wait().expect_code(1);
        assert!(end.stderr.contains(told), "{cause}: {}", end.stderr);
        assert!(turned_away(&run, cause) >= 1, "{cause} is not counted");
    }

    // A coordinator of another authority is not to be trusted.
    let flags = ["--tls-ca", &scene.path("strangers/ca.pem").display().to_string()].map(String::from);
    let end = scene.join_at(&url, "cautious", &as_args(&flags)).wait().expect_code(1);
    assert!(end.stderr.contains("not to be trusted"), "{}", end.stderr);

    // Control takes an operator, by token or by certificate.
    let control =
        |command: &str, flags: &[String]| scene.run(&[&[command, &url][..], &as_args(flags)].concat());
    for command in ["status", "stop"] {
        let end = control(command, &secrets.flags(Some("worker"), Some("join"))).expect_code(1);
        assert!(end.stderr.contains("this takes an operator"), "{}", end.stderr);
    }
    assert_eq!(turned_away(&run, "not_an_operator"), 2);
    control("status", &secrets.flags(Some("worker"), Some("operate"))).expect_code(0);
    control("status", &secrets.flags(Some("operator"), None)).expect_code(0);

    // Plain talk is no TLS.
    scene.join_at(&run.address(), "plain", &["--connect-timeout-s", "1"]).wait().expect_code(1);
    assert!(turned_away(&run, "not_tls") >= 1);

    let flags = secrets.flags(Some("worker"), Some("join"));
    let friend = scene.join_at(&url, "friend", &as_args(&flags));
    the_secrets_are_nowhere(&scene, &[run.id(), friend.id()]);
    friend.wait().expect_code(0);
    let run = run.wait().expect_code(0);
    assert_eq!(run.all("worker_joined").len(), 1, "only the friend got in");
    the_secrets_are_nowhere(&scene, &[]);
}

/// Not in what anybody wrote, nor in the list of processes.
fn the_secrets_are_nowhere(scene: &Scene, processes: &[rustix::process::Pid]) {
    let mut seen: Vec<PathBuf> = vec![];
    let mut left = vec![scene.path("")];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            match entry.path() {
                path if path.ends_with("secrets") || path.ends_with("data") => {}
                path if path.is_dir() => left.push(path),
                path => seen.push(path),
            }
        }
    }
    seen.extend(processes.iter().map(|id| format!("/proc/{}/cmdline", id.as_raw_nonzero()).into()));
    for path in seen {
        let bytes = fs::read(&path).unwrap_or_default();
        for secret in [JOIN, OPERATE] {
            let there = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!there, "{} holds a secret", path.display());
        }
    }
}

#[test]
fn certificates_are_read_again_when_they_change() {
    let scene = Scene::new();
    let secrets = Secrets::make(&scene);
    let job = secrets.guarded(Job::tiny(&scene.data())).set("cluster.workers", 1);
    let run = scene.serve(&job, "rotated", &[]);
    let url = run.address().replace("http://", "https://");
    let status = |flags: &[String]| scene.run(&[&["status", &url][..], &as_args(flags)].concat());
    let former = secrets.flags(Some("worker"), Some("operate"));
    status(&former).expect_code(0);

    // Half of a change is not used: the key does not fit the certificate yet.
    let next = scene.path("next");
    Secrets::of_strangers(&next);
    let copy = |name: &str| {
        let text = fs::read_to_string(next.join(name)).expect("it was written");
        write(&secrets.dir.join(name), &text, 0o600).expect("the directory is writable");
    };
    let ca = fs::read(secrets.dir.join("ca.pem")).expect("it was written");
    copy("coordinator.pem");
    status(&former).expect_code(0);

    for name in ["coordinator-key.pem", "ca.pem", "worker.pem", "worker-key.pem"] {
        copy(name);
    }
    assert_ne!(ca, fs::read(secrets.dir.join("ca.pem")).expect("it was written"));
    let flags = secrets.flags(Some("worker"), Some("join"));
    scene.join_at(&url, "next", &as_args(&flags)).wait().expect_code(0);
    run.wait().expect_code(0);
}

#[test]
fn an_open_coordinator_stays_at_home_unless_told_otherwise() {
    let scene = Scene::new();
    let data = scene.data();
    let job = Job::tiny(&data).set("server.grpc", "\"0.0.0.0:0\"");
    let end = scene.serve(&job, "open", &[]).wait().expect_code(2).end;
    for part in ["server.grpc = 0.0.0.0:0", "server.join_token_file", "--insecure"] {
        assert!(end.stderr.contains(part), "{}", end.stderr);
    }
    let mut run = scene.serve(&job, "opened", &["--insecure"]);
    run.wait_for_nth("run_started", 1);
    run.kill();

    let token = scene.path("short");
    fs::write(&token, "hunter2").expect("the scene's directory is writable");
    let job = Job::tiny(&data).set("server.join_token_file", format!("{:?}", token.display().to_string()));
    let end = scene.serve(&job, "short", &[]).wait().expect_code(2).end;
    assert!(end.stderr.contains("openssl rand") && !end.stderr.contains("hunter2"), "{}", end.stderr);
}

#[test]
fn a_launched_run_shows_its_token_to_itself_and_its_page_asks_for_one_elsewhere() {
    let scene = Scene::new();
    let secrets = Secrets::make(&scene);
    let job = secrets
        .guarded(Job::tiny(&scene.data()).endless())
        .set("server.http", "\"0.0.0.0:0\"")
        .set("server.tls_cert", "\"\"")
        .set("server.tls_key", "\"\"")
        .set("server.tls_client_ca", "\"\"");
    let mut run = scene.launch(&job, "own", 1, &[]);
    run.wait_for_nth("epoch_finished", 1);
    let page = run.wait_for_nth("run_started", 1).text("page").replace("0.0.0.0", "127.0.0.1");
    assert_eq!(get(&page, "/api/v1/status").code, 401);
    assert_eq!(get(&page, "/livez").code, 200);
    run.kill();
}

#[test]
fn a_hostile_client_leaves_training_alone() {
    /// More than a connection may have.
    const STREAMS: u32 = 5000;
    let scene = Scene::new();
    let mut run = scene.launch(&Job::tiny(&scene.data()).endless(), "harassed", 1, &[]);
    run.wait_for_nth("progress", 1);
    let address = run.address().replace("http://", "");
    let connect = || TcpStream::connect(&address).expect("the coordinator listens");
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";

    let half_open: Vec<_> = (0..50).map(|_| connect()).collect();
    let mut garbage = connect();
    let _ = garbage.write_all(&[0xff; 1 << 16]);
    let mut huge = connect();
    let _ = huge.write_all(preface);
    let _ = huge.write_all(b"\xff\xff\xff\x00\x00\x00\x00\x00\x01");
    let mut flood = connect();
    let _ = flood.write_all(preface);
    // HEADERS, then at once RST_STREAM, on each odd stream.
    for stream in (1..STREAMS * 2).step_by(2) {
        let id = stream.to_be_bytes();
        let headers = [&b"\x00\x00\x03\x01\x04"[..], &id, b"\x83\x86\x84"].concat();
        let reset = [&b"\x00\x00\x04\x03\x00"[..], &id, b"\x00\x00\x00\x08"].concat();
        if flood.write_all(&[headers, reset].concat()).is_err() {
            break;
        }
    }
    // A frame too large and a flood end their connections, whatever else was said on them.
    for hostile in [&mut garbage, &mut huge, &mut flood] {
        let mut rest = Vec::new();
        hostile.set_read_timeout(Some(musher_tests::process::PATIENCE)).expect("a time-out can be set");
        let _ = hostile.read_to_end(&mut rest);
    }
    let told = run.events().len();
    run.wait_past(told, "epoch_finished", |_| true);
    // Those who say nothing are dropped, and counted.
    until(|| (turned_away(&run, "silent") >= 50).then_some(()), || "the silent are still there".into());
    drop(half_open);
    let events = run.kill();
    let harmed = ["generation_aborted", "worker_left", "worker_refused"];
    assert!(!events.iter().any(|event| harmed.contains(&event.name())), "{events:#?}");
}

/// Each of them would have its place for seconds, and there are more of them than places.
#[test]
fn a_crowd_that_says_nothing_keeps_nobody_out() {
    let scene = Scene::new();
    let free =
        || TcpListener::bind("127.0.0.1:0").and_then(|port| port.local_addr()).expect("a port is free");
    let probes = free().to_string();
    let job = Job::tiny(&scene.data()).endless().set("cluster.max_workers", 4);
    let job = job.set("server.probes", format!("\"{probes}\"")).set("checkpoint.every_epochs", 1);
    let mut run = scene.serve(&job, "crowded", &[]);
    let page = run.wait_for_nth("run_started", 1).text("page").to_owned();
    let node_probes = free().to_string();
    let _first = scene.join(&run, "first", &["--probes", &node_probes]);
    run.wait_for_nth("validated", 1);

    let grpc = run.address();
    let mut crowd = Vec::new();
    for address in [&grpc, &page, &probes, &node_probes] {
        let host = address.replace("http://", "");
        crowd.extend((0..400).map(|_| TcpStream::connect(&host).expect("somebody listens")));
    }
    scene.run(&["status", &grpc]).expect_code(0);
    for (address, path) in [(&page, "/api/v1/status"), (&probes, "/livez"), (&node_probes, "/livez")] {
        assert_eq!(get(address, path).code, 200, "{address}{path}");
    }
    let _second = scene.join(&run, "second", &[]);
    run.wait_past(0, "generation_formed", |event| event.number("world_size") == 2);
    run.wait_past(run.events().len(), "checkpoint_committed", |_| true);
    assert!(turned_away(&run, "too_many_connections") > 0);
    drop(crowd);
    let events = run.kill();
    assert!(!events.iter().any(|event| event.name() == "generation_aborted"), "{events:#?}");
}
