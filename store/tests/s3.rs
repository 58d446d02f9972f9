//! A store over a real S3 server on loopback, and what networks and servers do to requests.
#![allow(clippy::unwrap_used)]

use std::{
    io::Read,
    thread,
    time::{Duration, Instant},
};

use musher_store::{Condition, Patience, Store, StoreError};
use musher_store_server::{BUCKET, Effect, Fault, S3Server, SECRET_KEY};

const MIB: usize = 1 << 20;

fn store(server: &S3Server) -> Store {
    Store::open(&format!("s3://{BUCKET}/runs/a"), &server.environment(), Patience::Long).unwrap()
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length as u64).map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect()
}

fn fault(method: &'static str, target: &str, effect: Effect) -> Fault {
    Fault { method, target: target.into(), effect }
}

/// All that was ordered has happened.
#[track_caller]
fn all_suffered(server: &S3Server) {
    assert_eq!(server.faults_left(), 0, "{:#?}", server.seen());
}

fn read(store: &Store, key: &str) -> Vec<u8> {
    let mut read = Vec::new();
    store.reader(key).unwrap().read_to_end(&mut read).unwrap();
    read
}

fn upload(store: &Store, key: &str, bytes: &[u8]) -> Result<u64, StoreError> {
    let mut upload = store.upload(key)?;
    for chunk in bytes.chunks(MIB) {
        upload.write(chunk)?;
    }
    Ok(upload.finish()?.bytes)
}

#[test]
fn objects_are_written_read_listed_and_removed() {
    let server = S3Server::start();
    let store = store(&server);
    store.check().unwrap();
    assert!(store.get("a/1").unwrap().is_none());
    assert!(store.head("a/1").unwrap().is_none());
    assert!(matches!(store.get_range("a/1", 0..3), Err(StoreError::Absent { .. })));

    let version = store.put("a/1", "hello").unwrap();
    let (found, same) = store.get("a/1").unwrap().unwrap();
    assert_eq!((&found[..], &same), (&b"hello"[..], &version));
    assert_eq!(&store.get_range("a/1", 1..3).unwrap()[..], b"el");
    assert_eq!(&store.get_range("a/1", 3..99).unwrap()[..], b"lo");
    assert_eq!(store.head("a/1").unwrap().unwrap().bytes, 5);
    assert_eq!(read(&store, "a/1"), b"hello");

    store.put("a/2", "").unwrap();
    store.put("b", "x").unwrap();
    assert_eq!(read(&store, "a/2"), b"");
    let keys = |prefix: &str| store.list(prefix).unwrap().into_iter().map(|it| it.key).collect::<Vec<_>>();
    assert_eq!(keys(""), ["a/1", "a/2", "b"]);
    assert_eq!(keys("a"), ["a/1", "a/2"]);
    assert_eq!(server.keys(""), ["runs/a/a/1", "runs/a/a/2", "runs/a/b"]);

    store.delete_all(&["a/1".into(), "nobody".into(), "b".into()]).unwrap();
    store.delete("a/2").unwrap();
    assert!(keys("").is_empty());
}

#[test]
fn an_upload_is_there_whole_or_not_at_all() {
    let server = S3Server::start();
    let store = store(&server);
    for length in [0, 5, 8 * MIB, 8 * MIB + 1, 21 * MIB] {
        let bytes = bytes(length);
        assert_eq!(upload(&store, "state", &bytes).unwrap(), length as u64);
        assert!(read(&store, "state") == bytes, "{length}");
    }
    store.delete("state").unwrap();

    let mut dropped = store.upload("state").unwrap();
    dropped.write(&bytes(17 * MIB)).unwrap();
    drop(dropped);
    assert!(store.head("state").unwrap().is_none());
}

#[test]
fn an_upload_survives_what_networks_do() {
    let server = S3Server::start();
    let store = store(&server);
    let bytes = bytes(21 * MIB);
    let part = |number: u32| format!("partNumber={number}");
    server.order(fault("POST", "uploads", Effect::Status(503)));
    server.order(fault("PUT", &part(1), Effect::CutRequest(3 * MIB)));
    server.order(fault("PUT", &part(1), Effect::Status(500)));
    server.order(fault("PUT", &part(2), Effect::LoseResponse));
    server.order(fault("PUT", &part(3), Effect::Late(Duration::from_millis(500))));
    server.order(fault("POST", "uploadId", Effect::Status(503)));
    assert_eq!(upload(&store, "state", &bytes).unwrap(), bytes.len() as u64);
    all_suffered(&server);

    server.order(fault("GET", "/state", Effect::CutResponse(5 * MIB)));
    server.order(fault("GET", "/state", Effect::CutResponse(MIB)));
    assert!(read(&store, "state") == bytes);
    all_suffered(&server);
}

#[test]
fn a_completion_whose_response_was_lost_is_one() {
    let server = S3Server::start();
    let store = store(&server);
    for effect in [Effect::LoseResponse, Effect::DenyResponse(500)] {
        let bytes = bytes(9 * MIB);
        server.order(fault("POST", "uploadId", effect));
        assert_eq!(upload(&store, "state", &bytes).unwrap(), bytes.len() as u64);
        all_suffered(&server);
        assert!(read(&store, "state") == bytes);
        store.delete("state").unwrap();
    }
}

#[test]
fn only_one_of_two_writers_is_first_and_nobody_overwrites_what_he_has_not_seen() {
    let server = S3Server::start();
    let store = store(&server);
    let first = store.put_if("index", "mine", Condition::Absent).unwrap();
    let late = store.put_if("index", "yours", Condition::Absent);
    assert!(matches!(late, Err(StoreError::Condition { .. })), "{late:?}");
    let second = store.put_if("index", "mine, again", Condition::Unchanged(&first)).unwrap();
    let stale = store.put_if("index", "yours", Condition::Unchanged(&first));
    assert!(matches!(stale, Err(StoreError::Condition { .. })), "{stale:?}");
    store.delete("index").unwrap();
    let gone = store.put_if("index", "mine", Condition::Unchanged(&second));
    assert!(matches!(gone, Err(StoreError::Condition { .. })), "{gone:?}");
}

#[test]
fn a_conditional_write_whose_response_was_lost_took_effect() {
    let server = S3Server::start();
    let store = store(&server);
    let mut version = store.put_if("index", "0", Condition::Absent).unwrap();
    for (number, effect) in
        [Effect::LoseResponse, Effect::DenyResponse(500), Effect::DenyResponse(503)].into_iter().enumerate()
    {
        server.order(fault("PUT", "/index", effect));
        let text = format!("after {number}");
        version = store.put_if("index", text.clone(), Condition::Unchanged(&version)).unwrap();
        all_suffered(&server);
        let (found, now) = store.get("index").unwrap().unwrap();
        assert_eq!((&found[..], &now), (text.as_bytes(), &version));

        server.order(fault("PUT", "/fresh", effect));
        store.put_if("fresh", "mine", Condition::Absent).unwrap();
        all_suffered(&server);
        store.delete("fresh").unwrap();
    }
    // It did not reach the server, and is written again.
    for effect in [Effect::Status(500), Effect::CutRequest(0)] {
        server.order(fault("PUT", "/index", effect));
        version = store.put_if("index", format!("{effect:?}"), Condition::Unchanged(&version)).unwrap();
        all_suffered(&server);
    }
}

#[test]
fn a_lost_response_does_not_hide_that_another_was_first() {
    let server = S3Server::start();
    let store = store(&server);
    let seen = store.put("index", "0").unwrap();
    store.put("index", "yours").unwrap();
    server.order(fault("PUT", "/index", Effect::LoseResponse));
    let late = store.put_if("index", "mine", Condition::Unchanged(&seen));
    assert!(matches!(late, Err(StoreError::Condition { .. })), "{late:?}");
    all_suffered(&server);
}

#[test]
fn what_is_wrong_at_the_start_is_one_sentence_and_quick() {
    let server = S3Server::start();
    let url = format!("s3://{BUCKET}/runs/a");
    let with = |name: &str, value: &str| {
        let mut variables = server.environment();
        variables.retain(|(known, _)| known != name);
        variables.push((name.to_owned(), value.to_owned()));
        variables
    };
    // A port of nobody's.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let cases = [
        (url.clone(), with("AWS_ENDPOINT_URL", &format!("http://{closed}")), "it cannot be reached"),
        (url.clone(), with("AWS_SECRET_ACCESS_KEY", "wrong"), "the credentials are refused"),
        (url.clone(), with("AWS_ACCESS_KEY_ID", "nobody"), "the credentials are refused"),
        ("s3://nowhere/runs".into(), server.environment(), "there is no bucket \"nowhere\""),
    ];
    for (url, variables, expected) in cases {
        let started = Instant::now();
        let said = Store::open(&url, &variables, Patience::Short).unwrap().check().unwrap_err().to_string();
        assert!(said.contains(expected) && said.contains(&url), "{said}");
        assert!(!said.contains('\n') && said.len() < 400, "{said}");
        assert!(!said.contains(SECRET_KEY) && !said.contains("wrong"), "{said}");
        assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    }
}

#[test]
fn nothing_shows_a_secret() {
    let server = S3Server::start();
    let shown = format!("{:?} {:?}", store(&server), store(&server).upload("x").unwrap());
    assert!(!shown.contains(SECRET_KEY), "{shown}");
}

#[test]
fn many_threads_may_use_one_store() {
    let server = S3Server::start();
    let store = store(&server);
    thread::scope(|scope| {
        for number in 0..8 {
            let store = store.clone();
            scope.spawn(move || {
                let (key, bytes) = (format!("part-{number}"), bytes(MIB + number));
                upload(&store, &key, &bytes).unwrap();
                assert!(read(&store, &key) == bytes);
            });
        }
    });
    assert_eq!(store.list("").unwrap().len(), 8);
}
