//! The worker's side of the conversation as a pure state machine: inputs in, outputs out. No I/O, no
//! clock. The shell around it carries messages, drives the training thread and exits.

use musher_proto::{
    ids::{Generation, Term, WorkerId},
    job::JobConfig,
    message::{
        AtWork, DataWarning, Failed, Fenced, Finish, Form, FromWorker, Hello, Interrupted, Join, PROTOCOL,
        Progress, ReplicaLabel, Save, SegmentFinished, Synced, ToWorker, Train, Validate, Validated, Welcome,
    },
};

#[derive(Debug)]
pub enum Input {
    Received(Fenced<ToWorker>),
    /// The coordinator's stream ended, or none began.
    Disconnected {
        reason: String,
    },
    /// The coordinator, or the next one, is reached again.
    Connected,
    /// It was not reached for as long as the job allows.
    CoordinatorLost {
        reason: String,
    },
    /// What answers is something else.
    NoCoordinator {
        reason: String,
    },
    /// The data set's lists are read, and the replica stands warm: nobody will have to wait for it.
    Prepared(Join),
    NotPrepared {
        reason: String,
        /// Another start may end otherwise: what it lacked may be back, such as an object store.
        may_pass: bool,
    },
    DataWarned(DataWarning),
    /// From the training thread, about a generation.
    Reported {
        generation: Generation,
        report: Report,
    },
    HeartbeatDue(Progress),
    /// Somebody wants this worker to go (SIGTERM).
    LeaveWanted,
}

/// What the training thread has done.
#[derive(Debug)]
pub enum Report {
    Synced(Synced),
    SegmentFinished(SegmentFinished),
    Validated(Validated),
    /// It has left the generation.
    Left(Interrupted),
    Failed(Failed),
}

#[derive(Debug, PartialEq)]
pub enum Output {
    Send(Fenced<FromWorker>),
    /// Try to reach the coordinator until the job's patience is over.
    Reconnect,
    /// Read the data set's lists and build a replica.
    Prepare {
        job: Box<JobConfig>,
    },
    Command {
        generation: Generation,
        command: Command,
    },
    /// Break the exchange off, from this thread: the training thread may be inside it.
    AbortExchange,
    Exit(Exit),
}

/// What the training thread is to do next.
#[derive(Debug, PartialEq)]
pub enum Command {
    Form(Box<Form>),
    Train(Train),
    /// Stop after the step in flight.
    Pause,
    Validate(Validate),
    Save {
        term: Term,
        save: Save,
    },
    /// Drop out of the generation and report what is held.
    Leave,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    Finished,
    /// Stopped; the run can be resumed.
    Resumable,
    /// The run is over, or failed: nobody has any use for another start.
    Failed {
        reason: String,
    },
    /// This worker does not fit the run, and another start of it would not either; others may.
    Unfit {
        reason: String,
    },
    /// This process is spoilt; the worker's next one need not be.
    Broken {
        reason: String,
    },
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Session {
    identity: Identity,
    term: Term,
    link: Link,
    phase: Phase,
    /// The coordinator's first Welcome: a later one must be of the same run and job.
    welcome: Option<Welcome>,
    /// What it joins with, now and after a break of the link, but for what it holds by then.
    entry: Option<Join>,
    leave_wanted: bool,
}

#[derive(Debug, PartialEq)]
enum Link {
    /// Hello is sent, Welcome awaited.
    Greeting,
    Up,
    Down,
}

#[derive(Debug)]
enum Phase {
    /// Not welcomed yet, or preparing.
    Opening,
    /// Joined, or about to, in no generation.
    Idle {
        held: Option<ReplicaLabel>,
    },
    Member {
        generation: Generation,
        /// `None` while there is nothing that it could go on with by itself.
        work: Option<Work>,
    },
    /// The generation's coordinator was lost. To be joined again once the training thread has left.
    Returning {
        generation: Generation,
    },
    Leaving,
}

/// The segment that the training thread is at. It goes on with it while no coordinator is there.
#[derive(Debug)]
struct Work {
    train: Train,
    /// Kept, as the coordinator that was told may be gone.
    finished: Option<SegmentFinished>,
}

/// Who this worker is.
#[derive(Clone, Debug)]
pub struct Identity {
    pub worker: WorkerId,
    pub incarnation: u64,
    pub host: String,
    pub device: String,
}

impl Session {
    pub fn start(identity: Identity) -> (Self, Vec<Output>) {
        let session = Self {
            identity,
            term: Term(0),
            link: Link::Greeting,
            phase: Phase::Opening,
            welcome: None,
            entry: None,
            leave_wanted: false,
        };
        let outputs = vec![session.hello()];
        (session, outputs)
    }

    fn hello(&self) -> Output {
        let Identity { worker, incarnation, host, device } = self.identity.clone();
        let hello = Hello { protocol: PROTOCOL, worker, incarnation, host, device };
        self.send(Generation(0), FromWorker::Hello(hello))
    }

    pub fn handle(&mut self, input: Input) -> Vec<Output> {
        if let Phase::Leaving = self.phase {
            return Vec::new();
        }
        match input {
            Input::Received(message) => self.received(message),
            Input::Disconnected { .. } => self.disconnected(),
            Input::Connected => {
                self.link = Link::Greeting;
                vec![self.hello()]
            }
            Input::CoordinatorLost { reason } => {
                let setting = match self.welcome {
                    Some(_) => " (cluster.coordinator_timeout_s)",
                    None => "",
                };
                let reason = format!("the coordinator did not come back{setting}: {reason}");
                self.leave(Exit::Failed { reason })
            }
            Input::NoCoordinator { reason } => self.leave(Exit::Failed { reason }),
            Input::Prepared(entry) => {
                self.entry = Some(entry);
                self.phase = Phase::Idle { held: None };
                self.join(None, None)
            }
            Input::NotPrepared { reason, may_pass } => {
                let failed = FromWorker::Failed(Failed { reason: reason.clone(), any_worker: false });
                let mut outputs = self.say(Generation(0), failed);
                outputs.extend(self.leave(match may_pass {
                    true => Exit::Broken { reason },
                    false => Exit::Unfit { reason },
                }));
                outputs
            }
            Input::DataWarned(warning) => self.say(Generation(0), FromWorker::DataWarning(warning)),
            Input::Reported { generation, report } => self.reported(generation, report),
            Input::LeaveWanted => match (&self.phase, &self.link) {
                (Phase::Opening, _) | (_, Link::Down | Link::Greeting) => self.leave(Exit::Resumable),
                _ => {
                    self.leave_wanted = true;
                    self.say(Generation(0), FromWorker::Leaving)
                }
            },
            Input::HeartbeatDue(progress) => {
                let generation = match self.phase {
                    Phase::Member { generation, .. } => generation,
                    Phase::Opening | Phase::Idle { .. } | Phase::Returning { .. } | Phase::Leaving => {
                        Generation(0)
                    }
                };
                self.say(generation, FromWorker::Progress(progress))
            }
        }
    }

    /// Training goes on: the coordinator's next life, or the same one, takes up what is held by then.
    fn disconnected(&mut self) -> Vec<Output> {
        if self.leave_wanted {
            return self.leave(Exit::Resumable); // nobody is left to ask
        }
        self.link = Link::Down;
        vec![Output::Reconnect]
    }

    fn welcomed(&mut self, welcome: Welcome) -> Vec<Output> {
        self.link = Link::Up;
        let Some(first) = &self.welcome else {
            let job = JobConfig::from_json(&welcome.job_json);
            self.welcome = Some(welcome);
            return match job {
                Ok(job) => vec![Output::Prepare { job: Box::new(job) }],
                Err(why) => self.leave(Exit::Failed {
                    reason: format!(
                        "the coordinator's job can't be used ({why}): install the same version on both sides"
                    ),
                }),
            };
        };
        if first.run_id != welcome.run_id || !is_same_work(&first.job_json, &welcome.job_json) {
            let reason = "the coordinator came back with another run or job, for which this worker must be started again";
            return self.leave(Exit::Failed { reason: reason.into() });
        }
        match &self.phase {
            &Phase::Idle { held } => self.join(held, None),
            &Phase::Member { generation, work: Some(Work { train, finished }) } => {
                let mut outputs = self.join(None, Some(AtWork { generation, train }));
                let again = finished.map(|report| self.say(generation, FromWorker::SegmentFinished(report)));
                outputs.extend(again.into_iter().flatten());
                outputs
            }
            &Phase::Member { generation, work: None } => {
                self.phase = Phase::Returning { generation };
                vec![Output::AbortExchange, Output::Command { generation, command: Command::Leave }]
            }
            Phase::Opening | Phase::Returning { .. } | Phase::Leaving => Vec::new(),
        }
    }

    fn join(&self, held: Option<ReplicaLabel>, at_work: Option<AtWork>) -> Vec<Output> {
        let Some(entry) = self.entry.clone() else { return Vec::new() };
        self.say(Generation(0), FromWorker::Join(Join { held, at_work, ..entry }))
    }

    fn received(&mut self, Fenced { term, generation, body }: Fenced<ToWorker>) -> Vec<Output> {
        if term < self.term {
            if let ToWorker::Welcome(_) = body {
                let reason =
                    format!("the coordinator that answers is of term {term}, older than term {}", self.term);
                return self.leave(Exit::Failed { reason });
            }
            return Vec::new(); // from a coordinator that another has replaced
        }
        self.term = term;
        match (body, &mut self.phase) {
            (ToWorker::Refused { reason, may_pass }, _) => {
                let reason = format!("the coordinator refused this worker: {reason}");
                self.leave(if may_pass { Exit::Broken { reason } } else { Exit::Unfit { reason } })
            }
            (ToWorker::Finish(how), _) => {
                let mut outputs = self.say(Generation(0), FromWorker::Goodbye);
                outputs.extend(self.leave(match how {
                    Finish::Finished => Exit::Finished,
                    Finish::Stopped => Exit::Resumable,
                    Finish::Failed { reason } => Exit::Failed { reason: format!("the run failed: {reason}") },
                }));
                outputs
            }
            (ToWorker::Welcome(welcome), _) if self.link == Link::Greeting => self.welcomed(welcome),
            (ToWorker::Form(form), Phase::Idle { .. }) => self.form(generation, form),
            (ToWorker::Form(form), Phase::Member { generation: current, .. }) if generation > *current => {
                self.form(generation, form)
            }
            (body, Phase::Member { generation: current, work }) if generation == *current => {
                let command = match body {
                    ToWorker::Train(train) => {
                        *work = Some(Work { train, finished: None });
                        Command::Train(train)
                    }
                    ToWorker::Pause => Command::Pause,
                    ToWorker::Validate(validate) => {
                        *work = None;
                        Command::Validate(validate)
                    }
                    ToWorker::Save(save) => Command::Save { term, save },
                    ToWorker::Abort { .. } => {
                        *work = None;
                        return vec![
                            Output::AbortExchange,
                            Output::Command { generation, command: Command::Leave },
                        ];
                    }
                    ToWorker::Welcome(_)
                    | ToWorker::Form(_)
                    | ToWorker::Refused { .. }
                    | ToWorker::Finish(_) => {
                        return Vec::new();
                    }
                };
                vec![Output::Command { generation, command }]
            }
            // Of a generation that is over, or out of turn: it changes nothing.
            _ => Vec::new(),
        }
    }

    fn form(&mut self, generation: Generation, form: Form) -> Vec<Output> {
        self.phase = Phase::Member { generation, work: None };
        // A former generation's exchange has nobody left to talk to.
        vec![Output::AbortExchange, Output::Command { generation, command: Command::Form(Box::new(form)) }]
    }

    fn reported(&mut self, about: Generation, report: Report) -> Vec<Output> {
        let body = match (report, &mut self.phase) {
            (Report::Failed(failed), _) => {
                let reason = failed.reason.clone();
                let exit = if failed.any_worker { Exit::Failed { reason } } else { Exit::Broken { reason } };
                let mut outputs = self.say(Generation(0), FromWorker::Failed(failed));
                outputs.extend(self.leave(exit));
                return outputs;
            }
            (Report::Left(Interrupted { held, .. }), Phase::Returning { generation })
                if *generation == about =>
            {
                self.phase = Phase::Idle { held };
                return self.join(held, None);
            }
            (_, Phase::Member { generation, .. }) if *generation != about => return Vec::new(),
            (Report::Synced(synced), Phase::Member { .. }) => FromWorker::Synced(synced),
            (Report::SegmentFinished(report), Phase::Member { work, .. }) => {
                if let Some(work) = work {
                    work.finished = Some(report);
                }
                FromWorker::SegmentFinished(report)
            }
            (Report::Validated(validated), Phase::Member { .. }) => FromWorker::Validated(validated),
            (Report::Left(interrupted), Phase::Member { .. }) => {
                // It is said now, or in the Join with which a lost coordinator's successor is met.
                self.phase = Phase::Idle { held: interrupted.held };
                FromWorker::Interrupted(interrupted)
            }
            // What is dropped, the team that is formed next does again.
            _ => return Vec::new(),
        };
        self.say(about, body)
    }

    fn leave(&mut self, exit: Exit) -> Vec<Output> {
        self.phase = Phase::Leaving;
        vec![Output::AbortExchange, Output::Exit(exit)]
    }

    /// Says it to a coordinator that listens. What is said to nobody is not said later.
    fn say(&self, generation: Generation, body: FromWorker) -> Vec<Output> {
        match self.link {
            Link::Up => vec![self.send(generation, body)],
            Link::Greeting | Link::Down => Vec::new(),
        }
    }

    fn send(&self, generation: Generation, body: FromWorker) -> Output {
        Output::Send(Fenced { term: self.term, generation, body })
    }
}

/// Whether a worker does the same by both jobs. What only the coordinator goes by may differ.
fn is_same_work(then: &str, now: &str) -> bool {
    let of_workers = |json: &str| JobConfig::from_json(json).map(|job| job.of_workers());
    then == now || matches!((of_workers(then), of_workers(now)), (Ok(then), Ok(now)) if then == now)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use musher_proto::{
        ids::{Epoch, Rank, Step},
        message::{DataFacts, Start},
    };

    use super::*;

    fn identity() -> Identity {
        Identity { worker: "a.0".into(), incarnation: 1, host: "a".into(), device: "cpu".into() }
    }

    fn received(term: u64, generation: u64, body: ToWorker) -> Input {
        Input::Received(Fenced { term: Term(term), generation: Generation(generation), body })
    }

    fn first_welcome() -> Welcome {
        let job_json = serde_json::to_string(&JobConfig::default()).unwrap();
        Welcome { session: musher_proto::ids::Session(1), run: "pets".into(), run_id: "1".into(), job_json }
    }

    fn welcome() -> ToWorker {
        ToWorker::Welcome(first_welcome())
    }

    fn form() -> ToWorker {
        ToWorker::Form(Form {
            rank: Rank(0),
            world: 1,
            successor: "127.0.0.1:1".into(),
            secret: [0; 32],
            donor: Rank(0),
            broadcast: false,
            holds_it: false,
            start: Start::Seeded,
        })
    }

    fn joined() -> Session {
        let (mut session, _) = Session::start(identity());
        session.handle(received(3, 0, welcome()));
        let facts = DataFacts { digest: "d".into(), train_samples: 4, val_samples: 2 };
        session.handle(Input::Prepared(Join::of_newcomer(facts, "127.0.0.1:1", "cpu")));
        session
    }

    fn commands(outputs: &[Output]) -> Vec<&Command> {
        outputs
            .iter()
            .filter_map(|o| match o {
                Output::Command { command, .. } => Some(command),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn joins_after_welcome_and_with_its_term() {
        let (mut session, hello) = Session::start(identity());
        assert!(
            matches!(&hello[..], [Output::Send(Fenced { body: FromWorker::Hello(h), .. })] if h.protocol == PROTOCOL)
        );
        assert!(matches!(&session.handle(received(3, 0, welcome()))[..], [Output::Prepare { .. }]));
        let facts = DataFacts { digest: "d".into(), train_samples: 4, val_samples: 2 };
        let outputs = session.handle(Input::Prepared(Join::of_newcomer(facts, "x", "cpu")));
        assert!(matches!(
            &outputs[..],
            [Output::Send(Fenced { term: Term(3), body: FromWorker::Join(_), .. })]
        ));
    }

    #[test]
    fn orders_of_another_generation_or_an_older_term_change_nothing() {
        let mut session = joined();
        session.handle(received(3, 5, form()));
        let train = ToWorker::Train(Train { epoch: Epoch(1), cursor: 0, end: 4 });
        assert!(session.handle(received(3, 4, train.clone())).is_empty());
        assert!(session.handle(received(2, 5, train.clone())).is_empty());
        assert!(session.handle(received(3, 5, form())).is_empty(), "a generation is formed once");
        assert_eq!(commands(&session.handle(received(3, 5, train))).len(), 1);
    }

    #[test]
    fn reports_of_a_generation_that_is_over_are_dropped() {
        let mut session = joined();
        session.handle(received(3, 5, form()));
        session.handle(received(3, 6, form()));
        let left = || Report::Left(Interrupted { held: None, reason: String::new(), waited: None });
        assert!(session.handle(Input::Reported { generation: Generation(5), report: left() }).is_empty());
        assert_eq!(session.handle(Input::Reported { generation: Generation(6), report: left() }).len(), 1);
    }

    #[test]
    fn an_abort_breaks_the_exchange_before_it_asks_the_thread_to_leave() {
        let mut session = joined();
        session.handle(received(3, 5, form()));
        let outputs = session.handle(received(3, 5, ToWorker::Abort { reason: "rank 1 died".into() }));
        assert!(matches!(
            outputs[..],
            [Output::AbortExchange, Output::Command { command: Command::Leave, .. }]
        ));
    }

    #[test]
    fn a_member_that_is_wanted_gone_asks_to_be_let_go() {
        let mut session = joined();
        session.handle(received(3, 5, form()));
        let outputs = session.handle(Input::LeaveWanted);
        assert!(matches!(&outputs[..], [Output::Send(Fenced { body: FromWorker::Leaving, .. })]));
        let train = ToWorker::Train(Train { epoch: Epoch(1), cursor: 0, end: 4 });
        assert_eq!(commands(&session.handle(received(3, 5, train))).len(), 1, "until then it does its work");
    }

    #[test]
    fn each_end_has_its_exit() {
        for (how, exit) in [(Finish::Finished, Exit::Finished), (Finish::Stopped, Exit::Resumable)] {
            let outputs = joined().handle(received(3, 0, ToWorker::Finish(how)));
            assert!(matches!(&outputs[0], Output::Send(Fenced { body: FromWorker::Goodbye, .. })));
            assert_eq!(outputs.last(), Some(&Output::Exit(exit)));
        }
        let outputs = joined().handle(received(
            3,
            0,
            ToWorker::Refused { reason: "other data".into(), may_pass: false },
        ));
        assert!(
            matches!(outputs.last(), Some(Output::Exit(Exit::Unfit { reason })) if reason.contains("other data"))
        );
    }

    #[test]
    fn one_that_is_still_coming_looks_for_the_next_coordinator() {
        let facts = || DataFacts { digest: "d".into(), train_samples: 4, val_samples: 2 };
        let prepared = || Input::Prepared(Join::of_newcomer(facts(), "127.0.0.1:1", "cpu"));
        // Before it was welcomed.
        let (mut session, _) = Session::start(identity());
        assert_eq!(session.handle(lost()), [Output::Reconnect]);
        assert!(matches!(&session.handle(Input::Connected)[..], [Output::Send(_)]));
        assert!(matches!(&session.handle(received(3, 0, welcome()))[..], [Output::Prepare { .. }]));
        // While it prepares, which it does once.
        assert_eq!(session.handle(lost()), [Output::Reconnect]);
        session.handle(Input::Connected);
        assert!(session.handle(received(4, 0, welcome())).is_empty());
        assert_eq!(rejoined(&session.handle(prepared())), Some((4, None)));
        // It is prepared, and nobody is there to be told.
        let (mut session, _) = Session::start(identity());
        session.handle(received(3, 0, welcome()));
        session.handle(lost());
        assert!(session.handle(prepared()).is_empty());
        session.handle(Input::Connected);
        assert_eq!(rejoined(&session.handle(received(4, 0, welcome()))), Some((4, None)));
    }

    /// A coordinator is started again with what it listens at, keeps or stops by changed; workers do not care.
    #[test]
    fn it_goes_on_with_a_job_that_differs_for_the_coordinator_alone() {
        let returns = |change: fn(&mut JobConfig)| {
            let mut session = joined();
            session.handle(lost());
            session.handle(Input::Connected);
            let mut job = JobConfig::default();
            change(&mut job);
            let welcome = Welcome { job_json: serde_json::to_string(&job).unwrap(), ..first_welcome() };
            session.handle(received(4, 0, ToWorker::Welcome(welcome)))
        };
        let changes: [fn(&mut JobConfig); 4] = [
            |job| job.checkpoint.keep = 9,
            |job| job.server.grpc.set_port(1),
            |job| job.early_stopping.patience = 50,
            |job| job.cluster.workers = 7,
        ];
        for change in changes {
            assert_eq!(rejoined(&returns(change)), Some((4, None)));
        }
        let changes: [fn(&mut JobConfig); 3] = [
            |job| job.train.learning_rate = 0.5,
            |job| job.seed = 1,
            |job| job.cluster.step_timeout_s = 99.0,
        ];
        for change in changes {
            assert!(matches!(returns(change).last(), Some(Output::Exit(Exit::Failed { .. }))));
        }
    }

    #[test]
    fn where_no_coordinator_is_it_says_so() {
        let (mut session, _) = Session::start(identity());
        let reason = String::from("that is a web server");
        let outputs = session.handle(Input::NoCoordinator { reason: reason.clone() });
        assert_eq!(outputs.last(), Some(&Output::Exit(Exit::Failed { reason })));
    }

    #[test]
    fn a_job_that_makes_no_sense_is_not_begun() {
        let (mut session, _) = Session::start(identity());
        let mut welcome = first_welcome();
        welcome.job_json = r#"{"cluster": {"heartbeat_timeout_s": -1.0}}"#.into();
        let outputs = session.handle(received(3, 0, ToWorker::Welcome(welcome)));
        assert!(
            matches!(outputs.last(), Some(Output::Exit(Exit::Failed { reason })) if reason.contains("heartbeat_timeout_s")),
            "{outputs:?}"
        );
    }

    /// Its launcher goes by the difference.
    #[test]
    fn what_kept_it_from_preparing_may_have_passed_at_its_next_start() {
        for may_pass in [true, false] {
            let (mut session, _) = Session::start(identity());
            session.handle(received(3, 0, welcome()));
            let reason = String::from("the store can't be reached");
            let outputs = session.handle(Input::NotPrepared { reason: reason.clone(), may_pass });
            let told = |output: &Output| matches!(output, Output::Send(_));
            assert!(outputs.iter().any(told), "the coordinator hears why: {outputs:?}");
            let exit = if may_pass { Exit::Broken { reason } } else { Exit::Unfit { reason } };
            assert_eq!(outputs.last(), Some(&Output::Exit(exit)));
        }
    }

    fn lost() -> Input {
        Input::Disconnected { reason: "reset".into() }
    }

    fn held() -> ReplicaLabel {
        ReplicaLabel { lineage: Generation(5), applied: Step(7), epoch: Epoch(1), cursor: 4 }
    }

    fn left() -> Input {
        let report = Report::Left(Interrupted { held: Some(held()), reason: String::new(), waited: None });
        Input::Reported { generation: Generation(5), report }
    }

    /// What it joins again with, and the term in which it does.
    fn rejoined(outputs: &[Output]) -> Option<(u64, Option<ReplicaLabel>)> {
        match outputs {
            [Output::Send(Fenced { term, generation: Generation(0), body: FromWorker::Join(join) })] => {
                Some((term.0, join.held))
            }
            _ => None,
        }
    }

    #[test]
    fn a_member_outlives_its_coordinator_and_brings_what_it_holds_to_the_next() {
        for term in [3, 4] {
            let mut session = joined();
            session.handle(received(3, 5, form()));
            assert_eq!(session.handle(lost()), [Output::Reconnect]);
            let finished = Report::Validated(Validated {
                epoch: Epoch(1),
                state_digest: 1,
                units: Vec::new(),
                samples_png: Vec::new(),
            });
            let dropped = Input::Reported { generation: Generation(5), report: finished };
            assert!(session.handle(dropped).is_empty(), "nobody listens");
            assert!(matches!(
                &session.handle(Input::Connected)[..],
                [Output::Send(Fenced { body: FromWorker::Hello(hello), .. })] if hello.incarnation == 1
            ));
            let outputs = session.handle(received(term, 0, welcome()));
            assert!(matches!(
                outputs[..],
                [
                    Output::AbortExchange,
                    Output::Command { generation: Generation(5), command: Command::Leave }
                ]
            ));
            assert_eq!(rejoined(&session.handle(left())), Some((term, Some(held()))));
            assert!(session.handle(left()).is_empty(), "it joins once");
            assert_eq!(commands(&session.handle(received(term, 6, form()))).len(), 1);
        }
    }

    #[test]
    fn one_that_trains_goes_on_and_says_so_and_repeats_what_nobody_may_have_heard() {
        let train = Train { epoch: Epoch(1), cursor: 0, end: 4 };
        let finished = SegmentFinished {
            held: held(),
            paused: false,
            totals: musher_proto::message::EpochTotals::default(),
            state_digest: 1,
        };
        for done in [false, true] {
            let mut session = joined();
            session.handle(received(3, 5, form()));
            session.handle(received(3, 5, ToWorker::Train(train)));
            session.handle(lost());
            if done {
                let report = Report::SegmentFinished(finished);
                assert!(session.handle(Input::Reported { generation: Generation(5), report }).is_empty());
            }
            session.handle(Input::Connected);
            let outputs = session.handle(received(4, 0, welcome()));
            let said: Vec<_> = outputs
                .iter()
                .map(|output| match output {
                    Output::Send(Fenced { term: Term(4), generation, body }) => (generation.0, body),
                    other => panic!("it goes on, but {other:?}"),
                })
                .collect();
            let FromWorker::Join(join) = said[0].1 else { panic!("{said:?}") };
            assert_eq!((join.held, join.at_work), (None, Some(AtWork { generation: Generation(5), train })));
            let again = FromWorker::SegmentFinished(finished);
            assert_eq!(said[1..], if done { vec![(5, &again)] } else { vec![] });
            // The coordinator decides whether the generation goes on.
            let outputs =
                session.handle(received(4, 5, ToWorker::Abort { reason: "others are gone".into() }));
            assert_eq!(outputs[0], Output::AbortExchange);
            let outputs = session.handle(left());
            assert!(
                matches!(&outputs[..], [Output::Send(Fenced { generation: Generation(5), body: FromWorker::Interrupted(i), .. })] if i.held == Some(held()))
            );
        }
    }

    #[test]
    fn one_whose_generation_broke_while_nobody_listened_joins_with_what_it_holds() {
        let mut session = joined();
        session.handle(received(3, 5, form()));
        session.handle(received(3, 5, ToWorker::Train(Train { epoch: Epoch(1), cursor: 0, end: 4 })));
        session.handle(lost());
        assert!(session.handle(left()).is_empty());
        session.handle(Input::Connected);
        assert_eq!(rejoined(&session.handle(received(4, 0, welcome()))), Some((4, Some(held()))));
    }

    #[test]
    fn one_that_left_while_the_link_was_down_joins_at_once_and_may_lose_the_link_again() {
        let mut session = joined();
        session.handle(received(3, 5, form()));
        session.handle(lost());
        session.handle(Input::Connected);
        session.handle(received(4, 0, welcome()));
        session.handle(lost());
        assert!(session.handle(left()).is_empty());
        session.handle(Input::Connected);
        assert_eq!(rejoined(&session.handle(received(5, 0, welcome()))), Some((5, Some(held()))));
    }

    #[test]
    fn one_that_waited_for_work_joins_again_with_nothing() {
        let mut session = joined();
        session.handle(lost());
        session.handle(Input::Connected);
        assert_eq!(rejoined(&session.handle(received(4, 0, welcome()))), Some((4, None)));
    }

    #[test]
    fn a_coordinator_of_a_lower_term_or_another_job_gets_nothing() {
        let other = Welcome { run_id: "2".into(), ..first_welcome() };
        for (answer, word) in
            [(received(2, 0, welcome()), "term 2"), (received(4, 0, ToWorker::Welcome(other)), "another run")]
        {
            let mut session = joined();
            session.handle(received(3, 5, form()));
            session.handle(lost());
            session.handle(Input::Connected);
            let outputs = session.handle(answer);
            assert!(
                matches!(outputs.last(), Some(Output::Exit(Exit::Failed { reason })) if reason.contains(word))
            );
        }
    }

    #[test]
    fn without_a_coordinator_it_ends_when_told_to_or_when_its_patience_is_over() {
        let disconnected = || {
            let mut session = joined();
            session.handle(received(3, 5, form()));
            session.handle(lost());
            session
        };
        let outputs = disconnected().handle(Input::LeaveWanted);
        assert_eq!(outputs.last(), Some(&Output::Exit(Exit::Resumable)));
        let outputs = disconnected().handle(Input::CoordinatorLost { reason: "refused".into() });
        assert!(
            matches!(outputs.last(), Some(Output::Exit(Exit::Failed { reason })) if reason.contains("coordinator_timeout_s"))
        );
        let mut session = joined();
        session.handle(Input::LeaveWanted);
        assert_eq!(session.handle(lost()).last(), Some(&Output::Exit(Exit::Resumable)));
    }
}
