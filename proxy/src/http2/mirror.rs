//! Copies of HTTP/2 requests, over the connections of their backends.

use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use h2::{Reason, SendStream};
use http::Request;
use http::request::Parts;
use tokio::sync::mpsc;

use super::head;
use super::pool::Unleased;
use crate::balance::Outcome;
use crate::http::mirror::{self, Failed, Tees};
use crate::tables::{Backend, Plan};
use crate::worker::Worker;

/// Starts the copies of a request; `end`: it has no body.
pub(super) fn start(worker: &Rc<Worker>, plan: &Plan, head: &Parts, end: bool) -> Option<Rc<Tees>> {
    if plan.mirrors.is_empty() {
        return None;
    }
    mirror::start(worker, plan, !end, |backend, more| {
        send(worker.clone(), backend, head::for_one_try(head), end, more)
    })
}

async fn send(
    worker: Rc<Worker>,
    backend: Arc<Backend>,
    request: Request<()>,
    end: bool,
    mut more: mpsc::Receiver<Bytes>,
) -> Result<(), Failed> {
    let balancer = worker.balancer(&backend);
    let mut picked = balancer
        .pick(None, &[], Instant::now())
        .map_err(|why| format!("no endpoint: {why:?}"))?;
    let endpoint = picked.endpoint.clone();
    let leased = endpoint
        .pool
        .http2
        .lease(&worker, &endpoint.info, &balancer)
        .await;
    let mut lease = match leased {
        Ok(lease) => lease,
        Err(Unleased::Limit(limit)) => return Err(format!("limit reached: {limit:?}").into()),
        Err(Unleased::Failed(error)) => {
            if error.is_endpoints() {
                picked.observe(Outcome::ConnectFailure, Instant::now());
            }
            return Err(error.to_string().into());
        }
    };
    let (response, mut sink) = lease.send(request, end)?;
    if !end {
        let mut ended = false;
        while let Some(chunk) = more.recv().await {
            ended = chunk.is_empty();
            send_chunk(&mut sink, chunk).await?;
        }
        if !ended {
            sink.send_reset(Reason::CANCEL);
            return Err("the request was cut off, or the copy fell behind".into());
        }
        sink.send_data(Bytes::new(), true)?;
    }
    let mut body = response.await?.into_body();
    lease.heard(Instant::now());
    picked.observe(Outcome::Success, Instant::now());
    while let Some(data) = body.data().await {
        let n = data?.len();
        body.flow_control().release_capacity(n)?;
    }
    Ok(())
}

async fn send_chunk(sink: &mut SendStream<Bytes>, mut chunk: Bytes) -> Result<(), Failed> {
    while !chunk.is_empty() {
        sink.reserve_capacity(chunk.len());
        let window = match sink.capacity() {
            0 => match poll_fn(|cx| sink.poll_capacity(cx)).await {
                Some(window) => window?,
                None => return Err("it takes no more".into()),
            },
            window => window,
        };
        let part = chunk.split_to(window.min(chunk.len()));
        sink.send_data(part, false)?;
    }
    Ok(())
}
