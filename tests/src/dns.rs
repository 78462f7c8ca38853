//! A DNS server that says what a test wants, on a host of its own.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::netns::Host;

const PORT: u16 = 53;
const A: u16 = 1;
const AAAA: u16 = 28;
const NXDOMAIN: u8 = 3;

/// Answers until it is dropped.
pub struct Dns {
    shared: Arc<Shared>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    /// Addresses and TTL (seconds) of names in lower case.
    zone: Mutex<BTreeMap<String, (Vec<IpAddr>, u32)>>,
    /// Does not answer.
    silent: AtomicBool,
    asked: AtomicUsize,
    over: AtomicBool,
}

impl Dns {
    pub fn start(host: &Host) -> Self {
        let address = SocketAddr::new(host.v4().into(), PORT);
        let socket = host.within(|| UdpSocket::bind(address)).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(50)))
            .unwrap();
        let shared = Arc::new(Shared::default());
        let thread = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || serve(&socket, &shared)
        });
        Self {
            shared,
            address,
            thread: Some(thread),
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What a name has from now on; no addresses: there is no such name.
    pub fn set(&self, name: &str, addresses: &[IpAddr], ttl: u32) {
        let mut zone = self.shared.zone.lock().unwrap();
        zone.insert(name.to_owned(), (addresses.to_vec(), ttl));
    }

    /// Whether it answers.
    pub fn silence(&self, silent: bool) {
        self.shared.silent.store(silent, Ordering::SeqCst);
    }

    /// Questions so far.
    pub fn asked(&self) -> usize {
        self.shared.asked.load(Ordering::SeqCst)
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(socket: &UdpSocket, shared: &Shared) {
    let mut query = [0; 1500];
    while !shared.over.load(Ordering::SeqCst) {
        let Ok((n, client)) = socket.recv_from(&mut query) else {
            continue;
        };
        shared.asked.fetch_add(1, Ordering::SeqCst);
        if shared.silent.load(Ordering::SeqCst) {
            continue;
        }
        if let Some(answer) = answer(&query[..n], &shared.zone.lock().unwrap()) {
            let _ = socket.send_to(&answer, client);
        }
    }
}

/// RFC 1035 section 4: the question again, and a record for each address of the family asked for.
fn answer(query: &[u8], zone: &BTreeMap<String, (Vec<IpAddr>, u32)>) -> Option<Vec<u8>> {
    let mut at = 12;
    let mut labels = Vec::new();
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        let label = query.get(at..at + length)?;
        labels.push(String::from_utf8_lossy(label).to_ascii_lowercase());
        at += length;
    }
    let kind = u16::from_be_bytes([*query.get(at)?, *query.get(at + 1)?]);
    let question = query.get(12..at + 4)?;
    let known = zone
        .get(&labels.join("."))
        .filter(|(all, _)| !all.is_empty());
    let records: Vec<Vec<u8>> = known
        .iter()
        .flat_map(|(addresses, _)| addresses)
        .filter_map(|address| match address {
            IpAddr::V4(v4) if kind == A => Some(v4.octets().to_vec()),
            IpAddr::V6(v6) if kind == AAAA => Some(v6.octets().to_vec()),
            _ => None,
        })
        .collect();
    let code = if known.is_none() { NXDOMAIN } else { 0 };
    let mut out = query[..2].to_vec();
    // An authoritative answer, recursion available.
    out.extend([0x84 | (query[2] & 1), 0x80 | code]);
    out.extend([0, 1]);
    out.extend(u16::try_from(records.len()).ok()?.to_be_bytes());
    out.extend([0, 0, 0, 0]);
    out.extend(question);
    for record in records {
        // The name is that of the question.
        out.extend([0xc0, 12]);
        out.extend(kind.to_be_bytes());
        out.extend([0, 1]);
        out.extend(known.map_or(0, |(_, ttl)| *ttl).to_be_bytes());
        out.extend(u16::try_from(record.len()).ok()?.to_be_bytes());
        out.extend(record);
    }
    Some(out)
}
