//! The worker processes that `musher launch` starts and watches.

use std::{env, ffi::OsString, path::PathBuf, time::Duration};

use anyhow::anyhow;
use musher_launcher::{RestartPolicy, Team, WorkerCommand};
use tokio::sync::oneshot;

use super::Format;
use crate::{core::Event, service::Handle};

const PROGRAM: &str = "musher-worker";
/// Workers that have heard of the run's end exit by themselves; this is for those that have not.
const GRACE: Duration = Duration::from_secs(10);

/// `musher-worker` beside this program, or on the PATH.
pub(super) fn find_program() -> anyhow::Result<PathBuf> {
    let beside = env::current_exe()?.with_file_name(PROGRAM);
    let on_path = env::var_os("PATH")
        .into_iter()
        .flat_map(|path| env::split_paths(&path).map(|dir| dir.join(PROGRAM)).collect::<Vec<_>>());
    std::iter::once(beside.clone()).chain(on_path).find(|program| program.is_file()).ok_or_else(|| {
        anyhow!("{PROGRAM} is neither at {} nor on the PATH: install it beside musher", beside.display())
    })
}

/// Which workers to start.
pub(super) struct Plan {
    pub program: PathBuf,
    /// Its URL.
    pub coordinator: String,
    /// Flags that say what the workers show.
    pub credentials: Vec<OsString>,
    pub count: u32,
    /// What each is told to train on.
    pub device: &'static str,
    /// Of each worker.
    pub threads: usize,
    pub log_format: Option<Format>,
    /// Restarts in a row before a worker is given up.
    pub max_restarts: u32,
}

/// The workers of a launched run. They are started again when they die, until the run is over.
pub(super) struct LocalWorkers {
    team: Team,
    over: oneshot::Receiver<()>,
    gone: oneshot::Sender<()>,
}

/// Held by whoever runs the coordinator: sees the workers off at the run's end.
pub(super) struct Farewell {
    over: oneshot::Sender<()>,
    gone: oneshot::Receiver<()>,
}

impl LocalWorkers {
    pub fn start(plan: &Plan) -> anyhow::Result<(Self, Farewell)> {
        let commands = (0..plan.count).map(|index| plan.command(index)).collect();
        let policy = RestartPolicy { limit: plan.max_restarts, ..RestartPolicy::default() };
        let team = Team::start(commands, policy)?;
        let (over, is_over) = oneshot::channel();
        let (gone, are_gone) = oneshot::channel();
        Ok((Self { team, over: is_over, gone }, Farewell { over, gone: are_gone }))
    }

    /// Tells the coordinator when no worker is left and none will come.
    pub async fn watch(self, handle: Handle) {
        let Self { mut team, mut over, gone } = self;
        tokio::select! {
            ending = team.ended() => {
                handle
                    .tell(match ending.failure {
                        Some(failure) => Event::TeamLost {
                            reason: format!("no worker is left, the last ended with {failure}; its log says why"),
                        },
                        // All were drained: nobody is left to train, and nothing is wrong.
                        None => Event::StopRequested,
                    })
                    .await;
                let _ = (&mut over).await;
            }
            _ = &mut over => {
                team.finish(GRACE).await;
            }
        }
        let _ = gone.send(());
    }
}

impl Farewell {
    /// Waits until the workers have ended, or are killed.
    pub async fn finish(self) {
        let _ = self.over.send(());
        let _ = self.gone.await;
    }
}

impl Plan {
    fn command(&self, index: u32) -> WorkerCommand {
        let mut args = vec![
            "join".to_owned(),
            self.coordinator.clone(),
            "--local-rank".to_owned(),
            index.to_string(),
            "--threads".to_owned(),
            self.threads.to_string(),
            "--device".to_owned(),
            self.device.to_owned(),
            // A coordinator that is killed takes them with it.
            "--parent".to_owned(),
            std::process::id().to_string(),
        ];
        if let Some(format) = self.log_format {
            let name = match format {
                Format::Json => "json",
                Format::Pretty => "pretty",
            };
            args.extend(["--log-format".to_owned(), name.to_owned()]);
        }
        let args = args.into_iter().map(Into::into).chain(self.credentials.iter().cloned()).collect();
        WorkerCommand { program: self.program.clone(), args, name: index.to_string() }
    }
}
