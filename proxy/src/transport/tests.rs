use std::io::ErrorKind;
use std::net::Ipv4Addr;

use bytes::Bytes;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::testing::{listen, tcp_pair, tls_configs};
use super::*;
use std::time::Duration;

async fn tls_pair() -> (Stream, Stream) {
    let (client, server) = tls_configs();
    let (listener, addr) = listen().await;
    let options = Options::default();
    let (connected, accepted) = tokio::join!(connect_tls(addr, &options, client), async {
        let (tcp, _) = listener.accept().await.unwrap();
        accept_tls(tcp.into(), server, HANDSHAKE_TIMEOUT).await
    });
    (connected.unwrap(), accepted.unwrap())
}

/// Reads to the end: what came, and how it ended.
async fn read_all(stream: &mut Stream) -> (Vec<u8>, std::io::Result<usize>) {
    let mut data = Vec::new();
    let end = stream.read_to_end(&mut data).await;
    (data, end)
}

#[tokio::test]
async fn refused_is_told_from_other_failures() {
    let (listener, addr) = listen().await;
    drop(listener);
    let error = connect_plain(addr, &Options::default()).await.unwrap_err();
    assert!(matches!(error, ConnectError::Refused { addr: at } if at == addr));
    assert_eq!(error.proxy_status(), "connection_refused");
    assert!(error.is_endpoints());
    let (client, _) = tls_configs();
    let error = connect_tls(addr, &Options::default(), client)
        .await
        .unwrap_err();
    assert!(matches!(error, ConnectError::Refused { .. }), "{error}");
}

#[tokio::test]
async fn a_connect_ends_in_time() {
    // A listener whose queue is full answers no SYN.
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let any = std::net::SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    socket.bind(&any.into()).unwrap();
    socket.listen(0).unwrap();
    let addr = socket.local_addr().unwrap().as_socket().unwrap();
    let options = Options {
        connect_timeout: Duration::from_millis(100),
        ..Options::default()
    };
    let mut queued = Vec::new();
    let error = loop {
        match connect_plain(addr, &options).await {
            Ok(stream) => queued.push(stream),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, ConnectError::TimedOut { .. }), "{error}");
    assert!(error.to_string().contains("100 ms"), "{error}");
}

#[tokio::test]
async fn a_handshake_ends_in_time_and_says_what_failed() {
    let (client, server) = tls_configs();
    let (listener, addr) = listen().await;
    let options = Options {
        handshake_timeout: Duration::from_millis(50),
        ..Options::default()
    };
    let error = connect_tls(addr, &options, client.clone())
        .await
        .unwrap_err();
    assert_eq!(error.proxy_status(), "connection_timeout");
    let (quiet, _) = listener.accept().await.unwrap();
    let error = accept_tls(quiet.into(), server.clone(), Duration::from_millis(50)).await;
    assert!(error.is_err());

    // A peer that speaks no TLS.
    let (mut plain, accepted) = tcp_pair().await;
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let error = accept_tls(accepted.into(), server, HANDSHAKE_TIMEOUT)
        .await
        .unwrap_err();
    assert!(matches!(error, TlsError::Protocol(_)), "{error}");

    // A certificate of somebody else's.
    let options = Options::default();
    let (_, other) = tls_configs();
    let (accepted, connected) = tokio::join!(
        async {
            let (tcp, _) = listener.accept().await.unwrap();
            accept_tls(tcp.into(), other, HANDSHAKE_TIMEOUT).await
        },
        connect_tls(addr, &options, client),
    );
    let (accepted, connected) = (accepted.unwrap_err(), connected.unwrap_err());
    assert_eq!(connected.proxy_status(), "tls_certificate_error");
    assert!(matches!(accepted, TlsError::Alert(_)), "{accepted}");

    // A peer that goes away.
    let (gone, _) = tokio::join!(connect_tls(addr, &options, tls_configs().0), async {
        drop(listener.accept().await)
    });
    assert_eq!(gone.unwrap_err().proxy_status(), "connection_terminated");
}

#[tokio::test]
async fn a_client_hello_read_before_is_replayed() {
    let (client, server) = tls_configs();
    let (listener, addr) = listen().await;
    let options = Options::default();
    let (connected, accepted) = tokio::join!(connect_tls(addr, &options, client), async {
        let (mut tcp, _) = listener.accept().await.unwrap();
        let mut hello = bytes::BytesMut::new();
        tcp.read_buf(&mut hello).await.unwrap();
        let stream = Stream {
            io: Io::Plain(tcp),
            prefix: hello.freeze(),
        };
        accept_tls(stream, server, HANDSHAKE_TIMEOUT).await
    });
    let (mut connected, mut accepted) = (connected.unwrap(), accepted.unwrap());
    connected.write_all(b"hello").await.unwrap();
    let mut read = [0; 5];
    accepted.read_exact(&mut read).await.unwrap();
    assert_eq!(&read, b"hello");
    assert!(connected.io.tcp().unwrap().nodelay().unwrap());
}

#[tokio::test]
async fn half_close_leaves_the_other_direction_open() {
    let (mut client, mut server) = tls_pair().await;
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let (data, end) = read_all(&mut server).await;
    assert_eq!((&data[..], end.is_ok()), (&b"question"[..], true));
    // After the peer's close_notify, and after our own: large enough for several round trips.
    let answer = vec![7; 1 << 20];
    let sending = async {
        server.write_all(&answer).await.unwrap();
        server.shutdown().await.unwrap();
    };
    let ((), (data, end)) = tokio::join!(sending, read_all(&mut client));
    assert!(data == answer && end.is_ok());
}

#[tokio::test]
async fn an_abort_comes_after_the_data() {
    let data = Bytes::from(vec![42; 200_000]);
    for tls in [false, true] {
        for wait in [false, true] {
            let (mut writer, mut reader) = if tls {
                tls_pair().await
            } else {
                let (a, b) = tcp_pair().await;
                (a.into(), b.into())
            };
            let writing = async {
                writer.write_all(&data).await.unwrap();
                if wait {
                    writer.io.abort_delivered().await;
                } else {
                    writer.io.abort();
                }
            };
            let ((), (read, end)) = tokio::join!(writing, read_all(&mut reader));
            let kind = end.unwrap_err().kind();
            assert!(read == data, "tls {tls}: {} bytes", read.len());
            assert!(
                kind == ErrorKind::ConnectionReset || tls && kind == ErrorKind::UnexpectedEof,
                "{kind:?}"
            );
        }
    }
}

#[tokio::test]
async fn an_abort_after_a_half_close_is_noticed() {
    for tls in [false, true] {
        let (mut a, mut b): (Stream, Stream) = if tls {
            tls_pair().await
        } else {
            let (a, b) = tcp_pair().await;
            (a.into(), b.into())
        };
        a.shutdown().await.unwrap();
        assert!(read_all(&mut b).await.1.is_ok());
        let mut hangup = b.io.hangup().unwrap();
        let early = tokio::time::timeout(Duration::from_millis(30), &mut hangup).await;
        assert!(early.is_err(), "a half-close is no reset");
        a.io.abort();
        tokio::time::timeout(Duration::from_secs(2), hangup)
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn what_is_left_ends_in_order() {
    for tls in [false, true] {
        let (unused, mut peer): (Stream, Stream) = if tls {
            tls_pair().await
        } else {
            let (a, b) = tcp_pair().await;
            (a.into(), b.into())
        };
        unused.io.leave();
        let (read, end) = read_all(&mut peer).await;
        assert!(read.is_empty() && end.is_ok(), "tls {tls}: {end:?}");
    }
}

#[tokio::test]
async fn a_peer_that_takes_nothing_does_not_hold_an_abort_up() {
    let (writer, reader) = tcp_pair().await;
    SockRef::from(&reader).set_recv_buffer_size(4096).unwrap();
    let data = vec![1; 64 << 10];
    while writer.try_write(&data).is_ok() {}
    let begin = std::time::Instant::now();
    Io::Plain(writer).abort_delivered().await;
    let took = begin.elapsed();
    assert!(took >= ending::DELIVERY_STALL && took < 5 * ending::DELIVERY_STALL);
}

#[tokio::test]
async fn session_tickets_are_not_speech() {
    let (mut client, mut server) = tls_pair().await;
    let early = tokio::time::timeout(Duration::from_millis(50), client.spoken()).await;
    assert!(early.is_err());
    server.write_all(b"220 hello").await.unwrap();
    client.spoken().await;
    server.shutdown().await.unwrap();
    let (data, end) = read_all(&mut client).await;
    assert_eq!((&data[..], end.is_ok()), (&b"220 hello"[..], true));
}

#[tokio::test]
async fn an_idle_connection_holds_no_read_buffer() {
    let (mut a, mut b) = tls_pair().await;
    let data = vec![3; 300_000];
    let sending = a.write_all(&data);
    let reading = async {
        let mut read = vec![0; data.len()];
        b.read_exact(&mut read).await.unwrap();
        read
    };
    let (sent, read) = tokio::join!(sending, reading);
    sent.unwrap();
    assert!(read == data);
    assert!(b.prefix.is_empty());
    let Io::Server(tls) = &b.io else { panic!() };
    assert_eq!(tls.get_ref().0.ahead(), 0);
}
