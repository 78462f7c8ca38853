//! Connecting to a name of both address families: "happy eyeballs" (RFC 8305).
//!
//! The endpoint that was chosen is tried first; after 250 ms without an answer, or when it fails,
//! the next address, of the other family first. Who answers first is taken. So a family that does
//! not work costs a connection 250 ms, and the next ones nothing: the one that works goes first
//! for ten minutes.

use std::net::SocketAddr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::connect::{ConnectError, Options, connect_tcp};
use crate::dns::alternate;

/// "Connection Attempt Delay" (RFC 8305 section 5).
const NEXT_AFTER: Duration = Duration::from_millis(250);
/// Addresses tried for one connection.
const MAX_TRIES: usize = 6;
/// How long the other family goes first.
const REMEMBER: Duration = Duration::from_secs(600);

/// All addresses of a name, and which family did not work of late.
#[derive(Debug, Default)]
pub struct Siblings {
    addresses: ArcSwap<Vec<SocketAddr>>,
    /// Until when the family goes second, milliseconds of our clock: IPv4, IPv6.
    second: [AtomicU64; 2],
}

fn now() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let since = START.get_or_init(Instant::now).elapsed();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl Siblings {
    /// What the name has now.
    pub fn set(&self, addresses: Vec<SocketAddr>) {
        self.addresses.store(addresses.into());
    }

    fn second(&self, of: SocketAddr) -> &AtomicU64 {
        &self.second[usize::from(of.is_ipv6())]
    }

    /// The addresses to try, in order.
    fn order(&self, chosen: SocketAddr) -> Vec<SocketAddr> {
        let mut order = alternate(chosen, &self.addresses.load());
        let other = order
            .get(1)
            .is_some_and(|a| a.is_ipv4() != chosen.is_ipv4());
        if other && self.second(chosen).load(Ordering::Relaxed) > now() {
            order.swap(0, 1);
        }
        order.truncate(MAX_TRIES);
        order
    }

    /// A connection has come about.
    fn learn(&self, chosen: SocketAddr, answered: SocketAddr) {
        if chosen.is_ipv4() != answered.is_ipv4() {
            let until = now() + u64::try_from(REMEMBER.as_millis()).unwrap_or(u64::MAX);
            self.second(chosen).store(until, Ordering::Relaxed);
        }
        self.second(answered).store(0, Ordering::Relaxed);
    }
}

/// Opens a TCP connection to the chosen address, or to another one of the same name.
///
/// # Errors
/// What happened to the chosen address, when none answers.
pub(super) async fn connect(
    chosen: SocketAddr,
    siblings: &Siblings,
    options: &Options,
) -> Result<TcpStream, ConnectError> {
    let mut addresses = siblings.order(chosen).into_iter();
    let mut running = FuturesUnordered::new();
    let mut failed: Option<ConnectError> = None;
    loop {
        match addresses.next() {
            Some(address) => {
                running.push(async move { (address, connect_tcp(address, options).await) })
            }
            None if running.is_empty() => {
                // The first of the order is there, so it has failed.
                return Err(failed.unwrap_or(ConnectError::TimedOut {
                    addr: chosen,
                    after: options.connect_timeout,
                }));
            }
            None => {}
        }
        let done = if addresses.len() > 0 {
            timeout(NEXT_AFTER, running.next()).await.ok()
        } else {
            Some(running.next().await)
        };
        match done.flatten() {
            Some((address, Ok(tcp))) => {
                siblings.learn(chosen, address);
                return Ok(tcp);
            }
            Some((address, Err(error))) if failed.is_none() || address == chosen => {
                failed = Some(error);
            }
            Some((_, Err(_))) | None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(address: &str) -> SocketAddr {
        address.parse().unwrap()
    }

    #[test]
    fn families_take_turns_and_the_one_that_works_goes_first() {
        let (a, b) = (at("10.0.0.1:80"), at("10.0.0.2:80"));
        let (x, y) = (at("[fd00::1]:80"), at("[fd00::2]:80"));
        let siblings = Siblings::default();
        siblings.set(vec![a, b, x, y]);
        assert_eq!(siblings.order(x), [x, a, y, b]);
        assert_eq!(siblings.order(b), [b, x, a, y]);
        siblings.learn(x, a);
        assert_eq!(siblings.order(x), [a, x, y, b]);
        assert_eq!(siblings.order(b), [b, x, a, y]);
        // It works again.
        siblings.learn(x, x);
        assert_eq!(siblings.order(x), [x, a, y, b]);
        siblings.set(vec![a]);
        assert_eq!(siblings.order(a), [a]);
    }

    /// Nobody listens on the IPv6 address: refused at once, so there is no wait either.
    #[tokio::test]
    async fn an_address_that_refuses_costs_nothing() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let good = listener.local_addr().unwrap();
        let bad = SocketAddr::new(std::net::Ipv6Addr::LOCALHOST.into(), good.port());
        let siblings = Siblings::default();
        siblings.set(vec![bad, good]);
        let began = Instant::now();
        let tcp = connect(bad, &siblings, &Options::default()).await.unwrap();
        assert_eq!(tcp.peer_addr().unwrap(), good);
        assert!(began.elapsed() < NEXT_AFTER, "{:?}", began.elapsed());
        assert_eq!(siblings.order(bad)[0], good);
        drop(listener);
        let error = connect(bad, &siblings, &Options::default())
            .await
            .unwrap_err();
        assert!(
            matches!(error, ConnectError::Refused { addr } if addr == bad),
            "{error}"
        );
    }
}
