use std::cell::Cell;

use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;
use crate::transport::mux::FULL;
use crate::transport::testing::{listen, local, tls_configs};
use crate::transport::{self, HANDSHAKE_TIMEOUT, Options, accept_tls, connect_tls};

const PATIENCE: Duration = Duration::from_secs(30);

/// A proxy that echoes streams, and connections that are not shared.
struct World {
    peer: Peer,
    client: Arc<ClientConfig>,
    connected: Cell<usize>,
    sessions: Sessions,
}

impl World {
    /// A peer that takes these names.
    async fn new(alpn: &[Alpn]) -> Rc<Self> {
        let (client, server) = tls_configs();
        let (mut client, mut server) = (ClientConfig::clone(&client), ServerConfig::clone(&server));
        client.alpn_protocols = [Alpn::Mux, Alpn::Tcp].map(|a| a.wire().to_vec()).into();
        server.alpn_protocols = alpn.iter().map(|a| a.wire().to_vec()).collect();
        let (listener, address) = listen().await;
        spawn_local(serve(listener, Arc::new(server)));
        let id = "spiffe://cluster.local/ns/shop/sa/cart";
        Rc::new(Self {
            peer: (address, Arc::new(id.parse().unwrap())),
            client: Arc::new(client),
            connected: Cell::new(0),
            sessions: Sessions::default(),
        })
    }

    async fn stream(&self, generation: u64) -> Result<Stream, ConnectError> {
        let connect = async {
            self.connected.set(self.connected.get() + 1);
            connect_tls(self.peer.0, &Options::default(), self.client.clone()).await
        };
        let sessions = &self.sessions;
        sessions
            .stream(
                self.peer.clone(),
                generation,
                Inside::Tcp,
                PATIENCE,
                connect,
            )
            .await
    }
}

async fn serve(listener: TcpListener, config: Arc<ServerConfig>) {
    while let Ok((tcp, _)) = listener.accept().await {
        let accepted = accept_tls(tcp.into(), config.clone(), HANDSHAKE_TIMEOUT).await;
        let Ok(stream) = accepted else { continue };
        let Io::Server(tls) = &stream.io else {
            continue;
        };
        if tls.get_ref().1.alpn_protocol() != Some(Alpn::Mux.wire()) {
            spawn_local(echo(stream.io));
            continue;
        }
        let (_, driver) = Driver::server(stream.io);
        spawn_local(driver.run(|_, stream| {
            spawn_local(echo(Io::Shared(stream)));
        }));
    }
}

async fn echo(io: transport::Io) {
    let (mut from, mut to) = tokio::io::split(io);
    let _ = tokio::io::copy(&mut from, &mut to).await;
    let _ = to.shutdown().await;
}

async fn works(stream: &mut Stream) {
    stream.write_all(b"there?").await.unwrap();
    let mut heard = [0; 6];
    stream.read_exact(&mut heard).await.unwrap();
    assert_eq!(&heard, b"there?");
}

/// So many streams, all asked for at once.
async fn at_once(world: &Rc<World>, streams: usize) -> Vec<Result<Stream, ConnectError>> {
    let asked: Vec<_> = (0..streams)
        .map(|_| {
            let world = world.clone();
            spawn_local(async move { world.stream(1).await })
        })
        .collect();
    let mut answered = Vec::new();
    for stream in asked {
        answered.push(stream.await.unwrap());
    }
    answered
}

#[test]
fn many_at_once_share_as_few_handshakes_as_they_can() {
    local(async {
        let world = World::new(&[Alpn::Mux, Alpn::Tcp]).await;
        let mut streams = at_once(&world, 300).await;
        assert_eq!(world.connected.get(), 300usize.div_ceil(FULL));
        for stream in &mut streams {
            works(stream.as_mut().unwrap()).await;
        }
    });
}

#[test]
fn a_peer_that_shares_nothing_is_reached_all_the_same() {
    local(async {
        let world = World::new(&[Alpn::Tcp]).await;
        let mut streams = at_once(&world, 5).await;
        assert_eq!(world.connected.get(), 5);
        for stream in &mut streams {
            let stream = stream.as_mut().unwrap();
            assert!(matches!(stream.io, Io::Client(_)));
            works(stream).await;
        }
    });
}

#[test]
fn all_who_wait_hear_of_a_failure() {
    local(async {
        let mut world = World::new(&[Alpn::Mux]).await;
        let (listener, nobody) = listen().await;
        drop(listener);
        Rc::get_mut(&mut world).unwrap().peer.0 = nobody;
        for stream in at_once(&world, 5).await {
            assert!(matches!(stream, Err(ConnectError::Refused { .. })));
        }
        // Nothing is left behind that others would wait for.
        assert!(world.stream(1).await.is_err());
        world.sessions.sweep(Instant::now());
        assert!(world.sessions.peers.borrow().is_empty());
    });
}

#[test]
fn one_that_is_given_up_holds_up_nobody() {
    local(async {
        let world = World::new(&[Alpn::Mux]).await;
        let never = spawn_local({
            let world = world.clone();
            async move {
                let pending = std::future::pending();
                let sessions = &world.sessions;
                sessions
                    .stream(world.peer.clone(), 1, Inside::Tcp, PATIENCE, pending)
                    .await
            }
        });
        tokio::task::yield_now().await;
        let waiting = spawn_local({
            let world = world.clone();
            async move { at_once(&world, 20).await }
        });
        for _ in 0..3 {
            tokio::task::yield_now().await;
        }
        assert_eq!(world.connected.get(), 0, "one is being opened already");
        never.abort();
        for stream in &mut waiting.await.unwrap() {
            works(stream.as_mut().unwrap()).await;
        }
        assert_eq!(
            world.connected.get(),
            1,
            "one of those who waited opens another"
        );
    });
}

#[test]
fn who_waits_does_so_for_its_own_time() {
    local(async {
        let world = World::new(&[Alpn::Mux]).await;
        let sessions = &world.sessions;
        let stream = |patience| {
            let never = std::future::pending::<Result<Stream, ConnectError>>();
            sessions.stream(world.peer.clone(), 1, Inside::Tcp, patience, never)
        };
        let short = Duration::from_millis(20);
        tokio::select! {
            biased;
            _ = stream(PATIENCE) => panic!("this one never connects"),
            waited = stream(short) => {
                assert!(matches!(waited, Err(ConnectError::TimedOut { after, .. }) if after == short));
            }
        }
    });
}

#[test]
fn new_credentials_are_shown_on_a_new_connection() {
    local(async {
        let world = World::new(&[Alpn::Mux]).await;
        let mut old = world.stream(1).await.unwrap();
        let mut same = world.stream(1).await.unwrap();
        assert_eq!(world.connected.get(), 1);
        let mut new = world.stream(2).await.unwrap();
        assert_eq!(world.connected.get(), 2);
        for stream in [&mut old, &mut same, &mut new] {
            works(stream).await;
        }
        // The old one takes no more streams, but is waited for when the worker ends.
        world.sessions.sweep(Instant::now());
        assert_eq!(world.sessions.peers.borrow()[&world.peer].sessions.len(), 2);
        drop((same, new));
        let said = vec![7; 500_000];
        let last_words = async {
            let (mut from, mut to) = tokio::io::split(old);
            let say = async {
                to.write_all(&said).await.unwrap();
                to.shutdown().await.unwrap();
            };
            let mut heard = Vec::new();
            let ((), read) = tokio::join!(say, from.read_to_end(&mut heard));
            read.unwrap();
            heard
        };
        let ((), heard) = tokio::join!(world.sessions.end(), last_words);
        assert!(heard == said);
    });
}

#[test]
fn an_idle_connection_is_closed_after_a_time() {
    local(async {
        let world = World::new(&[Alpn::Mux]).await;
        let mut stream = world.stream(1).await.unwrap();
        works(&mut stream).await;
        let later = Instant::now() + IDLE + Duration::from_secs(1);
        world.sessions.sweep(later);
        works(&mut stream).await;
        drop(stream);
        world.sessions.sweep(Instant::now());
        let mut again = world.stream(1).await.unwrap();
        assert_eq!(world.connected.get(), 1);
        works(&mut again).await;
        drop(again);
        world.sessions.sweep(later + IDLE);
        works(&mut world.stream(1).await.unwrap()).await;
        assert_eq!(world.connected.get(), 2);
        // The first one has ended, and so does the second with the worker.
        world.sessions.sweep(Instant::now());
        assert_eq!(world.sessions.peers.borrow()[&world.peer].sessions.len(), 1);
        world.sessions.end().await;
        assert!(world.sessions.peers.borrow().is_empty());
    });
}
