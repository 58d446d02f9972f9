//! The worker's side of the conversation as a pure state machine: inputs in, outputs out. No I/O, no
//! clock. The shell around it carries messages, drives the training thread and exits.

use musher_proto::{
    ids::{Generation, Term, WorkerId},
    job::JobConfig,
    message::{
        DataFacts, DataWarning, Failed, Fenced, Finish, Form, FromWorker, Hello, Interrupted, Join, PROTOCOL,
        Progress, Save, SegmentFinished, Synced, ToWorker, Train, Validate, Validated,
    },
};

#[derive(Debug)]
pub enum Input {
    Received(Fenced<ToWorker>),
    /// The coordinator's stream ended.
    Disconnected {
        reason: String,
    },
    /// The data set is open, its lists read.
    DataOpened {
        facts: DataFacts,
        ring_address: String,
    },
    DataFailed {
        reason: String,
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
    OpenData {
        job: Box<JobConfig>,
    },
    /// Start the training thread with the data that was opened.
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
    Failed {
        reason: String,
    },
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Session {
    term: Term,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// Hello is sent.
    Greeting,
    /// Reading the lists of the job's data set.
    Opening,
    /// Joined, in no generation.
    Idle,
    Member {
        generation: Generation,
    },
    Leaving,
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
        let session = Self { term: Term(0), phase: Phase::Greeting };
        let hello = FromWorker::Hello(Hello {
            protocol: PROTOCOL,
            worker: identity.worker,
            incarnation: identity.incarnation,
            host: identity.host,
            device: identity.device,
        });
        let outputs = vec![session.send(Generation(0), hello)];
        (session, outputs)
    }

    pub fn handle(&mut self, input: Input) -> Vec<Output> {
        if let Phase::Leaving = self.phase {
            return Vec::new();
        }
        match input {
            Input::Received(message) => self.received(message),
            Input::Disconnected { reason } => {
                self.leave(Exit::Failed { reason: format!("the coordinator is gone: {reason}") })
            }
            Input::DataOpened { facts, ring_address } => {
                self.phase = Phase::Idle;
                vec![
                    self.send(
                        Generation(0),
                        FromWorker::Join(Join { data: facts, ring_address, held: None }),
                    ),
                ]
            }
            Input::DataFailed { reason } => {
                let failed = FromWorker::Failed(Failed { reason: reason.clone(), any_worker: false });
                let mut outputs = vec![self.send(Generation(0), failed)];
                outputs.extend(self.leave(Exit::Failed { reason }));
                outputs
            }
            Input::DataWarned(warning) => vec![self.send(Generation(0), FromWorker::DataWarning(warning))],
            Input::Reported { generation, report } => self.reported(generation, report),
            Input::LeaveWanted => match self.phase {
                Phase::Greeting | Phase::Opening => self.leave(Exit::Resumable),
                Phase::Idle | Phase::Member { .. } | Phase::Leaving => {
                    vec![self.send(Generation(0), FromWorker::Leaving)]
                }
            },
            Input::HeartbeatDue(progress) => match self.phase {
                Phase::Greeting | Phase::Leaving => Vec::new(),
                Phase::Opening | Phase::Idle => {
                    vec![self.send(Generation(0), FromWorker::Progress(progress))]
                }
                Phase::Member { generation } => vec![self.send(generation, FromWorker::Progress(progress))],
            },
        }
    }

    fn received(&mut self, Fenced { term, generation, body }: Fenced<ToWorker>) -> Vec<Output> {
        if term < self.term {
            return Vec::new(); // from a coordinator that another has replaced
        }
        self.term = term;
        match (body, &self.phase) {
            (ToWorker::Refused { reason }, _) => {
                self.leave(Exit::Failed { reason: format!("the coordinator refused this worker: {reason}") })
            }
            (ToWorker::Finish(how), _) => {
                let mut outputs = vec![self.send(Generation(0), FromWorker::Goodbye)];
                outputs.extend(self.leave(match how {
                    Finish::Finished => Exit::Finished,
                    Finish::Stopped => Exit::Resumable,
                    Finish::Failed { reason } => Exit::Failed { reason: format!("the run failed: {reason}") },
                }));
                outputs
            }
            (ToWorker::Welcome(welcome), Phase::Greeting) => match serde_json::from_str(&welcome.job_json) {
                Ok(job) => {
                    self.phase = Phase::Opening;
                    vec![Output::OpenData { job: Box::new(job) }]
                }
                Err(error) => self.leave(Exit::Failed {
                    reason: format!("the coordinator's job can't be read ({error}): install the same version on both sides"),
                }),
            },
            (ToWorker::Form(form), Phase::Idle) => self.form(generation, form),
            (ToWorker::Form(form), &Phase::Member { generation: current }) if generation > current => {
                self.form(generation, form)
            }
            (body, &Phase::Member { generation: current }) if generation == current => {
                let command = match body {
                    ToWorker::Train(train) => Command::Train(train),
                    ToWorker::Pause => Command::Pause,
                    ToWorker::Validate(validate) => Command::Validate(validate),
                    ToWorker::Save(save) => Command::Save { term, save },
                    ToWorker::Abort { .. } => {
                        return vec![Output::AbortExchange, Output::Command { generation, command: Command::Leave }];
                    }
                    ToWorker::Welcome(_) | ToWorker::Form(_) | ToWorker::Refused { .. } | ToWorker::Finish(_) => {
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
        self.phase = Phase::Member { generation };
        // A former generation's exchange has nobody left to talk to.
        vec![Output::AbortExchange, Output::Command { generation, command: Command::Form(Box::new(form)) }]
    }

    fn reported(&mut self, about: Generation, report: Report) -> Vec<Output> {
        let current = matches!(self.phase, Phase::Member { generation } if generation == about);
        let body = match report {
            Report::Failed(failed) => {
                let reason = failed.reason.clone();
                let mut outputs = vec![self.send(Generation(0), FromWorker::Failed(failed))];
                outputs.extend(self.leave(Exit::Failed { reason }));
                return outputs;
            }
            _ if !current => return Vec::new(),
            Report::Synced(synced) => FromWorker::Synced(synced),
            Report::SegmentFinished(finished) => FromWorker::SegmentFinished(finished),
            Report::Validated(validated) => FromWorker::Validated(validated),
            Report::Left(interrupted) => FromWorker::Interrupted(interrupted),
        };
        vec![self.send(about, body)]
    }

    fn leave(&mut self, exit: Exit) -> Vec<Output> {
        self.phase = Phase::Leaving;
        vec![Output::AbortExchange, Output::Exit(exit)]
    }

    fn send(&self, generation: Generation, body: FromWorker) -> Output {
        Output::Send(Fenced { term: self.term, generation, body })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use musher_proto::{
        ids::{Epoch, Rank},
        message::{Member, Start, Welcome},
    };

    use super::*;

    fn identity() -> Identity {
        Identity { worker: "a.0".into(), incarnation: 1, host: "a".into(), device: "cpu".into() }
    }

    fn received(term: u64, generation: u64, body: ToWorker) -> Input {
        Input::Received(Fenced { term: Term(term), generation: Generation(generation), body })
    }

    fn welcome() -> ToWorker {
        let job_json = serde_json::to_string(&JobConfig::default()).unwrap();
        ToWorker::Welcome(Welcome { session: musher_proto::ids::Session(1), run: "pets".into(), job_json })
    }

    fn form() -> ToWorker {
        ToWorker::Form(Form {
            rank: Rank(0),
            roster: vec![Member { worker: "a.0".into(), ring_address: "127.0.0.1:1".into() }],
            secret: [0; 32],
            donor: Rank(0),
            broadcast: false,
            start: Start::Seeded,
        })
    }

    fn joined() -> Session {
        let (mut session, _) = Session::start(identity());
        session.handle(received(3, 0, welcome()));
        let facts = DataFacts { digest: "d".into(), train_samples: 4, val_samples: 2 };
        session.handle(Input::DataOpened { facts, ring_address: "127.0.0.1:1".into() });
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
        assert!(matches!(&session.handle(received(3, 0, welcome()))[..], [Output::OpenData { .. }]));
        let facts = DataFacts { digest: "d".into(), train_samples: 4, val_samples: 2 };
        let outputs = session.handle(Input::DataOpened { facts, ring_address: "x".into() });
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
        let left = || Report::Left(Interrupted { held: None, reason: String::new(), suspect: None });
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
        let outputs = joined().handle(received(3, 0, ToWorker::Refused { reason: "other data".into() }));
        assert!(
            matches!(outputs.last(), Some(Output::Exit(Exit::Failed { reason })) if reason.contains("other data"))
        );
        let outputs = joined().handle(Input::Disconnected { reason: "reset".into() });
        assert!(
            matches!(outputs.last(), Some(Output::Exit(Exit::Failed { reason })) if reason.contains("reset"))
        );
    }
}
