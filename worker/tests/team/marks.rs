//! What a worker's heartbeat says of it, at each thing that it does or waits for.

use std::{
    fs,
    path::PathBuf,
    sync::{Arc, Mutex, mpsc::sync_channel},
    thread,
    time::{Duration, Instant},
};

use musher_collective::{Aborter, Collective, CollectiveError, Meter, Tag};
use musher_proto::{
    ids::Epoch,
    message::{Activity, Phase, Progress, Validate},
};
use musher_worker::train::{ProgressBoard, Source, StopFlag, TrainError};
use rustix::fs::{CWD, FileType, Mode, mknodat};

use crate::harness::{PATIENCE, Pets, Team, Worker, job};

/// Longer than any single thing that this network does takes.
const LONG: u64 = 500;

/// Waits until a worker's heartbeat says that.
fn until(worker: &ProgressBoard, says: impl Fn(&Progress) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !says(&worker.read()) {
        assert!(Instant::now() < deadline, "{:?}", worker.read());
        thread::yield_now();
    }
}

fn doing(phase: Phase, activity: Activity) -> impl Fn(&Progress) -> bool {
    move |progress| (progress.phase, progress.activity) == (phase, activity)
}

fn doing_long(phase: Phase, activity: Activity) -> impl Fn(&Progress) -> bool {
    move |progress| doing(phase, activity)(progress) && progress.in_activity_ms >= LONG
}

fn boards(team: &Team) -> Vec<Arc<ProgressBoard>> {
    team.0.iter().map(|worker| worker.trainer.board.clone()).collect()
}

/// A sample's mask that comes only once somebody delivers it.
struct Delayed {
    bytes: Vec<u8>,
    path: PathBuf,
}

impl Delayed {
    /// Of the first sample of a split.
    fn first_of(pets: &Pets, list: &str) -> Self {
        let folder = pets.root().join("annotations");
        let list = fs::read_to_string(folder.join(list)).unwrap();
        let name = list.lines().find(|line| !line.starts_with('#')).unwrap().split(' ').next().unwrap();
        let path = folder.join("trimaps").join(format!("{name}.png"));
        let bytes = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        Self { bytes, path }
    }

    fn deliver(&self) {
        fs::write(&self.path, &self.bytes).unwrap();
    }
}

#[test]
fn one_waits_for_a_sample_and_its_peer_for_it() {
    let pets = Pets::drawn();
    let mut team = Team::seeded(&pets, &job(), 2);
    let mask = Delayed::first_of(&pets, "trainval.txt");
    let order = pets.epoch(1);
    let boards = boards(&team);
    thread::scope(|scope| {
        scope.spawn(|| team.train(order));
        let waits_for_data = doing_long(Phase::Training, Activity::WaitingForData);
        let waits_for_peers = doing_long(Phase::Training, Activity::WaitingForPeers);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = [boards[0].read(), boards[1].read()];
            if seen.iter().any(&waits_for_data) && seen.iter().any(&waits_for_peers) {
                break;
            }
            assert!(Instant::now() < deadline, "{seen:?}");
            thread::yield_now();
        }
        mask.deliver();
    });
    assert!(boards.iter().all(|board| board.read().warm));
}

#[test]
fn a_validation_unit_waits_for_its_samples() {
    let pets = Pets::drawn();
    let mut team = Team::seeded(&pets, &job(), 1);
    let mask = Delayed::first_of(&pets, "test.txt");
    let board = team.0[0].trainer.board.clone();
    thread::scope(|scope| {
        scope.spawn(|| {
            let Worker { trainer, member, .. } = &mut team.0[0];
            let order = Validate { epoch: Epoch(1), samples_wanted: 0 };
            trainer.validate(member.as_ref().unwrap(), order).unwrap()
        });
        until(&board, doing_long(Phase::Validating, Activity::WaitingForData));
        mask.deliver();
    });
}

#[test]
fn a_donor_waits_for_each_piece_of_its_checkpoint() {
    let pets = Pets::drawn();
    let mut team = Team::form(1, Worker::new_team(&pets, &job(), 1));
    let (sender, pieces) = sync_channel(0);
    let pieces = Mutex::new(Some(pieces));
    let board = team.0[0].trainer.board.clone();
    thread::scope(|scope| {
        let syncing = scope.spawn(|| {
            let source = || Source::Checkpoint(pieces.lock().unwrap().take().unwrap());
            team.try_sync(0, source).remove(0).unwrap_err()
        });
        for _ in 0..2 {
            until(&board, doing_long(Phase::Syncing, Activity::WaitingForData));
            sender.send(Ok(vec![0; 1000])).unwrap();
            until(&board, |progress| progress.in_activity_ms < LONG);
        }
        sender.send(Err("the store is gone".into())).unwrap();
        assert!(matches!(syncing.join().unwrap(), TrainError::Download(_)));
    });
}

/// What it waited for reaches the one who asks, also when it is told to leave.
#[test]
fn one_whose_peer_does_not_come_waits_for_it() {
    let pets = Pets::drawn();
    let mut team = Team::seeded(&pets, &job(), 2);
    let order = pets.epoch(1);
    let board = team.0[0].trainer.board.clone();
    let aborter = team.0[0].aborter();
    let error = thread::scope(|scope| {
        let one = &mut team.0[0];
        let training = scope.spawn(move || one.train(order, &StopFlag::default(), |_| ()).unwrap_err());
        until(&board, doing_long(Phase::Training, Activity::WaitingForPeers));
        assert!(!board.read().warm);
        aborter.abort();
        training.join().unwrap()
    });
    let TrainError::Collective(CollectiveError::Aborted(Some(waited))) = error else { panic!("{error}") };
    assert_eq!((waited.rank, waited.closed), (1, false));
    assert!(waited.idle >= Duration::from_millis(LONG / 2), "{waited:?}");
    assert_eq!(waited.call.unwrap().phase, musher_collective::Phase::Gradients);
}

#[test]
fn whoever_waits_in_an_exchange_waits_for_peers_and_whoever_comes_from_one_works() {
    let pets = Pets::drawn();
    let mut team = Team::form(1, Worker::new_team(&pets, &job(), 2));
    let seen: Vec<_> = team.0.iter_mut().map(watch).collect();
    team.sync(0, || Source::Seeded);
    team.each(|worker| {
        let board = worker.trainer.board.clone();
        let works = |_| {
            let progress = board.read();
            assert!(doing(Phase::Training, Activity::Working)(&progress) && progress.warm, "{progress:?}");
        };
        worker.train(pets.epoch(1), &StopFlag::default(), works).unwrap();
    });
    for seen in seen {
        let seen = seen.lock().unwrap();
        assert!(seen.iter().any(|(tag, _)| tag.phase == musher_collective::Phase::State));
        for (tag, progress) in &*seen {
            let phase = match tag.phase {
                musher_collective::Phase::State | musher_collective::Phase::Digest => Phase::Syncing,
                _ => Phase::Training,
            };
            // Gradients are summed while this rank computes more of them.
            let waits = tag.phase != musher_collective::Phase::Gradients;
            assert!(progress.phase == phase, "{tag:?}: {progress:?}");
            assert!(!waits || progress.activity == Activity::WaitingForPeers, "{tag:?}: {progress:?}");
            assert_eq!(progress.warm, phase == Phase::Training && tag.step > 0, "{tag:?}");
        }
    }
}

/// Each call, with what the heartbeat said meanwhile.
type Seen = Arc<Mutex<Vec<(Tag, Progress)>>>;

fn watch(worker: &mut Worker) -> Seen {
    let seen = Seen::default();
    let board = worker.trainer.board.clone();
    let mut member = worker.member.take().unwrap();
    member.hosts.0 = Box::new(Watched { inner: member.hosts.0, board, seen: seen.clone() });
    worker.member = Some(member);
    seen
}

struct Watched {
    inner: Box<dyn Collective>,
    board: Arc<ProgressBoard>,
    seen: Seen,
}

impl Watched {
    fn note(&self, tag: Tag) {
        self.seen.lock().unwrap().push((tag, self.board.read()));
    }
}

impl Collective for Watched {
    fn rank(&self) -> u32 {
        self.inner.rank()
    }

    fn world(&self) -> u32 {
        self.inner.world()
    }

    fn all_reduce(&mut self, tag: Tag, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.note(tag);
        self.inner.all_reduce(tag, data)
    }

    fn all_reduce_bf16(&mut self, tag: Tag, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.note(tag);
        self.inner.all_reduce_bf16(tag, data)
    }

    fn all_reduce_f64(&mut self, tag: Tag, data: &mut [f64]) -> Result<(), CollectiveError> {
        self.note(tag);
        self.inner.all_reduce_f64(tag, data)
    }

    fn broadcast(&mut self, tag: Tag, root: u32, data: &mut [u8]) -> Result<(), CollectiveError> {
        self.note(tag);
        self.inner.broadcast(tag, root, data)
    }

    fn aborter(&self) -> Aborter {
        self.inner.aborter()
    }

    fn meter(&self) -> Meter {
        self.inner.meter()
    }
}
