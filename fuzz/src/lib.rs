//! What the targets share: a connection in memory, our engine driven over a whole stream of bytes,
//! and hyper as the reference for where messages end.

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use weft_proxy::http1::framing::{Body, BodyReader};
use weft_proxy::http1::head::{self, Head, Parsed};

/// Everything that a peer sends, and then its end; what is sent to it is forgotten.
pub struct Memory<'a> {
    rest: &'a [u8],
    /// Nothing is read before something is written: a client sends first.
    pub wait_for_write: bool,
}

impl<'a> Memory<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self {
            rest: bytes,
            wait_for_write: false,
        }
    }
}

impl hyper::rt::Read for Memory<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut buf: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        if self.wait_for_write {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let n = buf.remaining().min(self.rest.len());
        buf.put_slice(&self.rest[..n]);
        self.rest = &self.rest[n..];
        Poll::Ready(Ok(()))
    }
}

impl hyper::rt::Write for Memory<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.wait_for_write = false;
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Polls a future for as long as it makes way; `None` when it waits for something that cannot
/// come.
pub fn drive<T>(future: impl Future<Output = T>) -> Option<T> {
    let flag = Arc::new(Flag(AtomicBool::new(false)));
    let waker = Waker::from(Arc::clone(&flag));
    let mut cx = Context::from_waker(&waker);
    let mut future = pin!(future);
    for _ in 0..100_000 {
        if let Poll::Ready(value) = future.as_mut().poll(&mut cx) {
            return Some(value);
        }
        if !flag.0.swap(false, Ordering::Relaxed) {
            return None;
        }
    }
    None
}

/// A message as it was understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub method: Vec<u8>,
    /// Responses only.
    pub status: u16,
    pub body: Vec<u8>,
}

/// The data of a body whose bytes are these, chunk framing taken away. The chunks' sizes were
/// followed by the engine already; here they are read once more, in the simplest way.
pub fn data_of(body: Body, bytes: &[u8]) -> Vec<u8> {
    if body != Body::Chunked {
        return bytes.to_vec();
    }
    let mut data = Vec::new();
    let mut rest = bytes;
    while let Some(end) = rest.iter().position(|b| b"\r\n".contains(b)) {
        let digits: Vec<u8> = rest[..end]
            .iter()
            .copied()
            .take_while(u8::is_ascii_hexdigit)
            .collect();
        let text = std::str::from_utf8(&digits).unwrap_or_default();
        let size = usize::from_str_radix(text, 16).unwrap_or(0);
        if size == 0 {
            break;
        }
        rest = after_line_end(&rest[end..]);
        data.extend_from_slice(&rest[..size]);
        rest = after_line_end(&rest[size..]);
    }
    data
}

fn after_line_end(bytes: &[u8]) -> &[u8] {
    &bytes[if bytes.first() == Some(&b'\n') { 1 } else { 2 }..]
}

/// Follows a body in pieces of `step` bytes; where it ends, if it ends in `bytes` (which the
/// connection's end follows).
pub fn end_of_body(mut reader: BodyReader, bytes: &[u8], step: usize) -> Option<usize> {
    let until_close = reader == BodyReader::UntilClose;
    let mut at = 0;
    while !reader.is_done() && at < bytes.len() {
        let piece = &bytes[at..bytes.len().min(at + step)];
        let taken = reader.advance(piece).ok()?;
        assert!(taken <= piece.len());
        assert!(taken == piece.len() || reader.is_done(), "it stands still");
        at += taken;
    }
    (reader.is_done() || until_close).then_some(at)
}

/// A head written on without edits is the same bytes; written on without the fields of this hop,
/// it is read in the same way.
pub fn check_written_on(bytes: &[u8], head: &Head, again: impl Fn(&[u8], &mut Head) -> bool) {
    let mut out = Vec::new();
    head.write(bytes, &[], &mut out);
    assert_eq!(out, &bytes[head.start..head.end]);
    let mut edits = Vec::new();
    weft_proxy::http1::framing::hop_by_hop(bytes, head, &mut edits);
    out.clear();
    head.write(bytes, &edits, &mut out);
    let mut second = Head::default();
    assert!(
        again(&out, &mut second),
        "what is sent on is refused by ourselves"
    );
    assert_eq!(second.end, out.len());
    assert_eq!(second.framing.body, head.framing.body);
}

/// The requests that our engine finds in a stream of bytes, up to the first that it refuses or
/// that is not whole, or after which bytes are no longer HTTP.
pub fn our_requests(bytes: &[u8], step: usize) -> Vec<Message> {
    let mut messages = Vec::new();
    let mut rest = bytes;
    loop {
        let mut found = Head::default();
        match head::parse_request(rest, &mut found) {
            Ok(Parsed::Complete) => {}
            Ok(Parsed::Partial) | Err(_) => return messages,
        }
        check_written_on(rest, &found, |bytes, head| {
            head::parse_request(bytes, head) == Ok(Parsed::Complete)
        });
        let body = &rest[found.end..];
        let framing = found.framing.body;
        let reader = BodyReader::new(framing);
        let whole = end_of_body(reader, body, usize::MAX);
        assert_eq!(
            end_of_body(reader, body, step),
            whole,
            "it depends on the pieces"
        );
        let Some(length) = whole else { return messages };
        let method = found.method.get(rest).to_vec();
        let last = method == b"CONNECT" || found.framing.upgrade;
        messages.push(Message {
            method,
            status: 0,
            body: data_of(framing, &body[..length]),
        });
        if last {
            return messages;
        }
        rest = &body[length..];
    }
}
