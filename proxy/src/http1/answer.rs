//! What the engine says itself: answers to requests that go nowhere, changes to heads that pass,
//! and the orderly ends of a client's connection.

use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use super::conn::Conn;
use super::head::{Edit, Head};
use crate::http::ProxyError;
use crate::http::error::reason;
use crate::telemetry::trace::context::ContextHeaders;

/// How long a client that is answered early may go on sending before its connection is closed: a
/// reset would destroy the answer on its way.
pub(super) const LINGER: Duration = Duration::from_secs(2);

pub(super) async fn write_all(client: &mut Conn, bytes: &[u8]) -> std::io::Result<()> {
    let mut at = 0;
    poll_fn(|cx| {
        while at < bytes.len() {
            match std::task::ready!(client.poll_write(cx, &bytes[at..])) {
                Ok(n) => at += n,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        client.poll_flush(cx)
    })
    .await
}

/// An error of our own as a response.
pub(super) async fn answer(
    client: &mut Conn,
    error: &ProxyError,
    method: &[u8],
    keep: bool,
) -> std::io::Result<()> {
    let status = error.status();
    let body = format!("weft: {}\n", error.detail);
    let mut text = format!(
        "HTTP/1.1 {status} {}\r\ncontent-type: text/plain; charset=utf-8\r\n\
         content-length: {}\r\nproxy-status: {}\r\n{}{}\r\n",
        reason(status),
        body.len(),
        error.proxy_status(),
        match error.retry_after() {
            Some(seconds) => format!("retry-after: {seconds}\r\n"),
            None => String::new(),
        },
        if keep { "" } else { "connection: close\r\n" },
    );
    if method != b"HEAD" {
        text.push_str(&body);
    }
    write_all(client, text.as_bytes()).await
}

/// An answer of our own that is no error, without a body.
pub(super) async fn answer_plainly(
    client: &mut Conn,
    status: u16,
    fields: &[(&'static str, String)],
    keep: bool,
) -> std::io::Result<()> {
    let mut text = format!("HTTP/1.1 {status} {}\r\n", reason(status));
    for (name, value) in fields {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    // 204 has no body by itself (RFC 9110 section 8.6).
    if status != 204 {
        text.push_str("content-length: 0\r\n");
    }
    if !keep {
        text.push_str("connection: close\r\n");
    }
    text.push_str("\r\n");
    write_all(client, text.as_bytes()).await
}

/// Ends our direction and waits a little for the client's, so that what was written arrives.
pub(super) async fn linger(mut client: Conn) {
    if poll_fn(|cx| client.poll_shutdown(cx)).await.is_err() {
        return;
    }
    client.buf.clear();
    let drain = async {
        while !client.eof {
            match poll_fn(|cx| client.poll_fill(cx, 0)).await {
                Ok(0) | Err(_) => break,
                Ok(_) => client.buf.clear(),
            }
        }
    };
    let _ = tokio::time::timeout(LINGER, drain).await;
}

/// The client has finished and nothing is owed to it.
pub(super) async fn finish(mut client: Conn) {
    let _ = poll_fn(|cx| client.poll_shutdown(cx)).await;
}

/// Replaces the request's `traceparent` lines by ours, in their place; without one, ours comes
/// last.
pub(super) fn trace_edit(head: &Head, buf: &[u8], value: &[u8], edits: &mut Vec<Edit>) {
    let mut line = Vec::with_capacity(value.len() + 15);
    let mut placed = false;
    for field in head.all(buf, "traceparent") {
        let place = head.line(buf, field);
        if placed {
            edits.push(Edit::remove(place));
        } else {
            placed = true;
            edits.push(Edit {
                place: field.value,
                put: value.to_vec(),
            });
        }
    }
    if !placed {
        line.extend_from_slice(b"traceparent: ");
        line.extend_from_slice(value);
        line.extend_from_slice(b"\r\n");
        edits.push(Edit::insert(head.tail(buf), line));
    }
    edits.sort_by_key(|edit| edit.place.start);
}

/// Says `Connection: close` in a response that does not.
pub(super) fn say_close(response: &Head, buf: &[u8], edits: &mut Vec<Edit>) {
    for field in response.all(buf, "connection") {
        let place = response.line(buf, field);
        edits.retain(|edit| edit.place.start < place.start || edit.place.start >= place.end);
        edits.push(Edit::remove(place));
    }
    let at = response.tail(buf);
    edits.push(Edit::insert(at, b"Connection: close\r\n".to_vec()));
    edits.sort_by_key(|edit| edit.place.start);
}

/// The headers that may carry a trace context.
pub(super) fn context_headers<'b>(head: &Head, buf: &'b [u8]) -> ContextHeaders<'b> {
    let mut headers = ContextHeaders::default();
    for field in &head.fields {
        headers.take(field.name.get(buf), field.value.get(buf));
    }
    headers
}
