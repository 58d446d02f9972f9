//! `musher doctor`: whether this machine is fit for a run, and what to do where it is not. What it looks at, it leaves
//! as it was.

use std::{
    fs::{self, File},
    io::{self, Write},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytesize::ByteSize;
use clap::Args;
use musher_launcher::findings::{Finding, as_text, has_failure};
use musher_proto::{
    causes::causes,
    job::{self, JobConfig},
    size::NetworkSize,
};
use musher_security::CredentialsArgs;
use rustix::process::{Resource, getrlimit};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::{Exit, Failure, remote, run, runtime, usage, workers};

/// Written to see how fast a disk is, and removed.
const TRIAL_BYTES: usize = 64 << 20;
/// Slower than this, and checkpoints of a large network hold a run up.
const SLOW_BYTES_PER_S: f64 = 50e6;
/// Files that a coordinator of a large team has open: two a worker, and its own.
const FILES: u64 = 4096;
const FEWEST_FILES: u64 = 256;
/// Shared memory that NCCL wants for each GPU of a machine.
const SHM_BYTES_PER_GPU: u64 = 256 << 20;
/// Certificates and tokens of others stand this much.
const SKEW: Duration = Duration::from_secs(30);
/// 2026-01-01: this program is younger.
const PAST: Duration = Duration::from_secs(1_767_225_600);

#[derive(Debug, Args)]
pub struct Doctor {
    /// The job file: its data set, ports and directories are looked at, too
    job: Option<PathBuf>,
    /// Override a key of the job file, for example data.root=pets
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE", requires = "job")]
    overrides: Vec<String>,
    /// Where the run would keep its results [default: runs/<name>]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// A coordinator, for example http://10.0.0.1:7400: whether it can be reached, and its clock agrees
    #[arg(long, value_name = "URL")]
    coordinator: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    credentials: CredentialsArgs,
}

impl Doctor {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let job = match &self.job {
            Some(file) => {
                let text = run::read_job(file)?;
                Some(job::load(&text, &file.display().to_string(), &self.overrides).map_err(usage)?)
            }
            None => None,
        };
        let mut findings = worker_part();
        findings.extend([files(), shared_memory(), quota(), clock(SystemTime::now())]);
        if let Some(job) = &job {
            findings.push(data(job));
            findings.extend(ports(job));
        }
        let run_dir = self.run_dir.clone().or_else(|| job.as_ref().map(JobConfig::run_dir));
        findings.extend(disk("run directory", &run_dir.unwrap_or_else(|| "runs".into()), job.as_ref()));
        if let Some((job, store)) = job.as_ref().and_then(|job| Some((job, job.checkpoint.store_path()?))) {
            findings.extend(disk("store", &store, Some(job)));
        }
        if let Some(url) = &self.coordinator {
            findings.push(runtime()?.block_on(coordinator(url, self.credentials)));
        }
        match self.json {
            true => println!("{}", serde_json::to_string(&findings)?),
            false => print!("{}", as_text(&findings)),
        }
        Ok(if has_failure(&findings) { Exit::Failed } else { Exit::Finished })
    }
}

/// What only a program that links libtorch can see.
fn worker_part() -> Vec<Finding> {
    let check = "musher-worker";
    let program = match workers::find_program() {
        Ok(program) => program,
        Err(error) => {
            return vec![Finding::fail(
                check,
                causes(error.as_ref()),
                "without it this machine trains nothing",
            )];
        }
    };
    let said = Command::new(&program).args(["doctor", "--json"]).output();
    let findings = said.as_ref().ok().and_then(|said| serde_json::from_slice(&said.stdout).ok());
    findings.unwrap_or_else(|| {
        let why = match said {
            Ok(said) => {
                String::from_utf8_lossy(&said.stderr).lines().last().unwrap_or("it said nothing").to_owned()
            }
            Err(error) => error.to_string(),
        };
        let says = format!("{} does not start: {why}", program.display());
        vec![Finding::fail(
            check,
            says,
            "build it again (`make build`), or see that libtorch lies where it was built",
        )]
    })
}

fn files() -> Finding {
    // A coordinator raises its own, up to this one.
    let limit = getrlimit(Resource::Nofile).maximum;
    let says = limit.map_or("no limit".to_owned(), |limit| format!("{limit} at once"));
    match limit {
        Some(limit) if limit < FEWEST_FILES => {
            Finding::fail("open files", says, format!("raise the hard limit: ulimit -Hn {FILES}"))
        }
        Some(limit) if limit < FILES => Finding::warn(
            "open files",
            says,
            format!("enough for {} workers; for more, ulimit -Hn {FILES}", (limit - FEWEST_FILES / 2) / 2),
        ),
        _ => Finding::ok("open files", says),
    }
}

fn shared_memory() -> Finding {
    let check = "/dev/shm";
    let gpus = u64::from(musher_launcher::visible_gpus());
    let Ok(found) = rustix::fs::statvfs("/dev/shm") else {
        let says = "there is none";
        return match gpus {
            0 | 1 => Finding::ok(check, format!("{says}, and none is needed without several GPUs")),
            _ => Finding::fail(check, says, "mount a tmpfs there: NCCL needs it"),
        };
    };
    let (free, wanted) = (found.f_bavail * found.f_frsize, gpus * SHM_BYTES_PER_GPU);
    let says = format!("{} free", size(free));
    match gpus > 1 && free < wanted {
        true => Finding::warn(
            check,
            says,
            format!(
                "NCCL may want {} for {gpus} GPUs: --shm-size, or a memory-backed emptyDir",
                size(wanted)
            ),
        ),
        false => Finding::ok(check, says),
    }
}

/// Threads that get more than their share of the processor's time are stopped for the rest of each period.
fn quota() -> Finding {
    let cores = musher_launcher::shared_cores(1);
    let online =
        fs::read_to_string("/proc/cpuinfo").map_or(cores, |text| text.matches("processor\t").count());
    let says = match cores < online {
        true => format!("{cores} of {online} cores, by the control group's quota or by affinity"),
        false => format!("{cores} cores"),
    };
    let wanted = std::env::var("OMP_NUM_THREADS").ok().and_then(|threads| threads.parse::<usize>().ok());
    match wanted {
        Some(threads) if threads > cores => Finding::warn(
            "processor",
            format!("{says}, and OMP_NUM_THREADS asks for {threads}"),
            "unset it: more threads than cores only stop each other; --threads chooses",
        ),
        _ => Finding::ok("processor", says),
    }
}

fn clock(now: SystemTime) -> Finding {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    if since < PAST {
        let says = format!("it is {} days after 1970, which is past", since.as_secs() / 86_400);
        return Finding::fail("clock", says, "set it (timedatectl): certificates would not be valid yet");
    }
    match Path::new("/run/systemd/timesync/synchronized").exists() {
        true => Finding::ok("clock", "synchronised"),
        false => Finding::ok("clock", "plausible; who keeps it is not known, --coordinator compares it"),
    }
}

fn data(job: &JobConfig) -> Finding {
    match run::open_data(job) {
        Ok(data) => {
            let (train, val) = (data.train().samples.len(), data.val().samples.len());
            Finding::ok(
                "data set",
                format!("{train} training and {val} validation samples in {}", job.data.root),
            )
        }
        Err(error) => Finding::fail(
            "data set",
            error.to_string(),
            "workers elsewhere may have theirs; `musher data check DIR` says more of one that is there",
        ),
    }
}

fn ports(job: &JobConfig) -> Vec<Finding> {
    let server = &job.server;
    let asked = [
        ("server.grpc", Some(server.grpc)),
        ("server.http", Some(server.http)),
        ("server.probes", server.probes),
    ];
    asked.into_iter().filter_map(|(key, address)| Some(port(key, address?))).collect()
}

fn port(key: &str, address: SocketAddr) -> Finding {
    match TcpListener::bind(address) {
        Ok(_) => Finding::ok(key, format!("{address} is free")),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Finding::fail(
            key,
            format!("{address} is taken, by another run perhaps"),
            format!("give another with --set {key}=IP:PORT, port 0 for any"),
        ),
        Err(error) => Finding::fail(
            key,
            format!("{address} can't be listened at: {error}"),
            format!("give an address of this machine with --set {key}=IP:PORT"),
        ),
    }
}

/// Room and speed of the disk on which `dir` is, or would be.
fn disk(check: &str, dir: &Path, job: Option<&JobConfig>) -> Vec<Finding> {
    let there = dir.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("."));
    let needed = job.map(|job| {
        let network = NetworkSize::of(job);
        // One more is written before the oldest goes.
        (u64::from(job.checkpoint.keep) + 2) * network.state_bytes + 2 * network.weights_bytes
    });
    let room = match rustix::fs::statvfs(there) {
        Ok(found) => {
            let free = found.f_bavail * found.f_frsize;
            let says = format!("{} free at {}", size(free), dir.display());
            match needed {
                Some(needed) if free < needed => Finding::fail(
                    check,
                    says,
                    format!(
                        "the run keeps up to {}: name another place, or lower checkpoint.keep",
                        size(needed)
                    ),
                ),
                Some(needed) if free < 2 * needed => {
                    Finding::warn(check, says, format!("the run keeps up to {}", size(needed)))
                }
                _ => Finding::ok(check, says),
            }
        }
        Err(error) => {
            return vec![Finding::fail(check, format!("{}: {error}", there.display()), "name another place")];
        }
    };
    vec![room, speed(&format!("{check}'s speed"), there, job)]
}

fn speed(check: &str, dir: &Path, job: Option<&JobConfig>) -> Finding {
    let rate = match write_rate(dir) {
        Ok(rate) => rate,
        Err(error) => {
            let says = format!("nothing can be written to {}: {error}", dir.display());
            return Finding::fail(check, says, "name a place that this user may write to");
        }
    };
    let mut says = format!("{}/s, written and synchronised", size(rate as u64));
    if let Some(job) = job {
        let seconds = NetworkSize::of(job).state_bytes as f64 / rate;
        says += &format!("; a checkpoint takes {seconds:.1} s, while training goes on");
    }
    match rate < SLOW_BYTES_PER_S {
        true => Finding::warn(check, says, "checkpoints come late on so slow a disk: name another place"),
        false => Finding::ok(check, says),
    }
}

/// Bytes a second.
fn write_rate(dir: &Path) -> io::Result<f64> {
    let path = dir.join(format!(".musher-doctor-{}", std::process::id()));
    let write = || {
        let mut file = File::create(&path)?;
        // Not all of one value, which some file systems do not store.
        let block: Vec<u8> = (0..1u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let start = Instant::now();
        for _ in 0..TRIAL_BYTES / block.len() {
            file.write_all(&block)?;
        }
        file.sync_all()?;
        Ok(TRIAL_BYTES as f64 / start.elapsed().as_secs_f64().max(1e-6))
    };
    let rate = write();
    let removed = fs::remove_file(&path);
    rate.and_then(|rate| removed.map(|()| rate))
}

/// Whether it answers, and how far its clock is from ours.
async fn coordinator(url: &str, credentials: CredentialsArgs) -> Finding {
    let check = "coordinator";
    let advice = "see its address, and what the workers show it (--tls-ca, --token-file)";
    let link = match remote::link(url, credentials).await {
        Ok(link) => link,
        Err(error) => return Finding::fail(check, causes(error.as_ref()), advice),
    };
    let asked = SystemTime::now();
    let answer = HealthClient::new(link).check(HealthCheckRequest::default()).await;
    let rtt = asked.elapsed().unwrap_or_default();
    let date = match &answer {
        Ok(answer) => answer.metadata().get("date"),
        Err(status) => {
            return Finding::fail(check, format!("{url} does not answer: {}", status.message()), advice);
        }
    };
    let theirs = date.and_then(|date| httpdate::parse_http_date(date.to_str().ok()?).ok());
    let Some(theirs) = theirs else { return Finding::ok(check, format!("{url} answers, and tells no time")) };
    skew(url, asked + rtt / 2, theirs)
}

/// Theirs is told in whole seconds.
fn skew(url: &str, ours: SystemTime, theirs: SystemTime) -> Finding {
    let apart = ours.duration_since(theirs).unwrap_or_else(|error| error.duration());
    let seconds = apart.as_secs();
    match apart > SKEW {
        true => Finding::warn(
            "coordinator",
            format!("{url} answers, and its clock is {seconds} s from this machine's"),
            "set both by one time server: certificates are valid by the clock, and logs are compared by it",
        ),
        false => Finding::ok(
            "coordinator",
            format!("{url} answers, and its clock is this machine's to {} s", seconds + 1),
        ),
    }
}

fn size(bytes: u64) -> String {
    ByteSize::b(bytes).display().si().to_string()
}

#[cfg(test)]
mod tests {
    use musher_launcher::findings::Condition;

    use super::*;

    #[test]
    fn a_clock_that_stands_in_the_past_or_apart_is_told() {
        assert_eq!(clock(UNIX_EPOCH + Duration::from_secs(86_400 * 3)).verdict, Condition::Fail);
        assert_eq!(clock(SystemTime::now()).verdict, Condition::Ok);
        let now = SystemTime::now();
        assert_eq!(skew("there", now, now + Duration::from_secs(2)).verdict, Condition::Ok);
        for theirs in [now + Duration::from_secs(40), now - Duration::from_secs(40)] {
            let finding = skew("there", now, theirs);
            assert_eq!(finding.verdict, Condition::Warn);
            assert!(finding.says.contains("40 s"), "{finding:?}");
        }
    }

    #[test]
    fn a_disk_without_room_fails_and_a_trial_leaves_nothing() {
        let dir = tempfile::tempdir().expect("the system has a temporary directory");
        let job = job::load("", "test", &["checkpoint.keep=1000000".into()]).expect("it is a job");
        let findings = disk("run directory", &dir.path().join("not/yet"), Some(&job));
        assert_eq!(findings[0].verdict, Condition::Fail, "{findings:?}");
        assert!(findings[1].says.contains("a checkpoint takes"), "{findings:?}");
        assert_eq!(fs::read_dir(dir.path()).expect("it is there").count(), 0);
    }
}
