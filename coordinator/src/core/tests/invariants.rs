//! What must hold after every action of the core, whatever happens around it.

use std::collections::BTreeMap;

use musher_proto::{
    ids::{CheckpointId, Epoch, Generation, Session, Step},
    message::{Fenced, Form, PartHeader, PartKind, Start, ToWorker},
};

use super::sim::{State, TRAIN_SAMPLES, Worker};
use crate::core::{Action, Commit, Fences, RunEvent};

/// What the invariants remember of the run so far.
#[derive(Debug, Default)]
pub struct Ledger {
    newest: Generation,
    judged: BTreeMap<Epoch, Step>,
    /// Each checkpoint's step, and the last epoch that was judged before it.
    checkpoints: BTreeMap<CheckpointId, (Step, Epoch)>,
    /// A generation that was to start from it was ordered since the last one was formed: some of its members
    /// may hold that state, and hand it on to the next.
    rolled_back_to: Option<CheckpointId>,
    announced: BTreeMap<Epoch, Step>,
}

impl Ledger {
    pub fn check(&mut self, action: &Action, disk: &Fences) {
        match action {
            Action::Send { message, .. } => {
                self.invariant_one_generation_is_live_and_generations_grow(message);
                if let ToWorker::Form(Form { start: Start::Checkpoint(id), .. }) = &message.body {
                    self.rolled_back_to = Some(id.clone());
                }
                invariant_fences_are_on_disk_before_they_are_sent(message, disk);
            }
            Action::CommitCheckpoint(commit) => {
                let (step, judged) = (commit.position.applied, commit.progress.early_stopping.judged);
                self.checkpoints.insert(commit.checkpoint.clone(), (step, judged));
            }
            Action::Persist(state) => {
                let fences = state.fences;
                assert!(
                    fences.generation >= disk.generation && fences.lineage >= disk.lineage,
                    "fences never fall"
                );
            }
            _ => {}
        }
    }

    pub fn check_event(&mut self, event: &RunEvent, workers: &BTreeMap<Session, Worker>) {
        match event {
            // What was lost with its last holder may happen again.
            RunEvent::GenerationFormed { applied, .. } => {
                self.judged.retain(|_, step| *step <= *applied);
                if let Some(id) = self.rolled_back_to.take()
                    && let Some((step, judged)) = self.checkpoints.get(&id)
                    && step == applied
                {
                    self.judged.retain(|epoch, _| epoch <= judged);
                }
                self.announced.retain(|_, step| *step <= *applied);
            }
            RunEvent::EpochFinished { epoch, step, .. } => {
                assert_eq!(self.announced.insert(*epoch, *step), None, "epoch {epoch} is announced once");
                invariant_each_sample_is_in_one_applied_step(*epoch, *step, workers);
            }
            RunEvent::Validated { epoch, step, .. } => self.invariant_an_epoch_is_judged_once(*epoch, *step),
            _ => {}
        }
    }

    fn invariant_one_generation_is_live_and_generations_grow(&mut self, message: &Fenced<ToWorker>) {
        match message.body {
            ToWorker::Form(_) => {
                assert!(message.generation >= self.newest, "generations grow");
                self.newest = message.generation;
            }
            ToWorker::Train(_)
            | ToWorker::Pause
            | ToWorker::Validate(_)
            | ToWorker::Save(_)
            | ToWorker::Abort { .. } => {
                assert_eq!(message.generation, self.newest, "only the newest generation is told to work");
            }
            ToWorker::Welcome(_) | ToWorker::Refused { .. } | ToWorker::Finish(_) => {}
        }
    }

    fn invariant_an_epoch_is_judged_once(&mut self, epoch: Epoch, step: Step) {
        assert_eq!(self.judged.insert(epoch, step), None, "epoch {epoch} is judged once");
    }

    pub fn invariant_a_commit_has_all_its_parts(commit: &Commit, parts: &[(PartHeader, State)]) {
        let mut covered = 0;
        for (header, state) in parts {
            let position = commit.position;
            assert_eq!((header.lineage, header.applied), (position.lineage, position.applied), "one label");
            let label = state.label.0;
            assert_eq!(
                (label.epoch, label.cursor),
                (position.epoch, position.cursor),
                "the label is the state's"
            );
            assert_eq!(state.steps, parts[0].1.steps, "one state");
            if let PartKind::State { .. } = header.kind {
                covered += header.length;
            }
        }
        assert_eq!(covered, commit.state_bytes, "all of the state");
        let weights = parts.iter().filter(|(header, _)| header.kind == PartKind::Weights).count();
        assert_eq!(weights == 1, commit.is_best || commit.is_last, "weights with the best and the last");
    }
}

fn invariant_fences_are_on_disk_before_they_are_sent(message: &Fenced<ToWorker>, disk: &Fences) {
    assert_eq!(message.term, disk.term);
    match message.body {
        ToWorker::Form(_) => {
            assert_eq!(message.generation, disk.generation, "a generation is persisted first")
        }
        ToWorker::Train(_) => assert_eq!(message.generation, disk.lineage, "a lineage is persisted first"),
        _ => {}
    }
}

/// Holders outside the lineage do not count: their steps are of another history.
pub fn invariant_applied_never_falls_behind_a_live_holder(
    actions: &[Action],
    disk: &Fences,
    workers: &BTreeMap<Session, Worker>,
) {
    let applied_by = |session: &Session| {
        let label = workers.get(session).filter(|w| w.connected)?.state.as_ref()?.label.0;
        (label.lineage >= disk.lineage && label.lineage.0 > 0).then_some(label.applied)
    };
    let formed: Vec<(Session, &Form)> = actions
        .iter()
        .filter_map(|action| match action {
            Action::Send { session, message: Fenced { body: ToWorker::Form(form), .. } } => {
                Some((*session, form))
            }
            _ => None,
        })
        .collect();
    let best = formed.iter().filter_map(|(session, _)| applied_by(session)).max();
    let Some((_, form)) = formed.first().filter(|_| best.is_some()) else { return };
    let (donor, _) = formed[form.donor.0 as usize];
    assert_eq!(form.start, Start::Held, "a held state is not thrown away");
    assert!(!workers[&donor].connected || applied_by(&donor) == best, "the donor is the most advanced");
}

fn invariant_each_sample_is_in_one_applied_step(
    epoch: Epoch,
    step: Step,
    workers: &BTreeMap<Session, Worker>,
) {
    let holders = workers
        .values()
        .filter_map(|w| w.state.as_ref())
        .filter(|s| s.label.0.applied == step && s.label.0.epoch == epoch);
    for state in holders.filter(|s| s.label.0.cursor == TRAIN_SAMPLES) {
        let mut used: Vec<u64> =
            state.steps.iter().filter(|(e, _)| *e == epoch).flat_map(|(_, s)| s.clone()).collect();
        used.sort_unstable();
        assert_eq!(used, (0..TRAIN_SAMPLES).collect::<Vec<_>>(), "epoch {epoch} uses each sample once");
        assert_eq!(state.steps.len() as u64, step.0, "no step is applied twice");
    }
}
