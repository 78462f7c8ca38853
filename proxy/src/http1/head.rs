//! Message heads, tokenised in place.
//!
//! A [`Head`] holds offsets into the connection's buffer: nothing is copied into a map. It is
//! written on as it came, through a short list of [`Edit`]s, so the names' case, their order,
//! duplicates and spacing survive.

use std::mem::MaybeUninit;

use super::framing::{self, Framing};
use crate::http::{HeadSize, RequestView};

/// Fields that are tokenised without an allocation; more take one.
const USUAL_FIELDS: usize = 64;
/// Fields of one head; more are refused with 431. Apache takes 100, Node 2,000, Go as many as there
/// is room for in [`MAX_HEAD`]: whether there are too many is for the application to say.
pub const MAX_FIELDS: usize = 8192;
/// Bytes of one head; more are refused with 431. Most servers take 8 to 64 KiB, Go's 1 MiB.
pub const MAX_HEAD: usize = 1024 * 1024;

/// Bytes of the buffer, from start to end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Span {
    pub start: u32,
    pub end: u32,
}

impl Span {
    fn of(buf: &[u8], part: &[u8]) -> Self {
        let start = (part.as_ptr() as usize).wrapping_sub(buf.as_ptr() as usize);
        debug_assert!(start <= buf.len());
        Self {
            start: start as u32,
            end: (start + part.len()) as u32,
        }
    }

    pub fn get(self, buf: &[u8]) -> &[u8] {
        &buf[self.start as usize..self.end as usize]
    }
}

/// One field line.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    pub name: Span,
    pub value: Span,
}

/// A head as tokenised: offsets into the buffer it was read from. Reused from message to message.
#[derive(Debug, Default)]
pub struct Head {
    /// Where what is written on begins: with the start line of a request, after empty lines that
    /// RFC 9112 section 2.2 says to ignore.
    pub start: usize,
    /// Where the body begins.
    pub end: usize,
    pub method: Span,
    pub target: Span,
    /// Responses: the status code.
    pub status: u16,
    /// Minor version of HTTP/1: 0 or 1.
    pub minor: u8,
    pub fields: Vec<Field>,
    /// What the fields say about the message and the connection.
    pub framing: Framing,
}

/// Why a head is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    #[error("the head is not valid HTTP/1: {0}")]
    Syntax(httparse::Error),
    #[error("the head has more than {MAX_FIELDS} fields")]
    TooManyFields,
    #[error("{0}")]
    Framing(#[from] framing::FramingError),
}

/// Whether a head is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parsed {
    Partial,
    Complete,
}

type Fields<'h, 'b> = &'h mut [MaybeUninit<httparse::Header<'b>>];

/// Tokenises a request's head at the beginning of `buf` and decides its framing
/// (RFC 9112 sections 2.2, 3, 5, 6.3).
pub fn parse_request(buf: &[u8], head: &mut Head) -> Result<Parsed, HeadError> {
    let mut parsed = parse_request_into(buf, head, &mut [MaybeUninit::uninit(); USUAL_FIELDS]);
    if parsed == Err(HeadError::TooManyFields) {
        parsed = parse_request_into(buf, head, &mut vec![MaybeUninit::uninit(); MAX_FIELDS]);
    }
    if let Err(HeadError::Syntax(httparse::Error::Token | httparse::Error::HeaderValue)) = parsed {
        let copy = with_foreign_bytes_replaced(buf, true);
        parsed = parse_request_into(&copy, head, &mut vec![MaybeUninit::uninit(); MAX_FIELDS]);
    }
    parsed
}

/// Whether a head may be complete: for one that was not, when only `seen` bytes were there. So a
/// head that comes in many pieces is not tokenised with each of them.
pub fn may_be_complete(buf: &[u8], seen: usize) -> bool {
    let new = &buf[seen.saturating_sub(3).min(buf.len())..];
    seen == 0 || new.windows(2).any(|w| w == b"\n\n") || new.windows(3).any(|w| w == b"\n\r\n")
}

/// Puts spaces in the place of line ends at which a field of a request's head is folded, as
/// RFC 9112 section 5.2 lets a recipient do before it passes the message on; whether there were
/// any. A fold before the first field is left, to be refused (section 2.2).
pub fn unfold(buf: &mut [u8]) -> bool {
    let is_end = |line: &[u8]| matches!(line, b"\n" | b"\r\n");
    let mut line = 0;
    let mut lines = 0;
    let mut found = false;
    while let Some(feed) = buf[line..].iter().position(|&byte| byte == b'\n') {
        let next = line + feed + 1;
        // Empty lines may come first (section 2.2).
        if is_end(&buf[line..next]) && lines > 0 {
            break;
        }
        lines += usize::from(!is_end(&buf[line..next]));
        if lines > 1 && matches!(buf.get(next), Some(b' ' | b'\t')) {
            buf[next - 1] = b' ';
            if buf[next - 2] == b'\r' {
                buf[next - 2] = b' ';
            }
            found = true;
        }
        line = next;
    }
    found
}

/// A copy with another byte in the place of those that httparse refuses and others do not. Only the
/// lengths of names and values count, so the spans that are found in it hold.
///
/// - A request's target in another encoding than UTF-8 is not RFC 3986, but what browsers of old
///   and scripts send.
/// - Control characters within values are of no use, but a recipient may keep them (RFC 9110
///   section 5.5). What framing says is read from the copy, too: a length or a coding with such a
///   byte is none.
fn with_foreign_bytes_replaced(buf: &[u8], request: bool) -> Vec<u8> {
    let mut copy = buf.to_vec();
    let start = buf.iter().position(|byte| !b"\r\n".contains(byte));
    let line = &mut copy[start.unwrap_or(0)..];
    let end = line.iter().position(|&byte| byte == b'\n');
    let (line, rest) = line.split_at_mut(end.unwrap_or(line.len()));
    if request {
        let target = line.splitn_mut(2, |&byte| byte == b' ').nth(1);
        for byte in target.unwrap_or_default() {
            if !byte.is_ascii() {
                *byte = b'x';
            }
        }
    }
    let mut value = false;
    for byte in rest {
        match *byte {
            b'\n' => value = false,
            b':' => value = true,
            0x01..=0x08 | 0x0b | 0x0c | 0x0e..=0x1f | 0x7f if value => *byte = b'?',
            _ => {}
        }
    }
    copy
}

fn parse_request_into<'b>(
    buf: &'b [u8],
    head: &mut Head,
    fields: Fields<'_, 'b>,
) -> Result<Parsed, HeadError> {
    let mut request = httparse::Request::new(&mut []);
    let parsed = request.parse_with_uninit_headers(buf, fields);
    let end = match parsed {
        Ok(httparse::Status::Complete(end)) => end,
        Ok(httparse::Status::Partial) => return Ok(Parsed::Partial),
        Err(httparse::Error::TooManyHeaders) => return Err(HeadError::TooManyFields),
        Err(error) => return Err(HeadError::Syntax(error)),
    };
    head.method = Span::of(buf, request.method.unwrap_or_default().as_bytes());
    head.target = Span::of(buf, request.path.unwrap_or_default().as_bytes());
    head.minor = request.version.unwrap_or(1);
    head.status = 0;
    head.start = head.method.start as usize;
    head.end = end;
    head.keep(buf, request.headers);
    head.framing = framing::of_request(buf, head)?;
    Ok(Parsed::Complete)
}

/// Tokenises a response's head. `method` is the request's: it decides whether there is a body.
pub fn parse_response(buf: &[u8], method: &[u8], head: &mut Head) -> Result<Parsed, HeadError> {
    let mut usual = [MaybeUninit::uninit(); USUAL_FIELDS];
    let mut parsed = parse_response_into(buf, method, head, &mut usual, false);
    if parsed == Err(HeadError::TooManyFields) {
        let mut fields = vec![MaybeUninit::uninit(); MAX_FIELDS];
        parsed = parse_response_into(buf, method, head, &mut fields, false);
    }
    let refused = [httparse::Error::HeaderName, httparse::Error::HeaderValue];
    if let Err(HeadError::Syntax(error)) = parsed
        && refused.contains(&error)
    {
        // Lines that are no fields, too: a client leaves them out, or gives the response up.
        let copy = with_foreign_bytes_replaced(buf, false);
        let mut fields = vec![MaybeUninit::uninit(); MAX_FIELDS];
        parsed = parse_response_into(&copy, method, head, &mut fields, true);
        head.framing.odd = true;
    }
    parsed
}

fn parse_response_into<'b>(
    buf: &'b [u8],
    method: &[u8],
    head: &mut Head,
    fields: Fields<'_, 'b>,
    skip_lines: bool,
) -> Result<Parsed, HeadError> {
    let mut response = httparse::Response::new(&mut []);
    let mut config = httparse::ParserConfig::default();
    config
        .allow_obsolete_multiline_headers_in_responses(true)
        .allow_spaces_after_header_name_in_responses(true)
        .allow_multiple_spaces_in_response_status_delimiters(true)
        .ignore_invalid_headers_in_responses(skip_lines);
    let end = match config.parse_response_with_uninit_headers(&mut response, buf, fields) {
        Ok(httparse::Status::Complete(end)) => end,
        Ok(httparse::Status::Partial) => return Ok(Parsed::Partial),
        Err(httparse::Error::TooManyHeaders) => return Err(HeadError::TooManyFields),
        Err(error) => return Err(HeadError::Syntax(error)),
    };
    // Empty lines before a response are against the rules, but whose they are is not ours to say.
    head.start = 0;
    head.end = end;
    head.method = Span::default();
    head.target = Span::default();
    head.status = response.code.unwrap_or(0);
    head.minor = response.version.unwrap_or(1);
    head.keep(buf, response.headers);
    head.framing = framing::of_response(buf, head, method)?;
    Ok(Parsed::Complete)
}

impl Head {
    /// Gives the room for uncommonly many fields back.
    pub fn release(&mut self) {
        self.fields.clear();
        self.fields.shrink_to(USUAL_FIELDS);
    }

    fn keep(&mut self, buf: &[u8], headers: &[httparse::Header<'_>]) {
        self.fields.clear();
        self.fields.extend(headers.iter().map(|header| Field {
            name: Span::of(buf, header.name.as_bytes()),
            value: Span::of(buf, header.value),
        }));
    }

    /// All field lines with this name, whatever its case.
    pub fn all<'h>(&'h self, buf: &'h [u8], name: &'h str) -> impl Iterator<Item = &'h Field> + 'h {
        self.fields
            .iter()
            .filter(move |f| f.name.get(buf).eq_ignore_ascii_case(name.as_bytes()))
    }

    /// The first value of a field.
    pub fn value<'b>(&self, buf: &'b [u8], name: &str) -> Option<&'b [u8]> {
        let field = self
            .fields
            .iter()
            .find(|f| f.name.get(buf).eq_ignore_ascii_case(name.as_bytes()))?;
        Some(field.value.get(buf))
    }

    /// The whole line of a field, its line end included, with the lines folded into it.
    pub fn line(&self, buf: &[u8], field: &Field) -> Span {
        let head = &buf[..self.end];
        let mut end = field.value.end as usize;
        while let Some(feed) = head[end..].iter().position(|&b| b == b'\n') {
            end += feed + 1;
            if !matches!(head.get(end), Some(b' ' | b'\t')) {
                break;
            }
        }
        Span {
            start: field.name.start,
            end: end as u32,
        }
    }

    /// Where lines can be added: before the empty line that ends the head.
    pub fn tail(&self, buf: &[u8]) -> u32 {
        let end = self.end as u32;
        if buf[..self.end].ends_with(b"\r\n") {
            end - 2
        } else {
            end - 1
        }
    }

    /// Writes the head on, through the edits (sorted by place).
    pub fn write(&self, buf: &[u8], edits: &[Edit], out: &mut Vec<u8>) {
        let mut at = self.start;
        for edit in edits {
            let (start, end) = (edit.place.start as usize, edit.place.end as usize);
            if start < at {
                continue;
            }
            out.extend_from_slice(&buf[at..start]);
            out.extend_from_slice(&edit.put);
            at = end;
        }
        out.extend_from_slice(&buf[at..self.end]);
    }
}

/// A change to a head: the bytes at `place` are replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edit {
    pub place: Span,
    pub put: Vec<u8>,
}

impl Edit {
    pub fn remove(place: Span) -> Self {
        Self {
            place,
            put: Vec::new(),
        }
    }

    pub fn insert(at: u32, put: Vec<u8>) -> Self {
        Self {
            place: Span { start: at, end: at },
            put,
        }
    }
}

/// A request's head together with the bytes it was read from.
#[derive(Debug, Clone, Copy)]
pub struct RequestHead<'a> {
    pub head: &'a Head,
    pub buf: &'a [u8],
}

impl RequestView for RequestHead<'_> {
    fn method(&self) -> &[u8] {
        self.head.method.get(self.buf)
    }

    fn path(&self) -> &[u8] {
        let target = self.head.target.get(self.buf);
        absolute_form_path(target).unwrap_or(target)
    }

    fn header(&self, name: &str) -> Option<&[u8]> {
        self.head.value(self.buf, name)
    }

    fn size(&self) -> HeadSize {
        HeadSize {
            bytes: self.head.end,
            fields: self.head.fields.len(),
        }
    }

    fn values(&self, name: &str, each: &mut dyn FnMut(&[u8]) -> bool) {
        for field in self.head.all(self.buf, name) {
            if each(field.value.get(self.buf)) {
                return;
            }
        }
    }
}

/// The path of a target in absolute form (RFC 9112 section 3.2.2).
fn absolute_form_path(target: &[u8]) -> Option<&[u8]> {
    if target.first() == Some(&b'/') {
        return None;
    }
    let scheme = target.windows(3).position(|w| w == b"://")?;
    let authority = &target[scheme + 3..];
    match authority.iter().position(|&b| b == b'/') {
        Some(slash) => Some(&authority[slash..]),
        None => Some(b"/"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &[u8]) -> Result<Head, HeadError> {
        let mut head = Head::default();
        match parse_request(text, &mut head)? {
            Parsed::Complete => Ok(head),
            Parsed::Partial => panic!("partial"),
        }
    }

    #[test]
    fn a_head_is_written_on_as_it_came() {
        let text = b"GET /a/../b%2F?x=%zz HTTP/1.1\r\nhOst:  a \r\nX-B: 1\r\nx-b:2\r\n\r\nbody";
        let head = request(text).unwrap();
        let mut out = Vec::new();
        head.write(text, &[], &mut out);
        assert_eq!(out, &text[..text.len() - 4]);
        let view = RequestHead {
            head: &head,
            buf: text,
        };
        assert_eq!(view.path(), b"/a/../b%2F?x=%zz");
        assert_eq!(view.header("host"), Some(&b"a"[..]));
    }

    #[test]
    fn edits_replace_and_insert() {
        let text = b"GET / HTTP/1.1\r\nA: 1\r\nB: 2\r\nC: 3\r\n\r\n";
        let head = request(text).unwrap();
        let b = head.line(text, &head.fields[1]);
        let edits = [
            Edit::remove(b),
            Edit::insert(head.tail(text), b"D: 4\r\n".to_vec()),
        ];
        let mut out = Vec::new();
        head.write(text, &edits, &mut out);
        assert_eq!(out, b"GET / HTTP/1.1\r\nA: 1\r\nC: 3\r\nD: 4\r\n\r\n");
    }

    #[test]
    fn a_line_goes_with_what_is_folded_into_it() {
        let text = b"HTTP/1.1 200 OK\r\nConnection: x\r\n \t\r\n\tb\r\nX: 1\r\nY: 2\r\n\r\n";
        let mut head = Head::default();
        assert_eq!(
            parse_response(text, b"GET", &mut head),
            Ok(Parsed::Complete)
        );
        let line = head.line(text, &head.fields[0]);
        assert_eq!(line.get(text), b"Connection: x\r\n \t\r\n\tb\r\n");
    }

    #[test]
    fn any_token_is_a_method_and_absolute_form_has_a_path() {
        let text = b"M-SEARCH http://h:80/p?q HTTP/1.1\r\nhost: h\r\n\r\n";
        let head = request(text).unwrap();
        let view = RequestHead {
            head: &head,
            buf: text,
        };
        assert_eq!(view.method(), b"M-SEARCH");
        assert_eq!(view.path(), b"/p?q");
    }

    #[test]
    fn a_target_in_any_encoding_passes() {
        let text = b"GET /\xfc\xff?\xe4 HTTP/1.1\r\nHost: h\r\nX: \xfc\r\n\r\n";
        let head = request(text).unwrap();
        assert_eq!(head.target.get(text), b"/\xfc\xff?\xe4");
        assert_eq!(head.value(text, "x"), Some(&b"\xfc"[..]));
        let mut partial = Head::default();
        assert_eq!(parse_request(&text[..8], &mut partial), Ok(Parsed::Partial));
        assert!(request(b"G\xfcT / HTTP/1.1\r\nHost: h\r\n\r\n").is_err());
    }

    #[test]
    fn what_is_refused_after_many_fields_is_what_is_refused_after_few() {
        for few in [0, 100] {
            let fields = "A: b\r\n".repeat(few);
            let text = format!("HTTP/1.1 200 OK\r\n{fields}X: \u{1}\r\nno field\r\n\r\n");
            let mut head = Head::default();
            let parsed = parse_response(text.as_bytes(), b"GET", &mut head);
            assert_eq!(parsed, Ok(Parsed::Complete));
            assert_eq!(head.fields.len(), few + 1);
            let nul = format!("HTTP/1.1 200 OK\r\n{fields}X: \0\r\n\r\n");
            assert!(parse_response(nul.as_bytes(), b"GET", &mut head).is_err());
            let text = format!("GET /\u{fc} HTTP/1.1\r\n{fields}X: \u{1}\r\n\r\n");
            assert_eq!(request(text.as_bytes()).unwrap().fields.len(), few + 1);
            let length = format!("GET / HTTP/1.1\r\n{fields}Content-Length: \u{1}2\r\n\r\n");
            assert!(request(length.as_bytes()).is_err());
        }
    }

    #[test]
    fn more_fields_than_usual_are_taken_up_to_the_limit() {
        let mut text = b"GET / HTTP/1.1\r\n".to_vec();
        for i in 0..200 {
            text.extend_from_slice(format!("x-{i}: {i}\r\n").as_bytes());
        }
        text.extend_from_slice(b"\r\n");
        assert_eq!(request(&text).unwrap().fields.len(), 200);
    }

    #[test]
    fn what_two_parsers_could_read_differently_is_refused() {
        for bad in [
            &b"GET / HTTP/1.1\r\nContent-Length : 5\r\n\r\n"[..],
            b"GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n",
            b"GET / HTTP/1.1\r\nA: b\rc\r\n\r\n",
            b"GET  / HTTP/1.1\r\n\r\n",
            b"GET / HTTP/2.0\r\n\r\n",
        ] {
            let mut head = Head::default();
            let parsed = parse_request(bad, &mut head);
            assert!(parsed.is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }
}
