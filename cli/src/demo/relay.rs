//! Spans for a collector outside. The demo has a network of its own; a process that stays in the
//! machine's network gets the batches over a socket, and hands them to the person's collector.

use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use anyhow::Context;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

/// Batches that may wait for a slow collector; what does not find room is lost.
const QUEUE: usize = 64;
/// Largest batch taken, bytes.
const MAX_BATCH: u32 = 16 * 1024 * 1024;

/// The demo's end of the socket.
#[derive(Debug)]
pub struct Relay {
    socket: UnixStream,
}

impl Relay {
    /// Starts the process that stays outside.
    pub fn start(endpoint: &str) -> anyhow::Result<Self> {
        endpoint
            .parse::<http::Uri>()
            .ok()
            .filter(|uri| uri.scheme_str() == Some("http") && uri.authority().is_some())
            .with_context(|| {
                format!("'{endpoint}' is not an OTLP/gRPC endpoint: expected http://HOST:4317")
            })?;
        let (socket, theirs) = UnixStream::pair()?;
        Command::new(crate::binaries::own()?)
            .args(["app", "relay", "--endpoint", endpoint])
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()
            .context("the relay for spans cannot be started")?;
        Ok(Self { socket })
    }

    /// A queue whose batches go to the process outside.
    pub fn forward(self) -> anyhow::Result<mpsc::Sender<ExportTraceServiceRequest>> {
        self.socket.set_nonblocking(true)?;
        let mut socket = tokio::net::UnixStream::from_std(self.socket)?;
        let (sender, mut batches) = mpsc::channel::<ExportTraceServiceRequest>(QUEUE);
        tokio::spawn(async move {
            while let Some(batch) = batches.recv().await {
                if write(&mut socket, &batch).await.is_err() {
                    return;
                }
            }
        });
        Ok(sender)
    }
}

async fn write(
    socket: &mut tokio::net::UnixStream,
    batch: &ExportTraceServiceRequest,
) -> anyhow::Result<()> {
    let bytes = batch.encode_to_vec();
    socket.write_u32(u32::try_from(bytes.len())?).await?;
    socket.write_all(&bytes).await?;
    Ok(())
}

/// The process outside: until the demo's end of the socket is closed.
pub async fn run(endpoint: String) -> anyhow::Result<()> {
    use std::os::fd::AsFd;
    let socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    socket.set_nonblocking(true)?;
    serve(tokio::net::UnixStream::from_std(socket)?, endpoint).await
}

async fn serve(mut socket: tokio::net::UnixStream, endpoint: String) -> anyhow::Result<()> {
    let (sender, batches) = mpsc::channel(QUEUE);
    let exporting = tokio::spawn(super::collector::relay(endpoint, batches));
    while let Ok(length) = socket.read_u32().await {
        anyhow::ensure!(
            length <= MAX_BATCH,
            "a batch of {length} bytes is too large"
        );
        let mut bytes = vec![0; usize::try_from(length)?];
        socket.read_exact(&mut bytes).await?;
        sender
            .send(ExportTraceServiceRequest::decode(bytes.as_slice())?)
            .await?;
    }
    drop(sender);
    exporting.await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};
    use tokio::net::TcpListener;

    use super::super::collector::{Collector, Traces};
    use super::*;

    #[tokio::test]
    async fn batches_reach_the_collector_outside() {
        let traces = Arc::new(Mutex::new(Traces::default()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(Collector::new(traces.clone(), None).serve(listener));

        let (socket, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let theirs = tokio::net::UnixStream::from_std(theirs).unwrap();
        let outside = tokio::spawn(serve(theirs, format!("http://{address}")));
        let sender = Relay { socket }.forward().unwrap();
        for n in 0..3 {
            let batch = ExportTraceServiceRequest {
                resource_spans: vec![ResourceSpans {
                    scope_spans: vec![ScopeSpans {
                        spans: vec![Span {
                            trace_id: vec![n; 16],
                            span_id: vec![1; 8],
                            ..Default::default()
                        }],
                        ..Default::default()
                    }],
                    ..Default::default()
                }],
            };
            sender.send(batch).await.unwrap();
        }
        drop(sender);
        outside.await.unwrap().unwrap();
        assert_eq!(traces.lock().unwrap().received(), 3);
    }

    #[test]
    fn an_endpoint_that_is_none_is_refused() {
        for bad in ["", "localhost:4317", "https://x:4317", "http:///v1"] {
            assert!(Relay::start(bad).is_err(), "{bad}");
        }
    }
}
