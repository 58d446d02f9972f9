//! Many workers: what is sent grows as their number does, and a message costs as little as with few.

use std::time::Duration;

use musher_proto::{
    ids::{Epoch, Generation, Session, Step, Term},
    job::JobConfig,
    message::{
        Activity, DataFacts, Fenced, FromWorker, Hello, Join, PROTOCOL, Phase, Progress, ReplicaLabel,
        StepWaits, Synced, ToWorker,
    },
    wire,
};
use prost::Message;

use crate::core::{Action, Core, Event, Fences, Origin, RunState, Time};

/// The core with a crowd that trains, and what it has sent so far.
struct Crowd {
    core: Core,
    now: Time,
    sent: Vec<(Session, Fenced<ToWorker>)>,
    persisted: usize,
}

impl Crowd {
    fn gathered(workers: u32) -> Self {
        let mut job = JobConfig::default();
        (job.cluster.workers, job.cluster.max_workers) = (workers, workers + 100);
        let fences = Fences { term: Term(1), ..Fences::default() };
        let state = RunState { fences, ..RunState::default() };
        let origin = Origin { job, run: "r".into(), state, resumed: None, entropy: [7; 32], listen: false };
        let (core, _) = Core::start(origin, Duration::ZERO);
        let mut crowd = Self { core, now: Duration::ZERO, sent: Vec::new(), persisted: 0 };
        (0..workers).for_each(|number| crowd.comes(number));
        crowd
    }

    fn training(workers: u32) -> Self {
        let mut crowd = Self::gathered(workers);
        crowd.all_say(|_| FromWorker::Synced(synced()));
        assert!(crowd.orders().any(|order| matches!(order, ToWorker::Train(_))));
        crowd
    }

    fn comes(&mut self, number: u32) {
        let session = Session(u64::from(number) + 1);
        let hello = Hello {
            protocol: PROTOCOL,
            worker: format!("node{number:05}").as_str().into(),
            incarnation: 1,
            host: format!("node{number:05}"),
            device: "cpu".into(),
        };
        self.handle(Event::SessionOpened { session, hello });
        let data = DataFacts { digest: "d".into(), train_samples: 1_000_000_000, val_samples: 100 };
        let ring_address = format!("10.0.{}.{}:29400", number >> 8, number & 255);
        self.say(session, FromWorker::Join(Join::of_newcomer(data, ring_address, "cpu")));
    }

    fn say(&mut self, session: Session, body: FromWorker) {
        let generation = match body {
            FromWorker::Join(_) => Generation(0),
            _ => Generation(1),
        };
        let message = Fenced { term: Term(1), generation, body };
        self.handle(Event::MessageReceived { session, message });
    }

    fn all_say(&mut self, what: impl Fn(u32) -> FromWorker) {
        let sessions: Vec<Session> = self.core.peers.iter().map(|(&session, _)| session).collect();
        for (session, number) in sessions.into_iter().zip(0..) {
            self.say(session, what(number));
        }
    }

    fn handle(&mut self, event: Event) {
        for action in self.core.handle(self.now, event) {
            match action {
                Action::Send { session, message } => self.sent.push((session, message)),
                Action::Persist(_) => self.persisted += 1,
                _ => {}
            }
        }
    }

    fn orders(&self) -> impl Iterator<Item = &ToWorker> {
        self.sent.iter().map(|(_, message)| &message.body)
    }

    fn bytes_sent(&self) -> usize {
        let size = |message: &Fenced<ToWorker>| wire::CoordinatorMessage::from(message.clone()).encoded_len();
        self.sent.iter().map(|(_, message)| size(message)).sum()
    }
}

fn synced() -> Synced {
    let held = ReplicaLabel { lineage: Generation(1), applied: Step(0), epoch: Epoch(0), cursor: 0 };
    Synced { held, state_digest: 1, state_bytes: 40, pretrained: None }
}

fn progress(step_ms: f64) -> Progress {
    Progress {
        phase: Phase::Training,
        activity: Activity::Working,
        in_activity_ms: 10,
        warm: true,
        applied: Step(1),
        epoch: Epoch(1),
        cursor: 32,
        loss: 1.0,
        images_per_second: 100.0,
        waits: StepWaits::default(),
        step_ms,
        steps_skipped: 0,
    }
}

/// Were each told of all, it would be the square: a hundred times as much.
#[test]
fn forming_sends_as_many_bytes_as_there_are_workers() {
    let bytes = |workers| Crowd::training(workers).bytes_sent();
    let (few, many) = (bytes(200), bytes(2000));
    assert!(many <= few * 11, "{few} bytes for 200 workers, {many} for 2000");
}

#[test]
fn forming_writes_the_state_as_often_as_for_two() {
    assert_eq!(Crowd::training(2).persisted, Crowd::training(500).persisted);
}

/// A message that is one too many for each of those that come is the square of them.
#[test]
fn a_team_is_told_once_to_pause_however_many_come() {
    let mut crowd = Crowd::training(50);
    let before = crowd.sent.len();
    (50..80).for_each(|number| crowd.comes(number));
    let pauses = crowd.sent[before..].iter().filter(|(_, message)| message.body == ToWorker::Pause).count();
    assert_eq!(pauses, 50);
}

#[test]
fn heartbeats_are_answered_with_nothing_and_put_deadlines_off() {
    let mut crowd = Crowd::training(300);
    let timeout = crowd.core.heartbeat_timeout();
    for second in 1..=30 {
        crowd.now = Duration::from_secs(second);
        let before = crowd.sent.len();
        crowd.all_say(|number| FromWorker::Progress(progress(100.0 + f64::from(number % 7))));
        assert_eq!(crowd.sent.len(), before);
        assert!(crowd.core.overdue_at() <= Some(crowd.now + timeout));
        assert!(crowd.core.overdue_at() > Some(crowd.now), "nobody is overdue");
    }
    let silent = crowd.now + timeout;
    while let Some(asked) = crowd.core.overdue_at().filter(|at| *at <= silent) {
        assert!(asked > crowd.now, "it has looked at {asked:?}");
        crowd.now = asked;
        crowd.handle(Event::TimePassed);
    }
    assert_eq!(crowd.core.status(crowd.now).peers.len(), 0, "all have fallen silent");
}
