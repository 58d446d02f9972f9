//! What stands still without having died: a worker, its training thread alone, the coordinator. And a
//! worker that is merely slow.

use std::{thread, time::Duration};

use musher_tests::{
    DataSet, Job, Scene,
    faults::{HeldThread, Slowed, Stopped},
    process::until,
};

use crate::checks::goes_on_and_ends_well;

/// 20 steps an epoch.
const TRAIN: usize = 160;

fn job(data: &DataSet) -> Job {
    Job::tiny(data).endless().hasty().set("checkpoint.every_steps", 4)
}

#[test]
fn a_stopped_worker_is_removed_and_joins_again_when_it_wakes() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let mut run = scene.launch(&job(&data), "hung", 2, &[]);
    run.wait_for_mid_epoch();
    let hung = run.worker(1);
    let stopped = Stopped::stop(hung);
    let left = run.wait_for_nth("worker_left", 1);
    assert!(left.text("worker").ends_with(".1"), "{left:?}");
    assert_eq!((left.text("cause"), left.number("rank")), ("silent", 1), "{left:?}");
    assert!(left.text("reason").contains("cluster.heartbeat_timeout_s"), "{left:?}");
    assert!(left.real("waited_s") >= 2.0, "{left:?}");
    let aborted = run.wait_for_nth("generation_aborted", 1);
    assert_eq!((aborted.text("cause"), &aborted["worker"]), ("member_lost", &left["worker"]));
    let alone = run.wait_for_nth("generation_formed", 2).number("applied_step");
    run.wait_for("a step without it", |event| event.name() == "progress" && event.number("step") > alone);

    let told = run.events().len();
    stopped.wake();
    run.wait_past(told, "worker_joined", |event| event["worker"] == left["worker"]);
    run.wait_past(told, "generation_formed", |event| event.number("world_size") == 2);
    assert_eq!(run.worker(1), hung, "it came back in the same process");
    let run = goes_on_and_ends_well(run, &data);
    assert_eq!(run.all("worker_left")[0], &left);
    assert_eq!(run.all("generation_aborted").len(), 1, "taking it in aborts nothing");
}

#[test]
fn a_coordinator_that_was_stopped_accuses_nobody() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let mut run = scene.launch(&job(&data), "paused", 2, &[]);
    run.wait_for_mid_epoch();
    let stopped = Stopped::stop(run.id());
    // How long it stands is the fault itself: its heartbeat time-out, and one more second.
    thread::sleep(Duration::from_secs(3));
    stopped.wake();
    let run = goes_on_and_ends_well(run, &data);
    for accusation in ["worker_left", "generation_aborted"] {
        assert!(run.all(accusation).is_empty(), "{:?}", run.all(accusation));
    }
    run.one("generation_formed");
}

/// The process answers, its training thread does not: what a stuck device looks like.
#[test]
fn a_stuck_training_thread_is_removed_and_comes_back() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let mut run = scene.launch(&job(&data), "stuck", 3, &[]);
    run.wait_for_mid_epoch();
    let process = run.worker(1);
    let joined = run.wait_for_nth("worker_joined", 1);
    let name = format!("{}.1", joined.text("host"));
    let held = match HeldThread::hold(process, "train") {
        Ok(held) => held,
        Err(reason) => return println!("skipped: a thread can't be held: {reason}"),
    };
    until(
        || {
            let status = scene.status(&run);
            let suspect =
                status["workers"].as_array()?.iter().find(|worker| worker["worker"] == name)?.clone();
            (suspect["doing_s"].as_f64() > Some(1.0) && suspect["step"].as_u64() >= Some(4)).then_some(())
        },
        || "the status does not show for how long it has stood".into(),
    );
    let left = run.wait_for_nth("worker_left", 1);
    assert_eq!(left.text("worker"), name, "the one that is stuck, not those that wait: {left:?}");
    // In the exchange nobody knows whose part is missing, until it does not leave it either.
    assert!(["stuck", "unresponsive"].contains(&left.text("cause")), "{left:?}");
    assert!(left.number("step") >= 4 && left.real("waited_s") >= 3.0, "{left:?}");
    assert!(left.text("phase").starts_with("training"), "{left:?}");
    run.wait_past(0, "generation_formed", |event| event.number("world_size") == 2);
    let trouble = scene.status(&run)["last_trouble"].to_string();
    assert!(trouble.contains(&name) && trouble.contains("training"), "{trouble}");

    let told = run.events().len();
    held.release();
    run.wait_past(told, "generation_formed", |event| event.number("world_size") == 3);
    assert_eq!(run.worker(1), process, "it came back in the same process");
    goes_on_and_ends_well(run, &data);
}

#[test]
fn a_slow_worker_is_named_before_it_is_a_problem() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let mut run = scene.launch(&job(&data), "slow", 3, &[]);
    run.wait_for_mid_epoch();
    let slowed = Slowed::slow(run.worker(2));
    let named = run.wait_for("worker_slow for the third", |event| {
        event.name() == "worker_slow" && event.text("worker").ends_with(".2")
    });
    assert!(named.real("step_ms") > 1.5 * named.real("median_ms"), "{named:?}");
    drop(slowed);
    let run = goes_on_and_ends_well(run, &data);
    assert!(run.all("worker_left").is_empty(), "nobody was removed: {:?}", run.all("worker_left"));
}
