//! Which spans a run has: the core's actions and their times go in, ended spans come out.
//!
//! A generation is one trace. Its root lasts from the order to form until the team is another, or none; below it
//! are `form`, `sync`, `epoch` and `validate`, one after the other, and `checkpoint`, which may outlive it. Ids
//! follow from the run and the generation: a generation that goes on under a new coordinator keeps its trace.

use std::mem;

use musher_proto::{
    ids::{CheckpointId, Epoch, Generation, Step, Term},
    message::{Form, ToWorker, Train, Validate},
};
use opentelemetry::{
    KeyValue,
    trace::{SpanId, TraceId},
};
use sha2::{Digest, Sha256};

use crate::core::{Action, Origin, RunEvent, Time};

/// As many as OpenTelemetry's own limit.
const MOST_EVENTS: usize = 128;

/// A span that has ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Span {
    pub at: Place,
    pub parent: Option<SpanId>,
    /// What came before.
    pub link: Option<Place>,
    pub name: &'static str,
    pub begun: Time,
    pub ended: Time,
    pub attributes: Vec<KeyValue>,
    pub events: Vec<SpanEvent>,
    /// Why it did not end well.
    pub error: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub trace: TraceId,
    pub span: SpanId,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SpanEvent {
    pub name: &'static str,
    pub at: Time,
    pub attributes: Vec<KeyValue>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Spans {
    run: String,
    run_id: String,
    term: Term,
    /// The newest generation that has ended, in an earlier life of the coordinator perhaps.
    before: Option<Generation>,
    generation: Option<Live>,
    /// There is one at a time. It belongs to the generation in which it was opened.
    checkpoint: Option<(CheckpointId, Span)>,
    /// The newest that is known to be applied.
    step: Step,
    /// Spans begun, roots not counted.
    begun: u64,
    ended: Vec<Span>,
}

/// The generation that the team is in.
#[derive(Debug)]
struct Live {
    generation: Generation,
    root: Span,
    stage: Option<Stage>,
}

/// What its team is at.
#[derive(Debug)]
struct Stage {
    what: What,
    span: Span,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Form,
    Sync,
    Epoch(Epoch),
    Validate(Epoch),
}

impl What {
    fn name(self) -> &'static str {
        match self {
            What::Form => "form",
            What::Sync => "sync",
            What::Epoch(_) => "epoch",
            What::Validate(_) => "validate",
        }
    }
}

impl Spans {
    pub fn of(origin: &Origin) -> Self {
        let fences = origin.state.fences;
        Self {
            run: origin.run.clone(),
            run_id: origin.state.id.clone(),
            term: fences.term,
            before: Some(fences.generation).filter(|generation| *generation != Generation(0)),
            generation: None,
            checkpoint: None,
            step: origin.resumed.as_ref().map(|point| point.position.applied).unwrap_or_default(),
            begun: 0,
            ended: Vec::new(),
        }
    }

    /// Returns the spans that end with this.
    pub fn observe(&mut self, now: Time, action: &Action) -> Vec<Span> {
        match action {
            Action::Send { message, .. } => match &message.body {
                ToWorker::Form(form) => self.forms(message.generation, form, now),
                ToWorker::Train(train) => self.trains(message.generation, train, now),
                ToWorker::Validate(validate) => self.validates(message.generation, validate, now),
                ToWorker::Welcome(_)
                | ToWorker::Refused { .. }
                | ToWorker::Pause
                | ToWorker::Save(_)
                | ToWorker::Abort { .. }
                | ToWorker::Finish(_) => {}
            },
            Action::OpenCheckpoint { checkpoint, .. } => self.saves(checkpoint, now),
            Action::Emit(event) => self.told(event, now),
            Action::Persist(_)
            | Action::CloseSession { .. }
            | Action::CommitCheckpoint(_)
            | Action::AbandonCheckpoint { .. } // and why is told after it
            | Action::WriteSamples { .. }
            | Action::End(_) => {}
        }
        mem::take(&mut self.ended)
    }

    /// Each member is sent the order; the first begins the generation.
    fn forms(&mut self, generation: Generation, form: &Form, now: Time) {
        if self.is_live(generation) {
            return;
        }
        self.end_generation(None, now);
        self.begin_generation(generation, form.world, now);
        self.begin(What::Form, now);
    }

    fn trains(&mut self, generation: Generation, train: &Train, now: Time) {
        if self.is_live(generation) {
            self.be_at(What::Epoch(train.epoch), now);
        }
    }

    fn validates(&mut self, generation: Generation, validate: &Validate, now: Time) {
        if !self.is_live(generation) {
            return;
        }
        if let Some(Live { stage: Some(Stage { what: What::Epoch(_), span }), .. }) = &mut self.generation {
            span.attributes.push(KeyValue::new("musher.epoch.finished", true));
        }
        self.be_at(What::Validate(validate.epoch), now);
    }

    fn saves(&mut self, checkpoint: &CheckpointId, now: Time) {
        self.end_checkpoint(Some("another was taken in its place".into()), Vec::new(), now);
        let Some(mut span) = self.child("checkpoint", now) else { return };
        span.attributes.push(KeyValue::new("musher.checkpoint.id", checkpoint.to_string()));
        self.checkpoint = Some((checkpoint.clone(), span));
    }

    fn told(&mut self, event: &RunEvent, now: Time) {
        match event {
            RunEvent::TeamConnected { generation, .. } if self.is_live(*generation) => {
                self.be_at(What::Sync, now);
            }
            RunEvent::GenerationFormed { generation, donor, applied, .. } if self.is_live(*generation) => {
                self.step = *applied;
                self.end_stage(None, now);
                if let Some(live) = &mut self.generation {
                    live.root.attributes.push(KeyValue::new("musher.donor", donor.to_string()));
                    live.root.attributes.push(step("musher.step.begin", *applied));
                }
            }
            RunEvent::TeamConnected { .. } | RunEvent::GenerationFormed { .. } => {}
            RunEvent::GenerationContinued { generation, world_size } => {
                self.begin_generation(*generation, *world_size, now);
                if let Some(live) = &mut self.generation {
                    live.root.link = None;
                    live.root.attributes.push(KeyValue::new("musher.generation.continued", true));
                }
            }
            RunEvent::GenerationAborted { cause, .. } => {
                if let Some(live) = &mut self.generation {
                    live.root.attributes.push(KeyValue::new("error.type", cause.cause()));
                }
                self.end_generation(Some(cause.to_string()), now);
            }
            RunEvent::Progress(report) => {
                self.step = report.step;
                // A generation that was continued was not told anew what to train on.
                if self.generation.as_ref().is_some_and(|live| live.stage.is_none()) {
                    self.begin(What::Epoch(report.epoch), now);
                }
            }
            RunEvent::EpochFinished { epoch, step, samples, train_loss, images_per_second, .. } => {
                self.step = *step;
                self.add_to(
                    What::Epoch(*epoch),
                    [
                        KeyValue::new("musher.samples", whole(*samples)),
                        KeyValue::new("musher.train_loss", *train_loss),
                        KeyValue::new("musher.images_per_second", *images_per_second),
                    ],
                );
            }
            RunEvent::Validated { epoch, scores, .. } => {
                let what = What::Validate(*epoch);
                self.add_to(
                    what,
                    [
                        KeyValue::new("musher.samples", whole(scores.samples)),
                        KeyValue::new("musher.val_loss", scores.loss),
                        KeyValue::new("musher.val_accuracy", scores.accuracy),
                        KeyValue::new("musher.val_miou", scores.miou),
                    ],
                );
                if self.is_at(what) {
                    self.end_stage(None, now);
                }
            }
            RunEvent::CheckpointCommitted { epoch, step: applied, bytes, stall_ms, .. } => {
                let attributes = vec![
                    KeyValue::new("musher.epoch", i64::from(epoch.0)),
                    step("musher.step", *applied),
                    KeyValue::new("musher.checkpoint.size_bytes", whole(*bytes)),
                    KeyValue::new("musher.checkpoint.stall_ms", *stall_ms),
                ];
                self.end_checkpoint(None, attributes, now);
            }
            RunEvent::CheckpointFailed { reason, .. } => {
                self.end_checkpoint(Some(reason.clone()), Vec::new(), now);
            }
            RunEvent::WorkerLeft { worker, departure, .. } => self.note(
                "worker_left",
                vec![
                    KeyValue::new("musher.worker", worker.to_string()),
                    KeyValue::new("musher.cause", departure.cause()),
                    KeyValue::new("musher.reason", departure.to_string()),
                ],
                now,
            ),
            RunEvent::WorkerReturned { worker, .. } => {
                self.note("worker_returned", vec![KeyValue::new("musher.worker", worker.to_string())], now);
            }
            RunEvent::WorkerSlow { worker, step_ms, median_ms, .. } => self.note(
                "worker_slow",
                vec![
                    KeyValue::new("musher.worker", worker.to_string()),
                    KeyValue::new("musher.step_ms", *step_ms),
                    KeyValue::new("musher.median_ms", *median_ms),
                ],
                now,
            ),
            // The team has come apart between two steps, for want of members.
            RunEvent::WaitingForWorkers { .. } => self.end_generation(None, now),
            RunEvent::RunFinished { .. } => {
                self.end_generation(None, now);
                self.end_checkpoint(Some("the run ended before it was durable".into()), Vec::new(), now);
            }
            RunEvent::RunFailed { reason } => {
                self.end_generation(Some(reason.clone()), now);
                self.end_checkpoint(Some(reason.clone()), Vec::new(), now);
            }
            RunEvent::RunStarted { .. }
            | RunEvent::CoordinatorRestarted { .. }
            | RunEvent::WorkerJoined { .. }
            | RunEvent::WorkerRefused { .. }
            | RunEvent::PretrainedLoaded { .. }
            | RunEvent::StepsLost { .. }
            | RunEvent::EpochStarted { .. }
            | RunEvent::StepSkipped { .. }
            | RunEvent::DataWarning { .. }
            | RunEvent::EarlyStopped { .. } => {}
        }
    }

    /// Nothing is open.
    #[cfg(test)]
    pub(crate) fn is_at_rest(&self) -> bool {
        self.generation.is_none() && self.checkpoint.is_none()
    }

    fn is_live(&self, generation: Generation) -> bool {
        self.generation.as_ref().is_some_and(|live| live.generation == generation)
    }

    fn begin_generation(&mut self, generation: Generation, world_size: u32, now: Time) {
        let root = Span {
            at: self.root(generation),
            parent: None,
            link: self.before.map(|before| self.root(before)),
            name: "generation",
            begun: now,
            ended: now,
            attributes: vec![
                KeyValue::new("musher.run", self.run.clone()),
                KeyValue::new("musher.generation", whole(generation.0)),
                KeyValue::new("musher.world_size", i64::from(world_size)),
            ],
            events: Vec::new(),
            error: None,
        };
        self.generation = Some(Live { generation, root, stage: None });
    }

    fn end_generation(&mut self, error: Option<String>, now: Time) {
        self.end_stage(error.clone(), now);
        let Some(Live { generation, mut root, .. }) = self.generation.take() else { return };
        root.attributes.push(step("musher.step.end", self.step));
        self.ended.push(Span { ended: now, error, ..root });
        self.before = Some(generation);
    }

    fn is_at(&self, what: What) -> bool {
        self.generation.as_ref().and_then(|live| live.stage.as_ref()).is_some_and(|stage| stage.what == what)
    }

    /// Begins this, unless the team is at it already: a segment's end does not end its epoch, and each member is sent
    /// what all are told.
    fn be_at(&mut self, what: What, now: Time) {
        if !self.is_at(what) {
            self.end_stage(None, now);
            self.begin(what, now);
        }
    }

    fn begin(&mut self, what: What, now: Time) {
        let Some(mut span) = self.child(what.name(), now) else { return };
        match what {
            What::Form | What::Sync => {}
            What::Epoch(epoch) => {
                span.attributes.push(KeyValue::new("musher.epoch", i64::from(epoch.0)));
                span.attributes.push(step("musher.step.begin", self.step));
            }
            What::Validate(epoch) => {
                span.attributes.push(KeyValue::new("musher.epoch", i64::from(epoch.0)));
                span.attributes.push(step("musher.step", self.step));
            }
        }
        if let Some(live) = &mut self.generation {
            live.stage = Some(Stage { what, span });
        }
    }

    fn end_stage(&mut self, error: Option<String>, now: Time) {
        let stage = self.generation.as_mut().and_then(|live| live.stage.take());
        let Some(Stage { what, mut span }) = stage else { return };
        if let What::Epoch(_) = what {
            span.attributes.push(step("musher.step.end", self.step));
        }
        self.ended.push(Span { ended: now, error, ..span });
    }

    fn end_checkpoint(&mut self, error: Option<String>, attributes: Vec<KeyValue>, now: Time) {
        let Some((_, mut span)) = self.checkpoint.take() else { return };
        span.attributes.extend(attributes);
        self.ended.push(Span { ended: now, error, ..span });
    }

    fn add_to<const N: usize>(&mut self, what: What, attributes: [KeyValue; N]) {
        if let Some(stage) = self.generation.as_mut().and_then(|live| live.stage.as_mut())
            && stage.what == what
        {
            stage.span.attributes.extend(attributes);
        }
    }

    fn note(&mut self, name: &'static str, attributes: Vec<KeyValue>, now: Time) {
        if let Some(live) = &mut self.generation
            && live.root.events.len() < MOST_EVENTS
        {
            live.root.events.push(SpanEvent { name, at: now, attributes });
        }
    }

    /// A span below the generation's root, which says again whose it is: most are looked at by themselves.
    fn child(&mut self, name: &'static str, now: Time) -> Option<Span> {
        let root = &self.generation.as_ref()?.root;
        let (trace, parent, attributes) = (root.at.trace, root.at.span, root.attributes[..3].to_vec());
        self.begun += 1;
        let span = SpanId::from_bytes(self.digest(&[
            "span".as_bytes(),
            &self.term.0.to_le_bytes(),
            &self.begun.to_le_bytes(),
        ]));
        Some(Span {
            at: Place { trace, span },
            parent: Some(parent),
            link: None,
            name,
            begun: now,
            ended: now,
            attributes,
            events: Vec::new(),
            error: None,
        })
    }

    fn root(&self, generation: Generation) -> Place {
        let generation = generation.0.to_le_bytes();
        Place {
            trace: TraceId::from_bytes(self.digest(&["trace".as_bytes(), &generation])),
            span: SpanId::from_bytes(self.digest(&["root".as_bytes(), &generation])),
        }
    }

    /// The first bytes of a digest of the run and these.
    fn digest<const N: usize>(&self, parts: &[&[u8]]) -> [u8; N] {
        let mut hash = Sha256::new();
        hash.update(&self.run_id);
        for part in parts {
            hash.update(part);
        }
        let digest: [u8; 32] = hash.finalize().into();
        std::array::from_fn(|index| digest[index])
    }
}

fn step(key: &'static str, step: Step) -> KeyValue {
    KeyValue::new(key, whole(step.0))
}

/// OpenTelemetry's whole numbers have a sign.
fn whole(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) use tests::invariant_a_generation_is_one_trace;
