//! What must hold of a run's events over all lives of its coordinator, each rule under its name.
//!
//! Events tell of decisions: a digest that ranks disagree on never becomes an `epoch_finished`, it
//! becomes a `generation_aborted` of its own cause. So that cause's absence is the proof of agreement.

use std::collections::{BTreeMap, BTreeSet};

use crate::Event;

/// A run's events, and what the one who disturbed it knows beside them.
#[derive(Debug)]
pub struct History {
    pub events: Vec<Event>,
    pub samples: u64,
    pub val_samples: u64,
    pub global_batch: u64,
    /// What was done to it, in order, each with the number of events told before.
    pub blows: Vec<(usize, Blow)>,
}

/// What excuses that steps are lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Blow {
    /// With the process went the state that it held.
    WorkerKilled(String),
    /// It can't be started from any more.
    CheckpointDamaged(String),
}

/// Steps that had been told of and had to be taken again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fall {
    pub from: u64,
    pub to: u64,
    pub holders: Holders,
}

/// Who had held the steps that were lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holders {
    AllThere,
    SomeGone,
    /// The run went back to a checkpoint.
    AllGone,
}

type Verdict = Result<(), String>;
type Rule = fn(&History) -> Verdict;

impl History {
    /// Of a run that nothing excuses: it was undisturbed, or all that was done to it is to cost nothing.
    pub fn new(events: Vec<Event>, samples: u64, val_samples: u64, global_batch: u64) -> Self {
        Self { events, samples, val_samples, global_batch, blows: Vec::new() }
    }

    /// All rules that do not hold, with what breaks them.
    pub fn violations(&self) -> Vec<String> {
        let rules: [(&str, Rule); 6] = [
            ("each sample of an epoch is trained on once", Self::each_sample_is_trained_on_once),
            ("each sample is validated once", Self::each_sample_is_validated_once),
            ("each epoch ends once", Self::each_epoch_ends_once),
            ("steps never go back", Self::steps_never_go_back),
            ("replicas agree", Self::replicas_agree),
            ("generations and terms grow", Self::generations_and_terms_grow),
        ];
        let broken =
            rules.iter().filter_map(|(rule, holds)| holds(self).err().map(|why| format!("{rule}: {why}")));
        broken.collect()
    }

    fn each_sample_is_trained_on_once(&self) -> Verdict {
        let steps = self.samples.div_ceil(self.global_batch);
        self.each("epoch_finished", |event| {
            event.number("samples") == self.samples && event.number("step") == event.number("epoch") * steps
        })
    }

    fn each_sample_is_validated_once(&self) -> Verdict {
        self.each("validated", |event| event.number("samples") == self.val_samples)
    }

    /// Also: in order and without a gap. An event whose decision was persisted in the instant of a crash
    /// is not told, so a gap is excused by the coordinator's restart; a repetition by a return to a
    /// checkpoint.
    fn each_epoch_ends_once(&self) -> Verdict {
        for name in ["epoch_finished", "validated"] {
            let (mut last, mut excused) = (0, false);
            let mut falls = self.falls_by_event();
            for (index, event) in self.events.iter().enumerate() {
                if let Some(fall) = falls.remove(&index) {
                    let steps = self.samples.div_ceil(self.global_batch);
                    last = if fall.holders == Holders::AllGone { last.min(fall.to / steps) } else { last };
                }
                excused |= event.name() == "coordinator_restarted" || event.has("resumed_from");
                if event.name() == name {
                    let epoch = event.number("epoch");
                    let fits = epoch == last + 1 || excused && epoch > last;
                    let redone = name == "validated" && excused && epoch == last;
                    ensure(fits || redone, || format!("{name} of epoch {epoch} after that of {last}"))?;
                    (last, excused) = (epoch, false);
                }
            }
        }
        Ok(())
    }

    /// A step that had been told of is only taken again when its only holder was lost, or when all
    /// holders were and the newest sound checkpoint is older.
    fn steps_never_go_back(&self) -> Verdict {
        for (index, fall) in self.falls_by_event() {
            let Fall { from, to, holders } = fall;
            let checkpoint = self.newest_checkpoint_before(index);
            let allowed = match holders {
                Holders::AllThere => false,
                Holders::SomeGone => from - to == 1,
                Holders::AllGone => to >= checkpoint,
            };
            ensure(allowed, || {
                format!(
                    "from {from} to {to} (newest sound checkpoint: {checkpoint}) at {:?}",
                    self.events[index]
                )
            })?;
        }
        self.steps_grow_within_a_generation()
    }

    fn steps_grow_within_a_generation(&self) -> Verdict {
        let mut told = BTreeMap::new();
        for event in &self.events {
            let (generation, step) = match event.name() {
                "generation_formed" => (event.number("generation"), event.number("applied_step")),
                "progress" => (event.number("generation"), event.number("step")),
                _ => continue,
            };
            let former = told.insert(generation, step);
            ensure(former <= Some(step), || format!("within a generation at {event:?}"))?;
        }
        Ok(())
    }

    fn replicas_agree(&self) -> Verdict {
        let differ = |event: &Event| {
            ["states_differ", "validation_failed"].map(Some).contains(&event["cause"].as_str())
        };
        self.each("generation_aborted", |event| !differ(event))
    }

    fn generations_and_terms_grow(&self) -> Verdict {
        for (name, field) in [("generation_formed", "generation"), ("run_started", "term")] {
            let numbers = || self.named(name).map(|event| event.number(field));
            let grow = numbers().zip(numbers().skip(1)).all(|(one, next)| one < next);
            ensure(grow, || format!("{field}s of {name}: {:?}", numbers().collect::<Vec<_>>()))?;
        }
        Ok(())
    }

    /// The most steps that were told of.
    pub fn steps(&self) -> u64 {
        let told = self.events.iter().filter(|event| ["progress", "epoch_finished"].contains(&event.name()));
        told.map(|event| event.number("step")).max().unwrap_or(0)
    }

    /// Every loss of steps that the events tell of.
    pub fn falls(&self) -> Vec<Fall> {
        self.falls_by_event().into_values().collect()
    }

    /// By the event that told of it.
    fn falls_by_event(&self) -> BTreeMap<usize, Fall> {
        let mut falls = BTreeMap::new();
        let (mut told, mut formed_at, mut world) = (0, 0, 0);
        for (index, event) in self.events.iter().enumerate() {
            match event.name() {
                "progress" | "epoch_finished" => told = told.max(event.number("step")),
                "generation_formed" => {
                    let to = event.number("applied_step");
                    if to < told {
                        let holders = match self.gone_between(formed_at, index).len() as u64 {
                            0 => Holders::AllThere,
                            gone if gone < world => Holders::SomeGone,
                            _ => Holders::AllGone,
                        };
                        falls.insert(index, Fall { from: told, to, holders });
                    }
                    (told, formed_at, world) = (to, index, event.number("world_size"));
                }
                _ => {}
            }
        }
        falls
    }

    /// Workers that were lost between two events, as the events or the blows tell.
    fn gone_between(&self, from: usize, to: usize) -> BTreeSet<&str> {
        let left = self.events[from..to].iter().filter(|event| event.name() == "worker_left");
        let killed = self.blows.iter().filter_map(|(after, blow)| match blow {
            Blow::WorkerKilled(worker) if (from..=to).contains(after) => Some(worker.as_str()),
            _ => None,
        });
        left.map(|event| event.text("worker")).chain(killed).collect()
    }

    /// The step of the newest checkpoint that was told of and is sound; 0 without one.
    fn newest_checkpoint_before(&self, index: usize) -> u64 {
        let mut sound = BTreeMap::new();
        for (at, event) in self.events[..index].iter().enumerate() {
            for (_, blow) in self.blows.iter().filter(|(after, _)| *after == at) {
                if let Blow::CheckpointDamaged(id) = blow {
                    sound.remove(id.as_str());
                }
            }
            if event.name() == "checkpoint_committed" {
                sound.insert(event.text("id"), event.number("step"));
            }
        }
        for (_, blow) in self.blows.iter().filter(|(after, _)| *after == index) {
            if let Blow::CheckpointDamaged(id) = blow {
                sound.remove(id.as_str());
            }
        }
        sound.into_values().max().unwrap_or(0)
    }

    fn named(&self, name: &str) -> impl Iterator<Item = &Event> {
        self.events.iter().filter(move |event| event.name() == name)
    }

    fn each(&self, name: &str, holds: impl Fn(&Event) -> bool) -> Verdict {
        self.named(name).find(|event| !holds(event)).map_or(Ok(()), |event| Err(format!("{event:?}")))
    }
}

fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Verdict {
    if holds { Ok(()) } else { Err(otherwise()) }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Two epochs of 5 steps, a generation each, with a coordinator's death between them.
    fn sound() -> Vec<Value> {
        let formed = |generation: u64, step: u64| json!({"event": "generation_formed", "generation": generation, "world_size": 2, "applied_step": step});
        let progress =
            |generation: u64, step: u64| json!({"event": "progress", "generation": generation, "step": step});
        let finished =
            |epoch: u64| json!({"event": "epoch_finished", "epoch": epoch, "step": epoch * 5, "samples": 40});
        let validated = |epoch: u64| json!({"event": "validated", "epoch": epoch, "samples": 12});
        vec![
            json!({"event": "run_started", "term": 1}),
            formed(1, 0),
            progress(1, 3),
            json!({"event": "checkpoint_committed", "id": "e0001-s00000003", "step": 3}),
            finished(1),
            validated(1),
            json!({"event": "run_started", "term": 2}),
            json!({"event": "coordinator_restarted", "term": 2}),
            formed(2, 5),
            progress(2, 8),
            finished(2),
            validated(2),
        ]
    }

    fn history(events: &[Value]) -> History {
        let events = events.iter().map(|event| Event::parse(event.to_string().as_bytes())).collect();
        History::new(events, 40, 12, 8)
    }

    #[track_caller]
    fn breaks(rule: &str, change: impl FnOnce(&mut Vec<Value>)) {
        let mut events = sound();
        change(&mut events);
        let violations = history(&events).violations();
        assert!(violations.iter().any(|violation| violation.starts_with(rule)), "{rule}: {violations:?}");
    }

    #[test]
    fn a_sound_history_breaks_no_rule() {
        assert_eq!(history(&sound()).violations(), [""; 0]);
    }

    #[test]
    fn each_rule_can_be_broken() {
        breaks("each sample of an epoch", |events| events[4]["samples"] = 32.into());
        breaks("each sample of an epoch", |events| events[10]["step"] = 11.into());
        breaks("each sample is validated", |events| events[5]["samples"] = 24.into());
        breaks("each epoch ends once", |events| events.push(events[10].clone()));
        breaks("each epoch ends once", |events| drop(events.drain(4..8)));
        breaks("steps never go back", |events| events[8]["applied_step"] = 3.into());
        breaks("steps never go back", |events| events[9]["step"] = 4.into());
        breaks("replicas agree", |events| {
            events.push(json!({"event": "generation_aborted", "cause": "states_differ"}));
        });
        breaks("generations and terms", |events| events[8]["generation"] = 1.into());
        breaks("generations and terms", |events| events[6]["term"] = 1.into());
    }

    #[test]
    fn steps_are_taken_again_from_a_sound_checkpoint_when_all_holders_are_gone() {
        let mut events = sound();
        events[4]["event"] = "worker_slow".into(); // the first life got as far as step 4
        events.remove(5);
        events[2]["step"] = 4.into();
        events[7]["applied_step"] = 3.into();
        events[8]["step"] = 4.into();
        events.insert(9, sound()[4].clone());
        events.insert(10, sound()[5].clone());
        let killed = |names: &[&str]| {
            names.iter().map(|name| (5, Blow::WorkerKilled((*name).into()))).collect::<Vec<_>>()
        };
        let both = History { blows: killed(&["ox", "mule"]), ..history(&events) };
        assert_eq!(both.violations(), [""; 0]);
        assert_eq!(both.falls(), [Fall { from: 4, to: 3, holders: Holders::AllGone }]);

        events[7]["applied_step"] = 0.into();
        let too_far = History { blows: killed(&["ox", "mule"]), ..history(&events) };
        assert_eq!(too_far.violations().len(), 1);
        let damaged = (5, Blow::CheckpointDamaged("e0001-s00000003".into()));
        let blows = killed(&["ox", "mule"]).into_iter().chain([damaged]).collect();
        assert_eq!(History { blows, ..history(&events) }.violations(), [""; 0]);

        events[2]["step"] = 5.into();
        let one = History { blows: killed(&["ox"]), ..history(&events) };
        assert!(!one.violations().is_empty(), "the other held them");
    }
}
