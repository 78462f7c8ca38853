//! Accepts connections, shakes hands and hands them to the gRPC server.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use super::tls::{Peer, peer};

/// A handshake that takes longer is given up.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes at once; others wait in the kernel's queue. One costs about 0.3 ms of CPU.
const HANDSHAKES: usize = 256;
/// Wait after an error of `accept` itself (out of file descriptors).
const ACCEPT_ERROR: Duration = Duration::from_millis(100);

/// A connection that is through its handshake.
pub struct Connection {
    stream: TlsStream<TcpStream>,
    info: ConnectionInfo,
}

/// Who is at the other end.
#[derive(Clone, Debug)]
pub struct ConnectionInfo {
    pub address: SocketAddr,
    /// None when it showed no certificate.
    pub peer: Option<Peer>,
}

impl Connected for Connection {
    type ConnectInfo = ConnectionInfo;

    fn connect_info(&self) -> ConnectionInfo {
        self.info.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Accepts until nobody takes connections any more. Each handshake uses the configuration of its
/// moment.
pub async fn accept(
    listener: TcpListener,
    tls: Arc<ArcSwap<ServerConfig>>,
    trust_domain: Arc<str>,
    connections: mpsc::Sender<io::Result<Connection>>,
) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
    loop {
        let Ok(permit) = handshakes.clone().acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = connections.closed() => return,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!("accepting a connection: {error}");
                tokio::time::sleep(ACCEPT_ERROR).await;
                continue;
            }
        };
        let config = tls.load_full();
        let (trust_domain, connections) = (trust_domain.clone(), connections.clone());
        tokio::spawn(async move {
            let shaken = timeout(HANDSHAKE, handshake(stream, address, config, &trust_domain));
            let connection = match shaken.await {
                Ok(Ok(connection)) => connection,
                Ok(Err(error)) => {
                    debug!(%address, "TLS handshake: {error}");
                    return;
                }
                Err(_) => {
                    debug!(%address, "TLS handshake took longer than {HANDSHAKE:?}");
                    return;
                }
            };
            drop(permit);
            // Nobody takes it: the server is ending.
            let _ = connections.send(Ok(connection)).await;
        });
    }
}

async fn handshake(
    stream: TcpStream,
    address: SocketAddr,
    config: Arc<ServerConfig>,
    trust_domain: &str,
) -> io::Result<Connection> {
    stream.set_nodelay(true)?;
    let stream = TlsAcceptor::from(config).accept(stream).await?;
    let certificate = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first());
    let peer = match certificate {
        Some(certificate) => Some(peer(certificate, trust_domain).map_err(io::Error::other)?),
        None => None,
    };
    Ok(Connection {
        stream,
        info: ConnectionInfo { address, peer },
    })
}
