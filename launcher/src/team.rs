//! The processes of one machine's workers.

use std::{
    ffi::OsString,
    path::PathBuf,
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context;
use tokio::{
    process::{Child, Command},
    sync::watch,
    task::JoinSet,
    time,
};
use tracing::{info, warn};

use crate::{RestartPolicy, Verdict, policy::is_futile};

/// Once one worker has finished with the run, the others too have heard of its end, but for one that was
/// just started again and finds nobody.
const RUN_IS_OVER: Duration = Duration::from_secs(10);

/// How one worker is started.
#[derive(Clone, Debug)]
pub struct WorkerCommand {
    pub program: PathBuf,
    pub args: Vec<OsString>,
    /// For the log.
    pub name: String,
}

/// How the workers of a machine ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ending {
    /// Workers that finished with their run.
    pub finished: usize,
    /// Workers that were stopped or drained.
    pub resumable: usize,
    /// What the last one that failed ended with.
    pub failure: Option<String>,
    /// One of them said that no other worker would do better.
    pub is_futile: bool,
}

/// Workers that run. Dropping it kills them.
#[derive(Debug)]
pub struct Team {
    workers: JoinSet<Option<ExitStatus>>,
    wish: watch::Sender<Wish>,
    ending: Ending,
}

/// In this order: a wish once made is not taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Wish {
    Run,
    /// No more restarts; those that run may end by themselves.
    Wind,
    /// SIGTERM, once, and no more restarts.
    Terminate,
    Kill,
}

impl Team {
    /// Starts them all.
    ///
    /// # Errors
    /// If the first start of one fails; the others are killed.
    pub fn start(commands: Vec<WorkerCommand>, policy: RestartPolicy) -> anyhow::Result<Self> {
        let (wish, wishes) = watch::channel(Wish::Run);
        let mut workers = JoinSet::new();
        for command in commands {
            let child = spawn(&command)?;
            workers.spawn(keep_running(command, child, policy, wishes.clone()));
        }
        Ok(Self { workers, wish, ending: Ending::default() })
    }

    /// A handle that ends the workers while somebody else waits for them.
    pub fn ender(&self) -> Ender {
        Ender(self.wish.clone())
    }

    /// Waits for all of them, restarts included. Once one has finished, the run is over: none is started
    /// again, and what is left is killed soon. May be dropped and called again.
    pub async fn ended(&mut self) -> Ending {
        while self.ending.finished == 0 && self.one_ended().await {}
        self.finish(RUN_IS_OVER).await
    }

    /// Lets them end by themselves within `grace`, then kills what is left.
    pub async fn finish(&mut self, grace: Duration) -> Ending {
        raise(&self.wish, Wish::Wind);
        // One that has not come as far as to hear that the run is over hears it so.
        if time::timeout(grace.min(PROMPT), self.all_ended()).await.is_err() {
            raise(&self.wish, Wish::Terminate);
        }
        if time::timeout(grace.saturating_sub(PROMPT), self.all_ended()).await.is_err() {
            warn!("killing workers that did not end with the run");
            raise(&self.wish, Wish::Kill);
            self.all_ended().await;
        }
        self.ending.clone()
    }

    async fn all_ended(&mut self) {
        while self.one_ended().await {}
    }

    /// False if none is left to wait for.
    async fn one_ended(&mut self) -> bool {
        let Some(ended) = self.workers.join_next().await else { return false };
        let Some(status) = ended.ok().flatten() else {
            self.ending.failure = Some("it could not be started or watched".into());
            return true;
        };
        match status.code() {
            Some(0) => self.ending.finished += 1,
            Some(75) => self.ending.resumable += 1,
            _ => self.ending.failure = Some(status.to_string()),
        }
        if is_futile(status) {
            self.ending.is_futile = true;
            raise(&self.wish, Wish::Wind);
        }
        true
    }
}

fn raise(wish: &watch::Sender<Wish>, to: Wish) {
    wish.send_if_modified(|wish| {
        let before = std::mem::replace(wish, to.max(*wish));
        before != *wish
    });
}

/// See [`Team::ender`].
#[derive(Clone, Debug)]
pub struct Ender(watch::Sender<Wish>);

impl Ender {
    /// Asks each worker to leave its team (SIGTERM); none is started again.
    pub fn terminate(&self) {
        raise(&self.0, Wish::Terminate);
    }

    /// Ends them at once.
    pub fn kill(&self) {
        raise(&self.0, Wish::Kill);
    }
}

/// A worker that has heard the run's end is gone within it.
const PROMPT: Duration = Duration::from_secs(2);

/// One worker through all its lives; returns how the last one ended.
async fn keep_running(
    command: WorkerCommand,
    child: Child,
    policy: RestartPolicy,
    mut wishes: watch::Receiver<Wish>,
) -> Option<ExitStatus> {
    let (mut child, mut born, mut in_a_row) = (Some(child), Instant::now(), 0);
    let mut status = ExitStatus::default();
    loop {
        // Without a child the system could not start one just now, which counts as a life.
        if let Some(mut child) = child.take() {
            status = until_it_ends(&mut child, &mut wishes).await?;
        }
        if *wishes.borrow() != Wish::Run {
            return Some(status);
        }
        let verdict;
        (verdict, in_a_row) = policy.judge(status, born.elapsed(), in_a_row);
        let wait = match verdict {
            Verdict::Ended => return Some(status),
            Verdict::GiveUp => {
                warn!(worker = command.name, %status, restarts = in_a_row, "a worker keeps dying: it is given up");
                return Some(status);
            }
            Verdict::RestartAfter(wait) => wait,
        };
        warn!(
            worker = command.name, %status, in_ms = wait.as_millis() as u64, attempt = in_a_row, of = policy.limit,
            "a worker died: it is started again"
        );
        tokio::select! {
            () = time::sleep(wait) => {}
            _ = wishes.wait_for(|&wish| wish != Wish::Run) => return Some(status),
        }
        born = Instant::now();
        match spawn(&command) {
            Ok(started) => {
                info!(worker = command.name, "a worker was started again");
                child = Some(started);
            }
            Err(error) => {
                let error = format!("{error:#}");
                warn!(worker = command.name, error, "a worker could not be started again");
            }
        }
    }
}

async fn until_it_ends(child: &mut Child, wishes: &mut watch::Receiver<Wish>) -> Option<ExitStatus> {
    loop {
        tokio::select! {
            status = child.wait() => return status.ok(),
            changed = wishes.changed() => {
                let wish = *wishes.borrow_and_update();
                match wish {
                    Wish::Run | Wish::Wind if changed.is_ok() => {}
                    Wish::Terminate if changed.is_ok() => terminate(child),
                    _ => {
                        let _ = child.start_kill();
                        return child.wait().await.ok();
                    }
                }
            }
        }
    }
}

fn terminate(child: &Child) {
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid {
        // It may have ended by itself just now.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
}

fn spawn(command: &WorkerCommand) -> anyhow::Result<Child> {
    Command::new(&command.program)
        .args(&command.args)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        // A Ctrl-C reaches the launcher alone, which then ends the workers in order.
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot start {}", command.program.display()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn shell(script: String) -> WorkerCommand {
        WorkerCommand { program: "/bin/sh".into(), args: vec!["-c".into(), script.into()], name: "w".into() }
    }

    fn policy() -> RestartPolicy {
        RestartPolicy { first_backoff: Duration::from_millis(1), ..RestartPolicy::default() }
    }

    /// Dies by SIGKILL at its first two starts, then exits with 0.
    #[tokio::test]
    async fn a_worker_that_dies_is_started_again() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("starts");
        let script = format!("echo x >> {0}; [ $(wc -l < {0}) -lt 3 ] && kill -9 $$; exit 0", log.display());
        let ending = Team::start(vec![shell(script)], policy()).unwrap().ended().await;
        assert_eq!(ending, Ending { finished: 1, ..Ending::default() });
        assert_eq!(std::fs::read_to_string(log).unwrap().lines().count(), 3);
    }

    #[tokio::test]
    async fn a_worker_that_keeps_dying_is_given_up() {
        let ending = Team::start(vec![shell("exit 1".into())], policy()).unwrap().ended().await;
        assert!(ending.failure.is_some_and(|failure| failure.contains('1')));
    }

    #[tokio::test]
    async fn stopped_workers_stay_stopped() {
        let commands = vec![shell("exit 75".into()), shell("exit 0".into())];
        let ending = Team::start(commands, policy()).unwrap().ended().await;
        assert_eq!(ending, Ending { finished: 1, resumable: 1, ..Ending::default() });
    }

    /// What the others hang on to is over; the one that keeps dying is not started again for it.
    #[tokio::test]
    async fn once_one_has_finished_or_finds_it_futile_none_is_started_again() {
        let dir = tempfile::tempdir().unwrap();
        for code in [0, 3] {
            let died = dir.path().join(code.to_string());
            let dies = format!("touch {0}; kill -9 $$", died.display());
            let ends = format!("while [ ! -e {0} ]; do sleep 0.01; done; exit {code}", died.display());
            let policy = RestartPolicy { first_backoff: Duration::from_secs(600), ..policy() };
            let ending = Team::start(vec![shell(dies), shell(ends)], policy).unwrap().ended().await;
            assert_eq!((ending.finished, ending.failure.is_some()), (usize::from(code == 0), true));
        }
    }

    #[tokio::test]
    async fn terminate_reaches_the_process_and_restarts_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let ready = dir.path().join("ready");
        let script = format!("trap 'exit 75' TERM; touch {}; while :; do sleep 0.01; done", ready.display());
        let mut team = Team::start(vec![shell(script)], policy()).unwrap();
        while !ready.exists() {
            time::sleep(Duration::from_millis(1)).await;
        }
        team.ender().terminate();
        assert_eq!(team.ended().await, Ending { resumable: 1, ..Ending::default() });
    }

    #[tokio::test]
    async fn what_does_not_end_is_killed() {
        let mut team =
            Team::start(vec![shell("trap '' TERM; while :; do sleep 0.01; done".into())], policy()).unwrap();
        let ending = team.finish(Duration::from_millis(50)).await;
        assert!(ending.failure.is_some_and(|failure| failure.contains("signal: 9")));
    }
}
