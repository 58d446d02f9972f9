//! What a crash, a bad disk or a bad peer may do to checkpoints, and what they must survive.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Read;
use std::process::Command;

use musher_proto::digest;
use musher_proto::ids::{Epoch, Generation, Step};
use tempfile::TempDir;

use super::*;

pub(super) const SLICES: [(u64, u64); 3] = [(0, 400), (400, 8), (408, 594)];

pub(super) fn state(seed: u8) -> Vec<u8> {
    (0..1002u32).map(|i| (i.wrapping_mul(31) as u8) ^ seed).collect()
}

fn store() -> (TempDir, CheckpointStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(dir.path().join("checkpoints")).unwrap();
    (dir, store)
}

pub(super) fn id(step: u64) -> CheckpointId {
    CheckpointId::of(Epoch(1), Step(step))
}

pub(super) fn manifest(step: u64, state: &[u8], parts: Vec<Part>, files: Vec<StoredFile>) -> Manifest {
    Manifest {
        version: MANIFEST_VERSION,
        id: id(step),
        run: "pets".into(),
        created_unix_ms: 1_700_000_000_000,
        state_bytes: state.len() as u64,
        state_digest: digest::of_slice(0, state),
        parts,
        files,
        lineage: Generation(1),
        applied: Step(step),
        epoch: Epoch(1),
        cursor: step * 32,
        seed: 44,
        world_size: 3,
        dataset_digest: "abc".into(),
        config: serde_json::json!({"name": "pets"}),
        progress: serde_json::json!({"early_stopping": {"wait": 1}}),
        best: Some(Best { checkpoint: id(step), epoch: Epoch(1) }),
    }
}

/// Writes the slices of `state` as ranks would, last one first and in odd chunks.
pub(super) fn upload(pending: &PendingCheckpoint, state: &[u8], slices: &[(u64, u64)]) -> Vec<Part> {
    let write = |&(offset, bytes): &(u64, u64)| {
        let slice = &state[offset as usize..][..bytes as usize];
        let mut writer = pending.part(offset, bytes).unwrap();
        slice.chunks(7).for_each(|chunk| writer.write(chunk).unwrap());
        writer.finish(digest::of_slice(offset / 4, slice)).unwrap()
    };
    slices.iter().rev().map(write).collect()
}

pub(super) fn weights(pending: &PendingCheckpoint) -> StoredFile {
    let mut weights = pending.file("weights.safetensors", 5).unwrap();
    weights.write(b"hello").unwrap();
    weights.finish().unwrap()
}

pub(super) fn commit(store: &CheckpointStore, step: u64) -> Vec<u8> {
    let state = state(step as u8);
    let pending = store.begin(&id(step), state.len() as u64).unwrap();
    let (parts, files) = (upload(&pending, &state, &SLICES), vec![weights(&pending)]);
    pending.commit(&manifest(step, &state, parts, files)).unwrap();
    state
}

pub(super) fn listed(store: &CheckpointStore) -> Vec<CheckpointId> {
    store.list().unwrap().into_iter().map(|manifest| manifest.id).collect()
}

fn entries(store: &CheckpointStore) -> usize {
    fs::read_dir(dir(store)).unwrap().count()
}

fn dir(store: &CheckpointStore) -> &Path {
    match &store.place {
        Place::Directory(directory) => directory.dir(),
        Place::Objects(_) => panic!("these tests are of directories"),
    }
}

fn path_of(store: &CheckpointStore, id: &CheckpointId) -> PathBuf {
    dir(store).join(id.as_str())
}

/// The newest checkpoint is not to be trusted, the one before is, and the reason is told.
#[track_caller]
fn falls_back(store: &CheckpointStore, from: u64, to: u64) -> String {
    let latest = store.load_latest().unwrap();
    assert_eq!(latest.manifest.map(|manifest| manifest.id), Some(id(to)));
    let [skipped] = &latest.skipped[..] else { panic!("{:?}", latest.skipped) };
    assert_eq!(skipped.id, id(from));
    skipped.reason.to_string()
}

#[test]
fn a_checkpoint_is_visible_only_once_committed_and_reads_back_in_order() {
    let (_dir, store) = store();
    let state = state(7);
    let pending = store.begin(&id(7), state.len() as u64).unwrap();
    let (parts, files) = (upload(&pending, &state, &SLICES), vec![weights(&pending)]);
    assert!(listed(&store).is_empty());
    assert!(store.load_latest().unwrap().manifest.is_none());
    let manifest = manifest(7, &state, parts, files);
    pending.commit(&manifest).unwrap();

    let latest = store.load_latest().unwrap();
    assert_eq!(latest.manifest, Some(manifest));
    assert!(latest.skipped.is_empty());
    let mut read = Vec::new();
    store.open_state(&id(7)).unwrap().read_to_end(&mut read).unwrap();
    assert_eq!(read, state);
    assert_eq!(entries(&store), 1);
    assert!(matches!(store.begin(&id(7), 4), Err(StoreError::AlreadyCommitted { .. })));
}

#[test]
fn newest_goes_by_label_not_by_clock() {
    let (_dir, store) = store();
    for step in [30, 4, 200] {
        commit(&store, step);
    }
    assert_eq!(listed(&store), [id(200), id(30), id(4)]);
}

#[test]
fn an_abandoned_or_dropped_checkpoint_leaves_nothing() {
    let (_dir, store) = store();
    let pending = store.begin(&id(1), 1002).unwrap();
    upload(&pending, &state(1), &SLICES);
    pending.abandon().unwrap();
    let pending = store.begin(&id(1), 1002).unwrap();
    let mut late = pending.part(0, 400).unwrap();
    drop(pending);
    assert_eq!(entries(&store), 0);
    // A writer that outlives its checkpoint does no harm.
    late.write(&state(1)[..400]).unwrap();
    drop(late);
    assert_eq!(entries(&store), 0);
}

#[test]
fn a_crashed_process_leftovers_are_cleared_at_open() {
    let (_dir, store) = store();
    commit(&store, 1);
    let pending = store.begin(&id(2), 1002).unwrap();
    upload(&pending, &state(2), &SLICES);
    std::mem::forget(pending);
    fs::create_dir(dir(&store).join(".removed-e0001-s00000000")).unwrap();
    assert_eq!(listed(&store), [id(1)]);
    assert_eq!(entries(&store), 3);
    let reopened = CheckpointStore::open(dir(&store)).unwrap();
    assert_eq!(entries(&reopened), 1);
    assert_eq!(listed(&reopened), [id(1)]);
}

#[test]
fn a_damaged_checkpoint_is_skipped_with_its_reason() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 6] = [
        ("torn or damaged", |dir| truncate(&dir.join(MANIFEST), 200)),
        ("cannot read", |dir| fs::remove_file(dir.join(MANIFEST)).unwrap()),
        ("digest", |dir| flip(&dir.join("part-408.bin"), 593)),
        ("cannot find", |dir| fs::remove_file(dir.join("part-400.bin")).unwrap()),
        ("part-0.bin has 399 bytes", |dir| truncate(&dir.join("part-0.bin"), 399)),
        ("weights.safetensors has digest", |dir| flip(&dir.join("weights.safetensors"), 0)),
    ];
    for (expected, damage) in damages {
        let (_dir, store) = store();
        commit(&store, 1);
        commit(&store, 2);
        damage(&path_of(&store, &id(2)));
        let reason = falls_back(&store, 2, 1);
        assert!(reason.contains(expected), "{reason}");
        // The step is trained again, and its checkpoint takes the damaged one's place.
        commit(&store, 2);
        assert_eq!(store.load_latest().unwrap().manifest.unwrap().id, id(2));
        assert_eq!(entries(&store), 2);
    }
}

#[test]
fn nothing_to_trust_is_not_an_error() {
    let (_dir, store) = store();
    commit(&store, 1);
    flip(&path_of(&store, &id(1)).join("part-0.bin"), 0);
    let latest = store.load_latest().unwrap();
    assert!(latest.manifest.is_none());
    assert_eq!(latest.skipped.len(), 1);
}

#[test]
fn a_manifest_of_another_version_is_refused_not_skipped() {
    let (_dir, store) = store();
    commit(&store, 1);
    commit(&store, 2);
    let path = path_of(&store, &id(2)).join(MANIFEST);
    fs::write(&path, r#"{"version": 9, "what": "is this"}"#).unwrap();
    let error = store.load_latest().unwrap_err();
    assert!(matches!(error, StoreError::Version { found: 9, .. }));
    assert!(error.to_string().contains("use the version that wrote it"), "{error}");
    assert_eq!(listed(&store), [id(1)]);
}

#[test]
fn a_checkpoint_moved_by_hand_is_skipped() {
    let (_dir, store) = store();
    commit(&store, 1);
    commit(&store, 2);
    fs::rename(path_of(&store, &id(2)), path_of(&store, &id(3))).unwrap();
    assert!(falls_back(&store, 3, 1).contains("by hand"));
}

#[test]
fn a_part_that_is_not_as_announced_is_refused_and_can_be_sent_again() {
    let (_dir, store) = store();
    let state = state(1);
    let pending = store.begin(&id(1), 1002).unwrap();

    let mut short = pending.part(0, 400).unwrap();
    short.write(&state[..399]).unwrap();
    assert!(matches!(short.finish(0), Err(StoreError::Length { expected: 400, found: 399, .. })));
    let mut long = pending.part(0, 400).unwrap();
    assert!(matches!(long.write(&state[..401]), Err(StoreError::Length { found: 401, .. })));
    drop(long);
    let mut wrong = pending.part(0, 400).unwrap();
    wrong.write(&state[..400]).unwrap();
    assert!(matches!(wrong.finish(1), Err(StoreError::Digest { .. })));
    for (offset, bytes) in [(2, 4), (0, 3), (400, 0), (1000, 4), (u64::MAX, 4), (u64::MAX - 3, u64::MAX)] {
        assert!(matches!(pending.part(offset, bytes), Err(StoreError::NoSlice { .. })), "{offset} {bytes}");
    }

    // The first sender's connection hangs; the second one's bytes count.
    let mut stuck = pending.part(0, 400).unwrap();
    stuck.write(&[9; 100]).unwrap();
    let parts = upload(&pending, &state, &SLICES);
    stuck.write(&[9; 300]).unwrap();
    pending.commit(&manifest(1, &state, parts, vec![])).unwrap();
    assert!(store.verify(&id(1)).is_ok());
}

#[test]
fn a_commit_that_does_not_add_up_fails_and_leaves_nothing() {
    type Spoil = fn(&mut Manifest);
    let spoils: [(&str, Spoil); 7] = [
        ("in no part", |m| drop(m.parts.remove(0))),
        ("in no part", |m| m.parts.retain(|part| part.offset != 400)),
        ("more than one part", |m| m.parts.push(m.parts[1].clone())),
        ("the replicas agreed", |m| m.state_digest ^= 1),
        ("the manifest is of", |m| m.id = id(9)),
        ("cannot find", |m| m.files[0].file = "absent".into()),
        ("weights.safetensors has 5", |m| m.files[0].bytes = 6),
    ];
    let (_dir, store) = store();
    commit(&store, 1);
    for (expected, spoil) in spoils {
        let state = state(2);
        let pending = store.begin(&id(2), state.len() as u64).unwrap();
        let (parts, files) = (upload(&pending, &state, &SLICES), vec![weights(&pending)]);
        let mut manifest = manifest(2, &state, parts, files);
        spoil(&mut manifest);
        let error = pending.commit(&manifest).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(entries(&store), 1);
        assert!(store.verify(&id(1)).is_ok());
    }
}

#[test]
fn overlapping_slices_of_different_starts_are_refused() {
    let (_dir, store) = store();
    let state = state(2);
    let pending = store.begin(&id(2), 1002).unwrap();
    let parts = upload(&pending, &state, &[(0, 404), (400, 8), (408, 594)]);
    let error = pending.commit(&manifest(2, &state, parts, vec![])).unwrap_err();
    assert!(matches!(error, StoreError::Overlap { from: 400 }), "{error}");
}

#[test]
fn names_that_leave_the_directory_are_refused() {
    let (_dir, store) = store();
    for name in ["../x", "a/b", "", ".", "..", ".pending-x", "a\0b"] {
        assert!(matches!(store.begin(&name.into(), 4), Err(StoreError::Name { .. })), "{name:?}");
        assert!(store.open_state(&name.into()).is_err());
    }
    let pending = store.begin(&id(1), 4).unwrap();
    for name in ["../x", MANIFEST, "part-0.bin"] {
        assert!(matches!(pending.file(name, 1), Err(StoreError::Name { .. })), "{name}");
    }
}

#[test]
fn prune_keeps_the_newest_and_the_best() {
    let (_dir, store) = store();
    for step in 1..=5 {
        commit(&store, step);
    }
    assert_eq!(store.surplus(2, Some(&id(2))).unwrap(), [id(3), id(1)]);
    assert_eq!(listed(&store).len(), 5);
    assert_eq!(store.prune(2, Some(&id(2))).unwrap(), [id(3), id(1)]);
    assert_eq!(listed(&store), [id(5), id(4), id(2)]);
    assert_eq!(entries(&store), 3);
    assert_eq!(store.prune(2, Some(&id(5))).unwrap(), [id(2)]);
    assert!(store.prune(2, None).unwrap().is_empty());
}

#[test]
fn a_state_cut_off_while_it_is_read_is_an_error_not_an_end() {
    let (_dir, store) = store();
    commit(&store, 1);
    truncate(&path_of(&store, &id(1)).join("part-400.bin"), 4);
    let mut read = Vec::new();
    let error = store.open_state(&id(1)).unwrap().read_to_end(&mut read).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
}

#[test]
fn a_store_that_cannot_be_a_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let error = CheckpointStore::open(file.join("checkpoints")).unwrap_err();
    assert!(matches!(error, StoreError::Io { .. }), "{error}");
}

#[test]
fn a_full_or_read_only_disk_endangers_no_earlier_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = TinyDisk::mount(dir.path()) else {
        println!("skipped: mounting a tmpfs is not allowed here");
        return;
    };
    let store = CheckpointStore::open(disk.0.join("checkpoints")).unwrap();
    commit(&store, 1);

    let bytes = 1 << 20;
    let pending = store.begin(&id(2), bytes).unwrap();
    let mut part = pending.part(0, bytes).unwrap();
    let error = std::iter::repeat_with(|| part.write(&[1; 4096])).take(256).find_map(Result::err);
    assert!(matches!(error, Some(StoreError::DiskFull { .. })), "{error:?}");
    drop((part, pending));
    assert_eq!(entries(&store), 1);
    commit(&store, 3);

    disk.remount_read_only();
    assert!(matches!(store.begin(&id(4), 4), Err(StoreError::Io { .. })));
    assert_eq!(store.load_latest().unwrap().manifest.unwrap().id, id(3));
}

/// A file system of 64 KiB of its own.
struct TinyDisk(PathBuf);

impl TinyDisk {
    fn mount(dir: &Path) -> Option<Self> {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"]).arg(dir).stderr(std::process::Stdio::null());
        mount.status().is_ok_and(|status| status.success()).then(|| Self(dir.to_owned()))
    }

    fn remount_read_only(&self) {
        let status = Command::new("mount").args(["-o", "remount,ro"]).arg(&self.0).status();
        assert!(status.unwrap().success());
    }
}

impl Drop for TinyDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn truncate(path: &Path, bytes: u64) {
    fs::File::options().write(true).open(path).unwrap().set_len(bytes).unwrap();
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_copy_is_known_by_its_bytes() {
    let (dir, store) = store();
    commit(&store, 7);
    let copy = dir.path().join("best.safetensors");
    let is_copy = || store.is_copy(&id(7), "weights.safetensors", &copy).unwrap();
    assert!(!is_copy(), "there is none");
    store.copy_out(&id(7), "weights.safetensors", &copy).unwrap();
    assert!(is_copy());
    for other in ["hello!", "hullo", ""] {
        fs::write(&copy, other).unwrap();
        assert!(!is_copy(), "{other:?} is an earlier epoch's");
    }
    assert!(!store.is_copy(&id(7), "absent.bin", &copy).unwrap());
}
