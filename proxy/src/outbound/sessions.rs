//! Connections to other proxies that a worker's streams share.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::timeout;
use weft_api::identity::SpiffeId;

use crate::hashing::TableMap;
use crate::identity::Alpn;
use crate::transport::mux::{Driver, Inside, MuxStream, Session};
use crate::transport::{ConnectError, Io, Stream};

/// How long a shared connection stays without a stream: a handshake is saved at no risk.
const IDLE: Duration = Duration::from_secs(60);

/// How long a peer's host may acknowledge nothing before it is taken for gone: its streams cannot
/// tell that from a slow answer. Long enough for a network that finds another way.
const GONE: Duration = Duration::from_secs(15);

/// Address, and who must be there.
type Peer = (SocketAddr, Arc<SpiffeId>);

/// Shared connections, by peer.
#[derive(Debug, Default)]
pub struct Sessions {
    peers: RefCell<TableMap<Peer, OfPeer>>,
}

#[derive(Debug, Default)]
struct OfPeer {
    /// Oldest first; those that take no more streams, too, until they have ended.
    sessions: Vec<Opened>,
    /// How often there was none to be shared in the end.
    failures: u64,
    /// One is being opened; told when it is there, or is not.
    opening: Option<Rc<Notify>>,
}

#[derive(Debug)]
struct Opened {
    session: Session,
    /// Of the credentials that it was opened with.
    generation: u64,
    driving: JoinHandle<()>,
    /// Since when nothing is acknowledged.
    stalled: Option<Instant>,
}

/// Takes back that a connection is being opened, however that ends.
struct Opening<'a> {
    sessions: &'a Sessions,
    peer: &'a Peer,
    notify: Rc<Notify>,
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        if let Some(of_peer) = self.sessions.peers.borrow_mut().get_mut(self.peer) {
            of_peer.opening = None;
        }
        self.notify.notify_waiters();
    }
}

impl Sessions {
    /// A stream to `peer`, on a connection that was opened with credentials of `generation`;
    /// `connect` opens one, mutual TLS and all, when there is none. One that the peer does not
    /// share is the caller's alone.
    ///
    /// # Errors
    /// Those of `connect`. Who waits while another opens a connection waits no longer than
    /// `patience`, its own attempt included if that one fails.
    pub async fn stream(
        &self,
        peer: Peer,
        generation: u64,
        inside: Inside,
        patience: Duration,
        connect: impl Future<Output = Result<Stream, ConnectError>>,
    ) -> Result<Stream, ConnectError> {
        let began = tokio::time::Instant::now();
        let impatient = || ConnectError::TimedOut {
            addr: peer.0,
            after: patience,
        };
        let mut failures = None;
        let opening = loop {
            if let Some(stream) = self.share(&peer, generation, inside) {
                return Ok(Io::Shared(stream).into());
            }
            let under_way = {
                let mut peers = self.peers.borrow_mut();
                let of_peer = peers.entry(peer.clone()).or_default();
                // What was waited for has failed, or is not shared: each opens its own.
                if failures.is_some_and(|before| before != of_peer.failures) {
                    break None;
                }
                match &of_peer.opening {
                    Some(notify) => {
                        failures = Some(of_peer.failures);
                        notify.clone()
                    }
                    None => {
                        let notify = Rc::new(Notify::new());
                        of_peer.opening = Some(notify.clone());
                        break Some(Opening {
                            sessions: self,
                            peer: &peer,
                            notify,
                        });
                    }
                }
            };
            let left = patience.saturating_sub(began.elapsed());
            timeout(left, under_way.notified())
                .await
                .map_err(|_| impatient())?;
        };
        let connected = match opening {
            Some(_) => connect.await,
            None => {
                let left = patience.saturating_sub(began.elapsed());
                timeout(left, connect).await.map_err(|_| impatient())?
            }
        };
        let mut peers = self.peers.borrow_mut();
        let of_peer = peers.entry(peer.clone()).or_default();
        let stream = match connected {
            Ok(stream) if alpn(&stream.io) == Some(Alpn::Mux) => stream,
            not_shared => {
                of_peer.failures += 1;
                drop(peers);
                return not_shared;
            }
        };
        let (session, driver) = Driver::client(stream.io);
        let opened = session.open(inside);
        let address = peer.0;
        let driving = spawn_local(async move {
            if let Err(error) = driver.run(|_, _| {}).await {
                tracing::debug!(peer = %address, "a shared connection ended: {error}");
            }
        });
        of_peer.sessions.push(Opened {
            session,
            generation,
            driving,
            stalled: None,
        });
        drop(peers);
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
        let peers = self.peers.borrow();
        let mut found = None;
        for opened in &peers.get(peer)?.sessions {
            if opened.generation < generation {
                // The certificate or the roots have been replaced: who is there is looked at again.
                opened.session.leave();
            } else if found.is_none() {
                found = opened.session.open(inside);
            }
        }
        found
    }

    /// Closes what has been idle for too long, gives up what has no peer any more, and forgets what
    /// has ended.
    pub fn sweep(&self, now: Instant) {
        self.peers.borrow_mut().retain(|_, of_peer| {
            for opened in &mut of_peer.sessions {
                let idle = opened.session.idle_since();
                if idle.is_some_and(|since| now.saturating_duration_since(since) >= IDLE) {
                    opened.session.leave();
                }
                if !opened.session.is_stalled() {
                    opened.stalled = None;
                } else if now.saturating_duration_since(*opened.stalled.get_or_insert(now)) >= GONE
                {
                    opened.session.give_up();
                }
            }
            of_peer
                .sessions
                .retain(|opened| !opened.driving.is_finished());
            of_peer.opening.is_some() || !of_peer.sessions.is_empty()
        });
    }

    /// Closes all, and waits until peers have what their streams have written.
    pub async fn end(&self) {
        let peers = self.peers.take();
        let all: Vec<_> = peers
            .into_values()
            .flat_map(|of_peer| of_peer.sessions)
            .collect();
        for opened in &all {
            opened.session.leave();
        }
        for opened in all {
            let _ = opened.driving.await;
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
