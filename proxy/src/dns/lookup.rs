//! Asking DNS, by hickory.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hickory_resolver::Resolver;
use hickory_resolver::config::{LookupIpStrategy, NameServerConfig, ResolverConfig};
use hickory_resolver::net::runtime::iocompat::AsyncIoTokioAsStd;
use hickory_resolver::net::runtime::{
    RuntimeProvider, TokioHandle, TokioRuntimeProvider, TokioTime,
};
use hickory_resolver::net::{DnsError, NetError};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::time::timeout;

const PORT: u16 = 53;
/// For all tries of both families.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How often the system's configuration is read anew: /etc/resolv.conf and /etc/hosts change under
/// long-lived proxies.
const REREAD: Duration = Duration::from_secs(60);
/// How long it is believed that there is no such name when DNS does not say.
const NEGATIVE_TTL: Duration = Duration::from_secs(30);

/// What a name resolves to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Of both families; not empty.
    pub addresses: Vec<IpAddr>,
    /// How long that holds.
    pub ttl: Duration,
}

/// Why a name has no addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// DNS says so, for a time.
    NoSuchName { ttl: Duration },
    /// DNS could not be asked.
    Failed(String),
}

/// A future of a lookup.
pub type Answering<'a> = Pin<Box<dyn Future<Output = Result<Found, Failure>> + Send + 'a>>;

/// Something that can be asked.
pub trait Lookup: Send + Sync {
    fn lookup<'a>(&'a self, host: &'a str) -> Answering<'a>;

    /// Whether this is one of the servers that are asked.
    fn is_server(&self, _: SocketAddr) -> bool {
        false
    }
}

/// The resolvers of /etc/resolv.conf, or given ones.
pub struct SystemDns {
    servers: Vec<SocketAddr>,
    provider: Marked,
    current: Mutex<Option<(Instant, Arc<Families>)>>,
}

/// One resolver for each family: a failure of one is no failure of the other.
struct Families {
    v4: Resolver<Marked>,
    v6: Resolver<Marked>,
}

impl SystemDns {
    /// `servers`: asked instead of those of /etc/resolv.conf, when there are any. `mark` is put on
    /// TCP connections to them.
    pub fn new(servers: Vec<SocketAddr>, mark: Option<u32>) -> Self {
        Self {
            servers,
            provider: Marked {
                inner: TokioRuntimeProvider::new(),
                mark,
            },
            current: Mutex::default(),
        }
    }

    fn families(&self) -> Result<Arc<Families>, Failure> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((made, families)) = &*current
            && made.elapsed() < REREAD
        {
            return Ok(families.clone());
        }
        let families = Arc::new(Families {
            v4: self.resolver(LookupIpStrategy::Ipv4Only)?,
            v6: self.resolver(LookupIpStrategy::Ipv6Only)?,
        });
        *current = Some((Instant::now(), families.clone()));
        Ok(families)
    }

    fn resolver(&self, family: LookupIpStrategy) -> Result<Resolver<Marked>, Failure> {
        let failed = |error: NetError| Failure::Failed(error.to_string());
        let provider = self.provider.clone();
        let mut builder = if self.servers.is_empty() {
            Resolver::builder(provider).map_err(failed)?
        } else {
            let servers = self.servers.iter().map(|server| {
                let mut config = NameServerConfig::udp_and_tcp(server.ip());
                for connection in &mut config.connections {
                    connection.port = server.port();
                }
                config
            });
            let config = ResolverConfig::from_parts(None, Vec::new(), servers.collect());
            Resolver::builder_with_config(config, provider)
        };
        let options = builder.options_mut();
        options.ip_strategy = family;
        // What is kept, and for how long, is ours to say.
        options.cache_size = 0;
        builder.build().map_err(failed)
    }
}

impl Lookup for SystemDns {
    fn is_server(&self, address: SocketAddr) -> bool {
        if !self.servers.is_empty() {
            return self.servers.contains(&address);
        }
        if address.port() != PORT {
            return false;
        }
        let system = hickory_resolver::system_conf::read_system_conf();
        system.is_ok_and(|(config, _)| {
            let mut servers = config.name_servers.iter();
            servers.any(|server| server.ip == address.ip())
        })
    }

    fn lookup<'a>(&'a self, host: &'a str) -> Answering<'a> {
        Box::pin(async move {
            let families = self.families()?;
            // With the dot: the whole name, and none of the search list's.
            let rooted = format!("{host}.");
            let both = async {
                tokio::join!(
                    families.v4.lookup_ip(rooted.as_str()),
                    families.v6.lookup_ip(rooted.as_str())
                )
            };
            let (v4, v6) = timeout(TIMEOUT, both)
                .await
                .map_err(|_| Failure::Failed("no name server answered in time".into()))?;
            let read =
                |result: Result<hickory_resolver::lookup_ip::LookupIp, NetError>| match result {
                    Ok(found) => Ok(Found {
                        addresses: found.iter().map(|ip| ip.to_canonical()).collect(),
                        ttl: found
                            .valid_until()
                            .saturating_duration_since(Instant::now()),
                    }),
                    Err(NetError::Dns(DnsError::NoRecordsFound(none))) => {
                        Err(Failure::NoSuchName {
                            ttl: none
                                .negative_ttl
                                .map_or(NEGATIVE_TTL, |ttl| Duration::from_secs(ttl.into())),
                        })
                    }
                    Err(error) => Err(Failure::Failed(error.to_string())),
                };
            join(read(v4), read(v6))
        })
    }
}

/// What both families say together. A family that could not be asked, beside one that has
/// addresses, is asked for again soon.
fn join(v4: Result<Found, Failure>, v6: Result<Found, Failure>) -> Result<Found, Failure> {
    match (v4, v6) {
        (Ok(mut a), Ok(b)) => {
            a.addresses.extend(b.addresses);
            a.ttl = a.ttl.min(b.ttl);
            if a.addresses.is_empty() {
                return Err(Failure::NoSuchName { ttl: a.ttl });
            }
            Ok(a)
        }
        (Ok(one), Err(other)) | (Err(other), Ok(one)) if !one.addresses.is_empty() => {
            let mut one = one;
            if let Failure::Failed(reason) = other {
                tracing::debug!("one address family could not be asked for: {reason}");
                one.ttl = one.ttl.min(NEGATIVE_TTL);
            }
            Ok(one)
        }
        (Err(Failure::NoSuchName { ttl: a }), Err(Failure::NoSuchName { ttl: b })) => {
            Err(Failure::NoSuchName { ttl: a.min(b) })
        }
        // One has none, and what the other has cannot be known.
        (Err(failed @ Failure::Failed(_)), _) | (_, Err(failed)) => Err(failed),
        (Err(failed), _) => Err(failed),
    }
}

/// Tokio, with our mark on TCP connections: capture would take them for the application's.
#[derive(Clone)]
struct Marked {
    inner: TokioRuntimeProvider,
    mark: Option<u32>,
}

type Pinned<T> = Pin<Box<dyn Send + Future<Output = io::Result<T>>>>;

impl RuntimeProvider for Marked {
    type Handle = TokioHandle;
    type Timer = TokioTime;
    type Udp = UdpSocket;
    type Tcp = AsyncIoTokioAsStd<TcpStream>;

    fn create_handle(&self) -> Self::Handle {
        self.inner.create_handle()
    }

    fn connect_tcp(
        &self,
        server: SocketAddr,
        bind: Option<SocketAddr>,
        wait: Option<Duration>,
    ) -> Pinned<Self::Tcp> {
        let Some(mark) = self.mark else {
            return self.inner.connect_tcp(server, bind, wait);
        };
        Box::pin(async move {
            let socket = match server {
                SocketAddr::V4(_) => TcpSocket::new_v4()?,
                SocketAddr::V6(_) => TcpSocket::new_v6()?,
            };
            socket2::SockRef::from(&socket).set_mark(mark)?;
            if let Some(bind) = bind {
                socket.bind(bind)?;
            }
            socket.set_nodelay(true)?;
            let connecting = socket.connect(server);
            match timeout(wait.unwrap_or(TIMEOUT), connecting).await {
                Ok(connected) => Ok(AsyncIoTokioAsStd(connected?)),
                Err(_) => Err(io::ErrorKind::TimedOut.into()),
            }
        })
    }

    fn bind_udp(&self, local: SocketAddr, server: SocketAddr) -> Pinned<Self::Udp> {
        self.inner.bind_udp(local, server)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_together() {
        let found = |addresses: &[&str], seconds| {
            Ok(Found {
                addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
                ttl: Duration::from_secs(seconds),
            })
        };
        let none = |seconds| {
            Err(Failure::NoSuchName {
                ttl: Duration::from_secs(seconds),
            })
        };
        let failed = || Err(Failure::Failed("away".into()));
        assert_eq!(
            join(found(&["10.0.0.1"], 60), found(&["fd00::1"], 20)),
            found(&["10.0.0.1", "fd00::1"], 20)
        );
        assert_eq!(
            join(found(&["10.0.0.1"], 60), none(5)),
            found(&["10.0.0.1"], 60)
        );
        assert_eq!(
            join(none(5), found(&["fd00::1"], 60)),
            found(&["fd00::1"], 60)
        );
        assert_eq!(
            join(failed(), found(&["fd00::1"], 60)),
            found(&["fd00::1"], 30)
        );
        assert_eq!(join(none(5), none(9)), none(5));
        assert_eq!(join(none(5), failed()), failed());
        assert_eq!(join(failed(), none(5)), failed());
    }
}
