//! For tests: a worker without a control plane, and pairs of sockets.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use clap::Parser;
use tokio::net::{TcpListener, TcpStream};

use crate::config::Config;
use crate::discovery::Directory;
use crate::http::flow::{Flow, Target};
use crate::identity;
use crate::inbound::local;
use crate::tables::{Destination, Workload};
use crate::telemetry::{Direction, Registry, access_log, trace::span_channel};
use crate::worker::{Shared, Worker};

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    config: Config,
}

/// A worker that knows nothing but what is put into its directory.
pub fn worker() -> Rc<Worker> {
    let cli = Cli::parse_from([
        "test",
        "--trust-root=/nonexistent",
        "--token=/nonexistent",
        "--workload=test/client",
    ]);
    let registry = Registry::new();
    let identity = identity::Handle::new();
    let (spans, _) = span_channel(registry.clone());
    let (access_log, _) = access_log::channel(registry.clone());
    Worker::new(&Shared {
        config: Arc::new(cli.config),
        directory: Directory::detached(identity.clone()),
        identity,
        registry,
        spans,
        access_log,
    })
}

/// A destination with one plaintext endpoint and the default policy.
pub fn destination(to: SocketAddr) -> Arc<Destination> {
    local::destination(&Workload::default(), to)
}

/// A flow to a fixed destination, from a plain client.
pub fn flow(to: Arc<Destination>) -> Rc<Flow> {
    let peer = SocketAddr::from(([127, 0, 0, 1], 1));
    let source = (Arc::default(), Arc::default());
    let out = Direction::Outbound;
    Rc::new(Flow::new(out, Target::Fixed, to, peer, source, false))
}

/// Two ends of a TCP connection.
pub async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (client, server) = tokio::join!(TcpStream::connect(address), listener.accept());
    (client.unwrap(), server.unwrap().0)
}
