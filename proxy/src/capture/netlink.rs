//! The little of netlink that nf_tables needs: building messages with attributes, and reading them.
//!
//! Attribute and message layout: `linux/netlink.h`. Lengths and types are in the machine's byte
//! order; nf_tables' own numbers are big-endian.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto,
    socket,
};

/// struct nlmsghdr and struct nfgenmsg.
const HEADER: usize = 16;
const GENERIC: usize = 4;
/// A flag in an attribute's type: it holds attributes.
const NESTED: u16 = 1 << 15;
/// The type without its two flags.
const TYPE_MASK: u16 = 0x3fff;

/// Flags of a request.
pub(super) const REQUEST: u16 = 0x1;
pub(super) const ACK: u16 = 0x4;
pub(super) const DUMP: u16 = 0x300;
pub(super) const CREATE: u16 = 0x400;
pub(super) const APPEND: u16 = 0x800;

/// Types of an answer.
const ERROR: u16 = 2;
const DONE: u16 = 3;

/// One or several messages under construction.
#[derive(Default)]
pub(super) struct Encoder {
    bytes: Vec<u8>,
}

impl Encoder {
    /// Appends a message with an nfgenmsg header and the attributes that `body` writes.
    pub(super) fn message(
        &mut self,
        kind: u16,
        flags: u16,
        sequence: u32,
        (family, resource): (u8, u16),
        body: impl FnOnce(&mut Self),
    ) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        self.bytes.extend_from_slice(&sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]); // port: the kernel knows it
        self.bytes.push(family);
        self.bytes.push(0); // NFNETLINK_V0
        self.bytes.extend_from_slice(&resource.to_be_bytes());
        body(self);
        let length = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }

    /// An attribute of plain bytes.
    pub(super) fn bytes(&mut self, kind: u16, value: &[u8]) {
        self.attribute(kind, |encoder| encoder.bytes.extend_from_slice(value));
    }

    /// An attribute of a number in network order.
    pub(super) fn number(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    /// An attribute of text, ended by a zero byte.
    pub(super) fn text(&mut self, kind: u16, value: &str) {
        self.attribute(kind, |encoder| {
            encoder.bytes.extend_from_slice(value.as_bytes());
            encoder.bytes.push(0);
        });
    }

    /// An attribute that holds attributes.
    pub(super) fn nested(&mut self, kind: u16, body: impl FnOnce(&mut Self)) {
        self.attribute(kind | NESTED, body);
    }

    fn attribute(&mut self, kind: u16, body: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        body(self);
        // Our attributes are rules of a few hundred bytes; 64 KiB is far away.
        let length = (self.bytes.len() - start) as u16;
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }

    /// Attributes that are encoded already.
    pub(super) fn raw(&mut self, attributes: &[u8]) {
        self.bytes.extend_from_slice(attributes);
    }

    /// What has been built.
    pub(super) fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// The attributes in `bytes`; stops at the first that is cut off.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(0..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & TYPE_MASK;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The first attribute of a kind.
pub(super) fn find(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes)
        .find(|(kind, _)| *kind == wanted)
        .map(|(_, value)| value)
}

/// A message from the kernel.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The request with this sequence number was carried out, or not and why.
    Result { sequence: u32, errno: Option<Errno> },
    /// The end of a dump.
    Done,
    /// An object: its type and its attributes (after the nfgenmsg header).
    Object { kind: u16, attributes: Vec<u8> },
}

/// The messages in one datagram; stops at the first that is cut off.
pub(super) fn answers(mut bytes: &[u8]) -> Vec<Answer> {
    let mut answers = Vec::new();
    while let Some(message) = next_message(&mut bytes) {
        answers.push(message);
    }
    answers
}

fn next_message(bytes: &mut &[u8]) -> Option<Answer> {
    let length = u32::from_ne_bytes(bytes.get(0..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let sequence = u32::from_ne_bytes(bytes.get(8..12)?.try_into().ok()?);
    let body = bytes.get(HEADER..length)?;
    *bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some(match kind {
        ERROR => {
            let code = i32::from_ne_bytes(body.get(0..4)?.try_into().ok()?);
            let errno = (code != 0).then(|| Errno::from_raw(code.wrapping_neg()));
            Answer::Result { sequence, errno }
        }
        DONE => Answer::Done,
        _ => Answer::Object {
            kind,
            attributes: body.get(GENERIC..)?.to_vec(),
        },
    })
}

/// A socket to the kernel's netfilter.
pub(super) struct Socket {
    fd: OwnedFd,
}

impl Socket {
    /// Opens one in this network namespace.
    pub(super) fn open() -> Result<Self, Errno> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkNetFilter,
        )?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self { fd })
    }

    /// Sends `request` and reads until a dump's end or until nothing more is there: the kernel
    /// handles netlink requests within the send, so its answer is complete by then.
    pub(super) fn exchange(&self, request: &[u8]) -> io::Result<Vec<Answer>> {
        let fd = self.fd.as_raw_fd();
        sendto(fd, request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        let mut buffer = vec![0; 64 * 1024];
        let mut all = Vec::new();
        loop {
            match recv(fd, &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => {
                    let answers = answers(&buffer[..length]);
                    let done = answers.contains(&Answer::Done);
                    all.extend(answers);
                    if done {
                        return Ok(all);
                    }
                }
                Err(Errno::EAGAIN) => return Ok(all),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}
