//! How the exporter's connections are made.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpSocket, TcpStream};
use tower::Service;

type Connecting<T> = Pin<Box<dyn Future<Output = io::Result<T>> + Send>>;

/// Makes a connection to "host:port".
pub type Connect = Arc<dyn Fn(String) -> Connecting<TcpStream> + Send + Sync>;

/// Resolves with the system's resolver and connects, with `mark` (SO_MARK, needs CAP_NET_ADMIN)
/// on the socket when given.
pub fn marked(mark: Option<u32>) -> Connect {
    Arc::new(move |target| Box::pin(connect(target, mark)))
}

async fn connect(target: String, mark: Option<u32>) -> io::Result<TcpStream> {
    let mut last = None;
    for address in tokio::net::lookup_host(&target).await? {
        match connect_to(address, mark).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, format!("{target} has no address"))
    }))
}

async fn connect_to(address: SocketAddr, mark: Option<u32>) -> io::Result<TcpStream> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    if let Some(mark) = mark {
        socket2::SockRef::from(&socket).set_mark(mark)?;
    }
    let stream = socket.connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A [`Connect`] as hyper and tonic want it.
#[derive(Clone)]
pub struct Connector(Connect);

impl Connector {
    pub fn new(connect: Connect) -> Self {
        Self(connect)
    }
}

impl std::fmt::Debug for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Connector")
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = Connecting<Self::Response>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let host = uri.host().unwrap_or_default();
        let target = format!("{host}:{}", uri.port_u16().unwrap_or(80));
        let connecting = (self.0)(target);
        Box::pin(async move { connecting.await.map(TokioIo::new) })
    }
}
