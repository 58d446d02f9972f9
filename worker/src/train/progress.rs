//! What the training thread is doing, for the heartbeat to read from another thread.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use musher_collective::Meter;
use musher_proto::message::{Activity, Phase, Progress, StepWaits};

use super::Position;

/// Rates are means over this time.
const WINDOW: Duration = Duration::from_secs(10);
/// Step times kept for medians and means.
const STEPS: usize = 33;

/// Written by the training thread a few times a step, read about once a second.
#[derive(Debug)]
pub struct ProgressBoard(Mutex<Board>);

#[derive(Debug)]
struct Board {
    phase: Phase,
    activity: Activity,
    /// The last sign of progress, what moves within an exchange not counted.
    since: Instant,
    /// It has completed a step of its generation.
    warm: bool,
    exchange: Option<Meter>,
    position: Position,
    loss: f64,
    /// (when, samples applied by then since the phase began)
    rate: VecDeque<(Instant, u64)>,
    /// Samples a second in the phase before.
    last_rate: f64,
    compute: VecDeque<Duration>,
    /// In the step in hand, up to the last mark.
    waited: Waited,
    waits: VecDeque<Waited>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Waited {
    data: Duration,
    peers: Duration,
}

impl Default for ProgressBoard {
    fn default() -> Self {
        Self(Mutex::new(Board {
            phase: Phase::Loading,
            activity: Activity::Working,
            since: Instant::now(),
            warm: false,
            exchange: None,
            position: Position::default(),
            loss: f64::NAN,
            rate: VecDeque::new(),
            last_rate: 0.0,
            compute: VecDeque::new(),
            waited: Waited::default(),
            waits: VecDeque::new(),
        }))
    }
}

impl ProgressBoard {
    /// A phase begins, with work.
    pub fn enter(&self, phase: Phase) {
        self.lock().enter(phase, Activity::Working);
    }

    /// A generation begins: its members connect, and what is slow once is before them.
    pub fn connects(&self) {
        let mut board = self.lock();
        board.enter(Phase::Connecting, Activity::WaitingForPeers);
        board.warm = false;
        board.exchange = None;
        // With another world size, this rank's share is another.
        board.last_rate = 0.0;
        board.compute.clear();
        board.waits.clear();
    }

    /// They are connected. While this rank waits for its peers, what moves there is a sign of progress.
    pub fn connected(&self, exchange: Meter) {
        self.lock().exchange = Some(exchange);
    }

    /// A sign of progress: it turns to this, or to the next piece of it.
    pub fn mark(&self, activity: Activity) {
        self.lock().turn_to(activity);
    }

    /// A step is applied: `samples` of the whole team; `compute` is this rank's own part of the time.
    pub fn stepped(&self, position: Position, loss: f64, samples: u64, compute: Duration) {
        let mut board = self.lock();
        let activity = board.activity;
        board.turn_to(activity);
        let now = board.since;
        board.warm = true;
        board.position = position;
        board.loss = loss;
        let total = board.rate.back().map_or(0, |&(_, total)| total) + samples;
        board.rate.push_back((now, total));
        while board.rate.len() > 2 && board.rate.front().is_some_and(|&(then, _)| now - then > WINDOW) {
            board.rate.pop_front();
        }
        let waited = std::mem::take(&mut board.waited);
        keep(&mut board.waits, waited);
        keep(&mut board.compute, compute);
    }

    pub fn moved(&self, position: Position) {
        self.lock().position = position;
    }

    pub fn read(&self) -> Progress {
        let board = self.lock();
        let mut compute: Vec<_> = board.compute.iter().collect();
        compute.sort_unstable();
        let Position { applied, epoch, cursor, totals, .. } = board.position;
        Progress {
            phase: board.phase,
            activity: board.activity,
            in_activity_ms: board.last_sign().elapsed().as_millis() as u64,
            warm: board.warm,
            applied,
            epoch,
            cursor,
            loss: board.loss,
            images_per_second: board.rate(),
            waits: board.mean_waits(),
            step_ms: compute.get(compute.len() / 2).map_or(0.0, |time| time.as_secs_f64() * 1e3),
            steps_skipped: totals.steps_skipped,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Board> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Board {
    fn enter(&mut self, phase: Phase, activity: Activity) {
        (self.phase, self.activity) = (phase, activity);
        self.since = Instant::now();
        self.waited = Waited::default();
        self.last_rate = self.rate();
        self.rate.clear();
        self.rate.push_back((self.since, 0));
    }

    /// Samples a second: in this phase, or in that before until there is a figure.
    fn rate(&self) -> f64 {
        match (self.rate.front(), self.rate.back()) {
            (Some(&(start, from)), Some(&(end, to))) if to > from => {
                (to - from) as f64 / (end - start).as_secs_f64()
            }
            _ => self.last_rate,
        }
    }

    /// The time since the last mark was the former activity's.
    fn turn_to(&mut self, activity: Activity) {
        let now = Instant::now();
        match self.activity {
            Activity::Working => {}
            Activity::WaitingForData => self.waited.data += now - self.since,
            Activity::WaitingForPeers => self.waited.peers += now - self.since,
        }
        (self.activity, self.since) = (activity, now);
    }

    fn mean_waits(&self) -> StepWaits {
        let mean_ms = |part: fn(&Waited) -> Duration| {
            let total: Duration = self.waits.iter().map(part).sum();
            total.as_secs_f64() * 1e3 / self.waits.len().max(1) as f64
        };
        StepWaits { data_ms: mean_ms(|waited| waited.data), peers_ms: mean_ms(|waited| waited.peers) }
    }

    fn last_sign(&self) -> Instant {
        match (self.activity, &self.exchange) {
            (Activity::WaitingForPeers, Some(exchange)) => self.since.max(exchange.last_moved()),
            _ => self.since,
        }
    }
}

fn keep<T>(times: &mut VecDeque<T>, newest: T) {
    times.push_back(newest);
    if times.len() > STEPS {
        times.pop_front();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::Ipv4Addr;

    use musher_collective::{Aborter, Collective, Purpose, RingListener, RingSpec, Secret};

    use super::*;

    /// Of an exchange that is formed just now.
    fn meter() -> Meter {
        let listener = RingListener::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let spec = RingSpec {
            generation: 1,
            purpose: Purpose::Steps,
            rank: 0,
            world: 1,
            successor: listener.local_addr().unwrap(),
            secret: Secret([0; 32]),
            patience: Duration::MAX,
        };
        let ring = listener.form(&spec, Instant::now(), &Aborter::new().unwrap());
        ring.unwrap().meter()
    }

    fn wait_ms(board: &ProgressBoard, ms: u64) {
        while board.read().in_activity_ms < ms {
            std::hint::spin_loop();
        }
    }

    fn shows(board: &ProgressBoard) -> (Phase, Activity, bool) {
        let Progress { phase, activity, warm, .. } = board.read();
        (phase, activity, warm)
    }

    #[test]
    fn a_generation_is_warm_after_its_first_step() {
        let board = ProgressBoard::default();
        assert_eq!(shows(&board), (Phase::Loading, Activity::Working, false));
        for _ in 0..2 {
            board.connects();
            assert_eq!(shows(&board), (Phase::Connecting, Activity::WaitingForPeers, false));
            assert_eq!(board.read().step_ms, 0.0, "what it took in another team says nothing");
            board.enter(Phase::Training);
            board.mark(Activity::WaitingForData);
            assert_eq!(shows(&board), (Phase::Training, Activity::WaitingForData, false));
            board.stepped(Position::default(), 1.0, 4, Duration::from_millis(7));
            assert_eq!(board.read().step_ms, 7.0);
            board.enter(Phase::Validating);
            assert_eq!(shows(&board), (Phase::Validating, Activity::Working, true));
        }
    }

    #[test]
    fn each_mark_is_a_sign_of_progress() {
        let board = ProgressBoard::default();
        let marks: [&dyn Fn(); 4] = [
            &|| board.mark(Activity::Working),
            &|| board.mark(Activity::Working),
            &|| board.enter(Phase::Idle),
            &|| board.stepped(Position::default(), 1.0, 4, Duration::ZERO),
        ];
        for mark in marks {
            wait_ms(&board, 20);
            mark();
            assert!(board.read().in_activity_ms < 20);
        }
    }

    #[test]
    fn waits_are_told_apart_and_belong_to_their_step() {
        let board = ProgressBoard::default();
        board.enter(Phase::Training);
        board.mark(Activity::WaitingForData);
        wait_ms(&board, 30);
        board.mark(Activity::Working);
        wait_ms(&board, 10);
        board.mark(Activity::WaitingForPeers);
        wait_ms(&board, 20);
        board.mark(Activity::Working);
        assert_eq!(board.read().waits, StepWaits::default(), "the step is not over");
        board.stepped(Position::default(), 1.0, 4, Duration::ZERO);
        let StepWaits { data_ms, peers_ms } = board.read().waits;
        assert!(data_ms >= 30.0 && (20.0..data_ms).contains(&peers_ms), "{data_ms} {peers_ms}");
        board.stepped(Position::default(), 1.0, 4, Duration::ZERO);
        assert!(board.read().waits.data_ms <= data_ms * 0.6, "a mean over steps");
        board.connects();
        assert_eq!(board.read().waits, StepWaits::default());
    }

    #[test]
    fn what_moves_in_the_exchange_is_a_sign_for_one_that_waits_for_it_alone() {
        let board = ProgressBoard::default();
        for (activity, is_sign) in
            [(Activity::Working, false), (Activity::WaitingForData, false), (Activity::WaitingForPeers, true)]
        {
            board.connects();
            board.mark(activity);
            wait_ms(&board, 50);
            board.connected(meter());
            assert_eq!(board.read().in_activity_ms < 50, is_sign, "{activity:?}");
        }
    }
}
