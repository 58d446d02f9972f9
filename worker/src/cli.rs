//! The command line of `musher-worker`.

mod doctor;
mod eval;
mod predict;
mod pretrain;

use std::{
    io::IsTerminal,
    net::{IpAddr, SocketAddr},
    process::ExitCode,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::{
    Args, CommandFactory, Parser, Subcommand, ValueEnum, builder::RangedU64ValueParser, error::ErrorKind,
};
use musher_launcher::RestartPolicy;
use musher_proto::{causes::causes, convert::is_name, ids::WorkerId};
use musher_security::{Credentials, CredentialsArgs};
use musher_session::{Exit, Identity};
use rustix::process::Pid;
use tokio::task;
use tracing_subscriber::EnvFilter;

use crate::{
    connection::{self, Keepalive},
    device::Choice,
    liveness::Liveness,
    node::{Node, WorkersPerNode},
    probes, shell,
};

/// Trains a replica as a member of a Musher team.
#[derive(Debug, Parser)]
#[command(name = "musher-worker", version, max_term_width = 100)]
pub struct Command {
    #[command(subcommand)]
    command: Subcommands,
}

#[derive(Debug, Subcommand)]
enum Subcommands {
    /// Join a run and train until it ends
    Join(Join),
    /// Write the class of each pixel of images, and a picture of it
    Predict(predict::Predict),
    /// Say how good a network is on a data set
    Eval(eval::Eval),
    /// Train an encoder on a task without masks, to start a run from
    Pretrain(pretrain::Pretrain),
    /// Look whether libtorch, CUDA and NCCL are here and fit
    Doctor(doctor::Doctor),
}

/// Why a command could not do its work.
enum Failure {
    /// The user can mend it: exit code 2.
    Usage(anyhow::Error),
    Other(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure::Other(error.into())
    }
}

fn usage(error: impl Into<anyhow::Error>) -> Failure {
    Failure::Usage(error.into())
}

#[derive(Debug, Args)]
struct Join {
    /// The coordinator, for example http://10.0.0.1:7400
    url: String,
    /// Start so many workers on this machine, and start them again when they die; auto: one per GPU, or
    /// one where there is none
    #[arg(long, value_name = "N|auto")]
    workers_per_node: Option<WorkersPerNode>,
    /// Restarts in a row before a worker that keeps dying is given up
    #[arg(long, value_name = "N", requires = "workers_per_node", default_value_t = RestartPolicy::default().limit)]
    max_restarts: u32,
    /// Where the data set is on this machine, if not where the job says
    #[arg(long, value_name = "DIR|URL")]
    data_root: Option<String>,
    /// Address at which the other workers reach this one [default: the one that reaches the coordinator]
    #[arg(long, value_name = "IP[:PORT]", value_parser = advertised)]
    advertise: Option<SocketAddr>,
    /// What to train on: auto, cpu, cuda or cuda:K; auto and cuda take the GPU of the worker's local rank, auto the
    /// CPU where there is none
    #[arg(long, value_name = "DEVICE", default_value_t = Choice::Auto)]
    device: Choice,
    /// Which of this machine's workers this is, from 0
    #[arg(long, value_name = "K", conflicts_with = "workers_per_node", default_value_t = 0)]
    local_rank: u32,
    /// Name of this worker, unique in the team; NAME.K where a node has several
    /// [default: HOSTNAME.LOCAL_RANK]
    #[arg(long, value_parser = worker_name)]
    name: Option<String>,
    /// Threads that each worker computes with [default: the cores, shared out among the node's workers]
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    threads: Option<usize>,
    /// Seconds to wait for a coordinator that is not up yet
    #[arg(long, value_name = "S", default_value_t = 60)]
    connect_timeout_s: u64,
    /// Answer an orchestrator's probes there, at /livez: whether the training gets on, of each of a node's workers
    #[arg(long, value_name = "IP:PORT")]
    probes: Option<SocketAddr>,
    /// Tell the node's command, which asks at this name, whether the training gets on
    #[arg(long, value_name = "NAME", hide = true, conflicts_with = "probes")]
    pulse: Option<String>,
    /// End when this process, the one that started it, is gone
    #[arg(long, value_name = "PID")]
    parent: Option<i32>,
    #[command(flatten)]
    credentials: CredentialsArgs,
    /// Form of the log on stderr [default: pretty on a terminal, json elsewhere]
    #[arg(long, value_enum)]
    log_format: Option<LogFormat>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Json,
    Pretty,
}

impl Command {
    pub fn run(self) -> ExitCode {
        match self.command {
            Subcommands::Join(join) => join.run_to_exit(),
            Subcommands::Predict(predict) => exit_code(predict.run()),
            Subcommands::Eval(eval) => exit_code(eval.run()),
            Subcommands::Pretrain(pretrain) => exit_code(pretrain.run()),
            Subcommands::Doctor(doctor) => doctor.run(),
        }
    }
}

fn exit_code(result: Result<(), Failure>) -> ExitCode {
    let (code, error) = match result {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Usage(error)) => (2, error),
        Err(Failure::Other(error)) => (1, error),
    };
    eprintln!("musher-worker: {}", causes(error.as_ref()));
    ExitCode::from(code)
}

impl Join {
    fn run_to_exit(self) -> ! {
        let is_launched = self.parent.is_some();
        // A node's scheduler, as a launcher, is told whether another start would help.
        let tells_futility = is_launched || self.workers_per_node.is_some();
        let exit = match self.run() {
            Ok(exit) => exit,
            Err(Failure::Other(error)) => Exit::Broken { reason: causes(error.as_ref()) },
            // Another start would read the same.
            Err(Failure::Usage(error)) if is_launched => Exit::Unfit { reason: causes(error.as_ref()) },
            Err(usage) => {
                exit_code(Err(usage));
                torch_ext::exit_at_once(2)
            }
        };
        if let Exit::Failed { reason } | Exit::Unfit { reason } | Exit::Broken { reason } = &exit {
            eprintln!("musher-worker: {reason}");
        }
        // The training thread may be in the midst of something.
        torch_ext::exit_at_once(match exit {
            Exit::Finished => 0,
            Exit::Resumable => 75,
            Exit::Failed { .. } if tells_futility => musher_launcher::FUTILE,
            Exit::Unfit { .. } if is_launched => musher_launcher::UNFIT,
            Exit::Failed { .. } | Exit::Unfit { .. } | Exit::Broken { .. } => 1,
        })
    }

    fn run(mut self) -> Result<Exit, Failure> {
        let credentials = self.credentials.clone().read("MUSHER_JOIN_TOKEN").map_err(usage)?;
        self.url = credentials.url(&self.url);
        connection::check(&self.url, &credentials).map_err(usage)?;
        match self.workers_per_node {
            Some(workers) => {
                init_log(self.log_format, "info");
                let count = workers.count(self.device);
                Ok(self.run_node(count, credentials)?)
            }
            None => {
                // The run's events are the coordinator's to tell; a worker says what went wrong with itself, and to
                // whoever started it by hand that it is in.
                let level = if self.parent.is_some() { "warn" } else { "warn,musher_worker::shell=info" };
                init_log(self.log_format, level);
                Ok(self.run_worker(credentials)?)
            }
        }
    }

    fn run_node(self, count: u32, credentials: Credentials) -> anyhow::Result<Exit> {
        if let Some(address) = self.advertise
            && address.port() != 0
            && count > 1
        {
            let what = format!(
                "--advertise {address}: {count} workers can't share a port; give the address without one\n"
            );
            Command::command().error(ErrorKind::ArgumentConflict, what).exit();
        }
        if let Choice::Cuda(Some(index)) = self.device
            && count > 1
        {
            let what = format!("--device cuda:{index}: {count} workers can't share a GPU; give cuda\n");
            Command::command().error(ErrorKind::ArgumentConflict, what).exit();
        }
        let mut flags = self.credentials.to_flags();
        let mut flag = |name: &str, value: String| flags.extend([name.into(), value.into()]);
        flag("--device", self.device.to_string());
        if let Some(root) = self.data_root {
            flag("--data-root", root);
        }
        if let Some(address) = self.advertise {
            flag("--advertise", address.to_string());
        }
        if let Some(format) = self.log_format.and_then(|format| format.to_possible_value()) {
            flag("--log-format", format.get_name().to_owned());
        }
        let node = Node {
            url: self.url,
            credentials,
            count,
            name: self.name,
            threads: self.threads,
            connect_timeout: Duration::from_secs(self.connect_timeout_s),
            max_restarts: self.max_restarts,
            flags,
            probes: self.probes,
        };
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(node.run())
    }

    fn run_worker(self, credentials: Credentials) -> anyhow::Result<Exit> {
        let device = match self.device.find(self.local_rank) {
            Ok(found) => found,
            // Another start would find the same.
            Err(reason) => return Ok(Exit::Unfit { reason: format!("--device {}: {reason}", self.device) }),
        };
        let url = self.url;
        let host = gethostname::gethostname().to_string_lossy().into_owned();
        let worker = self.name.clone().unwrap_or_else(|| format!("{host}.{}", self.local_rank));
        let identity = Identity {
            worker: WorkerId(worker),
            incarnation: SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros() as u64,
            host,
            device: device.name.clone(),
        };
        let threads = compute_threads(self.threads);
        // Few threads: it only carries messages, and the cores belong to training.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let liveness = Arc::new(Liveness::default());
        let exit = runtime.block_on(async {
            // From the first moment: one that looks for its coordinator is alive.
            if let Some(address) = self.probes {
                let (listener, liveness) = (probes::bind(address).await?, liveness.clone());
                task::spawn(probes::serve(listener, move || std::future::ready(liveness.verdict())));
            }
            if let Some(name) = &self.pulse {
                task::spawn(probes::tell(probes::bind_name(name)?, liveness.clone()));
            }
            let connect_timeout = Duration::from_secs(self.connect_timeout_s);
            let channel =
                connection::connect(&url, &credentials, connect_timeout, Keepalive::default()).await?;
            let ring_address = match self.advertise {
                Some(address) => address,
                None => (connection::local_address_towards(&url)?, 0).into(),
            };
            let options = shell::Options {
                identity,
                url,
                channel,
                credentials,
                connect_timeout,
                parent: self.parent.and_then(Pid::from_raw),
                ring_address,
                device,
                data_root: self.data_root,
                threads,
                liveness,
            };
            shell::run(options).await
        });
        runtime.shutdown_background();
        exit
    }
}

/// The device of a command that runs alone.
fn find(choice: Choice) -> Result<tch::Device, Failure> {
    let found = choice.find(0).map_err(|why| usage(anyhow::anyhow!("--device {choice}: {why}")))?;
    Ok(found.device())
}

/// As many as wanted, or as there are cores.
fn compute_threads(wanted: Option<usize>) -> usize {
    wanted.unwrap_or_else(cores).min(openmp_limit()).max(1)
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Threads that OpenMP gives for sure. oneDNN's kernels wait for as many as they asked for: with fewer
/// they wait for ever.
fn openmp_limit() -> usize {
    let set = |name| std::env::var(name).unwrap_or_default().trim().to_ascii_lowercase();
    match set("OMP_DYNAMIC").as_str() {
        "" | "false" | "0" => set("OMP_THREAD_LIMIT").parse().unwrap_or(usize::MAX),
        _ => 1,
    }
}

/// Without a port, any.
fn worker_name(text: &str) -> Result<String, &'static str> {
    // A node's workers add their number.
    let fits = text.len() <= 240 && is_name(text);
    fits.then(|| text.to_owned()).ok_or("a name has 1 to 240 bytes, and no control characters")
}

fn advertised(text: &str) -> Result<SocketAddr, &'static str> {
    let address = text.parse::<SocketAddr>().or_else(|_| text.parse::<IpAddr>().map(|ip| (ip, 0).into()));
    address.map_err(|_| "it is not an address such as 10.0.0.7 or 10.0.0.7:7500")
}

fn init_log(format: Option<LogFormat>, level: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let terminal = std::io::stderr().is_terminal();
    match format {
        Some(LogFormat::Json) => builder.json().flatten_event(true).init(),
        None if !terminal => builder.json().flatten_event(true).init(),
        _ => builder.with_ansi(terminal && std::env::var_os("NO_COLOR").is_none()).init(),
    }
}
