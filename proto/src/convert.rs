//! Wire to domain and back. A peer's message that does not parse becomes a sentence, never a panic.

use thiserror::Error;

use crate::{
    ids::{CheckpointId, Epoch, Generation, Rank, Session, Step, Term, WorkerId},
    message::{self as domain, Fenced, Finish, FromWorker, Start, ToWorker},
    wire,
};

#[derive(Debug, Error, PartialEq, Eq)]
#[error("malformed message: {0}; the other side is of another version or is no Musher")]
pub struct Malformed(&'static str);

fn required<T>(field: Option<T>, missing: &'static str) -> Result<T, Malformed> {
    field.ok_or(Malformed(missing))
}

/// Bytes of a name, a host, an address.
const SHORT: usize = 256;
/// Bytes of a reason, a path, a list's items together.
const LONG: usize = 4096;
/// Far beyond what any run counts to, and far from where counting ends: numbers that a peer claims stay comparable.
const COUNTED: u64 = 1 << 48;

/// Whether a name may be one: it is shown on terminals, kept in files, and compared.
pub fn is_name(text: &str) -> bool {
    !text.is_empty() && text.len() <= SHORT && !text.contains(char::is_control)
}

fn name(text: String) -> Result<String, Malformed> {
    match is_name(&text) {
        true => Ok(text),
        false => Err(Malformed("a name is empty, longer than 256 bytes, or has control characters")),
    }
}

/// What people read, cut off where nobody reads on.
fn prose(mut text: String) -> String {
    if text.len() > LONG {
        text.truncate(text.floor_char_boundary(LONG));
        text.push_str(" ...");
    }
    text
}

fn prose_list(texts: Vec<String>) -> Vec<String> {
    let mut room = LONG;
    let fits = |text: &String| {
        room = room.saturating_sub(text.len().max(1));
        room > 0
    };
    texts.into_iter().take_while(fits).collect()
}

fn generation(number: u64) -> Result<Generation, Malformed> {
    match number <= COUNTED {
        true => Ok(Generation(number)),
        false => Err(Malformed("a generation is beyond what any run counts to")),
    }
}

/// Milliseconds that somebody took.
fn time_ms(ms: f64) -> Result<f64, Malformed> {
    match ms.is_finite() && ms >= 0.0 {
        true => Ok(ms),
        false => Err(Malformed("Progress tells a time that is none")),
    }
}

impl From<Fenced<FromWorker>> for wire::WorkerMessage {
    fn from(message: Fenced<FromWorker>) -> Self {
        use wire::worker_message::Body;
        let body = match message.body {
            FromWorker::Hello(m) => Body::Hello(wire::Hello {
                protocol: m.protocol,
                worker: m.worker.0,
                incarnation: m.incarnation,
                host: m.host,
                device: m.device,
            }),
            FromWorker::Join(m) => Body::Join(wire::Join {
                dataset_digest: m.data.digest,
                train_samples: m.data.train_samples,
                val_samples: m.data.val_samples,
                ring_address: m.ring_address,
                arithmetic: m.arithmetic,
                held: m.held.map(Into::into),
                at_work: m.at_work.map(Into::into),
            }),
            FromWorker::Synced(m) => Body::Synced(wire::Synced {
                held: Some(m.held.into()),
                state_digest: m.state_digest,
                state_bytes: m.state_bytes,
                pretrained: m.pretrained.map(|of| wire::Pretrained {
                    file: of.file,
                    sha256: of.sha256,
                    ignored: of.ignored,
                }),
            }),
            FromWorker::Progress(m) => Body::Progress(wire::Progress {
                phase: wire::Phase::from(m.phase).into(),
                activity: wire::Activity::from(m.activity).into(),
                in_activity_ms: m.in_activity_ms,
                warm: m.warm,
                applied: m.applied.0,
                epoch: m.epoch.0,
                cursor: m.cursor,
                loss: m.loss,
                images_per_second: m.images_per_second,
                step_ms: m.step_ms,
                data_wait_ms: m.waits.data_ms,
                peers_wait_ms: m.waits.peers_ms,
                steps_skipped: m.steps_skipped,
            }),
            FromWorker::SegmentFinished(m) => Body::SegmentFinished(wire::SegmentFinished {
                held: Some(m.held.into()),
                paused: m.paused,
                loss_sum: m.totals.loss_sum,
                steps_skipped: m.totals.steps_skipped,
                state_digest: m.state_digest,
            }),
            FromWorker::Validated(m) => Body::Validated(wire::Validated {
                epoch: m.epoch.0,
                state_digest: m.state_digest,
                units: m.units.into_iter().map(Into::into).collect(),
                samples_png: m.samples_png,
            }),
            FromWorker::Interrupted(m) => Body::Interrupted(wire::Interrupted {
                held: m.held.map(Into::into),
                reason: m.reason,
                waited: m.waited.map(Into::into),
            }),
            FromWorker::DataWarning(m) => {
                Body::DataWarning(wire::DataWarning { file: m.file, problem: m.problem })
            }
            FromWorker::Failed(m) => {
                Body::Failed(wire::Failed { reason: m.reason, any_worker: m.any_worker })
            }
            FromWorker::Leaving => Body::Leaving(wire::Leaving {}),
            FromWorker::Goodbye => Body::Goodbye(wire::Goodbye {}),
        };
        Self { term: message.term.0, generation: message.generation.0, body: Some(body) }
    }
}

impl TryFrom<wire::WorkerMessage> for Fenced<FromWorker> {
    type Error = Malformed;

    fn try_from(message: wire::WorkerMessage) -> Result<Self, Malformed> {
        use wire::worker_message::Body;
        let body = match required(message.body, "a worker's message has no body")? {
            Body::Hello(m) => FromWorker::Hello(domain::Hello {
                protocol: m.protocol,
                worker: WorkerId(name(m.worker)?),
                incarnation: m.incarnation,
                host: name(m.host)?,
                device: name(m.device)?,
            }),
            Body::Join(m) => FromWorker::Join(domain::Join {
                data: domain::DataFacts {
                    digest: name(m.dataset_digest)?,
                    train_samples: m.train_samples,
                    val_samples: m.val_samples,
                },
                ring_address: name(m.ring_address)?,
                arithmetic: name(m.arithmetic)?,
                held: m.held.map(TryInto::try_into).transpose()?,
                at_work: m.at_work.map(TryInto::try_into).transpose()?,
            }),
            Body::Synced(m) => FromWorker::Synced(domain::Synced {
                held: required(m.held, "Synced has no label")?.try_into()?,
                state_digest: m.state_digest,
                state_bytes: m.state_bytes,
                pretrained: m.pretrained.map(|of| domain::Pretrained {
                    file: prose(of.file),
                    sha256: prose(of.sha256),
                    ignored: prose_list(of.ignored),
                }),
            }),
            Body::Progress(m) => FromWorker::Progress(domain::Progress {
                phase: m.phase().try_into()?,
                activity: m.activity().try_into()?,
                in_activity_ms: m.in_activity_ms,
                warm: m.warm,
                applied: Step(m.applied),
                epoch: Epoch(m.epoch),
                cursor: m.cursor,
                loss: m.loss,
                images_per_second: m.images_per_second,
                step_ms: time_ms(m.step_ms)?,
                waits: domain::StepWaits {
                    data_ms: time_ms(m.data_wait_ms)?,
                    peers_ms: time_ms(m.peers_wait_ms)?,
                },
                steps_skipped: m.steps_skipped,
            }),
            Body::SegmentFinished(m) => FromWorker::SegmentFinished(domain::SegmentFinished {
                held: required(m.held, "SegmentFinished has no label")?.try_into()?,
                paused: m.paused,
                totals: domain::EpochTotals { loss_sum: m.loss_sum, steps_skipped: m.steps_skipped },
                state_digest: m.state_digest,
            }),
            Body::Validated(m) => FromWorker::Validated(domain::Validated {
                epoch: Epoch(m.epoch),
                state_digest: m.state_digest,
                units: m.units.into_iter().map(Into::into).collect(),
                samples_png: m.samples_png,
            }),
            Body::Interrupted(m) => FromWorker::Interrupted(domain::Interrupted {
                held: m.held.map(TryInto::try_into).transpose()?,
                reason: prose(m.reason),
                waited: m.waited.map(Into::into),
            }),
            Body::DataWarning(m) => FromWorker::DataWarning(domain::DataWarning {
                file: prose(m.file),
                problem: prose(m.problem),
            }),
            Body::Failed(m) => {
                FromWorker::Failed(domain::Failed { reason: prose(m.reason), any_worker: m.any_worker })
            }
            Body::Leaving(wire::Leaving {}) => FromWorker::Leaving,
            Body::Goodbye(wire::Goodbye {}) => FromWorker::Goodbye,
        };
        Ok(Self { term: Term(message.term), generation: Generation(message.generation), body })
    }
}

impl From<Fenced<ToWorker>> for wire::CoordinatorMessage {
    fn from(message: Fenced<ToWorker>) -> Self {
        use wire::coordinator_message::Body;
        let body = match message.body {
            ToWorker::Welcome(m) => {
                let (session, run, run_id, job_json) = (m.session.0, m.run, m.run_id, m.job_json);
                Body::Welcome(wire::Welcome { session, run, run_id, job_json })
            }
            ToWorker::Refused { reason, may_pass } => Body::Refused(wire::Refused { reason, may_pass }),
            ToWorker::Form(m) => Body::Form(m.into()),
            ToWorker::Train(m) => Body::Train(wire::Train { epoch: m.epoch.0, cursor: m.cursor, end: m.end }),
            ToWorker::Pause => Body::Pause(wire::Pause {}),
            ToWorker::Validate(m) => {
                Body::Validate(wire::Validate { epoch: m.epoch.0, samples_wanted: m.samples_wanted })
            }
            ToWorker::Save(m) => Body::Save(wire::Save {
                checkpoint: m.checkpoint.0,
                offset: m.offset,
                length: m.length,
                weights: m.weights.is_some(),
                metadata_json: m.weights.unwrap_or_default(),
            }),
            ToWorker::Abort { reason } => Body::Abort(wire::Abort { reason }),
            ToWorker::Finish(how) => Body::Finish(match how {
                Finish::Finished => wire::Finish::default(),
                Finish::Stopped => wire::Finish { resumable: true, reason: String::new() },
                Finish::Failed { reason } => wire::Finish { resumable: false, reason },
            }),
        };
        Self { term: message.term.0, generation: message.generation.0, body: Some(body) }
    }
}

impl TryFrom<wire::CoordinatorMessage> for Fenced<ToWorker> {
    type Error = Malformed;

    fn try_from(message: wire::CoordinatorMessage) -> Result<Self, Malformed> {
        use wire::coordinator_message::Body;
        let body = match required(message.body, "a coordinator's message has no body")? {
            Body::Welcome(m) => ToWorker::Welcome(domain::Welcome {
                session: Session(m.session),
                run: m.run,
                run_id: m.run_id,
                job_json: m.job_json,
            }),
            Body::Refused(m) => ToWorker::Refused { reason: m.reason, may_pass: m.may_pass },
            Body::Form(m) => ToWorker::Form(m.try_into()?),
            Body::Train(m) => {
                ToWorker::Train(domain::Train { epoch: Epoch(m.epoch), cursor: m.cursor, end: m.end })
            }
            Body::Pause(wire::Pause {}) => ToWorker::Pause,
            Body::Validate(m) => ToWorker::Validate(domain::Validate {
                epoch: Epoch(m.epoch),
                samples_wanted: m.samples_wanted,
            }),
            Body::Save(m) => ToWorker::Save(domain::Save {
                checkpoint: CheckpointId(m.checkpoint),
                offset: m.offset,
                length: m.length,
                weights: m.weights.then_some(m.metadata_json),
            }),
            Body::Abort(m) => ToWorker::Abort { reason: m.reason },
            Body::Finish(m) => ToWorker::Finish(match (m.resumable, m.reason) {
                (true, _) => Finish::Stopped,
                (false, reason) if reason.is_empty() => Finish::Finished,
                (false, reason) => Finish::Failed { reason },
            }),
        };
        Ok(Self { term: Term(message.term), generation: Generation(message.generation), body })
    }
}

impl From<domain::Form> for wire::Form {
    fn from(m: domain::Form) -> Self {
        use wire::form::Start as Wire;
        Self {
            rank: m.rank.0,
            world: m.world,
            successor: m.successor,
            secret: m.secret.to_vec(),
            donor: m.donor.0,
            broadcast: m.broadcast,
            holds_it: m.holds_it,
            start: Some(match m.start {
                Start::Seeded => Wire::Seeded(wire::Seeded {}),
                Start::Held => Wire::Held(wire::HeldState {}),
                Start::Checkpoint(id) => Wire::Checkpoint(id.0),
            }),
        }
    }
}

impl TryFrom<wire::Form> for domain::Form {
    type Error = Malformed;

    fn try_from(m: wire::Form) -> Result<Self, Malformed> {
        use wire::form::Start as Wire;
        if m.rank >= m.world || m.donor >= m.world {
            return Err(Malformed("Form names a rank outside its world"));
        }
        Ok(Self {
            rank: Rank(m.rank),
            world: m.world,
            successor: m.successor,
            secret: m.secret.try_into().map_err(|_| Malformed("Form's secret is not of 32 bytes"))?,
            donor: Rank(m.donor),
            broadcast: m.broadcast,
            holds_it: m.holds_it,
            start: match required(m.start, "Form does not say what the donor starts from")? {
                Wire::Seeded(wire::Seeded {}) => Start::Seeded,
                Wire::Held(wire::HeldState {}) => Start::Held,
                Wire::Checkpoint(id) => Start::Checkpoint(CheckpointId(id)),
            },
        })
    }
}

impl From<domain::ReplicaLabel> for wire::ReplicaLabel {
    fn from(m: domain::ReplicaLabel) -> Self {
        Self { lineage: m.lineage.0, applied: m.applied.0, epoch: m.epoch.0, cursor: m.cursor }
    }
}

impl TryFrom<wire::ReplicaLabel> for domain::ReplicaLabel {
    type Error = Malformed;

    fn try_from(m: wire::ReplicaLabel) -> Result<Self, Malformed> {
        Ok(Self {
            lineage: generation(m.lineage)?,
            applied: Step(m.applied),
            epoch: Epoch(m.epoch),
            cursor: m.cursor,
        })
    }
}

impl From<domain::AtWork> for wire::AtWork {
    fn from(m: domain::AtWork) -> Self {
        let domain::Train { epoch, cursor, end } = m.train;
        Self { generation: m.generation.0, epoch: epoch.0, cursor, end }
    }
}

impl TryFrom<wire::AtWork> for domain::AtWork {
    type Error = Malformed;

    fn try_from(m: wire::AtWork) -> Result<Self, Malformed> {
        let train = domain::Train { epoch: Epoch(m.epoch), cursor: m.cursor, end: m.end };
        Ok(Self { generation: generation(m.generation)?, train })
    }
}

impl From<domain::Waited> for wire::Waited {
    fn from(m: domain::Waited) -> Self {
        let domain::Waited { peer, step, phase, ms, received, sent, closed, batch_norm } = m;
        Self { peer: peer.0, step: step.0, phase, ms, received, sent, closed, batch_norm }
    }
}

impl From<wire::Waited> for domain::Waited {
    fn from(m: wire::Waited) -> Self {
        let wire::Waited { peer, step, phase, ms, received, sent, closed, batch_norm } = m;
        Self { peer: Rank(peer), step: Step(step), phase, ms, received, sent, closed, batch_norm }
    }
}

impl From<domain::UnitResult> for wire::UnitResult {
    fn from(m: domain::UnitResult) -> Self {
        Self { index: m.index, samples: m.samples, loss_sum: m.loss_sum, confusion: m.confusion }
    }
}

impl From<wire::UnitResult> for domain::UnitResult {
    fn from(m: wire::UnitResult) -> Self {
        Self { index: m.index, samples: m.samples, loss_sum: m.loss_sum, confusion: m.confusion }
    }
}

impl From<domain::Phase> for wire::Phase {
    fn from(phase: domain::Phase) -> Self {
        match phase {
            domain::Phase::Loading => wire::Phase::Loading,
            domain::Phase::Idle => wire::Phase::Idle,
            domain::Phase::Connecting => wire::Phase::Connecting,
            domain::Phase::Syncing => wire::Phase::Syncing,
            domain::Phase::Training => wire::Phase::Training,
            domain::Phase::Validating => wire::Phase::Validating,
            domain::Phase::Saving => wire::Phase::Saving,
        }
    }
}

impl TryFrom<wire::Phase> for domain::Phase {
    type Error = Malformed;

    fn try_from(phase: wire::Phase) -> Result<Self, Malformed> {
        Ok(match phase {
            wire::Phase::Unspecified => return Err(Malformed("Progress has no phase")),
            wire::Phase::Loading => domain::Phase::Loading,
            wire::Phase::Idle => domain::Phase::Idle,
            wire::Phase::Connecting => domain::Phase::Connecting,
            wire::Phase::Syncing => domain::Phase::Syncing,
            wire::Phase::Training => domain::Phase::Training,
            wire::Phase::Validating => domain::Phase::Validating,
            wire::Phase::Saving => domain::Phase::Saving,
        })
    }
}

impl From<domain::Activity> for wire::Activity {
    fn from(activity: domain::Activity) -> Self {
        match activity {
            domain::Activity::Working => wire::Activity::Working,
            domain::Activity::WaitingForData => wire::Activity::WaitingForData,
            domain::Activity::WaitingForPeers => wire::Activity::WaitingForPeers,
        }
    }
}

impl TryFrom<wire::Activity> for domain::Activity {
    type Error = Malformed;

    fn try_from(activity: wire::Activity) -> Result<Self, Malformed> {
        Ok(match activity {
            wire::Activity::Unspecified => return Err(Malformed("Progress has no activity")),
            wire::Activity::Working => domain::Activity::Working,
            wire::Activity::WaitingForData => domain::Activity::WaitingForData,
            wire::Activity::WaitingForPeers => domain::Activity::WaitingForPeers,
        })
    }
}

impl From<domain::PartHeader> for wire::UploadHeader {
    fn from(m: domain::PartHeader) -> Self {
        let (kind, offset, digest) = match m.kind {
            domain::PartKind::State { offset, digest } => (wire::PartKind::State, offset, digest),
            domain::PartKind::Weights => (wire::PartKind::Weights, 0, 0),
        };
        Self {
            term: m.term.0,
            worker: m.worker.0,
            checkpoint: m.checkpoint.0,
            lineage: m.lineage.0,
            applied: m.applied.0,
            kind: kind.into(),
            offset,
            length: m.length,
            digest,
            stall_ms: m.stall_ms,
        }
    }
}

impl TryFrom<wire::UploadHeader> for domain::PartHeader {
    type Error = Malformed;

    fn try_from(m: wire::UploadHeader) -> Result<Self, Malformed> {
        Ok(Self {
            kind: match m.kind() {
                wire::PartKind::Unspecified => return Err(Malformed("an upload has no kind")),
                wire::PartKind::State => domain::PartKind::State { offset: m.offset, digest: m.digest },
                wire::PartKind::Weights => domain::PartKind::Weights,
            },
            term: Term(m.term),
            worker: WorkerId(name(m.worker)?),
            checkpoint: CheckpointId(name(m.checkpoint)?),
            lineage: Generation(m.lineage),
            applied: Step(m.applied),
            length: m.length,
            stall_ms: m.stall_ms,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn parsed(body: FromWorker) -> Result<FromWorker, Malformed> {
        let message = Fenced { term: Term(1), generation: Generation(1), body };
        Fenced::<FromWorker>::try_from(wire::WorkerMessage::from(message)).map(|message| message.body)
    }

    /// What a peer says is kept, compared and shown; no single one of them fills memory, files or terminals.
    #[test]
    fn names_are_short_and_plain_and_prose_is_cut() {
        let hello = |worker: &str| {
            let (host, device) = ("a".into(), "cpu".into());
            parsed(FromWorker::Hello(domain::Hello {
                protocol: 1,
                worker: worker.into(),
                incarnation: 7,
                host,
                device,
            }))
        };
        assert!(
            hello("node-1.0").is_ok()
                && hello("Ochse 7 / Stall ü").is_ok()
                && hello(&"a".repeat(256)).is_ok()
        );
        for bad in ["", "a\nb", "\u{1b}[31m", &"a".repeat(257)] {
            assert!(hello(bad).is_err(), "{bad:?}");
        }
        let failed = FromWorker::Failed(domain::Failed { reason: "ü".repeat(1 << 20), any_worker: false });
        let FromWorker::Failed(failed) = parsed(failed).unwrap() else { panic!() };
        assert!(
            failed.reason.len() <= LONG + 4 && failed.reason.ends_with("ü ..."),
            "{}",
            failed.reason.len()
        );
        assert_eq!(prose_list(vec!["a".repeat(1000); 99]).len(), 4);
        assert_eq!(prose_list(vec![String::new(); 1 << 20]).len(), LONG - 1);
    }

    /// Numbers are taken over by the coordinator, whose next is one more.
    #[test]
    fn a_generation_that_nobody_counted_to_is_malformed() {
        let finished = |lineage| {
            let held = domain::ReplicaLabel { lineage: Generation(lineage), ..label() };
            let totals = domain::EpochTotals { loss_sum: 0.0, steps_skipped: 0 };
            parsed(FromWorker::SegmentFinished(domain::SegmentFinished {
                held,
                paused: false,
                totals,
                state_digest: 1,
            }))
        };
        assert!(finished(1 << 40).is_ok());
        assert!(finished(u64::MAX).is_err());
    }

    fn label() -> domain::ReplicaLabel {
        domain::ReplicaLabel { lineage: Generation(3), applied: Step(40), epoch: Epoch(2), cursor: 96 }
    }

    fn from_worker() -> Vec<FromWorker> {
        vec![
            FromWorker::Hello(domain::Hello {
                protocol: domain::PROTOCOL,
                worker: "a.0".into(),
                incarnation: 7,
                host: "a".into(),
                device: "cpu".into(),
            }),
            FromWorker::Join(domain::Join {
                data: domain::DataFacts { digest: "d1".into(), train_samples: 9, val_samples: 4 },
                ring_address: "127.0.0.1:9".into(),
                arithmetic: "cuda".into(),
                held: Some(label()),
                at_work: Some(domain::AtWork {
                    generation: Generation(4),
                    train: domain::Train { epoch: Epoch(2), cursor: 96, end: 128 },
                }),
            }),
            FromWorker::Synced(domain::Synced {
                held: label(),
                state_digest: u64::MAX,
                state_bytes: 12,
                pretrained: Some(domain::Pretrained {
                    file: "w.pth".into(),
                    sha256: "ab".into(),
                    ignored: vec!["fc.bias".into(), "fc.weight".into()],
                }),
            }),
            FromWorker::Progress(domain::Progress {
                phase: domain::Phase::Training,
                activity: domain::Activity::WaitingForData,
                in_activity_ms: 12,
                warm: true,
                applied: Step(41),
                epoch: Epoch(2),
                cursor: 128,
                loss: 0.75,
                images_per_second: 10.5,
                step_ms: 80.0,
                waits: domain::StepWaits { data_ms: 0.5, peers_ms: 3.0 },
                steps_skipped: 1,
            }),
            FromWorker::SegmentFinished(domain::SegmentFinished {
                held: label(),
                paused: true,
                totals: domain::EpochTotals { loss_sum: 51.5, steps_skipped: 2 },
                state_digest: 5,
            }),
            FromWorker::Validated(domain::Validated {
                epoch: Epoch(2),
                state_digest: 5,
                units: vec![domain::UnitResult {
                    index: 3,
                    samples: 8,
                    loss_sum: 1.5,
                    confusion: (0..9).collect(),
                }],
                samples_png: vec![1, 2],
            }),
            FromWorker::Interrupted(domain::Interrupted {
                held: None,
                reason: "rank 1 closed".into(),
                waited: Some(domain::Waited {
                    peer: Rank(1),
                    step: Step(41),
                    phase: "gradients".into(),
                    ms: 70,
                    received: 1 << 40,
                    sent: 1 << 41,
                    closed: true,
                    batch_norm: true,
                }),
            }),
            FromWorker::DataWarning(domain::DataWarning { file: "a.jpg".into(), problem: "is a PNG".into() }),
            FromWorker::Failed(domain::Failed { reason: "no memory".into(), any_worker: true }),
            FromWorker::Leaving,
            FromWorker::Goodbye,
        ]
    }

    fn to_worker() -> Vec<ToWorker> {
        let form = |start| {
            ToWorker::Form(domain::Form {
                rank: Rank(1),
                world: 2,
                successor: "127.0.0.1:1".into(),
                secret: [9; 32],
                donor: Rank(0),
                broadcast: true,
                holds_it: true,
                start,
            })
        };
        vec![
            ToWorker::Welcome(domain::Welcome {
                session: Session(4),
                run: "pets".into(),
                run_id: "5f0e".into(),
                job_json: "{}".into(),
            }),
            ToWorker::Refused { reason: "other data".into(), may_pass: true },
            form(Start::Seeded),
            form(Start::Held),
            form(Start::Checkpoint("e0001-s00000008".into())),
            ToWorker::Train(domain::Train { epoch: Epoch(1), cursor: 32, end: 237 }),
            ToWorker::Pause,
            ToWorker::Validate(domain::Validate { epoch: Epoch(1), samples_wanted: 4 }),
            ToWorker::Save(domain::Save {
                checkpoint: "e0001-s00000008".into(),
                offset: 4,
                length: 8,
                weights: Some("{}".into()),
            }),
            ToWorker::Abort { reason: "rank 2 died".into() },
            ToWorker::Finish(Finish::Finished),
            ToWorker::Finish(Finish::Stopped),
            ToWorker::Finish(Finish::Failed { reason: "no data".into() }),
        ]
    }

    #[test]
    fn every_message_survives_the_wire() {
        for body in from_worker() {
            let message = Fenced { term: Term(2), generation: Generation(3), body };
            assert_eq!(Fenced::try_from(wire::WorkerMessage::from(message.clone())), Ok(message));
        }
        for body in to_worker() {
            let message = Fenced { term: Term(2), generation: Generation(3), body };
            assert_eq!(Fenced::try_from(wire::CoordinatorMessage::from(message.clone())), Ok(message));
        }
    }

    #[test]
    fn part_headers_survive_the_wire() {
        for kind in [domain::PartKind::State { offset: 8, digest: 99 }, domain::PartKind::Weights] {
            let header = domain::PartHeader {
                term: Term(1),
                worker: "a.0".into(),
                checkpoint: "e0001-s00000008".into(),
                lineage: Generation(1),
                applied: Step(8),
                kind,
                length: 16,
                stall_ms: 2.5,
            };
            assert_eq!(domain::PartHeader::try_from(wire::UploadHeader::from(header.clone())), Ok(header));
        }
    }

    #[test]
    fn a_malformed_message_is_a_sentence() {
        assert!(Fenced::<FromWorker>::try_from(wire::WorkerMessage::default()).is_err());
        for ms in [f64::NAN, f64::INFINITY, -1.0] {
            let mut progress = wire::Progress { phase: wire::Phase::Training.into(), ..Default::default() };
            progress.activity = wire::Activity::Working.into();
            let said = |body| wire::WorkerMessage { body: Some(body), ..Default::default() };
            let body = wire::worker_message::Body::Progress;
            assert!(Fenced::<FromWorker>::try_from(said(body(progress))).is_ok());
            progress.step_ms = ms;
            let error = Fenced::<FromWorker>::try_from(said(body(progress))).unwrap_err().to_string();
            assert!(error.contains("a time that is none"), "{error}");
        }
        let mut form = wire::Form::from(match to_worker().remove(2) {
            ToWorker::Form(form) => form,
            _ => unreachable!("the third message is a Form"),
        });
        form.secret.pop();
        assert!(domain::Form::try_from(form.clone()).is_err());
        form.secret.push(0);
        form.donor = 2;
        let error = domain::Form::try_from(form).unwrap_err().to_string();
        assert!(error.contains("outside its world"), "{error}");
    }
}
