//! One test's place: a directory of its own, and a turn on the machine's cores.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Condvar, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use tempfile::TempDir;

use serde_json::Value;

use crate::{DataSet, End, Job, Process, Run, binaries, network::Host};

/// See the module's documentation. Commands run in its directory.
#[derive(Debug)]
pub struct Scene {
    dir: TempDir,
    environment: Vec<(String, String)>,
    started: AtomicU32,
    _turn: Turn,
}

impl Scene {
    /// Waits for a turn.
    pub fn new() -> Self {
        let turn = Turn::take();
        let dir = tempfile::tempdir().expect("the system has a temporary directory");
        Self { dir, environment: Vec::new(), started: AtomicU32::new(0), _turn: turn }
    }

    /// All its processes find these variables too.
    pub fn with_environment(self, environment: Vec<(String, String)>) -> Self {
        Self { environment, ..self }
    }

    /// Leaves its directory behind, to be looked into.
    pub fn keep(&mut self) {
        self.dir.disable_cleanup(true);
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// 40 training and 12 validation samples: 5 steps an epoch at [`Job::tiny`]'s batch.
    pub fn data(&self) -> DataSet {
        self.data_of(40, 12)
    }

    pub fn data_of(&self, train: usize, val: usize) -> DataSet {
        DataSet::link(self.path("data"), train, val)
    }

    /// `musher ARGS`, not started.
    pub fn musher(&self, args: &[&str]) -> Command {
        self.command(&binaries::musher(), args)
    }

    /// Runs `musher ARGS` to its end.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> End {
        self.start(self.musher(args)).wait()
    }

    /// Runs `musher-worker ARGS` to its end.
    #[track_caller]
    pub fn run_worker(&self, args: &[&str]) -> End {
        self.start(self.command(&binaries::musher_worker(), args)).wait()
    }

    pub fn start(&self, command: Command) -> Process {
        let nth = self.started.fetch_add(1, Ordering::Relaxed);
        Process::start(command, self.path(&format!("process-{nth}")))
    }

    /// What `musher status --json` says of the run.
    #[track_caller]
    pub fn status(&self, run: &Run) -> Value {
        self.run(&["status", &run.address(), "--json"]).expect_code(0).last_line()
    }

    /// `musher launch` of `job` with its run directory at `runs/NAME`. One thread a worker: busy cores
    /// slow down those most that wait for each other.
    pub fn launch(&self, job: &Job, name: &str, workers: u32, args: &[&str]) -> Run {
        let workers = workers.to_string();
        let args = [&["launch", "--workers", &workers, "--threads", "1"], args].concat();
        self.begin(&Host::default(), job, name, &args)
    }

    /// `musher serve` of `job`.
    pub fn serve(&self, job: &Job, name: &str, args: &[&str]) -> Run {
        self.serve_on(&Host::default(), job, name, args)
    }

    pub fn serve_on(&self, host: &Host, job: &Job, name: &str, args: &[&str]) -> Run {
        self.begin(host, job, name, &[&["serve"], args].concat())
    }

    /// A worker by hand, with one thread.
    pub fn join(&self, run: &Run, name: &str, args: &[&str]) -> Process {
        self.join_on(&Host::default(), &run.address(), name, args)
    }

    /// One that may fail to get in, at this URL.
    pub fn join_at(&self, url: &str, name: &str, args: &[&str]) -> Process {
        self.join_on(&Host::default(), url, name, args)
    }

    pub fn join_on(&self, host: &Host, url: &str, name: &str, args: &[&str]) -> Process {
        let fixed = ["join", url, "--name", name, "--threads", "1", "--log-format", "json"];
        let command = self.command(&binaries::musher_worker(), &[&fixed, args].concat());
        self.start(host.command(command))
    }

    fn begin(&self, host: &Host, job: &Job, name: &str, args: &[&str]) -> Run {
        let file = self.path(&format!("{name}.toml"));
        job.write(&file);
        let dir = self.path("runs").join(name);
        let mut command = self.musher(&[args, &["--json", "--log-format", "json"]].concat());
        command.arg(&file).arg("--run-dir").arg(&dir);
        let past = fs::metadata(dir.join("events.jsonl")).map_or(0, |file| file.len());
        Run::follow(self.start(host.command(command)), dir, past as usize)
    }

    fn command(&self, program: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(args).current_dir(self.dir.path()).env_remove("RUST_LOG").envs(self.environment.clone());
        command
    }
}

impl Default for Scene {
    fn default() -> Self {
        Self::new()
    }
}

/// Each run keeps two cores busy: more at once would only make all of them slow.
#[derive(Debug)]
struct Turn;

static TAKEN: Mutex<usize> = Mutex::new(0);
static GIVEN_BACK: Condvar = Condvar::new();

impl Turn {
    fn take() -> Self {
        let at_once = thread::available_parallelism().map_or(1, usize::from).div_ceil(2).max(2);
        let taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken =
            GIVEN_BACK.wait_while(taken, |taken| *taken >= at_once).unwrap_or_else(PoisonError::into_inner);
        *taken += 1;
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *TAKEN.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        GIVEN_BACK.notify_one();
    }
}
