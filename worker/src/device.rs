//! The device that this worker trains on: its flag, the job's wish, and what the machine has.

use std::{env::consts::ARCH, fmt, str::FromStr};

use musher_launcher::visible_gpus;
use musher_proto::job;
use tch::Device;
use tracing::warn;

/// `--device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The GPU of this worker's local rank if there is one, else the CPU.
    Auto,
    Cpu,
    /// GPU K of those visible; `None`: that of the local rank.
    Cuda(Option<usize>),
}

impl FromStr for Choice {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const HELP: &str = "give auto, cpu, cuda or cuda:K";
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(None)),
            other => {
                let index = other.strip_prefix("cuda:").and_then(|index| index.parse().ok());
                index.map(|index| Self::Cuda(Some(index))).ok_or(HELP)
            }
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Cuda(Some(index)) => write!(f, "cuda:{index}"),
        }
    }
}

/// What the machine has for a choice.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    choice: Choice,
    device: Device,
    /// For people: `cpu`, or `cuda:0 NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Why it is not a GPU, if one was looked for.
    pub no_gpu: Option<String>,
}

const NO_GPU: &str = "no NVIDIA GPU is visible on this machine";

impl Choice {
    /// Opens CUDA where it may be needed.
    ///
    /// # Errors
    /// If a GPU was asked for and can't be used: what is missing.
    pub fn find(self, local_rank: u32) -> Result<Found, String> {
        let on_cpu = |no_gpu| Found { choice: self, device: Device::Cpu, name: "cpu".into(), no_gpu };
        match self {
            Self::Cpu => Ok(on_cpu(None)),
            // Looking is cheap, and spares a machine without a GPU the loading of libtorch's CUDA part.
            Self::Auto => match visible_gpus() {
                0 => Ok(on_cpu(Some(NO_GPU.into()))),
                gpus if local_rank >= gpus => {
                    Ok(on_cpu(Some(no_such_gpu(local_rank as usize, gpus as usize))))
                }
                _ => Ok(self.gpu(local_rank as usize).unwrap_or_else(|why| {
                    warn!(reason = why, "there is a GPU, but this worker trains on the CPU");
                    on_cpu(Some(why))
                })),
            },
            Self::Cuda(index) => self.gpu(index.unwrap_or(local_rank as usize)),
        }
    }

    fn gpu(self, index: usize) -> Result<Found, String> {
        if visible_gpus() == 0 {
            return Err(NO_GPU.into()); // before anybody is sent to install anything
        }
        torch_ext::open_cuda().map_err(|torch_ext::Error(why)| why)?;
        let gpus = tch::Cuda::device_count() as usize;
        if index >= gpus {
            return Err(no_such_gpu(index, gpus));
        }
        let model = musher_nccl::device_name(index).map_err(|error| error.to_string())?;
        let name = format!("cuda:{index} {model}");
        Ok(Found { choice: self, device: Device::Cuda(index), name, no_gpu: None })
    }
}

impl Found {
    pub fn device(&self) -> Device {
        self.device
    }

    /// What to train on, given the job's `cluster.device`.
    ///
    /// # Errors
    /// If the job, the flag and the machine do not go together.
    pub fn for_job(&self, wish: job::Device) -> Result<Device, String> {
        let Self { choice, device, no_gpu, .. } = self;
        match (wish, choice, device) {
            (job::Device::Auto, ..) | (job::Device::Cuda, _, Device::Cuda(_)) => Ok(*device),
            (job::Device::Cpu, Choice::Auto | Choice::Cpu, _) => Ok(Device::Cpu),
            (job::Device::Cpu, Choice::Cuda(_), _) => Err(format!(
                "the job trains on the CPU (cluster.device = \"cpu\"), but this worker was started with --device \
                 {choice}: leave the flag out, or change the job"
            )),
            (job::Device::Cuda, ..) => Err(match no_gpu {
                Some(why) => format!("the job trains on GPUs (cluster.device = \"cuda\"), but {why}"),
                None => {
                    "the job trains on GPUs (cluster.device = \"cuda\"), but this worker was started with \
                         --device cpu: leave the flag out, or change the job"
                        .into()
                }
            }),
        }
    }
}

/// By what this process rounds an update of the optimizer. Replicas that round by another one drift apart, a last bit
/// here and there in each step; by the same one they stay equal, whatever their cores, threads and models.
pub fn arithmetic(device: Device) -> String {
    match (device, torch_ext::cpu_capability()) {
        (Device::Cuda(_), _) => "CUDA".into(),
        // They multiply and add in one, in the same places.
        (_, "AVX2" | "AVX512") => "a CPU with AVX2".into(),
        (_, other) => format!("a CPU ({ARCH}, {})", other.to_lowercase()),
    }
}

fn no_such_gpu(index: usize, gpus: usize) -> String {
    format!("there is no GPU {index} on this machine: {gpus} can be used, counted from 0")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_is_written_as_it_is_read() {
        for text in ["auto", "cpu", "cuda", "cuda:3"] {
            assert_eq!(text.parse::<Choice>().unwrap().to_string(), text);
        }
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU"] {
            assert!(text.parse::<Choice>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_job_the_flag_and_the_machine_must_go_together() {
        use job::Device::{Auto, Cpu, Cuda};
        let gpu = Device::Cuda(1);
        let found = |choice: &str, device| {
            let choice = choice.parse().unwrap();
            let looked = device == Device::Cpu && choice != Choice::Cpu;
            Found { choice, device, name: String::new(), no_gpu: looked.then(|| "there is no driver".into()) }
        };
        for (wish, choice, device, expected) in [
            (Auto, "auto", gpu, Ok(gpu)),
            (Auto, "auto", Device::Cpu, Ok(Device::Cpu)),
            (Auto, "cpu", Device::Cpu, Ok(Device::Cpu)),
            (Auto, "cuda:1", gpu, Ok(gpu)),
            (Cpu, "auto", gpu, Ok(Device::Cpu)),
            (Cpu, "cpu", Device::Cpu, Ok(Device::Cpu)),
            (Cpu, "cuda:1", gpu, Err("started with --device cuda:1")),
            (Cuda, "auto", gpu, Ok(gpu)),
            (Cuda, "cuda", gpu, Ok(gpu)),
            (Cuda, "auto", Device::Cpu, Err("but there is no driver")),
            (Cuda, "cpu", Device::Cpu, Err("started with --device cpu")),
        ] {
            let outcome = found(choice, device).for_job(wish);
            match (&outcome, expected) {
                (Ok(chosen), Ok(expected)) => assert_eq!(*chosen, expected, "{wish:?}, --device {choice}"),
                (Err(why), Err(words)) => assert!(why.contains(words) && !why.contains('\n'), "{why}"),
                _ => panic!("{wish:?}, --device {choice}: {outcome:?}"),
            }
        }
    }

    #[test]
    fn a_machine_without_a_gpu_says_what_is_missing_where_one_is_asked_for() {
        if visible_gpus() > 0 {
            return println!("skipped: there is a GPU");
        }
        let auto = Choice::Auto.find(0).unwrap();
        assert_eq!((auto.device, auto.name.as_str()), (Device::Cpu, "cpu"));
        assert!(auto.no_gpu.unwrap().contains("no NVIDIA GPU"));
        assert_eq!(Choice::Cpu.find(0).unwrap().no_gpu, None);
        let why = Choice::Cuda(Some(0)).find(0).unwrap_err();
        assert!(why.contains("no NVIDIA GPU"), "{why}");
    }
}
