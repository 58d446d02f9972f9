//! `musher kube`: a job as manifests for a cluster, and what becomes of it there.

#[cfg(feature = "kube")]
mod remote;
mod render;

use clap::Subcommand;

use super::{Exit, Failure};

#[derive(Debug, Subcommand)]
pub enum Kube {
    /// Write a job's manifests, for `kubectl apply -f -`
    Render(render::Render),
    /// Make a job's objects in a cluster, or go on with its run
    #[cfg(feature = "kube")]
    Apply(remote::Apply),
    /// Give a run more nodes or fewer; nothing restarts
    #[cfg(feature = "kube")]
    Scale(remote::Scale),
    /// Show a run's jobs and pods, and what the run says of itself
    #[cfg(feature = "kube")]
    Status(remote::Status),
    /// Show what a run's pods wrote
    #[cfg(feature = "kube")]
    Logs(remote::Logs),
    /// End a run, which saves first, and take its objects away
    #[cfg(feature = "kube")]
    Delete(remote::Delete),
}

impl Kube {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        match self {
            Kube::Render(render) => render.run(),
            #[cfg(feature = "kube")]
            Kube::Apply(apply) => apply.run(),
            #[cfg(feature = "kube")]
            Kube::Scale(scale) => scale.run(),
            #[cfg(feature = "kube")]
            Kube::Status(status) => status.run(),
            #[cfg(feature = "kube")]
            Kube::Logs(logs) => logs.run(),
            #[cfg(feature = "kube")]
            Kube::Delete(delete) => delete.run(),
        }
    }
}
