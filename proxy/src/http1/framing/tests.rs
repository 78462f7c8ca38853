use proptest::prelude::*;

use super::super::head::{self, HeadError, Parsed};
use super::*;

fn request(fields: &str) -> Result<Framing, HeadError> {
    let text = format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n");
    let mut head = Head::default();
    assert_eq!(
        head::parse_request(text.as_bytes(), &mut head)?,
        Parsed::Complete
    );
    Ok(head.framing)
}

fn response(method: &str, start: &str, fields: &str) -> Result<Framing, HeadError> {
    let text = format!("HTTP/1.{start}\r\n{fields}\r\n");
    let mut head = Head::default();
    let parsed = head::parse_response(text.as_bytes(), method.as_bytes(), &mut head)?;
    assert_eq!(parsed, Parsed::Complete);
    Ok(head.framing)
}

#[test]
fn requests() {
    for (fields, body) in [
        ("", Body::None),
        ("Content-Length: 0\r\n", Body::None),
        ("content-LENGTH: 12\r\n", Body::Length(12)),
        ("Transfer-Encoding: chunked\r\n", Body::Chunked),
        ("Transfer-Encoding: gzip, Chunked\r\n", Body::Chunked),
        (
            "Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n",
            Body::Chunked,
        ),
    ] {
        assert_eq!(request(fields).unwrap().body, body, "{fields:?}");
    }
}

#[test]
fn requests_that_could_be_read_in_two_ways_are_refused() {
    for (fields, error) in [
        (
            "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n",
            FramingError::LengthAndCoding,
        ),
        (
            "Content-Length: 1\r\nContent-Length: 1\r\n",
            FramingError::RepeatedLength,
        ),
        ("Content-Length: 1, 1\r\n", FramingError::BadLength),
        ("Content-Length: +1\r\n", FramingError::BadLength),
        ("Content-Length: 0x1\r\n", FramingError::BadLength),
        ("Content-Length: \r\n", FramingError::BadLength),
        (
            "Content-Length: 99999999999999999999\r\n",
            FramingError::BadLength,
        ),
        ("Transfer-Encoding: gzip\r\n", FramingError::BadCoding),
        ("Transfer-Encoding: chunked,\r\n", FramingError::BadCoding),
        (
            "Transfer-Encoding: chunked, gzip\r\n",
            FramingError::BadCoding,
        ),
        (
            "Transfer-Encoding: chunked, chunked\r\n",
            FramingError::BadCoding,
        ),
        (
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
            FramingError::BadCoding,
        ),
        ("Transfer-Encoding: xchunked\r\n", FramingError::BadCoding),
        ("Transfer-Encoding: \r\n", FramingError::BadCoding),
        ("Transfer-Encoding: identity\r\n", FramingError::BadCoding),
        ("Host: b\r\n", FramingError::RepeatedHost),
    ] {
        assert_eq!(
            request(fields),
            Err(HeadError::Framing(error)),
            "{fields:?}"
        );
    }
}

#[test]
fn responses() {
    for (method, start, fields, body) in [
        ("GET", "1 200 OK", "Content-Length: 3\r\n", Body::Length(3)),
        ("HEAD", "1 200 OK", "Content-Length: 3\r\n", Body::None),
        ("GET", "1 204 No", "", Body::None),
        ("GET", "1 304 Not", "Content-Length: 3\r\n", Body::None),
        ("GET", "1 103 Hints", "", Body::None),
        ("GET", "1 200", "", Body::UntilClose),
        ("GET", "0 200 OK", "", Body::UntilClose),
        ("CONNECT", "1 200 OK", "", Body::None),
        (
            "GET",
            "1 200 OK",
            "Transfer-Encoding: chunked\r\n",
            Body::Chunked,
        ),
        (
            "GET",
            "1 200 OK",
            "Transfer-Encoding: gzip\r\n",
            Body::UntilClose,
        ),
    ] {
        assert_eq!(
            response(method, start, fields).unwrap().body,
            body,
            "{method} {start}"
        );
    }
    let both = "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n";
    assert!(response("GET", "1 200 OK", both).is_err());
}

#[test]
fn what_the_connection_field_says() {
    let framing = request("Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n").unwrap();
    assert!(framing.upgrade && framing.keep_alive && !framing.strip && !framing.close);
    assert!(request("Upgrade: websocket\r\n").unwrap().upgrade);
    assert!(request("Connection: close, X-Hop\r\n").unwrap().strip);
}

#[test]
fn fields_of_this_hop_are_taken_out() {
    let text = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: x-hop , close,Host\r\nX-Hop: 1\r\nB: 2\r\nx-hop: 3\r\n\r\n";
    let mut head = Head::default();
    head::parse_request(text, &mut head).unwrap();
    assert!(head.framing.strip);
    let mut edits = Vec::new();
    hop_by_hop(text, &head, &mut edits);
    let mut out = Vec::new();
    head.write(text, &edits, &mut out);
    assert_eq!(
        String::from_utf8(out).unwrap(),
        "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nB: 2\r\n\r\n"
    );
}

fn chunked(bytes: &[u8]) -> Result<(usize, bool), FramingError> {
    let mut reader = BodyReader::new(Body::Chunked);
    let taken = reader.advance(bytes)?;
    Ok((taken, reader.is_done()))
}

#[test]
fn chunks_are_followed_to_their_end() {
    let body = b"5;a=\"b\"\r\nhello\r\nA\r\n0123456789\r\n0\r\nX-T: 1\r\nY: 2\r\n\r\n";
    let mut with_next = body.to_vec();
    with_next.extend_from_slice(b"GET / HTTP/1.1\r\n");
    assert_eq!(chunked(&with_next), Ok((body.len(), true)));
}

#[test]
fn malformed_chunks_are_refused() {
    for bad in [
        &b"\r\n"[..],
        b"g\r\n",
        b"5\nhello",
        b"5\r\nhelloX",
        b"5\r\nhello\n",
        b"-1\r\n",
        b"0x5\r\nhello",
        b"1000000000000000\r\n",
        b"0\r\n X: 1\r\n\r\n",
        b"0\r\nX: 1\n\r\n",
        b"5\r\nhello\r\n5\x00\r\n",
    ] {
        assert!(chunked(bad).is_err(), "{:?}", String::from_utf8_lossy(bad));
    }
}

#[test]
fn a_servers_chunks_may_have_lines_that_end_without_cr() {
    let body = b"5\nhello\n0A\r\n0123456789\n0\nT: 1\n\n";
    for step in 1..body.len() {
        let mut reader = BodyReader::of_response(Body::Chunked);
        for piece in body.chunks(step) {
            assert_eq!(reader.advance(piece), Ok(piece.len()));
        }
        assert_eq!(reader, BodyReader::DoneLoosely);
        assert_eq!(reader.advance(b"HTTP/1.1"), Ok(0));
    }
    let mut strict = BodyReader::of_response(Body::Chunked);
    strict.advance(b"1\r\na\r\n0\r\n\r\n").unwrap();
    assert_eq!(strict, BodyReader::Done);
    let mut extended = BodyReader::of_response(Body::Chunked);
    assert_eq!(extended.advance(b"5;e=1\n"), Err(FramingError::BadChunk));
}

#[test]
fn leading_zeros_of_a_chunks_size_do_not_count() {
    let zeros = "0".repeat(49);
    let body = format!("{zeros}5\r\nhello\r\n{zeros}\r\n\r\n");
    assert_eq!(chunked(body.as_bytes()), Ok((body.len(), true)));
    assert!(chunked("0".repeat(65).as_bytes()).is_err());
    assert!(chunked(b"0fffffffffffffff\r\n").is_ok());
}

proptest! {
    /// However a body is cut into reads, it ends at the same byte.
    #[test]
    fn cuts_do_not_matter(
        chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..40), 0..6),
        rest in proptest::collection::vec(any::<u8>(), 0..20),
        cut in 1usize..9,
    ) {
        let mut body = Vec::new();
        for chunk in &chunks {
            body.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
            body.extend_from_slice(chunk);
            body.extend_from_slice(b"\r\n");
        }
        body.extend_from_slice(b"0\r\nt: 1\r\n\r\n");
        let end = body.len();
        body.extend_from_slice(&rest);
        let mut reader = BodyReader::new(Body::Chunked);
        let mut total = 0;
        for piece in body.chunks(cut) {
            let taken = reader.advance(piece).unwrap();
            total += taken;
            if taken < piece.len() || reader.is_done() {
                break;
            }
        }
        prop_assert!(reader.is_done());
        prop_assert_eq!(total, end);
    }

    /// Arbitrary bytes never panic, and never take more than there is.
    #[test]
    fn arbitrary_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut reader = BodyReader::new(Body::Chunked);
        if let Ok(taken) = reader.advance(&bytes) {
            prop_assert!(taken <= bytes.len());
        }
        let mut head = Head::default();
        let _ = head::parse_request(&bytes, &mut head);
        let _ = head::parse_response(&bytes, b"GET", &mut head);
    }
}
