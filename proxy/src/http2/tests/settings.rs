//! How connections to servers are kept, by policy.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::frames::{HEADERS, PREFACE, SETTINGS, frame, next};
use super::*;
use crate::tables::ConnectionPolicy;

const WINDOW_UPDATE: u8 = 8;
/// SETTINGS_INITIAL_WINDOW_SIZE (RFC 9113 section 6.5.2).
const INITIAL_WINDOW_SIZE: [u8; 2] = [0, 4];

fn keeping(
    address: SocketAddr,
    max_connections: u32,
    connection: ConnectionPolicy,
) -> std::sync::Arc<Destination> {
    let policy = BackendPolicy {
        max_connections,
        connection,
        ..BackendPolicy::default()
    };
    let backend = backend(vec![endpoint(address, None)], policy);
    destination(backend, RoutePolicy::default())
}

fn at_most(max_requests: u32) -> ConnectionPolicy {
    ConnectionPolicy {
        max_requests,
        ..ConnectionPolicy::default()
    }
}

#[tokio::test]
async fn a_connection_that_has_carried_enough_is_replaced() {
    local(async {
        let (address, connections) = server(|_, respond| async move { ok(respond, "yes") }).await;
        let mut client = client(keeping(address, 0, at_most(3))).await;
        for n in 1..=10 {
            client = client.ready().await.unwrap();
            let (response, _) = ask(&mut client, get("/")).await.unwrap();
            assert_eq!(
                (response.status().as_u16(), &**response.body()),
                (200, &b"yes"[..])
            );
            assert_eq!(connections.get(), usize::div_ceil(n, 3), "{n} requests");
        }
    })
    .await;
}

/// What runs on a connection that is being replaced is finished there.
#[tokio::test]
async fn streams_under_way_are_finished_where_they_are() {
    local(async {
        let server = Held::start().await;
        let mut client = client(keeping(server.address, 0, at_most(4))).await;
        let mut asked = Vec::new();
        for _ in 0..10 {
            client = client.ready().await.unwrap();
            asked.push(client.send_request(get("/"), true).unwrap().0);
        }
        server.has(10).await;
        assert_eq!(server.connections.get(), 3);
        server.go.add_permits(10);
        for response in asked {
            let mut body = response.await.unwrap().into_body();
            assert_eq!(read(&mut body).await.unwrap().0, "yes");
        }
        assert_eq!(server.connections.get(), 3);
    })
    .await;
}

/// One connection is allowed at once, and each carries two requests: nothing is refused for that.
#[tokio::test]
async fn a_worn_connection_under_a_limit_costs_no_request() {
    local(async {
        let (address, connections) = server(|_, respond| async move {
            tokio::task::yield_now().await;
            ok(respond, "yes");
        })
        .await;
        let mut client = client(keeping(address, 1, at_most(2))).await;
        for _ in 0..10 {
            let mut asked = Vec::new();
            for _ in 0..7 {
                client = client.ready().await.unwrap();
                asked.push(client.send_request(get("/"), true).unwrap().0);
            }
            for response in asked {
                assert_eq!(response.await.unwrap().status(), 200);
            }
        }
        assert!(connections.get() > 1, "{}", connections.get());
    })
    .await;
}

#[tokio::test]
async fn servers_are_told_of_the_windows() {
    local(async {
        let (listener, address) = listen().await;
        let connection = ConnectionPolicy {
            stream_window: 131_072,
            connection_window: 1 << 20,
            ..ConnectionPolicy::default()
        };
        let mut client = client(keeping(address, 0, connection)).await;
        let (_response, _) = client.send_request(get("/"), true).unwrap();
        let (mut tcp, _) = listener.accept().await.unwrap();
        let mut preface = [0; PREFACE.len()];
        tcp.read_exact(&mut preface).await.unwrap();
        tcp.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
        let (mut stream, mut whole) = (0, 65_535);
        loop {
            let frame = next(&mut tcp).await.unwrap();
            match frame.kind {
                HEADERS => break,
                SETTINGS => {
                    for setting in frame.payload.chunks_exact(6) {
                        if setting[..2] == INITIAL_WINDOW_SIZE {
                            stream = u32::from_be_bytes(setting[2..].try_into().unwrap());
                        }
                    }
                }
                WINDOW_UPDATE => {
                    whole += u32::from_be_bytes(frame.payload[..4].try_into().unwrap());
                }
                _ => {}
            }
        }
        assert_eq!((stream, whole), (131_072, 1 << 20));
    })
    .await;
}
