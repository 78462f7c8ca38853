//! Probes of the application that the kubelet cannot make past the proxy, which the injector has
//! turned into requests to the admin port: `tcp/PORT` connects, `https/PORT/PATH` makes a request as the
//! kubelet would, without looking at the certificate. Only those named at the start (`--probe`) are
//! made: the port is open to all, and nobody shall look for open ports by it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{HOST, HeaderName};
use http::{Request, StatusCode};
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

/// The kubelet waits 1 s by default, and goes when its own time is over.
const PATIENCE: Duration = Duration::from_secs(60);

/// Makes a probe of the application at `own`: 200 when it is well, else another status and a sentence.
pub async fn ask<B>(own: IpAddr, asked: &str, request: &Request<B>) -> (StatusCode, String) {
    match timeout(PATIENCE, make(own, asked, request)).await {
        Ok(Ok(())) => (StatusCode::OK, "ok".to_owned()),
        Ok(Err(Wrong { status, reason })) => (status, reason),
        Err(_) => (
            StatusCode::GATEWAY_TIMEOUT,
            format!("{asked}: no answer in {} s", PATIENCE.as_secs()),
        ),
    }
}

struct Wrong {
    status: StatusCode,
    reason: String,
}

impl From<String> for Wrong {
    fn from(reason: String) -> Self {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        Self { status, reason }
    }
}

async fn make<B>(own: IpAddr, asked: &str, request: &Request<B>) -> Result<(), Wrong> {
    let unknown = || format!("--probe {asked} is neither tcp/PORT nor https/PORT/PATH");
    let (kind, rest) = asked.split_once('/').ok_or_else(unknown)?;
    let (port, path) = match rest.find('/') {
        Some(slash) => rest.split_at(slash),
        None => (rest, "/"),
    };
    let address = SocketAddr::new(own, port.parse().map_err(|_| unknown())?);
    let stream = TcpStream::connect(address)
        .await
        .map_err(|error| format!("the application takes no connection at {address}: {error}"))?;
    match kind {
        "tcp" => Ok(()),
        "https" => https(stream, address, path, request).await,
        _ => Err(unknown().into()),
    }
}

/// A GET, with the probe's own header fields; 200 to 399 is well, as for the kubelet.
async fn https<B>(
    stream: TcpStream,
    address: SocketAddr,
    path: &str,
    request: &Request<B>,
) -> Result<(), Wrong> {
    let failed = |error: &dyn std::fmt::Display| format!("HTTPS at {address}: {error}");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| failed(&error))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody(provider)))
        .with_no_client_auth();
    let tls = TlsConnector::from(Arc::new(config))
        .connect(ServerName::IpAddress(address.ip().into()), stream)
        .await
        .map_err(|error| failed(&error))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tls))
        .await
        .map_err(|error| failed(&error))?;
    let mut probe = Request::get(path)
        .body(Empty::<Bytes>::new())
        .map_err(|error| failed(&error))?;
    for (name, value) in request.headers() {
        if !is_of_connection(name) {
            probe.headers_mut().append(name, value.clone());
        }
    }
    if !probe.headers().contains_key(HOST) {
        let host = address.to_string().parse();
        probe
            .headers_mut()
            .insert(HOST, host.map_err(|error| failed(&error))?);
    }
    // Until the head is there; the body is nobody's concern, and the connection ends with this.
    let answer = tokio::select! {
        answer = sender.send_request(probe) => answer,
        ended = connection => match ended {
            Ok(()) => Err(failed(&"the connection ended without an answer"))?,
            Err(error) => Err(error),
        },
    };
    let status = answer.map_err(|error| failed(&error))?.status();
    if status.is_success() || status.is_redirection() {
        return Ok(());
    }
    Err(Wrong {
        status: if status.is_informational() {
            StatusCode::BAD_GATEWAY
        } else {
            status
        },
        reason: failed(&format!("the application says {status}")),
    })
}

/// RFC 9110 section 7.6.1.
fn is_of_connection(name: &HeaderName) -> bool {
    const OF_CONNECTION: [HeaderName; 5] = [
        http::header::CONNECTION,
        http::header::TE,
        http::header::TRANSFER_ENCODING,
        http::header::UPGRADE,
        http::header::CONTENT_LENGTH,
    ];
    OF_CONNECTION.contains(name)
}

/// The kubelet does not look at certificates either.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, known)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;

    use super::*;

    const OWN: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    async fn probed(asked: &str) -> (StatusCode, String) {
        let request = Request::get("/probe/x").header("x-probe", "1").body(());
        ask(OWN, asked, &request.unwrap()).await
    }

    #[tokio::test]
    async fn a_port_is_open_only_while_somebody_listens() {
        let listener = TcpListener::bind((OWN, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked = format!("tcp/{port}");
        assert_eq!(probed(&asked).await.0, StatusCode::OK);
        drop(listener);
        let (status, reason) = probed(&asked).await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(reason.contains("takes no connection"), "{reason}");
    }

    #[tokio::test]
    async fn https_asks_what_the_kubelet_would() {
        let made = rcgen::generate_simple_self_signed(["nobody".to_owned()]).unwrap();
        let key = made.signing_key.serialize_der().try_into().unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind((OWN, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let serving = tokio::spawn(async move {
            for answer in ["200 OK", "302 Found", "500 Oh no"] {
                let (stream, _) = listener.accept().await.unwrap();
                let mut stream = acceptor.accept(stream).await.unwrap();
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.unwrap());
                }
                let head = String::from_utf8(head).unwrap().to_lowercase();
                assert!(
                    head.starts_with("get /healthz?full=1 http/1.1\r\n"),
                    "{head}"
                );
                assert!(head.contains("x-probe: 1\r\n"), "{head}");
                assert!(
                    head.contains(&format!("host: 127.0.0.1:{port}\r\n")),
                    "{head}"
                );
                // The body never comes.
                let answer = format!("HTTP/1.1 {answer}\r\nContent-Length: 1000\r\n\r\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
                stream.flush().await.unwrap();
                let _ = stream.read_u8().await;
            }
        });
        let asked = format!("https/{port}/healthz?full=1");
        assert_eq!(probed(&asked).await.0, StatusCode::OK);
        assert_eq!(probed(&asked).await.0, StatusCode::OK);
        assert_eq!(probed(&asked).await.0, StatusCode::INTERNAL_SERVER_ERROR);
        serving.await.unwrap();
        // Nobody listens any more.
        assert_eq!(probed(&asked).await.0, StatusCode::SERVICE_UNAVAILABLE);
    }

    #[tokio::test]
    async fn what_is_no_probe_is_said() {
        for asked in ["tcp", "tcp/x", "tcp/70000", "udp"] {
            let (status, reason) = probed(asked).await;
            assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
            assert!(reason.contains("neither tcp/PORT"), "{reason}");
        }
    }
}
