use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::telemetry::AccessRecord;
use crate::telemetry::labels::{Direction, FlowLabels, FlowProtocol};
use crate::telemetry::stats::EndpointState;

struct Known {
    missing: Arc<Mutex<Option<String>>>,
    drained: Arc<AtomicUsize>,
}

impl Introspect for Known {
    fn ready(&self) -> Result<(), String> {
        self.missing.lock().unwrap().clone().map_or(Ok(()), Err)
    }

    fn config(&self) -> BoxFuture<'_, serde_json::Value> {
        Box::pin(async { serde_json::json!({ "workload": "shop/front" }) })
    }

    fn drain(&self) {
        self.drained.fetch_add(1, Ordering::Relaxed);
    }

    fn endpoints(&self) -> Vec<EndpointView> {
        vec![EndpointView {
            service: "cart".to_owned(),
            namespace: "shop".to_owned(),
            port: 80,
            address: "10.0.0.1:80".to_owned(),
            workload: "shop/cart".to_owned(),
            zone: String::new(),
            state: EndpointState::Ready,
        }]
    }
}

type Missing = Arc<Mutex<Option<String>>>;

fn state() -> (AdminState, Missing, Arc<AtomicUsize>) {
    let drained = Arc::new(AtomicUsize::new(0));
    let missing = Missing::default();
    let known = Known {
        missing: missing.clone(),
        drained: drained.clone(),
    };
    let state = AdminState {
        registry: Registry::new(),
        taps: Arc::default(),
        trusted: vec!["10.0.0.1".parse().unwrap()],
        probes: vec![
            "tcp/5432".to_owned(),
            "https/8443/healthz?full=1".to_owned(),
        ],
        introspect: Arc::new(known),
        log: None,
    };
    (state, missing, drained)
}

const NEAR: &str = "127.0.0.1:1000";
const FAR: &str = "10.0.0.9:1000";

async fn ask(state: &AdminState, peer: &str, method: &str, target: &str) -> (u16, String) {
    let request = Request::builder().method(method).uri(target).body(());
    let response = respond(state, peer.parse().unwrap(), &request.unwrap()).await;
    let status = response.status().as_u16();
    let body = http_body_util::BodyExt::collect(response.into_body()).await;
    let text = String::from_utf8(body.unwrap().to_bytes().to_vec()).unwrap();
    (status, text)
}

#[tokio::test]
async fn ready_says_why_not_and_drain_is_for_the_host_itself() {
    let (state, missing, drained) = state();
    *missing.lock().unwrap() = Some("waiting for a certificate".to_owned());
    let (status, why) = ask(&state, FAR, "GET", "/readyz").await;
    assert_eq!((status, &*why), (503, "waiting for a certificate\n"));
    *missing.lock().unwrap() = None;
    assert_eq!(ask(&state, FAR, "GET", "/readyz").await.0, 200);

    assert_eq!(ask(&state, NEAR, "GET", "/drain").await.0, 405);
    assert_eq!(ask(&state, FAR, "POST", "/drain").await.0, 403);
    assert_eq!(drained.load(Ordering::Relaxed), 0);
    let mapped = "[::ffff:127.0.0.1]:9";
    assert_eq!(ask(&state, mapped, "POST", "/drain").await.0, 200);
    assert_eq!(drained.load(Ordering::Relaxed), 1);
    assert_eq!(ask(&state, FAR, "GET", "/healthz").await.0, 200);
}

#[tokio::test]
async fn shows_what_it_knows() {
    let (state, _, _) = state();
    let worker = state.registry.worker();
    let series = worker.requests(&FlowLabels {
        direction: Direction::Outbound,
        source_workload: "front".into(),
        source_namespace: "shop".into(),
        destination_service: "cart".into(),
        destination_namespace: "shop".into(),
        destination_workload: "cart".into(),
        port: 80,
        protocol: FlowProtocol::H2,
        mtls: true,
    });
    series.record(200, None, Duration::from_millis(1));
    let (status, metrics) = ask(&state, FAR, "GET", "/metrics").await;
    assert_eq!(status, 200);
    assert!(
        metrics.contains("\nweft_requests_total{direction=\"outbound\",source_workload=\"front\",")
    );
    assert!(metrics.contains("state=\"ready\"} 1\n"));
    assert!(metrics.contains("\nprocess_resident_memory_bytes "));
    let (_, stats) = ask(&state, FAR, "GET", "/stats.json").await;
    let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
    assert_eq!(stats["destinations"][0]["requests"], 1);
    assert_eq!(
        stats["destinations"][0]["endpoints"][0]["address"],
        "10.0.0.1:80"
    );
    let (_, config) = ask(&state, NEAR, "GET", "/config").await;
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["workload"], "shop/front");
    assert_eq!(ask(&state, NEAR, "POST", "/metrics").await.0, 405);
    assert_eq!(ask(&state, NEAR, "POST", "/quit").await.0, 404);
}

#[tokio::test]
async fn the_log_filter_changes_while_it_runs() {
    use tracing_subscriber::layer::SubscriberExt;
    let (mut state, _, _) = state();
    assert_eq!(ask(&state, NEAR, "GET", "/log").await.0, 404);
    let (layer, log) = LogControl::with_layer("info").unwrap();
    let subscriber = tracing_subscriber::registry().with(layer);
    state.log = Some(log);
    let target = "/log?level=weft_proxy%3Ddebug,h2=warn";
    assert_eq!(ask(&state, FAR, "PUT", target).await.0, 403);
    let (status, now) = ask(&state, NEAR, "PUT", target).await;
    assert_eq!(status, 200);
    assert!(
        now.contains("weft_proxy=debug") && now.contains("h2=warn"),
        "{now}"
    );
    let (status, why) = ask(&state, NEAR, "POST", "/log?level=a=b=c").await;
    assert_eq!((status, why.contains("'a=b=c'")), (400, true), "{why}");
    assert_eq!(ask(&state, NEAR, "POST", "/log").await.0, 400);
    assert_eq!(
        ask(&state, NEAR, "GET", "/log").await,
        (200, now),
        "the old one stays"
    );
    // What the filter says is what passes.
    tracing::subscriber::with_default(subscriber, || {
        assert!(tracing::enabled!(target: "weft_proxy", tracing::Level::DEBUG));
        assert!(!tracing::enabled!(target: "h2", tracing::Level::INFO));
    });
}

#[tokio::test]
async fn other_hosts_are_told_of_health_and_metrics_only() {
    let (state, _, drained) = state();
    for (method, target, near) in [
        ("GET", "/healthz", 200),
        ("GET", "/readyz", 200),
        ("GET", "/metrics", 200),
        ("GET", "/stats.json", 200),
        ("GET", "/config", 200),
        ("HEAD", "/config", 200),
        ("GET", "/log", 404),
        ("PUT", "/log?level=debug", 404),
        ("GET", "/tap", 200),
        ("GET", "/tap?path=/x", 200),
        ("POST", "/drain", 200),
        ("PUT", "/drain", 200),
        ("GET", "/what/ever", 404),
    ] {
        let path = target.split('?').next().unwrap();
        let far = if OPEN.contains(&path) { near } else { 403 };
        for (peer, expected) in [
            (NEAR, near),
            ("[::1]:9", near),
            (FAR, far),
            ("[fd00::9]:9", far),
            ("10.0.0.1:9", near),
        ] {
            let request = Request::builder()
                .method(method)
                .uri(target)
                .body(())
                .unwrap();
            let response = respond(&state, peer.parse().unwrap(), &request).await;
            assert_eq!(response.status(), expected, "{method} {target} from {peer}");
        }
    }
    assert_eq!(
        drained.load(Ordering::Relaxed),
        6,
        "twice by each of the near ones"
    );
    assert!(
        !state.taps.is_on(),
        "the answers that were not read are gone"
    );
}

#[tokio::test(start_paused = true)]
async fn a_tap_outlives_other_connections() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (state, _, _) = state();
    let taps = state.taps.clone();
    let server = tokio::spawn(serve(listener, state));
    let mut client = TcpStream::connect(address).await.unwrap();
    client
        .write_all(b"GET /tap?status=5xx HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    let mut seen = String::new();
    let begun = tokio::time::Instant::now();
    while begun.elapsed() < 2 * MAX_LIFETIME {
        let mut buf = [0; 4096];
        let n = client.read(&mut buf).await.unwrap();
        assert!(n > 0, "the tap ended: {seen}");
        seen.push_str(&String::from_utf8_lossy(&buf[..n]));
    }
    assert!(seen.starts_with("HTTP/1.1 200 OK\r\n"), "{seen}");
    for status in [200, 503] {
        let now = std::time::SystemTime::now();
        let mut record = AccessRecord::new(Direction::Outbound, FlowProtocol::Http1, now);
        record.status = status;
        taps.offer(&record);
    }
    while !seen.contains("\"status\":") {
        let mut buf = [0; 4096];
        let n = client.read(&mut buf).await.unwrap();
        seen.push_str(&String::from_utf8_lossy(&buf[..n]));
    }
    assert!(seen.contains("\"status\":503") && !seen.contains("\"status\":200"));
    drop(client);
    let left = tokio::time::Instant::now();
    while taps.is_on() {
        assert!(left.elapsed() < MAX_LIFETIME, "the tap outlives its client");
        // Paused time: this lets the server see that nobody reads any more.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    server.abort();
}

#[test]
fn escapes() {
    assert_eq!(decode("a%3Db%2c%zz%"), "a=b,%zz%");
    assert_eq!(decode("%e2%82%ac"), "\u{20ac}");
}

async fn exchange(stream: &mut TcpStream, request: &[u8]) -> String {
    // The server may have closed already.
    let _ = stream.write_all(request).await;
    let mut out = Vec::new();
    let _ = stream.read_to_end(&mut out).await;
    String::from_utf8_lossy(&out).into_owned()
}

#[tokio::test(start_paused = true)]
async fn slow_and_oversized_clients_are_shown_out() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (state, _, _) = state();
    let server = tokio::spawn(serve(listener, state));

    let mut client = TcpStream::connect(address).await.unwrap();
    let answer = exchange(
        &mut client,
        b"GET /healthz HTTP/1.1\r\nconnection: close\r\n\r\n",
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");

    let mut long = b"GET / HTTP/1.1\r\nx: ".to_vec();
    long.resize(MAX_HEAD * 3, b'x');
    let mut client = TcpStream::connect(address).await.unwrap();
    let answer = exchange(&mut client, &long).await;
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 431"),
        "{answer}"
    );

    // All places taken by clients that stall mid-head: they are shown out, and one more is served.
    let begun = tokio::time::Instant::now();
    let mut stalled = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET /healthz HT").await.unwrap();
        stalled.push(client);
    }
    let mut client = TcpStream::connect(address).await.unwrap();
    let answer = exchange(
        &mut client,
        b"GET /healthz HTTP/1.1\r\nconnection: close\r\n\r\n",
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    let waited = begun.elapsed();
    assert!(
        waited <= HEAD_TIMEOUT + Duration::from_secs(1),
        "{waited:?}"
    );
    server.abort();
}

#[test]
fn only_the_probes_named_are_made() {
    let (state, ..) = state();
    for (method, target, expected) in [
        ("GET", "/probe/tcp/5432", Some("tcp/5432")),
        (
            "GET",
            "/probe/https/8443/healthz?full=1",
            Some("https/8443/healthz?full=1"),
        ),
        ("GET", "/probe/tcp/5433", None),
        ("GET", "/probe/tcp/54321", None),
        ("GET", "/probe/tcp/5432/", None),
        ("GET", "/probe/https/8443/healthz", None),
        ("GET", "/probe/https/8443/healthz?full=2", None),
        ("POST", "/probe/tcp/5432", None),
        ("GET", "/probe/", None),
    ] {
        let request = Request::builder().method(method).uri(target).body(());
        assert_eq!(
            asked(&state, &request.unwrap()),
            expected,
            "{method} {target}"
        );
    }
}
