//! The stream to the control plane, kept for as long as the proxy lives.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use rand::Rng;
use tokio::sync::mpsc;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep, timeout};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Streaming;
use weft_api::names::MOVE_METADATA;
use weft_api::proto::discovery_client::DiscoveryClient;
use weft_api::proto::discovery_request::Message;
use weft_api::proto::{
    Certificate, DiscoveryRequest, DiscoveryResponse, Hello, Subscribe, Unsubscribe,
};

use super::backoff::Backoff;
use super::dial::{ControlPlane, DialError};
use super::directory::{Command, Directory, LinkState};
use super::status::Status;
use super::store::Store;
use crate::config::Config;
use crate::dns::{Dns, SystemDns};
use crate::identity::{Credentials, Handle};
use crate::telemetry::{Counter, Registry};

/// Destinations that nobody holds are forgotten after this long without a use.
pub const IDLE_DESTINATION: Duration = Duration::from_secs(600);
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(15);
/// After a stream that worked is lost, the next is tried within this: proxies that lose a control
/// plane together do not come to the next one together. Whoever needs to know a new destination
/// does not wait.
const RECONNECT_SPREAD: Duration = Duration::from_secs(3);
/// A stream that has lasted this long has worked, whether anything came on it or not: longer than
/// opening one, and being refused, takes.
const WORKED_AFTER: Duration = Duration::from_secs(5);
/// The control plane takes the stream (answers its head) within this long.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// A failure that goes on is logged again after this long.
const REPEAT_LOG: Duration = Duration::from_secs(60);
/// Largest message, bytes: some 100,000 endpoints.
const MAX_MESSAGE: usize = 32 * 1024 * 1024;
/// Commands taken at once, so that a burst of new destinations is one message.
const BATCH: usize = 1024;

/// What discovery needs to know.
#[derive(Debug, Clone)]
pub struct Settings {
    pub control_plane: ControlPlane,
    pub trust_domain: String,
    /// "namespace/name" of the proxy's own workload.
    pub workload: String,
    /// Where the admin port is reached; empty when it is not.
    pub admin_address: String,
    pub idle_destination: Duration,
    /// Asked instead of the system's resolvers.
    pub dns_servers: Vec<SocketAddr>,
}

impl Settings {
    pub fn from_config(config: &Config) -> Result<Self, DialError> {
        Ok(Self {
            control_plane: ControlPlane::parse(&config.control_plane, config.mark)?,
            trust_domain: config.trust_domain.clone(),
            workload: config.workload.clone(),
            admin_address: match config.admin.ip().is_unspecified() {
                // The control plane knows the workload's address; only the port is news.
                true => format!(":{}", config.admin.port()),
                false => config.admin.to_string(),
            },
            idle_destination: IDLE_DESTINATION,
            dns_servers: config.dns_servers.clone(),
        })
    }
}

/// Keeps a [`Directory`] fed. Runs on the control thread.
pub struct Client {
    settings: Settings,
    instance: String,
    directory: Arc<Directory>,
    registry: Arc<Registry>,
    store: Store,
    commands: mpsc::UnboundedReceiver<Command>,
    ticks: Interval,
    last_error: Option<String>,
    state_since: Instant,
}

/// How a stream came to its end.
#[derive(Debug, thiserror::Error)]
enum StreamEnd {
    #[error("{0}")]
    Dial(#[from] DialError),
    #[error("it did not take the stream within {} s", OPEN_TIMEOUT.as_secs())]
    NotOpened,
    #[error("it ended the stream: {} ({:?})", .0.message(), .0.code())]
    Status(Box<tonic::Status>),
    #[error("it closed the stream")]
    Closed,
}

impl StreamEnd {
    /// A control plane that is ending sends its proxies to another one, one after another.
    fn asks_to_move(&self) -> bool {
        match self {
            Self::Status(status) => status.metadata().contains_key(MOVE_METADATA),
            Self::Dial(_) | Self::NotOpened | Self::Closed => false,
        }
    }
}

/// A batch of what has to be done besides reading the stream.
enum Chore {
    Commands(Vec<Command>),
    Tick,
}

impl Client {
    /// Must be called within a tokio runtime.
    pub fn new(
        settings: Settings,
        identity: Handle,
        registry: Arc<Registry>,
    ) -> (Self, Arc<Directory>) {
        let (directory, commands) = Directory::new(identity);
        let system = SystemDns::new(settings.dns_servers.clone(), settings.control_plane.mark);
        directory.set_dns(Dns::new(Arc::new(system)));
        let period = (settings.idle_destination / 20)
            .clamp(Duration::from_millis(10), Duration::from_secs(5));
        let mut ticks = interval(period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let client = Self {
            store: Store::new(
                directory.clone(),
                &settings.trust_domain,
                &settings.workload,
            ),
            instance: format!("{:016x}", rand::random::<u64>()),
            settings,
            directory: directory.clone(),
            registry,
            commands,
            ticks,
            last_error: None,
            state_since: Instant::now(),
        };
        (client, directory)
    }

    fn count(&self, result: &str, n: usize) {
        let updates = Counter::DiscoveryUpdates;
        self.registry.count(updates, &[result], n as u64);
    }

    /// Keeps a stream open, and opens a new one when it is lost.
    pub async fn run(mut self) -> Infallible {
        let mut backoff = Backoff::new(FIRST_RETRY, LAST_RETRY);
        let mut logged: Option<Instant> = None;
        loop {
            let credentials = self.credentials().await;
            let mut received = false;
            let began = Instant::now();
            let end = self.stream(&credentials, &mut received).await;
            // A stream that goes on where another ended may have nothing to say for long.
            let worked = received || began.elapsed() >= WORKED_AFTER;
            if worked {
                backoff.reset();
                logged = None;
            }
            self.set_link(match worked {
                true => LinkState::Connecting,
                false => LinkState::Down,
            });
            if worked {
                // Not a failure yet: the first try to open another may well work.
                tracing::info!("the stream to the control plane has ended: {end}; opening another");
                self.last_error = Some(end.to_string());
                if !end.asks_to_move() {
                    let spread = RECONNECT_SPREAD.mul_f64(rand::rng().random());
                    self.until_wanted(sleep(spread)).await;
                }
                continue;
            }
            let wait = backoff.wait();
            if logged.is_none_or(|at| at.elapsed() >= REPEAT_LOG) {
                logged = Some(Instant::now());
                tracing::warn!(
                    "no stream to the control plane at {}:{}: {end}; going on with what is known, trying again",
                    self.settings.control_plane.host,
                    self.settings.control_plane.port,
                );
            } else {
                tracing::debug!(error = %end, "no stream to the control plane");
            }
            self.last_error = Some(end.to_string());
            self.meanwhile(sleep(wait)).await;
        }
    }

    /// The certificate; waits for the first.
    async fn credentials(&mut self) -> Arc<Credentials> {
        let mut changes = self.directory.identity().watch();
        loop {
            if let Some(credentials) = self.directory.identity().get() {
                return credentials;
            }
            // The sender lives in the handle we hold.
            let _ = self
                .meanwhile(async {
                    let changed = changes.changed();
                    timeout(OPEN_TIMEOUT, changed).await
                })
                .await;
            if self.directory.identity().get().is_none() {
                // No certificate, no stream: connections need not wait for it.
                self.set_link(LinkState::Down);
            }
        }
    }

    /// One stream, to its end.
    async fn stream(&mut self, credentials: &Credentials, received: &mut bool) -> StreamEnd {
        let (out, requests) = mpsc::unbounded_channel();
        let opening = open(
            self.settings.control_plane.clone(),
            credentials.control_plane_config(),
            requests,
        );
        // The control plane may answer the head only after our first messages: they go at once.
        let send = |message| {
            // Fails only when the stream is gone; reading it says so.
            let _ = out.send(DiscoveryRequest {
                message: Some(message),
            });
        };
        send(Message::Hello(Hello {
            workload: self.settings.workload.clone(),
            proxy_version: env!("CARGO_PKG_VERSION").into(),
            instance: self.instance.clone(),
            admin_address: self.settings.admin_address.clone(),
            certificate_expires: credentials
                .expires
                .duration_since(UNIX_EPOCH)
                .map_or(0, |t| i64::try_from(t.as_secs()).unwrap_or(i64::MAX)),
        }));
        let mut inbound = match self.meanwhile(opening).await {
            Ok(inbound) => inbound,
            Err(end) => return end,
        };
        let mut shown = credentials.leaf().to_vec();
        if let Some(leaf) = self.new_leaf(&mut shown) {
            send(Message::Certificate(Certificate { leaf }));
        }
        // What was wanted while the stream opened is part of it.
        send(Message::Subscribe(Subscribe {
            resources: self.store.resume(),
        }));
        self.set_link(LinkState::Connected);
        tracing::info!(
            "stream to the control plane at {}:{} open",
            self.settings.control_plane.host,
            self.settings.control_plane.port
        );
        let mut renewals = self.directory.identity().watch();
        loop {
            let chore = tokio::select! {
                changed = renewals.changed() => {
                    // The sender lives in the handle we hold.
                    if changed.is_ok() && let Some(leaf) = self.new_leaf(&mut shown) {
                        send(Message::Certificate(Certificate { leaf }));
                    }
                    continue;
                }
                message = inbound.message() => {
                    match message {
                        Ok(Some(DiscoveryResponse { resources })) => {
                            *received = true;
                            let reply = self.store.apply(resources);
                            self.count("ack", reply.acks.len());
                            self.count("nack", reply.nacks.len());
                            reply.acks.into_iter().for_each(|ack| send(Message::Ack(ack)));
                            reply.nacks.into_iter().for_each(|nack| send(Message::Nack(nack)));
                            if !reply.subscribe.is_empty() {
                                send(Message::Subscribe(Subscribe { resources: reply.subscribe }));
                            }
                            if !reply.unsubscribe.is_empty() {
                                send(Message::Unsubscribe(Unsubscribe { keys: reply.unsubscribe }));
                            }
                        }
                        Ok(None) => return StreamEnd::Closed,
                        Err(status) => return StreamEnd::Status(Box::new(status)),
                    }
                    continue;
                }
                chore = next_chore(&mut self.commands, &mut self.ticks) => chore,
            };
            match chore {
                Chore::Commands(commands) => {
                    let resources = self.execute(commands);
                    if !resources.is_empty() {
                        send(Message::Subscribe(Subscribe { resources }));
                    }
                }
                Chore::Tick => {
                    let keys = self.tick();
                    if !keys.is_empty() {
                        send(Message::Unsubscribe(Unsubscribe { keys }));
                    }
                }
            }
        }
    }

    /// The certificate in use, when it is not the one the control plane knows of.
    fn new_leaf(&self, shown: &mut Vec<u8>) -> Option<Vec<u8>> {
        let credentials = self.directory.identity().get()?;
        let leaf = credentials.leaf();
        if leaf == shown.as_slice() {
            return None;
        }
        *shown = leaf.to_vec();
        Some(shown.clone())
    }

    /// Does what has to be done while there is no stream, until `done` is.
    async fn meanwhile<T>(&mut self, done: impl Future<Output = T>) -> T {
        tokio::pin!(done);
        loop {
            tokio::select! {
                result = &mut done => return result,
                chore = next_chore(&mut self.commands, &mut self.ticks) => match chore {
                    // Subscribed to when the stream is there.
                    Chore::Commands(commands) => drop(self.execute(commands)),
                    Chore::Tick => drop(self.tick()),
                },
            }
        }
    }

    /// The same, until `done` is or an application wants a destination that is not known.
    async fn until_wanted(&mut self, done: impl Future<Output = ()>) {
        tokio::pin!(done);
        loop {
            tokio::select! {
                () = &mut done => return,
                chore = next_chore(&mut self.commands, &mut self.ticks) => match chore {
                    Chore::Commands(commands) => {
                        if !self.execute(commands).is_empty() {
                            return;
                        }
                    }
                    Chore::Tick => drop(self.tick()),
                },
            }
        }
    }

    fn execute(&mut self, commands: Vec<Command>) -> Vec<weft_api::proto::Held> {
        let mut wanted = BTreeSet::<SocketAddr>::new();
        for command in commands {
            match command {
                Command::Want(address) => drop(wanted.insert(address)),
                // Who asked may be gone.
                Command::Status(answer) => drop(answer.send(self.status())),
            }
        }
        wanted
            .into_iter()
            .filter_map(|address| self.store.want(address))
            .collect()
    }

    fn tick(&mut self) -> Vec<weft_api::proto::ResourceKey> {
        self.directory.tick();
        self.store.forget_idle(self.settings.idle_destination)
    }

    fn set_link(&mut self, state: LinkState) {
        if self.directory.link() != state {
            self.state_since = Instant::now();
            self.directory.set_link(state);
        }
    }

    fn status(&self) -> Status {
        let control_plane = &self.settings.control_plane;
        Status {
            control_plane: format!("{}:{}", control_plane.host, control_plane.port),
            stream: self.directory.link(),
            since_seconds: self.state_since.elapsed().as_secs(),
            last_error: self.last_error.clone(),
            resources: self.store.status(),
        }
    }
}

/// Connects and opens the stream. Owns all it needs, so that it can run beside the chores.
async fn open(
    control_plane: ControlPlane,
    tls: Arc<rustls::ClientConfig>,
    requests: mpsc::UnboundedReceiver<DiscoveryRequest>,
) -> Result<Streaming<DiscoveryResponse>, StreamEnd> {
    let channel = control_plane.connect(tls).await?;
    let mut client = DiscoveryClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
    match timeout(
        OPEN_TIMEOUT,
        client.stream(UnboundedReceiverStream::new(requests)),
    )
    .await
    {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(StreamEnd::Status(Box::new(status))),
        Err(_) => Err(StreamEnd::NotOpened),
    }
}

/// Cancel-safe: a batch is either not taken or returned.
async fn next_chore(
    commands: &mut mpsc::UnboundedReceiver<Command>,
    ticks: &mut Interval,
) -> Chore {
    let mut batch = Vec::new();
    tokio::select! {
        // Zero only when every sender is gone; the directory we hold has one.
        _ = commands.recv_many(&mut batch, BATCH) => Chore::Commands(batch),
        _ = ticks.tick() => Chore::Tick,
    }
}
