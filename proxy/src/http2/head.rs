//! A request's head: as routing sees it, and as it is sent.

use h2::ext::Protocol;
use http::header::CONTENT_TYPE;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Request, Version};

use crate::http::RequestView;
use crate::telemetry::trace::context::ContextHeaders;

/// A request's head as routing and policy see it.
pub(super) struct View<'h>(pub(super) &'h Parts);

impl RequestView for View<'_> {
    fn method(&self) -> &[u8] {
        self.0.method.as_str().as_bytes()
    }

    fn path(&self) -> &[u8] {
        self.0
            .uri
            .path_and_query()
            .map_or(&[][..], |path| path.as_str().as_bytes())
    }

    fn header(&self, name: &str) -> Option<&[u8]> {
        self.0.headers.get(name).map(HeaderValue::as_bytes)
    }

    fn host(&self) -> Option<&[u8]> {
        match self.0.uri.authority() {
            Some(authority) => Some(authority.as_str().as_bytes()),
            None => self.header("host"),
        }
    }
}

/// Whether a message is gRPC, by its content type ("application/grpc", "application/grpc+proto").
pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|value| {
        value
            .as_bytes()
            .strip_prefix(b"application/grpc")
            .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
    })
}

/// The headers that may carry a trace context.
pub(super) fn context_headers(headers: &HeaderMap) -> ContextHeaders<'_> {
    let mut context = ContextHeaders::default();
    for (name, value) in headers {
        context.take(name.as_str().as_bytes(), value.as_bytes());
    }
    context
}

/// The request's head for one try. It is kept as long as there may be another.
pub(super) fn for_one_try(head: &Parts) -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = head.method.clone();
    *request.uri_mut() = head.uri.clone();
    *request.headers_mut() = head.headers.clone();
    // Without an authority h2 takes the request for one that was HTTP/1 once, and the host
    // field stands for it (RFC 9113 section 8.3.1).
    *request.version_mut() = match head.uri.authority() {
        Some(_) => Version::HTTP_2,
        None => Version::HTTP_11,
    };
    if let Some(protocol) = head.extensions.get::<Protocol>() {
        request.extensions_mut().insert(protocol.clone());
    }
    request
}
