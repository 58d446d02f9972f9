//! Runs whose data set is in an object store: a real S3 server, with real faults.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use musher_store_server::{BUCKET, Effect, Fault, S3Server};
use musher_tests::{Job, Scene};

use crate::checks::{figures, goes_on_and_ends_well};

const URL: &str = "s3://pets/sets/packed";

fn scene(server: &S3Server) -> Scene {
    assert_eq!(BUCKET, "pets");
    Scene::new().with_environment(server.environment())
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// What lies below, by name.
fn files(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(root).expect("it is a directory").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_dir() {
            let within = self::files(&entry.path());
            files.extend(within.into_iter().map(|(inner, bytes)| (format!("{name}/{inner}"), bytes)));
        } else if !name.starts_with('.') {
            files.insert(name, fs::read(entry.path()).expect("it was just there"));
        }
    }
    files
}

/// Packed into the store, and read from there by one of two workers while the other has a directory: they are of one
/// team, so their data sets have one digest.
#[test]
fn it_comes_to_the_same_bits_as_a_directory_whatever_befalls_requests() {
    let server = S3Server::start();
    let scene = scene(&server);
    let data = scene.data();
    let (root, packed) = (text(data.root()), text(&scene.path("packed")));
    let order = |method, target: &str, effect| server.order(Fault { method, target: target.into(), effect });
    order("PUT", "trainval-000000.tar", Effect::Status(503));
    order("PUT", "index.json", Effect::CutRequest(100));
    scene.run(&["data", "pack", &root, &packed, "--shard-mb", "1"]).expect_code(0);
    let told = scene.run(&["data", "pack", &root, URL, "--shard-mb", "1"]).expect_code(0);
    assert!(told.stdout.contains(&format!("in {URL}\n")), "{}", told.stdout);
    assert_eq!(server.faults_left(), 0);
    assert!(
        files(&server.files().join("sets/packed")) == files(Path::new(&packed)),
        "the bytes are the same"
    );
    let again = scene.run(&["data", "pack", &root, URL]).expect_code(2);
    assert!(again.last_words().contains(&format!("{URL} is not empty")), "{}", again.stderr);
    order("GET", "trainval-000000.tar", Effect::CutResponse(5000));
    let checked = scene.run(&["data", "check", URL]).expect_code(0);
    assert!(checked.stdout.contains("errors: 0"), "{}", checked.stdout);

    let near = Job::tiny(&data).set("data.cache_mb", 0).set("cluster.workers", 2);
    let far = near.clone().set("data.root", format!("{URL:?}"));
    far.write(&scene.path("far.toml"));
    let file = text(&scene.path("far.toml"));
    let dry = scene.run(&["launch", &file, "--dry-run"]).expect_code(0);
    assert!(dry.stdout.contains("40"), "the index says how many: {}", dry.stdout);
    let doctor = scene.run(&["doctor", &file, "--json"]);
    assert!(doctor.stdout.contains(&format!("validation samples in {URL}")), "{}", doctor.stdout);

    let near = scene.launch(&near, "near", 2, &[]).wait().expect_code(0);
    for effect in [
        Effect::Status(503),
        Effect::CutResponse(1000),
        Effect::Status(500),
        Effect::LoseResponse,
        Effect::Late(Duration::from_millis(300)),
        Effect::CutResponse(0),
    ] {
        order("GET", "trainval-000000.tar", effect);
        order("GET", "test-000000.tar", effect);
    }
    order("HEAD", "test-000000.tar", Effect::Status(500));
    order("GET", "index.json", Effect::CutResponse(50));
    let cache = scene.path("cache");
    let far = far.set("data.disk_cache_mb", 64).set("data.disk_cache_dir", format!("{:?}", text(&cache)));
    let far = scene.serve(&far, "far", &[]);
    let workers = [scene.join(&far, "files", &["--data-root", &packed]), scene.join(&far, "objects", &[])];
    let far = far.wait().expect_code(0);
    for worker in workers {
        worker.wait().expect_code(0);
    }
    assert_eq!(server.faults_left(), 0, "{:#?}", server.seen());
    assert_eq!(figures(&far), figures(&near));
    assert!(!files(&cache).is_empty(), "what is read is kept");
    assert!(
        far.all("worker_left").is_empty() && far.all("generation_aborted").is_empty(),
        "{:#?}",
        far.events
    );
}

#[test]
fn what_is_wrong_with_it_is_said_in_a_sentence() {
    let server = S3Server::start();
    let scene = scene(&server);
    let data = scene.data_of(16, 8);
    scene.run(&["data", "pack", &text(data.root()), URL, "--shard-mb", "1"]).expect_code(0);
    let at = |root: &str| Job::tiny(&data).set("data.root", format!("{root:?}"));
    let refused = |job: &Job, name: &str, expected: &str| {
        let ended = scene.launch(job, name, 1, &[]).wait().expect_code(2);
        let words = ended.end.last_words();
        assert!(words.contains(expected) && words.matches("s3://").count() <= 2, "{words}");
        assert!(!ended.dir.join("state.json").exists());
    };
    refused(&at("s3://nowhere/pets"), "bucket", "there is no bucket \"nowhere\"");
    let unpacked = server.files().join("sets/unpacked/annotations");
    fs::create_dir_all(&unpacked).expect("it is ours");
    fs::copy(data.root().join("annotations/test.txt"), unpacked.join("test.txt")).expect("it is ours");
    let sentence = "a data set in an object store must be packed: pack it with `musher data pack";
    refused(&at("s3://pets/sets/unpacked"), "unpacked", sentence);
    refused(&at("s3://key:hush@pets/sets"), "secret", "credentials come from the environment");

    let mut check = scene.musher(&["data", "check", URL]);
    check.env("AWS_SECRET_ACCESS_KEY", "wrong");
    let ended = scene.start(check).wait().expect_code(2);
    assert!(ended.last_words().contains("the credentials are refused"), "{}", ended.stderr);

    let shard = server.files().join("sets/packed/test-000000.tar");
    let bytes = fs::read(&shard).expect("it is ours");
    fs::write(&shard, &bytes[..bytes.len() - 512]).expect("it is ours");
    refused(&at(URL), "shorter", "its index says");
    fs::remove_file(&shard).expect("it is ours");
    refused(&at(URL), "gone", "test-000000.tar is gone");
    fs::write(&shard, &bytes).expect("it is ours");

    // In the midst of a run, another data set is put in its place.
    let job = at(URL).set("data.cache_mb", 0).endless();
    let mut run = scene.launch(&job, "changed", 1, &["--max-restarts", "0"]);
    run.wait_for_nth("checkpoint_committed", 1);
    let shard = server.files().join("sets/packed/trainval-000000.tar");
    let bytes = fs::read(&shard).expect("it is ours");
    fs::write(&shard, bytes.iter().map(|byte| !byte).collect::<Vec<u8>>()).expect("it is ours");
    let run = run.wait().expect_code(1);
    let reason = run.one("run_failed").text("reason");
    assert!(
        reason.contains("trainval-000000.tar has for") && reason.contains("is not what was packed"),
        "{reason}"
    );
}

/// Its credentials have run out, say: another's may be good, and its own again after a while. So it goes on when it is
/// refused at its next start too.
#[test]
fn a_worker_that_the_store_refuses_leaves_alone_and_is_started_again() {
    let server = S3Server::start();
    let scene = scene(&server);
    let data = scene.data();
    scene.run(&["data", "pack", &text(data.root()), URL, "--shard-mb", "1"]).expect_code(0);
    let job = Job::tiny(&data).set("data.root", format!("{URL:?}")).set("data.cache_mb", 0).endless();
    let mut run = scene.launch(&job, "refused", 2, &[]);
    run.wait_for_nth("checkpoint_committed", 1);
    for target in ["trainval-000000.tar", "index.json"] {
        server.order(Fault { method: "GET", target: target.into(), effect: Effect::Status(403) });
    }
    let left = run.wait_for_nth("worker_left", 1);
    let reason = left.text("reason");
    assert_eq!(left.text("cause"), "failed");
    assert!(
        reason.contains(&format!("cannot read {URL}/trainval-000000.tar: the credentials are refused")),
        "{reason}"
    );
    let left = run.wait_for_nth("worker_left", 2);
    let reason = left.text("reason");
    assert!(
        reason.contains(&format!("cannot read {URL}/index.json: the credentials are refused")),
        "{reason}"
    );
    let told = run.events().iter().position(|event| *event == left).map_or(0, |at| at + 1);
    run.wait_past(told, "generation_formed", |event| event.number("world_size") == 2);
    goes_on_and_ends_well(run, &data);
}
