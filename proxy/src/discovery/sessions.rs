//! Sessions of a route's backends: the route's own, else each backend's.

use std::sync::Arc;

use http::HeaderName;
use weft_api::proto;

use super::compile::{Invalid, Result, duration};
use crate::balance::hash_bytes;
use crate::http::session::{Place, Session, ShareSession};

/// For each of a route's shares, in order.
pub(super) fn of_shares(route: &proto::Route) -> Result<Vec<Option<ShareSession>>> {
    let policy = route.policy.as_ref();
    let of_route = policy
        .and_then(|policy| policy.session_persistence.as_ref())
        .map(|given| session(given, &route.name))
        .transpose()?;
    let mut found = Vec::with_capacity(route.backends.len());
    for share in &route.backends {
        let backend = share.backend.as_ref().filter(|_| share.refused.is_empty());
        let own = backend
            .and_then(|backend| backend.policy.as_ref()?.session_persistence.as_ref())
            .filter(|_| of_route.is_none())
            .map(|given| session(given, &route.name))
            .transpose()?;
        found.push(
            backend
                .zip(own.or_else(|| of_route.clone()))
                .map(|(backend, session)| ShareSession {
                    session,
                    backend: name_of(backend),
                }),
        );
    }
    Ok(found)
}

/// What tokens call a backend.
fn name_of(backend: &proto::Backend) -> u64 {
    let proto::Backend {
        namespace,
        service,
        port,
        ..
    } = backend;
    hash_bytes(format!("{namespace}/{service}:{port}").as_bytes())
}

fn session(given: &proto::SessionPersistence, route: &str) -> Result<Arc<Session>> {
    // One that no other route has, and every proxy comes to.
    let spelling = match given.name.as_str() {
        "" => format!("weft-session-{:08x}", hash_bytes(route.as_bytes()) as u32),
        name => name.to_owned(),
    };
    // A cookie's name is a token (RFC 6265 section 4.1.1), as a header's is.
    let name = HeaderName::from_bytes(spelling.as_bytes())
        .map_err(|_| Invalid(format!("'{spelling}' is not the name of a session")))?;
    Ok(Arc::new(Session {
        name,
        spelling: spelling.into(),
        place: match given.header {
            true => Place::Header,
            false => Place::Cookie {
                by_path: given.by_path,
                permanent: given.permanent,
            },
        },
        absolute: duration(given.absolute_timeout_ms, "the session's absolute timeout")?,
        idle: duration(given.idle_timeout_ms, "the session's idle timeout")?,
    }))
}
