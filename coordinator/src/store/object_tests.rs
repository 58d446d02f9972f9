//! Checkpoints in a real S3 server: what a network, a crash and a second coordinator may do to them.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Read;
use std::time::{Duration, Instant};

use musher_proto::ids::Term;
use musher_store_server::{BUCKET, Effect, Fault, S3Server};

use super::tests::{SLICES, commit, id, listed, manifest, state, upload, weights};
use super::*;

fn looking(server: &S3Server) -> CheckpointStore {
    CheckpointStore::connect(&format!("s3://{BUCKET}/runs/a"), &server.environment()).unwrap()
}

/// A coordinator's of this term.
fn writing(server: &S3Server, term: u64) -> CheckpointStore {
    let store = looking(server);
    store.take_over(owner(term)).unwrap();
    store
}

fn owner(term: u64) -> Owner {
    Owner { run: "pets".into(), run_id: "abcd".into(), term: Term(term) }
}

fn fault(method: &'static str, target: &str, effect: Effect) -> Fault {
    Fault { method, target: target.into(), effect }
}

/// Folders that the server has objects in.
fn folders(server: &S3Server) -> Vec<String> {
    let keys = server.keys("runs/a/").into_iter();
    let mut folders: Vec<_> =
        keys.filter_map(|key| Some(key["runs/a/".len()..].split_once('/')?.0.to_owned())).collect();
    folders.dedup();
    folders
}

/// What is removed in the background is gone some time soon.
#[track_caller]
fn comes_to_have(server: &S3Server, expected: &[&str]) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while folders(server) != expected {
        assert!(Instant::now() < deadline, "{:?}, not {expected:?}", folders(server));
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_checkpoint_is_visible_only_once_committed_and_reads_back_elsewhere() {
    let server = S3Server::start();
    let store = writing(&server, 1);
    assert!(store.is_empty().unwrap());
    let state = state(7);
    let pending = store.begin(&id(7), state.len() as u64).unwrap();
    let (parts, files) = (upload(&pending, &state, &SLICES), vec![weights(&pending)]);
    assert!(listed(&store).is_empty() && listed(&looking(&server)).is_empty());
    let manifest = manifest(7, &state, parts, files);
    pending.commit(&manifest).unwrap();

    let elsewhere = looking(&server);
    assert_eq!(elsewhere.owner().unwrap(), Some(owner(1)));
    assert_eq!(elsewhere.load_latest().unwrap().manifest, Some(manifest));
    let mut read = Vec::new();
    elsewhere.open_state(&id(7)).unwrap().read_to_end(&mut read).unwrap();
    assert_eq!(read, state);
    let dir = tempfile::tempdir().unwrap();
    elsewhere.copy_out(&id(7), WEIGHTS, &dir.path().join("best")).unwrap();
    assert_eq!(fs::read(dir.path().join("best")).unwrap(), b"hello");
    assert!(matches!(store.begin(&id(7), 4), Err(StoreError::AlreadyCommitted { .. })));
    assert!(matches!(elsewhere.begin(&id(8), 4), Err(StoreError::ReadOnly { .. })));
}

#[test]
fn a_commit_whose_response_was_lost_is_one() {
    let server = S3Server::start();
    let store = writing(&server, 1);
    for (step, effect) in
        [(1, Effect::LoseResponse), (2, Effect::DenyResponse(500)), (3, Effect::Status(503))]
    {
        server.order(fault("PUT", "/index.json", effect));
        commit(&store, step);
        assert_eq!(server.faults_left(), 0);
        assert_eq!(listed(&looking(&server)).first(), Some(&id(step)));
    }
    assert_eq!(listed(&store), [id(3), id(2), id(1)]);
}

#[test]
fn parts_survive_what_networks_do() {
    let server = S3Server::start();
    let store = writing(&server, 1);
    server.order(fault("PUT", "part-0.bin", Effect::CutRequest(100)));
    server.order(fault("PUT", "part-400.bin", Effect::LoseResponse));
    server.order(fault("PUT", "part-408.bin", Effect::Status(500)));
    server.order(fault("PUT", "manifest.json", Effect::LoseResponse));
    commit(&store, 1);
    assert_eq!(server.faults_left(), 0);
    server.order(fault("GET", "part-408.bin", Effect::CutResponse(50)));
    looking(&server).verify(&id(1)).unwrap();
    assert_eq!(server.faults_left(), 0);
}

#[test]
fn a_coordinator_that_was_paused_while_another_took_over_commits_nothing() {
    let server = S3Server::start();
    let paused = writing(&server, 1);
    commit(&paused, 1);
    let state = state(2);
    let pending = paused.begin(&id(2), state.len() as u64).unwrap();
    let (parts, files) = (upload(&pending, &state, &SLICES), vec![weights(&pending)]);

    let other = writing(&server, 2);
    assert_eq!(listed(&other), [id(1)]);
    // Its parts were taken for a dead one's and removed; had they come later, the index would still differ.
    let late = upload(&pending, &state, &SLICES);
    weights(&pending);
    assert_eq!(late, parts);
    let refused = pending.commit(&manifest(2, &state, parts, files)).unwrap_err();
    assert!(matches!(refused, StoreError::Fenced { term: 1, by: Some(2), .. }), "{refused:?}");
    assert!(matches!(paused.prune(0, None), Err(StoreError::Fenced { .. })));
    comes_to_have(&server, &["e0001-s00000001.t1-0"]);

    commit(&other, 2);
    assert_eq!(listed(&looking(&server)), [id(2), id(1)]);
    assert!(other.verify(&id(1)).is_ok() && other.verify(&id(2)).is_ok());
}

#[test]
fn what_a_crash_leaves_is_not_seen_and_goes_when_the_store_is_taken_over() {
    let server = S3Server::start();
    let store = writing(&server, 1);
    commit(&store, 1);
    let pending = store.begin(&id(2), 1002).unwrap();
    upload(&pending, &state(2), &SLICES);
    std::mem::forget(pending);
    fs::write(server.files().join("runs/a/notes.txt"), "of somebody's").unwrap();
    assert_eq!(listed(&looking(&server)), [id(1)]);
    assert_eq!(folders(&server).len(), 2);

    let next = writing(&server, 2);
    assert_eq!(folders(&server), ["e0001-s00000001.t1-0"]);
    assert!(server.files().join("runs/a/notes.txt").exists(), "what is not ours stays");
    commit(&next, 2);
    assert_eq!(listed(&next), [id(2), id(1)]);
}

#[test]
fn an_abandoned_checkpoint_leaves_nothing_and_can_be_taken_again() {
    let server = S3Server::start();
    let store = writing(&server, 1);
    let pending = store.begin(&id(1), 1002).unwrap();
    upload(&pending, &state(1), &SLICES);
    drop(pending);
    comes_to_have(&server, &[]);
    commit(&store, 1);
    assert_eq!(folders(&server), ["e0001-s00000001.t1-1"]);
}

#[test]
fn a_damaged_checkpoint_is_skipped_and_replaced() {
    let server = S3Server::start();
    let store = writing(&server, 1);
    commit(&store, 1);
    commit(&store, 2);
    let part = server.files().join("runs/a/e0001-s00000002.t1-1/part-408.bin");
    let mut bytes = fs::read(&part).unwrap();
    bytes[593] ^= 1;
    fs::write(&part, bytes).unwrap();

    let latest = looking(&server).load_latest().unwrap();
    assert_eq!(latest.manifest.map(|manifest| manifest.id), Some(id(1)));
    assert!(latest.skipped[0].reason.to_string().contains("part-408.bin has digest"), "{:?}", latest.skipped);
    let damaged = looking(&server).manifest(&id(2)).unwrap();
    assert_eq!(looking(&server).damages(&damaged).len(), 1);

    commit(&store, 2);
    assert_eq!(looking(&server).load_latest().unwrap().manifest.unwrap().id, id(2));
    comes_to_have(&server, &["e0001-s00000001.t1-0", "e0001-s00000002.t1-2"]);

    fs::remove_file(server.files().join("runs/a/e0001-s00000002.t1-2/manifest.json")).unwrap();
    let latest = looking(&server).load_latest().unwrap();
    assert_eq!(latest.manifest.map(|manifest| manifest.id), Some(id(1)));
}

#[test]
fn pruning_keeps_the_newest_and_the_best_also_by_hand_beside_a_running_coordinator() {
    let server = S3Server::start();
    let store = writing(&server, 1);
    (1..=5).for_each(|step| drop(commit(&store, step)));
    assert_eq!(store.prune(3, Some(&id(2))).unwrap(), [id(1)]);
    assert_eq!(looking(&server).prune(1, Some(&id(2))).unwrap(), [id(4), id(3)]);
    commit(&store, 6);
    assert_eq!(listed(&store), [id(6), id(5), id(2)]);
    assert_eq!(folders(&server).len(), 3);
}

#[test]
fn a_server_that_ignores_conditions_is_refused() {
    let server = S3Server::start();
    commit(&writing(&server, 1), 1);
    let store = looking(&server);
    // The first write of the index is the take-over itself, the second is the trial.
    server.order(fault("PUT", "/index.json", Effect::Late(Duration::ZERO)));
    server.order(fault("PUT", "/index.json", Effect::IgnoreCondition));
    let refused = store.take_over(owner(2)).unwrap_err();
    assert!(matches!(refused, StoreError::Unconditional { .. }), "{refused:?}");
    assert!(refused.to_string().contains("use a store that honours them"));
}

#[test]
fn an_upload_that_is_not_as_announced_leaves_nothing() {
    let server = S3Server::start();
    let store = writing(&server, 1);
    let pending = store.begin(&id(1), 1002).unwrap();
    let mut wrong = pending.part(0, 400).unwrap();
    wrong.write(&state(1)[..400]).unwrap();
    assert!(matches!(wrong.finish(1), Err(StoreError::Digest { .. })));
    assert!(folders(&server).is_empty());
}
