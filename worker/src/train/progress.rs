//! What the training thread is doing, for the heartbeat to read from another thread.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use musher_proto::message::{Activity, Phase, Progress};

use super::Position;

/// Rates are means over this time.
const WINDOW: Duration = Duration::from_secs(10);
/// Step times kept for the median.
const STEPS: usize = 33;

/// Written by the training thread after each step, read about once a second.
#[derive(Debug)]
pub struct ProgressBoard(Mutex<Board>);

#[derive(Debug)]
struct Board {
    phase: Phase,
    since: Instant,
    position: Position,
    loss: f64,
    /// (when, samples applied by then since the phase began)
    rate: VecDeque<(Instant, u64)>,
    compute: VecDeque<Duration>,
}

impl Default for ProgressBoard {
    fn default() -> Self {
        Self(Mutex::new(Board {
            phase: Phase::Loading,
            since: Instant::now(),
            position: Position::default(),
            loss: f64::NAN,
            rate: VecDeque::new(),
            compute: VecDeque::new(),
        }))
    }
}

impl ProgressBoard {
    pub fn enter(&self, phase: Phase) {
        let mut board = self.lock();
        board.phase = phase;
        board.since = Instant::now();
        board.rate.clear();
        let start = board.since;
        board.rate.push_back((start, 0));
    }

    /// A step is applied: `samples` of the whole team; `compute` is this rank's own part of the time.
    pub fn stepped(&self, position: Position, loss: f64, samples: u64, compute: Duration) {
        let mut board = self.lock();
        let now = Instant::now();
        board.since = now;
        board.position = position;
        board.loss = loss;
        let total = board.rate.back().map_or(0, |&(_, total)| total) + samples;
        board.rate.push_back((now, total));
        while board.rate.len() > 2 && board.rate.front().is_some_and(|&(then, _)| now - then > WINDOW) {
            board.rate.pop_front();
        }
        board.compute.push_back(compute);
        if board.compute.len() > STEPS {
            board.compute.pop_front();
        }
    }

    pub fn moved(&self, position: Position) {
        self.lock().position = position;
    }

    pub fn read(&self) -> Progress {
        let board = self.lock();
        let rate = match (board.rate.front(), board.rate.back()) {
            (Some(&(start, from)), Some(&(end, to))) if to > from => {
                (to - from) as f64 / (end - start).as_secs_f64()
            }
            _ => 0.0,
        };
        let mut compute: Vec<_> = board.compute.iter().collect();
        compute.sort_unstable();
        let Position { applied, epoch, cursor, totals, .. } = board.position;
        Progress {
            phase: board.phase,
            activity: Activity::Working,
            in_activity_ms: board.since.elapsed().as_millis() as u64,
            warm: false,
            applied,
            epoch,
            cursor,
            loss: board.loss,
            images_per_second: rate,
            step_ms: compute.get(compute.len() / 2).map_or(0.0, |time| time.as_secs_f64() * 1e3),
            steps_skipped: totals.steps_skipped,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Board> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
