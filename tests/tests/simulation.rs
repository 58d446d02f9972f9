//! The whole protocol in simulation: thousands of seeds, and every scenario that once failed.

#![allow(clippy::unwrap_used)]

use std::{fs, path::Path};

use musher_tests::sim::{Failure, Scenario, run, seeds, simulate};

/// Always the same, so that what passes here passes everywhere; `make soak` draws others.
const SEEDS: u64 = 6000;

/// What the simulations are for: a change of the generator must not lose any of it.
const SEEN: [&str; 40] = [
    "aborts: exchange broken",
    "aborts: exchange stuck",
    "aborts: member lost",
    "checkpoints committed",
    "checkpoints failed",
    "clock jumps",
    "coordinator crashes between two actions",
    "coordinators of another run turned down",
    "early stops",
    "fault: coordinator killed",
    "fault: coordinator stopped",
    "fault: disk full",
    "fault: drain",
    "fault: link cut",
    "fault: link half open",
    "fault: link slow",
    "fault: newcomer",
    "fault: partition",
    "fault: stop requested",
    "fault: stream reset",
    "fault: thread slow",
    "fault: thread stuck for a while",
    "fault: thread stuck for ever",
    "fault: worker killed",
    "fault: worker stopped",
    "fault: worker terminated",
    "fault: worker's machine gone",
    "generations continued by a new coordinator",
    "left: disconnected",
    "left: drained",
    "left: replaced",
    "left: silent",
    "left: stuck",
    "left: unreachable",
    "processes ended as their thread is stuck",
    "stale messages",
    "starts from a checkpoint",
    "strangers turned away",
    "uploads that broke off",
    "workers that returned to their place",
];

#[test]
fn the_invariants_hold_in_thousands_of_simulations() {
    let tally = seeds(0..SEEDS);
    println!("{}", tally.coverage);
    if let Some((seed, violation)) = tally.failed.first() {
        let failure = Failure::shrunk(&Scenario::generate(*seed), violation.clone());
        panic!(
            "{} of {SEEDS} seeds fail, the first:\n{}",
            tally.failed.len(),
            failure.tell(&run::failures())
        );
    }
    for what in SEEN {
        assert!(tally.coverage.times(what) > 0, "no simulation came through this: {what}");
    }
}

/// Each file is named after what must hold, and holds the faults under which it once did not.
#[test]
fn what_once_failed_does_not_fail_again() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("replays");
    let mut failed = Vec::new();
    for file in fs::read_dir(dir).unwrap() {
        let file = file.unwrap().path();
        let report = simulate(&run::replay(&file).unwrap(), false);
        failed.extend(report.violation.map(|violation| format!("{}: {violation:?}", file.display())));
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn a_seed_repeats_itself_event_by_event() {
    for seed in [3, 17, 102] {
        let traced = || simulate(&Scenario::generate(seed), true).trace;
        assert_eq!(traced(), traced());
    }
}

#[test]
fn a_scenario_survives_its_file() {
    for seed in 0..50 {
        let scenario = Scenario::generate(seed);
        let text = serde_json::to_string(&scenario).unwrap();
        assert_eq!(serde_json::from_str::<Scenario>(&text).unwrap(), scenario);
    }
}
