//! From the addresses of names to the endpoints of a backend.

use std::net::SocketAddr;
use std::sync::{Arc, Weak};

use tokio::time::Instant;
use weft_api::proto;

use super::{Dns, Name};
use crate::discovery::endpoints;
use crate::tables::EndpointsCell;
use crate::transport::Siblings;

/// What the names of endpoints begin with that are the proxy's own to find out.
const BY_DNS: &str = "dns/";
const ORIGINAL: &str = "original/";

/// Endpoints that this proxy finds out by itself.
#[derive(Debug)]
pub struct Feed {
    cell: Weak<EndpointsCell>,
    parts: Vec<Part<Arc<Name>>>,
    siblings: Arc<Siblings>,
}

/// A part of a backend's endpoints: what a name has, with a port, or an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part<N> {
    Name(N, u16),
    Address(SocketAddr),
}

/// Endpoints whose name makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' names no endpoints")]
pub struct InvalidFeed(String);

/// Whether Endpoints of this name are the proxy's own to find out, and no resource.
pub fn is_local(name: &str) -> bool {
    name.starts_with(BY_DNS) || name.starts_with(ORIGINAL) || name == super::super::tables::ORIGINAL
}

/// The parts of endpoints with a name of one of our own kinds.
///
/// # Errors
/// It is of our own kinds and makes no sense.
pub fn parts(name: &str) -> Result<Vec<Part<&str>>, InvalidFeed> {
    let wrong = || InvalidFeed(name.to_owned());
    if let Some(address) = name.strip_prefix(ORIGINAL) {
        return Ok(vec![Part::Address(address.parse().map_err(|_| wrong())?)]);
    }
    let Some(list) = name.strip_prefix(BY_DNS) else {
        return Ok(Vec::new());
    };
    list.split(',')
        .map(|part| {
            if let Ok(address) = part.parse() {
                return Ok(Part::Address(address));
            }
            let (host, port) = part.rsplit_once(':').ok_or_else(wrong)?;
            let port = port.parse().ok().filter(|port| *port != 0);
            match port {
                Some(port) if !host.is_empty() => Ok(Part::Name(host, port)),
                _ => Err(wrong()),
            }
        })
        .collect()
}

impl Feed {
    /// A cell for endpoints of this name, fed from now on.
    pub fn cell(dns: &Dns, name: &str) -> Result<Arc<EndpointsCell>, InvalidFeed> {
        let parts = parts(name)?
            .into_iter()
            .map(|part| match part {
                Part::Name(host, port) => Part::Name(dns.name(host), port),
                Part::Address(address) => Part::Address(address),
            })
            .collect();
        let mut feed = None;
        let cell = Arc::new_cyclic(|cell: &Weak<EndpointsCell>| {
            let new = Arc::new(Self {
                cell: cell.clone(),
                parts,
                siblings: Arc::default(),
            });
            feed = Some(new.clone());
            EndpointsCell {
                name: name.into(),
                feed: Some(new),
                ..EndpointsCell::default()
            }
        });
        if let Some(feed) = feed {
            for part in &feed.parts {
                if let Part::Name(name, _) = part {
                    name.fed(&feed);
                }
            }
            feed.fill();
        }
        Ok(cell)
    }

    /// Names are asked for from now on; ready when each has been, or at `deadline`.
    pub async fn settled(&self, deadline: Instant) {
        for part in &self.parts {
            if let Part::Name(name, _) = part {
                name.want();
            }
        }
        for part in &self.parts {
            if let Part::Name(name, _) = part {
                name.asked(deadline).await;
            }
        }
    }

    /// Why there are no endpoints, when DNS is to blame.
    pub fn problem(&self) -> Option<String> {
        self.parts.iter().find_map(|part| match part {
            Part::Name(name, _) => name.answer().problem.clone(),
            Part::Address(_) => None,
        })
    }

    /// Writes what is known now into the cell.
    pub(super) fn fill(&self) {
        let Some(cell) = self.cell.upgrade() else {
            return;
        };
        let mut given = Vec::new();
        for part in &self.parts {
            match part {
                Part::Address(address) => given.push((*address, "")),
                Part::Name(name, port) => {
                    let answer = name.answer();
                    let addresses = answer.addresses.iter();
                    given.extend(addresses.map(|ip| (SocketAddr::new(*ip, *port), &*name.host)));
                }
            }
        }
        // Another part with the same address counts once.
        let endpoints = given.iter().map(|(address, host)| proto::Endpoint {
            address: address.to_string(),
            workload: (*host).to_owned(),
            weight: 1,
            ..proto::Endpoint::default()
        });
        let given_endpoints = proto::Endpoints {
            endpoints: endpoints.filter(usable).collect(),
            node_local: false,
        };
        let siblings: Vec<SocketAddr> = given.iter().map(|(address, _)| *address).collect();
        let both =
            siblings.iter().any(SocketAddr::is_ipv4) && siblings.iter().any(SocketAddr::is_ipv6);
        self.siblings.set(siblings);
        let siblings = both.then_some(&self.siblings);
        cell.current.rcu(|before| {
            match endpoints::endpoints_with(&given_endpoints, before, siblings) {
                Ok(next) => Arc::new(next),
                // Every address has been looked at.
                Err(_) => before.clone(),
            }
        });
    }
}

/// Whether an address can be connected to; DNS may say anything.
fn usable(endpoint: &proto::Endpoint) -> bool {
    endpoint.address.parse().is_ok_and(|address: SocketAddr| {
        !address.ip().is_unspecified() && !address.ip().is_multicast() && address.port() != 0
    })
}
