//! Copies of HTTP/1.1 requests, over the pooled connections of their backends.

use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use bytes::{Buf, Bytes};
use tokio::sync::mpsc;

use super::answer::write_all;
use super::conn::Conn;
use super::framing::{Body, BodyReader};
use super::head::{self, Head, MAX_HEAD, Parsed};
use super::pool;
use crate::balance::Outcome;
use crate::http::mirror::{self, Failed, Tees};
use crate::outbound::connect::connect;
use crate::tables::{Backend, Plan};
use crate::worker::Worker;

/// Starts the copies of a request. `out` is its head and what of its body is here; `more` says that
/// this is not all of it.
pub(super) fn start(
    worker: &Rc<Worker>,
    plan: &Plan,
    method: &[u8],
    out: &[u8],
    more: bool,
) -> Option<Rc<Tees>> {
    if plan.mirrors.is_empty() {
        return None;
    }
    // Made for the first copy that is drawn, and shared by the others.
    let mut shared: Option<(Rc<[u8]>, Bytes)> = None;
    mirror::start(worker, plan, more, |backend, rest| {
        let (method, first) = shared
            .get_or_insert_with(|| (method.into(), Bytes::copy_from_slice(out)))
            .clone();
        let rest = more.then_some(rest);
        send(worker.clone(), backend, method, first, rest)
    })
}

async fn send(
    worker: Rc<Worker>,
    backend: Arc<Backend>,
    method: Rc<[u8]>,
    first: Bytes,
    rest: Option<mpsc::Receiver<Bytes>>,
) -> Result<(), Failed> {
    let balancer = worker.balancer(&backend);
    let now = Instant::now();
    let mut picked = balancer
        .pick(None, &[], now)
        .map_err(|why| format!("no endpoint: {why:?}"))?;
    let idle = picked.endpoint.pool.http1.take(now);
    let (mut conn, permit) = match idle {
        Some(leased) => leased,
        None => {
            let permit = balancer
                .connection_permit()
                .map_err(|limit| format!("limit reached: {limit:?}"))?;
            let alpn = crate::identity::Alpn::Http1;
            let info = &picked.endpoint.info;
            match connect(&worker, info, &backend.policy, alpn).await {
                Ok(stream) => (Conn::new(stream), permit),
                Err(error) => {
                    if error.is_endpoints() {
                        picked.observe(Outcome::ConnectFailure, Instant::now());
                    }
                    return Err(error.into());
                }
            }
        }
    };
    write_all(&mut conn, &first).await?;
    if let Some(mut more) = rest {
        let mut ended = false;
        while let Some(chunk) = more.recv().await {
            ended = chunk.is_empty();
            write_all(&mut conn, &chunk).await?;
        }
        if !ended {
            conn.io.abort();
            return Err("the request was cut off, or the copy fell behind".into());
        }
    }
    let reusable = skip_response(&mut conn, &method).await?;
    picked.observe(Outcome::Success, Instant::now());
    conn.requests += 1;
    let policy = &backend.policy.connection;
    if reusable && !policy.is_worn(conn.requests) {
        let how_long = pool::how_long(&conn, policy);
        let pool = &picked.endpoint.pool.http1;
        pool.put(conn, permit, Instant::now(), how_long);
    }
    Ok(())
}

/// Reads a response to its end; whether the connection can be used again.
async fn skip_response(conn: &mut Conn, method: &[u8]) -> Result<bool, Failed> {
    let mut head = Head::default();
    loop {
        if !conn.buf.is_empty()
            && head::parse_response(&conn.buf, method, &mut head)? == Parsed::Complete
        {
            conn.buf.advance(head.end);
            if head.status == 101 {
                return Err("it switched protocols".into());
            }
            if head.status >= 200 {
                break;
            }
            continue;
        }
        if conn.buf.len() > MAX_HEAD {
            return Err("the head of its response is too large".into());
        }
        if poll_fn(|cx| conn.poll_fill(cx, 0)).await? == 0 {
            return Err("no response".into());
        }
    }
    let mut body = BodyReader::new(head.framing.body);
    while !body.is_done() {
        let n = body.advance(&conn.buf)?;
        conn.buf.advance(n);
        if body.is_done() {
            break;
        }
        if poll_fn(|cx| conn.poll_fill(cx, 0)).await? == 0 {
            return Ok(false);
        }
    }
    let lasts = head.minor == 1 && !head.framing.close && head.framing.body != Body::UntilClose;
    Ok(lasts && conn.buf.is_empty())
}
