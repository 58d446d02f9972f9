//! `/metrics`: counters kept from the run's events, gauges read from its status when they are asked for.
//!
//! Names and meanings are in `docs/metrics.md`; a test holds the two together. What is worth counting is the
//! core's business, how it looks to Prometheus is this file's.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use musher_proto::scores::Scores;
use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::{Registry, Unit},
};

use crate::core::{AbortCause, Departure, Health, PeerStatus, RunEvent, RunPhase, RunStatus};

/// What `/metrics` is: the OpenMetrics text format, which Prometheus asks for first.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Label<const N: usize> = [(&'static str, String); N];
type Counters<const N: usize> = Family<Label<N>, Counter>;
type Gauges<const N: usize> = Family<Label<N>, Gauge<f64, std::sync::atomic::AtomicU64>>;

/// What has happened since this coordinator's start.
#[derive(Debug, Default)]
pub struct Metrics {
    generations: Counter,
    aborts: Counters<1>,
    joined: Counter,
    left: Counters<1>,
    refused: Counter,
    skipped: Counter,
    lost: Counter,
    checkpoints: Counters<1>,
    data_warnings: Counter,
    turned_away: Counters<1>,
    /// Counted where they are sent.
    pub spans_lost: Counter,
    last: Mutex<Last>,
}

/// Of what is told once and asked for later.
#[derive(Clone, Copy, Debug)]
struct Last {
    formed_s: f64,
    /// When, and what it cost.
    checkpoint: Option<(Instant, Checkpoint)>,
    epoch_loss: f64,
    /// Of this epoch, so that each skipped step counts once.
    skipped_in_epoch: (u32, u64),
}

#[derive(Clone, Copy, Debug)]
struct Checkpoint {
    bytes: u64,
    seconds: f64,
    stall_s: f64,
}

impl Default for Last {
    fn default() -> Self {
        Self { formed_s: f64::NAN, checkpoint: None, epoch_loss: f64::NAN, skipped_in_epoch: (0, 0) }
    }
}

impl Metrics {
    pub fn observe(&self, event: &RunEvent) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            RunEvent::GenerationFormed { elapsed, .. } => {
                self.generations.inc();
                last.formed_s = elapsed.as_secs_f64();
            }
            RunEvent::GenerationAborted { cause, .. } => {
                self.aborts.get_or_create(&[("cause", cause.cause().into())]).inc();
            }
            RunEvent::WorkerJoined { .. } => drop(self.joined.inc()),
            RunEvent::WorkerLeft { departure, .. } => {
                self.left.get_or_create(&[("cause", departure.cause().into())]).inc();
            }
            RunEvent::WorkerRefused { .. } => drop(self.refused.inc()),
            RunEvent::StepSkipped { epoch, in_epoch, .. } => {
                let before = if last.skipped_in_epoch.0 == epoch.0 { last.skipped_in_epoch.1 } else { 0 };
                self.skipped.inc_by(in_epoch.saturating_sub(before));
                last.skipped_in_epoch = (epoch.0, *in_epoch);
            }
            RunEvent::StepsLost { reported, applied, .. } => {
                self.lost.inc_by(reported.0.saturating_sub(applied.0));
            }
            RunEvent::EpochFinished { train_loss, .. } => last.epoch_loss = *train_loss,
            RunEvent::CheckpointCommitted { bytes, elapsed, stall_ms, .. } => {
                self.checkpoints.get_or_create(&[("result", "committed".into())]).inc();
                let cost =
                    Checkpoint { bytes: *bytes, seconds: elapsed.as_secs_f64(), stall_s: stall_ms / 1e3 };
                last.checkpoint = Some((Instant::now(), cost));
            }
            RunEvent::CheckpointFailed { .. } => {
                self.checkpoints.get_or_create(&[("result", "failed".into())]).inc();
            }
            RunEvent::DataWarning { .. } => drop(self.data_warnings.inc()),
            RunEvent::RunStarted { .. }
            | RunEvent::CoordinatorRestarted { .. }
            | RunEvent::WaitingForWorkers { .. }
            | RunEvent::WorkerReturned { .. }
            | RunEvent::WorkerSlow { .. }
            | RunEvent::TeamConnected { .. }
            | RunEvent::GenerationContinued { .. }
            | RunEvent::PretrainedLoaded { .. }
            | RunEvent::EpochStarted { .. }
            | RunEvent::Progress(_)
            | RunEvent::Validated { .. }
            | RunEvent::EarlyStopped { .. }
            | RunEvent::RunFinished { .. }
            | RunEvent::RunFailed { .. } => {}
        }
    }

    /// Somebody was not let in.
    pub fn turned_away(&self, cause: &'static str) {
        self.turned_away.get_or_create(&[("cause", cause.into())]).inc();
    }

    /// What has not happened yet counts 0: an increase from nothing would be none to Prometheus.
    fn show_zeros(&self) {
        let all = |counters: &Counters<1>, label: &'static str, values: &[&'static str]| {
            values.iter().for_each(|&value| drop(counters.get_or_create(&[(label, value.into())])));
        };
        all(&self.aborts, "cause", &AbortCause::CAUSES);
        all(&self.left, "cause", &Departure::CAUSES);
        all(&self.checkpoints, "result", &["committed", "failed"]);
    }

    /// All of it as text. A registry of its own each time: a worker that is gone leaves no series behind.
    pub fn text(&self, status: &RunStatus) -> Result<String, fmt::Error> {
        self.show_zeros();
        let mut registry = Registry::with_prefix("musher");
        self.count(&mut registry);
        self.recall(&mut registry, status);
        describe_run(&mut registry, status);
        describe_workers(&mut registry, &status.peers);
        let mut text = String::new();
        text::encode(&mut text, &registry)?;
        Ok(text)
    }

    fn count(&self, registry: &mut Registry) {
        let Self {
            turned_away,
            generations,
            aborts,
            joined,
            left,
            refused,
            skipped,
            lost,
            checkpoints,
            data_warnings,
            spans_lost,
            ..
        } = self;
        registry.register("generations", "Teams formed", generations.clone());
        registry.register("aborts", "Generations aborted, by cause", aborts.clone());
        registry.register("workers_joined", "Workers that joined", joined.clone());
        registry.register("workers_left", "Workers that left or were removed, by cause", left.clone());
        registry.register("workers_refused", "Workers that did not fit the run", refused.clone());
        registry.register(
            "turned_away",
            "Connections and requests not let in, by cause",
            turned_away.clone(),
        );
        registry.register("steps_skipped", "Steps whose gradient was not finite", skipped.clone());
        registry.register("steps_lost", "Steps lost with all that held them, and taken again", lost.clone());
        registry.register("checkpoints", "Checkpoints, by result", checkpoints.clone());
        registry.register("data_warnings", "Damaged files that are used all the same", data_warnings.clone());
        registry.register(
            "spans_lost",
            "Spans that the collector of traces did not take",
            spans_lost.clone(),
        );
    }

    fn recall(&self, registry: &mut Registry, status: &RunStatus) {
        let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
        seconds(registry, "form", "The last team's forming, up to its first step", last.formed_s);
        gauge(registry, "epoch_loss", "Mean training loss of the last finished epoch", last.epoch_loss);
        let scores = status.last_scores;
        let of_scores = |figure: fn(&Scores) -> f64| scores.as_ref().map_or(f64::NAN, figure);
        gauge(registry, "validation_loss", "Of the last validation", of_scores(|scores| scores.loss));
        let accuracy = of_scores(|scores| scores.accuracy);
        gauge(registry, "validation_accuracy", "Of the last validation: pixels, 0..1", accuracy);
        let miou = of_scores(|scores| scores.miou);
        gauge(registry, "validation_miou", "Of the last validation: mean intersection over union", miou);
        let by_class = Gauges::<1>::default();
        let figures = scores.map(|scores| scores.class_iou).unwrap_or_default();
        for (class, figure) in musher_dataset::CLASS_NAMES.into_iter().zip(figures) {
            by_class.get_or_create(&[("class", class.into())]).set(figure.unwrap_or(f64::NAN));
        }
        registry.register(
            "validation_iou",
            "Of the last validation: intersection over union, by class",
            by_class,
        );
        if let Some((at, Checkpoint { bytes, seconds: took, stall_s })) = last.checkpoint {
            let age = at.elapsed().as_secs_f64();
            seconds(registry, "checkpoint_age", "Since the last checkpoint was committed", age);
            seconds(registry, "checkpoint_duration", "From the last checkpoint's order to its commit", took);
            seconds(
                registry,
                "checkpoint_stall",
                "The last checkpoint held training up for so long",
                stall_s,
            );
            let gauge = Gauge::<f64, std::sync::atomic::AtomicU64>::default();
            gauge.set(bytes as f64);
            registry.register_with_unit("checkpoint_size", "Of the last checkpoint", Unit::Bytes, gauge);
        }
    }
}

fn describe_run(registry: &mut Registry, status: &RunStatus) {
    let about = Info::new([("run", escaped(&status.run)), ("version", env!("CARGO_PKG_VERSION").into())]);
    registry.register("build", "The run and the program", about);
    gauge(registry, "team_size", "Workers in the generation", status.team_size() as f64);
    gauge(registry, "workers", "Workers that are connected", status.peers.len() as f64);
    gauge(registry, "term", "Lives of the coordinator", status.term.0 as f64);
    gauge(registry, "generation", "The newest team's number", status.generation.0 as f64);
    gauge(registry, "epoch", "In hand, from 1; 0 before the first", f64::from(status.epoch().0));
    gauge(registry, "epochs", "The epoch limit", f64::from(status.epochs));
    gauge(registry, "applied_step", "Optimizer steps in the parameters", status.applied().0 as f64);
    let cursor = status.cursor() as f64;
    gauge(registry, "epoch_samples_applied", "Samples of the epoch in hand that are applied", cursor);
    gauge(
        registry,
        "workers_wanted",
        "Workers that the job asks for; 0: whoever comes",
        f64::from(status.wanted),
    );
    let phases = Gauges::<1>::default();
    for phase in RunPhase::ALL {
        let is_it = f64::from(u8::from(phase == status.phase));
        phases.get_or_create(&[("phase", phase.as_str().replace(' ', "_"))]).set(is_it);
    }
    registry.register("phase", "1 for what the run is doing", phases);
    gauge(registry, "epoch_samples", "Training samples of an epoch", status.train_samples as f64);
    let trained = status.progress.filter(|progress| progress.cursor > 0 || progress.images_per_second > 0.0);
    let (loss, rate) = trained.map_or((f64::NAN, f64::NAN), |p| (p.loss, p.images_per_second));
    gauge(registry, "loss", "Of the last applied step, mean over the global batch's pixels", loss);
    let learning_rate = status.learning_rate.unwrap_or(f64::NAN);
    gauge(
        registry,
        "learning_rate",
        "Of the last applied step, and not of an encoder that has its own",
        learning_rate,
    );
    gauge(registry, "images_per_second", "Of the whole team, over the last ten seconds", rate);
    if let Some(best) = status.best {
        gauge(registry, "best_epoch", "Whose weights are the result so far", f64::from(best.epoch.0));
    }
}

fn describe_workers(registry: &mut Registry, peers: &[PeerStatus]) {
    let (steps, silent, slow) = (Gauges::<3>::default(), Gauges::<2>::default(), Gauges::<2>::default());
    for peer in peers {
        let worker = ("worker", escaped(peer.worker.as_str()));
        let rank = ("rank", peer.rank.map(|rank| rank.0.to_string()).unwrap_or_default());
        let who = [worker.clone(), rank.clone()];
        silent.get_or_create(&who).set(peer.silent.as_secs_f64());
        slow.get_or_create(&who).set(f64::from(u8::from(peer.health == Health::Slow)));
        let Some(progress) = peer.progress.filter(|_| peer.rank.is_some()) else { continue };
        for (part, ms) in [
            ("compute", progress.step_ms),
            ("data_wait", progress.waits.data_ms),
            ("peers_wait", progress.waits.peers_ms),
        ] {
            steps.get_or_create(&[worker.clone(), rank.clone(), ("part", part.into())]).set(ms / 1e3);
        }
    }
    registry.register_with_unit(
        "step",
        "A step's parts on each rank, over its last steps",
        Unit::Seconds,
        steps,
    );
    registry.register_with_unit("worker_silent", "Since a worker's last message", Unit::Seconds, silent);
    registry.register("worker_slow", "1 for a worker that holds its team up", slow);
}

/// A worker may be called anything, and the library writes labels as they are.
fn escaped(label: &str) -> String {
    label.replace('\\', r"\\").replace('"', r#"\""#).replace('\n', r"\n")
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: f64) {
    let gauge = Gauge::<f64, std::sync::atomic::AtomicU64>::default();
    gauge.set(value);
    registry.register(name, help, gauge);
}

fn seconds(registry: &mut Registry, name: &str, help: &str, value: f64) {
    let gauge = Gauge::<f64, std::sync::atomic::AtomicU64>::default();
    gauge.set(value);
    registry.register_with_unit(name, help, Unit::Seconds, gauge);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{collections::BTreeSet, time::Duration};

    use musher_proto::{
        ids::{Epoch, Generation, Rank, Step, Term, WorkerId},
        message::{Activity, Phase, Progress, StepWaits},
    };
    use prometheus_parse::{Scrape, Value};

    use super::*;
    use crate::core::{AbortCause, Departure};

    fn status() -> RunStatus {
        let progress = Progress {
            phase: Phase::Training,
            activity: Activity::Working,
            in_activity_ms: 3,
            warm: true,
            applied: Step(41),
            epoch: Epoch(2),
            cursor: 16,
            loss: 0.75,
            images_per_second: 10.5,
            step_ms: 80.0,
            waits: StepWaits { data_ms: 4.0, peers_ms: 20.0 },
            steps_skipped: 0,
        };
        let peer = PeerStatus {
            worker: WorkerId("a".into()),
            rank: Some(Rank(0)),
            host: "here".into(),
            device: "cpu".into(),
            progress: Some(progress),
            doing: "training".into(),
            doing_for: Duration::ZERO,
            silent: Duration::from_millis(500),
            health: Health::Slow,
            leaving: false,
        };
        let newcomer = PeerStatus {
            worker: WorkerId("b".into()),
            rank: None,
            progress: None,
            health: Health::Well,
            ..peer.clone()
        };
        RunStatus {
            run: "pets".into(),
            phase: RunPhase::Training,
            term: Term(1),
            generation: Generation(3),
            epochs: 100,
            train_samples: 40,
            progress: Some(progress),
            learning_rate: Some(1e-4),
            eta_s: None,
            monitor: musher_proto::job::Monitor::ValLoss,
            resting: Default::default(),
            last_scores: None,
            wanted: 2,
            best: None,
            peers: vec![peer, newcomer],
            last_trouble: None,
        }
    }

    fn scrape(metrics: &Metrics) -> Scrape {
        let text = metrics.text(&status()).unwrap();
        assert!(text.ends_with("# EOF\n"));
        Scrape::parse(text.lines().map(|line| Ok(line.to_owned()))).unwrap()
    }

    /// The value of the series with all these labels.
    fn value(scrape: &Scrape, name: &str, labels: &[(&str, &str)]) -> f64 {
        let has = |sample: &&prometheus_parse::Sample| {
            sample.metric == name && labels.iter().all(|(key, value)| sample.labels.get(key) == Some(*value))
        };
        let sample = scrape.samples.iter().find(has).unwrap_or_else(|| panic!("no {name} {labels:?}"));
        match sample.value {
            Value::Counter(value) | Value::Gauge(value) | Value::Untyped(value) => value,
            ref other => panic!("{name} is {other:?}"),
        }
    }

    #[test]
    fn a_parser_reads_what_the_run_is_doing() {
        let scrape = scrape(&Metrics::default());
        for cause in AbortCause::CAUSES {
            assert_eq!(value(&scrape, "musher_aborts_total", &[("cause", cause)]), 0.0);
        }
        assert_eq!(value(&scrape, "musher_team_size", &[]), 1.0);
        assert_eq!(value(&scrape, "musher_workers", &[]), 2.0);
        assert_eq!(value(&scrape, "musher_applied_step", &[]), 41.0);
        assert_eq!(value(&scrape, "musher_loss", &[]), 0.75);
        let part = |part| value(&scrape, "musher_step_seconds", &[("rank", "0"), ("part", part)]);
        assert_eq!([part("compute"), part("data_wait"), part("peers_wait")], [0.08, 0.004, 0.02]);
        assert_eq!(value(&scrape, "musher_worker_slow", &[("rank", "0")]), 1.0);
        assert_eq!(value(&scrape, "musher_worker_silent_seconds", &[("worker", "b")]), 0.5);
        assert!(value(&scrape, "musher_validation_loss", &[]).is_nan(), "nothing was validated yet");
    }

    #[test]
    fn a_worker_may_be_called_anything() {
        let mut run = status();
        run.peers[0].worker = WorkerId("a\\b\"} 1\nmusher_loss 0".into());
        let text = Metrics::default().text(&run).unwrap();
        let expected = r#"musher_worker_slow{worker="a\\b\"} 1\nmusher_loss 0","#;
        assert!(text.lines().any(|line| line.starts_with(expected)), "{text}");
    }

    #[test]
    fn what_happens_is_counted() {
        let metrics = Metrics::default();
        for in_epoch in [1, 3] {
            let (generation, epoch, step) = (Generation(1), Epoch(1), Step(7));
            metrics.observe(&RunEvent::StepSkipped { generation, epoch, step, in_epoch });
        }
        for _ in 0..2 {
            metrics.observe(&RunEvent::WorkerLeft {
                worker: WorkerId("a".into()),
                rank: None,
                departure: Departure::Drained,
            });
        }
        metrics.observe(&a_checkpoint());
        let scrape = scrape(&metrics);
        assert_eq!(value(&scrape, "musher_steps_skipped_total", &[]), 3.0);
        assert_eq!(value(&scrape, "musher_workers_left_total", &[("cause", "drained")]), 2.0);
        assert_eq!(value(&scrape, "musher_checkpoint_stall_seconds", &[]), 0.012);
        assert_eq!(value(&scrape, "musher_checkpoint_size_bytes", &[]), 64e6);
        assert!(value(&scrape, "musher_checkpoint_age_seconds", &[]) < 60.0);
    }

    fn a_checkpoint() -> RunEvent {
        RunEvent::CheckpointCommitted {
            checkpoint: musher_proto::ids::CheckpointId("e0001".into()),
            epoch: Epoch(1),
            step: Step(5),
            bytes: 64_000_000,
            elapsed: Duration::from_secs(1),
            stall_ms: 12.0,
        }
    }

    #[test]
    fn each_metric_is_documented_and_each_documented_one_exists() {
        let metrics = Metrics::default();
        let (worker, generation) = (WorkerId("a".into()), Generation(1));
        let reason = "two".into();
        metrics.observe(&a_checkpoint());
        metrics.turned_away("token_missing");
        metrics.observe(&RunEvent::WorkerLeft { worker, rank: None, departure: Departure::Left });
        metrics.observe(&RunEvent::GenerationAborted {
            generation,
            cause: AbortCause::ValidationFailed { reason },
        });
        let mut run = status();
        run.best = Some(crate::core::Best { epoch: Epoch(1), value: Some(0.5), scores: Default::default() });
        let text = metrics.text(&run).unwrap();
        let exported: BTreeSet<&str> =
            text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
        let documented: BTreeSet<&str> = include_str!("../../../docs/metrics.md")
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split(['`', '{']).next())
            .map(|name| name.trim_end_matches("_total").trim_end_matches("_info"))
            .collect();
        assert_eq!(exported, documented);
    }
}
