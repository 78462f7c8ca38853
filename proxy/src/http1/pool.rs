//! Idle server connections of one endpoint, kept by one worker.

use std::cell::RefCell;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::conn::Conn;
use crate::balance::ConnectionPermit;
use crate::tables::ConnectionPolicy;

/// How long a connection to an application stays idle: shorter than the keep-alive of common
/// servers (Node and uvicorn close after 5 s), so that they seldom close under a request.
pub const APP_IDLE: Duration = Duration::from_secs(4);
/// How long a connection to another proxy stays idle. Its closing is announced, so this saves
/// handshakes at no risk.
pub const MESH_IDLE: Duration = Duration::from_secs(60);
/// Idle connections of one endpoint at most, a worker.
const MAX_IDLE: usize = 1024;

/// How long a connection stays idle.
pub fn how_long(conn: &Conn, policy: &ConnectionPolicy) -> Duration {
    let usual = if conn.io.is_mesh() {
        MESH_IDLE
    } else {
        APP_IDLE
    };
    policy.idle_timeout.unwrap_or(usual)
}

/// Last used first.
#[derive(Debug, Default)]
pub struct Pool {
    idle: RefCell<Vec<Idle>>,
}

#[derive(Debug)]
struct Idle {
    conn: Conn,
    permit: ConnectionPermit,
    until: Instant,
}

impl Pool {
    /// A connection that is idle and alive as far as can be seen without a system call.
    pub fn take(&self, now: Instant) -> Option<(Conn, ConnectionPermit)> {
        loop {
            let mut idle = self.idle.borrow_mut().pop()?;
            if idle.until > now && is_quiet(&mut idle.conn) {
                return Some((idle.conn, idle.permit));
            }
        }
    }

    /// Keeps a connection for `how_long`.
    pub fn put(&self, mut conn: Conn, permit: ConnectionPermit, now: Instant, how_long: Duration) {
        conn.release();
        let mut idle = self.idle.borrow_mut();
        if idle.len() < MAX_IDLE && conn.buf.is_empty() && !conn.eof {
            let until = now + how_long;
            idle.push(Idle {
                conn,
                permit,
                until,
            });
        }
    }

    /// Closes what has been idle for too long or was closed by the server.
    pub fn sweep(&self, now: Instant) {
        self.idle
            .borrow_mut()
            .retain_mut(|idle| idle.until > now && is_quiet(&mut idle.conn));
    }

    /// Closes everything.
    pub fn clear(&self) {
        self.idle.borrow_mut().clear();
    }

    pub fn len(&self) -> usize {
        self.idle.borrow().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Whether nothing has come from the server: neither bytes nor the end.
pub fn is_quiet(conn: &mut Conn) -> bool {
    let mut cx = Context::from_waker(Waker::noop());
    conn.buf.is_empty() && matches!(conn.poll_fill(&mut cx, 0), Poll::Pending)
}

/// Whether the server has not closed a moment ago: asks the kernel. For requests that must not be
/// sent twice.
pub fn is_alive(conn: &Conn) -> bool {
    // On a shared connection the end that may be on its way says that nothing was processed.
    let Some(tcp) = conn.io.tcp() else {
        return true;
    };
    let mut byte = [std::mem::MaybeUninit::uninit()];
    let socket = socket2::SockRef::from(tcp);
    match socket.peek(&mut byte) {
        Ok(0) => false,
        // Bytes of TLS (a ticket, an alert) are told apart by reading, which `is_quiet` does.
        Ok(_) => !matches!(conn.io, crate::transport::Io::Plain(_)),
        Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
    }
}
