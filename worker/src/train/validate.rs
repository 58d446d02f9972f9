//! Validation of this rank's units, and the picture of a few predictions.

use std::{collections::BTreeMap, ops::Range};

use musher_dataset::{BatchPlan, strip};
use musher_model::{Mode, Replica, metrics};
use musher_proto::{
    job::JobConfig,
    message::{Activity, Phase as WorkerPhase, UnitResult, Validate, Validated},
    shard::ValidationUnits,
};

use super::{Feed, Membership, ProgressBoard, TrainError, Trainer};

/// How the validation split is cut: the unit is one batch, wherever it is evaluated.
pub fn validation_units(data: &Feed, job: &JobConfig) -> ValidationUnits {
    ValidationUnits { samples: data.val_samples(), unit: u64::from(job.train.global_batch) }
}

/// Evaluates some units of the validation split, in order; the board says whether it works or waits for data.
pub fn evaluate(
    replica: &Replica,
    data: &Feed,
    units: ValidationUnits,
    wanted: Range<u64>,
    board: &ProgressBoard,
) -> Result<Vec<UnitResult>, TrainError> {
    let plan = wanted.map(move |index| BatchPlan {
        key: index,
        epoch: 0,
        sample_ids: units.positions(index).collect(),
    });
    let mut batches = data.validation(plan)?;
    let mut results = Vec::new();
    while let Some(batch) = awaited(board, || batches.next())? {
        let logits = replica.forward(&batch.images, Mode::Eval)?;
        let evaluation = metrics::evaluate(&logits, &batch.masks)?;
        results.push(UnitResult {
            index: batch.key,
            samples: batch.sample_ids.len() as u64,
            loss_sum: evaluation.loss_sum,
            confusion: evaluation.confusion.counts,
        });
    }
    Ok(results)
}

/// What is waited for counts as data on its way, and not as work.
fn awaited<B, E>(
    board: &ProgressBoard,
    next: impl FnOnce() -> Option<Result<B, E>>,
) -> Result<Option<B>, TrainError>
where
    TrainError: From<E>,
{
    board.mark(Activity::WaitingForData);
    let batch = next().transpose()?;
    board.mark(Activity::Working);
    Ok(batch)
}

impl Trainer {
    /// Evaluates this rank's share of the validation split.
    pub fn validate(&mut self, member: &Membership, order: Validate) -> Result<Validated, TrainError> {
        self.board.enter(WorkerPhase::Validating);
        let units = validation_units(&self.data, &self.job);
        let mine = units.of_rank(member.rank(), member.world());
        let results = evaluate(&self.replica, &self.data, units, mine, &self.board)?;
        let samples_png = match member.rank().0 {
            0 if order.samples_wanted > 0 => self.picture(u64::from(order.samples_wanted))?,
            _ => Vec::new(),
        };
        Ok(Validated {
            epoch: order.epoch,
            state_digest: self.replica.state_digest()?,
            units: results,
            samples_png,
        })
    }

    /// Images, truth and prediction of a few samples, spread over the split and always the same.
    fn picture(&mut self, wanted: u64) -> Result<Vec<u8>, TrainError> {
        let available = self.data.val_samples();
        let rows = wanted.min(available);
        let sample_ids = (0..rows).map(|row| row * available / rows).collect();
        let plan = [BatchPlan { key: 0, epoch: 0, sample_ids }];
        let mut loader = self.data.pictures(plan.into_iter());
        let Some(batch) = awaited(&self.board, || loader.next())? else { return Ok(Vec::new()) };
        let logits = self.replica.forward(&self.data.input.of_bytes(&batch)?.images, Mode::Eval)?;
        let predicted =
            Vec::<u8>::try_from(metrics::argmax(&logits)?.f_flatten(0, -1)?.f_to_device(tch::Device::Cpu)?)?;
        let side = self.job.data.image_size as usize;
        let (image, mask) = (side * side * 3, side * side / 4);
        let rows: Vec<_> = (0..batch.sample_ids.len())
            .map(|row| strip::StripRow {
                image: batch.images[row * image..][..image].to_vec(),
                truth: batch.masks[row * mask..][..mask].to_vec(),
                predicted: predicted[row * mask..][..mask].to_vec(),
            })
            .collect();
        Ok(strip::render(&rows, self.job.data.image_size))
    }

    /// The network's weights as a safetensors file.
    pub fn weights(&self, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>, TrainError> {
        Ok(self.replica.weights_safetensors(metadata)?)
    }
}
