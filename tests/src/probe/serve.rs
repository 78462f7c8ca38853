//! The server: says who it is and what it was asked.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{HeaderMap, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_rustls::TlsAcceptor;

use crate::tls;

#[derive(clap::Args)]
pub struct Options {
    #[arg(long, default_value_t = 8080)]
    http: u16,
    /// The server speaks first here
    #[arg(long, default_value_t = 7000)]
    greeting: u16,
    /// What it says of itself
    #[arg(long, env = "NAME", default_value = "probe")]
    name: String,
    /// The same over TLS, on this port
    #[arg(long, requires_all = ["certificate", "key"])]
    tls: Option<u16>,
    /// PEM
    #[arg(long)]
    certificate: Option<PathBuf>,
    /// PEM
    #[arg(long)]
    key: Option<PathBuf>,
}

impl Options {
    fn acceptor(&self) -> TlsAcceptor {
        let file = |path: &Option<PathBuf>| path.clone().expect("clap requires it");
        tls::acceptor(&file(&self.certificate), &file(&self.key))
    }
}

/// What is answered since `/become`, where the query says nothing else.
static STATUS: AtomicU16 = AtomicU16::new(200);

/// `?ms=200` delays the answer, `?status=503` sets it, `?fail=20` makes 20 of 100 a 503; `/become?status=500`
/// sets it from now on, except for `/ready`. The answer names the server, the path and the header
/// fields; it is a gRPC message when the request's content type is gRPC's.
async fn answer(
    name: &str,
    request: Request<Incoming>,
) -> Result<Response<BoxBody<Bytes, Infallible>>, Infallible> {
    let query: BTreeMap<String, String> = request
        .uri()
        .query()
        .unwrap_or_default()
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    if let Some(ms) = query.get("ms").and_then(|ms| ms.parse().ok()) {
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }
    let asked: Option<StatusCode> = query.get("status").and_then(|status| status.parse().ok());
    let status = match (request.uri().path(), asked) {
        ("/become", status) => {
            let status = status.unwrap_or(StatusCode::OK);
            STATUS.store(status.as_u16(), Ordering::Relaxed);
            StatusCode::OK
        }
        ("/ready", status) => status.unwrap_or(StatusCode::OK),
        (_, status) => status.unwrap_or_else(|| {
            StatusCode::from_u16(STATUS.load(Ordering::Relaxed)).unwrap_or_default()
        }),
    };
    let fails = query.get("fail").and_then(|share| share.parse().ok());
    let status = if fails.is_some_and(|share: u64| draw() < share) {
        StatusCode::SERVICE_UNAVAILABLE
    } else {
        status
    };
    let (head, body) = request.into_parts();
    let read = body.collect().await.map_or(0, |body| body.to_bytes().len());
    let headers: BTreeMap<&str, String> = head
        .headers
        .iter()
        .map(|(name, value)| {
            (
                name.as_str(),
                String::from_utf8_lossy(value.as_bytes()).into_owned(),
            )
        })
        .collect();
    let said = serde_json::json!({
        "server": name,
        "method": head.method.as_str(),
        "path": head.uri.path(),
        "version": format!("{:?}", head.version),
        "headers": headers,
        "body": read,
    });
    let said = said.to_string() + "\n";
    let grpc = head
        .headers
        .get("content-type")
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
    let mut response = if grpc {
        // Length-Prefixed-Message of gRPC over HTTP/2: not compressed, its length, itself.
        let mut message = vec![0];
        message.extend((said.len() as u32).to_be_bytes());
        message.extend(said.as_bytes());
        let trailers =
            HeaderMap::from_iter([("grpc-status".parse().unwrap(), "0".parse().unwrap())]);
        let body = Full::from(message).with_trailers(std::future::ready(Some(Ok(trailers))));
        let mut response = Response::new(body.boxed());
        let kind = "application/grpc".parse().unwrap();
        response.headers_mut().insert("content-type", kind);
        response
    } else {
        Response::new(Full::from(said).boxed())
    };
    *response.status_mut() = status;
    Ok(response)
}

/// 0 to 99, evenly and without a pattern (SplitMix64).
fn draw() -> u64 {
    static STATE: AtomicU64 = AtomicU64::new(0);
    let step = 0x9e37_79b9_7f4a_7c15;
    let mut z = STATE.fetch_add(step, Ordering::Relaxed).wrapping_add(step);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) % 100
}

async fn greet(name: String, port: u16) {
    let listener = TcpListener::bind(("::", port)).await.unwrap();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            continue;
        };
        let name = name.clone();
        tokio::spawn(async move {
            let mut stream = BufReader::new(stream);
            let hello = format!("220 {name} speaks first\r\n");
            stream.write_all(hello.as_bytes()).await?;
            let mut line = String::new();
            while stream.read_line(&mut line).await? > 0 {
                stream
                    .write_all(format!("250 {}\r\n", line.trim_end()).as_bytes())
                    .await?;
                line.clear();
            }
            std::io::Result::Ok(())
        });
    }
}

/// Serves a connection, as long as it takes when there is somebody to wait for its end.
fn serve<S>(stream: S, name: String, graceful: Option<&GracefulShutdown>)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let service = hyper::service::service_fn(move |request| {
        let name = name.clone();
        async move { answer(&name, request).await }
    });
    let connection = auto::Builder::new(TokioExecutor::new())
        .serve_connection(TokioIo::new(stream), service)
        .into_owned();
    if let Some(graceful) = graceful {
        let watched = graceful.watch(connection);
        tokio::spawn(async move { watched.await.map_err(|error| error.to_string()) });
    } else {
        tokio::spawn(async move { connection.await.map_err(|error| error.to_string()) });
    }
}

async fn serve_tls(name: String, port: u16, acceptor: TlsAcceptor) {
    let listener = TcpListener::bind(("::", port)).await.unwrap();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            continue;
        };
        let (name, accepting) = (name.clone(), acceptor.accept(stream));
        tokio::spawn(async move {
            if let Ok(stream) = accepting.await {
                serve(stream, name, None);
            }
        });
    }
}

/// Serves until SIGTERM, and then goes on for those that have a connection, as applications that
/// roll out well do: nothing running is cut off.
pub async fn run(options: Options) {
    let mut terminate = signal(SignalKind::terminate()).unwrap();
    let listener = TcpListener::bind(("::", options.http)).await.unwrap();
    tokio::spawn(greet(options.name.clone(), options.greeting));
    if let Some(port) = options.tls {
        tokio::spawn(serve_tls(options.name.clone(), port, options.acceptor()));
    }
    let graceful = GracefulShutdown::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                serve(stream, options.name.clone(), Some(&graceful));
            }
            _ = terminate.recv() => break,
        }
    }
    drop(listener);
    let _ = tokio::time::timeout(Duration::from_secs(20), graceful.shutdown()).await;
}
