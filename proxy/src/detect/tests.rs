//! Detection with time and the server in it (time is paused), and ClientHellos of real clients.

use std::convert::Infallible;
use std::io::Cursor;
use std::sync::Arc;

use proptest::prelude::*;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::TcpStream;

use super::*;
use crate::transport::testing::tcp_pair;

/// Nothing is to be opened.
async fn never() -> Result<Stream, Infallible> {
    panic!("the server's connection was opened")
}

/// Two ends of a client's connection: the client's, and the proxy's.
fn client() -> (DuplexStream, DuplexStream) {
    duplex(1 << 20)
}

async fn detected(said: &[u8]) -> Detected {
    let (mut client, mut proxy) = client();
    client.write_all(said).await.unwrap();
    let Ok(detected) = detect(&mut proxy, BytesMut::new(), &Timings::default(), never).await;
    detected
}

#[tokio::test(start_paused = true)]
async fn a_client_that_speaks_decides_at_once() {
    let begin = Instant::now();
    let head = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    assert!(matches!(detected(head).await, Detected::Http1 { buf } if buf == head[..]));
    let preface = [&HTTP2_PREFACE[..], b"\0\0\0"].concat();
    assert!(matches!(detected(&preface).await, Detected::Http2 { buf } if buf == preface));
    for said in [&b"\x10"[..], b"\0\0", b"\xff\xfe\xfd", b"?\r\n\0"] {
        match detected(said).await {
            Detected::Opaque {
                buf,
                upstream: None,
            } => assert_eq!(buf, said),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(begin.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn what_was_read_before_counts() {
    let (mut client, mut proxy) = client();
    client.write_all(b"TTP/1.0\r\n\r\n").await.unwrap();
    let before = BytesMut::from(&b"GET / H"[..]);
    let Ok(detected) = detect(&mut proxy, before, &Timings::default(), never).await;
    assert!(matches!(detected, Detected::Http1 { buf } if &buf[..] == b"GET / HTTP/1.0\r\n\r\n"));
}

#[tokio::test(start_paused = true)]
async fn a_head_in_pieces_is_waited_for() {
    let (mut client, mut proxy) = client();
    let speaking = async {
        for piece in [&b"G"[..], b"ET / HT", b"TP/1.1\r", b"\nHost", b": a\r\n"] {
            client.write_all(piece).await.unwrap();
            tokio::time::sleep(Duration::from_millis(45)).await;
        }
    };
    let timings = Timings::default();
    let detecting = detect(&mut proxy, BytesMut::new(), &timings, never);
    let (Ok(detected), ()) = tokio::join!(detecting, speaking);
    assert!(matches!(detected, Detected::Http1 { buf } if buf.starts_with(b"GET / HTTP/1.1\r\nH")));
}

#[tokio::test(start_paused = true)]
async fn a_plausible_beginning_has_its_time() {
    let begin = Instant::now();
    let (mut client, mut proxy) = client();
    client.write_all(b"GET /key").await.unwrap();
    let Ok(detected) = detect(&mut proxy, BytesMut::new(), &Timings::default(), never).await;
    match detected {
        Detected::Opaque {
            buf,
            upstream: None,
        } => assert_eq!(&buf[..], b"GET /key"),
        other => panic!("{other:?}"),
    }
    let took = begin.elapsed();
    assert!(took >= UNDECIDED && took < UNDECIDED + Duration::from_millis(5));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_speaks_first_decides() {
    let (_client, mut proxy) = client();
    let (upstream, mut server) = tcp_pair().await;
    server.write_all(b"220 ready\r\n").await.unwrap();
    let begin = Instant::now();
    let open = || async { Ok::<_, Infallible>(Stream::from(upstream)) };
    let Ok(detected) = detect(&mut proxy, BytesMut::new(), &Timings::default(), open).await;
    let Detected::Opaque {
        buf,
        upstream: Some(mut upstream),
    } = detected
    else {
        panic!("{detected:?}")
    };
    assert!(buf.is_empty() && begin.elapsed() >= SILENCE);
    let mut greeting = [0; 11];
    upstream.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"220 ready\r\n");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_ends_at_once_decides() {
    let (_client, mut proxy) = client();
    let (upstream, server) = tcp_pair().await;
    drop(server);
    let open = || async { Ok::<_, Infallible>(Stream::from(upstream)) };
    let Ok(detected) = detect(&mut proxy, BytesMut::new(), &Timings::default(), open).await;
    assert!(matches!(
        detected,
        Detected::Opaque {
            upstream: Some(_),
            ..
        }
    ));
}

/// The client says `said` after a second; the server says nothing. Also: is the connection to the
/// server still there?
async fn after_silence(said: &[u8]) -> (Detected, TcpStream) {
    let (mut client, mut proxy) = client();
    let (upstream, server) = tcp_pair().await;
    let speaking = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        if said.is_empty() {
            client.shutdown().await.unwrap();
        } else {
            client.write_all(said).await.unwrap();
        }
    };
    let open = || async { Ok::<_, Infallible>(Stream::from(upstream)) };
    let timings = Timings::default();
    let detecting = detect(&mut proxy, BytesMut::new(), &timings, open);
    let (Ok(detected), ()) = tokio::join!(detecting, speaking);
    (detected, server)
}

#[tokio::test(start_paused = true)]
async fn a_client_that_speaks_late_may_still_speak_http() {
    let (detected, mut server) = after_silence(b"GET / HTTP/1.0\r\n\r\n").await;
    assert!(matches!(detected, Detected::Http1 { .. }));
    // The connection was given back.
    assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_was_opened_is_used_for_opaque_bytes() {
    for said in [&b"\0\0\0\x08"[..], b"GET /stalls", b""] {
        let (detected, server) = after_silence(said).await;
        match detected {
            Detected::Opaque {
                buf,
                upstream: Some(upstream),
            } => {
                assert_eq!(buf, said);
                assert_eq!(
                    upstream.io.tcp().unwrap().peer_addr().unwrap(),
                    server.local_addr().unwrap()
                );
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_connection_is_told() {
    let (_client, mut proxy) = client();
    let open = || async { Err::<Stream, _>("refused") };
    let detected = detect(&mut proxy, BytesMut::new(), &Timings::default(), open).await;
    assert_eq!(detected.unwrap_err(), "refused");
}

#[tokio::test(start_paused = true)]
async fn an_end_before_anything_is_opaque() {
    let (mut client, mut proxy) = client();
    client.shutdown().await.unwrap();
    let Ok(detected) = detect(&mut proxy, BytesMut::new(), &Timings::default(), never).await;
    assert!(matches!(
        detected,
        Detected::Opaque { buf, upstream: None } if buf.is_empty()
    ));
}

#[tokio::test]
async fn a_reset_is_told_with_what_was_said_before() {
    for said in [&b""[..], b"GET /"] {
        let (mut client, mut proxy) = tcp_pair().await;
        client.write_all(said).await.unwrap();
        crate::transport::Io::Plain(client).abort_delivered().await;
        let Ok(detected) = detect(&mut proxy, BytesMut::new(), &Timings::default(), never).await;
        assert!(matches!(detected, Detected::Reset { buf, upstream: None } if buf == said));
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_hello_may_take_longer_than_http() {
    let hello = real_hello("example.com", &[b"weft/tcp"], true);
    let (mut client, mut proxy) = client();
    let speaking = async {
        for piece in hello.chunks(400) {
            client.write_all(piece).await.unwrap();
            tokio::time::sleep(2 * UNDECIDED).await;
        }
    };
    let timings = Timings::default();
    let detecting = detect(&mut proxy, BytesMut::new(), &timings, never);
    let (Ok(detected), ()) = tokio::join!(detecting, speaking);
    let Detected::Tls {
        buf, hello: read, ..
    } = detected
    else {
        panic!("{detected:?}")
    };
    assert_eq!(buf, hello);
    assert!(read.offers(b"weft/tcp") && !read.offers(b"h2"));
}

#[tokio::test(start_paused = true)]
async fn what_was_opened_in_silence_goes_with_tls() {
    let hello = real_hello("example.com", &[b"h2"], true);
    let (mut client, mut proxy) = client();
    let (upstream, _server) = tcp_pair().await;
    let address = upstream.local_addr().unwrap();
    let open = || async { Ok::<_, Infallible>(Stream::from(upstream)) };
    let speaking = async {
        tokio::time::sleep(2 * SILENCE).await;
        client.write_all(&hello).await.unwrap();
    };
    let timings = Timings::default();
    let detecting = detect(&mut proxy, BytesMut::new(), &timings, open);
    let (Ok(detected), ()) = tokio::join!(detecting, speaking);
    let Detected::Tls {
        buf,
        upstream: Some(upstream),
        ..
    } = detected
    else {
        panic!("{detected:?}")
    };
    assert_eq!(buf, hello);
    let tcp = upstream.io.tcp().unwrap();
    assert_eq!(tcp.local_addr().unwrap(), address);
}

#[tokio::test(start_paused = true)]
async fn where_http_is_not_looked_for_only_tls_is_waited_for() {
    let timings = Timings {
        http: false,
        ..Timings::default()
    };
    let begin = Instant::now();
    for said in [
        &b"G"[..],
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        HTTP2_PREFACE,
        b"\x10",
    ] {
        let (mut client, mut proxy) = client();
        client.write_all(said).await.unwrap();
        let Ok(detected) = detect(&mut proxy, BytesMut::new(), &timings, never).await;
        assert!(matches!(detected, Detected::Opaque { buf, upstream: None } if buf == said));
    }
    assert_eq!(begin.elapsed(), Duration::ZERO);
    let hello = real_hello("example.com", &[b"weft/tcp"], true);
    let (mut client, mut proxy) = client();
    let speaking = async {
        for piece in hello.chunks(3).take(2).chain([&hello[6..]]) {
            client.write_all(piece).await.unwrap();
            tokio::time::sleep(UNDECIDED / 2).await;
        }
    };
    let detecting = detect(&mut proxy, BytesMut::new(), &timings, never);
    let (Ok(detected), ()) = tokio::join!(detecting, speaking);
    assert!(matches!(detected, Detected::Tls { buf, .. } if buf == hello));
}

#[tokio::test(start_paused = true)]
async fn two_silent_sides_hold_no_buffer_and_no_timer() {
    let (_client, mut proxy) = client();
    let (upstream, _server) = tcp_pair().await;
    let open = || async { Ok::<_, Infallible>(Stream::from(upstream)) };
    let timings = Timings::default();
    let detecting = detect(&mut proxy, BytesMut::with_capacity(4096), &timings, open);
    let waited = tokio::time::timeout(Duration::from_secs(86_400), detecting).await;
    assert!(waited.is_err());
}

/// The first flight of rustls: with X25519MLKEM768 more than a TCP segment.
fn real_hello(name: &str, alpn: &[&[u8]], post_quantum: bool) -> Vec<u8> {
    let mut groups = vec![aws_lc_rs::kx_group::X25519, aws_lc_rs::kx_group::SECP256R1];
    if post_quantum {
        groups.insert(0, aws_lc_rs::kx_group::X25519MLKEM768);
    }
    let provider = CryptoProvider {
        kx_groups: groups,
        ..aws_lc_rs::default_provider()
    };
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut connection = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut hello = Vec::new();
    while connection.wants_write() {
        connection.write_tls(&mut hello).unwrap();
    }
    hello
}

/// What rustls' own acceptor reads in it; `None` if it refuses it or wants more.
fn reference(hello: &[u8]) -> Option<ClientHello> {
    let mut acceptor = rustls::server::Acceptor::default();
    let mut rest = Cursor::new(hello);
    loop {
        if acceptor.read_tls(&mut rest).ok()? == 0 {
            return None;
        }
        if let Some(accepted) = acceptor.accept().ok()? {
            let hello = accepted.client_hello();
            return Some(ClientHello {
                sni: hello.server_name().map(Into::into),
                alpn: hello
                    .alpn()
                    .map(|names| names.map(Into::into).collect())
                    .unwrap_or_default(),
            });
        }
    }
}

/// The same handshake message in records of at most `size` bytes.
fn in_records_of(hello: &[u8], size: usize) -> Vec<u8> {
    hello[5..]
        .chunks(size)
        .flat_map(|part| {
            let length = u16::try_from(part.len()).unwrap().to_be_bytes();
            [&hello[..3], &length, part].concat()
        })
        .collect()
}

#[test]
fn hellos_are_read_as_rustls_reads_them() {
    for name in ["a.default.svc.cluster.local", "example.com", "127.0.0.1"] {
        for alpn in [&[][..], &[&b"weft/tcp"[..]], &[b"h2", b"http/1.1"]] {
            for post_quantum in [true, false] {
                let hello = real_hello(name, alpn, post_quantum);
                assert_eq!(hello.len() > 1400, post_quantum, "{}", hello.len());
                let expected = reference(&hello).unwrap();
                assert_eq!(expected.sni.is_some(), name != "127.0.0.1");
                assert_eq!(expected.alpn.len(), alpn.len());
                for size in [1 << 14, 1000, 100, 3, 1] {
                    let cut = in_records_of(&hello, size);
                    assert_eq!(client_hello(&cut), Ok(Some(expected.clone())));
                    for n in (0..cut.len()).step_by(7) {
                        assert_eq!(client_hello(&cut[..n]), Ok(None), "{n} of {}", cut.len());
                    }
                }
            }
        }
    }
}

#[test]
fn the_versions_of_a_hello_say_nothing() {
    let mut hello =
        include_bytes!("../../../fuzz/seeds/client_hello/record-version-of-no-use").to_vec();
    assert_eq!(hello[2], 0x21);
    assert_eq!(sniff(&hello), Sniff::Tls);
    let read = client_hello(&hello).unwrap().unwrap();
    assert_eq!(read.alpn, [Box::from(*b"weft/h2")]);
    hello[2] = 1;
    assert_eq!(client_hello(&hello).as_ref(), Ok(&Some(read.clone())));
    // Nor does the hello's own, to us.
    hello[9] = 0x21;
    assert_eq!(client_hello(&hello), Ok(Some(read)));
}

#[test]
fn what_is_no_client_hello() {
    for not in [
        &b"GET / HTTP/1.1\r\n"[..],
        b"\x16\x02\x00",
        b"\x16\x03\x01\x00\x00",
        b"\x16\x03\x01\x40\x01",
        b"\x16\x03\x01\x00\x04\x02\0\0\0",
        // Longer than anybody's.
        b"\x16\x03\x01\x00\x04\x01\x02\0\0",
        // An alert amid its records.
        b"\x16\x03\x01\x00\x01\x01\x15\x03\x01\x00\x02\x01\x00",
        // It has nothing in it.
        b"\x16\x03\x01\x00\x04\x01\0\0\0",
    ] {
        assert_eq!(client_hello(not), Err(NotTls), "{}", not.escape_ascii());
    }
}

#[test]
fn a_name_that_is_none_is_left_out() {
    let hello = real_hello("example.com", &[b"h2"], false);
    let at = hello
        .windows(11)
        .position(|part| part == b"example.com")
        .unwrap();
    let mut odd = hello.clone();
    odd[at + 3] = b'\n';
    let read = client_hello(&odd).unwrap().unwrap();
    assert_eq!((read.sni, read.alpn.len()), (None, 1));
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = client_hello(&bytes);
        let _ = client_hello(&[&[0x16, 3, 1, 0, 190, 1, 0, 0, 186, 3, 3][..], &bytes].concat());
    }

    /// A damaged hello never makes it panic, and where both still read one they agree.
    #[test]
    fn damage_is_refused_or_read_alike(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        size in 1..2000usize,
    ) {
        let mut hello = in_records_of(&real_hello("example.com", &[b"h2", b"weft/h2"], false), size);
        for (at, byte) in damage {
            let at = at.index(hello.len());
            hello[at] = byte;
        }
        let ours = client_hello(&hello);
        let theirs = reference(&hello);
        if let (Ok(Some(ours)), Some(theirs)) = (ours, theirs) {
            prop_assert_eq!(ours.alpn, theirs.alpn);
            // Names with an underscore and the like: rustls has none, we report them.
            if theirs.sni.is_some() {
                prop_assert_eq!(ours.sni.map(|name| name.to_lowercase()), theirs.sni.map(|name| name.to_lowercase()));
            }
        }
    }
}
