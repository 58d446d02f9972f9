//! Faults that do not end a process: it is stopped, one of its threads is held, or it is slowed down.
//! Each lasts as long as its value lives, so that a failed test leaves nothing stopped behind.

use std::{
    fs,
    sync::mpsc::{self, Receiver, Sender},
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        ptrace,
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid as ThreadId,
};
use rustix::process::{Pid, Signal, kill_process};

/// A process under SIGSTOP, as when its machine hangs. Its connections stay open.
#[derive(Debug)]
pub struct Stopped(Pid);

impl Stopped {
    pub fn stop(process: Pid) -> Self {
        kill_process(process, Signal::STOP).expect("the process runs");
        Self(process)
    }

    pub fn wake(self) {}
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // An error means that it was killed meanwhile.
        let _ = kill_process(self.0, Signal::CONT);
    }
}

/// One thread of a process that stands still while the others go on, as when its device hangs.
///
/// Release it before the process is waited for: a traced thread keeps its process from ending.
#[derive(Debug)]
pub struct HeldThread {
    release: Option<Sender<()>>,
    tracer: Option<JoinHandle<()>>,
}

impl HeldThread {
    /// Holds the thread of that name.
    ///
    /// # Errors
    /// Why a thread can't be held here, mostly for want of permission.
    pub fn hold(process: Pid, name: &str) -> Result<Self, String> {
        let thread = thread_named(process, name).ok_or_else(|| format!("it has no thread {name}"))?;
        let (release, released) = mpsc::channel();
        let (held, is_held) = mpsc::channel();
        // All requests to a traced thread must come from one thread.
        let tracer = thread::spawn(move || trace(thread, &held, &released));
        let answer = is_held.recv().unwrap_or(Err(Errno::ECHILD));
        let guard = Self { release: Some(release), tracer: Some(tracer) };
        answer.map(|()| guard).map_err(|errno| format!("ptrace is not allowed here: {errno}"))
    }

    pub fn release(self) {}
}

impl Drop for HeldThread {
    fn drop(&mut self) {
        self.release = None;
        if let Some(tracer) = self.tracer.take() {
            let _ = tracer.join();
        }
    }
}

fn trace(thread: ThreadId, held: &Sender<Result<(), Errno>>, released: &Receiver<()>) {
    let stop = || {
        ptrace::seize(thread, ptrace::Options::empty())?;
        ptrace::interrupt(thread)?;
        waitpid(thread, Some(WaitPidFlag::__WALL)).map(drop)
    };
    let stopped = stop();
    let is_held = stopped.is_ok();
    let _ = held.send(stopped);
    if is_held {
        let _ = released.recv();
        // An error means that it was killed meanwhile: then it is waited for, so that its process can end.
        if ptrace::detach(thread, None).is_err() {
            let _ = waitpid(thread, Some(WaitPidFlag::__WALL));
        }
    }
}

fn thread_named(process: Pid, name: &str) -> Option<ThreadId> {
    let tasks = fs::read_dir(format!("/proc/{}/task", process.as_raw_nonzero())).ok()?;
    let is_it = |id: &i32| {
        let file = format!("/proc/{}/task/{id}/comm", process.as_raw_nonzero());
        fs::read_to_string(file).is_ok_and(|found| found.trim_end() == name)
    };
    tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok()).find(is_it).map(ThreadId::from_raw)
}

/// A process that runs only a tenth of the time, in slices of 20 ms: on a fast machine, too, a step takes several.
#[derive(Debug)]
pub struct Slowed {
    over: Option<Sender<()>>,
    metronome: Option<JoinHandle<()>>,
}

impl Slowed {
    const RUNS: Duration = Duration::from_millis(2);
    const STANDS: Duration = Duration::from_millis(18);

    pub fn slow(process: Pid) -> Self {
        let (over, is_over) = mpsc::channel::<()>();
        let ends_within = move |slice| is_over.recv_timeout(slice) != Err(mpsc::RecvTimeoutError::Timeout);
        let metronome = thread::spawn(move || {
            loop {
                let stopped = Stopped::stop(process);
                let ends = ends_within(Self::STANDS);
                drop(stopped);
                if ends || ends_within(Self::RUNS) {
                    return;
                }
            }
        });
        Self { over: Some(over), metronome: Some(metronome) }
    }
}

impl Drop for Slowed {
    fn drop(&mut self) {
        self.over = None;
        if let Some(metronome) = self.metronome.take() {
            let _ = metronome.join();
        }
    }
}
