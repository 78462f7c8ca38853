use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind as WireKind, status::StatusCode};
use prost::Message;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tonic::{Request, Response, Status};
use tower::ServiceExt;

use super::*;
use crate::telemetry::labels::FlowProtocol;
use crate::telemetry::metrics::Registry;
use crate::telemetry::trace::{Sampler, SpanKind, SpanSink, TraceContext, Tracer, span_channel};

type Received = mpsc::UnboundedReceiver<ExportTraceServiceRequest>;

struct Collector(mpsc::UnboundedSender<ExportTraceServiceRequest>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.send(request.into_inner()).unwrap();
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn grpc_collector() -> (SocketAddr, Received) {
    let (send, receive) = mpsc::unbounded_channel();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve_grpc(listener, Collector(send)));
    (address, receive)
}

async fn serve_grpc(listener: TcpListener, collector: Collector) {
    let server = TraceServiceServer::new(collector);
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let server = server.clone();
        let service = service_fn(move |request| server.clone().oneshot(request));
        tokio::spawn(
            hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service),
        );
    }
}

async fn http_collector() -> (SocketAddr, Received) {
    let (send, receive) = mpsc::unbounded_channel();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let send = send.clone();
            let service = service_fn(move |request: http::Request<hyper::body::Incoming>| {
                let send = send.clone();
                async move {
                    assert_eq!(request.uri().path(), "/v1/traces");
                    assert_eq!(request.headers()["content-type"], "application/x-protobuf");
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    send.send(ExportTraceServiceRequest::decode(body).unwrap())
                        .unwrap();
                    Ok::<_, std::convert::Infallible>(http::Response::new(Full::<Bytes>::default()))
                }
            });
            tokio::spawn(
                hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service),
            );
        }
    });
    (address, receive)
}

fn config(endpoint: impl Into<Option<String>>) -> ExportConfig {
    ExportConfig {
        endpoint: endpoint.into(),
        service_name: "front".to_owned(),
        service_namespace: "shop".to_owned(),
        instance_id: "shop/front-7".to_owned(),
    }
}

/// A running exporter.
struct Running {
    registry: Arc<Registry>,
    sink: SpanSink,
    config: watch::Sender<ExportConfig>,
    task: tokio::task::JoinHandle<()>,
}

async fn running(first: ExportConfig) -> Running {
    let registry = Registry::new();
    let (sink, source) = span_channel(registry.clone());
    let on = first.endpoint.is_some();
    let (config, changes) = watch::channel(first);
    let task = tokio::spawn(run(source, changes, marked(None)));
    let running = Running {
        registry,
        sink,
        config,
        task,
    };
    running.until(on).await;
    running
}

impl Running {
    fn tracer(&self) -> Tracer {
        Tracer::new(self.sink.clone())
    }

    /// Waits for the exporter to have turned tracing on or off.
    async fn until(&self, on: bool) {
        while self.tracer().on() != on {
            tokio::task::yield_now().await;
        }
    }

    fn counted(&self, counter: Counter) -> u64 {
        let counters = self.registry.snapshot().counters;
        let of = counters
            .iter()
            .filter(|(labels, _)| labels.event == counter);
        of.map(|(_, n)| n).sum()
    }

    /// Lets the exporter finish what is queued.
    async fn end(self) -> Arc<Registry> {
        drop(self.sink);
        self.task.await.unwrap();
        self.registry
    }
}

fn one_span(tracer: &Tracer) {
    let started = tracer.start(None, Sampler::per_myriad(10_000), SpanKind::Server);
    started.span.unwrap().finish();
}

/// A request through both proxies, and what the collector got of it.
async fn journey(endpoint: String, received: &mut Received) -> (Span, Span, Vec<KeyValue>) {
    let running = running(config(endpoint)).await;
    let tracer = running.tracer();
    let incoming =
        TraceContext::from_traceparent(b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    let before = SystemTime::now();
    let out = tracer.start(incoming.as_ref(), Sampler::default(), SpanKind::Client);
    let onwards = TraceContext::from(out.propagate.unwrap());
    let inn = tracer.start(Some(&onwards), Sampler::default(), SpanKind::Server);
    let mut server = inn.span.unwrap();
    server.update(|span| {
        span.request(b"GET", b"/cart/7?token=secret", b"cart:8080");
        span.status = 200;
        span.destination_service = "cart".into();
    });
    server.finish();
    let mut client = out.span.unwrap();
    client.update(|span| {
        span.request(b"POST", b"/shop.Cart/Add", b"[::1]:50051");
        span.protocol = FlowProtocol::Grpc;
        span.status = 200;
        span.grpc_status = Some(14);
        span.destination_service = "cart".into();
        span.route = "HTTPRoute/shop/cart/0".into();
        span.endpoint = Some("10.0.0.7:8080".parse().unwrap());
        span.retries = 2;
        span.mtls = true;
    });
    client.finish();
    drop(tracer);
    let registry = running.end().await;
    let exported = registry.snapshot().counters;
    assert_eq!(exported.len(), 1, "nothing dropped");
    assert_eq!(
        (exported[0].0.event, exported[0].1),
        (Counter::SpansExported, 2)
    );

    let request = received.recv().await.unwrap();
    assert_eq!(request.resource_spans.len(), 1);
    let resource = &request.resource_spans[0];
    let mut spans = resource.scope_spans[0].spans.clone();
    assert_eq!(spans.len(), 2);
    let client = spans.pop().unwrap();
    let server = spans.pop().unwrap();
    for span in [&client, &server] {
        let start = std::time::UNIX_EPOCH + Duration::from_nanos(span.start_time_unix_nano);
        assert!(start >= before && span.end_time_unix_nano >= span.start_time_unix_nano);
    }
    let attributes = resource.resource.clone().unwrap().attributes;
    (client, server, attributes)
}

fn attributes(list: &[KeyValue]) -> BTreeMap<&str, String> {
    let text = |value: &Option<AnyValue>| match value.as_ref().unwrap().value.as_ref().unwrap() {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(n) => n.to_string(),
        Value::BoolValue(b) => b.to_string(),
        other => panic!("{other:?}"),
    };
    list.iter().map(|kv| (&*kv.key, text(&kv.value))).collect()
}

fn check(client: &Span, server: &Span, resource: &[KeyValue]) {
    let trace = 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c_u128.to_be_bytes();
    assert_eq!(
        (&*client.trace_id, &*server.trace_id),
        (&trace[..], &trace[..])
    );
    assert_eq!(
        client.parent_span_id,
        0xb7ad_6b71_6920_3331_u64.to_be_bytes()
    );
    assert_eq!(server.parent_span_id, client.span_id);
    assert_eq!(client.kind(), WireKind::Client);
    assert_eq!(server.kind(), WireKind::Server);
    assert_eq!((&*client.name, &*server.name), ("shop.Cart/Add", "GET"));
    assert_eq!(client.status.as_ref().unwrap().code(), StatusCode::Error);
    assert_eq!(
        server
            .status
            .as_ref()
            .map_or(StatusCode::Unset, |s| s.code()),
        StatusCode::Unset
    );

    let expected = |pairs: &[(&'static str, &str)]| -> BTreeMap<&'static str, String> {
        pairs.iter().map(|(k, v)| (*k, (*v).to_owned())).collect()
    };
    assert_eq!(
        attributes(&client.attributes),
        expected(&[
            ("error.type", "14"),
            ("http.request.method", "POST"),
            ("http.request.resend_count", "2"),
            ("http.response.status_code", "200"),
            ("network.peer.address", "10.0.0.7"),
            ("network.peer.port", "8080"),
            ("network.protocol.name", "http"),
            ("network.protocol.version", "2"),
            ("peer.service", "cart"),
            ("rpc.grpc.status_code", "14"),
            ("rpc.method", "Add"),
            ("rpc.service", "shop.Cart"),
            ("rpc.system", "grpc"),
            ("server.address", "::1"),
            ("server.port", "50051"),
            ("url.path", "/shop.Cart/Add"),
            ("url.scheme", "http"),
            ("weft.destination.service", "cart"),
            ("weft.endpoint", "10.0.0.7:8080"),
            ("weft.mtls", "true"),
            ("weft.retries", "2"),
            ("weft.route", "HTTPRoute/shop/cart/0"),
        ])
    );
    assert_eq!(
        attributes(&server.attributes),
        expected(&[
            ("http.request.method", "GET"),
            ("http.response.status_code", "200"),
            ("network.protocol.name", "http"),
            ("network.protocol.version", "1.1"),
            ("server.address", "cart"),
            ("server.port", "8080"),
            ("url.path", "/cart/7"),
            ("url.scheme", "http"),
            ("weft.destination.service", "cart"),
            ("weft.mtls", "false"),
            ("weft.retries", "0"),
        ])
    );
    assert_eq!(
        attributes(resource),
        expected(&[
            ("service.instance.id", "shop/front-7"),
            ("service.name", "front"),
            ("service.namespace", "shop"),
        ])
    );
}

#[tokio::test]
async fn spans_reach_a_grpc_collector() {
    let (address, mut received) = grpc_collector().await;
    let (client, server, resource) = journey(format!("http://{address}"), &mut received).await;
    check(&client, &server, &resource);
}

#[tokio::test]
async fn spans_reach_an_http_collector() {
    let (address, mut received) = http_collector().await;
    let endpoint = format!("http://{address}/v1/traces");
    let (client, server, resource) = journey(endpoint, &mut received).await;
    check(&client, &server, &resource);
}

#[tokio::test]
async fn the_endpoint_may_change() {
    let (first, mut at_first) = grpc_collector().await;
    let (second, mut at_second) = http_collector().await;
    let running = running(config(None)).await;
    let tracer = running.tracer();
    assert!(!tracer.on());

    running
        .config
        .send_replace(config(format!("http://{first}")));
    running.until(true).await;
    one_span(&tracer);
    at_first.recv().await.unwrap();

    // One that cannot be used turns tracing off; the proxy goes on.
    running
        .config
        .send_replace(config("https://collector:4317".to_owned()));
    running.until(false).await;

    running
        .config
        .send_replace(config(format!("http://{second}/v1/traces")));
    running.until(true).await;
    one_span(&tracer);
    at_second.recv().await.unwrap();
    drop(tracer);
    running.end().await;
    assert!(at_first.try_recv().is_err());
}

#[tokio::test(start_paused = true)]
async fn a_collector_that_is_down_costs_spans_and_nothing_else() {
    // Bound and closed: refused at once.
    let address = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    };
    let running = running(config(format!("http://{address}"))).await;
    let tracer = running.tracer();
    let total = 3 * crate::telemetry::trace::SPAN_QUEUE as u64;
    for _ in 0..total {
        one_span(&tracer);
    }
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(running.counted(Counter::SpansDropped), total);
    assert_eq!(running.counted(Counter::SpansExported), 0);
    // It comes up at last.
    let listener = TcpListener::bind(address).await.unwrap();
    let (send, mut received) = mpsc::unbounded_channel();
    tokio::spawn(serve_grpc(listener, Collector(send)));
    one_span(&tracer);
    received.recv().await.unwrap();
}

#[tokio::test]
async fn the_log_speaks_of_trouble_once_a_minute() {
    tokio::time::pause();
    let mut trouble = Trouble::default();
    let mut pauses = Vec::new();
    let mut said = Vec::new();
    for _ in 0..8 {
        pauses.push(trouble.seen("refused").as_secs());
        said.push(trouble.said);
        tokio::time::advance(Duration::from_secs(10)).await;
    }
    assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30, 30]);
    assert!(said[..6].iter().all(|s| *s == said[0]) && said[6] != said[0]);
    assert!(trouble.announced);
    trouble.over();
    assert_eq!(trouble.pause, Duration::ZERO);
    trouble.seen("refused");
    assert!(
        !trouble.announced,
        "too soon to speak again, so neither of its end"
    );
}

#[test]
fn endpoints_say_their_protocol() {
    for (given, uri, http) in [
        ("http://c:4317", "http://c:4317/", false),
        ("http://c:4317/", "http://c:4317/", false),
        ("http://[::1]:55680", "http://[::1]:55680/", false),
        ("http://c:4318", "http://c:4318/v1/traces", true),
        ("http://c:4318/v1/traces", "http://c:4318/v1/traces", true),
        ("http://c/otlp/v1/traces", "http://c/otlp/v1/traces", true),
    ] {
        let target = target(given).unwrap();
        assert_eq!((target.uri.to_string().as_str(), target.http), (uri, http));
    }
    assert!(matches!(
        target("https://c:4317"),
        Err(EndpointError::Scheme(_))
    ));
    for wrong in ["", "c:4317", "/v1/traces", "ftp://c", "http://"] {
        assert!(
            matches!(target(wrong), Err(EndpointError::Invalid(_))),
            "{wrong}"
        );
    }
}
