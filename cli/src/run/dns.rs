//! Names for the program. Its namespace has no way to this machine's resolver (often on loopback),
//! so queries to a port of the bridge's address are passed on to it. UDP, which capture leaves
//! alone.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::UdpSocket;
use tokio::sync::Semaphore;

const PORT: u16 = 53;
/// How long a resolver may take (resolv.conf(5): five seconds is the usual timeout).
const PATIENCE: Duration = Duration::from_secs(5);
/// Queries under way at once; more are dropped, and asked again by who asked.
const MAX_QUERIES: usize = 256;
/// Largest message, bytes: EDNS allows more than anybody sends.
const MAX_MESSAGE: usize = 4096;

/// The resolver of this machine's resolv.conf; `None` when it names none.
pub fn resolver(resolv_conf: &str) -> Option<SocketAddr> {
    resolv_conf.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let address: IpAddr = match words.next() {
            // A zone ("fe80::1%eth0") is this machine's affair and cannot be parsed here.
            Some("nameserver") => words.next()?.parse().ok()?,
            _ => return None,
        };
        Some(SocketAddr::new(address, PORT))
    })
}

/// What the program's resolv.conf says: everything of this machine's but the resolvers.
pub fn resolv_conf(machines: &str, resolver: Ipv4Addr) -> String {
    let mut out = format!("nameserver {resolver}\n");
    for line in machines.lines() {
        if line.starts_with("search") || line.starts_with("options") || line.starts_with("domain") {
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}

/// Answers queries at `address` by asking `resolver`. Every `weft run` of this machine does it at
/// the same address; the kernel gives each query to one of them.
pub fn listen(address: Ipv4Addr, resolver: SocketAddr) -> std::io::Result<()> {
    listen_at((address, PORT).into(), resolver).map(drop)
}

fn listen_at(address: SocketAddr, resolver: SocketAddr) -> std::io::Result<SocketAddr> {
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Inet,
        nix::sys::socket::SockType::Datagram,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC | nix::sys::socket::SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    setsockopt(&socket.as_fd(), sockopt::ReusePort, &true)?;
    let to = nix::sys::socket::SockaddrStorage::from(address);
    nix::sys::socket::bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &to)?;
    let socket = UdpSocket::from_std(std::net::UdpSocket::from(socket))?;
    let local = socket.local_addr()?;
    tokio::spawn(serve(Arc::new(socket), resolver));
    Ok(local)
}

async fn serve(socket: Arc<UdpSocket>, resolver: SocketAddr) {
    let room = Arc::new(Semaphore::new(MAX_QUERIES));
    let mut query = vec![0; MAX_MESSAGE];
    loop {
        let Ok((n, client)) = socket.recv_from(&mut query).await else {
            // An earlier answer could not be delivered.
            continue;
        };
        let Ok(place) = room.clone().try_acquire_owned() else {
            continue;
        };
        let (socket, query) = (socket.clone(), query[..n].to_vec());
        tokio::spawn(async move {
            if let Ok(Ok(answer)) = tokio::time::timeout(PATIENCE, ask(resolver, &query)).await {
                let _ = socket.send_to(&answer, client).await;
            }
            drop(place);
        });
    }
}

async fn ask(resolver: SocketAddr, query: &[u8]) -> std::io::Result<Vec<u8>> {
    let any: SocketAddr = match resolver {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    // A port of its own for each query, which whoever would forge an answer has to guess.
    let socket = UdpSocket::bind(any).await?;
    socket.connect(resolver).await?;
    socket.send(query).await?;
    let mut answer = vec![0; MAX_MESSAGE];
    let n = socket.recv(&mut answer).await?;
    answer.truncate(n);
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_resolver_is_asked_and_the_rest_of_the_file_stays() {
        let machines = "# comment\nsearch example.org\nnameserver fe80::1%eth0\nnameserver 127.0.0.53\nnameserver 9.9.9.9\noptions edns0\n";
        let expected = "127.0.0.53:53".parse().ok();
        assert_eq!(resolver(machines), expected);
        assert_eq!(resolver("search x\n"), None);
        assert_eq!(
            resolv_conf(machines, Ipv4Addr::new(10, 210, 0, 1)),
            "nameserver 10.210.0.1\nsearch example.org\noptions edns0\n"
        );
    }

    #[tokio::test]
    async fn queries_are_passed_on() {
        let machine = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let resolver = machine.local_addr().unwrap();
        tokio::spawn(async move {
            let mut query = [0; 512];
            loop {
                let (n, from) = machine.recv_from(&mut query).await.unwrap();
                query[..n].reverse();
                machine.send_to(&query[..n], from).await.unwrap();
            }
        });
        let at = listen_at("127.0.0.1:0".parse().unwrap(), resolver).unwrap();
        let program = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        program.connect(at).await.unwrap();
        let mut answer = [0; 512];
        for query in [b"abc".as_slice(), b"defgh"] {
            program.send(query).await.unwrap();
            let n = program.recv(&mut answer).await.unwrap();
            let reversed: Vec<u8> = query.iter().rev().copied().collect();
            assert_eq!(&answer[..n], reversed);
        }
    }
}
