//! A request's head: as routing sees it, and as it is sent.

use h2::ext::Protocol;
use http::header::{CONTENT_TYPE, HOST, HeaderName};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Request, Uri, Version};

use crate::http::filter::fields;
use crate::http::{HeadSize, RequestView};
use crate::tables::Plan;
use crate::telemetry::trace::context::ContextHeaders;

/// As a name, so that no request parses it.
pub(super) static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

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

    fn values(&self, name: &str, each: &mut dyn FnMut(&[u8]) -> bool) {
        for value in self.0.headers.get_all(name) {
            if each(value.as_bytes()) {
                return;
            }
        }
    }

    fn size(&self) -> HeadSize {
        // "GET / HTTP/1.1", "Host: x", "name: value", each with its end of line, and an empty line.
        let mut size = HeadSize {
            bytes: self.method().len() + self.path().len() + " HTTP/1.1 \r\n\r\n".len(),
            fields: 0,
        };
        let authority = self
            .0
            .uri
            .authority()
            .map(|authority| authority.as_str().len());
        let fields = self.0.headers.iter();
        let fields = fields.map(|(name, value)| name.as_str().len() + value.len());
        for field in fields.chain(authority.map(|length| "host".len() + length)) {
            size.bytes += field + ": \r\n".len();
            size.fields += 1;
        }
        size
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

/// Applies a route's filters to a request.
pub(super) fn edit(head: &mut Parts, plan: &Plan, prefix: usize) {
    if plan.path.is_some() || plan.host.is_some() {
        let mut uri = head.uri.clone().into_parts();
        if let Some(edit) = &plan.path {
            let target = uri.path_and_query.as_ref();
            let target = target.map_or(&b"/"[..], |target| target.as_str().as_bytes());
            // Of two valid paths; should it not be one, the request goes on as it came.
            if let Ok(path) = PathAndQuery::try_from(edit.apply(target, prefix)) {
                uri.path_and_query = Some(path);
            }
        }
        if let Some(host) = &plan.host {
            if uri.authority.is_some() {
                uri.authority = host.parse().ok().or(uri.authority);
            }
            if let Ok(host) = HeaderValue::from_str(host)
                && let Some(field) = head.headers.get_mut(HOST)
            {
                *field = host;
            }
        }
        if let Ok(uri) = Uri::from_parts(uri) {
            head.uri = uri;
        }
    }
    fields::of_map(&plan.request, &mut head.headers);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The same request as HTTP/1.1 writes it has the same size.
    #[test]
    fn a_heads_size_is_that_of_http1() {
        for (uri, text) in [
            (
                "http://a.example/p?q=1",
                "POST /p?q=1 HTTP/1.1\r\nhost: a.example\r\nx-a: 1\r\nx-a: 22\r\n\r\n",
            ),
            ("/", "POST / HTTP/1.1\r\nx-a: 1\r\nx-a: 22\r\n\r\n"),
        ] {
            let request = Request::builder().method("POST").uri(uri);
            let request = request.header("x-a", "1").header("x-a", "22").body(());
            let (parts, ()) = request.unwrap().into_parts();
            let expected = HeadSize {
                bytes: text.len(),
                fields: text.lines().count() - 2,
            };
            assert_eq!(View(&parts).size(), expected, "{text}");
        }
    }
}
