//! The server connection that an idle client keeps to itself.
//!
//! Where a destination is one endpoint there is nothing to balance, and the two connections stay
//! together between requests, as if there were no proxy: a server that closes an idle connection
//! closes the client's, what an application knows of a connection stays with its client, and a
//! client that leaves frees its server's connection. Between proxies, where a connection is worth
//! a handshake, the connection outlives the client in the pool, and a byte that can begin no
//! message of HTTP/1 says what happened:
//!
//! | byte | direction | says |
//! |---|---|---|
//! | [`LEFT`] | to the server | the client has gone: close its connection to the application |
//! | [`CLOSED`] | to the client | the application has closed the idle connection |
//! | [`CLOSED_BY_RESET`] | to the client | the same, by a reset |
//! | [`UNANSWERED`] | to the client | the application has closed it instead of answering |
//! | [`UNREACHABLE`] | to the client | the application takes no connection: the request was not processed |
//!
//! An end without such a byte is the other proxy's own: what was sent was not processed.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Instant;

use tokio::io::AsyncWrite;

use super::conn::Conn;
use super::pool::{self, MESH_IDLE};
use crate::balance::{ConnectionPermit, Endpoint};
use crate::worker::Pools;

/// The client has gone.
pub const LEFT: u8 = 0;
/// The application has closed the idle connection.
pub const CLOSED: u8 = 1;
/// The application has reset the idle connection.
pub const CLOSED_BY_RESET: u8 = 2;
/// The application has closed the connection instead of answering.
pub const UNANSWERED: u8 = 3;
/// The application takes no connection: the request was not processed.
pub const UNREACHABLE: u8 = 4;

/// A connection to a server, idle, and its client's alone.
#[derive(Debug)]
pub struct Kept {
    pub conn: Conn,
    pub permit: ConnectionPermit,
    pub endpoint: Rc<Endpoint<Pools>>,
    /// When it has been idle for as long as the policy allows.
    pub until: Option<Instant>,
}

/// What happened to it while it was idle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Happened {
    /// The application closed it.
    Closed,
    /// The application reset it.
    Reset,
    /// The application said something nobody had asked for; it is in the buffer.
    Spoke,
    /// The other proxy closed it: of no concern to the client.
    Gone,
}

impl Kept {
    /// Ready when something has happened to the connection.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Happened> {
        let application = !self.conn.io.is_mesh();
        if let Some(happened) = said(&self.conn) {
            return Poll::Ready(happened);
        }
        Poll::Ready(match ready!(self.conn.poll_fill(cx, 0)) {
            Ok(0) if application => Happened::Closed,
            // Many servers end TLS without saying so; between messages nothing is lost by it.
            Err(error) if application && error.kind() == io::ErrorKind::UnexpectedEof => {
                Happened::Closed
            }
            Err(_) if application => Happened::Reset,
            Ok(0) | Err(_) => Happened::Gone,
            Ok(_) if application => Happened::Spoke,
            Ok(_) => said(&self.conn).unwrap_or(Happened::Spoke),
        })
    }

    /// Whether it has been idle for too long.
    pub fn is_over(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() >= until)
    }

    /// Whether it can carry a request of a client that picked `endpoint`. A `careful` one must not
    /// be sent twice.
    pub fn fits(&mut self, endpoint: &Rc<Endpoint<Pools>>, careful: bool) -> bool {
        Rc::ptr_eq(&self.endpoint, endpoint)
            && pool::is_quiet(&mut self.conn)
            && (!careful || pool::is_alive(&self.conn))
    }

    /// The client has gone, or goes elsewhere. A connection to an application is closed, one to a
    /// proxy kept for others.
    pub fn release(mut self, now: Instant) {
        if !self.conn.io.is_mesh() || !pool::is_quiet(&mut self.conn) {
            return;
        }
        if tell(&mut self.conn, LEFT).is_ok() {
            let pool = &self.endpoint.pool.http1;
            pool.put(self.conn, self.permit, now, MESH_IDLE);
        }
    }
}

/// What a proxy has said of its application's connection, once the response before it has been taken:
/// it may have come with the response.
pub fn said(conn: &Conn) -> Option<Happened> {
    if !conn.io.is_mesh() {
        return None;
    }
    match conn.buf.first() {
        Some(&CLOSED) => Some(Happened::Closed),
        Some(&CLOSED_BY_RESET) => Some(Happened::Reset),
        _ => None,
    }
}

/// Says `byte` on an idle connection to a proxy; a connection that does not take one byte is of no
/// use to anybody.
fn tell(conn: &mut Conn, byte: u8) -> io::Result<()> {
    let mut cx = Context::from_waker(Waker::noop());
    match Pin::new(&mut conn.io).poll_write(&mut cx, &[byte]) {
        Poll::Ready(Ok(1)) => {}
        Poll::Ready(Err(error)) => return Err(error),
        _ => return Err(io::ErrorKind::WouldBlock.into()),
    }
    match Pin::new(&mut conn.io).poll_flush(&mut cx) {
        Poll::Ready(flushed) => flushed,
        Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
    }
}
