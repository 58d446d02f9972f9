//! Where a step's time goes, as a trace shows it. Alone in its process, as the record is the whole process's.

#![allow(clippy::unwrap_used)]

#[path = "team/fault.rs"]
#[allow(dead_code)]
mod fault;
#[path = "team/harness.rs"]
#[allow(dead_code)]
mod harness;
#[path = "team/start.rs"]
mod start;

use harness::{Pets, STEPS_PER_EPOCH, Team, job_with_batch_norm};
use musher_worker::trace::{Interval, Trace};
use serde_json::Value;
use tracing_subscriber::layer::SubscriberExt;

#[test]
fn the_first_buckets_sum_begins_before_backward_ends() {
    let trace = Trace::default();
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(trace.clone())).unwrap();
    let pets = Pets::drawn();
    let mut team = Team::seeded(&pets, &job_with_batch_norm(), 2);
    let buckets = team.0[0].trainer.replica().buckets().len();
    team.train(pets.epoch(1));

    let intervals = trace.intervals();
    let of = |name: &str, rank: u64, step: u64| -> Vec<Interval> {
        let is_meant = |interval: &&Interval| {
            interval.name == name
                && interval.number("rank") == Some(rank)
                && interval.number("step") == Some(step)
        };
        intervals.iter().filter(is_meant).cloned().collect()
    };
    let mut overlapped = 0;
    for rank in 0..2 {
        for step in 0..STEPS_PER_EPOCH as u64 {
            let (backward, sums) = (of("backward", rank, step), of("all_reduce", rank, step));
            assert!(sums.iter().map(|sum| sum.number("bucket").unwrap()).eq(0..buckets as u64));
            let in_turn = |pair: &[Interval]| pair[0].end <= pair[1].start;
            assert!(sums.windows(2).all(in_turn), "bucket k comes after k-1");
            overlapped += usize::from(sums[0].start < backward[0].end);
            assert!(
                of("control", rank, step)[0].start >= sums[buckets - 1].end,
                "the control word comes last"
            );
        }
    }
    println!("{overlapped} of {} steps began to sum before backward ended", 2 * STEPS_PER_EPOCH);
    // All, but where the machine left the exchange's thread standing for a whole backward pass.
    assert!(overlapped > STEPS_PER_EPOCH);

    let mut file = Vec::new();
    trace.write(&mut file).unwrap();
    let file: Value = serde_json::from_slice(&file).unwrap();
    let sums = |event: &&Value| event["name"] == "all_reduce" && event["dur"].as_f64().unwrap() > 0.0;
    let sums = file["traceEvents"].as_array().unwrap().iter().filter(sums).count();
    assert_eq!(sums, 2 * STEPS_PER_EPOCH * buckets);
}
