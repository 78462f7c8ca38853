//! The client: requests at a steady rate over kept connections, every failure kept.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::{http1, http2};
use hyper::header::HeaderValue;
use hyper::{HeaderMap, Request, Uri};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::tls;

#[derive(clap::Args)]
pub struct Options {
    /// http://host:port/path, or https: (any certificate is taken)
    url: Uri,
    /// Clients, each with a connection of its own
    #[arg(long, default_value_t = 4)]
    clients: u32,
    /// Requests a second of all clients together
    #[arg(long, default_value_t = 50.0)]
    rate: f64,
    /// Seconds
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// As many requests as this, and no more
    #[arg(long)]
    count: Option<u64>,
    /// HTTP/2 by prior knowledge
    #[arg(long)]
    http2: bool,
    /// A new connection for every request
    #[arg(long)]
    no_keepalive: bool,
    /// A header field, `name: value`; may be repeated
    #[arg(long = "header")]
    headers: Vec<String>,
    /// A header that each client sends back as it was last given it
    #[arg(long)]
    session: Option<String>,
    /// The server's name in TLS, in place of the URL's host
    #[arg(long)]
    sni: Option<String>,
}

enum Sender {
    Http1(http1::SendRequest<Empty<Bytes>>),
    Http2(http2::SendRequest<Empty<Bytes>>),
}

#[derive(Default)]
struct Seen {
    outcomes: BTreeMap<String, u64>,
    servers: BTreeMap<String, u64>,
    took: Vec<Duration>,
    /// The longest time without any good answer.
    last_good: Option<Instant>,
    gap: Duration,
}

async fn connect(options: &Options) -> Result<Sender, String> {
    let authority = options.url.authority().ok_or("the URL has no host")?;
    let secure = options.url.scheme_str() == Some("https");
    let default = if secure { 443 } else { 80 };
    let port = authority.port_u16().unwrap_or(default);
    let stream = TcpStream::connect((authority.host(), port))
        .await
        .map_err(|error| format!("connect: {error}"))?;
    let _ = stream.set_nodelay(true);
    if !secure {
        return handshake(options, stream).await;
    }
    let name = options.sni.as_deref().unwrap_or(authority.host());
    let name = ServerName::try_from(name.to_owned()).map_err(|error| error.to_string())?;
    let stream = tls::connector()
        .connect(name, stream)
        .await
        .map_err(|error| format!("TLS: {error}"))?;
    handshake(options, stream).await
}

async fn handshake<S>(options: &Options, stream: S) -> Result<Sender, String>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let io = TokioIo::new(stream);
    if options.http2 {
        let (sender, connection) = http2::handshake(TokioExecutor::new(), io)
            .await
            .map_err(|error| format!("handshake: {error}"))?;
        tokio::spawn(connection);
        return Ok(Sender::Http2(sender));
    }
    let (sender, connection) = http1::handshake(io)
        .await
        .map_err(|error| format!("handshake: {error}"))?;
    tokio::spawn(connection.with_upgrades());
    Ok(Sender::Http1(sender))
}

async fn request(
    options: &Options,
    connection: &mut Option<Sender>,
    session: &mut Option<HeaderValue>,
) -> Result<(u16, Bytes), String> {
    let ready = match connection {
        Some(Sender::Http1(sender)) => sender.ready().await.is_ok(),
        Some(Sender::Http2(sender)) => sender.ready().await.is_ok(),
        None => false,
    };
    if !ready || options.no_keepalive {
        *connection = Some(connect(options).await?);
    }
    let path = options
        .url
        .path_and_query()
        .map_or("/", |path| path.as_str());
    let host = options.url.authority().map_or("", |host| host.as_str());
    let mut builder = Request::builder();
    if options.http2 {
        builder = builder.uri(options.url.clone());
    } else {
        builder = builder.uri(path).header("host", host);
    }
    for header in &options.headers {
        let (name, value) = header.split_once(':').ok_or("write --header name: value")?;
        builder = builder.header(name.trim(), value.trim());
    }
    if let (Some(name), Some(value)) = (&options.session, &session) {
        builder = builder.header(name, value);
    }
    let request = builder
        .body(Empty::new())
        .map_err(|error| error.to_string())?;
    let answered = match connection.as_mut().unwrap() {
        Sender::Http1(sender) => sender.send_request(request).await,
        Sender::Http2(sender) => sender.send_request(request).await,
    };
    let response = answered.map_err(|error| format!("request: {error}"))?;
    let status = response.status().as_u16();
    let (head, body) = response.into_parts();
    if let Some(given) = options
        .session
        .as_ref()
        .and_then(|name| head.headers.get(name))
    {
        *session = Some(given.clone());
    }
    let body = body
        .collect()
        .await
        .map_err(|error| format!("body: {error}"))?;
    // gRPC says how a call ended in the trailers; when it is over at once, in the head.
    let ended = |fields: &HeaderMap| Some((fields.get("grpc-status")?.clone(), fields.clone()));
    match ended(&head.headers).or_else(|| ended(body.trailers()?)) {
        Some((code, fields)) if code != "0" => {
            let message = fields.get("grpc-message").map(HeaderValue::as_bytes);
            let message = String::from_utf8_lossy(message.unwrap_or_default()).into_owned();
            Err(format!(
                "grpc-status {}: {message}",
                code.to_str().unwrap_or_default()
            ))
        }
        Some(_) => {
            let message = body.to_bytes();
            Ok((status, message.slice(5.min(message.len())..)))
        }
        None => Ok((status, body.to_bytes())),
    }
}

async fn client(options: &Options, first: Instant, end: Instant, seen: &RefCell<Seen>) {
    let every = Duration::from_secs_f64(f64::from(options.clients) / options.rate);
    let (mut connection, mut session) = (None, None);
    let mut due = first;
    let share = options
        .count
        .map(|count| count.div_ceil(u64::from(options.clients)));
    let mut sent = 0;
    while due < end && share.is_none_or(|share| sent < share) {
        tokio::time::sleep_until(due.into()).await;
        let began = Instant::now();
        let limit = Duration::from_secs(15);
        let asked = request(options, &mut connection, &mut session);
        let outcome = match tokio::time::timeout(limit, asked).await {
            Ok(outcome) => outcome,
            Err(_) => Err("no answer within 15 s".to_owned()),
        };
        sent += 1;
        let now = Instant::now();
        let mut seen = seen.borrow_mut();
        let outcome = match outcome {
            Ok((status, body)) => {
                if status == 200 {
                    let last = seen.last_good.replace(now).unwrap_or(first);
                    seen.gap = seen.gap.max(now - last);
                    let said: Option<serde_json::Value> = serde_json::from_slice(&body).ok();
                    if let Some(server) = said.as_ref().and_then(|said| said["server"].as_str()) {
                        *seen.servers.entry(server.to_owned()).or_default() += 1;
                    }
                    status.to_string()
                } else {
                    let text = String::from_utf8_lossy(&body);
                    format!(
                        "{status} {}",
                        text.chars().take(300).collect::<String>().trim()
                    )
                }
            }
            Err(error) => {
                connection = None;
                error
            }
        };
        *seen.outcomes.entry(outcome).or_default() += 1;
        seen.took.push(now - began);
        // A client that has fallen behind does not catch up by a burst.
        due = (due + every).max(now - every);
    }
}

pub async fn run(options: Options) {
    let options = Rc::new(options);
    let seen = Rc::new(RefCell::new(Seen::default()));
    let began = Instant::now();
    let end = began + Duration::from_secs_f64(options.seconds);
    let local = tokio::task::LocalSet::new();
    for index in 0..options.clients {
        let (options, seen) = (Rc::clone(&options), Rc::clone(&seen));
        // Not all at once.
        let first = began + Duration::from_secs_f64(f64::from(index) / options.rate);
        local.spawn_local(async move { client(&options, first, end, &seen).await });
    }
    local.await;
    let mut seen = seen.borrow_mut();
    seen.took.sort_unstable();
    let at = |share: f64| {
        let index = (seen.took.len() as f64 * share) as usize;
        let took = seen.took.get(index.min(seen.took.len().saturating_sub(1)));
        took.map_or(0.0, |took| took.as_secs_f64() * 1000.0)
    };
    let total: u64 = seen.outcomes.values().sum();
    println!(
        "{}",
        serde_json::json!({
            "requests": total,
            "good": seen.outcomes.get("200").copied().unwrap_or(0),
            "outcomes": seen.outcomes,
            "servers": seen.servers,
            "p50_ms": at(0.5),
            "p99_ms": at(0.99),
            "longest_gap_ms": seen.gap.as_millis() as u64,
        })
    );
}

/// Exchanges with a server that speaks first; what was said in the last one, and who greeted how
/// often (the second word of a greeting).
pub async fn greet(to: &str, count: u32) {
    let mut servers: BTreeMap<String, u32> = BTreeMap::new();
    let (mut greeting, mut answer) = (String::new(), String::new());
    let mut greeted = Duration::ZERO;
    for _ in 0..count {
        greeting.clear();
        answer.clear();
        let began = Instant::now();
        let stream = TcpStream::connect(to).await.expect("connect");
        let mut stream = BufReader::new(stream);
        stream.read_line(&mut greeting).await.expect("greeting");
        greeted = began.elapsed();
        stream.write_all(b"HELO probe\r\n").await.expect("say");
        stream.read_line(&mut answer).await.expect("answer");
        let server = greeting.split(' ').nth(1).unwrap_or_default();
        *servers.entry(server.to_owned()).or_default() += 1;
    }
    println!(
        "{}",
        serde_json::json!({
            "greeting": greeting.trim_end(),
            "answer": answer.trim_end(),
            "greeted_ms": greeted.as_secs_f64() * 1000.0,
            "servers": servers,
        })
    );
}
