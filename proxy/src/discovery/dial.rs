//! A connection to the control plane: name, addresses, TCP, TLS, HTTP/2.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::LookupIpStrategy;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

use crate::identity::{explain, server_name};

/// How long one address may take to answer a connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// The next address is tried after this long even while the one before has not failed yet
/// (RFC 8305 section 5).
const NEXT_ADDRESS_AFTER: Duration = Duration::from_millis(250);
/// From the connection to the end of the TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// For all of a name's addresses.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Where the control plane is, and how it is reached.
#[derive(Debug, Clone)]
pub struct ControlPlane {
    /// Name or address.
    pub host: String,
    pub port: u16,
    /// SO_MARK of the connection.
    pub mark: Option<u32>,
    /// A ping goes out after this long without a byte.
    pub ping_after: Duration,
    /// And the connection is given up when this long passes without its answer.
    pub ping_timeout: Duration,
}

/// Why the control plane cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error("'{0}' is not host:port")]
    NotHostPort(String),
    #[error("the name '{host}' does not resolve: {reason}")]
    Resolve { host: String, reason: String },
    #[error("{address} does not take the connection: {source}")]
    Connect {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("TLS with {address} fails: {reason}")]
    Tls { address: SocketAddr, reason: String },
    #[error("HTTP/2 with {address} fails: {source}")]
    Http2 {
        address: SocketAddr,
        source: tonic::transport::Error,
    },
}

impl ControlPlane {
    /// From `host:port`, `address:port` or `[address]:port`.
    pub fn parse(given: &str, mark: Option<u32>) -> Result<Self, DialError> {
        let wrong = || DialError::NotHostPort(given.to_owned());
        let (host, port) = given.rsplit_once(':').ok_or_else(wrong)?;
        let port = port.parse().ok().filter(|p| *p != 0).ok_or_else(wrong)?;
        let host = host
            .strip_prefix('[')
            .and_then(|h| h.strip_suffix(']'))
            .unwrap_or(host);
        if host.is_empty() || (host.contains(':') && host.parse::<IpAddr>().is_err()) {
            return Err(wrong());
        }
        Ok(Self {
            host: host.to_owned(),
            port,
            mark,
            ping_after: Duration::from_secs(3),
            ping_timeout: Duration::from_secs(3),
        })
    }

    /// A new HTTP/2 connection under `tls`. The channel does not reconnect by itself: once the
    /// connection is gone, its calls fail.
    pub async fn connect(&self, tls: Arc<ClientConfig>) -> Result<Channel, DialError> {
        let (tcp, address) = self.connect_tcp().await?;
        let tls_failed = |reason| DialError::Tls { address, reason };
        let tls = match timeout(
            HANDSHAKE_TIMEOUT,
            TlsConnector::from(tls).connect(server_name(), tcp),
        )
        .await
        {
            Ok(Ok(tls)) => tls,
            Ok(Err(error)) => return Err(tls_failed(explain(&error))),
            Err(_) => return Err(tls_failed("no answer to the handshake in time".into())),
        };
        // The scheme says nothing of TLS here: the connector below is already through it.
        let mut endpoint = Endpoint::from_static("http://weft-control-plane")
            .http2_keep_alive_interval(self.ping_after)
            .keep_alive_timeout(self.ping_timeout)
            .keep_alive_while_idle(true);
        let origin = match self.host.parse() {
            Ok(IpAddr::V6(v6)) => format!("http://[{v6}]:{}", self.port),
            _ => format!("http://{}:{}", self.host, self.port),
        };
        if let Ok(origin) = origin.parse() {
            endpoint = endpoint.origin(origin);
        }
        let once = Arc::new(Mutex::new(Some(TokioIo::new(tls))));
        let connector = tower::service_fn(move |_| {
            let io = once.lock().unwrap_or_else(PoisonError::into_inner).take();
            async move { io.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)) }
        });
        endpoint
            .connect_with_connector(connector)
            .await
            .map_err(|source| DialError::Http2 { address, source })
    }

    async fn connect_tcp(&self) -> Result<(TcpStream, SocketAddr), DialError> {
        let mut addresses = self.addresses().await?.into_iter();
        let mut running = FuturesUnordered::new();
        let mut failed = None;
        loop {
            match addresses.next() {
                Some(address) => running.push(connect_one(address, self.mark)),
                None if running.is_empty() => {
                    return Err(failed.unwrap_or_else(|| DialError::Resolve {
                        host: self.host.clone(),
                        reason: "it has no addresses".into(),
                    }));
                }
                None => {}
            }
            let more = addresses.len() > 0;
            let done = if more {
                timeout(NEXT_ADDRESS_AFTER, running.next()).await.ok()
            } else {
                Some(running.next().await)
            };
            match done.flatten() {
                Some((address, Ok(tcp))) => return Ok((tcp, address)),
                Some((address, Err(source))) => {
                    failed = Some(DialError::Connect { address, source });
                }
                None => {}
            }
        }
    }

    /// All addresses, the families taking turns. The resolver's configuration is read each time:
    /// connects are rare, and /etc/resolv.conf and /etc/hosts change under long-lived proxies.
    async fn addresses(&self) -> Result<Vec<SocketAddr>, DialError> {
        if let Ok(ip) = self.host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(ip, self.port)]);
        }
        let failed = |reason: String| DialError::Resolve {
            host: self.host.clone(),
            reason,
        };
        let mut builder = TokioResolver::builder_tokio().map_err(|e| failed(e.to_string()))?;
        builder.options_mut().ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
        let resolver = builder.build().map_err(|e| failed(e.to_string()))?;
        let found = timeout(RESOLVE_TIMEOUT, resolver.lookup_ip(self.host.as_str()))
            .await
            .map_err(|_| failed("no name server answered in time".into()))?
            .map_err(|e| failed(e.to_string()))?;
        let (v6, v4): (Vec<IpAddr>, Vec<IpAddr>) = found.iter().partition(|ip| ip.is_ipv6());
        Ok(interleave(v6, v4)
            .into_iter()
            .map(|ip| SocketAddr::new(ip, self.port))
            .collect())
    }
}

/// One of each in turn, beginning with `a`.
fn interleave<T>(a: Vec<T>, b: Vec<T>) -> Vec<T> {
    let (mut a, mut b) = (a.into_iter(), b.into_iter());
    let mut all = Vec::with_capacity(a.len() + b.len());
    loop {
        let (x, y) = (a.next(), b.next());
        if x.is_none() && y.is_none() {
            return all;
        }
        all.extend(x);
        all.extend(y);
    }
}

async fn connect_one(
    address: SocketAddr,
    mark: Option<u32>,
) -> (SocketAddr, io::Result<TcpStream>) {
    let connect = async {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        if let Some(mark) = mark {
            socket2::SockRef::from(&socket).set_mark(mark)?;
        }
        socket.set_nodelay(true)?;
        socket.connect(address).await
    };
    let result = match timeout(CONNECT_TIMEOUT, connect).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "no answer to the connect in time",
        )),
    };
    (address, result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_and_port() {
        for (given, host, port) in [
            ("127.0.0.1:15010", "127.0.0.1", 15010),
            ("[fd00::1]:443", "fd00::1", 443),
            (
                "weft-control-plane.weft-system:15010",
                "weft-control-plane.weft-system",
                15010,
            ),
        ] {
            let parsed = ControlPlane::parse(given, None).unwrap();
            assert_eq!((parsed.host.as_str(), parsed.port), (host, port));
        }
        for bad in ["", "host", "host:", ":1", "host:0", "host:99999", "a:b:1"] {
            assert!(ControlPlane::parse(bad, None).is_err(), "{bad}");
        }
    }

    #[test]
    fn families_take_turns() {
        assert_eq!(interleave(vec![1, 2, 3], vec![9]), [1, 9, 2, 3]);
        assert_eq!(interleave(vec![], vec![9, 8]), [9, 8]);
    }
}
