//! `weft-proxy wait`: for the lifecycle hooks of a container that Kubernetes starts and ends together
//! with the application (a sidecar below Kubernetes 1.29).
//!
//! The kubelet starts a pod's next container when the hook of the one before has returned, and sends
//! SIGTERM when the hook before the end has: so the application starts after the proxy, and ends before
//! it, as with a native sidecar.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::thread::sleep;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use weft_api::names;

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(100);
/// The admin port is on this host: an answer takes no longer.
const ANSWER: Duration = Duration::from_secs(2);
/// Bytes of an answer that are looked at: its status line, and a reason.
const MAX_ANSWER: u64 = 4096;

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum What {
    /// The proxy of this network namespace has its certificate and its tables. Fails when it does not
    /// come to that in time.
    Ready,
    /// No other user of this network namespace listens on a TCP port or has a connection: the
    /// application has ended. Gives up without an error, because then the proxy is to end anyway.
    Alone,
}

/// Wait until the proxy is ready, or until the application has ended.
#[derive(Clone, Debug, Args)]
pub struct Command {
    pub what: What,
    /// For how long at most, seconds.
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    pub within: u64,
    /// Where the proxy's admin port is.
    #[arg(long, env = "WEFT_ADMIN", default_value_t = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), names::ADMIN_PORT))]
    pub admin: SocketAddr,
}

/// Waits.
///
/// # Errors
/// The proxy was not ready in time, or who else is there cannot be read.
pub fn run(command: &Command) -> anyhow::Result<()> {
    let end = Instant::now() + Duration::from_secs(command.within);
    match command.what {
        What::Ready => {
            let admin = own(command.admin);
            while let Err(why) = ready(admin) {
                if Instant::now() >= end {
                    anyhow::bail!("the proxy was not ready within {} s: {why}", command.within);
                }
                sleep(PAUSE);
            }
        }
        What::Alone => {
            let own = nix::unistd::geteuid().as_raw();
            while sockets_of_others(own)? > 0 && Instant::now() < end {
                sleep(PAUSE);
            }
        }
    }
    Ok(())
}

/// An address to connect to, of one to listen on.
fn own(admin: SocketAddr) -> SocketAddr {
    match admin.ip() {
        ip if !ip.is_unspecified() => admin,
        IpAddr::V4(_) => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), admin.port()),
        IpAddr::V6(_) => SocketAddr::new(std::net::Ipv6Addr::LOCALHOST.into(), admin.port()),
    }
}

/// Whether the proxy says that it is ready; else what it says, or why it says nothing.
fn ready(admin: SocketAddr) -> Result<(), String> {
    let ask = || -> io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&admin, ANSWER)?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: weft\r\nConnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.take(MAX_ANSWER).read_to_end(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    let answer = ask().map_err(|error| format!("{admin} does not answer: {error}"))?;
    if answer.starts_with("HTTP/1.1 200 ") {
        return Ok(());
    }
    let (_, body) = answer.split_once("\r\n\r\n").unwrap_or(("", &answer));
    Err(body.trim().to_owned())
}

fn sockets_of_others(own: u32) -> io::Result<usize> {
    let mut others = 0;
    for file in ["/proc/net/tcp", "/proc/net/tcp6"] {
        match std::fs::read_to_string(file) {
            Ok(text) => others += count(&text, own),
            // No IPv6 here.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(others)
}

/// Sockets that listen or are connected and belong to another user than `own`, of a table as in
/// proc_pid_net(5): the fourth column is the state, the eighth the user. What a process that has ended
/// leaves behind is in other states.
fn count(table: &str, own: u32) -> usize {
    const ESTABLISHED: &str = "01";
    const LISTEN: &str = "0A";
    let is_others = |line: &&str| {
        let mut columns = line.split_whitespace();
        let state = columns.nth(3);
        let user: Option<u32> = columns.nth(3).and_then(|user| user.parse().ok());
        matches!(state, Some(ESTABLISHED | LISTEN)) && user.is_some_and(|user| user != own)
    };
    table.lines().skip(1).filter(is_others).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    const TABLE: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:3A9E 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1337        0 11 1 0 100 0 0 10 0
   1: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 12 1 0 100 0 0 10 0
   2: 0100007F:8C3A 0100007F:1F90 01 00000000:00000000 00:00000000 00000000  1337        0 13 1 0 20 4 30 10 -1
   3: 0100007F:1F90 0100007F:8C3A 01 00000000:00000000 00:00000000 00000000     0        0 14 1 0 20 4 30 10 -1
   4: 0100007F:1F91 0100007F:8C3B 06 00000000:00000000 03:00000A5C 00000000     0        0 0 3 0
   5: 0100007F:1F91 0100007F:8C3C 04 00000000:00000000 00:00000000 00000000  1000        0 0 1 0 20 4 30 10 -1
";

    #[test]
    fn whoever_listens_or_talks_is_there() {
        assert_eq!(count(TABLE, 1337), 2, "one listens, one talks");
        let gone: Vec<&str> = TABLE
            .lines()
            .filter(|line| !line.contains(" 1000 "))
            .collect();
        assert_eq!(count(&gone.join("\n"), 1337), 1);
        assert_eq!(count(&gone.join("\n"), 0), 2);
        assert_eq!(count("", 0), 0);
        // This very process, of the files as the kernel writes them.
        let _listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let own = nix::unistd::geteuid().as_raw();
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        assert!(count(&table, own + 1) > count("", 0), "{table}");
    }

    /// A proxy that is not there, then not ready, then ready.
    #[test]
    fn ready_is_what_the_proxy_says() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let admin = listener.local_addr().unwrap();
        let answers = [
            "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 20\r\n\r\nwaiting for its roots",
            "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        ];
        let server = std::thread::spawn(move || {
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let mut buffer = [0; 1024];
                let read = stream.read(&mut buffer).unwrap();
                assert!(buffer[..read].starts_with(b"GET /readyz HTTP/1.1\r\n"));
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        assert_eq!(ready(admin), Err("waiting for its roots".to_owned()));
        let command = |within| Command {
            what: What::Ready,
            within,
            admin,
        };
        run(&command(60)).unwrap();
        server.join().unwrap();
        let gone = run(&command(0)).unwrap_err().to_string();
        assert!(
            gone.contains("was not ready within 0 s") && gone.contains("does not answer"),
            "{gone}"
        );
    }

    #[test]
    fn an_address_to_listen_on_is_asked_on_this_host() {
        for (given, asked) in [
            ("0.0.0.0:15020", "127.0.0.1:15020"),
            ("[::]:15020", "[::1]:15020"),
            ("10.0.0.7:1", "10.0.0.7:1"),
        ] {
            assert_eq!(own(given.parse().unwrap()).to_string(), asked);
        }
    }
}
