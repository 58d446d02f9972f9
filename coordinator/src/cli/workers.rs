//! The worker processes that `musher launch` starts and watches.

use std::{
    env,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context, anyhow};
use tokio::{
    process::{Child, Command},
    sync::{mpsc, watch},
    task::JoinSet,
    time,
};
use tracing::warn;

use super::Format;
use crate::{core::Event, service::Handle};

const PROGRAM: &str = "musher-worker";
/// A worker's exit code when the run was stopped.
const RESUMABLE: i32 = 75;
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

pub(super) struct LocalWorkers {
    children: JoinSet<(usize, ExitStatus)>,
    kill: watch::Sender<bool>,
    gone: mpsc::Sender<()>,
    all_gone: mpsc::Receiver<()>,
}

impl LocalWorkers {
    pub fn start(
        program: &Path,
        coordinator: SocketAddr,
        count: u32,
        format: Option<Format>,
    ) -> anyhow::Result<Self> {
        let (kill, killed) = watch::channel(false);
        let (gone, all_gone) = mpsc::channel(1);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (cores / count.max(1) as usize).max(1);
        let mut children = JoinSet::new();
        for index in 0..count as usize {
            let mut command = Command::new(program);
            command
                .arg("join")
                .arg(format!("http://{coordinator}"))
                .args(["--local-rank", &index.to_string(), "--threads", &threads.to_string()])
                .stdin(Stdio::null())
                .kill_on_drop(true);
            if let Some(format) = format {
                command.args([
                    "--log-format",
                    match format {
                        Format::Json => "json",
                        Format::Pretty => "pretty",
                    },
                ]);
            }
            // A Ctrl-C reaches this process alone, which then ends the run in order.
            command.process_group(0);
            let child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
            children.spawn(supervise(index, child, killed.clone()));
        }
        Ok(Self { children, kill, gone, all_gone })
    }

    pub fn stopper(&self) -> Stopper {
        Stopper { kill: self.kill.clone(), gone: self.gone.clone() }
    }

    /// Tells the coordinator when no worker is left.
    pub async fn watch(mut self, handle: Handle) {
        let mut last = None;
        while let Some(ended) = self.children.join_next().await {
            let Ok((index, status)) = ended else { continue };
            if !matches!(status.code(), Some(0 | RESUMABLE)) {
                warn!(worker = index, %status, "a worker process ended");
                last = Some(format!("the last of the workers ended with {status}; its log says why"));
            }
        }
        self.all_gone.close();
        handle.tell(Event::TeamLost { reason: last.unwrap_or_else(|| "all workers ended".into()) }).await;
    }
}

/// Sees the workers off at the run's end.
pub(super) struct Stopper {
    kill: watch::Sender<bool>,
    gone: mpsc::Sender<()>,
}

impl Stopper {
    pub async fn finish(self) {
        if time::timeout(GRACE, self.gone.closed()).await.is_err() {
            warn!("killing workers that did not end with the run");
            let _ = self.kill.send(true);
            let _ = time::timeout(GRACE, self.gone.closed()).await;
        }
    }
}

async fn supervise(index: usize, mut child: Child, mut killed: watch::Receiver<bool>) -> (usize, ExitStatus) {
    let asked = tokio::select! {
        status = child.wait() => return (index, status.unwrap_or_default()),
        asked = killed.changed() => asked,
    };
    if asked.is_ok() {
        let _ = child.start_kill();
    }
    (index, child.wait().await.unwrap_or_default())
}
