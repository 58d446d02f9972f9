//! Links that are cut without a word: between a worker and its peers, between it and the coordinator,
//! or both. Hosts are network namespaces, so this needs the rights of an administrator.

use musher_tests::{
    Event, Job, Scene,
    network::{Link, Network},
};

use crate::checks::goes_on_and_ends_well;

const WORKERS: usize = 3;
/// Whose links are cut.
const OUTCAST: usize = 2;

/// Cuts `links` of one worker in mid-epoch, until the others have formed a generation of their own;
/// then the team must become whole again. Returns why the worker left.
fn is_resolved(links: &[Link]) -> Option<Event> {
    let network = match Network::build(WORKERS) {
        Ok(network) => network,
        Err(reason) => {
            println!("skipped: network namespaces can't be made here: {reason}");
            return None;
        }
    };
    let scene = Scene::new();
    let data = scene.data_of(160, 12);
    let job = Job::tiny(&data)
        .endless()
        .hasty()
        .set("cluster.workers", WORKERS)
        .set("checkpoint.every_steps", 4)
        .set("server.grpc", format!("{:?}", network.coordinator_address()));
    let mut run = scene.serve_on(&network.coordinator(), &job, "cut", &["--insecure"]);
    let url = run.address();
    let workers: Vec<_> = (1..=WORKERS)
        .map(|worker| {
            let advertise = network.peer_address(worker);
            let name = format!("worker-{worker}");
            scene.join_on(&network.worker(worker), &url, &name, &["--advertise", &advertise])
        })
        .collect();
    run.wait_for_mid_epoch();

    for &link in links {
        network.cut(OUTCAST, link);
    }
    let told = run.events().len();
    let outcast = format!("worker-{OUTCAST}");
    let left = run.wait_past(told, "worker_left", |event| event.text("worker") == outcast);
    // Where only one end of its two links had something on its way, that link's other end may be tried first.
    let since = run.events().split_off(told);
    let mistaken: Vec<_> =
        since.iter().filter(|e| e.name() == "worker_left" && e.text("worker") != outcast).collect();
    assert!(mistaken.len() <= 1, "the wrong ones were put out: {mistaken:?}");
    assert!(mistaken.iter().all(|event| event.text("cause") == "unreachable"), "{mistaken:?}");
    let aborted = run.wait_past(told, "generation_aborted", |_| true);
    assert!(!aborted.text("cause").is_empty(), "{aborted:?}");
    let formed = run.wait_past(told, "generation_formed", |event| event.number("world_size") == 2);
    let without = formed.number("applied_step");
    run.wait_past(told, "progress", |event| event.number("step") > without);

    let told = run.events().len();
    for &link in links {
        network.heal(OUTCAST, link);
    }
    run.wait_past(told, "generation_formed", |event| event.number("world_size") == 3);
    goes_on_and_ends_well(run, &data);
    for worker in workers {
        worker.wait().expect_code(75);
    }
    Some(left)
}

#[test]
fn a_worker_that_its_peers_do_not_reach() {
    let Some(left) = is_resolved(&[Link::Peers]) else { return };
    assert_eq!(left.text("cause"), "unreachable", "{left:?}");
}

#[test]
fn a_worker_that_the_coordinator_does_not_reach() {
    let Some(left) = is_resolved(&[Link::Control]) else { return };
    assert_eq!(left.text("cause"), "silent", "{left:?}");
}

#[test]
fn a_worker_that_nobody_reaches() {
    let Some(left) = is_resolved(&[Link::Control, Link::Peers]) else { return };
    assert_eq!(left.text("cause"), "silent", "{left:?}");
}
