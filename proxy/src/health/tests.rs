//! Active health checks: what streaks do, and probes of servers that are well, unwell and silent.

use super::*;
use crate::tables::HealthProbe;

fn check() -> HealthCheck {
    HealthCheck {
        probe: HealthProbe::Tcp,
        interval: Duration::from_secs(10),
        timeout: Duration::from_secs(1),
        unhealthy_threshold: 3,
        healthy_threshold: 2,
    }
}

#[test]
fn as_many_checks_in_a_row_as_the_policy_says() {
    let check = check();
    let mut streak = Streak::new();
    let mut seen = String::new();
    for answer in "gffgfffffgfggg".chars() {
        let changed = streak.count(answer == 'g', &check);
        seen.push(match (changed, streak.well) {
            (true, true) => 'W',
            (true, false) => 'U',
            (false, true) => 'w',
            (false, false) => 'u',
        });
    }
    assert_eq!(seen, "wwwwwwUuuuuuWw");
}

#[tokio::test]
async fn an_endpoint_is_asked_as_its_policy_says() {
    let test = async {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::task::spawn_local(async move {
            for answer in ["204 No Content", "503 Not Now", "404 Nowhere", "429 Enough"] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = vec![0; 1024];
                let n = stream.read(&mut request).await.unwrap();
                let request = String::from_utf8_lossy(&request[..n]).into_owned();
                assert!(
                    request.starts_with("GET /live?x HTTP/1.1\r\nHost: cart\r\n"),
                    "{request}"
                );
                let answer = format!(
                    "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n"
                );
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let worker = crate::testing::worker(None);
        let endpoint = crate::testing::endpoint(address, None);
        let policy = crate::tables::BackendPolicy::default();
        let http = |statuses: &[u16]| HealthCheck {
            probe: HealthProbe::Http {
                path: "/live?x".into(),
                host: Some("cart".into()),
                statuses: statuses.into(),
            },
            ..check()
        };
        let any = http(&[]);
        let ask = async |check: &HealthCheck| probe::ask(&worker, &endpoint, &policy, check).await;
        assert!(ask(&any).await.is_ok());
        assert!(matches!(ask(&any).await, Err(probe::Unwell::Status(503))));
        assert!(ask(&http(&[200, 404])).await.is_ok());
        assert!(matches!(ask(&any).await, Err(probe::Unwell::Silent)));
        // Nobody listens any more.
        assert!(matches!(ask(&any).await, Err(probe::Unwell::Connect(_))));
    };
    tokio::task::LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_grpc_server_says_whether_it_serves() {
    use bytes::Bytes;
    let test = async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::task::spawn_local(async move {
            for (answer, status) in [
                (&[0, 0, 0, 0, 2, 8, 1][..], "0"),
                (&[0, 0, 0, 0, 2, 8, 2], "0"),
                (&[], "12"),
                (&[], "8"),
            ] {
                let (stream, _) = listener.accept().await.unwrap();
                let mut connection = h2::server::handshake(stream).await.unwrap();
                let (request, mut respond) = connection.accept().await.unwrap().unwrap();
                tokio::task::spawn_local(
                    async move { while connection.accept().await.is_some() {} },
                );
                assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
                let asked = request.into_body().data().await.unwrap().unwrap();
                assert_eq!(&asked[..], b"\0\0\0\0\x06\x0a\x04shop");
                let head = http::Response::builder().header("content-type", "application/grpc");
                let head = head.body(()).unwrap();
                let mut send = respond.send_response(head, false).unwrap();
                send.send_data(Bytes::copy_from_slice(answer), false)
                    .unwrap();
                let mut trailers = http::HeaderMap::new();
                trailers.insert("grpc-status", status.parse().unwrap());
                send.send_trailers(trailers).unwrap();
            }
        });
        let worker = crate::testing::worker(None);
        let endpoint = crate::testing::endpoint(address, None);
        let policy = crate::tables::BackendPolicy::default();
        let check = HealthCheck {
            probe: HealthProbe::Grpc {
                service: "shop".into(),
            },
            ..check()
        };
        let ask = async || probe::ask(&worker, &endpoint, &policy, &check).await;
        assert!(ask().await.is_ok());
        assert!(matches!(ask().await, Err(probe::Unwell::NotServing)));
        assert!(matches!(ask().await, Err(probe::Unwell::GrpcStatus(12))));
        assert!(matches!(ask().await, Err(probe::Unwell::Silent)));
    };
    tokio::task::LocalSet::new().run_until(test).await;
}
