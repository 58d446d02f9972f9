//! Workers that die or go away, one of them or all, at each point of a run.

use std::fs;

use musher_tests::{DataSet, Event, Job, Process, Run, Scene, faults::Stopped, process::until, run::Ended};
use rustix::process::{Signal, kill_process};

use crate::checks::{
    each_sample_is_trained_on_once, each_sample_is_validated_once, figures, goes_on_and_ends_well,
    nothing_is_lost,
};

/// 20 steps an epoch.
const TRAIN: usize = 160;
/// What dies stays dead.
const NO_RESTARTS: [&str; 2] = ["--max-restarts", "0"];

fn job(data: &DataSet) -> Job {
    Job::tiny(data).set("checkpoint.every_steps", 4)
}

#[test]
fn survivors_go_on_when_a_worker_is_killed() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let job = job(&data).set("model.freeze_batch_norm", true);
    let whole = scene.launch(&job, "whole", 3, &[]).wait().expect_code(0);

    let mut run = scene.launch(&job, "killed", 3, &NO_RESTARTS);
    run.wait_for_mid_epoch();
    let processes = [0, 1, 2].map(|rank| run.worker(rank));
    kill_process(processes[1], Signal::KILL).expect("it runs");
    run.wait_for_nth("epoch_started", 2);
    assert_eq!([run.worker(0), run.worker(2)], [processes[0], processes[2]], "no survivor was restarted");
    let run = run.wait().expect_code(0);

    the_loss_is_told(&run, ".1");
    nothing_is_lost(&run.events, &data);
    let sizes: Vec<_> = run.all("generation_formed").iter().map(|event| event.number("world_size")).collect();
    assert_eq!(sizes, [3, 2]);
    let second = run.all("generation_formed")[1];
    assert!(second.number("applied_step") > 0, "the survivors kept what was trained: {second:?}");
    assert_eq!(run.all("epoch_started").len(), 2, "no epoch began anew");
    each_sample_is_trained_on_once(&run, TRAIN as u64, 8);
    each_sample_is_validated_once(&run, 12);
    // The same samples in the same steps: only the order of float sums differs.
    for (epoch, undisturbed) in figures(&whole) {
        let ratio = figures(&run)[&epoch].train_loss / undisturbed.train_loss;
        assert!((ratio - 1.0).abs() < 1e-2, "epoch {epoch} trained on other samples: {ratio}");
    }
}

fn the_loss_is_told(run: &Ended, worker: &str) {
    let left = run.one("worker_left");
    assert!(left.text("worker").ends_with(worker), "{left:?}");
    assert_eq!((left.text("cause"), left["rank"].is_u64()), ("disconnected", true), "{left:?}");
    let aborted = run.one("generation_aborted");
    assert_eq!(aborted.number("generation"), run.all("generation_formed")[0].number("generation"));
    // Its neighbours may notice before the coordinator does.
    match aborted.text("cause") {
        "member_lost" => {
            assert_eq!((&aborted["worker"], &aborted["rank"]), (&left["worker"], &left["rank"]));
            assert!(aborted.text("reason").contains(left.text("reason")), "{aborted:?}");
        }
        "exchange_broken" => assert_ne!(aborted["worker"], left["worker"], "{aborted:?}"),
        other => panic!("{other}: {aborted:?}"),
    }
}

/// Also: it is told between the epoch's end and its validation's.
#[test]
fn a_worker_that_dies_in_validation_costs_nothing() {
    let scene = Scene::new();
    let data = scene.data_of(40, 160);
    let mut run = scene.launch(&Job::tiny(&data), "validating", 2, &NO_RESTARTS);
    run.wait_for_nth("epoch_finished", 1);
    kill_process(run.worker(1), Signal::KILL).expect("it runs");
    let run = run.wait().expect_code(0);
    let told = ["epoch_finished", "worker_left", "generation_aborted", "generation_formed", "validated"];
    let order: Vec<_> = run.events.iter().map(Event::name).filter(|name| told.contains(name)).collect();
    let from = order.iter().position(|name| *name == "epoch_finished").expect("the test waited for it");
    assert_eq!(order[from..from + 5], told);
    nothing_is_lost(&run.events, &data);
}

/// First the newcomer dies, then another's donor: in both cases the others hold all that was trained.
#[test]
fn deaths_while_a_newcomer_is_synced_cost_nothing() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let job = job(&data).endless().set("cluster.workers", 2);
    let mut run = scene.serve(&job, "syncing", &[]);
    let mut old = ["ox", "mule"].map(|name| scene.join(&run, name, &[]));
    run.wait_for_mid_epoch();

    let (mut newcomer, stopped) = newcomer_in_sync(&scene, &mut run);
    let told = run.events().len();
    newcomer.kill_with_children();
    drop(stopped);
    run.wait_past(told, "generation_formed", |event| event.number("world_size") == 2);

    let (newcomer, stopped) = newcomer_in_sync(&scene, &mut run);
    let told = run.events().len();
    let donor = run.events().iter().rfind(|event| event.name() == "generation_formed").cloned();
    let donor = donor.expect("two were formed").text("donor").to_owned();
    old[usize::from(donor == "mule")].kill_with_children();
    stopped.wake();
    let formed = run.wait_past(told, "generation_formed", |event| event.number("world_size") == 2);
    assert_ne!(formed.text("donor"), donor);
    goes_on_and_ends_well(run, &data);
    newcomer.wait().expect_code(75);
}

/// A worker that has joined, and that stands still while the team waits for it to take its state.
fn newcomer_in_sync(scene: &Scene, run: &mut Run) -> (Process, Stopped) {
    for attempt in 0..10 {
        let told = run.events().len();
        let name = format!("newcomer-{told}-{attempt}");
        let mut newcomer = scene.join(run, &name, &[]);
        run.wait_past(told, "worker_joined", |event| event.text("worker") == name);
        let stopped = Stopped::stop(newcomer.id());
        let forms = || {
            let formed = run.events()[told..].iter().any(|event| event.name() == "generation_formed");
            let forming = scene.status(run)["phase"] == "forming";
            (formed || forming).then_some(forming && !formed)
        };
        if until(forms, || "the newcomer was not taken in".into()) {
            return (newcomer, stopped);
        }
        // It was in before it stood still.
        let told = run.events().len();
        newcomer.kill_with_children();
        run.wait_past(told, "generation_formed", |_| true);
    }
    panic!("no newcomer was caught in its sync\n{}", run.said());
}

#[test]
fn a_worker_that_dies_during_an_upload_costs_that_checkpoint_alone() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let mut run = scene.launch(&job(&data).endless(), "uploading", 2, &NO_RESTARTS);
    run.wait_for_nth("epoch_started", 1);
    let worker = run.worker(1);
    let (stopped, id) = run.stop_in_a_checkpoint(worker);
    kill_process(worker, Signal::KILL).expect("it runs");
    drop(stopped);
    let failed = run.wait_for_nth("checkpoint_failed", 1);
    assert_eq!(failed.text("id"), id);
    let run = goes_on_and_ends_well(run, &data);
    let left = fs::read_dir(run.dir.join("checkpoints")).expect("it is there").flatten();
    for checkpoint in left {
        assert!(checkpoint.path().join("manifest.json").is_file(), "{checkpoint:?} is half-written");
    }
}

#[test]
fn a_run_whose_workers_are_all_dead_fails() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let mut run = scene.launch(&job(&data), "dead", 2, &NO_RESTARTS);
    run.wait_for_nth("epoch_started", 1);
    for rank in [0, 1] {
        kill_process(run.worker(rank), Signal::KILL).expect("it runs");
    }
    let run = run.wait().expect_code(1);
    let reason = run.one("run_failed").text("reason").to_owned();
    assert!(reason.contains("SIGKILL"), "{reason}");
    let line = run.end.last_line();
    assert_eq!((&line["status"], &line["reason"]), (&"failed".into(), &reason.into()));
}

#[test]
fn below_min_workers_a_run_waits_for_another() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let job = job(&data).set("train.epochs", 1).set("cluster.min_workers", 2);
    let mut run = scene.launch(&job, "short-handed", 2, &NO_RESTARTS);
    run.wait_for_mid_epoch();
    kill_process(run.worker(0), Signal::KILL).expect("it runs");
    let waiting = run.wait_for_nth("waiting_for_workers", 2);
    assert_eq!((waiting.number("present"), waiting.number("expected")), (1, 2));
    let substitute = scene.join(&run, "substitute", &[]);
    let run = run.wait().expect_code(0);
    substitute.wait().expect_code(0);
    let sizes: Vec<_> = run.all("generation_formed").iter().map(|event| event.number("world_size")).collect();
    // The survivor forms alone to save what it holds, unless that was saved already; then it waits.
    assert!(sizes == [2, 1, 2] || sizes == [2, 2], "{sizes:?}");
    let formed = run.all("generation_formed");
    let saved = formed[1].number("applied_step");
    assert!(saved > 0, "the survivor's state was kept");
    assert_eq!(
        formed[formed.len() - 1].number("applied_step"),
        saved,
        "nothing was trained below min_workers"
    );
    assert!(run.all("checkpoint_committed").iter().any(|event| event.number("step") == saved));
    nothing_is_lost(&run.events, &data);
}

#[test]
fn a_dead_worker_is_started_again_and_taken_in() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let mut run = scene.launch(&job(&data), "restarted", 2, &[]);
    run.wait_for_mid_epoch();
    let dead = run.worker(1);
    kill_process(dead, Signal::KILL).expect("it runs");
    run.wait_for_nth("generation_formed", 3);
    assert_ne!(run.worker(1), dead, "a new process has its place");
    let run = run.wait().expect_code(0);
    let sizes: Vec<_> = run.all("generation_formed").iter().map(|event| event.number("world_size")).collect();
    assert_eq!(sizes, [2, 1, 2]);
    assert_eq!(run.all("generation_aborted").len(), 1, "taking it in aborts nothing");
    nothing_is_lost(&run.events, &data);
}

#[test]
fn a_drained_worker_costs_no_step() {
    let scene = Scene::new();
    let data = scene.data_of(TRAIN, 12);
    let mut run = scene.launch(&job(&data), "drained", 3, &[]);
    run.wait_for_mid_epoch();
    let joined = run.wait_for_nth("worker_joined", 1);
    let host = joined.text("host").to_owned();
    let drained = scene.run(&["drain", &run.address(), &format!("{host}.1")]);
    drained.expect_code(0);
    run.wait_for_nth("worker_left", 1);
    kill_process(run.worker(2), Signal::TERM).expect("it runs");
    run.wait_for_nth("worker_left", 2);
    let unknown = scene.run(&["drain", &run.address(), "nobody"]).expect_code(1);
    assert!(unknown.last_words().contains("no worker nobody"), "{}", unknown.last_words());
    let run = run.wait().expect_code(0);
    let sizes: Vec<_> = run.all("generation_formed").iter().map(|event| event.number("world_size")).collect();
    assert_eq!(sizes, [3, 2, 1]);
    assert!(run.all("generation_aborted").is_empty(), "nobody was interrupted");
    nothing_is_lost(&run.events, &data);
}
