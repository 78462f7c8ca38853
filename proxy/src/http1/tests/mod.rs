//! The engine between a scripted client and a scripted server, over real sockets.
//!
//! - [`messages`]: what a message says passes as it is, and at once
//! - [`tunnels`]: connections that stop being HTTP, or never were
//! - [`connections`]: how long a server's is used, and how long anybody may be silent
//! - [`endings`]: how a connection ends is passed on
//! - [`hedging`]: a second endpoint that is asked beside the first
//! - [`strictness`]: what is refused, and what is only old

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::{LocalSet, spawn_local};

use super::serve;
use crate::http::flow::Flow;
use crate::tables::{BackendPolicy, Destination, RoutePolicy};
use crate::testing::{backend, destination, endpoint, inbound, outbound, pass, rounds, worker};
use crate::transport::Stream;
use crate::transport::testing::tcp_pair;

const GET: &str = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
/// What takes longer does not come.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a server does on one connection, in order.
#[derive(Clone, Copy)]
enum Do {
    /// Reads until the bytes seen since the last reply end so, then goes on.
    Until(&'static str),
    Say(&'static str),
    Close,
    Reset,
    /// Half-closes and reads on to the end.
    Finish,
    /// Waits for the client's end.
    Gone,
    /// Waits until the test says so ([`Server::go`]).
    Go,
}
use Do::*;

/// A server whose n-th connection follows the n-th script; what each read is kept.
#[derive(Clone)]
struct Server {
    address: std::net::SocketAddr,
    heard: Rc<RefCell<Vec<String>>>,
    /// Whenever something was heard.
    news: Rc<Notify>,
    /// What [`Go`] waits for.
    go: Rc<Notify>,
}

impl Server {
    fn at(address: std::net::SocketAddr) -> Self {
        Self {
            address,
            heard: Rc::default(),
            news: Rc::default(),
            go: Rc::default(),
        }
    }

    /// Waits until what the first connection has heard ends so.
    async fn hears(&self, end: &str) {
        let heard = async {
            while !(self.heard.borrow().first()).is_some_and(|heard| heard.ends_with(end)) {
                self.news.notified().await;
            }
        };
        let waited = tokio::time::timeout(PATIENCE, heard).await;
        waited.unwrap_or_else(|_| panic!("{end:?} is not in {:?}", self.heard.borrow()));
    }
}

async fn server(scripts: Vec<Vec<Do>>) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::at(address);
    let all = server.clone();
    spawn_local(async move {
        for (n, script) in scripts.into_iter().enumerate() {
            let (stream, _) = listener.accept().await.unwrap();
            all.heard.borrow_mut().push(String::new());
            spawn_local(follow(stream, script, all.clone(), n));
        }
    });
    server
}

async fn follow(mut stream: TcpStream, script: Vec<Do>, server: Server, n: usize) {
    let hear = |text: &str| {
        server.heard.borrow_mut()[n].push_str(text);
        server.news.notify_one();
    };
    let mut since = String::new();
    let mut buf = [0; 4096];
    for step in script {
        match step {
            Until(end) => {
                while !since.ends_with(end) {
                    let got = stream.read(&mut buf).await.unwrap();
                    assert!(got > 0, "the proxy closed early; heard {since:?}");
                    let text = std::str::from_utf8(&buf[..got]).unwrap();
                    since.push_str(text);
                    hear(text);
                }
                since.clear();
            }
            Say(text) => stream.write_all(text.as_bytes()).await.unwrap(),
            Close => return,
            Reset => {
                socket2::SockRef::from(&stream)
                    .set_linger(Some(Duration::ZERO))
                    .unwrap();
                return;
            }
            Gone => {
                while stream.read(&mut buf).await.unwrap_or(0) > 0 {}
                hear("<gone>");
            }
            Go => server.go.notified().await,
            Finish => {
                stream.shutdown().await.unwrap();
                while stream.read(&mut buf).await.unwrap_or(0) > 0 {}
                return;
            }
        }
    }
    // Keeps the connection open until the proxy closes it.
    while stream.read(&mut buf).await.unwrap_or(0) > 0 {}
}

/// A client connected to the engine, which sends to `server`.
async fn client(server: &Server) -> TcpStream {
    connected(server, outbound).await
}

/// The same for a client that is a proxy of the mesh.
async fn proxy(server: &Server) -> TcpStream {
    connected(server, inbound).await
}

async fn connected(server: &Server, flow: fn(Arc<Destination>) -> Rc<Flow>) -> TcpStream {
    let (client, proxy) = tcp_pair().await;
    let backend = backend(
        vec![endpoint(server.address, None)],
        BackendPolicy::default(),
    );
    let flow = flow(destination(backend, RoutePolicy::default()));
    let worker = worker(None);
    spawn_local(serve(worker, Stream::from(proxy), flow));
    client
}

/// Waits until the server's first connection has been ended by the proxy.
async fn gone(server: &Server) {
    server.hears("<gone>").await;
}

async fn say(client: &mut TcpStream, text: &str) {
    client.write_all(text.as_bytes()).await.unwrap();
}

async fn hear(client: &mut TcpStream, expected: &str) {
    let mut got = vec![0; expected.len()];
    let read = tokio::time::timeout(PATIENCE, async {
        let mut at = 0;
        while at < got.len() {
            match client.read(&mut got[at..]).await.unwrap() {
                0 => break,
                n => at += n,
            }
        }
        at
    })
    .await;
    let at = read.expect("the response is not there in time");
    assert_eq!(String::from_utf8_lossy(&got[..at]), expected);
}

/// The rest until the end; a reset is an error.
async fn rest(client: &mut TcpStream) -> std::io::Result<String> {
    let mut text = Vec::new();
    let read = client.read_to_end(&mut text);
    tokio::time::timeout(PATIENCE, read)
        .await
        .expect("the connection does not end")?;
    Ok(String::from_utf8(text).unwrap())
}

macro_rules! engine_test {
    ($(#[$doc:meta])* $name:ident, $body:expr) => {
        $(#[$doc])*
        #[tokio::test]
        async fn $name() {
            LocalSet::new().run_until($body).await;
        }
    };
}

mod connections;
mod endings;
mod hedging;
mod messages;
mod strictness;
mod tunnels;
