//! What an error of a stream says.

use h2::{Error, Reason};

/// What went wrong with a stream to a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// A GOAWAY below the stream: it was not processed (RFC 9113 section 6.8).
    NeverProcessed,
    /// REFUSED_STREAM: it was not processed (RFC 9113 section 8.7).
    Refused,
    /// The server has reset the stream.
    Reset(Reason),
    /// What the server sent is not valid HTTP/2.
    Malformed,
    /// The application behind the other proxy takes no connection: it was not processed.
    Unreachable,
    /// The connection was lost: this one, or the application's behind the other proxy.
    Lost,
}

/// Code of a reset between two proxies: the application takes no connection. Of those that RFC 9113
/// leaves free; a proxy that does not know it takes it for any reset.
pub(super) const UNREACHABLE: u32 = 0x5745_4654;

/// Classifies the error of a stream. `mesh`: CONNECT_ERROR and [`UNREACHABLE`] have the meanings that
/// [`super`] gives them.
pub(super) fn fault(error: &Error, mesh: bool) -> Fault {
    let Some(reason) = error.reason() else {
        return Fault::Lost;
    };
    match reason {
        // h2 gives this to streams above the last one of a GOAWAY only.
        _ if error.is_go_away() && error.is_remote() => Fault::NeverProcessed,
        _ if !error.is_remote() => Fault::Malformed,
        Reason::REFUSED_STREAM => Fault::Refused,
        Reason::CONNECT_ERROR if mesh => Fault::Lost,
        reason if mesh && u32::from(reason) == UNREACHABLE => Fault::Unreachable,
        reason => Fault::Reset(reason),
    }
}

/// The reason a client gave for its reset; CANCEL when its connection is gone.
pub(super) fn client_reason(reset: Result<Reason, Error>) -> Reason {
    match reset {
        Ok(reason) => reason,
        Err(error) if error.is_reset() => error.reason().unwrap_or(Reason::CANCEL),
        Err(_) => Reason::CANCEL,
    }
}
