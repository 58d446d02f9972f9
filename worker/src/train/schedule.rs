//! The learning rate as a function of the step number, so that skipped steps and restarts change
//! nothing in it.

use std::f64::consts::PI;

use musher_proto::{
    ids::Step,
    job::{Schedule, Train},
};

/// The learning rate of the step that follows `applied` steps, of `total_steps` in the whole run.
pub fn learning_rate(train: &Train, applied: Step, total_steps: u64) -> f64 {
    match train.schedule {
        Schedule::Constant => train.learning_rate,
        Schedule::Cosine => {
            let progress = (applied.0 as f64 / total_steps.max(1) as f64).min(1.0);
            train.learning_rate * 0.5 * (1.0 + (PI * progress).cos())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosine_falls_from_the_full_rate_to_zero() {
        let train = Train { schedule: Schedule::Cosine, learning_rate: 0.2, ..Train::default() };
        let rate = |step| learning_rate(&train, Step(step), 100);
        assert_eq!(rate(0), 0.2);
        assert!((rate(50) - 0.1).abs() < 1e-12);
        assert!(rate(99) > 0.0 && rate(100) < 1e-12 && rate(101) < 1e-12);
    }

    #[test]
    fn constant_stays() {
        let train = Train::default();
        assert_eq!(learning_rate(&train, Step(7), 10), train.learning_rate);
    }
}
