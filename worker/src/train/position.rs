//! Where a replica stands in the run: its counters, which are part of its state.

use musher_model::COUNTERS;
use musher_proto::{
    ids::{Epoch, Step},
    message::EpochTotals,
};

/// The replica's counters by name. All ranks hold the same, as all of them follow from reduced values.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Position {
    /// Steps in the parameters, those skipped for a non-finite gradient included.
    pub applied: Step,
    pub epoch: Epoch,
    /// Samples of the epoch that are applied.
    pub cursor: u64,
    /// Over the epoch's applied samples.
    pub totals: EpochTotals,
    /// The step after which batch-norm statistics were pooled last; `None`: never. A team that stands
    /// there already need not do it again.
    pub pooled_at: Option<Step>,
}

impl Position {
    pub fn from_counters(
        [applied, epoch, cursor, loss_bits, steps_skipped, pooled, ..]: [u64; COUNTERS],
    ) -> Self {
        Self {
            applied: Step(applied),
            epoch: Epoch(u32::try_from(epoch).unwrap_or(u32::MAX)),
            cursor,
            totals: EpochTotals { loss_sum: f64::from_bits(loss_bits), steps_skipped },
            pooled_at: pooled.checked_sub(1).map(Step),
        }
    }

    pub fn to_counters(self) -> [u64; COUNTERS] {
        [
            self.applied.0,
            self.epoch.0.into(),
            self.cursor,
            self.totals.loss_sum.to_bits(),
            self.totals.steps_skipped,
            self.pooled_at.map_or(0, |step| step.0 + 1),
            0,
            0,
        ]
    }

    /// The same parameters at the beginning of `epoch`.
    pub fn at_start_of(self, epoch: Epoch) -> Self {
        Self { epoch, cursor: 0, totals: EpochTotals::default(), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_round_trip() {
        let position = Position {
            applied: Step(17),
            epoch: Epoch(3),
            cursor: 96,
            totals: EpochTotals { loss_sum: -0.1, steps_skipped: 2 },
            pooled_at: Some(Step(0)),
        };
        assert_eq!(Position::from_counters(position.to_counters()), position);
        assert_eq!(Position::from_counters([0; COUNTERS]), Position::default());
    }
}
