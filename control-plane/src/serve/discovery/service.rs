//! The gRPC side of discovery.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::{Stream, stream};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tonic::metadata::MetadataValue;
use tonic::{Request, Response, Status, Streaming};
use weft_api::names::MOVE_METADATA;
use weft_api::proto::discovery_request::Message;
use weft_api::proto::discovery_server::Discovery;
use weft_api::proto::{DiscoveryRequest, DiscoveryResponse};

use super::hub::{Connection, Hub, Requests};
use crate::serve::ca::unix;
use crate::serve::listener::ConnectionInfo;
use crate::serve::tls::Peer;

/// A stream whose first message takes longer is given up.
const HELLO: Duration = Duration::from_secs(10);

pub struct DiscoveryService {
    pub hub: Arc<Hub>,
}

type Responses = Pin<Box<dyn Stream<Item = Result<DiscoveryResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Discovery for DiscoveryService {
    type StreamStream = Responses;

    async fn stream(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Responses>, Status> {
        let info = request
            .extensions()
            .get::<ConnectionInfo>()
            .cloned()
            .ok_or_else(|| Status::internal("the connection has no address"))?;
        let peer = info.peer.clone().ok_or_else(|| {
            Status::unauthenticated(
                "discovery needs a client certificate; get one with Identity.Certify",
            )
        })?;
        let (connected, connection) = oneshot::channel();
        let hub = self.hub.clone();
        let reader = tokio::spawn(read(hub, info, peer, request.into_inner(), connected));
        let state = Sending::Opening {
            connection,
            reader: Reader(reader.abort_handle()),
        };
        Ok(Response::new(Box::pin(stream::unfold(state, send))))
    }
}

/// Ends the reading half together with the sending one.
struct Reader(AbortHandle);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.abort();
    }
}

enum Sending {
    /// Hello has not come yet.
    Opening {
        connection: oneshot::Receiver<Result<Connection, Status>>,
        reader: Reader,
    },
    Open {
        connection: Connection,
        reader: Reader,
    },
    Ended,
}

/// Polled only when the connection has room: what changes meanwhile waits as its newest version.
async fn send(state: Sending) -> Option<(Result<DiscoveryResponse, Status>, Sending)> {
    let (connection, reader) = match state {
        Sending::Opening { connection, reader } => match connection.await {
            Ok(Ok(connection)) => (connection, reader),
            Ok(Err(status)) => return Some((Err(status), Sending::Ended)),
            Err(_) => return None,
        },
        Sending::Open { connection, reader } => (connection, reader),
        Sending::Ended => return None,
    };
    match connection.next().await {
        Ok(response) => Some((Ok(response), Sending::Open { connection, reader })),
        Err(status) => Some((Err(status), Sending::Ended)),
    }
}

/// Reads what the proxy says, until it ends or its certificate does.
async fn read(
    hub: Arc<Hub>,
    info: ConnectionInfo,
    peer: Peer,
    mut incoming: Streaming<DiscoveryRequest>,
    connected: oneshot::Sender<Result<Connection, Status>>,
) {
    let hello = match timeout(HELLO, incoming.message()).await {
        Ok(Ok(Some(DiscoveryRequest {
            message: Some(Message::Hello(hello)),
        }))) => Ok(hello),
        Ok(Ok(_)) => Err(Status::invalid_argument(
            "the first message of a stream must be Hello",
        )),
        Ok(Err(status)) => Err(status),
        Err(_) => Err(Status::deadline_exceeded("no Hello came")),
    };
    let connection = hello.and_then(|hello| hub.connect(&peer, info.address, hello));
    let requests = match connection {
        Ok(connection) => {
            let requests = connection.requests();
            if connected.send(Ok(connection)).is_err() {
                return;
            }
            requests
        }
        Err(status) => {
            // Nobody listens: the proxy is gone.
            let _ = connected.send(Err(status));
            return;
        }
    };
    let life = Duration::from_secs(peer.not_after.saturating_sub(unix(SystemTime::now())));
    let end = tokio::select! {
        status = requests_until_end(&requests, &mut incoming) => status,
        () = sleep(life) => {
            let mut status = Status::unauthenticated(
                "the client certificate of this connection has expired; connect again with the new one",
            );
            // At once: it has that one.
            status
                .metadata_mut()
                .insert(MOVE_METADATA, MetadataValue::from_static("1"));
            status
        }
    };
    requests.end(end);
}

async fn requests_until_end(
    requests: &Requests,
    incoming: &mut Streaming<DiscoveryRequest>,
) -> Status {
    loop {
        let message = match incoming.message().await {
            Ok(Some(DiscoveryRequest { message })) => message,
            Ok(None) => return Status::ok("the proxy has ended the stream"),
            Err(status) => return status,
        };
        let done = match message {
            Some(Message::Subscribe(subscribe)) => requests.subscribe(subscribe.resources),
            Some(Message::Unsubscribe(unsubscribe)) => requests.unsubscribe(unsubscribe.keys),
            Some(Message::Ack(ack)) => requests.acknowledge(ack.key, ack.version),
            Some(Message::Nack(nack)) => requests.refuse(nack.key, nack.version, nack.reason),
            Some(Message::Certificate(certificate)) => requests.certificate(certificate.leaf),
            Some(Message::Hello(_)) => Err(Status::invalid_argument("Hello came twice")),
            // Of a newer proxy: what is not understood is not obeyed, and does no harm.
            None => Ok(()),
        };
        if let Err(status) = done {
            return status;
        }
    }
}
