//! Traces, as a real collector receives them, and runs whose collector is gone or says nothing.

use std::{
    collections::BTreeMap,
    net::TcpListener,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use musher_tests::{Job, Scene};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value::Value},
    trace::v1::{ResourceSpans, Span, status::StatusCode},
};
use rustix::process::{Signal, kill_process};
use tokio::runtime::Runtime;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};

const TOKEN: &str = "hush";

/// Takes what is sent to it by whoever shows the token.
struct Collector {
    url: String,
    received: Arc<Mutex<Vec<ResourceSpans>>>,
    _runtime: Runtime,
}

struct Inbox(Arc<Mutex<Vec<ResourceSpans>>>);

#[tonic::async_trait]
impl TraceService for Inbox {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        if request.metadata().get("x-token").is_none_or(|token| token != TOKEN) {
            return Err(Status::unauthenticated("no token"));
        }
        let mut received = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        received.extend(request.into_inner().resource_spans);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    fn start() -> Self {
        let runtime = Runtime::new().expect("the system can start threads");
        let received = Arc::default();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"));
        let listener = listener.expect("there is a free port");
        let url = format!("http://{}", listener.local_addr().expect("it is bound"));
        let service = TraceServiceServer::new(Inbox(Arc::clone(&received)));
        let serving =
            Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener));
        runtime.spawn(serving);
        Self { url, received, _runtime: runtime }
    }

    fn spans(&self) -> Vec<Span> {
        let received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        let scopes = received.iter().flat_map(|resource| &resource.scope_spans);
        scopes.flat_map(|scope| scope.spans.clone()).collect()
    }

    /// Attributes of the processes that sent something.
    fn sources(&self) -> Vec<BTreeMap<String, Value>> {
        let received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        let resources = received.iter().filter_map(|spans| spans.resource.as_ref());
        resources.map(|resource| attributes(&resource.attributes)).collect()
    }
}

fn attributes(pairs: &[KeyValue]) -> BTreeMap<String, Value> {
    let value = |pair: &KeyValue| pair.value.clone().and_then(|value| value.value);
    pairs.iter().filter_map(|pair| Some((pair.key.clone(), value(pair)?))).collect()
}

#[track_caller]
fn number(span: &Span, key: &str) -> u64 {
    match attributes(&span.attributes).get(key) {
        Some(Value::IntValue(number)) => *number as u64,
        other => panic!("{key} is {other:?} in {span:?}"),
    }
}

fn is_error(span: &Span) -> bool {
    span.status.as_ref().is_some_and(|status| status.code() == StatusCode::Error)
}

fn job(scene: &Scene, collector: &str) -> Job {
    Job::tiny(&scene.data_of(160, 12))
        .set("checkpoint.every_steps", 4)
        .set("telemetry.otlp", format!("{collector:?}"))
}

#[test]
fn each_generation_is_one_trace_and_an_abort_is_an_error_with_its_reason() {
    let collector = Collector::start();
    let environment = [
        ("OTEL_EXPORTER_OTLP_HEADERS", format!("x-token={TOKEN}")),
        ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test".into()),
    ];
    let environment = environment.map(|(name, value)| (name.to_owned(), value)).to_vec();
    let scene = Scene::new().with_environment(environment);
    let mut run = scene.launch(&job(&scene, &collector.url), "killed", 3, &["--max-restarts", "0"]);
    run.wait_for_mid_epoch();
    kill_process(run.worker(1), Signal::KILL).expect("it runs");
    let run = run.wait().expect_code(0);
    assert!(!run.end.stderr.contains("traces are being lost"), "{}", run.end.stderr);

    let mut traces: BTreeMap<Vec<u8>, Vec<Span>> = BTreeMap::new();
    for span in collector.spans() {
        traces.entry(span.trace_id.clone()).or_default().push(span);
    }
    let mut traces: Vec<Vec<Span>> = traces.into_values().collect();
    traces.sort_by_key(|spans| spans.iter().map(|span| span.start_time_unix_nano).min());
    let formed = run.all("generation_formed");
    assert_eq!(traces.len(), formed.len(), "{traces:#?}");
    let roots: Vec<&Span> = traces
        .iter()
        .zip(&formed)
        .map(|(spans, formed)| {
            let root = spans.iter().find(|span| span.name == "generation").expect("a trace has a root");
            assert!(root.parent_span_id.is_empty());
            assert_eq!(number(root, "musher.generation"), formed.number("generation"));
            assert_eq!(number(root, "musher.world_size"), formed.number("world_size"));
            for child in spans.iter().filter(|span| span.span_id != root.span_id) {
                assert_eq!(child.parent_span_id, root.span_id, "{child:?}");
                assert_eq!(number(child, "musher.generation"), number(root, "musher.generation"));
                assert!(root.start_time_unix_nano <= child.start_time_unix_nano);
            }
            let of = |name: &str| {
                let span =
                    spans.iter().find(|span| span.name == name).expect("each team is formed and synced");
                assert!(!is_error(span));
                (span.end_time_unix_nano - span.start_time_unix_nano) as f64 / 1e6
            };
            let (forming_ms, told_ms) = (of("form") + of("sync"), formed.real("elapsed_ms"));
            assert!(
                (forming_ms - told_ms).abs() < 100.0,
                "form and sync took {forming_ms} ms, not {told_ms} ms"
            );
            root
        })
        .collect();

    let aborted = run.one("generation_aborted");
    let status = roots[0].status.as_ref().expect("it was aborted");
    assert_eq!((status.code(), status.message.as_str()), (StatusCode::Error, aborted.text("reason")));
    let cause = Value::StringValue(aborted.text("cause").into());
    assert_eq!(attributes(&roots[0].attributes)["error.type"], cause);
    let broken: Vec<&Span> = traces[0].iter().filter(|span| is_error(span)).collect();
    assert!(
        broken.iter().any(|span| span.name == "epoch" && number(span, "musher.epoch") == 1),
        "{broken:?}"
    );
    assert!(!traces[1].iter().any(is_error), "{:#?}", traces[1]);
    assert_eq!(roots[1].links[0].span_id, roots[0].span_id);

    let all = |name: &'static str| {
        collector.spans().into_iter().filter(move |span| span.name == name && !is_error(span))
    };
    let committed = run.all("checkpoint_committed");
    let mut ids: Vec<Value> =
        all("checkpoint").map(|span| attributes(&span.attributes)["musher.checkpoint.id"].clone()).collect();
    ids.sort_by_key(|id| format!("{id:?}"));
    let told = committed.iter().map(|event| Value::StringValue(event.text("id").into()));
    assert_eq!(ids, told.collect::<Vec<_>>());
    let epochs: Vec<u64> = all("epoch").map(|span| number(&span, "musher.epoch")).collect();
    let validated: Vec<u64> = all("validate").map(|span| number(&span, "musher.epoch")).collect();
    assert_eq!((epochs, validated), (vec![1, 2], vec![1, 2]));

    let source = &collector.sources()[0];
    let text = |key: &str| match &source[key] {
        Value::StringValue(text) => text.clone(),
        other => panic!("{key} is {other:?}"),
    };
    assert_eq!((text("service.name").as_str(), text("musher.run").as_str()), ("musher", "tiny"));
    assert_eq!(text("deployment.environment.name"), "test");
    assert!(text("service.instance.id").ends_with("-1"), "of the first term");
}

#[test]
fn a_collector_that_is_gone_or_says_nothing_costs_spans_and_nothing_else() {
    // Nobody takes what the system takes for it.
    let silent = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    let silent_url = format!("http://{}", silent.local_addr().expect("it is bound"));
    let gone = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let gone_url = format!("http://{}", gone.expect("there is a free port"));
    for (name, url) in [("gone", gone_url), ("silent", silent_url)] {
        let scene = Scene::new();
        let mut run = scene.launch(&job(&scene, &url).set("train.epochs", 1), name, 1, &[]);
        run.wait_for_nth("run_finished", 1);
        let ended = Instant::now();
        let run = run.wait().expect_code(0);
        let took = ended.elapsed();
        assert!(took < Duration::from_secs(20), "the end waited {took:?} for a collector that is {name}");
        let said = |words: &str| run.end.stderr.matches(words).count();
        assert!(said("traces are being lost") <= 1, "{}", run.end.stderr);
        assert_eq!(said("not all spans of this run reached the collector"), 1, "{}", run.end.stderr);
        if name == "gone" {
            assert_eq!(said("traces are being lost"), 1, "{}", run.end.stderr);
        }
    }
}

#[test]
fn a_wrong_collector_is_refused_before_there_is_a_run() {
    let scene = Scene::new();
    let run = scene.launch(&job(&scene, "collector:4317"), "wrong", 1, &[]).wait().expect_code(2);
    let words = run.end.last_words();
    assert!(words.contains("telemetry.otlp") && words.contains("http://127.0.0.1:4317"), "{words}");
}
