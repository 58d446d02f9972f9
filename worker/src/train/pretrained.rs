//! The job's pretrained weights, on their way into the encoder of a run's very first replica. All others get them
//! from it: with the donor's state, or from a checkpoint.

use musher_model::Replica;
use musher_proto::{
    job::{JobConfig, Normalize, NormalizeChoice},
    message::{Activity, Pretrained},
};
use musher_weights::{
    WeightsFile,
    source::{Cache, Source, SourceError},
};
use thiserror::Error;

use super::ProgressBoard;

/// Why a run can't start from its pretrained weights.
#[derive(Debug, Error)]
#[error("model.pretrained = {name:?}: {problem}")]
pub struct PretrainedError {
    name: String,
    problem: Problem,
}

#[derive(Debug, Error)]
enum Problem {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    File(#[from] musher_weights::Error),
    #[error(transparent)]
    Model(#[from] musher_model::Error),
    #[error(
        "the weights were trained with data.normalize = {trained}, which \"auto\" can't know from their name: set data.normalize = {trained}"
    )]
    Normalize { trained: String },
}

/// Reads what the job names, if it names any, and fetches it before if need be.
pub(super) fn load(
    job: &JobConfig,
    replica: &mut Replica,
    board: &ProgressBoard,
) -> Result<Option<Pretrained>, PretrainedError> {
    let name = &job.model.pretrained;
    if name.is_empty() {
        return Ok(None);
    }
    let loaded = read(job, replica, board);
    loaded.map(Some).map_err(|problem| PretrainedError { name: name.clone(), problem })
}

fn read(job: &JobConfig, replica: &mut Replica, board: &ProgressBoard) -> Result<Pretrained, Problem> {
    let source = Source::parse(&job.model.pretrained)?;
    board.mark(Activity::WaitingForData);
    let found = source.obtain(&Cache::of_user(), |_| board.mark(Activity::WaitingForData))?;
    board.mark(Activity::Working);
    let mut file = WeightsFile::open(&found.path)?;
    follows(job, &file)?;
    let ignored = replica.load_encoder_weights(&mut file)?;
    Ok(Pretrained { file: found.path.display().to_string(), sha256: found.sha256, ignored })
}

/// Weights of Musher's own say how their images were normalised; `auto` goes by their name.
fn follows(job: &JobConfig, file: &WeightsFile) -> Result<(), Problem> {
    let name_of = |normalize: Normalize| serde_json::json!(normalize).to_string();
    let trained = file.metadata().get("normalize").map(|name| serde_json::json!(name).to_string());
    match trained {
        Some(trained)
            if job.data.normalize == NormalizeChoice::Auto && trained != name_of(job.normalize()) =>
        {
            Err(Problem::Normalize { trained })
        }
        _ => Ok(()),
    }
}
