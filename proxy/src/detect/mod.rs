//! What a connection is when nobody has declared it: whoever speaks first decides.
//!
//! - [`mod@sniff`]: what the first bytes are; decided as soon as they cannot be anything else, so
//!   that a first message of one byte passes at once
//! - [`client_hello`]: SNI and ALPN of a TLS client
//! - [`detect`]: the two with time and the server in it
//!
//! | the client | then |
//! |---|---|
//! | speaks, and it is clear what | that; HTTP is opaque where [`Timings::http`] says so |
//! | says nothing for [`Timings::silence`] | the server's connection is opened |
//! | … and the server speaks, or ends | opaque, over that connection |
//! | … and the client speaks TLS | that, and the connection goes with it |
//! | … and the client speaks HTTP | that; the connection is given back |
//! | … and it speaks something else | opaque, over that connection |
//! | begins something plausible and stalls for [`Timings::undecided`] | opaque |
//! | ends or half-closes | opaque: the server is told, and may answer |
//! | resets | reset |

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::AsyncRead;
use tokio::time::{Instant, timeout_at};

use crate::transport::Stream;
use crate::transport::scratch::poll_read_buf;

mod hello;
mod sniff;
#[cfg(test)]
mod tests;

pub use hello::{ClientHello, MAX_HELLO, NotTls, client_hello};
use sniff::may_be_tls;
pub use sniff::{HTTP2_PREFACE, MAX_REQUEST_LINE, Sniff, sniff};

/// A client that has said nothing for this long may be waiting for the server to speak. Long
/// enough for a client that connects and then makes its request up; short enough not to be felt
/// by a person behind a server-first protocol.
pub const SILENCE: Duration = Duration::from_millis(50);
/// How long bytes that could become HTTP may take to do so: a lost packet is sent again within
/// 200 ms on a network where that matters.
pub const UNDECIDED: Duration = Duration::from_millis(250);
/// How long a ClientHello that has begun may take. Nothing else begins like one, and a peer of the
/// mesh taken for an opaque client would be refused.
pub const HELLO: Duration = Duration::from_secs(10);

/// How long [`detect`] waits for what, and what for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timings {
    /// See [`SILENCE`].
    pub silence: Duration,
    /// See [`UNDECIDED`].
    pub undecided: Duration,
    /// See [`HELLO`].
    pub hello: Duration,
    /// Whether HTTP is looked for. Where it is not, only bytes that begin like TLS are waited for.
    pub http: bool,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            silence: SILENCE,
            undecided: UNDECIDED,
            hello: HELLO,
            http: true,
        }
    }
}

/// What a connection is. `buf` is what was read from the client so far, and comes first.
#[derive(Debug)]
pub enum Detected<U = Stream> {
    /// A whole request line at least; the rest of the head may still be missing.
    Http1 { buf: BytesMut },
    /// The whole preface at least.
    Http2 { buf: BytesMut },
    /// A whole ClientHello at least; `upstream` is the server's connection if it was opened already.
    Tls {
        buf: BytesMut,
        hello: ClientHello,
        upstream: Option<U>,
    },
    /// Bytes to be copied; `upstream` is the server's connection if it was opened already.
    Opaque { buf: BytesMut, upstream: Option<U> },
    /// The client has reset the connection: `buf` and then a reset are what the server is to see.
    Reset { buf: BytesMut, upstream: Option<U> },
}

/// Finds out what a connection is.
///
/// `buf` holds what was read before, if anything. `open` opens the connection to the server as
/// opaque TCP; it is called at most once, and only for a client that says nothing. What it gives
/// may carry more than the stream (the endpoint chosen, its permit).
///
/// Unfinished, it holds no buffer for a connection on which nobody speaks.
///
/// # Errors
/// Those of `open`.
pub async fn detect<C, U, E, F, Fut>(
    client: &mut C,
    mut buf: BytesMut,
    timings: &Timings,
    open: F,
) -> Result<Detected<U>, E>
where
    C: AsyncRead + Unpin,
    U: AsMut<Stream> + Into<Stream>,
    F: FnOnce() -> Fut,
    Fut: Future<Output = Result<U, E>>,
{
    let begin = Instant::now();
    let mut spoke = (!buf.is_empty()).then_some(begin);
    let mut server = Server::Unopened(open);
    loop {
        let patience = match verdict(&buf, timings.http) {
            Verdict::Http1 => {
                server.give_back();
                return Ok(Detected::Http1 { buf });
            }
            Verdict::Http2 => {
                server.give_back();
                return Ok(Detected::Http2 { buf });
            }
            Verdict::Tls(hello) => {
                // One that is on its way may lead nowhere, and the name elsewhere.
                let upstream = server.opened();
                return Ok(Detected::Tls {
                    buf,
                    hello,
                    upstream,
                });
            }
            Verdict::Opaque => break,
            Verdict::MoreHello => timings.hello,
            Verdict::More => timings.undecided,
        };
        let deadline = match (spoke, &server) {
            (Some(at), _) => Some(at + patience),
            (None, Server::Unopened(_)) => Some(begin + timings.silence),
            // Both are silent; they may be for hours.
            (None, _) => None,
        };
        let event = poll_fn(|cx| {
            if let Poll::Ready(read) = poll_read_buf(client, cx, &mut buf) {
                return Poll::Ready(Event::Client(read));
            }
            server.poll(cx)
        });
        let event = match deadline {
            None => event.await,
            Some(at) => timeout_at(at, event).await.unwrap_or(Event::Late),
        };
        match event {
            Event::Client(Ok(0)) | Event::ServerSpoke => break,
            Event::Client(Ok(_)) => spoke = spoke.or_else(|| Some(Instant::now())),
            Event::Client(Err(_)) => {
                let upstream = server.opened();
                return Ok(Detected::Reset { buf, upstream });
            }
            Event::Opened(upstream) => server = Server::Open(upstream?),
            Event::Late if spoke.is_some() => break,
            Event::Late => {
                buf = BytesMut::new();
                server = server.begin();
            }
        }
    }
    let upstream = match server {
        Server::Unopened(_) | Server::Opening(None) => None,
        Server::Opening(Some(opening)) => Some(opening.await?),
        Server::Open(upstream) => Some(upstream),
    };
    Ok(Detected::Opaque { buf, upstream })
}

enum Event<U, E> {
    Client(io::Result<usize>),
    Opened(Result<U, E>),
    ServerSpoke,
    Late,
}

/// The connection to the server, while it is not known whether it will be used.
enum Server<F, Fut, U> {
    Unopened(F),
    /// Boxed, because most clients speak at once. `None` once it has ended.
    Opening(Option<Pin<Box<Fut>>>),
    Open(U),
}

impl<U, E, F, Fut> Server<F, Fut, U>
where
    U: AsMut<Stream> + Into<Stream>,
    F: FnOnce() -> Fut,
    Fut: Future<Output = Result<U, E>>,
{
    fn begin(self) -> Self {
        match self {
            Self::Unopened(open) => Self::Opening(Some(Box::pin(open()))),
            begun => begun,
        }
    }

    /// It will not be used.
    fn give_back(self) {
        if let Some(upstream) = self.opened() {
            upstream.into().io.leave();
        }
    }

    fn opened(self) -> Option<U> {
        match self {
            Self::Open(upstream) => Some(upstream),
            Self::Unopened(_) | Self::Opening(_) => None,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Event<U, E>> {
        match self {
            Self::Unopened(_) | Self::Opening(None) => Poll::Pending,
            Self::Opening(slot @ Some(_)) => {
                let opened = match slot {
                    Some(opening) => opening.as_mut().poll(cx),
                    None => Poll::Pending,
                };
                if opened.is_ready() {
                    *slot = None;
                }
                opened.map(Event::Opened)
            }
            Self::Open(upstream) => upstream
                .as_mut()
                .poll_spoken(cx)
                .map(|()| Event::ServerSpoke),
        }
    }
}

enum Verdict {
    Http1,
    Http2,
    Tls(ClientHello),
    Opaque,
    More,
    MoreHello,
}

fn verdict(bytes: &[u8], http: bool) -> Verdict {
    match sniff(bytes) {
        Sniff::NeedMore | Sniff::Http1 | Sniff::Http2 if !http && !may_be_tls(bytes) => {
            Verdict::Opaque
        }
        Sniff::NeedMore => Verdict::More,
        Sniff::Http1 => Verdict::Http1,
        Sniff::Http2 => Verdict::Http2,
        Sniff::Opaque => Verdict::Opaque,
        Sniff::Tls => match client_hello(bytes) {
            Ok(Some(hello)) => Verdict::Tls(hello),
            // A ClientHello in many tiny records is no client's.
            Ok(None) if bytes.len() < 2 * MAX_HELLO => Verdict::MoreHello,
            Ok(None) | Err(NotTls) => Verdict::Opaque,
        },
    }
}
