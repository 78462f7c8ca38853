//! What the first bytes of a connection are, as far as they can tell.

/// Longest request line (with the line after it) that is looked through; what is longer is
/// opaque. The HTTP/1 engine's limit for a whole head.
pub const MAX_REQUEST_LINE: usize = 64 * 1024;

/// The client connection preface of HTTP/2 (RFC 9113 section 3.4).
pub const HTTP2_PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The first byte of a TLS record with a handshake message (RFC 8446 section 5.1).
const HANDSHAKE: u8 = 0x16;

/// What the bytes so far are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sniff {
    /// They could still be TLS or HTTP.
    NeedMore,
    /// A request line of HTTP/1.0 or 1.1, followed by the end of the head or a header field.
    Http1,
    /// The whole preface of HTTP/2.
    Http2,
    /// A TLS record with the beginning of a ClientHello; [`super::client_hello`] reads the rest.
    Tls,
    /// None of these.
    Opaque,
}

/// Looks at the first bytes of a connection. More bytes never change an answer other than
/// [`Sniff::NeedMore`].
pub fn sniff(bytes: &[u8]) -> Sniff {
    match bytes.first() {
        None => Sniff::NeedMore,
        Some(&HANDSHAKE) => tls(bytes),
        Some(_) if HTTP2_PREFACE.starts_with(&bytes[..bytes.len().min(HTTP2_PREFACE.len())]) => {
            if bytes.len() < HTTP2_PREFACE.len() {
                Sniff::NeedMore
            } else {
                Sniff::Http2
            }
        }
        Some(_) => http1(bytes),
    }
}

/// Whether bytes for which [`sniff`] says that it needs more may become TLS.
pub(super) fn may_be_tls(bytes: &[u8]) -> bool {
    bytes.first().is_none_or(|first| *first == HANDSHAKE)
}

/// RFC 8446 sections 5.1 and 4: record type handshake, version 3.x (x is to be ignored), a length,
/// ClientHello.
fn tls(bytes: &[u8]) -> Sniff {
    let fits = |at: usize, rule: fn(u8) -> bool| bytes.get(at).copied().is_none_or(rule);
    let length_fits = match bytes {
        [_, _, _, high, low, ..] => {
            (1..=super::hello::MAX_RECORD).contains(&usize::from(u16::from_be_bytes([*high, *low])))
        }
        _ => true,
    };
    if !(fits(1, |major| major == 3) && length_fits && fits(5, |kind| kind == 1)) {
        return Sniff::Opaque;
    }
    if bytes.len() < 6 {
        Sniff::NeedMore
    } else {
        Sniff::Tls
    }
}

/// RFC 9112 sections 2.1 and 3: `token SP target SP HTTP/1.x` and the end of the line (a bare LF
/// will do), then a line that is empty, has a colon, or is folded. A line without a colon is
/// another protocol whose commands look like HTTP.
fn http1(bytes: &[u8]) -> Sniff {
    let undecided = if bytes.len() < MAX_REQUEST_LINE {
        Sniff::NeedMore
    } else {
        Sniff::Opaque
    };
    let Some(method) = bytes.iter().position(|byte| !is_token(*byte)) else {
        return undecided;
    };
    if method == 0 || bytes[method] != b' ' {
        return Sniff::Opaque;
    }
    let rest = &bytes[method + 1..];
    let Some(target) = rest.iter().position(|byte| !is_target(*byte)) else {
        return undecided;
    };
    if target == 0 || rest[target] != b' ' {
        return Sniff::Opaque;
    }
    let mut rest = &rest[target + 1..];
    for expected in [&b"HTTP/1."[..], b"01", b"\r", b"\n"] {
        match expected {
            b"01" | b"\r" => match rest.first() {
                None => return undecided,
                Some(byte) if expected.contains(byte) => rest = &rest[1..],
                // Only the CR may be left out.
                Some(_) if expected == b"\r" => {}
                Some(_) => return Sniff::Opaque,
            },
            _ => match rest.strip_prefix(expected) {
                Some(after) => rest = after,
                None if expected.starts_with(rest) => return undecided,
                None => return Sniff::Opaque,
            },
        }
    }
    match rest {
        [] | [b'\r'] => undecided,
        [b' ' | b'\t' | b'\n', ..] | [b'\r', b'\n', ..] => Sniff::Http1,
        line => match line.iter().find(|byte| matches!(byte, b':' | b'\n')) {
            Some(b':') => Sniff::Http1,
            Some(_) => Sniff::Opaque,
            None => undecided,
        },
    }
}

/// `tchar` of RFC 9110 section 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// What may stand in a request target: everything visible. Bytes above ASCII are not allowed by
/// RFC 3986, but are sent; what is to be said of them the engine says.
fn is_target(byte: u8) -> bool {
    byte > b' ' && byte != 0x7f
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn http1_whatever_the_method() {
        for head in [
            &b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[..],
            b"GET / HTTP/1.0\r\n\r\n",
            b"QUERY /a?b HTTP/1.1\r\nhost: a",
            b"M-SEARCH * HTTP/1.1\r\nHOST:",
            b"get /lower HTTP/1.1\r\nHost:",
            b"CONNECT a:443 HTTP/1.1\r\nHost: a:443",
            b"GET http://a/../b HTTP/1.1\nHost:",
            b"GET / HTTP/1.1\n\n",
            b"GET / HTTP/1.1\r\n folded",
            b"GET /\xc3\xa4 HTTP/1.1\r\nHost:",
            b"PRI * HTTP/1.1\r\nHost:",
            b"X HTTP/1.1 HTTP/1.1\r\n\r\n",
        ] {
            assert_eq!(sniff(head), Sniff::Http1, "{}", head.escape_ascii());
        }
    }

    #[test]
    fn looks_like_http_and_is_not() {
        for line in [
            &b"OPTIONS rtsp://a/b RTSP/1.0\r\nCSeq: 1\r\n"[..],
            b"INVITE sip:a@b SIP/2.0\r\nVia: c\r\n",
            b"GET foo\r\n",
            b"HELO example.com\r\n",
            b"GET /\r\n",
            b"GET / HTTP/1.1\r\nnot a header\r\n",
            b"GET / HTTP/1.2\r\n",
            b"GET / HTTP/2.0\r\n",
            b"GET / HTTP/1.1 \r\n",
            b"GET  / HTTP/1.1\r\n",
            b"GET / b HTTP/1.1\r\n",
            b" GET / HTTP/1.1\r\n",
            b"\r\n",
            b"*1\r\n$4\r\nPING\r\n",
            b"PING\r\n",
            b"\x10\x10\x00\x04MQTT",
            b"\x00\x00\x00\x08\x04\xd2\x16\x2f",
            b"AMQP\x00\x00\x09\x01",
            b"PRI * HTTP/2.0\r\n\r\nSX",
            b"\x80",
            b"\0",
        ] {
            assert_eq!(sniff(line), Sniff::Opaque, "{}", line.escape_ascii());
        }
    }

    #[test]
    fn http2_is_its_whole_preface() {
        for n in 0..HTTP2_PREFACE.len() {
            assert_eq!(sniff(&HTTP2_PREFACE[..n]), Sniff::NeedMore);
        }
        assert_eq!(sniff(HTTP2_PREFACE), Sniff::Http2);
        assert_eq!(sniff(&[HTTP2_PREFACE, &b"\0\0"[..]].concat()), Sniff::Http2);
    }

    #[test]
    fn tls_is_a_record_with_a_client_hello() {
        let hello = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc];
        for n in 1..6 {
            assert_eq!(sniff(&hello[..n]), Sniff::NeedMore);
        }
        assert_eq!(sniff(&hello), Sniff::Tls);
        assert_eq!(sniff(&[0x16, 3, 0x3f, 2, 0, 1]), Sniff::Tls);
        for not in [
            &[0x16, 2][..],
            &[0x16, 3, 1, 0, 0],
            &[0x16, 3, 1, 0xff, 0],
            &[0x16, 3, 1, 2, 0, 2],
            &[0x15, 3, 1],
        ] {
            assert_eq!(sniff(not), Sniff::Opaque, "{not:?}");
        }
    }

    #[test]
    fn a_request_line_has_an_end() {
        let mut line = b"GET /".to_vec();
        line.resize(MAX_REQUEST_LINE - 1, b'a');
        assert_eq!(sniff(&line), Sniff::NeedMore);
        line.push(b'a');
        assert_eq!(sniff(&line), Sniff::Opaque);
    }

    fn first_bytes() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            Just(b"GET".to_vec()),
            Just(b" ".to_vec()),
            Just(b"/".to_vec()),
            Just(b"HTTP/1.1".to_vec()),
            Just(b"HTTP/1.".to_vec()),
            Just(b"0".to_vec()),
            Just(b"\r\n".to_vec()),
            Just(b"\n".to_vec()),
            Just(b"\r".to_vec()),
            Just(b"Host: a".to_vec()),
            Just(b"PRI * HTTP/2.0\r\n\r\n".to_vec()),
            Just(b"SM\r\n\r\n".to_vec()),
            Just(vec![0x16, 3, 1, 2, 0, 1]),
            prop::collection::vec(any::<u8>(), 0..4),
        ];
        prop::collection::vec(piece, 0..9).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        /// However the bytes arrive, the answer is the same, and it never changes again.
        #[test]
        fn a_decision_stands(bytes in first_bytes()) {
            let mut decided = Sniff::NeedMore;
            for n in 0..=bytes.len() {
                let now = sniff(&bytes[..n]);
                if decided != Sniff::NeedMore {
                    prop_assert_eq!(now, decided);
                }
                decided = now;
            }
        }
    }
}
