//! Opening connections, and TLS on accepted ones.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ServerConfig};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use super::eyeballs::{self, Siblings};
use super::{Io, Socket, Stream};

/// How long a connect may take by default. Long enough for one lost SYN (sent again after 1 s),
/// short enough that another endpoint can still be tried.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a TLS handshake may take by default: some lost packets, not a peer that stalls.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How the kernel asks whether a silent peer is still there; whole seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeepAlive {
    /// Silence before the first probe.
    pub after: Duration,
    /// Between two.
    pub interval: Duration,
    /// Without an answer, until the connection is given up.
    pub probes: u32,
}

impl Default for KeepAlive {
    /// Below the idle times at which NAT gateways and cloud load balancers forget a connection
    /// (350 s, 240 s).
    fn default() -> Self {
        Self {
            after: Duration::from_secs(60),
            interval: Duration::from_secs(15),
            probes: 4,
        }
    }
}

/// How connections are opened.
#[derive(Debug, Clone)]
pub struct Options {
    /// For the TCP handshake.
    pub connect_timeout: Duration,
    /// For the TLS handshake, which begins when TCP is connected.
    pub handshake_timeout: Duration,
    /// `None` sends no probes.
    pub keepalive: Option<KeepAlive>,
    /// `SO_MARK`, by which capture knows the proxy's own connections.
    pub mark: Option<u32>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connect_timeout: CONNECT_TIMEOUT,
            handshake_timeout: HANDSHAKE_TIMEOUT,
            keepalive: Some(KeepAlive::default()),
            mark: None,
        }
    }
}

/// Why there is no connection. In every case nothing of the application was sent, so that another
/// endpoint may be tried.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("{addr} refused the connection")]
    Refused { addr: SocketAddr },
    #[error("{addr} did not answer within {} ms", after.as_millis())]
    TimedOut { addr: SocketAddr, after: Duration },
    #[error("{addr} cannot be reached: {source}")]
    Unreachable { addr: SocketAddr, source: io::Error },
    /// The connection was made, and lost before the end of the TLS handshake.
    #[error("{addr} closed the connection during the TLS handshake: {source}")]
    Closed { addr: SocketAddr, source: io::Error },
    #[error("TLS with {addr}: {source}")]
    Tls { addr: SocketAddr, source: TlsError },
    /// The proxy's own side: no descriptors or ports left, no right to set a mark.
    #[error("no connection to {addr} could be opened: {source}")]
    Local { addr: SocketAddr, source: io::Error },
}

/// Why a TLS handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("the handshake did not end within {} ms", .0.as_millis())]
    TimedOut(Duration),
    #[error("the peer's certificate was not accepted: {0}")]
    Certificate(rustls::Error),
    #[error("the peer refused with alert {0:?}")]
    Alert(rustls::AlertDescription),
    #[error("{0}")]
    Protocol(rustls::Error),
    #[error("the connection was lost: {0}")]
    Lost(io::Error),
}

impl ConnectError {
    /// The error type of RFC 9209 section 2.3 for `Proxy-Status`.
    pub fn proxy_status(&self) -> &'static str {
        match self {
            Self::Refused { .. } => "connection_refused",
            Self::TimedOut { .. } => "connection_timeout",
            Self::Unreachable { .. } => "destination_ip_unroutable",
            Self::Closed { .. } => "connection_terminated",
            Self::Tls { source, .. } => source.proxy_status(),
            Self::Local { .. } => "proxy_internal_error",
        }
    }

    /// Whether the fault lies with the endpoint (and counts against it), not with the proxy.
    pub fn is_endpoints(&self) -> bool {
        !matches!(self, Self::Local { .. })
    }

    fn from_io(addr: SocketAddr, source: io::Error, after: Duration) -> Self {
        use io::ErrorKind as Kind;
        match source.kind() {
            // A reset in answer to a SYN is a refusal too, through some firewalls.
            Kind::ConnectionRefused | Kind::ConnectionReset => Self::Refused { addr },
            Kind::TimedOut => Self::TimedOut { addr, after },
            Kind::HostUnreachable | Kind::NetworkUnreachable | Kind::NetworkDown => {
                Self::Unreachable { addr, source }
            }
            _ => Self::Local { addr, source },
        }
    }

    fn from_tls(addr: SocketAddr, source: TlsError) -> Self {
        match source {
            TlsError::Lost(source) => Self::Closed { addr, source },
            source => Self::Tls { addr, source },
        }
    }
}

impl TlsError {
    /// The error type of RFC 9209 section 2.3 for `Proxy-Status`.
    pub fn proxy_status(&self) -> &'static str {
        match self {
            Self::TimedOut(_) => "connection_timeout",
            Self::Certificate(_) => "tls_certificate_error",
            Self::Alert(_) => "tls_alert_received",
            Self::Protocol(_) => "tls_protocol_error",
            Self::Lost(_) => "connection_terminated",
        }
    }

    /// What rustls says, out of the I/O error that tokio-rustls wraps it into. Useful after the
    /// handshake, too: with TLS 1.3 a server refuses a client's certificate only after the
    /// client's side of the handshake has ended, so the alert comes with the first read.
    pub fn from_io(error: io::Error) -> Self {
        match error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<rustls::Error>())
        {
            Some(rustls::Error::AlertReceived(alert)) => Self::Alert(*alert),
            Some(
                inner @ (rustls::Error::InvalidCertificate(_)
                | rustls::Error::NoCertificatesPresented),
            ) => Self::Certificate(inner.clone()),
            Some(inner) => Self::Protocol(inner.clone()),
            None => Self::Lost(error),
        }
    }
}

/// Opens a TCP connection.
///
/// # Errors
/// See [`ConnectError`]; none of its TLS kinds.
pub async fn connect_plain(addr: SocketAddr, options: &Options) -> Result<Stream, ConnectError> {
    Ok(Stream::from(connect_tcp(addr, options).await?))
}

/// Opens a TCP connection and does a TLS handshake over it. The server is named by its address,
/// so no SNI is sent (RFC 6066 section 3); who it is, `config`'s verifier decides.
///
/// # Errors
/// See [`ConnectError`].
pub async fn connect_tls(
    addr: SocketAddr,
    options: &Options,
    config: Arc<ClientConfig>,
) -> Result<Stream, ConnectError> {
    let name = ServerName::IpAddress(addr.ip().into());
    let tcp = connect_tcp(addr, options).await?;
    let tls = handshake(tcp, addr, options, name, config).await?;
    Ok(Io::Client(Box::new(tls)).into())
}

/// Opens a TCP connection to an address of a name outside the mesh; the others of the name
/// (`siblings`) are there in case that one does not answer.
///
/// # Errors
/// See [`ConnectError`]; none of its TLS kinds.
pub async fn connect_outside(
    addr: SocketAddr,
    siblings: Option<&Siblings>,
    options: &Options,
) -> Result<TcpStream, ConnectError> {
    match siblings {
        Some(siblings) => eyeballs::connect(addr, siblings, options).await,
        None => connect_tcp(addr, options).await,
    }
}

/// Does a TLS handshake with a server outside the mesh, in which it is called `name` and must show
/// that this is its name. `addr` is for errors.
///
/// # Errors
/// See [`ConnectError`]. A server that does not take the protocol offered, when that is HTTP/2, is
/// one.
pub async fn connect_origin(
    tcp: TcpStream,
    addr: SocketAddr,
    options: &Options,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
) -> Result<Stream, ConnectError> {
    let needs_h2 = config.alpn_protocols == [b"h2"];
    let tls = handshake(tcp, addr, options, name, config).await?;
    if needs_h2 && tls.get_ref().1.alpn_protocol() != Some(b"h2") {
        let text = "the server does not speak HTTP/2 (ALPN h2), as the application does";
        let source = TlsError::Protocol(rustls::Error::General(text.into()));
        return Err(ConnectError::Tls { addr, source });
    }
    Ok(Io::Origin(Box::new(tls)).into())
}

async fn handshake(
    tcp: TcpStream,
    addr: SocketAddr,
    options: &Options,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
) -> Result<tokio_rustls::client::TlsStream<Socket>, ConnectError> {
    let handshake =
        tokio_rustls::TlsConnector::from(config).connect(name, Socket::new(tcp, Bytes::new()));
    let fail = |source| ConnectError::from_tls(addr, source);
    // Boxed: the handshake's state is large and short-lived, the caller's future is neither.
    match timeout(options.handshake_timeout, Box::pin(handshake)).await {
        Ok(Ok(tls)) => Ok(tls),
        Ok(Err(error)) => Err(fail(TlsError::from_io(error))),
        Err(_) => Err(fail(TlsError::TimedOut(options.handshake_timeout))),
    }
}

/// Does the server's side of a TLS handshake on a plain connection whose ClientHello may have
/// been read already (into `prefix`). `deadline` is for the whole handshake; see
/// [`HANDSHAKE_TIMEOUT`].
///
/// # Errors
/// See [`TlsError`]. The peer was sent the alert, if there is one.
pub async fn accept_tls(
    stream: Stream,
    config: Arc<ServerConfig>,
    deadline: Duration,
) -> Result<Stream, TlsError> {
    let Io::Plain(tcp) = stream.io else {
        return Err(TlsError::Protocol(rustls::Error::General(
            "TLS inside TLS is not accepted".into(),
        )));
    };
    let handshake = tokio_rustls::TlsAcceptor::from(config).accept(Socket::new(tcp, stream.prefix));
    match timeout(deadline, Box::pin(handshake)).await {
        Ok(Ok(tls)) => Ok(Io::Server(Box::new(tls)).into()),
        Ok(Err(error)) => Err(TlsError::from_io(error)),
        Err(_) => Err(TlsError::TimedOut(deadline)),
    }
}

/// Sets what accepted connections inherit from their listener (Linux: no delay, keep-alive, urgent
/// bytes in their place), so that it costs nothing per connection.
///
/// # Errors
/// Those of setsockopt.
pub fn prepare_listener<S: std::os::fd::AsFd>(listener: &S, options: &Options) -> io::Result<()> {
    let socket = SockRef::from(listener);
    socket.set_tcp_nodelay(true)?;
    socket.set_out_of_band_inline(true)?;
    set_keepalive(&socket, options)
}

fn set_keepalive(socket: &SockRef<'_>, options: &Options) -> io::Result<()> {
    match options.keepalive {
        None => Ok(()),
        Some(keepalive) => socket.set_tcp_keepalive(
            &TcpKeepalive::new()
                .with_time(keepalive.after)
                .with_interval(keepalive.interval)
                .with_retries(keepalive.probes),
        ),
    }
}

pub(super) async fn connect_tcp(
    addr: SocketAddr,
    options: &Options,
) -> Result<TcpStream, ConnectError> {
    let socket = open(addr, options).map_err(|source| ConnectError::Local { addr, source })?;
    let after = options.connect_timeout;
    match timeout(after, socket.connect(addr)).await {
        Ok(Ok(tcp)) => Ok(tcp),
        Ok(Err(source)) => Err(ConnectError::from_io(addr, source, after)),
        Err(_) => Err(ConnectError::TimedOut { addr, after }),
    }
}

fn open(addr: SocketAddr, options: &Options) -> io::Result<TcpSocket> {
    let socket = match addr {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    let raw = SockRef::from(&socket);
    raw.set_tcp_nodelay(true)?;
    raw.set_out_of_band_inline(true)?;
    set_keepalive(&raw, options)?;
    if let Some(mark) = options.mark {
        raw.set_mark(mark)?;
    }
    Ok(socket)
}
