//! What a simulation is of: a tiny job, a team, and the list of the faults that happen to it. A seed
//! makes one; the list can be thinned out and kept in a file.

use musher_proto::job::JobConfig;
use rand::{RngExt, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::network::Node;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scenario {
    pub seed: u64,
    pub knobs: Knobs,
    /// (milliseconds since the start, what happens), in this order.
    pub faults: Vec<(u64, Fault)>,
    /// When all links heal, all that stand still go on, and nothing bad happens any more.
    pub calm_ms: u64,
}

/// The job and its team; times in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Knobs {
    pub train_samples: u64,
    pub val_samples: u64,
    pub global_batch: u32,
    pub epochs: u32,
    pub every_steps: u64,
    pub every_epochs: u32,
    pub keep: u32,
    pub patience: u32,
    pub restore_best: bool,
    /// Validation loss by epoch; the last one goes on.
    pub curve: Vec<f64>,
    /// Processes at the start.
    pub team: usize,
    /// `cluster.workers`.
    pub expected: u32,
    pub min_workers: u32,
    pub max_workers: u32,
    pub start_timeout_ms: u64,
    pub regroup_window_ms: u64,
    pub heartbeat_timeout_ms: u64,
    pub step_timeout_ms: u64,
    pub coordinator_timeout_ms: u64,
    pub linger_ms: u64,
    /// A rank's own part of a step.
    pub step_ms: u64,
    pub upload_ms: u64,
}

impl Knobs {
    pub fn job(&self) -> JobConfig {
        let seconds = |ms: u64| ms as f64 / 1e3;
        let mut job = JobConfig::default();
        job.train.global_batch = self.global_batch;
        job.train.epochs = self.epochs;
        job.checkpoint.every_steps = self.every_steps;
        job.checkpoint.every_epochs = self.every_epochs;
        job.checkpoint.keep = self.keep;
        job.early_stopping.patience = self.patience;
        job.early_stopping.restore_best = self.restore_best;
        let cluster = &mut job.cluster;
        cluster.workers = self.expected;
        cluster.min_workers = self.min_workers;
        cluster.max_workers = self.max_workers;
        cluster.start_timeout_s = seconds(self.start_timeout_ms);
        cluster.regroup_window_s = seconds(self.regroup_window_ms);
        cluster.heartbeat_timeout_s = seconds(self.heartbeat_timeout_ms);
        cluster.step_timeout_s = seconds(self.step_timeout_ms);
        cluster.coordinator_timeout_s = seconds(self.coordinator_timeout_ms);
        job.server.linger_s = seconds(self.linger_ms);
        job
    }

    pub fn steps_per_epoch(&self) -> u64 {
        self.train_samples.div_ceil(u64::from(self.global_batch))
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Fault {
    /// Dies when it has performed so many more actions, or at once; started again after a while.
    /// `vanish` as below.
    KillCoordinator {
        after_actions: Option<u32>,
        back_after_ms: u64,
        #[serde(default)]
        vanish: bool,
        lose_in_flight: bool,
    },
    /// SIGSTOP and SIGCONT; on waking it may see its timers before its inbox.
    StopCoordinator {
        for_ms: u64,
        timers_first: bool,
    },
    /// Its machine was suspended: its clock is ahead of the world's from here on.
    JumpClock {
        by_ms: u64,
    },
    /// `vanish`: the whole machine is gone, so that no peer's kernel is told.
    KillWorker {
        worker: usize,
        vanish: bool,
        lose_in_flight: bool,
        back_after_ms: Option<u64>,
    },
    StopWorker {
        worker: usize,
        for_ms: u64,
    },
    /// The training thread hangs outside the exchange, while the shell goes on; `None`: for ever.
    StickThread {
        worker: usize,
        for_ms: Option<u64>,
    },
    SlowThread {
        worker: usize,
        factor: f64,
        for_ms: u64,
    },
    /// SIGTERM.
    Terminate {
        worker: usize,
        back_after_ms: Option<u64>,
    },
    /// Its stream to the coordinator breaks, and nothing else.
    Reset {
        worker: usize,
    },
    Drain {
        worker: usize,
    },
    StopRun,
    Newcomer,
    Cut {
        from: Node,
        to: Node,
        both_ways: bool,
        for_ms: u64,
    },
    /// These are cut off from all others.
    Partition {
        side: Vec<Node>,
        for_ms: u64,
    },
    SlowLink {
        a: Node,
        b: Node,
        for_ms: u64,
    },
    /// Parts and commits fail.
    DiskFull {
        for_ms: u64,
    },
    LoseUpload,
    Stranger(Stranger),
    /// A message of another fence comes over a worker's stream.
    Stale {
        worker: usize,
        stale: Stale,
        to_worker: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stranger {
    OtherProtocol,
    OtherData,
    /// Of a worker whose newer process is connected.
    OlderIncarnation(usize),
    /// A coordinator of another run answers a worker that looks for its own.
    OtherRun(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stale {
    OlderTerm,
    OlderGeneration,
    NewerGeneration,
}

/// How likely each kind of fault is, by a weight; a seed leaves out about half of the kinds, so that some
/// runs see much of a few ("swarm testing", Groce et al. 2012).
const KINDS: [(u32, Kind); 19] = [
    (6, Kind::KillCoordinator),
    (3, Kind::StopCoordinator),
    (2, Kind::JumpClock),
    (8, Kind::KillWorker),
    (5, Kind::StopWorker),
    (4, Kind::StickThread),
    (2, Kind::SlowThread),
    (3, Kind::Terminate),
    (5, Kind::Reset),
    (3, Kind::Drain),
    (1, Kind::StopRun),
    (4, Kind::Newcomer),
    (5, Kind::CutWorkers),
    (5, Kind::CutCoordinator),
    (3, Kind::Partition),
    (2, Kind::SlowLink),
    (2, Kind::DiskFull),
    (2, Kind::Stranger),
    (4, Kind::Stale),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    KillCoordinator,
    StopCoordinator,
    JumpClock,
    KillWorker,
    StopWorker,
    StickThread,
    SlowThread,
    Terminate,
    Reset,
    Drain,
    StopRun,
    Newcomer,
    CutWorkers,
    CutCoordinator,
    Partition,
    SlowLink,
    DiskFull,
    Stranger,
    Stale,
}

impl Scenario {
    pub fn generate(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let knobs = knobs(&mut rng);
        let steps = u64::from(knobs.epochs) * knobs.steps_per_epoch();
        // Most faults fall into the time that the run takes undisturbed; faults make it longer.
        let window = (2000 + steps * (knobs.step_ms + 60)).min(150_000);
        let calm_ms = window * rng.random_range(1..=2);
        let kinds: Vec<(u32, Kind)> = KINDS.into_iter().filter(|_| rng.random_bool(0.5)).collect();
        let total: u32 = kinds.iter().map(|(weight, _)| weight).sum();
        let count = match rng.random_range(0..10) {
            0 => 0,
            1..=3 => rng.random_range(1..=3),
            4..=7 => rng.random_range(3..=10),
            _ => rng.random_range(10..=40),
        };
        let mut faults = Vec::new();
        for _ in 0..if total == 0 { 0 } else { count } {
            let mut pick = rng.random_range(0..total);
            let kind =
                kinds.iter().find(|(weight, _)| pick.checked_sub(*weight).map(|left| pick = left).is_none());
            let Some(&(_, kind)) = kind else { continue };
            faults.push((rng.random_range(0..calm_ms), fault(&mut rng, kind, &knobs)));
        }
        faults.sort_by_key(|(at, _)| *at);
        Self { seed, knobs, faults, calm_ms }
    }
}

fn knobs(rng: &mut ChaCha8Rng) -> Knobs {
    let team = rng.random_range(1..=5usize);
    let epochs = rng.random_range(2..=5);
    let heartbeat_timeout_ms = rng.random_range(2000..=6000);
    let min_workers = rng.random_range(1..=(team as u32).min(3));
    let expected = if rng.random_bool(0.4) { rng.random_range(min_workers..=team as u32) } else { 0 };
    Knobs {
        train_samples: rng.random_range(7..=40),
        val_samples: rng.random_range(1..=20),
        global_batch: rng.random_range(3..=8),
        epochs,
        every_steps: if rng.random_bool(0.4) { rng.random_range(1..=6) } else { 0 },
        every_epochs: rng.random_range(0..=2),
        keep: rng.random_range(1..=3),
        patience: rng.random_range(1..=4),
        restore_best: rng.random_bool(0.7),
        curve: (0..epochs).map(|_| f64::from(rng.random_range(1..=20u32)) / 10.0).collect(),
        team,
        expected,
        min_workers,
        max_workers: if rng.random_bool(0.2) { (team as u32).max(min_workers) } else { 64 },
        start_timeout_ms: rng.random_range(15_000..=60_000),
        regroup_window_ms: *[0, 200, 500, 2000].choose(rng).unwrap_or(&0),
        heartbeat_timeout_ms,
        step_timeout_ms: heartbeat_timeout_ms + rng.random_range(1000..=8000),
        coordinator_timeout_ms: heartbeat_timeout_ms + rng.random_range(5000..=90_000),
        linger_ms: *[0, 1000, 5000].choose(rng).unwrap_or(&0),
        step_ms: *[30, 200, 600, 1500, 3000].choose(rng).unwrap_or(&100),
        upload_ms: *[20, 300, 2000].choose(rng).unwrap_or(&20),
    }
}

fn fault(rng: &mut ChaCha8Rng, kind: Kind, knobs: &Knobs) -> Fault {
    let workers = knobs.team + 2; // those that come may fall ill too
    let worker = rng.random_range(0..workers);
    let other = (worker + rng.random_range(1..workers)) % workers;
    let long = knobs.heartbeat_timeout_ms + knobs.step_timeout_ms;
    let for_ms = match rng.random_range(0..4) {
        0 => rng.random_range(50..1000),
        1 => rng.random_range(500..knobs.heartbeat_timeout_ms),
        2 => rng.random_range(500..long),
        _ => rng.random_range(1000..3 * long),
    };
    let back_after_ms = (rng.random_bool(0.8)).then(|| rng.random_range(100..6000));
    match kind {
        Kind::KillCoordinator => Fault::KillCoordinator {
            after_actions: rng.random_bool(0.7).then(|| rng.random_range(0..40)),
            back_after_ms: match rng.random_range(0..4) {
                0 => rng.random_range(10..300),
                1 | 2 => rng.random_range(100..4000),
                _ => rng.random_range(1000..25_000),
            },
            vanish: rng.random_bool(0.3),
            lose_in_flight: rng.random(),
        },
        Kind::StopCoordinator => Fault::StopCoordinator { for_ms, timers_first: rng.random() },
        Kind::JumpClock => Fault::JumpClock { by_ms: rng.random_range(1000..120_000) },
        Kind::KillWorker => Fault::KillWorker {
            worker,
            vanish: rng.random_bool(0.3),
            lose_in_flight: rng.random(),
            back_after_ms,
        },
        Kind::StopWorker => Fault::StopWorker { worker, for_ms },
        Kind::StickThread => Fault::StickThread { worker, for_ms: rng.random_bool(0.7).then_some(for_ms) },
        Kind::SlowThread => {
            Fault::SlowThread { worker, factor: rng.random_range(1.5..6.0), for_ms: for_ms * 3 }
        }
        Kind::Terminate => Fault::Terminate { worker, back_after_ms },
        Kind::Reset => Fault::Reset { worker },
        Kind::Drain => Fault::Drain { worker },
        Kind::StopRun => Fault::StopRun,
        Kind::Newcomer => Fault::Newcomer,
        Kind::CutWorkers => {
            let (from, to) = (Node::Worker(worker), Node::Worker(other));
            Fault::Cut { from, to, both_ways: rng.random(), for_ms }
        }
        Kind::CutCoordinator => {
            let ends = [Node::Coordinator, Node::Worker(worker)];
            let [from, to] = if rng.random() { ends } else { [ends[1], ends[0]] };
            Fault::Cut { from, to, both_ways: rng.random(), for_ms }
        }
        Kind::Partition => {
            let mut side: Vec<Node> = (0..workers).filter(|_| rng.random()).map(Node::Worker).collect();
            side.extend(rng.random_bool(0.3).then_some(Node::Coordinator));
            Fault::Partition { side, for_ms }
        }
        Kind::SlowLink => {
            let b = if rng.random() { Node::Coordinator } else { Node::Worker(other) };
            Fault::SlowLink { a: Node::Worker(worker), b, for_ms: for_ms * 2 }
        }
        Kind::DiskFull if rng.random() => Fault::LoseUpload,
        Kind::DiskFull => Fault::DiskFull { for_ms },
        Kind::Stranger => Fault::Stranger(match rng.random_range(0..4) {
            0 => Stranger::OtherProtocol,
            1 => Stranger::OtherData,
            2 => Stranger::OlderIncarnation(worker),
            _ => Stranger::OtherRun(worker),
        }),
        Kind::Stale => {
            let stale = match rng.random_range(0..3) {
                0 => Stale::OlderTerm,
                1 => Stale::OlderGeneration,
                _ => Stale::NewerGeneration,
            };
            Fault::Stale { worker, stale, to_worker: rng.random() }
        }
    }
}
