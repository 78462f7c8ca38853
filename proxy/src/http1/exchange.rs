//! Request and response between two connections, both directions at once.
//!
//! [`Duplex`] moves bytes; it is polled by one task and owns neither connection. The request side
//! writes the head (built before), then body bytes as they come; the response side reads heads,
//! then passes body bytes. Neither waits for the other: early responses, 100-continue from the
//! server itself and streams both ways need nothing special.
//!
//! ```text
//! client ──buf──▶ request: BodyReader ──▶ server        upload:   Open → Finished | Broken
//! client ◀── to_client ◀── response: BodyReader ◀──buf── server   download: head(s) → body → done
//! ```

use std::io;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};

use super::conn::Conn;
use super::framing::{BodyReader, FramingError};
use super::head::{self, Head, HeadError, MAX_HEAD, Parsed};
use super::kept;
use crate::http::mirror::Tees;

/// Bytes of pipelined requests that are read ahead while an exchange runs.
pub(super) const READ_AHEAD: usize = 16 * 1024;

/// How far the request has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upload {
    Open,
    /// All of it has been written.
    Finished,
    /// The client ended its direction within the body: the server has been told by a half-close.
    CutOff,
    /// The server takes no more; a response may still come.
    Broken,
}

/// What the driver of an exchange has to act on.
#[derive(Debug)]
pub enum Event {
    /// The head of a response (interim or final) stands in the server's buffer.
    Head,
    /// The response has ended, and all of it has been written to the client.
    Done,
    /// The server finished its direction before a response began.
    ServerClosed,
    /// The connection to the server was cut off before a response began.
    ServerReset(io::Error),
    /// The server finished its direction within the body of a response.
    Truncated,
    /// The connection to the server was cut off within the body of a response.
    Cut(io::Error),
    /// What the server says does not begin like HTTP/1.0 or 1.1 (HTTP/0.9, Shoutcast's `ICY`).
    NotHttp,
    /// The response is not valid HTTP/1.
    BadResponse(HeadError),
    /// The response's body is malformed.
    BadBody(FramingError),
    /// The request's body is malformed.
    BadRequest(FramingError),
    /// The client's connection was cut off.
    ClientGone(io::Error),
}

/// The moving parts of one try.
#[derive(Debug)]
pub struct Duplex<'a> {
    pub client: &'a mut Conn,
    pub server: &'a mut Conn,
    /// What is sent first: the head, and the body's bytes that stood ready. While `replay` holds,
    /// all that was sent.
    pub out: &'a mut Vec<u8>,
    pub sent: usize,
    /// Where the request's body goes beside its way.
    pub tees: Option<Rc<Tees>>,
    /// Keep what is sent, up to this many bytes; `None`: it is not kept (any more).
    pub replay: Option<usize>,
    pub request: &'a mut BodyReader,
    /// Bytes at the front of the client's buffer that belong to the body and are not written.
    pub ready: usize,
    pub upload: Upload,
    /// Bytes of the request's body that passed.
    pub body_sent: u64,
    flush_server: bool,
    half_closed: bool,
    /// What goes to the client before further body bytes.
    pub to_client: &'a mut Vec<u8>,
    pub given: usize,
    pub response: Option<BodyReader>,
    response_ready: usize,
    /// Bytes of the response's body that passed.
    pub body_received: u64,
    flush_client: bool,
    /// Any byte of a response has been read.
    pub heard: bool,
    /// Bytes of an incomplete head that have been looked at.
    head_seen: usize,
    /// Grows with every byte that moves, for the idle timeout.
    pub progress: u64,
}

impl<'a> Duplex<'a> {
    pub fn new(
        client: &'a mut Conn,
        server: &'a mut Conn,
        out: &'a mut Vec<u8>,
        to_client: &'a mut Vec<u8>,
        request: &'a mut BodyReader,
        replay: Option<usize>,
    ) -> Self {
        Self {
            client,
            server,
            out,
            sent: 0,
            tees: None,
            replay,
            request,
            ready: 0,
            upload: Upload::Open,
            body_sent: 0,
            flush_server: false,
            half_closed: false,
            to_client,
            given: 0,
            response: None,
            response_ready: 0,
            body_received: 0,
            flush_client: false,
            heard: false,
            head_seen: 0,
            progress: 0,
        }
    }

    /// So much of the head has been sent already.
    pub fn resume(&mut self, sent: usize) {
        self.sent = sent;
        self.flush_server = true;
    }

    /// Moves what can be moved; ready when the driver has to act. `head` takes the response's
    /// head, `method` is the request's.
    pub fn poll(&mut self, cx: &mut Context<'_>, head: &mut Head, method: &[u8]) -> Poll<Event> {
        if let Poll::Ready(event) = self.poll_upload(cx) {
            return Poll::Ready(event);
        }
        self.poll_download(cx, head, method)
    }

    /// Ready only with an event that ends the exchange; `Pending` also when all is sent.
    fn poll_upload(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        if self.upload == Upload::Broken {
            return Poll::Pending;
        }
        match self.poll_upload_io(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(event)) => Poll::Ready(event),
            // What the server said before it closed still stands in its buffer or the kernel's.
            Poll::Ready(Err(_)) => {
                self.upload = Upload::Broken;
                Poll::Pending
            }
        }
    }

    /// `Err` is an error of the server's connection.
    fn poll_upload_io(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Event>> {
        loop {
            if self.sent < self.out.len() {
                let n = ready!(self.server.poll_write(cx, &self.out[self.sent..]))?;
                self.sent += n;
                self.progress += n as u64;
                self.flush_server = true;
                continue;
            }
            if self.ready > 0 {
                let bytes = &self.client.buf[..self.ready];
                let n = ready!(self.server.poll_write(cx, bytes))?;
                if let Some(tees) = &self.tees {
                    tees.push(&self.client.buf[..n]);
                }
                self.keep(n);
                self.client.buf.advance(n);
                self.ready -= n;
                self.body_sent += n as u64;
                self.progress += n as u64;
                self.flush_server = true;
                continue;
            }
            if self.request.is_done() || self.upload == Upload::CutOff {
                if self.flush_server {
                    ready!(self.server.poll_flush(cx))?;
                    self.flush_server = false;
                }
                if self.upload == Upload::Open {
                    self.upload = Upload::Finished;
                    if let Some(tees) = self.tees.take() {
                        tees.end();
                    }
                }
                return self.poll_client_end(cx);
            }
            if !self.client.buf.is_empty() {
                match self.request.advance(&self.client.buf) {
                    Ok(n) => self.ready = n,
                    Err(error) => return Poll::Ready(Ok(Event::BadRequest(error))),
                }
                continue;
            }
            if self.client.eof {
                self.upload = Upload::CutOff;
                continue;
            }
            if self.flush_server && self.server.poll_flush(cx)?.is_ready() {
                self.flush_server = false;
            }
            match ready!(self.client.poll_fill(cx, self.request.expected())) {
                Ok(_) => {}
                Err(error) => return Poll::Ready(Ok(Event::ClientGone(error))),
            }
        }
    }

    /// Keeps what was sent for another try, as long as it is within the limit.
    fn keep(&mut self, n: usize) {
        let Some(limit) = self.replay else { return };
        if self.out.len() + n > limit {
            self.replay = None;
            self.out.clear();
            self.sent = 0;
        } else {
            self.out.extend_from_slice(&self.client.buf[..n]);
            self.sent = self.out.len();
        }
    }

    /// The request is sent: pipelined bytes are read ahead, and the client's half-close is passed
    /// on, so that the server sees what it would see without a proxy.
    fn poll_client_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Event>> {
        while !self.client.eof {
            if self.client.buf.len() >= READ_AHEAD {
                return Poll::Pending;
            }
            match ready!(self.client.poll_fill(cx, 1)) {
                Ok(_) => {}
                Err(error) => return Poll::Ready(Ok(Event::ClientGone(error))),
            }
        }
        // What stands in the buffer is the next request: the client has not said everything yet.
        if !self.half_closed && self.client.buf.is_empty() {
            ready!(self.server.poll_shutdown(cx))?;
            self.half_closed = true;
        }
        Poll::Pending
    }

    /// Whether the server's direction is still open for another request.
    pub fn server_open(&self) -> bool {
        self.upload == Upload::Finished && !self.half_closed && !self.server.eof
    }

    fn poll_download(
        &mut self,
        cx: &mut Context<'_>,
        head: &mut Head,
        method: &[u8],
    ) -> Poll<Event> {
        loop {
            if self.given < self.to_client.len() {
                match ready!(self.client.poll_write(cx, &self.to_client[self.given..])) {
                    Ok(n) => {
                        self.given += n;
                        self.progress += n as u64;
                        self.flush_client = true;
                    }
                    Err(error) => return Poll::Ready(Event::ClientGone(error)),
                }
                continue;
            }
            if self.given > 0 {
                self.to_client.clear();
                self.given = 0;
            }
            let Some(response) = &mut self.response else {
                return self.poll_response_head(cx, head, method);
            };
            if self.response_ready > 0 {
                let bytes = &self.server.buf[..self.response_ready];
                match ready!(self.client.poll_write(cx, bytes)) {
                    Ok(n) => {
                        self.server.buf.advance(n);
                        self.response_ready -= n;
                        self.body_received += n as u64;
                        self.progress += n as u64;
                        self.flush_client = true;
                    }
                    Err(error) => return Poll::Ready(Event::ClientGone(error)),
                }
                continue;
            }
            if response.is_done() {
                if self.flush_client {
                    match ready!(self.client.poll_flush(cx)) {
                        Ok(()) => self.flush_client = false,
                        Err(error) => return Poll::Ready(Event::ClientGone(error)),
                    }
                }
                return Poll::Ready(Event::Done);
            }
            if !self.server.buf.is_empty() {
                match response.advance(&self.server.buf) {
                    Ok(n) => self.response_ready = n,
                    Err(error) => return Poll::Ready(Event::BadBody(error)),
                }
                continue;
            }
            if self.flush_client {
                match self.client.poll_flush(cx) {
                    Poll::Ready(Ok(())) => self.flush_client = false,
                    Poll::Ready(Err(error)) => return Poll::Ready(Event::ClientGone(error)),
                    Poll::Pending => {}
                }
            }
            match ready!(self.server.poll_fill(cx, response.expected())) {
                Ok(0) if *response == BodyReader::UntilClose => *response = BodyReader::Done,
                Ok(0) => return Poll::Ready(Event::Truncated),
                Ok(_) => {}
                Err(error) => return Poll::Ready(Event::Cut(error)),
            }
        }
    }

    fn poll_response_head(
        &mut self,
        cx: &mut Context<'_>,
        head: &mut Head,
        method: &[u8],
    ) -> Poll<Event> {
        loop {
            if self.is_word() {
                // Its end tells what it means.
            } else if !self.server.buf.is_empty() {
                self.heard = true;
                let seen = std::mem::replace(&mut self.head_seen, self.server.buf.len());
                let parsed = match head::may_be_complete(&self.server.buf, seen) {
                    true => head::parse_response(&self.server.buf, method, head),
                    false => Ok(Parsed::Partial),
                };
                match parsed {
                    Ok(Parsed::Complete) => {
                        self.head_seen = 0;
                        return Poll::Ready(Event::Head);
                    }
                    Ok(Parsed::Partial) if self.server.buf.len() > MAX_HEAD => {
                        return Poll::Ready(Event::BadResponse(HeadError::TooManyFields));
                    }
                    Ok(Parsed::Partial) => {}
                    Err(HeadError::Syntax(error))
                        if is_status_line(error) || !begins_like_http(&self.server.buf) =>
                    {
                        return Poll::Ready(Event::NotHttp);
                    }
                    Err(error) => return Poll::Ready(Event::BadResponse(error)),
                }
            }
            if self.flush_client {
                match self.client.poll_flush(cx) {
                    Poll::Ready(Ok(())) => self.flush_client = false,
                    Poll::Ready(Err(error)) => return Poll::Ready(Event::ClientGone(error)),
                    Poll::Pending => {}
                }
            }
            match ready!(self.server.poll_fill(cx, 0)) {
                Ok(0) => return Poll::Ready(Event::ServerClosed),
                Ok(n) => self.progress += n as u64,
                Err(error) => return Poll::Ready(Event::ServerReset(error)),
            }
        }
    }

    /// A proxy says something about the connection, not about the request.
    fn is_word(&self) -> bool {
        matches!(self.server.buf[..], [kept::CLOSED..=kept::UNREACHABLE])
            && self.server.io.is_mesh()
    }

    /// The final head goes to the client with the body bytes that are here already, in one write.
    /// `at` is where the head ends in the server's buffer; `to_client` holds the edited head.
    pub fn respond(&mut self, at: usize, mut body: BodyReader) -> Result<(), FramingError> {
        self.server.buf.advance(at);
        let n = body.advance(&self.server.buf)?;
        self.to_client.extend_from_slice(&self.server.buf[..n]);
        self.server.buf.advance(n);
        self.body_received += n as u64;
        self.response = Some(body);
        Ok(())
    }

    /// The connections belong to each other from now on: what of the request has not been written
    /// goes before everything else that the client says.
    pub fn give_back_unsent(&mut self) {
        let unsent = &self.out[self.sent..];
        if !unsent.is_empty() {
            let mut buf = BytesMut::with_capacity(unsent.len() + self.client.buf.len());
            buf.extend_from_slice(unsent);
            buf.extend_from_slice(&self.client.buf);
            self.client.buf = buf;
        }
    }

    /// Writes out what stands in `to_client`.
    pub fn poll_give(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.given < self.to_client.len() {
            let n = ready!(self.client.poll_write(cx, &self.to_client[self.given..]))?;
            self.given += n;
        }
        self.to_client.clear();
        self.given = 0;
        self.client.poll_flush(cx)
    }

    /// After the response: sends the rest of the request's body; ready when it is sent or the
    /// server takes no more.
    pub fn poll_rest(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        if let Poll::Ready(event) = self.poll_upload(cx) {
            return Poll::Ready(Some(event));
        }
        match self.upload {
            Upload::Open => {
                // A server that is done closes; its end is all that can still come.
                match self.server.poll_fill(cx, 0) {
                    Poll::Ready(Ok(0) | Err(_)) => {
                        self.upload = Upload::Broken;
                        Poll::Ready(None)
                    }
                    _ => Poll::Pending,
                }
            }
            _ => Poll::Ready(None),
        }
    }
}

/// Whether what is wrong is the version or the status: another protocol's, or another version's.
fn is_status_line(error: httparse::Error) -> bool {
    matches!(error, httparse::Error::Version | httparse::Error::Status)
}

/// Whether a response begins as one of HTTP/1 does (RFC 9112 section 4), as far as it is here.
fn begins_like_http(said: &[u8]) -> bool {
    let begin = said.iter().position(|byte| !b"\r\n".contains(byte));
    let said = &said[begin.unwrap_or(said.len())..];
    said.iter().zip(b"HTTP/").all(|(a, b)| a == b)
}
