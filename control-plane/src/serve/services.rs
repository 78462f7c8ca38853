//! The two gRPC services of the port, told apart by path.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::body::Body;
use tonic::server::NamedService;
use tower::Service;
use weft_api::proto::discovery_server::DiscoveryServer;
use weft_api::proto::identity_server::IdentityServer;

use super::discovery::DiscoveryService;
use super::identity::IdentityService;

#[derive(Clone)]
pub(super) struct Services {
    pub(super) discovery: DiscoveryServer<DiscoveryService>,
    pub(super) identity: IdentityServer<IdentityService>,
}

type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

impl Service<Request<Body>> for Services {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // Neither service ever makes its callers wait.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Answer {
        let service = request.uri().path().split('/').nth(1).unwrap_or_default();
        if service == DiscoveryServer::<DiscoveryService>::NAME {
            self.discovery.call(request)
        } else if service == IdentityServer::<IdentityService>::NAME {
            self.identity.call(request)
        } else {
            let message = format!("no service {service}");
            Box::pin(async { Ok(tonic::Status::unimplemented(message).into_http()) })
        }
    }
}
