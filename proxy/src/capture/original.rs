//! Where a captured connection was going.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

use socket2::SockRef;

/// The connection was made to the proxy's own port; netfilter did not redirect it.
///
/// A listener must not forward such a connection to its "destination": that is the listener
/// itself, and a loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the connection to {local} was not redirected by netfilter: its client dialled the proxy's \
     own port, or the capture rules do not stand (`weft-proxy init --check` says)"
)]
pub struct NotRedirected {
    /// The address the connection was accepted on, which is also where it was going.
    pub local: SocketAddr,
}

/// Whether an error of [`original_destination`] means that the connection was not redirected.
#[must_use]
pub fn is_not_redirected(error: &io::Error) -> bool {
    error
        .get_ref()
        .is_some_and(|inner| inner.is::<NotRedirected>())
}

/// Where an accepted connection was going before netfilter redirected it.
///
/// Works for IPv4 (`SO_ORIGINAL_DST`), for IPv6 (`IP6T_SO_ORIGINAL_DST`) and for IPv4 connections
/// accepted on a dual-stack listener, whose destination is returned as plain IPv4.
///
/// # Errors
/// [`NotRedirected`] inside the [`io::Error`] when the connection was made to this very address
/// (see [`is_not_redirected`]); any other error is the kernel's.
pub fn original_destination(socket: &impl AsFd) -> io::Result<SocketAddr> {
    let socket = SockRef::from(socket);
    let not_ip = || io::Error::new(io::ErrorKind::InvalidInput, "not an IP socket");
    let local = canonical(socket.local_addr()?.as_socket().ok_or_else(not_ip)?);
    let original = match local {
        SocketAddr::V4(_) => socket.original_dst_v4(),
        SocketAddr::V6(_) => socket.original_dst_v6(),
    };
    let original = match original {
        Ok(address) => canonical(address.as_socket().ok_or_else(not_ip)?),
        // No entry in the connection table, or no connection tracking at all: nobody redirected it.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOPROTOOPT)) => {
            return Err(not_redirected(local));
        }
        Err(error) => return Err(error),
    };
    if original.ip() == local.ip() && original.port() == local.port() {
        return Err(not_redirected(local));
    }
    Ok(original)
}

fn not_redirected(local: SocketAddr) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, NotRedirected { local })
}

/// ::ffff:10.0.0.1 as 10.0.0.1; everything else as it is (an IPv6 scope included).
fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        IpAddr::V4(v4) => SocketAddr::new(v4.into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn a_direct_connection_is_told_apart() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let error = original_destination(&accepted).unwrap_err();
        assert!(is_not_redirected(&error), "{error}");
        assert!(error.to_string().contains("init --check"), "{error}");
    }
}
