//! What goes over a host's wire, seen on its network device.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::netns::Host;

/// Everything that a host sends and receives, loopback left out, from now on.
pub struct Sniffer {
    bytes: Arc<Mutex<Vec<u8>>>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Sniffer {
    pub fn start(host: &Host) -> Self {
        let socket: OwnedFd = host
            .within(|| {
                let socket = socket(
                    AddressFamily::Packet,
                    SockType::Raw,
                    SockFlag::SOCK_CLOEXEC,
                    SockProtocol::EthAll,
                )?;
                setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, 50_000))?;
                setsockopt(&socket, sockopt::RcvBuf, &(8 << 20))?;
                Ok(socket)
            })
            .unwrap();
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (into, stopped) = (Arc::clone(&bytes), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut frame = vec![0; 128 * 1024];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok(n) = recv(socket.as_raw_fd(), &mut frame, MsgFlags::empty()) {
                    // Frames to and from oneself go over lo and have no hardware addresses; what
                    // an application and its own proxy say to each other is not the wire's.
                    if frame[..n.min(12)].iter().any(|b| *b != 0) {
                        into.lock().unwrap().extend_from_slice(&frame[..n]);
                    }
                }
            }
        });
        Self {
            bytes,
            stop,
            thread: Some(thread),
        }
    }

    /// All frames, one after the other.
    pub fn finish(mut self) -> Vec<u8> {
        std::thread::sleep(Duration::from_millis(100));
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        std::mem::take(&mut self.bytes.lock().unwrap())
    }
}

/// Whether the frames hold a text.
pub fn contains(frames: &[u8], text: &str) -> bool {
    frames.windows(text.len()).any(|w| w == text.as_bytes())
}
