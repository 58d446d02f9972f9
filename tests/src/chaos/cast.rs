//! The processes of a disturbed run: a coordinator and named workers, each in one of its lives, and what
//! a supervisor does for them: it starts again whatever has ended.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::{
    Job, Process, Run, Scene,
    faults::{HeldThread, Stopped},
    network::Host,
};

/// What a supervisor waits before it starts a worker again that ended by itself.
const BACKOFF: Duration = Duration::from_millis(300);
const NAME: &str = "chaos";

/// See the module's documentation.
#[derive(Debug)]
pub struct Cast {
    /// Goes last, as its directory is the others'.
    workers: Vec<Worker>,
    coordinator: Option<Coordinator>,
    job: Job,
    url: String,
    /// Ends of workers that nobody asked for, with their last words.
    pub unasked_ends: Vec<String>,
    scene: Scene,
}

#[derive(Debug)]
struct Coordinator {
    /// Before the process, which it would wake.
    stopped: Option<(Stopped, Instant)>,
    run: Run,
}

#[derive(Debug)]
struct Worker {
    name: String,
    /// Before the process, which it would keep from ending.
    restraint: Option<(Restraint, Instant)>,
    process: Option<Process>,
    /// When its next process starts; `None` while it has one.
    starts: Option<Instant>,
    /// Between a process that is to end and the next; `None`: it ends by itself, or not at all.
    back_after: Option<Duration>,
    /// When a worker that was added is to leave for good.
    leaves: Option<Instant>,
}

#[derive(Debug)]
enum Restraint {
    Stopped { _stopped: Stopped },
    Held { _held: HeldThread },
}

impl Cast {
    pub fn start(scene: Scene, job: Job, workers: usize) -> Self {
        let run = scene.serve(&job, NAME, &[]);
        let url = run.address();
        let now = Instant::now();
        let workers = (0..workers).map(|index| Worker::new(format!("worker-{index}"), now)).collect();
        let coordinator = Some(Coordinator { stopped: None, run });
        Self { workers, coordinator, job, url, unasked_ends: Vec::new(), scene }
    }

    /// Starts what is due, and ends restraints that are over. Called often.
    ///
    /// # Errors
    /// The coordinator's last words, if it has ended by itself.
    pub fn supervise(&mut self, now: Instant) -> Result<(), String> {
        if let Some(coordinator) = &mut self.coordinator {
            coordinator.stopped.take_if(|(_, until)| now >= *until);
            if coordinator.run.has_ended() {
                return Err(format!("the coordinator ended\n{}", coordinator.run.said()));
            }
        }
        for worker in &mut self.workers {
            worker.restraint.take_if(|(_, until)| now >= *until);
            if worker.leaves.is_some_and(|leaves| now >= leaves) {
                worker.leaves = None;
                worker.signal(Signal::TERM, Duration::MAX);
            }
            if worker.has_ended() {
                self.unasked_ends.extend(worker.bury(now));
            }
            if worker.starts.is_some_and(|starts| now >= starts) {
                worker.starts = None;
                worker.process = Some(self.scene.join_on(&Host::default(), &self.url, &worker.name, &[]));
            }
        }
        self.workers.retain(|worker| worker.process.is_some() || worker.starts.is_some());
        Ok(())
    }

    /// Whether nobody is restrained, away or about to leave.
    pub fn is_whole(&self) -> bool {
        let coordinator = self.coordinator.as_ref().is_some_and(|coordinator| coordinator.stopped.is_none());
        let well = |worker: &Worker| worker.process.is_some() && worker.restraint.is_none();
        coordinator && self.workers.iter().all(|w| well(w) && w.leaves.is_none() && w.back_after.is_none())
    }

    pub fn name(&self, worker: usize) -> &str {
        &self.workers[worker].name
    }

    pub fn names(&self) -> Vec<String> {
        self.workers.iter().map(|worker| worker.name.clone()).collect()
    }

    /// SIGKILL or SIGTERM. False: it has no process now.
    pub fn end_worker(&mut self, worker: usize, signal: Signal, back_after: Duration) -> bool {
        self.workers[worker].signal(signal, back_after)
    }

    pub fn stop_worker(&mut self, worker: usize, until: Instant) -> bool {
        self.restrain(worker, until, |process| {
            Ok(Restraint::Stopped { _stopped: Stopped::stop(process.id()) })
        })
    }

    pub fn hold_training_thread(&mut self, worker: usize, until: Instant) -> bool {
        self.restrain(worker, until, |process| {
            HeldThread::hold(process.id(), "train").map(|held| Restraint::Held { _held: held })
        })
    }

    fn restrain(
        &mut self,
        worker: usize,
        until: Instant,
        how: impl FnOnce(&Process) -> Result<Restraint, String>,
    ) -> bool {
        let worker = &mut self.workers[worker];
        let (None, Some(process)) = (&worker.restraint, &mut worker.process) else { return false };
        if process.has_ended() {
            return false;
        }
        worker.restraint = how(process).ok().map(|restraint| (restraint, until));
        worker.restraint.is_some()
    }

    pub fn add_worker(&mut self, name: String, now: Instant, leaves: Instant) -> bool {
        self.workers.push(Worker { leaves: Some(leaves), ..Worker::new(name, now) });
        true
    }

    pub fn stop_coordinator(&mut self, until: Instant) -> bool {
        let Some(coordinator) = self.coordinator.as_mut().filter(|it| it.stopped.is_none()) else {
            return false;
        };
        coordinator.stopped = Some((Stopped::stop(coordinator.run.id()), until));
        true
    }

    pub fn kill_coordinator(&mut self) -> bool {
        let Some(Coordinator { stopped, run }) = self.coordinator.take() else { return false };
        run.kill();
        drop(stopped);
        true
    }

    pub fn resume(&mut self) {
        let run = self.scene.serve(&self.job, NAME, &["--resume"]);
        self.coordinator = Some(Coordinator { stopped: None, run });
    }

    pub fn kill_all(&mut self, back_after: Duration) {
        self.kill_coordinator();
        for worker in &mut self.workers {
            worker.signal(Signal::KILL, back_after);
        }
    }

    /// Stops the run by its command, then resumes it to finish after `epochs`.
    ///
    /// # Errors
    /// Who did not end as it should.
    pub fn finish(&mut self, epochs: u64) -> Result<(), String> {
        self.scene.run(&["stop", &self.url]);
        self.end(75).map_err(|why| format!("the stop: {why}"))?;
        self.job = self.job.clone().set("train.epochs", epochs);
        self.resume();
        let now = Instant::now();
        for worker in &mut self.workers {
            worker.starts = Some(now);
        }
        self.supervise(now)?;
        self.end(0).map_err(|why| format!("the last life: {why}"))
    }

    /// Waits for all to end with that code.
    fn end(&mut self, code: i32) -> Result<(), String> {
        let coordinator = self.coordinator.take().ok_or("there is no coordinator")?;
        let mut ends = vec![("the coordinator", coordinator.run.wait().end)];
        let workers = self.workers.iter_mut();
        ends.extend(workers.filter_map(|worker| Some((worker.name.as_str(), worker.process.take()?.wait()))));
        match ends.iter().find(|(_, end)| end.code != Some(code)) {
            None => Ok(()),
            Some((name, end)) => Err(format!("{name} ended with {:?}, not {code}\n{}", end.code, end.stderr)),
        }
    }

    /// Leaves the run's directory behind. Returns where it is.
    pub fn keep(&mut self) -> PathBuf {
        self.scene.keep();
        self.dir()
    }

    pub fn dir(&self) -> PathBuf {
        self.scene.path("runs").join(NAME)
    }
}

impl Worker {
    fn new(name: String, starts: Instant) -> Self {
        Self { name, restraint: None, process: None, starts: Some(starts), back_after: None, leaves: None }
    }

    /// `back_after` is the time until its next process starts, once this one has ended.
    fn signal(&mut self, signal: Signal, back_after: Duration) -> bool {
        if self.has_ended() {
            return false;
        }
        let Some(process) = &self.process else { return false };
        self.restraint = None;
        self.back_after = Some(back_after);
        process.signal(signal);
        true
    }

    fn has_ended(&mut self) -> bool {
        // A traced thread keeps its process from being waited for: then it has not ended yet.
        self.process.as_mut().is_some_and(Process::has_ended)
    }

    /// Arranges for what follows on the end of its process. Returns what it said, if it ended by itself.
    fn bury(&mut self, now: Instant) -> Option<String> {
        self.restraint = None;
        let end = self.process.take()?.wait();
        let asked = self.back_after.take();
        self.starts = now.checked_add(asked.unwrap_or(BACKOFF)).filter(|_| asked != Some(Duration::MAX));
        asked.is_none().then(|| format!("{}: {:?}: {}", self.name, end.code, end.last_words()))
    }
}
