//! Where a message ends: RFC 9112 section 6.3, strictly.
//!
//! What two parsers could read differently is refused: the client gets 400, a server's message
//! becomes 502. Body bytes pass unchanged: lengths are counted, chunks are followed to their end
//! but not re-encoded, trailers pass.

use std::collections::BTreeSet;

use super::head::{Head, Span};

/// What the fields of a head say about the message and its connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Framing {
    pub body: Body,
    /// `Connection: close`.
    pub close: bool,
    /// `Connection: keep-alive`.
    pub keep_alive: bool,
    /// An `Upgrade` field. `Connection` need not name it: what the server answers with 101 it has
    /// taken for an upgrade.
    pub upgrade: bool,
    /// `Connection` names fields that belong to this hop alone and have to go.
    pub strip: bool,
    /// `Expect: 100-continue`.
    pub expect_continue: bool,
    /// A request has lines that end with a bare LF, or a response is written in another way that is out of
    /// use (folded lines, space before a colon, a repeated length, the identity coding): the
    /// message gets a server connection of its own, so that a peer that reads it differently can
    /// confuse nobody but this client.
    pub odd: bool,
}

/// How the length of a body is known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Body {
    #[default]
    None,
    /// Bytes.
    Length(u64),
    Chunked,
    /// Responses only: until the connection ends.
    UntilClose,
}

/// Why the framing of a message is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FramingError {
    #[error("Content-Length and Transfer-Encoding are both given (RFC 9112 section 6.3)")]
    LengthAndCoding,
    #[error("Content-Length is given more than once (RFC 9112 section 6.3)")]
    RepeatedLength,
    #[error("Content-Length is not a decimal number (RFC 9112 section 6.3)")]
    BadLength,
    #[error("Transfer-Encoding is not understood: chunked must be the last coding, once")]
    BadCoding,
    #[error("Transfer-Encoding in an HTTP/1.0 message (RFC 9112 section 6.1)")]
    CodingInHttp10,
    #[error("the chunked body is malformed (RFC 9112 section 7.1)")]
    BadChunk,
    #[error("the trailer section is larger than {MAX_TRAILERS} bytes")]
    TrailersTooLarge,
    #[error("Host is given more than once (RFC 9112 section 3.2)")]
    RepeatedHost,
}

/// Fields that may be named by `Connection` and pass nonetheless: the option speaks of the
/// connection, and the next hop is told the same.
fn stays(option: &[u8]) -> bool {
    [
        &b"close"[..],
        b"keep-alive",
        b"upgrade",
        b"te",
        b"http2-settings",
    ]
    .iter()
    .any(|known| option.eq_ignore_ascii_case(known))
}

/// The framing of a request.
pub fn of_request(buf: &[u8], head: &Head) -> Result<Framing, FramingError> {
    let mut fields = scan(buf, head)?;
    fields.framing.body = match (fields.chunked, fields.length) {
        (Some(_), Some(_)) => return Err(FramingError::LengthAndCoding),
        // A request whose last coding is not chunked has no end (section 6.3, item 4).
        (Some(false), None) => return Err(FramingError::BadCoding),
        (Some(true), None) => Body::Chunked,
        (None, Some(0)) | (None, None) => Body::None,
        (None, Some(length)) => Body::Length(length),
    };
    Ok(fields.framing)
}

/// The framing of a response to a request with `method`.
pub fn of_response(buf: &[u8], head: &Head, method: &[u8]) -> Result<Framing, FramingError> {
    let mut fields = scan(buf, head)?;
    let bodiless = method == b"HEAD"
        || matches!(head.status, 100..=199 | 204 | 304)
        || (method == b"CONNECT" && (200..300).contains(&head.status));
    fields.framing.body = match (fields.chunked, fields.length) {
        _ if bodiless => Body::None,
        (Some(_), Some(_)) => return Err(FramingError::LengthAndCoding),
        (Some(true), None) => Body::Chunked,
        (Some(false), None) | (None, None) => Body::UntilClose,
        (None, Some(0)) => Body::None,
        (None, Some(length)) => Body::Length(length),
    };
    Ok(fields.framing)
}

struct Scanned {
    framing: Framing,
    length: Option<u64>,
    /// Some(true): chunked is the last coding.
    chunked: Option<bool>,
}

/// One pass over the fields, by length of name first.
fn scan(buf: &[u8], head: &Head) -> Result<Scanned, FramingError> {
    let mut out = Scanned {
        framing: Framing::default(),
        length: None,
        chunked: None,
    };
    let mut hosts = 0;
    let response = head.status != 0;
    for field in &head.fields {
        let name = field.name.get(buf);
        let value = field.value.get(buf);
        out.framing.odd |= buf[field.name.end as usize] != b':';
        let is = |known: &[u8]| name.eq_ignore_ascii_case(known);
        match name.len() {
            4 if is(b"host") => hosts += 1,
            6 if is(b"expect") => {
                out.framing.expect_continue |= value.eq_ignore_ascii_case(b"100-continue");
            }
            7 if is(b"upgrade") => out.framing.upgrade = true,
            10 if is(b"connection") => {
                for option in list(value) {
                    if option.eq_ignore_ascii_case(b"close") {
                        out.framing.close = true;
                    } else if option.eq_ignore_ascii_case(b"keep-alive") {
                        out.framing.keep_alive = true;
                    } else if !stays(option) {
                        out.framing.strip = true;
                    }
                }
            }
            14 if is(b"content-length") => {
                let length = decimal(value)?;
                if let Some(first) = out.length.replace(length) {
                    // RFC 9110 section 8.6 lets a recipient take the same number again.
                    if !response || first != length {
                        return Err(FramingError::RepeatedLength);
                    }
                    out.framing.odd = true;
                }
            }
            17 if is(b"transfer-encoding") => {
                if head.minor == 0 {
                    return Err(FramingError::CodingInHttp10);
                }
                // A coding of RFC 2616 that says there is none.
                if response && value.eq_ignore_ascii_case(b"identity") {
                    out.framing.odd = true;
                    continue;
                }
                if out.chunked == Some(true) {
                    return Err(FramingError::BadCoding);
                }
                out.chunked = Some(last_is_chunked(value)?);
            }
            _ => {}
        }
    }
    if hosts > 1 && !response {
        return Err(FramingError::RepeatedHost);
    }
    let lines = &buf[head.start..head.end];
    out.framing.odd |= if response {
        has_folds(lines)
    } else {
        has_bare_lf(lines)
    };
    Ok(out)
}

/// Whether a line of the head ends without CR.
fn has_bare_lf(head: &[u8]) -> bool {
    any_pair(head, |before, byte| (byte == b'\n') & (before != b'\r'))
}

/// Whether a line of the head is folded.
fn has_folds(head: &[u8]) -> bool {
    any_pair(head, |before, byte| {
        (before == b'\n') & ((byte == b' ') | (byte == b'\t'))
    })
}

/// Whether a byte and the one before it are such a pair; before the first stands 0. All are looked
/// at, without branches: many at once.
fn any_pair(head: &[u8], is: impl Fn(u8, u8) -> bool) -> bool {
    let first = head.first().is_some_and(|byte| is(0, *byte));
    let pairs = head.iter().zip(head.get(1..).unwrap_or_default());
    pairs.fold(first, |any, (before, byte)| any | is(*before, *byte))
}

/// The members of a comma-separated list, without the spaces around them; empty ones left out
/// (RFC 9110 section 5.6.1).
pub fn list(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value
        .split(|&b| b == b',')
        .map(|member| member.trim_ascii())
        .filter(|member| !member.is_empty())
}

fn decimal(value: &[u8]) -> Result<u64, FramingError> {
    if value.is_empty() || value.len() > 19 {
        return Err(FramingError::BadLength);
    }
    value.iter().try_fold(0u64, |n, digit| match digit {
        b'0'..=b'9' => Ok(n * 10 + u64::from(digit - b'0')),
        _ => Err(FramingError::BadLength),
    })
}

/// Whether `chunked` is the last coding; unknown codings, and chunked anywhere else, are refused.
/// So are empty members, which RFC 9110 section 5.6.1 allows: some take "chunked," for chunked,
/// others for something else.
fn last_is_chunked(value: &[u8]) -> Result<bool, FramingError> {
    let mut chunked = false;
    for coding in value.split(|&b| b == b',').map(<[u8]>::trim_ascii) {
        if chunked {
            return Err(FramingError::BadCoding);
        }
        if coding.eq_ignore_ascii_case(b"chunked") {
            chunked = true;
        } else if ![
            &b"gzip"[..],
            b"deflate",
            b"compress",
            b"x-gzip",
            b"x-compress",
        ]
        .iter()
        .any(|known| coding.eq_ignore_ascii_case(known))
        {
            return Err(FramingError::BadCoding);
        }
    }
    Ok(chunked)
}

/// Bytes of a trailer section at most.
pub const MAX_TRAILERS: usize = 64 * 1024;
/// Bytes of a chunk's extensions at most.
const MAX_EXTENSIONS: usize = 4 * 1024;
/// Digits of a chunk's size at most, leading zeros included. Those that count are 15 at most.
const MAX_SIZE_DIGITS: u8 = 64;

/// Follows a body to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyReader {
    Done,
    /// The same, after a chunked body with bare LFs: another reader might not agree.
    DoneLoosely,
    /// Bytes left.
    Length(u64),
    Chunked(Chunk, LineEnds),
    UntilClose,
}

/// How the lines of a chunked body may end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineEnds {
    /// With CRLF: a request whose end two parsers find in different places is how requests are
    /// smuggled.
    Strict,
    /// With LF alone, too: what a server says is heard by its own client only.
    Loose,
    /// Such a line has been seen.
    Bare,
}

/// Where in a chunked body (RFC 9112 section 7.1) the next byte stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chunk {
    /// In the size: value so far, digits seen.
    Size(u64, u8),
    /// After the size or in an extension: size, bytes of extensions.
    Extension(u64, u16),
    /// LF of the size line.
    SizeLf(u64),
    /// Data bytes left.
    Data(u64),
    DataCr,
    DataLf,
    /// At the start of a trailer line: bytes of trailers so far.
    TrailerStart(u32),
    /// In a trailer line.
    Trailer(u32),
    /// LF of a trailer line.
    TrailerLf(u32),
    /// LF of the last, empty line.
    EndLf,
}

impl BodyReader {
    /// Of a request.
    pub fn new(body: Body) -> Self {
        Self::with(body, LineEnds::Strict)
    }

    /// Of a response.
    pub fn of_response(body: Body) -> Self {
        Self::with(body, LineEnds::Loose)
    }

    fn with(body: Body, ends: LineEnds) -> Self {
        match body {
            Body::None | Body::Length(0) => Self::Done,
            Body::Length(length) => Self::Length(length),
            Body::Chunked => Self::Chunked(Chunk::Size(0, 0), ends),
            Body::UntilClose => Self::UntilClose,
        }
    }

    pub fn is_done(&self) -> bool {
        matches!(self, Self::Done | Self::DoneLoosely)
    }

    /// Bytes that are certainly still to come, as far as known.
    pub fn expected(&self) -> u64 {
        match self {
            Self::Done | Self::DoneLoosely => 0,
            Self::Length(left) | Self::Chunked(Chunk::Data(left), _) => *left,
            Self::Chunked(..) => 1,
            Self::UntilClose => u64::MAX,
        }
    }

    /// How many of `bytes` belong to this body; moves on by as many.
    pub fn advance(&mut self, bytes: &[u8]) -> Result<usize, FramingError> {
        match self {
            Self::Done | Self::DoneLoosely => Ok(0),
            Self::UntilClose => Ok(bytes.len()),
            Self::Length(left) => {
                let taken = bytes
                    .len()
                    .min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= taken as u64;
                if *left == 0 {
                    *self = Self::Done;
                }
                Ok(taken)
            }
            Self::Chunked(chunk, ends) => {
                let (taken, done) = chunk.advance(bytes, ends)?;
                if done {
                    *self = match ends {
                        LineEnds::Bare => Self::DoneLoosely,
                        LineEnds::Strict | LineEnds::Loose => Self::Done,
                    };
                }
                Ok(taken)
            }
        }
    }
}

impl Chunk {
    fn advance(
        &mut self,
        bytes: &[u8],
        ends: &mut LineEnds,
    ) -> Result<(usize, bool), FramingError> {
        let mut at = 0;
        while at < bytes.len() {
            if let Chunk::Data(left) = self {
                let skip = (bytes.len() - at).min(usize::try_from(*left).unwrap_or(usize::MAX));
                at += skip;
                *left -= skip as u64;
                if *left == 0 {
                    *self = Chunk::DataCr;
                }
                continue;
            }
            let byte = bytes[at];
            at += 1;
            *self = match (*self, byte) {
                (Chunk::Size(size, digits), b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                    if digits == MAX_SIZE_DIGITS || size >> (14 * 4) != 0 {
                        return Err(FramingError::BadChunk);
                    }
                    let digit = (byte as char).to_digit(16).unwrap_or(0);
                    Chunk::Size(size * 16 + u64::from(digit), digits + 1)
                }
                (Chunk::Size(_, 0), _) => return Err(FramingError::BadChunk),
                (Chunk::Size(size, _) | Chunk::Extension(size, _), b'\r') => Chunk::SizeLf(size),
                (Chunk::Size(size, _), b';' | b' ' | b'\t') => Chunk::Extension(size, 1),
                (Chunk::Extension(size, seen), b'\t' | b' '..=b'~' | 0x80..) => {
                    if usize::from(seen) >= MAX_EXTENSIONS {
                        return Err(FramingError::BadChunk);
                    }
                    Chunk::Extension(size, seen + 1)
                }
                (Chunk::SizeLf(0), b'\n') => Chunk::TrailerStart(0),
                (Chunk::SizeLf(size), b'\n') => Chunk::Data(size),
                (Chunk::DataCr, b'\r') => Chunk::DataLf,
                (Chunk::DataLf, b'\n') => Chunk::Size(0, 0),
                (Chunk::TrailerStart(_), b'\r') => Chunk::EndLf,
                (Chunk::EndLf, b'\n') => return Ok((at, true)),
                (Chunk::Trailer(seen), b'\r') => Chunk::TrailerLf(seen),
                (Chunk::TrailerLf(seen), b'\n') => Chunk::TrailerStart(seen),
                // A trailer line begins with a name, never with a space (no obs-fold).
                (Chunk::TrailerStart(seen), b'!'..=b'~')
                | (Chunk::Trailer(seen), b'\t' | b' '..=b'~' | 0x80..) => {
                    if seen as usize >= MAX_TRAILERS {
                        return Err(FramingError::TrailersTooLarge);
                    }
                    Chunk::Trailer(seen + 1)
                }
                // A line that ends without CR. Not one with an extension: some take the LF for a
                // part of it.
                (
                    Chunk::Size(..) | Chunk::DataCr | Chunk::TrailerStart(_) | Chunk::Trailer(_),
                    b'\n',
                ) if *ends != LineEnds::Strict => {
                    *ends = LineEnds::Bare;
                    match *self {
                        Chunk::Size(0, _) => Chunk::TrailerStart(0),
                        Chunk::Size(size, _) => Chunk::Data(size),
                        Chunk::DataCr => Chunk::Size(0, 0),
                        Chunk::Trailer(seen) => Chunk::TrailerStart(seen),
                        _ => return Ok((at, true)),
                    }
                }
                _ => return Err(FramingError::BadChunk),
            };
        }
        Ok((at, false))
    }
}

/// What has to be taken out of a head because its `Connection` fields say that it belongs to this
/// hop (RFC 9110 section 7.6.1): the fields named, and their names in `Connection`.
pub fn hop_by_hop(buf: &[u8], head: &Head, edits: &mut Vec<super::head::Edit>) {
    use super::head::Edit;
    let mut named: BTreeSet<Vec<u8>> = BTreeSet::new();
    for field in head.all(buf, "connection") {
        let value = field.value.get(buf);
        let (keep, drop): (Vec<_>, Vec<_>) = list(value).partition(|option| stays(option));
        if drop.is_empty() {
            continue;
        }
        named.extend(drop.iter().map(|name| name.to_ascii_lowercase()));
        if keep.is_empty() {
            edits.push(Edit::remove(head.line(buf, field)));
        } else {
            edits.push(Edit {
                place: Span {
                    start: field.value.start,
                    end: field.value.end,
                },
                put: keep.join(&b", "[..]),
            });
        }
    }
    for field in &head.fields {
        let name = field.name.get(buf);
        // Fields that decide where the message ends or goes are not to be named away
        // (RFC 9110 section 7.6.1 forbids end-to-end fields as options).
        let protected = ["host", "content-length", "transfer-encoding", "connection"];
        if named.contains(&name.to_ascii_lowercase())
            && !protected
                .iter()
                .any(|p| name.eq_ignore_ascii_case(p.as_bytes()))
        {
            edits.push(Edit::remove(head.line(buf, field)));
        }
    }
    edits.sort_by_key(|edit| edit.place.start);
}

#[cfg(test)]
mod tests;
