//! Copying as the two ways of a connection do it: counted, and with what
//! [`detect`](crate::detect) left of it.

use std::future::Future;

use bytes::BytesMut;

use super::{Counters, Ended, Options, copy, deliver_reset};
use crate::telemetry::FlowLabels;
use crate::transport::Stream;
use crate::worker::Worker;

/// What came of a copied connection.
#[derive(Debug, Clone, Copy)]
pub struct Relayed {
    pub ended: Ended,
    /// Bytes from the server.
    pub to_client: u64,
}

/// Copies a connection to its end, counted under `labels`, and cut at the worker's drain deadline.
pub async fn relay(
    worker: &Worker,
    labels: &FlowLabels,
    client: Stream,
    server: Stream,
    options: &Options,
) -> Relayed {
    let series = worker.metrics.connections(labels);
    let _open = series.open();
    let counters = Counters::default();
    let ended = copy(client, server, options, &counters, worker.cut()).await;
    series.to_destination(counters.to_server.get());
    series.to_source(counters.to_client.get());
    Relayed {
        ended,
        to_client: counters.to_client.get(),
    }
}

/// The server's connection, if it was opened while it was found out what is spoken; else a new one.
///
/// # Errors
/// Those of `open`.
pub async fn opened_or<U, E>(
    upstream: Option<U>,
    open: impl Future<Output = Result<U, E>>,
) -> Result<U, E> {
    match upstream {
        Some(upstream) => Ok(upstream),
        None => open.await,
    }
}

/// The client has reset the connection after `said`, before it was known what is spoken: the
/// server sees the same. One that was not opened yet is left alone if there is nothing to say.
pub async fn pass_early_reset<U: Into<Stream>, E>(
    said: BytesMut,
    upstream: Option<U>,
    open: impl Future<Output = Result<U, E>>,
) {
    if upstream.is_none() && said.is_empty() {
        return;
    }
    if let Ok(upstream) = opened_or(upstream, open).await {
        deliver_reset(upstream.into(), said.freeze()).await;
    }
}
