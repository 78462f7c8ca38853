//! Responses of the proxy's own.

use std::fmt::Write as _;

use bytes::Bytes;
use h2::server::SendResponse;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};

use crate::http::ProxyError;
use crate::http::filter::fields::add_to_map;

/// What the answer is an answer to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub grpc: bool,
    /// HEAD: the answer has no body.
    pub head: bool,
}

/// An error of our own: as HTTP, or as a gRPC status that clients show to their callers.
pub(super) fn error(respond: &mut SendResponse<Bytes>, asked: Asked, error: &ProxyError) {
    let proxy_status = field(error.proxy_status());
    if asked.grpc {
        let mut response = Response::new(());
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.extend(grpc_trailers(error.grpc_status(), &error.detail));
        headers.insert("proxy-status", proxy_status);
        if let Some(pushback) = error.pushback() {
            headers.insert("grpc-retry-pushback-ms", HeaderValue::from(pushback));
        }
        // The client may be gone: then there is nobody to tell.
        let _ = respond.send_response(response, true);
        return;
    }
    let body = Bytes::from(format!("weft: {}\n", error.detail));
    let mut headers = HeaderMap::new();
    headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    headers.insert("proxy-status", proxy_status);
    if let Some(seconds) = error.retry_after() {
        headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    send(respond, asked, error.status(), headers, body);
}

/// An answer that is no error, without a body.
pub(super) fn plain(
    respond: &mut SendResponse<Bytes>,
    status: u16,
    fields: &[(&'static str, String)],
) {
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY);
    add_to_map(fields, response.headers_mut());
    // The client may be gone: then there is nobody to tell.
    let _ = respond.send_response(response, true);
}

/// The response of a fallback policy; `error` says why it answers.
pub(super) fn fallback(
    respond: &mut SendResponse<Bytes>,
    asked: Asked,
    status: u16,
    fields: &[(Box<str>, Box<str>)],
    body: &Bytes,
    error: &ProxyError,
) {
    let mut headers = HeaderMap::with_capacity(fields.len() + 2);
    for (name, value) in fields {
        if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), value.parse()) {
            headers.append(name, value);
        }
    }
    headers.insert("proxy-status", field(error.proxy_status()));
    send(respond, asked, status, headers, body.clone());
}

/// Trailers that say how a gRPC call ended.
pub(super) fn grpc_trailers(code: u32, message: &str) -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(4);
    trailers.insert("grpc-status", HeaderValue::from(code));
    trailers.insert("grpc-message", field(percent_encoded(message)));
    trailers
}

fn send(
    respond: &mut SendResponse<Bytes>,
    asked: Asked,
    status: u16,
    mut headers: HeaderMap,
    body: Bytes,
) {
    headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY);
    *response.headers_mut() = headers;
    let bare = asked.head || body.is_empty();
    if let Ok(mut sink) = respond.send_response(response, bare)
        && !bare
    {
        let _ = sink.send_data(body, true);
    }
}

/// A field value of text that is visible ASCII already.
fn field(text: String) -> HeaderValue {
    HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("?"))
}

/// A `grpc-message`: what is not printable ASCII, and "%", as %XX (gRPC over HTTP/2, "Status
/// Message").
fn percent_encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'%' | 0..=0x1f | 0x7f.. => {
                // Writing to a String does not fail.
                let _ = write!(out, "%{byte:02X}");
            }
            _ => out.push(char::from(byte)),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grpc_message_is_percent_encoded() {
        assert_eq!(percent_encoded("100 % ü\n"), "100 %25 %C3%BC%0A");
        let trailers = grpc_trailers(14, "ü");
        assert_eq!(trailers["grpc-status"], "14");
        assert_eq!(trailers["grpc-message"], "%C3%BC");
    }
}
