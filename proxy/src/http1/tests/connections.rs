//! How long a server's connection is used, and how long anybody may be silent.

use super::*;
use crate::tables::ConnectionPolicy;

const END: &str = "\r\n\r\n";
/// Longer than this nobody has to be silent.
const SILENCE: Duration = Duration::from_millis(100);

async fn client_of(server: &Server, limits: BackendPolicy, policy: RoutePolicy) -> TcpStream {
    let (client, proxy) = tcp_pair().await;
    let backend = backend(vec![endpoint(server.address, None)], limits);
    let flow = outbound(destination(backend, policy));
    spawn_local(serve(worker(None), Stream::from(proxy), flow));
    client
}

fn keeping(connection: ConnectionPolicy) -> BackendPolicy {
    BackendPolicy {
        connection,
        ..BackendPolicy::default()
    }
}

engine_test!(a_connection_that_has_carried_enough_is_replaced, async {
    // Alone with its client, and in the pool.
    for max_connections in [0, 1] {
        let two = vec![Until(END), Say(OK), Until(END), Say(OK), Gone];
        let server = server(vec![two; 3]).await;
        let limits = BackendPolicy {
            max_connections,
            ..keeping(ConnectionPolicy {
                max_requests: 2,
                ..ConnectionPolicy::default()
            })
        };
        let mut client = client_of(&server, limits, RoutePolicy::default()).await;
        for _ in 0..5 {
            say(&mut client, GET).await;
            hear(&mut client, OK).await;
        }
        server.hears("<gone>").await;
        let both = format!("{GET}{GET}");
        let heard = server.heard.borrow();
        assert_eq!(heard[0], format!("{both}<gone>"));
        assert!(heard[1].starts_with(&both) && heard.len() == 3, "{heard:?}");
        assert_eq!(heard[2], GET);
    }
});

engine_test!(an_idle_connection_is_closed_and_its_client_stays, async {
    let once = vec![Until(END), Say(OK), Gone];
    let server = server(vec![once; 2]).await;
    let limits = keeping(ConnectionPolicy {
        idle_timeout: Some(SILENCE),
        ..ConnectionPolicy::default()
    });
    let mut client = client_of(&server, limits, RoutePolicy::default()).await;
    say(&mut client, GET).await;
    hear(&mut client, OK).await;
    gone(&server).await;
    say(&mut client, GET).await;
    hear(&mut client, OK).await;
});

fn silent_for(stream_idle_timeout: Duration) -> RoutePolicy {
    RoutePolicy {
        stream_idle_timeout: Some(stream_idle_timeout),
        ..RoutePolicy::default()
    }
}

engine_test!(silence_before_an_answer_is_a_504, async {
    let server = server(vec![vec![Until(END), Gone]]).await;
    let mut client = client_of(&server, BackendPolicy::default(), silent_for(SILENCE)).await;
    say(&mut client, GET).await;
    hear(&mut client, "HTTP/1.1 504 ").await;
    gone(&server).await;
});

engine_test!(silence_within_an_answer_is_a_reset, async {
    const BEGIN: &str = "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nbegin";
    let server = server(vec![vec![Until(END), Say(BEGIN), Gone]]).await;
    let mut client = client_of(&server, BackendPolicy::default(), silent_for(SILENCE)).await;
    say(&mut client, GET).await;
    hear(&mut client, BEGIN).await;
    assert!(rest(&mut client).await.is_err());
    gone(&server).await;
});

engine_test!(silence_after_an_upgrade_is_a_reset, async {
    const ASK: &str = "GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n";
    const SWITCH: &str =
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n";
    let server = server(vec![vec![Until(END), Say(SWITCH), Until("x"), Say("x")]]).await;
    let mut client = client_of(&server, BackendPolicy::default(), silent_for(SILENCE)).await;
    say(&mut client, ASK).await;
    hear(&mut client, SWITCH).await;
    say(&mut client, "x").await;
    hear(&mut client, "x").await;
    assert!(rest(&mut client).await.is_err());
});
