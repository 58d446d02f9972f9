//! What users and their tools see of events, through the real subscriber.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tracing::{debug, error, info, subscriber::with_default, warn};

use super::pretty::Paint;
use super::*;

type Output = Arc<Mutex<Vec<u8>>>;

fn console(format: LogFormat, paint: Paint) -> (Console, Output) {
    let out = Output::default();
    (Console::to(out.clone(), format, paint), out)
}

/// What `say` puts on stderr in `format`.
fn stderr(format: LogFormat, paint: Paint, say: impl FnOnce()) -> String {
    let (console, out) = console(format, paint);
    with_default(subscriber(None, None, None, console, EnvFilter::new("info")), say);
    String::from_utf8(out.lock().unwrap().clone()).unwrap()
}

/// Pretty lines without their times.
fn pretty(say: impl FnOnce()) -> Vec<String> {
    let text = stderr(LogFormat::Pretty, Paint::Plain, say);
    text.lines().map(|line| line.split_once("  ").unwrap().1.to_owned()).collect()
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.ends_with('\n'));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

macro_rules! event {
    ($($field:tt)*) => { info!(target: "musher::event", run = "pets", $($field)*) };
}

#[test]
fn an_event_is_one_flat_json_line() {
    let text = stderr(LogFormat::Json, Paint::Plain, || {
        let _span = tracing::info_span!("outer", hidden = 1).entered();
        event!(
            event = "progress",
            worker = %"node-1.0",
            epoch = 3u32,
            step = u64::MAX,
            loss = f64::NAN,
            images_per_second = 0.1 + 0.2,
            resumed = true,
            rank = None::<u64>,
            path = ?"a\"b\n"
        );
    });
    assert_eq!(text.matches('\n').count(), 1);
    let (timestamp, rest) = text.split_at(r#"{"timestamp":"2024-05-06T07:08:09.123456Z""#.len());
    let digits = |c: char| if c.is_ascii_digit() { '0' } else { c };
    let shape: String = timestamp.chars().map(digits).collect();
    assert_eq!(shape, r#"{"timestamp":"0000-00-00T00:00:00.000000Z""#);
    let expected = concat!(
        r#","level":"INFO","run":"pets","event":"progress","worker":"node-1.0","epoch":3,"#,
        r#""step":18446744073709551615,"loss":null,"images_per_second":0.30000000000000004,"#,
        r#""resumed":true,"path":"\"a\\\"b\\n\""}"#,
        "\n"
    );
    assert_eq!(rest, expected);
    let parsed: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(parsed["loss"], Value::Null);
}

#[test]
fn ordinary_logs_name_their_target_and_obey_the_filter() {
    let text = stderr(LogFormat::Json, Paint::Plain, || {
        debug!("unheard");
        warn!(target: "musher::session", worker = "w0", "heartbeat missed");
    });
    let parsed: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(parsed["target"], "musher::session");
    assert_eq!(parsed["message"], "heartbeat missed");
}

#[test]
fn the_events_file_takes_events_alone_whatever_the_filter_and_grows_over_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("runs/pets/events.jsonl");
    for life in 0..2 {
        let file = EventsFile::open(&path).unwrap();
        let (console, out) = console(LogFormat::Json, Paint::Plain);
        with_default(subscriber(Some(file), None, None, console, EnvFilter::new("off")), || {
            error!("an ordinary log");
            event!(event = "run_started", life);
            debug!(target: "musher::event", event = "progress", loss = f64::INFINITY);
        });
        assert!(out.lock().unwrap().is_empty());
    }
    let lines = lines(&path);
    assert_eq!(lines.len(), 4);
    assert_eq!((&lines[0]["life"], &lines[2]["life"]), (&json!(0), &json!(1)));
    assert_eq!(lines[1]["loss"], Value::Null);
    assert!(lines.iter().all(|line| line.get("target").is_none()));
}

#[test]
fn a_line_cut_short_by_a_crash_spoils_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("events.jsonl");
    fs::write(&path, "{\"event\":\"run_sta").unwrap();
    let file = EventsFile::open(&path).unwrap();
    let (console, _) = console(LogFormat::Json, Paint::Plain);
    with_default(subscriber(Some(file), None, None, console, EnvFilter::new("info")), || {
        event!(event = "run_started")
    });
    let text = fs::read_to_string(&path).unwrap();
    let last = text.lines().nth(1).unwrap();
    assert_eq!(serde_json::from_str::<Value>(last).unwrap()["event"], "run_started");
}

#[test]
fn lines_of_many_threads_do_not_mix() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("events.jsonl");
    let (console, _) = console(LogFormat::Json, Paint::Plain);
    let file = EventsFile::open(&path).unwrap();
    let dispatch = tracing::Dispatch::new(subscriber(Some(file), None, None, console, EnvFilter::new("off")));
    let reason = "x".repeat(5000);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                tracing::dispatcher::with_default(&dispatch, || {
                    (0..50).for_each(|i| event!(event = "worker_left", i, reason = reason.as_str()));
                });
            });
        }
    });
    assert_eq!(lines(&path).len(), 200);
}

#[test]
fn each_event_reads_well() {
    let said = pretty(|| {
        event!(event = "run_started", epochs = 20, global_batch = 32, seed = 44u64);
        event!(event = "waiting_for_workers", present = 1, expected = 4);
        event!(event = "worker_joined", worker = %"node-1.0", device = "cpu", host = "node-1");
        event!(
            event = "generation_formed",
            generation = 2u64,
            world_size = 4,
            donor = "node-1.0",
            applied_step = 1200,
            elapsed_ms = 350.4
        );
        event!(event = "epoch_started", epoch = 3, epochs = 20);
        event!(
            event = "progress",
            epoch = 3,
            epochs = 20,
            step = 1234,
            loss = 0.41199,
            images_per_second = 83.21,
            eta_s = 200.0
        );
        event!(
            event = "epoch_finished",
            epoch = 3,
            samples = 3680,
            train_loss = 0.5,
            images_per_second = 80.0
        );
        event!(
            event = "validated",
            epoch = 3,
            val_loss = f64::NAN,
            val_accuracy = 0.9,
            val_miou = 0.75,
            samples = 3669
        );
        event!(
            event = "checkpoint_committed",
            id = "e0003-s00000345",
            bytes = 763_000_000u64,
            seconds = 1.5,
            stall_ms = 12
        );
        event!(event = "early_stopped", epoch = 9, best_epoch = 4);
        event!(event = "run_finished", status = "finished", epochs = 9, best_epoch = 4, val_loss = 0.3);
    });
    let expected = [
        "run pets started  20 epochs  global batch 32  seed 44",
        "waiting for workers  1 of 4",
        "worker node-1.0 joined  cpu  on node-1",
        "generation 2 formed  world size 4  donor node-1.0  at step 1,200  in 350 ms",
        "epoch 3/20 started",
        "epoch 3/20  step 1,234  loss 0.4120  83.2 images/s  3m 20s left",
        "epoch 3 finished  train loss 0.5000  3,680 samples  80.0 images/s",
        "epoch 3 validated  val loss nan  accuracy 0.9000  mIoU 0.7500  3,669 samples",
        "checkpoint e0003-s00000345 committed  763.0 MB  in 1.5 s  training held for 12 ms",
        "stopped early  best epoch 4",
        "run pets finished  9 epochs  best epoch 4  val loss 0.3000",
    ];
    assert_eq!(said, expected);
}

#[test]
fn what_is_not_known_yet_is_left_out() {
    let said = pretty(|| {
        event!(event = "progress", epoch = 3, epochs = 20, cursor = 8u64, samples = 40u64, eta_s = f64::NAN)
    });
    assert_eq!(said, ["epoch 3/20  8/40 samples"]);
}

#[test]
fn bad_news_reads_well() {
    let said = pretty(|| {
        warn!(target: "musher::event", run = "pets", event = "worker_left", worker = "w1", reason = "no heartbeat for 10 s");
        warn!(target: "musher::event", run = "pets", event = "generation_aborted", generation = 2, reason = "w1 left");
        warn!(target: "musher::event", run = "pets", event = "checkpoint_failed", reason = "no space left");
        warn!(target: "musher::event", run = "pets", event = "data_warning", file = "a.jpg", reason = "GIF named .jpg");
        error!(target: "musher::event", run = "pets", event = "run_failed", reason = "loss is not finite");
        warn!(target: "musher::session", "heartbeat missed");
    });
    let expected = [
        "worker w1 left  no heartbeat for 10 s",
        "generation 2 aborted  w1 left",
        "checkpoint failed  no space left",
        "data warning  a.jpg  GIF named .jpg",
        "run pets failed  loss is not finite",
        "warn musher::session: heartbeat missed",
    ];
    assert_eq!(said, expected);
}

#[test]
fn what_has_no_wording_is_not_hidden() {
    let said = pretty(|| {
        event!(event = "volcano_erupted", lava_m = 3, epoch = 2);
        event!(event = "epoch_started", epoch = 2, weather = "fair");
    });
    assert_eq!(said, ["volcano_erupted  lava_m=3 epoch=2", "epoch 2 started  weather=fair"]);
}

#[test]
fn a_peer_cannot_write_to_the_terminal() {
    let said = pretty(|| event!(event = "worker_left", worker = "w\n1", reason = "\x1b[2Jgone"));
    assert_eq!(said, [r"worker w\n1 left  \u{1b}[2Jgone"]);
}

#[test]
fn colours_come_only_when_asked_for() {
    let say = || event!(event = "early_stopped", best_epoch = 4);
    let coloured = stderr(LogFormat::Pretty, Paint::Ansi, say);
    assert!(coloured.contains("\x1b[1mstopped early\x1b[0m  best epoch 4\n"), "{coloured:?}");
    assert!(!stderr(LogFormat::Pretty, Paint::Plain, say).contains('\x1b'));
}

#[test]
fn a_progress_bar_without_a_terminal_does_nothing() {
    let (console, out) = console(LogFormat::Pretty, Paint::Plain);
    let mut progress = Progress::new(&console);
    progress.set_epoch(1, 3, 100);
    progress.update(32, f64::NAN, 10.0, f64::INFINITY);
    progress.finish();
    assert!(out.lock().unwrap().is_empty());
}
