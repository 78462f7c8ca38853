//! One check of one endpoint.

use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{Request, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::http1::head::{self, Head, Parsed};
use crate::identity::Alpn;
use crate::outbound::connect::connect;
use crate::tables::{BackendPolicy, EndpointInfo, HealthCheck, HealthProbe};
use crate::transport::{ConnectError, Stream};
use crate::worker::Worker;

/// Most of an answer that is looked at, bytes.
const MAX_ANSWER: usize = 64 * 1024;
/// How long a connection must stay for the TCP check: the proxy before an application that takes
/// none ends it at once.
const STAYS: Duration = Duration::from_millis(100);
/// `grpc.health.v1.HealthCheckResponse.ServingStatus.SERVING`.
const SERVING: i32 = 1;

/// Why an endpoint is unwell.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unwell {
    #[error("no answer within {} ms", .0.as_millis())]
    Late(Duration),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("its connection ended without an answer")]
    Ended,
    #[error("its answer is no HTTP")]
    NotHttp,
    #[error("it answered {0}")]
    Status(u16),
    #[error("HTTP/2: {0}")]
    H2(#[from] h2::Error),
    #[error("its gRPC status is {0}")]
    GrpcStatus(u32),
    #[error("it is not serving")]
    NotServing,
    /// It was asked too often, or this proxy could not ask.
    #[error("nothing is known")]
    Silent,
}

/// Asks an endpoint whether it is well.
pub(super) async fn ask(
    worker: &Worker,
    endpoint: &EndpointInfo,
    policy: &BackendPolicy,
    check: &HealthCheck,
) -> Result<(), Unwell> {
    let alpn = match check.probe {
        HealthProbe::Http { .. } => Alpn::Http1,
        HealthProbe::Grpc { .. } => Alpn::H2,
        HealthProbe::Tcp => Alpn::Tcp,
    };
    let stream = match connect(worker, endpoint, policy, alpn).await {
        Ok(stream) => stream,
        Err(error) if error.is_endpoints() => return Err(error.into()),
        Err(_) => return Err(Unwell::Silent),
    };
    match &check.probe {
        HealthProbe::Http {
            path,
            host,
            statuses,
        } => {
            let host = match host {
                Some(host) => host.to_string(),
                None => endpoint.address.to_string(),
            };
            let status = http(stream, path, &host).await?;
            let good = match &statuses[..] {
                [] => (200..300).contains(&status),
                statuses => statuses.contains(&status),
            };
            match status {
                _ if good => Ok(()),
                429 => Err(Unwell::Silent),
                _ => Err(Unwell::Status(status)),
            }
        }
        HealthProbe::Grpc { service } => grpc(stream, service).await,
        HealthProbe::Tcp => tcp(stream).await,
    }
}

/// The status that a GET is answered with.
async fn http(mut stream: Stream, path: &str, host: &str) -> Result<u16, Unwell> {
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: weft-health-check\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    stream.flush().await?;
    let mut answer = BytesMut::with_capacity(1024);
    let mut head = Head::default();
    loop {
        match head::parse_response(&answer, b"GET", &mut head) {
            Ok(Parsed::Complete) if (100..200).contains(&head.status) => {
                answer.advance(head.end);
                continue;
            }
            Ok(Parsed::Complete) => return Ok(head.status),
            Ok(Parsed::Partial) if answer.len() > MAX_ANSWER => return Err(Unwell::NotHttp),
            Ok(Parsed::Partial) => {}
            Err(_) => return Err(Unwell::NotHttp),
        }
        if stream.read_buf(&mut answer).await? == 0 {
            return Err(Unwell::Ended);
        }
    }
}

/// `grpc.health.v1.Health/Check` ("GRPC Health Checking Protocol").
async fn grpc(stream: Stream, service: &str) -> Result<(), Unwell> {
    let (sender, connection) = h2::client::handshake(stream).await?;
    // It ends with the check, which drops the sender.
    let driving = tokio::task::spawn_local(async move {
        let _ = connection.await;
    });
    let _ended = End(driving.abort_handle());
    let mut sender = sender.ready().await?;
    let request = Request::post("http://health/grpc.health.v1.Health/Check")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", "weft-health-check")
        .body(())
        .map_err(|_| Unwell::Silent)?;
    let (response, mut body) = sender.send_request(request, false)?;
    body.send_data(message(service), true)?;
    let response = response.await?;
    if response.status() == StatusCode::TOO_MANY_REQUESTS {
        return Err(Unwell::Silent);
    }
    if response.status() != StatusCode::OK {
        return Err(Unwell::Status(response.status().as_u16()));
    }
    let (head, mut body) = response.into_parts();
    let mut answer = BytesMut::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        answer.extend_from_slice(&data);
        if answer.len() > MAX_ANSWER {
            return Err(Unwell::NotServing);
        }
    }
    let trailers = body.trailers().await?.unwrap_or(head.headers);
    let status = trailers
        .get("grpc-status")
        .and_then(|status| status.to_str().ok()?.parse().ok());
    match status {
        Some(0) if serving(&answer) => Ok(()),
        Some(0) => Err(Unwell::NotServing),
        // RESOURCE_EXHAUSTED: it was asked too often.
        Some(8) => Err(Unwell::Silent),
        other => Err(Unwell::GrpcStatus(other.unwrap_or(2))),
    }
}

/// Aborts a task when it is dropped.
struct End(tokio::task::AbortHandle);

impl Drop for End {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A connection that stays for a moment.
async fn tcp(mut stream: Stream) -> Result<(), Unwell> {
    let mut byte = [0];
    match tokio::time::timeout(STAYS, stream.read(&mut byte)).await {
        Err(_) => Ok(()),
        Ok(Ok(0)) => Err(Unwell::Ended),
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(error.into()),
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct CheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// A request as gRPC frames it: not compressed, its length, its bytes.
fn message(service: &str) -> Bytes {
    use prost::Message;
    let bytes = CheckRequest {
        service: service.to_owned(),
    }
    .encode_to_vec();
    let mut framed = BytesMut::with_capacity(bytes.len() + 5);
    framed.put_u8(0);
    framed.put_u32(bytes.len() as u32);
    framed.put_slice(&bytes);
    framed.freeze()
}

/// Whether a framed answer says SERVING.
fn serving(framed: &[u8]) -> bool {
    use prost::Message;
    let Some((&[0, a, b, c, d], rest)) = framed.split_first_chunk::<5>() else {
        return false;
    };
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    rest.len() == length && CheckResponse::decode(rest).is_ok_and(|answer| answer.status == SERVING)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_serving_is_well() {
        assert_eq!(&message("")[..], &[0, 0, 0, 0, 0]);
        assert_eq!(&message("a")[..], &[0, 0, 0, 0, 3, 10, 1, b'a']);
        for (framed, well) in [
            (&[0, 0, 0, 0, 2, 8, 1][..], true),
            (&[0, 0, 0, 0, 2, 8, 2], false),
            (&[0, 0, 0, 0, 0], false),
            (&[1, 0, 0, 0, 2, 8, 1], false),
            (&[0, 0, 0, 0, 3, 8, 1], false),
            (&[0, 0, 0], false),
        ] {
            assert_eq!(serving(framed), well, "{framed:?}");
        }
    }
}
