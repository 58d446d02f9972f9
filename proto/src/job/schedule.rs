//! The learning rate as a function of the step number, so that skipped steps and restarts change
//! nothing in it.

use std::f64::consts::PI;

use super::{Schedule, Train};
use crate::ids::Step;

impl Train {
    /// The learning rate of the step that follows `applied` steps of a run over `train_samples`: the first
    /// `warmup_epochs` rise linearly, from one part of the rate to all of it.
    pub fn rate_after(&self, applied: Step, train_samples: u64) -> f64 {
        let epoch = train_samples.div_ceil(u64::from(self.global_batch));
        let warmup = (self.warmup_epochs * epoch as f64).round() as u64;
        self.scheduled(applied, warmup, epoch * u64::from(self.epochs))
    }

    fn scheduled(&self, applied: Step, warmup_steps: u64, total_steps: u64) -> f64 {
        if applied.0 < warmup_steps {
            return self.learning_rate * (applied.0 + 1) as f64 / warmup_steps as f64;
        }
        match self.schedule {
            Schedule::Constant => self.learning_rate,
            Schedule::Cosine => {
                let falling = total_steps.saturating_sub(warmup_steps).max(1);
                let progress = ((applied.0 - warmup_steps) as f64 / falling as f64).min(1.0);
                self.learning_rate * 0.5 * (1.0 + (PI * progress).cos())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosine_falls_from_the_full_rate_to_zero() {
        let train = Train { schedule: Schedule::Cosine, learning_rate: 0.2, ..Train::default() };
        let rate = |step| train.scheduled(Step(step), 0, 100);
        assert_eq!(rate(0), 0.2);
        assert!((rate(50) - 0.1).abs() < 1e-12);
        assert!(rate(99) > 0.0 && rate(100) < 1e-12 && rate(101) < 1e-12);
    }

    #[test]
    fn the_warm_up_comes_before_the_whole_cosine() {
        let train = Train { schedule: Schedule::Cosine, learning_rate: 0.2, ..Train::default() };
        let rate = |step| train.scheduled(Step(step), 20, 120);
        assert!((rate(0) - 0.01).abs() < 1e-12 && (rate(9) - 0.1).abs() < 1e-12);
        assert_eq!((rate(19), rate(20)), (0.2, 0.2));
        assert!((rate(70) - 0.1).abs() < 1e-12 && rate(120) < 1e-12);
    }

    #[test]
    fn constant_stays() {
        let train = Train::default();
        assert_eq!(train.scheduled(Step(7), 0, 10), train.learning_rate);
        assert_eq!(train.scheduled(Step(3), 4, 10), train.learning_rate);
        assert_eq!(train.scheduled(Step(1), 4, 10), train.learning_rate / 2.0);
    }

    #[test]
    fn steps_are_counted_by_whole_batches_and_epochs() {
        let cosine = Schedule::Cosine;
        let train =
            Train { schedule: cosine, learning_rate: 0.2, global_batch: 8, epochs: 2, ..Train::default() };
        // 17 samples are three steps, so the run has six.
        assert!((train.rate_after(Step(3), 17) - 0.1).abs() < 1e-12);
        let warm = Train { warmup_epochs: 0.5, ..train };
        assert_eq!([0, 1].map(|step| warm.rate_after(Step(step), 17)), [0.1, 0.2], "of two steps, rounded");
    }
}
