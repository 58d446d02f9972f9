//! The real core's runs, as a collector would see them.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use musher_proto::{
    ids::Generation,
    message::{FromWorker, Phase, Progress},
};
use opentelemetry::Value;

use super::*;
use crate::core::{
    Event, Fences, RunState,
    tests::sim::{Move, Sim, heartbeat, job},
};

/// Of any run, whatever happened: spans of one trace hang from one root and, but for checkpoints, follow each other
/// within it. Lives of the coordinator that ended by its death leave roots out.
pub(crate) fn invariant_a_generation_is_one_trace(spans: &[Span]) {
    let ids: BTreeSet<[u8; 8]> = spans.iter().map(|span| span.at.span.to_bytes()).collect();
    assert_eq!(ids.len(), spans.len(), "an id is used twice: {spans:#?}");
    let mut traces: BTreeMap<[u8; 16], Vec<&Span>> = BTreeMap::new();
    for span in spans {
        assert!(span.begun <= span.ended, "{span:?}");
        traces.entry(span.at.trace.to_bytes()).or_default().push(span);
    }
    for spans in traces.values() {
        let (roots, children): (Vec<&Span>, Vec<&Span>) =
            spans.iter().partition(|span| span.parent.is_none());
        assert!(roots.len() <= 1, "two roots: {spans:#?}");
        let parents: BTreeSet<[u8; 8]> =
            children.iter().map(|span| span.parent.unwrap().to_bytes()).collect();
        assert!(parents.len() <= 1, "two parents: {spans:#?}");
        let stages = children.iter().filter(|span| span.name != "checkpoint");
        let mut before = roots.first().map_or(Time::ZERO, |root| root.begun);
        for stage in stages {
            assert!(before <= stage.begun, "{stage:?} begins within the one before it: {spans:#?}");
            before = stage.ended;
        }
        if let Some(root) = roots.first() {
            assert!(parents.iter().all(|parent| *parent == root.at.span.to_bytes()), "{spans:#?}");
            assert!(before <= root.ended, "{spans:#?}");
        }
    }
}

fn two_workers() -> Sim {
    let mut sim = Sim::new(job());
    sim.join("a");
    sim.join("b");
    sim
}

fn of(sim: &Sim, generation: i64) -> Vec<&Span> {
    let is_its = |span: &&Span| attribute(span, "musher.generation") == Some(&Value::I64(generation));
    sim.spans.iter().filter(is_its).collect()
}

fn attribute<'a>(span: &'a Span, key: &str) -> Option<&'a Value> {
    span.attributes.iter().find(|attribute| attribute.key.as_str() == key).map(|attribute| &attribute.value)
}

fn number(span: &Span, key: &str) -> i64 {
    match attribute(span, key) {
        Some(Value::I64(number)) => *number,
        other => panic!("{key} is {other:?} in {span:?}"),
    }
}

fn names(spans: &[&Span]) -> Vec<&'static str> {
    spans.iter().map(|span| span.name).collect()
}

#[test]
fn a_run_without_trouble_is_one_trace() {
    let mut sim = two_workers();
    sim.run();
    let spans = of(&sim, 1);
    assert_eq!(spans.len(), sim.spans.len());
    assert!(spans.iter().all(|span| span.error.is_none()), "{spans:#?}");
    let stages: Vec<_> = names(&spans).into_iter().filter(|name| *name != "checkpoint").collect();
    let epoch = ["epoch", "validate"];
    assert_eq!(stages, [&["form", "sync"][..], &epoch, &epoch, &epoch, &["generation"]].concat());
    assert_eq!(names(&spans).into_iter().filter(|name| *name == "checkpoint").count(), 3);

    let root = spans.last().unwrap();
    assert_eq!((root.name, root.parent, root.link), ("generation", None, None));
    assert_eq!((number(root, "musher.world_size"), number(root, "musher.step.begin")), (2, 0));
    assert_eq!(number(root, "musher.step.end"), 9);
    let epochs: Vec<_> = spans.iter().filter(|span| span.name == "epoch").collect();
    let steps = epochs.iter().map(|span| {
        assert_eq!(attribute(span, "musher.epoch.finished"), Some(&Value::Bool(true)));
        (number(span, "musher.epoch"), number(span, "musher.step.begin"), number(span, "musher.step.end"))
    });
    assert_eq!(steps.collect::<Vec<_>>(), [(1, 0, 3), (2, 3, 6), (3, 6, 9)]);
    let checkpoint = spans.iter().find(|span| span.name == "checkpoint").unwrap();
    assert_eq!(attribute(checkpoint, "musher.checkpoint.id"), Some(&Value::from("e0001-s00000003")));
    assert_eq!(number(checkpoint, "musher.checkpoint.size_bytes"), 40);
}

/// Segments that end for a checkpoint, and pauses, do not divide it.
#[test]
fn an_epoch_of_several_segments_is_one_span() {
    let mut job = job();
    job.checkpoint.every_steps = 1;
    let mut sim = Sim::new(job);
    sim.join("a");
    sim.run();
    assert_eq!(names(&of(&sim, 1)).into_iter().filter(|name| *name == "epoch").count(), 3);
}

#[test]
fn an_abort_ends_what_is_open_with_its_reason_and_the_next_generation_links_back() {
    for (phase, stage) in [("forming", "form"), ("training", "epoch"), ("validating", "validate")] {
        let mut sim = two_workers();
        sim.until(|sim| sim.phase() == phase);
        let b = sim.session_of("b").unwrap();
        sim.kill(b);
        sim.run();
        let first = of(&sim, 1);
        let [.., open, root] = &first[..] else { panic!("{first:#?}") };
        assert_eq!((open.name, root.name), (stage, "generation"), "{first:#?}");
        let reason = root.error.as_deref().unwrap();
        assert_eq!(open.error.as_deref(), Some(reason));
        let cause = attribute(root, "error.type").unwrap();
        assert!(["member_lost", "exchange_broken"].contains(&&*cause.as_str()), "{cause} while {phase}");
        let whole = |span: &&&Span| span.error.is_none();
        assert_eq!(first.iter().filter(whole).count(), first.len() - 2, "{first:#?}");

        let second = of(&sim, 2);
        let next = second.iter().find(|span| span.name == "generation").unwrap();
        assert_eq!((next.link, &next.error), (Some(root.at), &None));
        assert_ne!(next.at.trace, root.at.trace);
        assert_eq!(number(next, "musher.world_size"), 1);
        assert!(next.begun >= root.ended);
    }
}

/// Heartbeats tell that all are connected, before any has the state.
#[test]
fn an_abort_in_the_sync_is_the_syncs() {
    let mut sim = two_workers();
    sim.until(|sim| sim.phase() == "forming");
    sim.settle_orders();
    let syncing = Progress { phase: Phase::Syncing, ..heartbeat() };
    for name in ["a", "b"] {
        let session = sim.session_of(name).unwrap();
        sim.say(session, Generation(1), FromWorker::Progress(syncing));
        assert_eq!(names(&of(&sim, 1)), if name == "b" { vec!["form"] } else { vec![] });
    }
    sim.kill(sim.session_of("b").unwrap());
    sim.run();
    let first = of(&sim, 1);
    assert_eq!(names(&first), ["form", "sync", "generation"]);
    let ended_well: Vec<bool> = first.iter().map(|span| span.error.is_none()).collect();
    assert_eq!(ended_well, [true, false, false]);
    assert_eq!(first[2].events.iter().map(|event| event.name).collect::<Vec<_>>(), ["worker_left"]);
}

#[test]
fn a_newcomer_begins_another_trace_and_nothing_is_an_error() {
    let mut sim = two_workers();
    sim.until(|sim| sim.phase() == "training");
    sim.settle_orders();
    sim.perform(Move::Step(Generation(1)));
    sim.join("c");
    sim.run();
    assert_eq!((of(&sim, 1).len(), of(&sim, 3).len()), (4, 0), "{:#?}", sim.spans);
    let epochs: Vec<&Span> = [1, 2]
        .into_iter()
        .flat_map(|generation| of(&sim, generation))
        .filter(|span| span.name == "epoch" && number(span, "musher.epoch") == 1)
        .collect();
    assert_eq!(epochs.len(), 2, "{epochs:#?}");
    let finished = epochs.iter().map(|span| attribute(span, "musher.epoch.finished").is_some());
    assert_eq!(finished.collect::<Vec<_>>(), [false, true]);
    assert_eq!(number(epochs[1], "musher.step.begin"), 2, "the step in flight is finished first");
    assert!(sim.spans.iter().all(|span| span.error.is_none()));
}

#[test]
fn a_failed_run_says_why_and_leaves_nothing_open() {
    let mut sim = two_workers();
    sim.until(|sim| sim.phase() == "training");
    sim.tell(Event::TeamLost { reason: "all workers were given up".into() });
    sim.run();
    let first = of(&sim, 1);
    let [.., epoch, root] = &first[..] else { panic!("{first:#?}") };
    assert_eq!((epoch.name, root.name), ("epoch", "generation"));
    for span in [epoch, root] {
        assert!(span.error.as_deref().unwrap().starts_with("all workers were given up"), "{span:?}");
    }
    assert!(sim.tracer.is_at_rest());
}

#[test]
fn a_checkpoint_that_fails_says_why_and_its_epoch_goes_on() {
    let mut sim = two_workers();
    sim.until(|sim| sim.spans.iter().any(|span| span.name == "validate"));
    sim.settle_orders();
    sim.lose_upload(0);
    sim.run();
    let failed: Vec<&Span> = sim.spans.iter().filter(|span| span.error.is_some()).collect();
    assert_eq!((names(&failed), failed[0].error.as_deref()), (vec!["checkpoint"], Some("no space left")));
}

/// A resumed run's generations are others, with what is known of the one before; one that goes on under a new
/// coordinator keeps its trace, and its children find their root there.
#[test]
fn ids_follow_from_the_run_and_the_generation() {
    let life = |id: &str, term: u64, generation: u64| {
        let fences = Fences { term: Term(term), generation: Generation(generation), ..Fences::default() };
        let state = RunState { id: id.into(), fences, ..RunState::default() };
        Spans::of(&Origin {
            job: job(),
            run: "r".into(),
            state,
            resumed: None,
            listen: true,
            entropy: [0; 32],
        })
    };
    let goes_on = |spans: &mut Spans, generation: u64| {
        let event = RunEvent::GenerationContinued { generation: Generation(generation), world_size: 2 };
        assert!(spans.observe(Time::ZERO, &Action::Emit(event)).is_empty());
        let ended = RunEvent::RunFailed { reason: "it is enough".into() };
        spans.observe(Time::ZERO, &Action::Emit(ended))[0].clone()
    };
    let [first, second] = [1, 2].map(|term| goes_on(&mut life("r1", term, 3), 3));
    assert_eq!(first.at, second.at);
    assert_eq!(attribute(&second, "musher.generation.continued"), Some(&Value::Bool(true)));
    assert_ne!(first.at, goes_on(&mut life("r2", 1, 3), 3).at, "another run of the same name");
    assert_ne!(first.at.trace, goes_on(&mut life("r1", 1, 3), 4).at.trace);
}

/// It was not told anew what to train on.
#[test]
fn a_generation_that_goes_on_is_at_the_epoch_that_it_reports() {
    let mut sim = two_workers();
    sim.until(|sim| sim.phase() == "training");
    let state = RunState { id: "r1".into(), ..RunState::default() };
    let origin = Origin { job: job(), run: "r".into(), state, resumed: None, listen: true, entropy: [0; 32] };
    let mut spans = Spans::of(&origin);
    let events = [
        RunEvent::GenerationContinued { generation: Generation(1), world_size: 2 },
        RunEvent::Progress(crate::core::effects::ProgressReport {
            generation: Generation(1),
            epoch: Epoch(2),
            step: Step(5),
            cursor: 6,
            samples: 7,
            loss: 1.0,
            learning_rate: 1e-4,
            images_per_second: 1.0,
            eta_s: 1.0,
        }),
        RunEvent::RunFailed { reason: "it is enough".into() },
    ];
    let ended: Vec<Span> =
        events.into_iter().flat_map(|event| spans.observe(Time::ZERO, &Action::Emit(event))).collect();
    assert_eq!(names(&ended.iter().collect::<Vec<_>>()), ["epoch", "generation"]);
    assert_eq!((number(&ended[0], "musher.epoch"), number(&ended[0], "musher.step.begin")), (2, 5));
}
