//! A control plane that says what the test tells it to.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use weft_api::proto::discovery_request::Message;
use weft_api::proto::discovery_server::{Discovery, DiscoveryServer};
use weft_api::proto::{DiscoveryRequest, DiscoveryResponse, Held, Hello, Resource};

use crate::identity::Credentials;
use crate::identity::testing::serve;

/// Long enough for a busy machine; a test that waits this long has failed.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// The server; every stream that is opened is handed to the test.
pub(super) struct Scripted {
    pub address: SocketAddr,
    sessions: mpsc::UnboundedReceiver<Session>,
    /// Bytes are passed on while true.
    flowing: watch::Sender<bool>,
    /// New connections are taken while true, else reset.
    open: watch::Sender<bool>,
}

/// One stream.
pub(super) struct Session {
    requests: Streaming<DiscoveryRequest>,
    responses: mpsc::UnboundedSender<Result<DiscoveryResponse, Status>>,
}

struct Service(mpsc::UnboundedSender<Session>);

#[tonic::async_trait]
impl Discovery for Service {
    type StreamStream = UnboundedReceiverStream<Result<DiscoveryResponse, Status>>;

    async fn stream(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamStream>, Status> {
        let (responses, stream) = mpsc::unbounded_channel();
        let session = Session {
            requests: request.into_inner(),
            responses,
        };
        self.0
            .send(session)
            .map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(UnboundedReceiverStream::new(stream)))
    }
}

impl Scripted {
    /// Serves with `credentials` on a loopback port.
    pub(super) async fn start(credentials: &Credentials) -> Self {
        let mut tls = rustls::ServerConfig::clone(&credentials.server_config());
        tls.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (flowing, flows) = watch::channel(true);
        let (open, is_open) = watch::channel(true);
        let (service, sessions) = mpsc::unbounded_channel();
        let service = DiscoveryServer::new(Service(service));
        tokio::spawn(async move {
            loop {
                let Ok((outside, _)) = listener.accept().await else {
                    return;
                };
                if !*is_open.borrow() {
                    drop(outside);
                    continue;
                }
                let inside = relayed(outside, flows.clone()).await;
                serve(inside, acceptor.clone(), service.clone());
            }
        });
        Self {
            address,
            sessions,
            flowing,
            open,
        }
    }

    /// The next stream, its hello and its first subscription.
    pub(super) async fn session(&mut self) -> (Session, Hello, Vec<Held>) {
        let mut session = timeout(PATIENCE, self.sessions.recv())
            .await
            .unwrap()
            .unwrap();
        let Message::Hello(hello) = session.next().await else {
            panic!("no hello");
        };
        let first = session.subscribed().await;
        (session, hello, first)
    }

    /// Whether bytes pass. The connections stay open all the same, as when a machine vanishes.
    pub(super) fn set_flowing(&self, flowing: bool) {
        self.flowing.send_replace(flowing);
    }

    /// Whether new connections are taken.
    pub(super) fn set_open(&self, open: bool) {
        self.open.send_replace(open);
    }
}

/// A connection through a relay that can be stopped.
async fn relayed(mut outside: TcpStream, mut flows: watch::Receiver<bool>) -> TcpStream {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let connect = TcpStream::connect(listener.local_addr().unwrap());
    let (inside, accepted) = tokio::join!(connect, listener.accept());
    let mut accepted = accepted.unwrap().0;
    tokio::spawn(async move {
        tokio::select! {
            _ = copy_bidirectional(&mut outside, &mut accepted) => {}
            _ = async { flows.wait_for(|flows| !flows).await.is_ok() } => {}
        }
        // Stopped: both ends stay open and nothing is said.
        let _ = flows.wait_for(|flows| *flows).await;
    });
    inside.unwrap()
}

impl Session {
    pub(super) async fn next(&mut self) -> Message {
        timeout(PATIENCE, self.requests.message())
            .await
            .unwrap()
            .unwrap()
            .unwrap()
            .message
            .unwrap()
    }

    pub(super) async fn subscribed(&mut self) -> Vec<Held> {
        match self.next().await {
            Message::Subscribe(subscribe) => subscribe.resources,
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn acked(&mut self) -> u64 {
        match self.next().await {
            Message::Ack(ack) => ack.version,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn send(&self, resources: Vec<Resource>) {
        self.responses
            .send(Ok(DiscoveryResponse { resources }))
            .unwrap();
    }

    pub(super) fn fail(self, status: Status) {
        self.responses.send(Err(status)).unwrap();
    }
}
