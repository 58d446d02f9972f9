//! A real run that is disturbed every few seconds for as long as one likes, and then must end well.
//!
//! The sequence of faults depends on the seed alone; what it meets does not, as the run is real. Rules
//! are checked over the events of all lives ([`History`]). Steps may be taken again in two cases only, as
//! the protocol says: one, when its only holder was lost with it; those since the newest sound checkpoint,
//! when all holders were.

mod cast;
mod plan;
mod recovery;
mod summary;

use std::{
    fmt,
    path::PathBuf,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use rustix::process::Signal;

pub use plan::{Fault, Kind, Plan, Strike};
pub use summary::Summary;

use crate::{DataSet, History, Job, Scene, checkpoints, history::Blow, run::Follower};
use cast::Cast;
use recovery::{DAY, Struck};

const TICK: Duration = Duration::from_millis(10);
/// So long after the last fault, steps must advance.
const PATIENCE: Duration = Duration::from_secs(90);
const GLOBAL_BATCH: u64 = 8;

#[derive(Clone, Debug)]
pub struct Options {
    pub seed: u64,
    /// Of the disturbance; the run's end comes after it.
    pub length: Duration,
    pub workers: usize,
    /// In the Oxford-IIIT Pet layout; `None`: a few of the pets, or drawn ones.
    pub data: Option<PathBuf>,
    /// Says on stderr what is done.
    pub verbose: bool,
}

/// Runs it to its end. What went wrong is in the summary.
pub fn run(options: &Options) -> Summary {
    let scene = Scene::new();
    let data = match &options.data {
        Some(root) => DataSet::open(root.clone()),
        None => scene.data_of(160, 24),
    };
    let job = Job::tiny(&data)
        .endless()
        .hasty()
        .on_one_port()
        .set("cluster.workers", options.workers)
        .set("cluster.min_workers", 2.min(options.workers))
        .set("checkpoint.every_steps", 6);
    let mut chaos = Chaos::new(options, scene, job);
    let end = chaos.disturb(options).and_then(|()| chaos.settle());
    chaos.judge(options, &data, end)
}

struct Chaos {
    cast: Cast,
    events: Follower,
    started: Instant,
    verbose: bool,
    /// When the dead coordinator starts again.
    resumes: Option<Instant>,
    blows: Vec<(usize, Blow)>,
    strikes: Vec<Struck>,
    /// When the restraint of a strike is over.
    restraints: Vec<(usize, Instant)>,
    added: usize,
}

impl Chaos {
    fn new(options: &Options, scene: Scene, job: Job) -> Self {
        let cast = Cast::start(scene, job, options.workers);
        let events = Follower::new(cast.dir());
        Self {
            cast,
            events,
            started: Instant::now(),
            verbose: options.verbose,
            resumes: None,
            blows: Vec::new(),
            strikes: Vec::new(),
            restraints: Vec::new(),
            added: 0,
        }
    }

    /// # Errors
    /// Why it can't go on.
    fn disturb(&mut self, options: &Options) -> Result<(), String> {
        self.until_it_trains("the start")?;
        let over = Instant::now() + options.length;
        for strike in Plan::new(options.seed, options.workers) {
            if !strike.at_once {
                self.until_recovered()?;
            }
            let due = Instant::now() + strike.pause;
            while Instant::now() < due {
                self.tick()?;
            }
            if Instant::now() >= over {
                break;
            }
            self.strike(strike.fault);
        }
        self.until_recovered()
    }

    fn strike(&mut self, fault: Fault) {
        let now = Instant::now();
        let told = self.events.read().len();
        let met = self.inflict(fault, now);
        self.say(format_args!("{fault}{}", if met { "" } else { " (it met nobody)" }));
        if !met {
            return;
        }
        if let Fault::StopWorker { length, .. }
        | Fault::HoldTrainingThread { length, .. }
        | Fault::StopCoordinator { length } = fault
        {
            self.restraints.push((self.strikes.len(), now + length));
        }
        self.strikes.push(Struck { kind: fault.kind(), told, at: time_of_day(), over: None });
    }

    /// False: whom it was meant for is not there.
    fn inflict(&mut self, fault: Fault, now: Instant) -> bool {
        match fault {
            Fault::KillWorker { worker, back_after } => {
                let met = self.cast.end_worker(worker, Signal::KILL, back_after);
                let name = self.cast.name(worker).to_owned();
                self.strike_out(met.then_some(name));
                met
            }
            Fault::DrainWorker { worker, back_after } => {
                self.cast.end_worker(worker, Signal::TERM, back_after)
            }
            Fault::StopWorker { worker, length } => self.cast.stop_worker(worker, now + length),
            Fault::HoldTrainingThread { worker, length } => {
                self.cast.hold_training_thread(worker, now + length)
            }
            Fault::AddWorker { stays } => {
                self.added += 1;
                self.cast.add_worker(format!("added-{}", self.added), now, now + stays)
            }
            Fault::KillCoordinator { back_after } => {
                self.resumes.get_or_insert(now + back_after);
                self.cast.kill_coordinator()
            }
            Fault::StopCoordinator { length } => self.cast.stop_coordinator(now + length),
            Fault::LoseEverything { back_after } => {
                self.cast.kill_all(back_after);
                self.strike_out(self.cast.names());
                self.damage_the_newest_checkpoint();
                self.resumes = Some(now + back_after);
                true
            }
        }
    }

    fn strike_out(&mut self, killed: impl IntoIterator<Item = String>) {
        let told = self.events.read().len();
        self.blows.extend(killed.into_iter().map(|worker| (told, Blow::WorkerKilled(worker))));
    }

    fn damage_the_newest_checkpoint(&mut self) {
        if let Some(id) = checkpoints::damage_the_newest(&self.cast.dir().join("checkpoints")) {
            self.blows.push((self.events.read().len(), Blow::CheckpointDamaged(id)));
        }
    }

    fn tick(&mut self) -> Result<(), String> {
        let now = Instant::now();
        self.cast.supervise(now)?;
        if self.resumes.is_some_and(|resumes| now >= resumes) {
            self.resumes = None;
            self.cast.resume();
        }
        let told = self.events.read().len();
        for (strike, _) in self.restraints.extract_if(.., |(_, until)| now >= *until) {
            self.strikes[strike].over = Some(told);
        }
        thread::sleep(TICK);
        Ok(())
    }

    fn until_recovered(&mut self) -> Result<(), String> {
        let since = Instant::now();
        loop {
            self.tick()?;
            let events = self.events.read();
            let open = self.strikes.iter().rev().find(|struck| struck.recovered_after(events).is_none());
            let Some(open) = open else { return Ok(()) };
            if since.elapsed() > PATIENCE {
                return Err(format!("{}: no step within {PATIENCE:?}", open.kind));
            }
        }
    }

    fn until_it_trains(&mut self, after: &str) -> Result<(), String> {
        self.until(after, |chaos| chaos.events.read().iter().any(|event| event.name() == "progress"))
    }

    fn until(&mut self, what: &str, holds: impl Fn(&mut Self) -> bool) -> Result<(), String> {
        let since = Instant::now();
        while !holds(self) {
            self.tick()?;
            if since.elapsed() > PATIENCE {
                return Err(format!("{what}: not within {PATIENCE:?}"));
            }
        }
        Ok(())
    }

    /// Lets the run come to an end, all being well again.
    fn settle(&mut self) -> Result<(), String> {
        self.until("all workers back", |chaos| chaos.resumes.is_none() && chaos.cast.is_whole())?;
        let told = self.events.read().len();
        self.until("another epoch", |chaos| {
            chaos.events.read()[told..].iter().any(|event| event.name() == "validated")
        })?;
        self.say(format_args!("the run is stopped, and resumed to its end"));
        let begun = self.events.read().iter().filter(|event| event.name() == "epoch_started");
        let last = begun.map(|event| event.number("epoch")).max().unwrap_or_default() + 1;
        self.cast.finish(last)?;
        match self.events.read().last() {
            Some(event) if event.name() == "run_finished" && event.text("status") == "finished" => Ok(()),
            other => Err(format!("the last event is {other:?}")),
        }
    }

    fn judge(mut self, options: &Options, data: &DataSet, end: Result<(), String>) -> Summary {
        let history = History {
            events: self.events.read().to_vec(),
            samples: data.train.len() as u64,
            val_samples: data.val.len() as u64,
            global_batch: GLOBAL_BATCH,
            blows: self.blows,
        };
        let mut violations = history.violations();
        violations.extend(end.err());
        let kept = (!violations.is_empty()).then(|| self.cast.keep());
        let unasked_ends = self.cast.unasked_ends;
        Summary::new(options, &history, &self.strikes, unasked_ends, violations, kept)
    }

    fn say(&self, what: fmt::Arguments<'_>) {
        if self.verbose {
            eprintln!("{:7.1} s  {what}", self.started.elapsed().as_secs_f64());
        }
    }
}

fn time_of_day() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64() % DAY)
}
