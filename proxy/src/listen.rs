//! Listeners: each worker has its own of every address (`SO_REUSEPORT`), and hands what it accepts
//! to the way out or the way in.

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};

use crate::capture::{is_not_redirected, original_destination};
use crate::config::Config;
use crate::transport::{self, prepare_listener};
use crate::worker::Worker;
use crate::{inbound, outbound};

/// Connections that wait to be accepted at most; a burst of them should not be refused.
const BACKLOG: i32 = 4096;
/// Pause after an error of accept that will not go away by itself at once (no descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Which way connections of a listener go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Out,
    In,
}

/// A listening socket and what its connections are.
#[derive(Debug)]
pub struct Listener {
    socket: std::net::TcpListener,
    way: Way,
    /// What its connections are meant for; `None`: netfilter says.
    to: Option<SocketAddr>,
}

/// Opens one worker's listeners.
///
/// # Errors
/// When an address is taken by another program, or may not be used.
pub fn open(config: &Config) -> io::Result<Vec<Listener>> {
    let mut listeners = Vec::new();
    for (way, port) in [
        (Way::Out, config.outbound_port),
        (Way::In, config.inbound_port),
    ] {
        let captured = config.forwards.is_empty();
        if !captured {
            continue;
        }
        // Outgoing connections are redirected to the loopback address; nobody else has business
        // there.
        let addresses = match way {
            Way::Out => [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
            Way::In => [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
        };
        for ip in addresses {
            let ip: IpAddr = ip;
            match bind(SocketAddr::new(ip, port)) {
                Ok(socket) => listeners.push(Listener {
                    socket,
                    way,
                    to: None,
                }),
                // A host without IPv6.
                Err(error) if ip.is_ipv6() && has_no_ipv6(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
    for forward in &config.forwards {
        let (way, ip) = if forward.inbound {
            (Way::In, Ipv4Addr::UNSPECIFIED)
        } else {
            (Way::Out, Ipv4Addr::LOCALHOST)
        };
        listeners.push(Listener {
            socket: bind(SocketAddr::new(ip.into(), forward.port))?,
            way,
            to: Some(forward.to),
        });
    }
    Ok(listeners)
}

fn has_no_ipv6(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
    )
}

fn bind(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let explain = |error: io::Error| {
        io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"))
    };
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    prepare_listener(&socket, &transport::Options::default())?;
    socket.bind(&address.into()).map_err(explain)?;
    socket.listen(BACKLOG).map_err(explain)?;
    Ok(socket.into())
}

/// Accepts until the worker drains; then takes what is already in the queue, and closes.
pub async fn run(worker: Rc<Worker>, listener: Listener) -> io::Result<()> {
    let Listener { socket, way, to } = listener;
    let socket = TcpListener::from_std(socket)?;
    loop {
        let accepted = tokio::select! {
            biased;
            accepted = socket.accept() => accepted,
            () = worker.drain.begun() => break,
        };
        match accepted {
            Ok((stream, peer)) => spawn(&worker, stream, peer, way, to),
            Err(error) => {
                tracing::warn!("a connection could not be accepted: {error}");
                if !is_the_connections(&error) {
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
    while let Some((stream, peer)) = queued(&socket).await {
        spawn(&worker, stream, peer, way, to);
    }
    Ok(())
}

/// A connection that waits to be accepted, if there is one.
async fn queued(socket: &TcpListener) -> Option<(TcpStream, SocketAddr)> {
    poll_fn(|cx| {
        Poll::Ready(match socket.poll_accept(cx) {
            Poll::Ready(accepted) => accepted.ok(),
            Poll::Pending => None,
        })
    })
    .await
}

/// Errors of the connection that was about to be accepted, not of the listener (accept(2)).
fn is_the_connections(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::ConnectionAborted | Kind::ConnectionReset | Kind::ConnectionRefused
    )
}

fn spawn(
    worker: &Rc<Worker>,
    stream: TcpStream,
    peer: SocketAddr,
    way: Way,
    to: Option<SocketAddr>,
) {
    let to = match to.map_or_else(|| original(worker, &stream), Ok) {
        Ok(to) => to,
        Err(reason) => {
            tracing::warn!(%peer, "connection closed: {reason}");
            return;
        }
    };
    let open = worker.opened();
    let worker = worker.clone();
    tokio::task::spawn_local(async move {
        match way {
            Way::Out => outbound::handle(worker, stream, peer, to).await,
            Way::In => inbound::handle(worker, stream, peer, to).await,
        }
        drop(open);
    });
}

/// Where the connection was meant to go. One that was made to the proxy itself goes nowhere: it
/// would come around for ever.
fn original(worker: &Worker, stream: &TcpStream) -> Result<SocketAddr, String> {
    let to = match original_destination(stream) {
        Ok(to) => to,
        Err(error) if is_not_redirected(&error) => {
            return Err("it was made to the proxy's own port, not captured".into());
        }
        Err(error) => return Err(format!("its original destination is unknown: {error}")),
    };
    let own = [worker.config.outbound_port, worker.config.inbound_port];
    let to_self = own.contains(&to.port()) && stream.local_addr().is_ok_and(|a| a == to);
    if to_self {
        return Err("it was made to the proxy's own port, not captured".into());
    }
    Ok(to)
}
