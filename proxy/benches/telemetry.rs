//! What telemetry costs on a request's way, in nanoseconds: `cargo bench -p weft-proxy --bench
//! telemetry`. The target is below 60 ns for a request that is counted and not traced.

use std::hint::black_box;
use std::rc::Rc;
use std::time::{Duration, Instant};

use weft_proxy::telemetry::trace::context::ContextHeaders;
use weft_proxy::telemetry::trace::span_channel;
use weft_proxy::telemetry::{
    Direction, FlowLabels, FlowProtocol, Registry, RequestSeries, Sampler, SpanKind, Tracer,
};

const ROUNDS: usize = 9;
const CALLS: u32 = 1_000_000;

/// Median over the rounds of the mean of one call.
fn measure(name: &str, mut call: impl FnMut(u32)) {
    let mut rounds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let begun = Instant::now();
            for i in 0..CALLS {
                call(i);
            }
            begun.elapsed().as_nanos() as f64 / f64::from(CALLS)
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    println!("{name:<58} {:>7.1} ns", rounds[ROUNDS / 2]);
}

fn flow(i: usize) -> FlowLabels {
    FlowLabels {
        direction: Direction::Outbound,
        source_workload: "front".into(),
        source_namespace: "shop".into(),
        destination_service: format!("service-{i}").into(),
        destination_namespace: "shop".into(),
        destination_workload: format!("service-{i}-7d9f").into(),
        port: 8080,
        protocol: FlowProtocol::Http1,
        mtls: true,
    }
}

fn main() {
    let registry = Registry::new();
    let worker = registry.worker();
    let labels: Vec<FlowLabels> = (0..1_000).map(flow).collect();
    let series: Vec<Rc<RequestSeries>> = labels.iter().map(|l| worker.requests(l)).collect();
    let duration = |i: u32| Duration::from_nanos(u64::from(i) * 1_000 % 40_000_000);

    measure("count a request (record)", |i| {
        black_box(&series[0]).record(200, None, duration(i));
    });
    measure("count a request, in flight and record", |i| {
        let running = black_box(&series[0]).enter();
        running.series().record(200, None, duration(i));
    });
    measure("the same over 1,000 destinations in turn", |i| {
        let running = series[i as usize % series.len()].enter();
        running.series().record(200, Some(0), duration(i));
    });
    measure("resolve a handle that is known (per connection)", |i| {
        black_box(worker.requests(&labels[i as usize % labels.len()]));
    });

    let (sink, mut source) = span_channel(registry.clone());
    let tracer = Tracer::new(sink);
    let off = Sampler::default();
    let one_percent = Sampler::per_myriad(100);
    measure("begin a request, tracing off", |_| {
        black_box(
            tracer
                .start(None, black_box(one_percent), SpanKind::Client)
                .propagate,
        );
    });
    source.turn_on();
    measure("begin a request, no decision, rate 0", |_| {
        black_box(
            tracer
                .start(None, black_box(off), SpanKind::Client)
                .propagate,
        );
    });
    measure("begin and end a request, 1 % sampled, spans taken", |_| {
        let started = tracer.start(None, black_box(one_percent), SpanKind::Client);
        if let Some(parent) = black_box(started.propagate) {
            black_box(parent.to_bytes());
        }
        if let Some(span) = started.span {
            span.finish();
            black_box(source.try_recv());
        }
    });
    measure(
        "begin and end a request, 100 % sampled, spans taken",
        |_| {
            let started = tracer.start(None, Sampler::per_myriad(10_000), SpanKind::Client);
            if let Some(span) = started.span {
                span.finish();
            }
            black_box(source.try_recv());
        },
    );
    let parent = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
    measure("look for a context in 12 headers and read it", |_| {
        let mut headers = ContextHeaders::default();
        for name in [
            &b"Host"[..],
            b"User-Agent",
            b"Accept",
            b"Accept-Encoding",
            b"Cookie",
            b"Connection",
            b"Cache-Control",
            b"Referer",
            b"Origin",
            b"Content-Length",
            b"X-Request-Id",
        ] {
            headers.take(black_box(name), b"x");
        }
        headers.take(black_box(b"traceparent"), black_box(parent));
        black_box(headers.context());
    });
    measure("a request in all: 1 % sampled, in flight, record", |i| {
        let started = tracer.start(None, black_box(one_percent), SpanKind::Client);
        let running = black_box(&series[0]).enter();
        running.series().record(200, None, duration(i));
        if let Some(span) = started.span {
            span.finish();
            black_box(source.try_recv());
        }
    });
}
