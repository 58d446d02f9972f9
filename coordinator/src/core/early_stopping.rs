//! When to stop before the epoch limit, and which epoch's weights are the best: the semantics of
//! Keras' `EarlyStopping` callback.
//!
//! One deliberate difference from Keras 3: a NaN never counts as an improvement, as in Keras 2. Keras 3
//! takes a NaN of the first epoch for the best value, which no later epoch can beat.

use musher_proto::{
    ids::Epoch,
    job::{self, Monitor},
    scores::Scores,
};
use serde::{Deserialize, Serialize};

/// What has been judged so far. It is part of each checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EarlyStopping {
    /// The last epoch that was judged; 0: none.
    pub judged: Epoch,
    /// Judged epochs since the last improvement.
    pub wait: u32,
    pub best: Option<Best>,
    /// Patience has run out.
    pub stopped: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    pub epoch: Epoch,
    /// Of the monitored figure. `None` for NaN, which JSON does not have.
    pub value: Option<f64>,
    pub scores: Scores,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub new_best: bool,
    pub stop: bool,
}

impl EarlyStopping {
    /// Judges `epoch`, once. Keras counts epochs from 0, Musher from 1.
    pub fn judge(&mut self, rules: &job::EarlyStopping, epoch: Epoch, scores: &Scores) -> Verdict {
        self.judged = epoch;
        if epoch.0 <= rules.start_from_epoch {
            return Verdict { new_best: false, stop: false };
        }
        let current = monitored(rules.monitor, scores);
        let best = Best { epoch, value: Some(current).filter(|v| !v.is_nan()), scores: *scores };
        let first = self.best.is_none();
        self.wait += 1;
        if self.is_improvement(rules, current) {
            self.wait = 0;
            self.best = Some(best);
            return Verdict { new_best: true, stop: false };
        }
        if first {
            // The first judged epoch's weights are the best until better ones come.
            self.best = Some(best);
        }
        self.stopped = self.wait >= rules.patience && epoch.0 > 1;
        Verdict { new_best: first, stop: self.stopped }
    }

    fn is_improvement(&self, rules: &job::EarlyStopping, current: f64) -> bool {
        match self.best.and_then(|best| best.value) {
            _ if current.is_nan() => false,
            None => true,
            Some(best) if smaller_is_better(rules.monitor) => current + rules.min_delta < best,
            Some(best) => current - rules.min_delta > best,
        }
    }
}

fn monitored(monitor: Monitor, scores: &Scores) -> f64 {
    match monitor {
        Monitor::ValLoss => scores.loss,
        Monitor::ValAccuracy => scores.accuracy,
        Monitor::ValMiou => scores.miou,
    }
}

fn smaller_is_better(monitor: Monitor) -> bool {
    match monitor {
        Monitor::ValLoss => true,
        Monitor::ValAccuracy | Monitor::ValMiou => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a curve; returns (epoch at which it stopped, best epoch), both counted from 1.
    fn run(rules: &job::EarlyStopping, curve: &[f64]) -> (Option<u32>, Option<u32>) {
        let mut state = EarlyStopping::default();
        for (i, &value) in curve.iter().enumerate() {
            let epoch = Epoch(i as u32 + 1);
            let scores =
                Scores { loss: value, accuracy: value, miou: value, samples: 1, ..Scores::default() };
            if state.judge(rules, epoch, &scores).stop {
                return (Some(epoch.0), state.best.map(|b| b.epoch.0));
            }
        }
        (None, state.best.map(|b| b.epoch.0))
    }

    fn rules(patience: u32) -> job::EarlyStopping {
        job::EarlyStopping { patience, ..Default::default() }
    }

    /// What Keras' own callback said (`tools/judgement_reference.py`).
    #[derive(Debug, Deserialize)]
    struct Judged {
        rules: job::EarlyStopping,
        curve: Vec<f64>,
        stopped: Option<u32>,
        best: Option<u32>,
        /// Whose weights the model had at the end.
        r#final: u32,
    }

    #[test]
    fn judges_as_keras_does() {
        let cases: Vec<Judged> =
            serde_json::from_str(include_str!("../../tests/reference/early_stopping.json"))
                .expect("the reference is JSON");
        assert_eq!(cases.len(), 300);
        let mut stopped = 0;
        for judged in cases {
            let found = run(&judged.rules, &judged.curve);
            assert_eq!(found, (judged.stopped, judged.best), "{judged:?}");
            let last = judged.stopped.unwrap_or(judged.curve.len() as u32);
            assert_eq!(
                judged.r#final,
                found.1.unwrap_or(last),
                "the best epoch's weights are the result: {judged:?}"
            );
            stopped += u32::from(judged.stopped.is_some());
        }
        assert!((50..250).contains(&stopped), "{stopped} of 300 curves were stopped");
    }

    #[test]
    fn stops_after_patience_epochs_without_improvement() {
        assert_eq!(run(&rules(2), &[1.0, 0.8, 0.9, 0.85, 0.1]), (Some(4), Some(2)));
        assert_eq!(run(&rules(3), &[1.0, 0.8, 0.9, 0.85, 0.1]), (None, Some(5)));
    }

    #[test]
    fn an_equal_value_is_no_improvement() {
        assert_eq!(run(&rules(2), &[1.0, 1.0, 1.0]), (Some(3), Some(1)));
    }

    #[test]
    fn improvements_below_min_delta_do_not_count() {
        let rules = job::EarlyStopping { min_delta: 0.1, ..rules(2) };
        assert_eq!(run(&rules, &[1.0, 0.95, 0.91, 0.5]), (Some(3), Some(1)));
        assert_eq!(run(&rules, &[1.0, 0.95, 0.85, 0.8, 0.8]), (Some(5), Some(3)));
    }

    #[test]
    fn epochs_before_start_from_epoch_are_not_judged() {
        let rules = job::EarlyStopping { start_from_epoch: 2, ..rules(1) };
        assert_eq!(run(&rules, &[0.1, 0.2, 0.9, 0.8, 0.85]), (Some(5), Some(4)));
        assert_eq!(run(&rules, &[0.1, 0.2]), (None, None));
    }

    #[test]
    fn accuracy_and_miou_grow() {
        for monitor in [Monitor::ValAccuracy, Monitor::ValMiou] {
            let rules = job::EarlyStopping { monitor, ..rules(2) };
            assert_eq!(run(&rules, &[0.1, 0.5, 0.4, 0.5, 0.9]), (Some(4), Some(2)));
        }
    }

    #[test]
    fn nan_never_improves_and_the_first_judged_epoch_is_best_until_beaten() {
        assert_eq!(run(&rules(2), &[f64::NAN, 0.9, f64::NAN, f64::NAN]), (Some(4), Some(2)));
        assert_eq!(run(&rules(2), &[f64::NAN, f64::NAN]), (Some(2), Some(1)));
    }

    #[test]
    fn patience_1_does_not_stop_at_the_first_epoch() {
        assert_eq!(run(&rules(1), &[f64::NAN, 0.5]), (None, Some(2)));
    }
}
