//! `musher-worker doctor`: what a worker computes and exchanges with. `musher doctor` asks it, too.

use std::{fs, path::PathBuf, process::ExitCode};

use clap::Args;
use musher_launcher::{
    driver_version,
    findings::{Finding, as_text, has_failure},
    visible_gpus,
};
use musher_nccl::NcclRuntime;
use tch::{Device, Kind, Tensor};

use super::compute_threads;

/// The oldest driver that runs CUDA 13.
const DRIVER: u32 = 580;

#[derive(Debug, Args)]
pub struct Doctor {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Doctor {
    pub(super) fn run(self) -> ExitCode {
        let mut findings = vec![libtorch(Device::Cpu, "libtorch")];
        findings.push(threads());
        findings.extend(gpus());
        match self.json {
            true => println!("{}", serde_json::to_string(&findings).expect("findings are plain data")),
            false => print!("{}", as_text(&findings)),
        }
        match has_failure(&findings) {
            true => ExitCode::FAILURE,
            false => ExitCode::SUCCESS,
        }
    }
}

/// Computes something whose outcome is known: a convolution of ones, whose middle sees all of its kernel.
fn libtorch(device: Device, check: &str) -> Finding {
    let compute = || {
        let ones = |shape: &[i64]| Tensor::f_ones(shape, (Kind::Float, device));
        let sum = ones(&[1, 4, 5, 5])?.f_conv2d(&ones(&[1, 4, 3, 3])?, None::<Tensor>, 1, 1, 1, 1)?;
        sum.f_narrow(2, 2, 1)?.f_narrow(3, 2, 1)?.f_sum(Kind::Double)?.f_double_value(&[])
    };
    match compute() {
        Ok(36.0) => Finding::ok(check, format!("{} computes", libtorch_here())),
        Ok(other) => Finding::fail(
            check,
            format!("a convolution came to {other}, not 36"),
            "this machine or its libtorch is broken: run memory tests, and `make setup` again",
        ),
        Err(error) => Finding::fail(
            check,
            format!("a convolution failed: {}", error.to_string().lines().next().unwrap_or_default()),
            "install libtorch again with `make setup`",
        ),
    }
}

/// The version, and where the running process has it from.
fn libtorch_here() -> String {
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let library = maps.lines().find_map(|line| {
        let path = line.split_whitespace().last()?;
        path.ends_with("/libtorch_cpu.so").then(|| PathBuf::from(path))
    });
    let Some(library) = library else { return "libtorch".into() };
    // A wheel says its version beside its libraries.
    let version = library.parent().and_then(|lib| fs::read_to_string(lib.with_file_name("version.py")).ok());
    let version = version.and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("__version__"))?.to_owned();
        Some(format!(" {}", line.split(['\'', '"']).nth(1)?))
    });
    format!("libtorch{} of {}", version.unwrap_or_default(), library.display())
}

fn threads() -> Finding {
    let (threads, cores) = (compute_threads(None), super::cores());
    let says = format!("a worker alone on this machine computes with {threads}");
    match threads < cores {
        true => Finding::warn(
            "threads",
            format!("{says}, of {cores} cores"),
            "OMP_THREAD_LIMIT or OMP_DYNAMIC keep it from more: unset them",
        ),
        false => Finding::ok("threads", says),
    }
}

fn gpus() -> Vec<Finding> {
    let gpus = visible_gpus();
    let Some(driver) = driver_version() else {
        return vec![Finding::ok(
            "CUDA",
            "there is no NVIDIA driver: workers compute on the CPU, and need no NCCL",
        )];
    };
    let major: Option<u32> = driver.split('.').next().and_then(|major| major.parse().ok());
    let mut findings = vec![match major {
        Some(old) if old < DRIVER => Finding::fail(
            "driver",
            format!("{driver} is too old for CUDA 13"),
            format!("install driver {DRIVER} or newer, or train with cluster.device = \"cpu\""),
        ),
        _ => Finding::ok("driver", driver),
    }];
    if gpus == 0 {
        findings.push(Finding::warn(
            "CUDA",
            "the driver is here and shows no GPU",
            "see what nvidia-smi shows, and whether CUDA_VISIBLE_DEVICES hides them",
        ));
        return findings;
    }
    if let Err(torch_ext::Error(why)) = torch_ext::open_cuda() {
        findings.push(Finding::fail("CUDA", why, "or train with cluster.device = \"cpu\""));
        return findings;
    }
    for gpu in 0..gpus as usize {
        let name = musher_nccl::device_name(gpu).unwrap_or_else(|error| error.to_string());
        let computes = libtorch(Device::Cuda(gpu), &format!("GPU {gpu}"));
        findings.push(match computes.advice {
            None => Finding::ok(&computes.check, format!("{name} computes")),
            Some(_) => computes,
        });
    }
    findings.push(match NcclRuntime::open(0) {
        Ok(runtime) => Finding::ok("NCCL", format!("{}", runtime.version())),
        Err(error) if gpus > 1 => Finding::fail(
            "NCCL",
            error.to_string(),
            "without it gradients go by way of the hosts, over TCP; `MUSHER_LIBTORCH=full make setup` brings it",
        ),
        Err(error) => Finding::warn("NCCL", error.to_string(), "a team over several GPUs would go over TCP"),
    });
    findings
}
