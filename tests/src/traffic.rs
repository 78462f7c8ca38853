//! Requests in a loop from several clients at once, every failure kept.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::PATIENCE;
use crate::netns::Host;
use crate::wire::{header, status};

/// Clients that send GET requests over kept connections, one after the other.
pub struct Traffic {
    shared: Arc<Shared>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    sent: AtomicU64,
    outcomes: Mutex<BTreeMap<String, u64>>,
}

impl Traffic {
    /// Starts `clients` of them, each with a pause between its requests.
    pub fn start(host: &Host, to: SocketAddr, clients: usize, pause: Duration) -> Self {
        let shared = Arc::new(Shared::default());
        let threads = (0..clients)
            .map(|_| {
                let (shared, host) = (Arc::clone(&shared), host.clone());
                std::thread::spawn(move || client(&shared, &host, to, pause))
            })
            .collect();
        Self { shared, threads }
    }

    /// Requests that have ended so far.
    pub fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed)
    }

    /// Waits until so many more requests have ended.
    #[track_caller]
    pub fn wait_for(&self, more: u64) {
        let goal = self.sent() + more;
        crate::eventually("the requests go on", PATIENCE, || self.sent() >= goal);
    }

    /// Ends the clients; what became of the requests: `200 <body>` or an error, and how often.
    pub fn finish(self) -> BTreeMap<String, u64> {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().unwrap();
        }
        std::mem::take(&mut self.shared.outcomes.lock().unwrap())
    }
}

/// Panics when there is an outcome that does not begin with "200 ".
#[track_caller]
pub fn all_well(outcomes: &BTreeMap<String, u64>) {
    assert!(!outcomes.is_empty(), "no request was sent");
    assert!(
        outcomes.keys().all(|o| o.starts_with("200 ")),
        "{outcomes:?}"
    );
}

fn client(shared: &Shared, host: &Host, to: SocketAddr, pause: Duration) {
    let mut connection = None;
    while !shared.stop.load(Ordering::Relaxed) {
        let outcome = match request(&mut connection, host, to) {
            Ok(outcome) => outcome,
            Err(error) => {
                connection = None;
                format!("error: {error}")
            }
        };
        *shared.outcomes.lock().unwrap().entry(outcome).or_default() += 1;
        shared.sent.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(pause);
    }
}

/// One request, on the connection there is or a new one. A connection that its server has said it
/// closes is not used again; one that fails is the request's failure.
fn request(connection: &mut Option<TcpStream>, host: &Host, to: SocketAddr) -> io::Result<String> {
    let mut stream = match connection.take() {
        Some(stream) => stream,
        None => {
            let stream = host.within(|| TcpStream::connect_timeout(&to, PATIENCE))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_nodelay(true)?;
            stream
        }
    };
    stream.write_all(b"GET /traffic HTTP/1.1\r\nHost: traffic\r\n\r\n")?;
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let n = stream.read(&mut buffer)?;
        if n == 0 {
            return Err(io::Error::other(format!(
                "the connection ended after {} bytes of the answer",
                bytes.len()
            )));
        }
        bytes.extend_from_slice(&buffer[..n]);
        let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") else {
            continue;
        };
        let head = String::from_utf8_lossy(&bytes[..end + 4]).into_owned();
        let length: usize = header(&head, "content-length").map_or(0, |v| v.parse().unwrap_or(0));
        if bytes.len() < end + 4 + length {
            continue;
        }
        let body = String::from_utf8_lossy(&bytes[end + 4..]).into_owned();
        let closes = header(&head, "connection").is_some_and(|v| v.eq_ignore_ascii_case("close"));
        if !closes {
            *connection = Some(stream);
        }
        return Ok(format!("{} {body}", status(&head)));
    }
}
