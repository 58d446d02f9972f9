//! What must hold of every run, each under its name.

use std::{collections::BTreeMap, fs, path::Path};

use musher_tests::{
    DataSet, Event, History,
    history::Fall,
    run::{Ended, Run},
};
use rustix::process::Signal;
use safetensors::SafeTensors;

/// What an epoch came to. Equal figures have equal bits.
#[derive(Clone, Debug, PartialEq)]
pub struct EpochFigures {
    pub step: u64,
    pub samples: u64,
    pub train_loss: f64,
    pub state_digest: String,
    pub validated: [f64; 3],
}

/// By epoch; an epoch that was finished twice must have come to the same.
#[track_caller]
pub fn figures(run: &Ended) -> BTreeMap<u64, EpochFigures> {
    let mut by_epoch = BTreeMap::new();
    for finished in run.all("epoch_finished") {
        let epoch = finished.number("epoch");
        let is_its = |event: &&&Event| event.number("epoch") == epoch;
        // A run that is killed may have no time to validate its last epoch.
        let Some(validated) = run.all("validated").into_iter().find(|event| is_its(&event)).cloned() else {
            continue;
        };
        let figures = EpochFigures {
            step: finished.number("step"),
            samples: finished.number("samples"),
            train_loss: finished.real("train_loss"),
            state_digest: finished.text("state_digest").into(),
            validated: ["val_loss", "val_accuracy", "val_miou"].map(|field| validated.real(field)),
        };
        let former = by_epoch.insert(epoch, figures.clone());
        assert!(former.is_none_or(|former| former == figures), "epoch {epoch} came to two results");
    }
    by_epoch
}

/// Each sample of an epoch is in exactly one applied step: the steps and the cursor of all epochs are
/// those of an undisturbed run.
#[track_caller]
pub fn each_sample_is_trained_on_once(run: &Ended, samples: u64, global_batch: u64) {
    let finished = run.all("epoch_finished");
    assert!(!finished.is_empty(), "no epoch was finished");
    for event in finished {
        assert_eq!(event.number("samples"), samples, "{event:?}");
        let steps = event.number("epoch") * samples.div_ceil(global_batch);
        assert_eq!(event.number("step"), steps, "{event:?}");
    }
}

#[track_caller]
pub fn each_sample_is_validated_once(run: &Ended, samples: u64) {
    let validated = run.all("validated");
    assert!(!validated.is_empty(), "nothing was validated");
    for event in validated {
        assert_eq!(event.number("samples"), samples, "{event:?}");
    }
}

/// Over all lives of a run of [`musher_tests::Job::tiny`]'s batch, nothing is lost, and nothing is done
/// twice. As ranks that differ are a cause to abort, this also says that their digests agree.
#[track_caller]
pub fn nothing_is_lost(events: &[Event], data: &DataSet) {
    let history = History::new(events.to_vec(), data.train.len() as u64, data.val.len() as u64, 8);
    assert_eq!(history.violations(), [""; 0]);
    let one_at_most = |fall: &Fall| fall.from - fall.to <= 1;
    assert!(history.falls().iter().all(one_at_most), "more than the step in flight: {:?}", history.falls());
}

/// An endless run goes on for an epoch and a validation more, and is stopped; then nothing was lost.
#[track_caller]
pub fn goes_on_and_ends_well(mut run: Run, data: &DataSet) -> Ended {
    let told = run.events().len();
    let epoch = run.wait_past(told, "epoch_finished", |_| true).number("epoch");
    run.wait_past(told, "validated", |event| event.number("epoch") == epoch);
    run.signal(Signal::TERM);
    let ended = run.wait().expect_code(75);
    nothing_is_lost(&ended.events, data);
    events_are_documented(&ended.events);
    ended
}

/// The tensors of a weights file by name; reading it checks its form.
#[track_caller]
pub fn weights(file: &Path) -> BTreeMap<String, Vec<u8>> {
    let bytes = fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let tensors = SafeTensors::deserialize(&bytes).expect("it is a safetensors file");
    tensors.iter().map(|(name, tensor)| (name.to_owned(), tensor.data().to_vec())).collect()
}

/// The content of all files below `dir`.
pub fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        match path.is_dir() {
            true => found.extend(contents(&path)),
            false => {
                found.insert(path.display().to_string(), fs::read(&path).expect("it was listed just now"));
            }
        }
    }
    found
}

/// `docs/watching.md` has a row for each, with its fields.
#[track_caller]
pub fn events_are_documented(events: &[Event]) {
    let told = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/watching.md"));
    let told = told.expect("the document is there");
    for event in events {
        let named = |word: &str| format!("`{word}`");
        let row = told.lines().find(|line| {
            let first = line.strip_prefix("| ").and_then(|row| row.split(" |").next());
            first.is_some_and(|first| first.contains(&named(event.name())))
        });
        let row = row.unwrap_or_else(|| panic!("{} has no row", event.name()));
        let common = ["timestamp", "level", "event", "run"];
        for field in event.fields().filter(|field| !common.contains(field)) {
            assert!(row.contains(&named(field)), "{field} of {} is not documented", event.name());
        }
    }
}
