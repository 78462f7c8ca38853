//! Errors the proxy answers itself.
//!
//! Each carries a status, a `Proxy-Status` field (RFC 9209) and a sentence a person can act on;
//! the same code stands in the metrics and the access log.

use std::fmt;
use std::time::Duration;

/// What went wrong, by the error types of RFC 9209 section 2.3 where one fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// No route of the destination matches the request.
    NoRoute,
    /// The route, or the backend that was drawn, cannot be used as it is configured.
    InvalidRoute,
    /// The backend has no endpoint that may be used.
    NoEndpoint,
    ConnectionRefused,
    ConnectionTimeout,
    /// The connection to the endpoint failed in another way.
    ConnectionFailed,
    /// The endpoint's certificate or the TLS handshake was not as expected.
    TlsFailed,
    /// The connection was lost before a response.
    ConnectionTerminated,
    /// A concurrency limit of the destination is reached.
    LimitReached,
    /// A configured timeout ran out.
    ResponseTimeout,
    /// The request is not valid HTTP, or its framing could be read in two ways.
    BadRequest,
    /// The head of the request is larger than the limit.
    HeadTooLarge,
    /// The client did not send its request in time.
    RequestTimeout,
    /// The server's response is not valid HTTP.
    BadResponse,
    /// The request came around to the proxy that sent it.
    Loop,
    /// The policy's fallback answered instead of the destination.
    Fallback,
    /// Mutual TLS is required, and this is not a probe.
    PlaintextRefused,
    /// The address is not known, and only what is known may be called.
    EgressRefused,
    /// A policy says that this request is to fail.
    InjectedFault,
    /// A rate limit of the destination is reached.
    RateLimited,
}

impl ErrorCode {
    /// HTTP status of the answer.
    pub fn status(self) -> u16 {
        match self {
            Self::NoRoute => 404,
            Self::InvalidRoute => 500,
            Self::BadRequest => 400,
            Self::PlaintextRefused => 403,
            Self::HeadTooLarge => 431,
            Self::RequestTimeout => 408,
            Self::RateLimited => 429,
            Self::BadResponse | Self::TlsFailed | Self::EgressRefused => 502,
            Self::Loop => 508,
            Self::ResponseTimeout | Self::ConnectionTimeout => 504,
            Self::NoEndpoint
            | Self::ConnectionRefused
            | Self::ConnectionFailed
            | Self::ConnectionTerminated
            | Self::LimitReached
            | Self::InjectedFault
            | Self::Fallback => 503,
        }
    }

    /// gRPC status code of the answer (UNAVAILABLE unless something fits better).
    pub fn grpc_status(self) -> u32 {
        match self {
            Self::NoRoute => 12,
            Self::BadRequest | Self::BadResponse | Self::Loop => 13,
            Self::PlaintextRefused | Self::EgressRefused => 7,
            Self::HeadTooLarge | Self::LimitReached | Self::RateLimited => 8,
            Self::ResponseTimeout | Self::RequestTimeout | Self::ConnectionTimeout => 4,
            _ => 14,
        }
    }

    /// The error type in `Proxy-Status` (RFC 9209 section 2.3), metrics and access log.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoRoute => "destination_not_found",
            Self::InvalidRoute => "proxy_configuration_error",
            Self::NoEndpoint => "destination_unavailable",
            Self::ConnectionRefused => "connection_refused",
            Self::ConnectionTimeout => "connection_timeout",
            Self::ConnectionFailed => "destination_ip_unroutable",
            Self::TlsFailed => "tls_protocol_error",
            Self::ConnectionTerminated => "connection_terminated",
            Self::LimitReached => "connection_limit_reached",
            Self::ResponseTimeout => "http_response_timeout",
            Self::BadRequest => "http_request_error",
            Self::HeadTooLarge => "http_request_error",
            Self::RequestTimeout => "http_request_error",
            Self::BadResponse => "http_protocol_error",
            Self::Loop => "proxy_loop_detected",
            Self::Fallback => "destination_unavailable",
            Self::PlaintextRefused => "http_request_denied",
            Self::EgressRefused => "destination_ip_prohibited",
            Self::InjectedFault => "proxy_internal_response",
            Self::RateLimited => "http_request_denied",
        }
    }
}

/// An error the proxy answers itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyError {
    pub code: ErrorCode,
    /// A sentence naming what failed: route, backend, endpoint.
    pub detail: String,
    /// HTTP and gRPC status in place of the code's own.
    instead: Option<(u16, u32)>,
    /// When it can be asked again.
    again_after: Option<Duration>,
}

impl ProxyError {
    pub fn new(code: ErrorCode, detail: impl Into<String>) -> Self {
        Self {
            code,
            detail: detail.into(),
            instead: None,
            again_after: None,
        }
    }

    /// Says when it can be asked again.
    pub fn again_after(self, wait: Duration) -> Self {
        Self {
            again_after: Some(wait),
            ..self
        }
    }

    /// Value of `Retry-After`, in seconds (RFC 9110 section 10.2.3).
    pub fn retry_after(&self) -> Option<u64> {
        let wait = self.again_after?;
        Some((wait.as_secs() + u64::from(wait.subsec_nanos() > 0)).max(1))
    }

    /// Its equivalent in a gRPC call's trailers, `grpc-retry-pushback-ms` (gRFC A6), milliseconds.
    pub fn pushback(&self) -> Option<u64> {
        let wait = self.again_after?.as_nanos().div_ceil(1_000_000);
        Some(u64::try_from(wait).unwrap_or(u64::MAX).max(1))
    }

    /// Answers with these instead of the code's own HTTP and gRPC status.
    pub fn answered_with(self, status: u16, grpc_status: u32) -> Self {
        Self {
            instead: Some((status, grpc_status)),
            ..self
        }
    }

    /// HTTP status of the answer.
    pub fn status(&self) -> u16 {
        self.instead
            .map_or(self.code.status(), |(status, _)| status)
    }

    /// gRPC status code of the answer.
    pub fn grpc_status(&self) -> u32 {
        let own = self.code.grpc_status();
        self.instead.map_or(own, |(_, status)| status)
    }

    /// Value of the `Proxy-Status` field. The detail is a structured-field string (RFC 8941
    /// section 3.3.3): what it cannot hold is replaced.
    pub fn proxy_status(&self) -> String {
        let mut out = String::with_capacity(48 + self.detail.len());
        out.push_str("weft; error=");
        out.push_str(self.code.name());
        out.push_str("; details=\"");
        for c in self.detail.chars() {
            match c {
                '"' | '\\' => {
                    out.push('\\');
                    out.push(c);
                }
                ' '..='~' => out.push(c),
                _ => out.push('?'),
            }
        }
        out.push('"');
        out
    }
}

impl fmt::Display for ProxyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

impl std::error::Error for ProxyError {}

/// Reason phrase of a status code (RFC 9110 section 15), for answers of our own.
pub fn reason(status: u16) -> &'static str {
    http::StatusCode::from_u16(status)
        .ok()
        .and_then(|s| s.canonical_reason())
        .unwrap_or("Unknown")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proxy_status_is_a_structured_field() {
        let error = ProxyError::new(ErrorCode::ConnectionRefused, "said \"no\" \\ ü");
        assert_eq!(
            error.proxy_status(),
            r#"weft; error=connection_refused; details="said \"no\" \\ ?""#
        );
    }
}
