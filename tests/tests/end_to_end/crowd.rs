//! The coordinator alone under hundreds of simulated workers, each on a stream of its own. How long it takes is a
//! benchmark (`crowd`); here it is that all of them get there.

use std::time::Duration;

use musher_tests::{
    crowd::{self, Options},
    run::Follower,
};

#[test]
fn hundreds_form_lose_one_take_one_in_and_go_on_to_the_next_epoch() {
    let dir = tempfile::tempdir().expect("the system has a temporary directory");
    let options = Options { workers: 300, train_samples: 1_000_000_000, steady: Duration::ZERO };
    let report = crowd::run(&options, dir.path()).unwrap_or_else(|error| panic!("{error:#}"));
    let steps: Vec<&str> = report.measured.iter().map(|measured| measured.what).collect();
    assert_eq!(steps, ["connect", "form", "reform", "join", "epoch turn-over"]);

    let mut follower = Follower::new(dir.path().join("run"));
    let events = follower.read();
    let all = |name: &str| events.iter().filter(|event| event.name() == name).collect::<Vec<_>>();
    let worlds: Vec<u64> = all("generation_formed").iter().map(|event| event.number("world_size")).collect();
    assert_eq!(worlds, [300, 299, 300]);
    assert_eq!(all("generation_aborted").len(), 1, "a newcomer aborts nothing");
    assert_eq!(all("steps_lost").len(), 0);
    let finished = all("epoch_finished");
    assert_eq!(finished.iter().map(|event| event.number("samples")).collect::<Vec<_>>(), [1_000_000_000]);
    assert_eq!(all("validated").len(), 1);
}
