//! A small OTLP/gRPC collector: keeps the latest traces for the tree at the end of the demo, and
//! passes every batch on when the person named an endpoint of their own.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

use super::trace::Span;

/// Traces kept; the demo shows one of them.
const MAX_TRACES: usize = 500;
/// Spans kept of one trace.
const MAX_SPANS: usize = 200;

/// The traces received, newest last.
#[derive(Debug, Default)]
pub struct Traces {
    order: VecDeque<Vec<u8>>,
    spans: HashMap<Vec<u8>, Vec<Span>>,
    received: usize,
}

impl Traces {
    /// Spans received in all.
    pub fn received(&self) -> usize {
        self.received
    }

    /// The trace that tells most: the one with the most spans, the latest among equals.
    pub fn richest(&self) -> Option<&[Span]> {
        self.order
            .iter()
            .filter_map(|id| self.spans.get(id))
            .max_by_key(|spans| spans.len())
            .map(Vec::as_slice)
    }

    fn add(&mut self, span: Span) {
        self.received += 1;
        if !self.spans.contains_key(&span.trace_id) {
            if self.order.len() == MAX_TRACES
                && let Some(oldest) = self.order.pop_front()
            {
                self.spans.remove(&oldest);
            }
            self.order.push_back(span.trace_id.clone());
        }
        let spans = self.spans.entry(span.trace_id.clone()).or_default();
        if spans.len() < MAX_SPANS {
            spans.push(span);
        }
    }

    /// Takes in one export.
    pub fn take(&mut self, export: &ExportTraceServiceRequest) {
        for resource in &export.resource_spans {
            let service = resource
                .resource
                .as_ref()
                .and_then(|r| text(&r.attributes, "service.name"))
                .unwrap_or("unknown");
            for span in resource.scope_spans.iter().flat_map(|s| &s.spans) {
                self.add(Span {
                    trace_id: span.trace_id.clone(),
                    id: span.span_id.clone(),
                    parent: span.parent_span_id.clone(),
                    service: service.to_owned(),
                    name: span.name.clone(),
                    kind: span.kind,
                    start: span.start_time_unix_nano,
                    end: span.end_time_unix_nano,
                    failed: span.status.as_ref().is_some_and(|s| s.code == 2),
                    attributes: span
                        .attributes
                        .iter()
                        .filter_map(|a| Some((a.key.clone(), shown(a.value.as_ref()?)?)))
                        .collect(),
                });
            }
        }
    }
}

fn text<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a str> {
    let found = attributes.iter().find(|a| a.key == key)?;
    match found.value.as_ref()?.value.as_ref()? {
        any_value::Value::StringValue(s) => Some(s),
        _ => None,
    }
}

fn shown(value: &AnyValue) -> Option<String> {
    Some(match value.value.as_ref()? {
        any_value::Value::StringValue(s) => s.clone(),
        any_value::Value::BoolValue(b) => b.to_string(),
        any_value::Value::IntValue(n) => n.to_string(),
        any_value::Value::DoubleValue(n) => n.to_string(),
        _ => return None,
    })
}

/// The service.
#[derive(Debug, Clone)]
pub struct Collector {
    traces: Arc<Mutex<Traces>>,
    /// Where batches are passed on to.
    onward: Option<mpsc::Sender<ExportTraceServiceRequest>>,
}

impl Collector {
    pub fn new(
        traces: Arc<Mutex<Traces>>,
        onward: Option<mpsc::Sender<ExportTraceServiceRequest>>,
    ) -> Self {
        Self { traces, onward }
    }

    /// Serves on `listener` for as long as it is polled.
    pub async fn serve(self, listener: TcpListener) -> anyhow::Result<()> {
        tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(self))
            .serve_with_incoming(TcpListenerStream::new(listener))
            .await?;
        Ok(())
    }
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let export = request.into_inner();
        if let Ok(mut traces) = self.traces.lock() {
            traces.take(&export);
        }
        if let Some(onward) = &self.onward {
            // A slow or absent collector must not hold up the proxies: what finds no room is lost.
            let _ = onward.try_send(export);
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

/// Passes batches on to a person's own OTLP/gRPC collector.
pub async fn relay(endpoint: String, mut batches: mpsc::Receiver<ExportTraceServiceRequest>) {
    use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
    let channel = match tonic::transport::Endpoint::from_shared(endpoint.clone()) {
        Ok(endpoint) => endpoint
            .connect_timeout(std::time::Duration::from_secs(2))
            .timeout(std::time::Duration::from_secs(5))
            .connect_lazy(),
        Err(e) => {
            tracing::error!("'{endpoint}' is not an OTLP endpoint: {e}");
            return;
        }
    };
    let mut client = TraceServiceClient::new(channel);
    let mut complained = false;
    while let Some(batch) = batches.recv().await {
        if let Err(e) = client.export(batch).await
            && !complained
        {
            complained = true;
            tracing::warn!("traces could not be handed to {endpoint}: {}", e.message());
        }
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry_proto::tonic::resource::v1::Resource;
    use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span as Wire};

    use super::*;

    fn export(trace: u8, span: u8) -> ExportTraceServiceRequest {
        let service = KeyValue {
            key: "service.name".to_owned(),
            value: Some(AnyValue {
                value: Some(any_value::Value::StringValue("front".to_owned())),
            }),
            ..Default::default()
        };
        ExportTraceServiceRequest {
            resource_spans: vec![ResourceSpans {
                resource: Some(Resource {
                    attributes: vec![service],
                    ..Default::default()
                }),
                scope_spans: vec![ScopeSpans {
                    spans: vec![Wire {
                        trace_id: vec![trace; 16],
                        span_id: vec![span; 8],
                        name: "GET".to_owned(),
                        ..Default::default()
                    }],
                    ..Default::default()
                }],
                ..Default::default()
            }],
        }
    }

    #[tokio::test]
    async fn spans_arrive_over_grpc_and_are_passed_on() {
        let own = Arc::new(Mutex::new(Traces::default()));
        let (onward, batches) = mpsc::channel(8);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(Collector::new(own.clone(), None).serve(listener));

        // A second collector in front of the first passes on what it gets.
        let before = Arc::new(Mutex::new(Traces::default()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let first = listener.local_addr().unwrap();
        tokio::spawn(Collector::new(before.clone(), Some(onward)).serve(listener));
        tokio::spawn(relay(format!("http://{address}"), batches));

        let (sender, batches) = mpsc::channel(8);
        let sending = tokio::spawn(relay(format!("http://{first}"), batches));
        for span in 1..=3 {
            sender.send(export(1, span)).await.unwrap();
        }
        sender.send(export(2, 1)).await.unwrap();
        drop(sender);
        sending.await.unwrap();
        assert_eq!(before.lock().unwrap().received(), 4);
        for _ in 0..200 {
            if own.lock().unwrap().received() == 4 {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        let own = own.lock().unwrap();
        let richest = own.richest().unwrap();
        assert_eq!(richest.len(), 3);
        assert_eq!(richest[0].service, "front");
    }

    #[test]
    fn memory_is_bounded() {
        let mut traces = Traces::default();
        for n in 0..2 * MAX_TRACES {
            let mut e = export(0, 1);
            e.resource_spans[0].scope_spans[0].spans[0].trace_id = n.to_be_bytes().to_vec();
            traces.take(&e);
        }
        assert_eq!(traces.order.len(), MAX_TRACES);
        assert_eq!(traces.spans.len(), MAX_TRACES);
        for _ in 0..2 * MAX_SPANS {
            traces.take(&export(9, 9));
        }
        assert_eq!(traces.richest().map(<[Span]>::len), Some(MAX_SPANS));
    }
}
