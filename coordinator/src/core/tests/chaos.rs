//! Random disturbances in a random order: the invariants hold throughout, and once the disturbances
//! stop the run ends.

use std::time::Duration;

use musher_proto::ids::Session;
use proptest::prelude::*;

use super::sim::{Sim, job};
use crate::{
    core::{Outcome, Status},
    traces::spans::invariant_a_generation_is_one_trace,
};

#[derive(Clone, Copy, Debug)]
enum Disturbance {
    /// Of all that can happen next, the one that the number picks.
    Move(usize),
    Connect(usize),
    Kill(usize),
    Reconnect(usize),
    /// The coordinator dies after so many more actions, or at once.
    Restart(Option<usize>),
    KillAway(usize),
    BreakStep {
        ahead: usize,
        victim: usize,
    },
    LoseUpload(usize),
    Repeat {
        who: usize,
        what: usize,
    },
    Wait(u64),
}

fn disturbance() -> impl Strategy<Value = Disturbance> {
    use Disturbance::*;
    let pick = 0usize..64;
    prop_oneof![
        80 => pick.clone().prop_map(Move),
        4 => (0usize..4).prop_map(Connect),
        2 => pick.clone().prop_map(Kill),
        2 => pick.clone().prop_map(Reconnect),
        2 => prop::option::of(0usize..12).prop_map(Restart),
        1 => pick.clone().prop_map(KillAway),
        3 => (0usize..4, pick.clone()).prop_map(|(ahead, victim)| BreakStep { ahead, victim }),
        2 => pick.clone().prop_map(LoseUpload),
        4 => (pick.clone(), pick).prop_map(|(who, what)| Repeat { who, what }),
        3 => (100u64..4000).prop_map(Wait),
    ]
}

fn disturb(sim: &mut Sim, disturbance: Disturbance) {
    let connected: Vec<Session> = sim.workers.iter().filter(|(_, w)| w.connected).map(|(&s, _)| s).collect();
    let worker = |pick: usize| connected.get(pick % connected.len().max(1)).copied();
    match disturbance {
        Disturbance::Move(pick) => {
            let moves = sim.moves();
            match moves.get(pick % moves.len().max(1)) {
                Some(&step) => sim.perform(step),
                None => sim.advance(Duration::from_secs(1)),
            }
        }
        Disturbance::Connect(which) => {
            sim.connect(["a", "b", "c", "d"][which]);
        }
        Disturbance::Kill(pick) => worker(pick).into_iter().for_each(|session| sim.kill(session)),
        Disturbance::Reconnect(pick) => {
            worker(pick).and_then(|session| sim.reconnect(session));
        }
        Disturbance::Restart(None) => sim.restart(),
        Disturbance::Restart(after) => sim.dies_after = after,
        Disturbance::KillAway(pick) => sim.kill_away(pick),
        Disturbance::BreakStep { ahead, victim } => {
            let generation = sim.live_generation();
            let members = sim.members(generation);
            if let Some(&victim) = members.get(victim % members.len().max(1)) {
                sim.break_step(generation, ahead, victim);
            }
        }
        Disturbance::LoseUpload(pick) => sim.lose_upload(pick),
        Disturbance::Repeat { who, what } => {
            worker(who).into_iter().for_each(|session| sim.repeat(session, what))
        }
        Disturbance::Wait(ms) => sim.advance(Duration::from_millis(ms)),
    }
}

/// Failures that disturbances may well lead to; anything else is the core's fault. Once they have stopped,
/// nobody is missing at the start any more.
fn is_excusable(outcome: &Outcome, disturbed: bool) -> bool {
    match &outcome.status {
        Status::Finished(_) => true,
        Status::Stopped => false,
        Status::Failed { reason } => {
            reason.contains("ended without a step")
                || reason.contains("could not be written")
                || disturbed && reason.contains("cluster.start_timeout_s")
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn invariants_hold_and_the_run_ends_once_disturbances_stop(
        every_steps in 0u64..4,
        every_epochs in 0u32..3,
        min_workers in 1u32..3,
        curve in prop::collection::vec(0.1f64..2.0, 3),
        disturbances in prop::collection::vec(disturbance(), 0..250),
    ) {
        let mut job = job();
        job.checkpoint.every_steps = every_steps;
        job.checkpoint.every_epochs = every_epochs;
        job.cluster.min_workers = min_workers;
        job.early_stopping.patience = 2;
        let mut sim = Sim::new(job);
        sim.curve = curve;
        sim.connect("a");
        sim.connect("b");
        for disturbance in disturbances {
            if sim.outcome.is_none() {
                disturb(&mut sim, disturbance);
            }
        }
        sim.dies_after = None;
        let disturbed = sim.outcome.is_some();
        if !disturbed {
            for name in ["a", "b"] {
                if sim.session_of(name).is_none() && !sim.away.iter().any(|worker| worker.name == name) {
                    sim.connect(name);
                }
            }
            sim.run();
        }
        invariant_a_generation_is_one_trace(&sim.spans);
        prop_assert!(sim.tracer.is_at_rest(), "{:?}", sim.tracer);
        let outcome = sim.outcome.expect("the run has ended");
        prop_assert!(is_excusable(&outcome, disturbed), "{outcome:?}");
    }
}
