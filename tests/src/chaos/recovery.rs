//! When a run trains again after a strike, as its events tell.

use crate::Event;

use super::plan::Kind;

/// A strike, and what had been told before it.
#[derive(Clone, Copy, Debug)]
pub struct Struck {
    pub kind: Kind,
    /// Events before it.
    pub told: usize,
    /// Of the day, in seconds.
    pub at: f64,
    /// Events before a restraint was over; `None` while it lasts.
    pub over: Option<usize>,
}

impl Struck {
    /// Seconds from the strike until a step was reported that was taken after it had been dealt with.
    /// Workers report every second, so it is that much too long at worst.
    pub fn recovered_after(&self, events: &[Event]) -> Option<f64> {
        let since = |told: usize, is_it: &dyn Fn(&Event) -> bool| {
            events.iter().skip(told).position(is_it).map(|index| told + index)
        };
        let formed = |event: &Event| ["generation_formed", "generation_continued"].contains(&event.name());
        let dealt_with = match self.kind {
            Kind::KillWorker | Kind::DrainWorker | Kind::AddWorker => since(self.told, &formed)?,
            Kind::KillCoordinator | Kind::LoseEverything => {
                let life = since(self.told, &|event| event.name() == "run_started")?;
                since(life, &formed)?
            }
            Kind::StopWorker | Kind::HoldTrainingThread | Kind::StopCoordinator => {
                let over = self.over.into_iter();
                over.chain(since(self.told, &formed)).min()?
            }
        };
        let stood_at = step_at(&events[..events.len().min(dealt_with + 1)]);
        let moved = |event: &Event| event.name() == "progress" && event.number("step") > stood_at;
        let moved = &events[since(dealt_with, &moved)?];
        let seconds = time_of_day(moved.text("timestamp")) - self.at;
        Some(if seconds < -1.0 { seconds + DAY } else { seconds.max(0.0) })
    }
}

/// What the last event that speaks of it says.
fn step_at(events: &[Event]) -> u64 {
    let step = |event: &Event| match event.name() {
        "generation_formed" => Some(event.number("applied_step")),
        "progress" | "epoch_finished" => Some(event.number("step")),
        _ => None,
    };
    events.iter().rev().find_map(step).unwrap_or(0)
}

pub const DAY: f64 = 86_400.0;

/// Seconds since midnight of `2026-01-31T23:59:59.999999Z`.
fn time_of_day(timestamp: &str) -> f64 {
    let time = timestamp.split(['T', 'Z']).nth(1).unwrap_or_default();
    time.split(':').fold(0.0, |sum, part| sum * 60.0 + part.parse::<f64>().unwrap_or(f64::NAN))
}
