//! Workers, and the teams that they form.

use std::{
    env,
    fmt::Debug,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{Arc, mpsc::sync_channel},
    thread,
    time::{Duration, Instant},
};

use musher_collective::{Aborter, Collective, Purpose, RingListener, RingSpec, Secret};
use musher_dataset::{
    DataWarning, Dataset, ImageCache, Warnings,
    synth::{self, SynthOptions},
};
use musher_nccl::OnHost;
use musher_proto::{
    ids::{Epoch, Generation, Rank},
    job::JobConfig,
    message::{Form, Start, Synced, Train},
};
use musher_worker::train::{
    Membership, ProgressBoard, SegmentEnd, Snapshot, Source, StopFlag, SyncBatchNorm, TrainError, Trainer,
    TrainingData,
};
use tch::Device;
use tempfile::TempDir;

use crate::{
    fault::{At, Fault, Faulty},
    start,
};

/// Far longer than anything that works takes, even on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// No team of two to four divides the batch, and the batch does not divide the epoch.
pub const TRAIN_SAMPLES: u64 = 23;
pub const GLOBAL_BATCH: u64 = 5;
pub const STEPS_PER_EPOCH: usize = 5;

/// A small job whose arithmetic does not depend on the team.
pub fn job() -> JobConfig {
    let mut job = JobConfig::default();
    job.data.image_size = 64;
    job.model.width = 0.05;
    job.model.freeze_batch_norm = true;
    job.train.global_batch = GLOBAL_BATCH as u32;
    job.train.epochs = 4;
    // Adam turns a gradient's rounding into up to rate / epsilon times as much of a step: at ten times this rate one
    // seed in four magnifies the order of summation beyond all tolerances within twenty steps, at this one none of
    // twelve does.
    job.train.learning_rate = 3e-4;
    // Several, also of this small network.
    job.train.bucket_mb = 0.1;
    job
}

/// As [`job`], with batch norm as it usually is.
pub fn job_with_batch_norm() -> JobConfig {
    let mut job = job();
    job.model.freeze_batch_norm = false;
    job
}

/// A data set; one made for a test is removed at its end.
pub struct Pets {
    root: Option<TempDir>,
    dataset: Arc<Dataset>,
    cache: Arc<ImageCache>,
}

impl Pets {
    pub fn drawn() -> Self {
        Self::made_by(|root| {
            let options = SynthOptions { train: TRAIN_SAMPLES as usize, val: 7, seed: 1, sides: [64, 80] };
            synth::draw(root, &options).unwrap();
        })
    }

    /// Of a data set that was made for the test.
    pub fn root(&self) -> &Path {
        self.root.as_ref().unwrap().path()
    }

    pub fn made_by(make: impl FnOnce(&Path)) -> Self {
        let root = tempfile::tempdir().unwrap();
        make(root.path());
        Self { dataset: open(root.path()), root: Some(root), cache: cache() }
    }

    /// Photographs of the real data set, where they are at hand.
    pub fn real() -> Option<Self> {
        let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/pets");
        let root = env::var_os("MUSHER_PETS").map_or_else(beside, PathBuf::from);
        if !root.join("images").is_dir() {
            println!("skipped: no data set at {}; set MUSHER_PETS", root.display());
            return None;
        }
        Some(Self { dataset: open(&root), root: None, cache: cache() })
    }

    fn training_data(&self) -> TrainingData {
        self.warning_data(|_| {})
    }

    /// As all teams have, with its warnings told.
    pub fn warning_data(&self, sink: impl Fn(DataWarning) + Send + Sync + 'static) -> TrainingData {
        TrainingData {
            dataset: self.dataset.clone(),
            cache: self.cache.clone(),
            warnings: Arc::new(Warnings::new(sink)),
            threads: 1,
        }
    }

    pub fn epoch(&self, epoch: u32) -> Train {
        Train { epoch: Epoch(epoch), cursor: 0, end: self.dataset.train().len() as u64 }
    }
}

fn open(root: &Path) -> Arc<Dataset> {
    let dataset = Dataset::open(&musher_dataset::Source::at(root));
    Arc::new(dataset.unwrap())
}

fn cache() -> Arc<ImageCache> {
    Arc::new(ImageCache::new(256 << 20))
}

/// A worker between two generations, or in one.
pub struct Worker {
    pub trainer: Trainer,
    listener: RingListener,
    pub member: Option<Membership>,
    /// Of the steps applied since the last [`Team::form`].
    pub losses: Vec<f64>,
    /// What it is told of the next sync: its state is the donor's already.
    pub holds_it: bool,
    /// In the generation to be formed.
    pub batch_norm_goes_wrong: Option<(At, Fault)>,
}

impl Worker {
    pub fn new(pets: &Pets, job: &JobConfig) -> Self {
        let board = Arc::new(ProgressBoard::default());
        let data = pets.training_data();
        let trainer = Trainer::new(Arc::new(job.clone()), data, device(), board).unwrap();
        let listener = RingListener::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let (member, losses, batch_norm_goes_wrong) = (None, Vec::new(), None);
        Self { trainer, listener, member, losses, holds_it: false, batch_norm_goes_wrong }
    }

    pub fn new_team(pets: &Pets, job: &JobConfig, world: usize) -> Vec<Self> {
        (0..world).map(|_| Self::new(pets, job)).collect()
    }

    pub fn rank(&self) -> u32 {
        self.member.as_ref().unwrap().rank().0
    }

    pub fn aborter(&self) -> Aborter {
        self.member.as_ref().unwrap().aborter()
    }

    /// As a worker does, leaves the generation on an error.
    pub fn train(
        &mut self,
        order: Train,
        stop: &StopFlag,
        mut after_step: impl FnMut(usize),
    ) -> Result<SegmentEnd, TrainError> {
        let Self { trainer, member, losses, .. } = self;
        let end = trainer.train(member.as_mut().unwrap(), order, stop, |loss| {
            losses.push(loss);
            after_step(losses.len());
        });
        if end.is_err() {
            *member = None;
        }
        end
    }

    fn sync(&mut self, donor: u32, source: Source) -> Result<Synced, TrainError> {
        let member = self.member.as_mut().unwrap();
        let form = Form {
            rank: member.rank(),
            world: member.world(),
            successor: String::new(), // the ring stands already
            secret: [0; 32],
            donor: Rank(donor),
            broadcast: true,
            holds_it: self.holds_it,
            start: Start::Held,
        };
        let synced = self.trainer.sync(member, &form, source);
        if synced.is_err() {
            self.member = None;
        }
        synced
    }

    /// Batch norm's running means, then variances.
    pub fn statistics(&self) -> Vec<f32> {
        let replica = self.trainer.replica();
        let range = replica.state_layout().batch_norm;
        let bytes = replica.read_state(range.start, (range.end - range.start) as usize).unwrap();
        bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
    }

    pub fn digest(&self) -> u64 {
        self.trainer.replica().state_digest().unwrap()
    }

    /// Of parameters, moments and statistics, but not of the counters.
    pub fn tensor_digest(&self) -> u64 {
        let replica = self.trainer.replica();
        replica.digest_of(0..replica.state_layout().counters.start).unwrap()
    }

    pub fn state(&self) -> Vec<u8> {
        let replica = self.trainer.replica();
        replica.read_state(0, replica.state_len() as usize).unwrap()
    }
}

/// The members of one generation, in rank order.
pub struct Team(pub Vec<Worker>);

impl Team {
    /// Joins workers by a ring; what they hold stays as it is.
    pub fn form(generation: u64, workers: Vec<Worker>) -> Self {
        let addresses: Vec<_> = workers.iter().map(|w| w.listener.local_addr().unwrap()).collect();
        let mut team = Self(workers);
        for worker in &mut team.0 {
            worker.member = None;
            worker.losses.clear();
        }
        team.each_ranked(|rank, worker| {
            let spec = RingSpec {
                generation,
                purpose: Purpose::Steps,
                rank,
                world: addresses.len() as u32,
                successor: addresses[(rank as usize + 1) % addresses.len()],
                secret: Secret([7; 32]),
                patience: PATIENCE,
            };
            let aborter = Aborter::new().unwrap();
            let form = |purpose| {
                let spec = RingSpec { purpose, ..spec.clone() };
                worker.listener.form(&spec, Instant::now() + PATIENCE, &aborter).unwrap()
            };
            let ring = Box::new(form(Purpose::Steps));
            let synchronises = worker.trainer.synchronises_batch_norm();
            let batch_norm = synchronises.then(|| {
                let mut ring: Box<dyn Collective> = Box::new(form(Purpose::BatchNorm));
                if let Some((at, fault)) = worker.batch_norm_goes_wrong.take() {
                    ring = Box::new(Faulty { inner: ring, at, fault });
                }
                SyncBatchNorm::new(Box::new(OnHost(ring)), worker.trainer.board.clone())
            });
            let device = worker.trainer.replica().device();
            let member = Membership::new(Generation(generation), ring, None, batch_norm, device);
            worker.member = Some(member.unwrap());
        });
        team
    }

    /// New workers, formed and synchronised: generation 1.
    pub fn seeded(pets: &Pets, job: &JobConfig, world: usize) -> Self {
        let mut team = Self::form(1, Worker::new_team(pets, job, world));
        team.sync(0, || Source::Seeded);
        team
    }

    /// As [`seeded`](Self::seeded), from the state of [`start`].
    pub fn started(pets: &Pets, job: &JobConfig, world: usize) -> Self {
        let workers = Worker::new_team(pets, job, world);
        let state = start::state(workers[0].trainer.replica().options());
        let mut team = Self::form(1, workers);
        team.sync(0, || checkpoint(&state));
        team
    }

    /// As [`seeded`](Self::seeded), from a checkpoint.
    pub fn resumed(pets: &Pets, job: &JobConfig, world: usize, state: &[u8]) -> Self {
        let mut team = Self::form(1, Worker::new_team(pets, job, world));
        team.sync(0, || checkpoint(state));
        team
    }

    /// As on a device that works while the host prepares the next step.
    pub fn look_late(mut self, late: bool) -> Self {
        for worker in &mut self.0 {
            worker.trainer.looks_late = late;
        }
        self
    }

    /// Runs `act` on each worker in a thread of its own.
    pub fn each<T: Send>(&mut self, act: impl Fn(&mut Worker) -> T + Sync) -> Vec<T> {
        self.each_ranked(|_, worker| act(worker))
    }

    fn each_ranked<T: Send>(&mut self, act: impl Fn(u32, &mut Worker) -> T + Sync) -> Vec<T> {
        let act = &act;
        let on_own_thread = |(rank, worker)| {
            move || {
                tch::set_num_threads(1);
                act(rank, worker)
            }
        };
        thread::scope(|scope| {
            let threads: Vec<_> =
                (0..).zip(&mut self.0).map(|ranked| scope.spawn(on_own_thread(ranked))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    pub fn try_sync(
        &mut self,
        donor: u32,
        source: impl Fn() -> Source + Sync,
    ) -> Vec<Result<Synced, TrainError>> {
        self.each_ranked(|rank, worker| {
            let source = if rank == donor { source() } else { Source::Held };
            worker.sync(donor, source)
        })
    }

    /// All take the donor's state, and say so alike.
    pub fn sync(&mut self, donor: u32, source: impl Fn() -> Source + Sync) -> Synced {
        let all = self.try_sync(donor, source);
        agreed(all.into_iter().map(Result::unwrap))
    }

    /// Trains one segment; all ranks end it alike, with the same losses and the same bits.
    pub fn train(&mut self, order: Train) -> SegmentEnd {
        let ends = self.each(|worker| worker.train(order, &StopFlag::default(), |_| ()).unwrap());
        let end = agreed(ends);
        assert_eq!(agreed(self.0.iter().map(Worker::digest)), end.state_digest);
        agreed(self.0.iter().map(|worker| bits(&worker.losses)));
        end
    }

    /// The losses of all steps of these epochs.
    pub fn train_epochs(&mut self, pets: &Pets, epochs: impl IntoIterator<Item = u32>) -> Vec<f64> {
        let before = self.0[0].losses.len();
        for epoch in epochs {
            self.train(pets.epoch(epoch));
        }
        self.0[0].losses[before..].to_vec()
    }

    /// The whole state in slices, one from each rank, as for a checkpoint.
    pub fn snapshots(&mut self) -> Vec<Snapshot> {
        let (words, world) = (self.0[0].trainer.replica().state_len() / 4, self.0.len() as u64);
        let cut = |rank: u64| words * rank / world * 4;
        self.each_ranked(|rank, worker| {
            let (start, end) = (cut(rank.into()), cut(u64::from(rank) + 1));
            worker.trainer.snapshot(start, end - start, None).unwrap()
        })
    }
}

/// Where all train: on the CPU, or on the device that `MUSHER_TEST_DEVICE` names, such as `cuda:0`.
pub fn device() -> Device {
    let name = env::var("MUSHER_TEST_DEVICE").unwrap_or_else(|_| "cpu".into());
    match name.strip_prefix("cuda:") {
        Some(index) => {
            torch_ext::open_cuda().unwrap();
            torch_ext::repeatable_kernels().unwrap();
            Device::Cuda(index.parse().unwrap())
        }
        None => Device::Cpu,
    }
}

/// Whether several ranks of this process can sum in the midst of backward, as batch norm over all of them does. On a GPU
/// they can't: libtorch computes all backward passes of one device on one thread, where the first rank to come would
/// wait for the others. In the product each rank is a process.
pub fn can_sum_in_backward() -> bool {
    let can = device() == Device::Cpu;
    if !can {
        println!("skipped: the ranks of one process share a GPU's backward thread");
    }
    can
}

/// The one value that all have.
pub fn agreed<T: PartialEq + Debug>(values: impl IntoIterator<Item = T>) -> T {
    let mut values = values.into_iter();
    let first = values.next().unwrap();
    for other in values {
        assert_eq!(other, first, "the ranks disagree");
    }
    first
}

pub fn bits(losses: &[f64]) -> Vec<u64> {
    losses.iter().map(|loss| loss.to_bits()).collect()
}

/// A checkpoint's bytes as a download brings them: in pieces that heed no boundary.
pub fn checkpoint(state: &[u8]) -> Source {
    const PIECE: usize = 123_457;
    let (sender, pieces) = sync_channel(state.len().div_ceil(PIECE));
    for piece in state.chunks(PIECE) {
        sender.send(Ok(piece.to_vec())).unwrap();
    }
    Source::Checkpoint(pieces)
}

/// Largest relative difference of two runs' losses.
pub fn deviation(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let deviations = found.iter().zip(expected).map(|(found, expected)| (found / expected - 1.0).abs());
    // NaN, unlike in `f64::max`, must not get lost.
    deviations.fold(0.0, |largest, next| if next <= largest { largest } else { next })
}
