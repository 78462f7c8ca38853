//! The engine between h2 clients and servers over loopback sockets.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use h2::client::SendRequest;
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Method, Request, Response};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch};
use tokio::task::spawn_local;

use super::serve;
use crate::tables::{BackendPolicy, Destination, RoutePolicy};
use crate::testing::{backend, destination, endpoint, outbound, pass, rounds, worker};
use crate::transport::Stream;
use crate::transport::testing::{listen, tcp_pair};
use crate::worker::Worker;

mod calls;
mod connections;
mod crew;
mod failures;
mod frames;
mod settings;
mod streams;

type Asked = Request<RecvStream>;
type Answer = SendResponse<Bytes>;

/// Runs a test with local tasks; none takes longer than this.
async fn local<F: Future>(test: F) -> F::Output {
    let set = tokio::task::LocalSet::new();
    tokio::time::timeout(Duration::from_secs(20), set.run_until(test))
        .await
        .expect("the test hangs")
}

/// An HTTP/2 server; `handle` is called for each stream. Counts its connections.
async fn server<F, Fut>(handle: F) -> (SocketAddr, Rc<Cell<usize>>)
where
    F: Fn(Asked, Answer) -> Fut + Clone + 'static,
    Fut: Future<Output = ()> + 'static,
{
    let (listener, address) = listen().await;
    let count = Rc::new(Cell::new(0));
    let connections = count.clone();
    spawn_local(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            count.set(count.get() + 1);
            let handle = handle.clone();
            spawn_local(async move {
                let mut builder = h2::server::Builder::new();
                builder.enable_connect_protocol();
                let mut connection = builder.handshake::<_, Bytes>(tcp).await.unwrap();
                while let Some(Ok((request, respond))) = connection.accept().await {
                    spawn_local(handle(request, respond));
                }
            });
        }
    });
    (address, connections)
}

/// A server that has every request wait until one may be answered.
struct Held {
    address: SocketAddr,
    connections: Rc<Cell<usize>>,
    /// Requests that have come.
    asked: watch::Sender<usize>,
    /// How many are answered, in the order in which they came.
    go: Rc<Semaphore>,
}

impl Held {
    async fn start() -> Self {
        let (asked, go) = (watch::Sender::new(0), Rc::new(Semaphore::new(0)));
        let (asking, going) = (asked.clone(), go.clone());
        let (address, connections) = server(move |_, respond| {
            let (asking, going) = (asking.clone(), going.clone());
            async move {
                asking.send_modify(|asked| *asked += 1);
                going.acquire().await.unwrap().forget();
                ok(respond, "yes");
            }
        })
        .await;
        Self {
            address,
            connections,
            asked,
            go,
        }
    }

    /// Waits until so many requests have come.
    async fn has(&self, requests: usize) {
        let mut asked = self.asked.subscribe();
        asked.wait_for(|asked| *asked >= requests).await.unwrap();
    }
}

/// A destination of one endpoint without policies.
fn to(address: SocketAddr) -> std::sync::Arc<Destination> {
    with_policy(&[address], RoutePolicy::default())
}

fn with_policy(addresses: &[SocketAddr], policy: RoutePolicy) -> std::sync::Arc<Destination> {
    let endpoints = addresses.iter().map(|a| endpoint(*a, None)).collect();
    destination(backend(endpoints, BackendPolicy::default()), policy)
}

/// A connection through the proxy.
async fn connect(worker: &Rc<Worker>, to: std::sync::Arc<Destination>) -> TcpStream {
    let (ours, theirs) = tcp_pair().await;
    spawn_local(serve(worker.clone(), Stream::from(theirs), outbound(to)));
    ours
}

/// A client through a proxy of its own.
async fn client(to: std::sync::Arc<Destination>) -> SendRequest<Bytes> {
    client_of(&worker(None), to).await
}

async fn client_of(worker: &Rc<Worker>, to: std::sync::Arc<Destination>) -> SendRequest<Bytes> {
    let tcp = connect(worker, to).await;
    let mut builder = h2::client::Builder::new();
    // One stalled stream does not use it up.
    builder.initial_connection_window_size(1 << 20);
    let (sender, connection) = builder.handshake(tcp).await.unwrap();
    spawn_local(async move {
        let _ = connection.await;
    });
    sender.ready().await.unwrap()
}

fn get(path: &str) -> Request<()> {
    Request::get(format!("http://cart{path}")).body(()).unwrap()
}

fn post(path: &str) -> Request<()> {
    let mut request = get(path);
    *request.method_mut() = Method::POST;
    request
}

fn grpc(path: &str) -> Request<()> {
    let mut request = post(path);
    let headers = request.headers_mut();
    headers.insert("content-type", "application/grpc".parse().unwrap());
    headers.insert("te", "trailers".parse().unwrap());
    request
}

/// The rest of a body, its window given back, and its trailers.
async fn read(body: &mut RecvStream) -> Result<(Bytes, Option<HeaderMap>), h2::Error> {
    let mut all = BytesMut::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        all.extend_from_slice(&data);
    }
    Ok((all.freeze(), body.trailers().await?))
}

/// Sends all of `data` as the window allows.
async fn send(sink: &mut SendStream<Bytes>, mut data: Bytes, end: bool) -> Result<(), h2::Error> {
    while !data.is_empty() {
        sink.reserve_capacity(data.len());
        let Some(n) = poll_fn(|cx| sink.poll_capacity(cx)).await else {
            return Err(h2::Reason::CANCEL.into());
        };
        let part = data.split_to(n?.min(data.len()));
        sink.send_data(part, end && data.is_empty())?;
    }
    Ok(())
}

/// A whole answer: status, fields, body, trailers.
async fn ask(
    client: &mut SendRequest<Bytes>,
    request: Request<()>,
) -> Result<(Response<Bytes>, Option<HeaderMap>), h2::Error> {
    let (response, _) = client.send_request(request, true)?;
    let (head, mut body) = response.await?.into_parts();
    let (bytes, trailers) = read(&mut body).await?;
    Ok((Response::from_parts(head, bytes), trailers))
}

/// Answers 200 with a body.
fn ok(mut respond: Answer, body: &'static str) {
    let mut sink = respond.send_response(Response::new(()), false).unwrap();
    sink.send_data(Bytes::from_static(body.as_bytes()), true)
        .unwrap();
}
