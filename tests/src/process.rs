//! A real process: its output is kept, its end is awaited with a deadline, and it does not outlive the test.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal};
use serde_json::Value;

/// For anything a test waits for. Long, as a busy machine is no bug; a test that passes never waits so long.
pub const PATIENCE: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(5);

/// A started program.
#[derive(Debug)]
pub struct Process {
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

/// How a process ended.
#[derive(Debug)]
pub struct End {
    /// `None`: by a signal.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Process {
    /// Starts `command`; its output goes to `output.stdout` and `output.stderr`.
    pub fn start(mut command: Command, output: PathBuf) -> Self {
        let (stdout, stderr) = (output.with_extension("stdout"), output.with_extension("stderr"));
        let create = |path| File::create(path).expect("the scene's directory is writable");
        let child = command
            .stdin(Stdio::null())
            .stdout(create(&stdout))
            .stderr(create(&stderr))
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?} could not be started: {error}"));
        Self { child, stdout, stderr }
    }

    pub fn id(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.id(), signal).expect("the process was not waited for yet");
    }

    /// Waits for the process to end.
    #[track_caller]
    pub fn wait(mut self) -> End {
        let (stdout, stderr) = (self.stdout.clone(), self.stderr.clone());
        until(|| self.poll(), || format!("the process did not end\n{}", said(&stdout, &stderr)))
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("the process is this one's child").is_some()
    }

    fn poll(&mut self) -> Option<End> {
        let status = self.child.try_wait().expect("the process is this one's child")?;
        Some(End { code: status.code(), stdout: read(&self.stdout), stderr: read(&self.stderr) })
    }

    /// All its output so far, for a failed test's message.
    pub fn said(&self) -> String {
        said(&self.stdout, &self.stderr)
    }

    /// The processes that this one started and that still run.
    pub fn children(&self) -> Vec<Pid> {
        let processes = fs::read_dir("/proc").expect("Linux has /proc");
        let parent = self.child.id();
        processes
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|&id: &i32| parent_of(id) == Some(parent))
            .filter_map(Pid::from_raw)
            .collect()
    }

    /// The process of the worker of that `--local-rank` which this one started.
    #[track_caller]
    pub fn worker(&self, local_rank: u32) -> Pid {
        let is_it = |id: &Pid| {
            let command = fs::read(format!("/proc/{}/cmdline", id.as_raw_nonzero())).unwrap_or_default();
            let mut words = command.split(|&byte| byte == 0);
            words.any(|word| word == b"--local-rank")
                && words.next() == Some(local_rank.to_string().as_bytes())
        };
        let found = self.children().into_iter().find(is_it);
        found.unwrap_or_else(|| panic!("worker {local_rank} does not run\n{}", self.said()))
    }

    /// SIGKILL for it and for all that it started, as when the machine goes down.
    pub fn kill_with_children(&mut self) {
        let children = self.children();
        // An error means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        for child in children {
            let _ = rustix::process::kill_process(child, Signal::KILL);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            self.kill_with_children();
        }
    }
}

impl End {
    /// The contract's last line on stdout.
    #[track_caller]
    pub fn last_line(&self) -> Value {
        let line = self.stdout.lines().last().unwrap_or_else(|| panic!("stdout is empty\n{}", self.stderr));
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{line} is not JSON: {error}"))
    }

    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "stdout:\n{}stderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// The sentence that it ended with.
    pub fn last_words(&self) -> &str {
        self.stderr.lines().last().unwrap_or_default()
    }
}

/// Asks again and again, up to [`PATIENCE`].
#[track_caller]
pub fn until<T>(mut ask: impl FnMut() -> Option<T>, what_is_wrong: impl FnOnce() -> String) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        if Instant::now() >= deadline {
            panic!("after {PATIENCE:?}: {}", what_is_wrong());
        }
        thread::sleep(POLL);
    }
}

fn said(stdout: &Path, stderr: &Path) -> String {
    format!("stdout:\n{}stderr:\n{}", read(stdout), read(stderr))
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// From `/proc/ID/stat`: the second field after the name, which ends with the last parenthesis. A
/// zombie has no parent here: it runs no more.
fn parent_of(id: i32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    fields.next()?.parse().ok().filter(|_| state != "Z")
}
