//! What HTTP/1.1 and HTTP/2 share: the view of a request that routing and policy see, route
//! choice, retry decisions, and the errors the proxy answers itself.
//!
//! [`call::Call`] is one request on its way: it holds what was decided (route, backend, permits,
//! deadlines) and is told how each try ended. It does no I/O; the engines in [`crate::http1`] and
//! [`crate::http2`] do.

pub mod call;
pub mod error;
pub mod fault;
pub mod filter;
pub mod flow;
pub mod mirror;
pub mod observe;
pub mod pushback;
pub mod retry;
pub mod route;
pub mod session;

pub use error::{ErrorCode, ProxyError};

/// How large a request's head is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HeadSize {
    /// Bytes of the request line and the fields, as HTTP/1.1 writes them, with the empty line.
    pub bytes: usize,
    pub fields: usize,
}

/// A request as routing, policy and telemetry see it.
pub trait RequestView {
    fn method(&self) -> &[u8];
    /// Path and query as they came; no normalisation.
    fn path(&self) -> &[u8];
    /// First value of a field; `name` is lower-case.
    fn header(&self, name: &str) -> Option<&[u8]>;
    /// Every value of a field, in order, until `each` says that it has seen enough; `name` is
    /// lower-case.
    fn values(&self, name: &str, each: &mut dyn FnMut(&[u8]) -> bool) {
        if let Some(value) = self.header(name) {
            each(value);
        }
    }
    /// How large the head is.
    fn size(&self) -> HeadSize;
    /// Host field or authority.
    fn host(&self) -> Option<&[u8]> {
        self.header("host")
    }
}
