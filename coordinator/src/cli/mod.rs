//! The command line: one command a file, one sentence for what goes wrong.

mod access;
mod certs;
mod checkpoints;
mod compare;
mod data;
mod doctor;
mod files;
mod kube;
mod launch;
mod logs;
mod remote;
mod run;
mod serve;
mod shell;
mod workers;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::anyhow;
use clap::{Args, Parser, Subcommand, ValueEnum};
use musher_proto::causes::causes;

use crate::telemetry::LogFormat;

/// Trains one network on many devices, and goes on when some of them go away.
#[derive(Debug, Parser)]
#[command(name = "musher", version, max_term_width = 100)]
pub struct Command {
    #[command(subcommand)]
    command: Subcommands,
}

#[derive(Debug, Subcommand)]
enum Subcommands {
    /// Run a job on this machine: a coordinator and its workers
    Launch(launch::Launch),
    /// Run a job's coordinator alone; workers come with `musher-worker join`
    Serve(serve::Serve),
    /// Show what a run is doing
    Status(remote::Status),
    /// Show what happened in a run
    Logs(logs::Logs),
    /// End a run after a checkpoint, so that it can be resumed
    Stop(remote::Stop),
    /// Let one worker go between two steps; no step is lost
    Drain(remote::Drain),
    /// List, verify, prune or export a run's checkpoints
    #[command(subcommand)]
    Checkpoints(checkpoints::Checkpoints),
    /// Draw the curves of runs beside each other, and print their figures
    Compare(compare::Compare),
    /// Runs in Kubernetes: their manifests, and what becomes of them there
    #[command(subcommand)]
    Kube(kube::Kube),
    /// Look whether this machine is fit for a run, and say what to do where it is not
    Doctor(doctor::Doctor),
    /// Make certificates to try mutual TLS with
    Certs(certs::Certs),
    /// Print completions for a shell
    Completions(shell::Completions),
    /// Write manual pages
    #[command(hide = true)]
    Man(shell::Man),
    /// Check, fetch, pack or draw a data set
    #[command(subcommand)]
    Data(data::Data),
}

/// What `launch` and `serve` have in common.
#[derive(Debug, Args)]
struct JobArgs {
    /// The job file
    job: PathBuf,
    /// Override a key of the job file, for example train.epochs=3
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,
    /// Continue the run from its newest complete checkpoint
    #[arg(long)]
    resume: bool,
    /// Continue the run if there is one, else start it
    #[arg(long, conflicts_with = "resume")]
    resume_or_start: bool,
    /// Where the run keeps its events, checkpoints and results [default: runs/<name>]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Print the result as one last line of JSON on stdout
    #[arg(long)]
    json: bool,
    /// Form of the log on stderr [default: pretty on a terminal, json elsewhere]
    #[arg(long, value_enum)]
    log_format: Option<Format>,
    /// Listen to other machines also where nothing keeps strangers out
    #[arg(long)]
    insecure: bool,
    /// Print the resolved job and exit
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    Json,
    Pretty,
}

impl From<Format> for LogFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Json => LogFormat::Json,
            Format::Pretty => LogFormat::Pretty,
        }
    }
}

/// How a command ended, as the exit codes of the contract.
#[derive(Debug)]
enum Exit {
    Finished,
    Failed,
    /// Bad usage or configuration.
    Usage,
    /// Stopped, or not even begun; can be resumed, or tried again.
    Resumable,
}

/// Why a command could not do its work.
#[derive(Debug)]
enum Failure {
    /// The user can mend it: exit code 2.
    Usage(anyhow::Error),
    /// Nobody need mend it, another try later may do: exit code 75.
    Later(anyhow::Error),
    Other(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure::Other(error.into())
    }
}

/// What is to be a directory of this machine. A URL would make one of an odd name, and look as if it were elsewhere.
fn local(what: &str, dir: &Path, instead: &str) -> Result<(), Failure> {
    match dir.to_string_lossy().contains("://") {
        true => Err(usage(anyhow!("{what} {} is a URL, and must be a directory: {instead}", dir.display()))),
        false => Ok(()),
    }
}

fn usage(error: impl Into<anyhow::Error>) -> Failure {
    Failure::Usage(error.into())
}

impl Command {
    pub fn run(self) -> ExitCode {
        let result = match self.command {
            Subcommands::Launch(launch) => launch.run(),
            Subcommands::Serve(serve) => serve.run(),
            Subcommands::Status(status) => status.run(),
            Subcommands::Stop(stop) => stop.run(),
            Subcommands::Drain(drain) => drain.run(),
            Subcommands::Checkpoints(checkpoints) => checkpoints.run(),
            Subcommands::Compare(compare) => compare.run(),
            Subcommands::Logs(logs) => logs.run(),
            Subcommands::Completions(completions) => completions.run(),
            Subcommands::Man(man) => man.run(),
            Subcommands::Kube(kube) => kube.run(),
            Subcommands::Doctor(doctor) => doctor.run(),
            Subcommands::Certs(certs) => certs.run(),
            Subcommands::Data(data) => data.run(),
        };
        let exit = result.unwrap_or_else(|failure| {
            let (exit, error) = match failure {
                Failure::Usage(error) => (Exit::Usage, error),
                Failure::Later(error) => (Exit::Resumable, error),
                Failure::Other(error) => (Exit::Failed, error),
            };
            eprintln!("musher: {}", causes(error.as_ref()));
            exit
        });
        ExitCode::from(match exit {
            Exit::Finished => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::Resumable => 75,
        })
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}
