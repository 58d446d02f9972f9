//! The workers of one machine under one command: how many they are, what each is started with, and how the
//! command ends. Starting them again is the launcher's business, training each worker's own.

use std::{
    env,
    ffi::OsString,
    net::SocketAddr,
    num::NonZeroU32,
    path::Path,
    str::FromStr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context;
use musher_launcher::{Ending, RestartPolicy, Team, WorkerCommand, visible_gpus};
use musher_security::Credentials;
use musher_session::Exit;
use tokio::{
    signal::unix::{SignalKind, signal},
    task,
};
use tracing::info;

use crate::{
    connection::{self, Keepalive},
    device::Choice,
    probes,
};

/// How many workers a machine gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkersPerNode {
    /// One per visible GPU, or one where there is none or none is wanted.
    Auto,
    Count(NonZeroU32),
}

impl FromStr for WorkersPerNode {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            number => number.parse().map(Self::Count).map_err(|_| "give a number from 1, or auto"),
        }
    }
}

impl WorkersPerNode {
    /// On workers of this device.
    pub fn count(self, device: Choice) -> u32 {
        match (self, device) {
            (Self::Count(count), _) => count.get(),
            (Self::Auto, Choice::Cpu | Choice::Cuda(Some(_))) => 1,
            (Self::Auto, Choice::Auto | Choice::Cuda(None)) => match visible_gpus() {
                0 => {
                    info!("no GPU is visible: one worker, on the CPU");
                    1
                }
                gpus => gpus,
            },
        }
    }
}

/// The workers to start.
pub struct Node {
    pub url: String,
    pub credentials: Credentials,
    pub count: u32,
    /// Of all workers, or of the only one.
    pub name: Option<String>,
    /// Of each worker; `None`: the cores, shared out.
    pub threads: Option<usize>,
    pub connect_timeout: Duration,
    /// Restarts in a row before a worker is given up.
    pub max_restarts: u32,
    /// What each `join` gets besides.
    pub flags: Vec<OsString>,
    /// Where probes are answered.
    pub probes: Option<SocketAddr>,
}

impl Node {
    /// Runs the workers until the run, or each worker's part in it, is over.
    pub async fn run(self) -> anyhow::Result<Exit> {
        let pulses = Pulses::of_this_node();
        if let Some(address) = self.probes {
            let (listener, names) = (probes::bind(address).await?, pulses.all(self.count));
            task::spawn(probes::serve(listener, move || ask_all(names.clone())));
        }
        // Else each of them would find out, and be started again for it.
        connection::connect(&self.url, &self.credentials, self.connect_timeout, Keepalive::default()).await?;
        let default = RestartPolicy::default();
        let policy = RestartPolicy {
            limit: self.max_restarts,
            // One that looks for its coordinator is not well yet.
            settled: default.settled + self.connect_timeout,
            ..default
        };
        let program = env::current_exe().context("cannot find this program, to start the workers with it")?;
        let threads = self.threads.unwrap_or_else(|| musher_launcher::shared_cores(self.count));
        info!(workers = self.count, threads, "starting this machine's workers");
        let commands = (0..self.count).map(|rank| self.command(&program, rank, threads, &pulses)).collect();
        see_through(Team::start(commands, policy)?).await
    }

    fn command(&self, program: &Path, rank: u32, threads: usize, pulses: &Pulses) -> WorkerCommand {
        let mut args: Vec<OsString> = vec!["join".into(), self.url.clone().into()];
        let mut flag = |name: &str, value: String| args.extend([name.into(), value.into()]);
        flag("--local-rank", rank.to_string());
        flag("--threads", threads.to_string());
        flag("--connect-timeout-s", self.connect_timeout.as_secs().to_string());
        flag("--parent", std::process::id().to_string());
        if self.probes.is_some() {
            flag("--pulse", pulses.name(rank));
        }
        match &self.name {
            Some(name) if self.count > 1 => flag("--name", format!("{name}.{rank}")),
            Some(name) => flag("--name", name.clone()),
            None => {}
        }
        args.extend(self.flags.iter().cloned());
        WorkerCommand { program: program.to_owned(), args, name: rank.to_string() }
    }
}

/// The names at which a node's workers are asked how they are. They are of this node alone, also where several share
/// a network and none sees the others' process ids.
struct Pulses {
    prefix: String,
}

impl Pulses {
    fn of_this_node() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { prefix: format!("musher-{}-{}", std::process::id(), now.as_nanos()) }
    }

    fn name(&self, rank: u32) -> String {
        format!("{}-{rank}", self.prefix)
    }

    fn all(&self, count: u32) -> Vec<String> {
        (0..count).map(|rank| self.name(rank)).collect()
    }
}

/// A node is as alive as its workers. One that is dead, or waits to be started again, is this command's business and
/// no probe's.
async fn ask_all(names: Vec<String>) -> Result<(), String> {
    for (rank, name) in names.iter().enumerate() {
        probes::ask(name).await.map_err(|why| format!("worker {rank}: {why}"))?;
    }
    Ok(())
}

/// The first SIGTERM or SIGINT drains the workers; a second ends them and this process at once.
async fn see_through(mut team: Team) -> anyhow::Result<Exit> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut stopped = false;
    loop {
        let code = tokio::select! {
            ending = team.ended() => return Ok(exit(ending, stopped)),
            _ = terminate.recv() => 143,
            _ = interrupt.recv() => 130,
        };
        if std::mem::replace(&mut stopped, true) {
            team.ender().kill();
            team.ended().await;
            std::process::exit(code);
        }
        info!("the workers leave their team between two steps; a second signal ends them at once");
        team.ender().terminate();
    }
}

/// A worker that was told to stop before it had begun just dies, and one that was given up did not keep
/// the others from finishing.
fn exit(ending: Ending, stopped: bool) -> Exit {
    match ending {
        Ending { finished: 1.., .. } => Exit::Finished,
        Ending { resumable: 1.., .. } => Exit::Resumable,
        _ if stopped => Exit::Resumable,
        Ending { failure, is_futile, .. } => {
            let how = failure.unwrap_or_else(|| "nothing to do".into());
            let reason = format!("no worker is left, the last ended with {how}; its log says why");
            if is_futile { Exit::Failed { reason } } else { Exit::Broken { reason } }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_count_is_a_number_from_one_or_auto() {
        assert_eq!("auto".parse(), Ok(WorkersPerNode::Auto));
        assert_eq!("3".parse(), Ok(WorkersPerNode::Count(NonZeroU32::new(3).unwrap())));
        let auto = WorkersPerNode::Auto;
        assert_eq!((auto.count(Choice::Cpu), auto.count(Choice::Cuda(Some(1)))), (1, 1));
        assert_eq!(WorkersPerNode::Count(NonZeroU32::new(3).unwrap()).count(Choice::Cpu), 3);
        assert!(["0", "-1", "many"].iter().all(|text| text.parse::<WorkersPerNode>().is_err()));
    }

    #[test]
    fn the_run_s_end_goes_before_what_became_of_single_workers() {
        let ended = |finished, resumable, failed: bool| Ending {
            finished,
            resumable,
            failure: failed.then(|| "signal: 9 (SIGKILL)".into()),
            is_futile: false,
        };
        assert_eq!(exit(ended(1, 1, true), true), Exit::Finished);
        assert_eq!(exit(ended(0, 1, true), false), Exit::Resumable);
        assert_eq!(exit(ended(0, 0, true), true), Exit::Resumable);
        assert!(
            matches!(exit(ended(0, 0, true), false), Exit::Broken { reason } if reason.contains("SIGKILL"))
        );
        let futile = Ending { is_futile: true, ..ended(0, 0, true) };
        assert!(matches!(exit(futile, false), Exit::Failed { .. }));
    }
}
