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

use crate::{RestartPolicy, Verdict};

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
}

/// Workers that run. Dropping it kills them.
#[derive(Debug)]
pub struct Team {
    workers: JoinSet<Option<ExitStatus>>,
    wish: watch::Sender<Wish>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
        Ok(Self { workers, wish })
    }

    /// A handle that ends the workers while somebody else waits for them.
    pub fn ender(&self) -> Ender {
        Ender(self.wish.clone())
    }

    /// Waits for all of them, restarts included.
    pub async fn ended(&mut self) -> Ending {
        let mut ending = Ending::default();
        while let Some(ended) = self.workers.join_next().await {
            match ended.ok().flatten() {
                None => ending.failure = Some("it could not be started or watched".into()),
                Some(status) => match status.code() {
                    Some(0) => ending.finished += 1,
                    Some(75) => ending.resumable += 1,
                    _ => ending.failure = Some(status.to_string()),
                },
            }
        }
        ending
    }

    /// Lets them end by themselves within `grace`, then kills what is left.
    pub async fn finish(mut self, grace: Duration) -> Ending {
        let _ = self.wish.send(Wish::Wind);
        if let Ok(ending) = time::timeout(grace, self.ended()).await {
            return ending;
        }
        warn!("killing workers that did not end with the run");
        let _ = self.wish.send(Wish::Kill);
        self.ended().await
    }
}

/// See [`Team::ender`].
#[derive(Clone, Debug)]
pub struct Ender(watch::Sender<Wish>);

impl Ender {
    /// Asks each worker to leave its team (SIGTERM); none is started again.
    pub fn terminate(&self) {
        let _ = self.0.send(Wish::Terminate);
    }

    /// Ends them at once.
    pub fn kill(&self) {
        let _ = self.0.send(Wish::Kill);
    }
}

/// One worker through all its lives; returns how the last one ended.
async fn keep_running(
    command: WorkerCommand,
    mut child: Child,
    policy: RestartPolicy,
    mut wishes: watch::Receiver<Wish>,
) -> Option<ExitStatus> {
    let mut in_a_row = 0;
    loop {
        let born = Instant::now();
        let status = until_it_ends(&mut child, &mut wishes).await?;
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
        child = match spawn(&command) {
            Ok(child) => child,
            Err(error) => {
                warn!(
                    worker = command.name,
                    error = format!("{error:#}"),
                    "a worker could not be started again"
                );
                return Some(status);
            }
        };
        info!(worker = command.name, "a worker was started again");
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
        assert_eq!(ending, Ending { finished: 1, resumable: 1, failure: None });
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
        let team =
            Team::start(vec![shell("trap '' TERM; while :; do sleep 0.01; done".into())], policy()).unwrap();
        let ending = team.finish(Duration::from_millis(50)).await;
        assert!(ending.failure.is_some_and(|failure| failure.contains("signal: 9")));
    }
}
