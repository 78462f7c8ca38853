//! The ClientHello of TLS, as far as routing needs it: SNI and ALPN.

/// Longest plaintext record (RFC 8446 section 5.1), bytes.
pub(super) const MAX_RECORD: usize = 1 << 14;
/// Longest ClientHello that is read, bytes: what rustls takes. Real ones have 200 to 2,000.
pub const MAX_HELLO: usize = 64 * 1024;

const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const SERVER_NAME: u16 = 0;
const ALPN: u16 = 16;

/// What a client says of itself before anything is encrypted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientHello {
    /// The host name asked for, as sent (RFC 6066 section 3).
    pub sni: Option<Box<str>>,
    /// Protocols offered, in the client's order (RFC 7301).
    pub alpn: Vec<Box<[u8]>>,
}

impl ClientHello {
    /// Whether `protocol` is among those offered.
    pub fn offers(&self, protocol: &[u8]) -> bool {
        self.alpn.iter().any(|offered| **offered == *protocol)
    }
}

/// The bytes are no ClientHello, or one that no server would take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a TLS ClientHello")]
pub struct NotTls;

/// Reads a ClientHello from the first bytes of a connection; it may span several records
/// (RFC 8446 section 5.1). `None` when the end is not there yet.
///
/// # Errors
/// [`NotTls`] as soon as the bytes so far cannot become a ClientHello of at most [`MAX_HELLO`].
pub fn client_hello(bytes: &[u8]) -> Result<Option<ClientHello>, NotTls> {
    let mut joined = Vec::new();
    let mut rest = bytes;
    loop {
        let fragment;
        let complete;
        match rest {
            // The minor version is to be ignored (RFC 8446 section 5.1).
            [HANDSHAKE, 3, _, high, low, after @ ..] => {
                let length = usize::from(u16::from_be_bytes([*high, *low]));
                if !(1..=MAX_RECORD).contains(&length) {
                    return Err(NotTls);
                }
                complete = after.len() >= length;
                (fragment, rest) = after.split_at(length.min(after.len()));
            }
            [] | [HANDSHAKE] | [HANDSHAKE, 3] => return Ok(None),
            [HANDSHAKE, 3, ..] if rest.len() < 5 => return Ok(None),
            _ => return Err(NotTls),
        }
        // Nearly always there is one record, and nothing to join.
        if joined.is_empty()
            && let Some(body) = message(fragment)?
        {
            return parse(body).map(Some);
        }
        joined.extend_from_slice(fragment);
        match message(&joined)? {
            Some(body) => return parse(body).map(Some),
            None if !complete => return Ok(None),
            None => {}
        }
    }
}

/// The body of the handshake message (RFC 8446 section 4), once it is there whole.
fn message(bytes: &[u8]) -> Result<Option<&[u8]>, NotTls> {
    match bytes {
        [] => Ok(None),
        [CLIENT_HELLO, a, b, c, body @ ..] => {
            let length = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
            if length > MAX_HELLO {
                return Err(NotTls);
            }
            Ok(body.get(..length))
        }
        [CLIENT_HELLO, ..] => Ok(None),
        _ => Err(NotTls),
    }
}

/// RFC 8446 section 4.1.2, and the older versions of the same.
fn parse(body: &[u8]) -> Result<ClientHello, NotTls> {
    let mut rest = Reader(body);
    let [major, _] = *rest.take(2)? else {
        return Err(NotTls);
    };
    if major != 3 {
        return Err(NotTls);
    }
    rest.take(32)?;
    if rest.short()?.0.len() > 32 {
        return Err(NotTls);
    }
    let suites = rest.long()?.0.len();
    if suites == 0 || suites % 2 != 0 || rest.short()?.0.is_empty() {
        return Err(NotTls);
    }
    let mut hello = ClientHello::default();
    if rest.0.is_empty() {
        return Ok(hello);
    }
    let mut extensions = rest.long()?;
    if !rest.0.is_empty() {
        return Err(NotTls);
    }
    while !extensions.0.is_empty() {
        let kind = extensions.number()?;
        let mut value = extensions.long()?;
        match kind {
            // A list that is malformed names nobody; it is still a ClientHello.
            SERVER_NAME => {
                hello.sni = hello.sni.or_else(|| server_name(value));
                continue;
            }
            ALPN => {
                let mut names = value.long()?;
                while !names.0.is_empty() {
                    let name = names.short()?.0;
                    if name.is_empty() {
                        return Err(NotTls);
                    }
                    hello.alpn.push(name.into());
                }
            }
            _ => continue,
        }
        if !value.0.is_empty() {
            return Err(NotTls);
        }
    }
    Ok(hello)
}

/// The first host name of a server name list (RFC 6066 section 3), as far as it can be read.
fn server_name(mut value: Reader<'_>) -> Option<Box<str>> {
    let mut names = value.long().ok()?;
    loop {
        let [kind] = *names.take(1).ok()? else {
            return None;
        };
        let name = names.long().ok()?.0;
        if kind == 0 {
            return host_name(name);
        }
    }
}

/// A name that can be looked up and logged; another is as good as none (the application's server
/// has the whole hello, and decides).
fn host_name(name: &[u8]) -> Option<Box<str>> {
    let name = std::str::from_utf8(name).ok()?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    (!name.is_empty() && name.len() <= 255 && name.bytes().all(plain)).then(|| name.into())
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], NotTls> {
        let (taken, rest) = self.0.split_at_checked(n).ok_or(NotTls)?;
        self.0 = rest;
        Ok(taken)
    }

    fn number(&mut self) -> Result<u16, NotTls> {
        match self.take(2)? {
            [a, b] => Ok(u16::from_be_bytes([*a, *b])),
            _ => Err(NotTls),
        }
    }

    /// A vector with a length of one byte.
    fn short(&mut self) -> Result<Self, NotTls> {
        let length = self.take(1)?.first().copied().ok_or(NotTls)?;
        self.take(length.into()).map(Self)
    }

    /// A vector with a length of two bytes.
    fn long(&mut self) -> Result<Self, NotTls> {
        let length = self.number()?;
        self.take(length.into()).map(Self)
    }
}
