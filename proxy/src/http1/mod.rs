//! The HTTP/1.1 engine: messages are forwarded, not re-made.
//!
//! - [`head`]: heads, tokenised in place and written on through a list of edits
//! - [`framing`]: where a message ends; what could be read in two ways is refused
//! - [`exchange`]: one request and its response between two connections, both directions at once
//! - [`pool`]: idle server connections
//! - [`kept`]: the one that an idle client keeps to itself, and what proxies say of it
//! - [`mod@serve`]: a client's connection, request after request
//! - [`mod@request`]: one request's way, from route to the end of its response
//! - [`attempt`]: one try of it on one connection
//! - [`mod@answer`]: what the engine says itself
//! - [`mirror`]: copies of requests
//! - [`conn`]: a connection with what was read from it and not used yet
//!
//! A connection between two proxies of the mesh (`weft/http1`) differs from one to an application
//! in two ways. It outlives `Connection: close`, which is meant for the applications at its ends.
//! And its orderly end (`close_notify`) before a response says that the request was not processed:
//! a proxy that passed a request on says so ([`kept::UNANSWERED`]) when the application closes
//! instead of answering, that it takes no connection at all ([`kept::UNREACHABLE`]), and ends
//! without `close_notify` when it is reset, so that even a POST can be sent again when the proxy
//! behind goes away politely.

mod answer;
mod attempt;
pub mod conn;
pub mod exchange;
pub mod framing;
pub mod head;
mod hedge;
pub mod kept;
mod mirror;
pub mod pool;
mod request;
mod serve;
#[cfg(test)]
mod tests;

pub use serve::{HEAD_TIMEOUT, serve};
