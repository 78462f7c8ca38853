//! What a workload may call outside the mesh, as far as it is known by name rather than address.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::join_all;
use tokio::time::Instant;

use super::directory::DestinationCell;
use crate::dns::{Dns, Name};

/// Names of wildcard hosts that are remembered at once.
const MAX_NAMES: usize = 4096;

/// The hosts by port, and whether anything else may be called.
#[derive(Debug, Default)]
pub struct Outside {
    /// What is not known is refused.
    pub registry_only: bool,
    ports: HashMap<u16, Hosts>,
}

/// The hosts of one port.
#[derive(Debug, Default)]
pub struct Hosts {
    exact: Vec<Host>,
    wildcards: Vec<(Box<str>, Arc<DestinationCell>)>,
    /// Names below the wildcards that were called.
    called: Mutex<HashMap<Box<str>, Arc<Name>>>,
}

/// A host, and what connections to it are.
#[derive(Debug, Clone)]
pub struct Host {
    /// In lower case.
    pub name: Arc<Name>,
    pub cell: Arc<DestinationCell>,
}

impl Outside {
    /// From hosts in order of precedence: of those with the same name and port the first is taken.
    pub(super) fn new(
        registry_only: bool,
        dns: &Dns,
        hosts: impl IntoIterator<Item = (Box<str>, Arc<DestinationCell>)>,
    ) -> Self {
        let mut ports: HashMap<u16, Hosts> = HashMap::new();
        for (host, cell) in hosts {
            let port = ports.entry(cell.address.port()).or_default();
            match host.strip_prefix('*') {
                Some(suffix) => port.wildcards.push((suffix.into(), cell)),
                None => port.exact.push(Host {
                    name: dns.name(&host),
                    cell,
                }),
            }
        }
        Self {
            registry_only,
            ports,
        }
    }

    /// Every host as it is written, with what connections to it are.
    pub fn hosts(&self) -> impl Iterator<Item = (String, &Arc<DestinationCell>)> {
        self.ports.values().flat_map(|port| {
            let exact = port.exact.iter();
            let exact = exact.map(|host| (host.name.host.to_string(), &host.cell));
            let wildcards = port.wildcards.iter();
            exact.chain(wildcards.map(|(suffix, cell)| (format!("*{suffix}"), cell)))
        })
    }

    /// The hosts of a port; `None` when there are none.
    pub fn port(&self, port: u16) -> Option<&Hosts> {
        self.ports.get(&port)
    }
}

impl Hosts {
    /// The hosts that an address is one of, as DNS says.
    pub async fn at(&self, address: IpAddr, deadline: Instant) -> Vec<Host> {
        let asked = self.exact.iter().map(|host| async move {
            let is_its = host.name.has(address, deadline).await;
            is_its.then(|| host.clone())
        });
        join_all(asked).await.into_iter().flatten().collect()
    }

    pub fn has_wildcards(&self) -> bool {
        !self.wildcards.is_empty()
    }

    /// What a name (in lower case) below a wildcard is, if the address that was called is one of
    /// the name's: a name alone says nothing.
    pub async fn below(
        &self,
        dns: &Dns,
        name: &str,
        to: SocketAddr,
        deadline: Instant,
    ) -> Option<Arc<DestinationCell>> {
        let fits = |suffix: &str| name.len() > suffix.len() && name.ends_with(suffix);
        let (_, cell) = self.wildcards.iter().find(|(suffix, _)| fits(suffix))?;
        let resolved = {
            let mut called = self.called.lock().unwrap_or_else(PoisonError::into_inner);
            if called.len() >= MAX_NAMES {
                called.clear();
            }
            let known = called.entry(name.into());
            known.or_insert_with(|| dns.name(name)).clone()
        };
        let is_its = resolved.has(to.ip(), deadline).await;
        is_its.then(|| cell.clone())
    }
}
