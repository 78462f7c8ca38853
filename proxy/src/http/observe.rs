//! What is told of a request: counters, a span if it is sampled, a line of the access log, and
//! whoever taps the proxy.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::flow::Flow;
use super::{ErrorCode, RequestView};
use crate::tables::{AccessLog, EndpointInfo, Route};
use crate::telemetry::trace::Traceparent;
use crate::telemetry::trace::context::ContextHeaders;
use crate::telemetry::{
    AccessRecord, ActiveSpan, Counter, Direction, FlowProtocol, InFlight, SpanKind, access_log,
};
use crate::worker::Worker;

/// A request that is being observed.
#[derive(Debug)]
pub struct Observation {
    protocol: FlowProtocol,
    started: Instant,
    head_after: Option<Duration>,
    in_flight: Option<InFlight>,
    endpoint: Option<Arc<EndpointInfo>>,
    span: Option<Box<ActiveSpan>>,
    log: Option<(AccessLog, Box<AccessRecord>)>,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ending<'a> {
    /// 0: no response.
    pub status: u16,
    pub grpc_status: Option<u32>,
    pub error: Option<ErrorCode>,
    pub route: Option<&'a Arc<Route>>,
    pub tries: u32,
    /// Bytes of the bodies, from the source and to it.
    pub bytes_in: u64,
    pub bytes_out: u64,
}

impl Observation {
    /// A request's head is here. Gives the `traceparent` that has to replace the request's, if
    /// any. `headers` is asked only when tracing is on.
    pub fn begin<'r, R: RequestView>(
        worker: &Worker,
        flow: &Flow,
        request: &R,
        headers: impl FnOnce() -> ContextHeaders<'r>,
        protocol: FlowProtocol,
        started: Instant,
    ) -> (Self, Option<Traceparent>) {
        let mut observation = Self {
            protocol,
            started,
            head_after: None,
            in_flight: None,
            endpoint: None,
            span: None,
            log: None,
        };
        let me = worker.workload();
        let mut propagate = None;
        if worker.tracer.on() {
            let kind = match flow.direction {
                Direction::Outbound => SpanKind::Client,
                Direction::Inbound => SpanKind::Server,
            };
            let context = headers().context();
            let begun = worker.tracer.start(context.as_ref(), me.sampler(), kind);
            propagate = begun.propagate;
            observation.span = begun.span;
            if let Some(span) = &mut observation.span {
                span.update(|record| {
                    let host = request.host().unwrap_or_default();
                    record.request(request.method(), request.path(), host);
                    record.protocol = protocol;
                });
            }
        }
        if me.access_log != AccessLog::Off || worker.taps.is_on() {
            let mut line = AccessRecord::new(flow.direction, protocol, SystemTime::now());
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned().into_boxed_str();
            line.method = text(request.method());
            line.path = text(request.path());
            line.authority = text(request.host().unwrap_or_default());
            observation.log = Some((me.access_log, Box::new(line)));
        }
        (observation, propagate)
    }

    /// A try goes to this endpoint.
    pub fn endpoint(&mut self, worker: &Worker, flow: &Flow, endpoint: &Arc<EndpointInfo>) {
        let series = flow.series(worker, Some(endpoint), self.protocol);
        let same = self
            .in_flight
            .as_ref()
            .is_some_and(|now| Rc::ptr_eq(now.series(), &series));
        if !same {
            self.in_flight = Some(series.enter());
        }
        if self.span.is_some() || self.log.is_some() {
            self.endpoint = Some(endpoint.clone());
        }
    }

    /// The head of the response is here.
    pub fn head(&mut self, now: Instant) {
        self.head_after = Some(now.saturating_duration_since(self.started));
    }

    /// The request has turned out to be gRPC.
    pub fn protocol(&mut self, protocol: FlowProtocol) {
        self.protocol = protocol;
    }

    /// The request has ended, one way or another.
    pub fn finish(mut self, worker: &Worker, flow: &Flow, ending: &Ending<'_>, now: Instant) {
        let duration = now.saturating_duration_since(self.started);
        match &self.in_flight {
            Some(open) => open
                .series()
                .record(ending.status, ending.grpc_status, duration),
            None => flow.series(worker, None, self.protocol).record(
                ending.status,
                ending.grpc_status,
                duration,
            ),
        }
        if let Some(code) = ending.error {
            let destination = flow.destination.borrow();
            worker.metrics.count(
                Counter::Errors,
                &[
                    code.name(),
                    flow.direction.as_str(),
                    &destination.service,
                    &destination.namespace,
                ],
            );
        }
        if self.span.is_none() && self.log.is_none() {
            return;
        }
        let error: Option<Arc<str>> = ending.error.map(|code| code.name().into());
        let endpoint = self.endpoint.as_deref();
        let route: Arc<str> = ending.route.map(|r| r.name.clone()).unwrap_or_default();
        let retries = ending.tries.saturating_sub(1);
        let labels = flow.labels(endpoint, self.protocol);
        let trace_id = self.span.as_ref().and_then(|span| span.trace_id());
        if let Some(mut span) = self.span.take() {
            span.update(|record| {
                record.protocol = self.protocol;
                record.status = ending.status;
                record.grpc_status = ending.grpc_status;
                record.error = error.clone();
                record.destination_service = labels.destination_service.clone();
                record.destination_namespace = labels.destination_namespace.clone();
                record.peer_workload = match flow.direction {
                    Direction::Outbound => endpoint.map(|e| e.workload.clone()).unwrap_or_default(),
                    Direction::Inbound => join(&labels.source_namespace, &labels.source_workload),
                };
                record.route = route.clone();
                record.backend = format!(
                    "{}/{}:{}",
                    labels.destination_namespace, labels.destination_service, labels.port
                )
                .into();
                record.endpoint = endpoint.map(|e| e.address);
                record.retries = retries;
                record.mtls = labels.mtls;
            });
            span.finish();
        }
        let Some((mode, mut line)) = self.log.take() else {
            return;
        };
        let failed = error.is_some();
        let logged = access_log::wanted(mode, ending.status, ending.grpc_status, failed);
        let tapped = worker.taps.is_on();
        if logged || tapped {
            line.protocol = self.protocol;
            line.status = ending.status;
            line.grpc_status = ending.grpc_status;
            line.error = error;
            line.duration = duration;
            line.time_to_head = self.head_after;
            line.bytes_in = ending.bytes_in;
            line.bytes_out = ending.bytes_out;
            line.source_address = Some(flow.peer);
            line.source_workload = join(&labels.source_namespace, &labels.source_workload);
            line.destination_service =
                join(&labels.destination_namespace, &labels.destination_service);
            line.destination_workload = endpoint.map(|e| e.workload.clone()).unwrap_or_default();
            line.destination_address = endpoint.map(|e| e.address);
            line.route = route;
            line.mtls = labels.mtls;
            line.trace_id = trace_id;
            line.retries = retries;
            if tapped {
                worker.taps.offer(&line);
            }
            if logged {
                worker.access_log.send(line);
            }
        }
    }
}

/// `<namespace>/<name>`; the name alone where there is no namespace.
fn join(namespace: &str, name: &str) -> Arc<str> {
    match namespace {
        "" => name.into(),
        namespace => format!("{namespace}/{name}").into(),
    }
}
