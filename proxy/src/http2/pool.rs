//! HTTP/2 connections to one endpoint, kept by one worker; each is shared by many streams.
//!
//! A stream takes a `Lease` of a connection that has room. Without one a connection is opened,
//! by a task of its own, once for all who wait. A connection that is going away (GOAWAY, lost, out
//! of stream numbers) takes no new streams; those it has keep it until they end. One that has
//! carried as many as the policy wants (it is worn) takes no more, either, unless no other can be
//! opened in its place.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Ping, PingPong, SendStream};
use http::Request;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::{MAX_HEADER_LIST, REMEMBERED_RESETS, SEND_BUFFER};
use crate::balance::{Balancer, ConnectionPermit, LimitReached};
use crate::http1::pool::MESH_IDLE;
use crate::identity::Alpn;
use crate::outbound::connect::connect;
use crate::tables::{Backend, ConnectionPolicy, EndpointInfo};
use crate::transport::ConnectError;
use crate::worker::{Pools, Worker};

/// Streams we put on one connection: what RFC 9113 section 6.5.2 advises servers to allow at
/// least, and few enough that a lost packet or a full window holds up a limited crowd.
const MAX_STREAMS: usize = 100;
/// How long a connection stays without a stream. Its closing is announced by GOAWAY on either
/// side, so there is no need to be quicker than the server.
const IDLE: Duration = MESH_IDLE;
/// How long a new connection may take to tell its settings to those who need to know them.
const SETTINGS_WAIT: Duration = Duration::from_millis(500);
/// Without a response for this long, while streams wait, the other proxy is asked for a sign of
/// life: a path that swallows packets would hold up every stream that is put on the connection.
/// Applications are not asked: gRPC servers close a connection that pings them often.
const QUIET: Duration = Duration::from_secs(15);
/// How long the sign of life may take.
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// Connections to one endpoint.
#[derive(Debug, Default)]
pub struct Pool {
    inner: Rc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// In order of age: the first with room is taken, so that others can become idle.
    connections: RefCell<Vec<Rc<Connection>>>,
    opening: RefCell<Option<Rc<Opening>>>,
    /// Streams that wait for room because no more connections are allowed.
    waiting: Cell<usize>,
    /// Worn connections that are being closed: their permits come back.
    closing: Cell<usize>,
    room: Notify,
}

/// A connection that is being opened.
#[derive(Debug, Default)]
struct Opening {
    ended: Cell<bool>,
    error: RefCell<Option<Rc<ConnectError>>>,
    done: Notify,
}

#[derive(Debug)]
struct Connection {
    sender: SendRequest<Bytes>,
    active: Cell<usize>,
    /// Streams that it has carried.
    carried: Cell<u32>,
    policy: ConnectionPolicy,
    /// Takes no new streams.
    retired: Cell<bool>,
    /// It was worn, and is being closed.
    closing: Rc<Cell<bool>>,
    opened: Instant,
    /// When its last stream ended.
    used: Cell<Instant>,
    /// When a response last came.
    heard: Cell<Option<Instant>>,
    /// Away while a ping is on its way. Another proxy is at the other end if there is one.
    ping: RefCell<Option<PingPong>>,
    mesh: bool,
    driver: RefCell<Option<AbortHandle>>,
}

/// Room for one stream on a connection.
#[derive(Debug)]
pub(super) struct Lease {
    sender: SendRequest<Bytes>,
    connection: Rc<Connection>,
    pool: Rc<Inner>,
}

/// Why there is no connection.
#[derive(Debug)]
pub(super) enum Unleased {
    Limit(LimitReached),
    Failed(Rc<ConnectError>),
}

impl Pool {
    /// Room on a connection that is open.
    pub(super) fn take(&self) -> Option<Lease> {
        self.inner.take()
    }

    /// Room on a connection that is open or, after a while, on a new one.
    pub(super) async fn lease(
        &self,
        worker: &Rc<Worker>,
        endpoint: &Arc<EndpointInfo>,
        balancer: &Balancer<Pools>,
    ) -> Result<Lease, Unleased> {
        loop {
            if let Some(lease) = self.inner.take() {
                return Ok(lease);
            }
            let opening = self.inner.opening.borrow().clone();
            let opening = match opening {
                Some(opening) => opening,
                None => match balancer.connection_permit() {
                    Ok(permit) => open(&self.inner, worker, endpoint, balancer.backend(), permit),
                    Err(limit) => {
                        if let Some(lease) = self.inner.take_worn() {
                            return Ok(lease);
                        }
                        if self.inner.is_empty() {
                            return Err(Unleased::Limit(limit));
                        }
                        self.inner.wait_for_room().await;
                        continue;
                    }
                },
            };
            opening.wait().await.map_err(Unleased::Failed)?;
        }
    }

    /// Closes what has been idle for too long.
    pub fn sweep(&self, now: Instant) {
        self.inner.connections.borrow_mut().retain(|connection| {
            let idle = now.saturating_duration_since(connection.used.get());
            let allowed = connection.policy.idle_timeout.unwrap_or(IDLE);
            !connection.retired.get() && (connection.active.get() > 0 || idle < allowed)
        });
        for connection in &*self.inner.connections.borrow() {
            let heard = connection.heard.get().unwrap_or(connection.opened);
            let since = heard.max(connection.used.get());
            if connection.active.get() > 0 && now.saturating_duration_since(since) > QUIET {
                self.inner.check(connection);
            }
        }
    }

    /// Connections that take streams.
    pub fn len(&self) -> usize {
        self.inner.connections.borrow().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Inner {
    fn take(self: &Rc<Self>) -> Option<Lease> {
        self.take_of(|connection| !connection.is_worn())
    }

    /// Room on a connection that should take no more.
    fn take_worn(self: &Rc<Self>) -> Option<Lease> {
        self.take_of(|_| true)
    }

    /// Whether there is no connection, nor the prospect of one.
    fn is_empty(&self) -> bool {
        self.connections.borrow().is_empty() && self.closing.get() == 0
    }

    fn take_of(self: &Rc<Self>, may: impl Fn(&Connection) -> bool) -> Option<Lease> {
        let mut connections = self.connections.borrow_mut();
        let mut at = 0;
        while let Some(connection) = connections.get(at) {
            if !connection.has_room() || !may(connection) {
                at += 1;
                continue;
            }
            let mut sender = connection.sender.clone();
            let mut cx = Context::from_waker(Waker::noop());
            // An error says that a GOAWAY has come, or that the stream numbers are used up.
            if let Poll::Ready(Ok(())) = sender.poll_ready(&mut cx) {
                connection.active.set(connection.active.get() + 1);
                let carried = &connection.carried;
                carried.set(carried.get().saturating_add(1));
                return Some(Lease {
                    sender,
                    connection: connection.clone(),
                    pool: self.clone(),
                });
            }
            connections.remove(at).retired.set(true);
        }
        None
    }

    async fn wait_for_room(&self) {
        struct Waiting<'a>(&'a Cell<usize>);
        impl Drop for Waiting<'_> {
            fn drop(&mut self) {
                self.0.set(self.0.get() - 1);
            }
        }
        self.waiting.set(self.waiting.get() + 1);
        let _waiting = Waiting(&self.waiting);
        self.room.notified().await;
    }

    /// Asks the other proxy for a sign of life; without one the connection is cut.
    fn check(self: &Rc<Self>, connection: &Rc<Connection>) {
        let Some(mut ping) = connection.ping.borrow_mut().take() else {
            return;
        };
        let (pool, connection) = (Rc::downgrade(self), Rc::downgrade(connection));
        tokio::task::spawn_local(async move {
            let pong = tokio::time::timeout(PING_TIMEOUT, ping.ping(Ping::opaque())).await;
            let Some(connection) = connection.upgrade() else {
                return;
            };
            if matches!(pong, Ok(Ok(_))) {
                connection.heard.set(Some(Instant::now()));
                *connection.ping.borrow_mut() = Some(ping);
                return;
            }
            if let Some(pool) = pool.upgrade() {
                pool.remove(&connection);
            }
            if let Some(driver) = &*connection.driver.borrow() {
                driver.abort();
            }
        });
    }

    fn remove(&self, connection: &Rc<Connection>) {
        self.forget(connection);
        self.room.notify_waiters();
    }

    fn forget(&self, connection: &Rc<Connection>) {
        connection.retired.set(true);
        self.connections
            .borrow_mut()
            .retain(|other| !Rc::ptr_eq(other, connection));
    }

    /// A worn connection takes no more streams; it closes when those it has end.
    fn close(&self, connection: &Rc<Connection>) {
        if !connection.retired.get() {
            connection.closing.set(true);
            self.closing.set(self.closing.get() + 1);
            self.forget(connection);
        }
    }
}

impl Connection {
    fn has_room(&self) -> bool {
        // A server that allows no stream at all makes one of them wait, not us open connections.
        let allowed = self.sender.current_max_send_streams().max(1);
        !self.retired.get() && self.active.get() < allowed.min(MAX_STREAMS)
    }

    fn is_worn(&self) -> bool {
        self.policy.is_worn(self.carried.get())
    }
}

impl Opening {
    async fn wait(&self) -> Result<(), Rc<ConnectError>> {
        while !self.ended.get() {
            let done = self.done.notified();
            if !self.ended.get() {
                done.await;
            }
        }
        match &*self.error.borrow() {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }
}

/// Tells those who wait, however the task ends.
struct Finish {
    pool: Rc<Inner>,
    opening: Rc<Opening>,
}

impl Drop for Finish {
    fn drop(&mut self) {
        self.pool.opening.borrow_mut().take();
        self.opening.ended.set(true);
        self.opening.done.notify_waiters();
    }
}

/// Gives back what a connection held, however its driver ends.
struct Driving {
    pool: Weak<Inner>,
    connection: Weak<Connection>,
    closing: Rc<Cell<bool>>,
    permit: Option<ConnectionPermit>,
}

impl Drop for Driving {
    fn drop(&mut self) {
        drop(self.permit.take());
        let Some(pool) = self.pool.upgrade() else {
            return;
        };
        if self.closing.get() {
            pool.closing.set(pool.closing.get() - 1);
        }
        match self.connection.upgrade() {
            Some(connection) => pool.remove(&connection),
            None => pool.room.notify_waiters(),
        }
    }
}

/// Begins to open a connection.
fn open(
    pool: &Rc<Inner>,
    worker: &Rc<Worker>,
    endpoint: &Arc<EndpointInfo>,
    backend: &Arc<Backend>,
    permit: ConnectionPermit,
) -> Rc<Opening> {
    let opening = Rc::new(Opening::default());
    *pool.opening.borrow_mut() = Some(opening.clone());
    let finish = Finish {
        pool: pool.clone(),
        opening: opening.clone(),
    };
    let (worker, endpoint, backend) = (worker.clone(), endpoint.clone(), backend.clone());
    tokio::task::spawn_local(async move {
        if let Err(error) = establish(&finish.pool, &worker, &endpoint, &backend, permit).await {
            *finish.opening.error.borrow_mut() = Some(Rc::new(error));
        }
    });
    opening
}

async fn establish(
    pool: &Rc<Inner>,
    worker: &Worker,
    endpoint: &EndpointInfo,
    backend: &Backend,
    permit: ConnectionPermit,
) -> Result<(), ConnectError> {
    let stream = connect(worker, endpoint, &backend.policy, Alpn::H2).await?;
    let mesh = stream.io.is_mesh();
    let policy = backend.policy.connection;
    let (sender, mut driver) = h2::client::Builder::new()
        .enable_push(false)
        .initial_window_size(policy.stream_window)
        .initial_connection_window_size(policy.connection_window)
        .initial_max_send_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADER_LIST)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_reset_streams(REMEMBERED_RESETS)
        .handshake::<_, Bytes>(stream)
        .await
        .map_err(|error| ConnectError::Closed {
            addr: endpoint.address,
            source: std::io::Error::other(error),
        })?;
    let now = Instant::now();
    let connection = Rc::new(Connection {
        sender,
        active: Cell::new(0),
        carried: Cell::new(0),
        policy,
        retired: Cell::new(false),
        closing: Rc::default(),
        opened: now,
        used: Cell::new(now),
        heard: Cell::new(None),
        ping: RefCell::new(driver.ping_pong().filter(|_| mesh)),
        mesh,
        driver: RefCell::default(),
    });
    // Weak: the connection closes when the pool and its streams have let go of it.
    let held = Driving {
        pool: Rc::downgrade(pool),
        connection: Rc::downgrade(&connection),
        closing: connection.closing.clone(),
        permit: Some(permit),
    };
    let address = endpoint.address;
    let driving = tokio::task::spawn_local(async move {
        let _held = held;
        if let Err(error) = driver.await {
            tracing::debug!("HTTP/2 connection to {address}: {error}");
        }
    });
    *connection.driver.borrow_mut() = Some(driving.abort_handle());
    // Those that are worn have waited for one in their place.
    let connections = pool.connections.borrow().clone();
    for worn in connections.iter().filter(|known| known.is_worn()) {
        pool.close(worn);
    }
    pool.connections.borrow_mut().push(connection);
    Ok(())
}

impl Lease {
    /// Another proxy is at the other end.
    pub(super) fn mesh(&self) -> bool {
        self.connection.mesh
    }

    /// Whether a response has come over this connection before.
    pub(super) fn is_reused(&self) -> bool {
        self.connection.heard.get().is_some()
    }

    /// Sends the head of a request.
    pub(super) fn send(
        &mut self,
        request: Request<()>,
        end: bool,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), h2::Error> {
        self.sender.send_request(request, end)
    }

    /// A response has come.
    pub(super) fn heard(&self, now: Instant) {
        self.connection.heard.set(Some(now));
    }

    /// A stream has timed out: the connection may lead nowhere.
    pub(super) fn suspect(&self) {
        self.pool.check(&self.connection);
    }

    /// Whether the server takes extended CONNECT (RFC 8441); waits for the settings of a
    /// connection that is new.
    pub(super) async fn takes_extended_connect(&self) -> bool {
        let until = self.connection.opened + SETTINGS_WAIT;
        while !self.sender.is_extended_connect_protocol_enabled() {
            if Instant::now() >= until {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        true
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let connection = &self.connection;
        connection.active.set(connection.active.get() - 1);
        connection.used.set(Instant::now());
        if connection.active.get() == 0 && connection.is_worn() {
            self.pool.close(connection);
        }
        if self.pool.waiting.get() > 0 {
            self.pool.room.notify_one();
        }
    }
}
