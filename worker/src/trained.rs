//! A trained network from its weights file: the file's metadata says what it is and what it expects.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use musher_model::Replica;
use musher_proto::{job::JobConfig, size::NetworkSize};
use safetensors::SafeTensors;
use tch::Device;
use thiserror::Error;

use crate::train::{model_options, tune};

#[derive(Debug, Error)]
pub enum TrainedError {
    #[error("there are no weights at {}: name a run's best.safetensors or last.safetensors", .0.display())]
    Absent(PathBuf),
    #[error("cannot read the weights {}: {source}", file.display())]
    Read { file: PathBuf, source: io::Error },
    #[error("{} is no weights file: {reason}; name a run's best.safetensors", file.display())]
    Format { file: PathBuf, reason: String },
    #[error(
        "{} does not say which network it holds, as it has no `job` in its metadata: name a run's \
         best.safetensors",
        .0.display()
    )]
    Nameless(PathBuf),
    #[error("{} was written by another version of Musher: its job is not understood ({reason})", file.display())]
    Job { file: PathBuf, reason: String },
    #[error("{}: {source}", file.display())]
    Model { file: PathBuf, source: musher_model::Error },
}

/// A network with a run's weights, to be used and not to be trained.
pub struct Trained {
    /// What the run was asked to do; `data.normalize` is what the network is used to.
    pub job: JobConfig,
    pub metadata: HashMap<String, String>,
    pub replica: Replica,
}

impl Trained {
    pub fn open(file: &Path, device: Device) -> Result<Self, TrainedError> {
        let bytes = fs::read(file).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => TrainedError::Absent(file.into()),
            _ => TrainedError::Read { file: file.into(), source },
        })?;
        let (_, header) = SafeTensors::read_metadata(&bytes)
            .map_err(|error| TrainedError::Format { file: file.into(), reason: error.to_string() })?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let job = job_of(&metadata, file)?;
        // Before room is made for a network that the file only claims to hold.
        let claimed = NetworkSize::of(&job).parameters.saturating_mul(4);
        if header.data_len() as u64 <= claimed {
            let reason = format!(
                "its job is of a network of {claimed} bytes of parameters, and it holds {} bytes",
                header.data_len()
            );
            return Err(TrainedError::Format { file: file.into(), reason });
        }
        let of_model = |source| TrainedError::Model { file: file.into(), source };
        tune(device, job.train.precision).map_err(|error| of_model(error.into()))?;
        let mut replica = Replica::new(&model_options(&job), job.seed, device).map_err(of_model)?;
        replica.load_weights(&bytes).map_err(of_model)?;
        Ok(Self { job, metadata, replica })
    }

    /// A figure that the run wrote into the file.
    pub fn recorded(&self, name: &str) -> Option<f64> {
        self.metadata.get(name)?.parse().ok()
    }
}

fn job_of(metadata: &HashMap<String, String>, file: &Path) -> Result<JobConfig, TrainedError> {
    let text = metadata.get("job").ok_or_else(|| TrainedError::Nameless(file.into()))?;
    JobConfig::from_json(text)
        .map_err(|error| TrainedError::Job { file: file.into(), reason: error.to_string() })
}
