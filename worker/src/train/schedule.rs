//! The learning rate as a function of the step number, so that skipped steps and restarts change
//! nothing in it.

use std::f64::consts::PI;

use musher_proto::{
    ids::Step,
    job::{Schedule, Train},
};

/// The learning rate of the step that follows `applied` steps, of `total_steps` in the whole run, of which the first
/// `warmup_steps` rise linearly, from one part of the rate to all of it.
pub fn learning_rate(train: &Train, applied: Step, warmup_steps: u64, total_steps: u64) -> f64 {
    if applied.0 < warmup_steps {
        return train.learning_rate * (applied.0 + 1) as f64 / warmup_steps as f64;
    }
    match train.schedule {
        Schedule::Constant => train.learning_rate,
        Schedule::Cosine => {
            let falling = total_steps.saturating_sub(warmup_steps).max(1);
            let progress = ((applied.0 - warmup_steps) as f64 / falling as f64).min(1.0);
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
        let rate = |step| learning_rate(&train, Step(step), 0, 100);
        assert_eq!(rate(0), 0.2);
        assert!((rate(50) - 0.1).abs() < 1e-12);
        assert!(rate(99) > 0.0 && rate(100) < 1e-12 && rate(101) < 1e-12);
    }

    #[test]
    fn the_warm_up_comes_before_the_whole_cosine() {
        let train = Train { schedule: Schedule::Cosine, learning_rate: 0.2, ..Train::default() };
        let rate = |step| learning_rate(&train, Step(step), 20, 120);
        assert!((rate(0) - 0.01).abs() < 1e-12 && (rate(9) - 0.1).abs() < 1e-12);
        assert_eq!((rate(19), rate(20)), (0.2, 0.2));
        assert!((rate(70) - 0.1).abs() < 1e-12 && rate(120) < 1e-12);
    }

    #[test]
    fn constant_stays() {
        let train = Train::default();
        assert_eq!(learning_rate(&train, Step(7), 0, 10), train.learning_rate);
        assert_eq!(learning_rate(&train, Step(3), 4, 10), train.learning_rate);
        assert_eq!(learning_rate(&train, Step(1), 4, 10), train.learning_rate / 2.0);
    }
}
