//! The ear: looks for bytes in the frames of every network device but loopback.

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

#[derive(clap::Args)]
pub struct Options {
    /// Looked for; may be repeated
    #[arg(required = true)]
    needles: Vec<String>,
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Only frames that contain this TCP port in their header
    #[arg(long)]
    port: Option<u16>,
}

/// The TCP ports of an Ethernet frame that carries IPv4, if it does.
fn ports(frame: &[u8]) -> Option<(u16, u16)> {
    if frame.get(12..14)? != [8, 0] || *frame.get(23)? != 6 {
        return None;
    }
    let header = usize::from(frame.get(14)? & 15) * 4;
    let tcp = frame.get(14 + header..)?;
    Some((
        u16::from_be_bytes([*tcp.first()?, *tcp.get(1)?]),
        u16::from_be_bytes([*tcp.get(2)?, *tcp.get(3)?]),
    ))
}

pub fn run(options: &Options) {
    let socket = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::EthAll,
    )
    .expect("a packet socket needs NET_RAW");
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, 50_000)).unwrap();
    let _ = setsockopt(&socket, sockopt::RcvBuf, &(8 << 20));
    let end = Instant::now() + Duration::from_secs_f64(options.seconds);
    let mut frame = vec![0; 256 * 1024];
    let (mut frames, mut bytes) = (0_u64, 0_u64);
    let mut found = vec![0_u64; options.needles.len()];
    while Instant::now() < end {
        let Ok(n) = recv(socket.as_raw_fd(), &mut frame, MsgFlags::empty()) else {
            continue;
        };
        let frame = &frame[..n];
        let ours = match (options.port, ports(frame)) {
            (None, _) => true,
            (Some(port), Some((from, to))) => from == port || to == port,
            (Some(_), None) => false,
        };
        // On loopback frames have no hardware addresses.
        if !ours || frame.iter().take(12).all(|b| *b == 0) {
            continue;
        }
        frames += 1;
        bytes += n as u64;
        for (needle, count) in options.needles.iter().zip(&mut found) {
            let needle = needle.as_bytes();
            *count += u64::from(frame.windows(needle.len()).any(|w| w == needle));
        }
    }
    let found: serde_json::Map<String, serde_json::Value> = options
        .needles
        .iter()
        .cloned()
        .zip(found.into_iter().map(Into::into))
        .collect();
    println!(
        "{}",
        serde_json::json!({ "frames": frames, "bytes": bytes, "found": found })
    );
}
