//! Connections to other proxies that a worker's streams share.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use weft_api::identity::SpiffeId;

use crate::hashing::TableMap;
use crate::identity::Alpn;
use crate::transport::mux::{Driver, Inside, MuxStream, Session};
use crate::transport::{ConnectError, Io, Stream};

/// How long a shared connection stays without a stream: a handshake is saved at no risk.
const IDLE: Duration = Duration::from_secs(60);
/// How often a worker that ends looks whether everything has been sent, and for how long.
const FLUSH_POLL: Duration = Duration::from_millis(2);
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// Address, and who must be there.
type Peer = (SocketAddr, Arc<SpiffeId>);

/// Shared connections, by peer.
#[derive(Debug, Default)]
pub struct Sessions {
    peers: RefCell<TableMap<Peer, Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    /// With the generation of the credentials that it was opened with. Newest last.
    sessions: Vec<(Session, u64)>,
    /// How many have been opened.
    opened: u64,
    /// One is being opened; told when it is there, or is not.
    opening: Option<Rc<Notify>>,
}

/// Takes back that a connection is being opened, however that ends.
struct Opening<'a> {
    sessions: &'a Sessions,
    peer: &'a Peer,
    notify: Rc<Notify>,
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        if let Some(shared) = self.sessions.peers.borrow_mut().get_mut(self.peer) {
            shared.opening = None;
        }
        self.notify.notify_waiters();
    }
}

impl Sessions {
    /// A stream to `peer`. Only what was opened with credentials of `generation` is shared; `connect` opens a connection to it, mutual TLS and all, when there is
    /// none to share. One that the peer does not share is the caller's alone.
    ///
    /// # Errors
    /// Those of `connect`.
    pub async fn stream(
        &self,
        peer: Peer,
        generation: u64,
        inside: Inside,
        connect: impl Future<Output = Result<Stream, ConnectError>>,
    ) -> Result<Stream, ConnectError> {
        let mut seen = None;
        let opening = loop {
            if let Some(stream) = self.share(&peer, generation, inside) {
                return Ok(Io::Shared(stream).into());
            }
            let (under_way, opened) = {
                let mut peers = self.peers.borrow_mut();
                let shared = peers.entry(peer.clone()).or_default();
                match &shared.opening {
                    Some(notify) => (notify.clone(), shared.opened),
                    None if seen == Some(shared.opened) => break None,
                    None => {
                        let notify = Rc::new(Notify::new());
                        shared.opening = Some(notify.clone());
                        break Some(Opening {
                            sessions: self,
                            peer: &peer,
                            notify,
                        });
                    }
                }
            };
            // The one that was waited for has failed, or is not shared: each opens its own.
            if seen == Some(opened) {
                break None;
            }
            seen = Some(opened);
            under_way.notified().await;
        };
        let stream = connect.await?;
        if alpn(&stream.io) != Some(Alpn::Mux) {
            return Ok(stream);
        }
        let (session, driver) = Driver::client(stream.io);
        let opened = session.open(inside);
        let address = peer.0;
        tokio::task::spawn_local(async move {
            if let Err(error) = driver.run(|_, _| {}).await {
                tracing::debug!(peer = %address, "a shared connection ended: {error}");
            }
        });
        let mut peers = self.peers.borrow_mut();
        let shared = peers.entry(peer.clone()).or_default();
        shared.sessions.push((session, generation));
        shared.opened += 1;
        drop(peers);
        drop(opening);
        // A session that has just begun takes a stream.
        opened
            .map(|stream| Io::Shared(stream).into())
            .ok_or_else(|| ConnectError::Local {
                addr: address,
                source: std::io::Error::other("the shared connection takes no stream"),
            })
    }

    /// A stream on a connection that is there.
    fn share(&self, peer: &Peer, generation: u64, inside: Inside) -> Option<MuxStream> {
        let mut peers = self.peers.borrow_mut();
        let shared = peers.get_mut(peer)?;
        shared.sessions.retain(|(session, of)| {
            // The certificate or the roots have been replaced: who is there is looked at again.
            if *of != generation {
                session.leave();
            }
            session.is_usable()
        });
        let mut sessions = shared.sessions.iter();
        sessions.find_map(|(session, _)| session.open(inside))
    }

    /// Closes what has been idle for too long, and forgets what has ended.
    pub fn sweep(&self, now: Instant) {
        self.peers.borrow_mut().retain(|_, shared| {
            shared.sessions.retain(|(session, _)| {
                let idle = session.idle_since();
                if idle.is_some_and(|since| now.saturating_duration_since(since) >= IDLE) {
                    session.leave();
                }
                session.is_usable()
            });
            shared.opening.is_some() || !shared.sessions.is_empty()
        });
    }

    /// Until what streams have written is with the kernel, for a worker that ends.
    pub async fn flushed(&self) {
        let began = Instant::now();
        let waiting = || {
            let peers = self.peers.borrow();
            let mut sessions = peers.values().flat_map(|shared| &shared.sessions);
            sessions.any(|(session, _)| !session.is_flushed())
        };
        while waiting() && began.elapsed() < FLUSH_LIMIT {
            tokio::time::sleep(FLUSH_POLL).await;
        }
    }
}

/// What the handshake has agreed on.
fn alpn(io: &Io) -> Option<Alpn> {
    match io {
        Io::Client(tls) => tls.get_ref().1.alpn_protocol().and_then(Alpn::from_wire),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
