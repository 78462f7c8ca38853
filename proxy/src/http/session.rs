//! Sessions: a client stays with the endpoint that its token names (Gateway API, GEP-1619).
//!
//! A token is given out with the response that begins a session, in a cookie or a header, and comes
//! back with the requests that are to stay. It names the endpoint by a hash of its workload, so
//! that it holds wherever the request is sent from and after every restart, and is sealed with a
//! key that all proxies of the mesh have: nobody else can read or make one. One for another route,
//! one that is too old and one that is none begin a new session; so does an endpoint that is gone.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{HeaderName, HeaderValue};

use super::RequestView;
use super::route::path_only;
use crate::balance::hash_bytes;
use crate::tables::{EndpointInfo, PathMatch, Route, RouteMatch, Share};

/// Of the bytes that are sealed.
const VERSION: u8 = 1;
/// Version, endpoint, backend, two times.
const PLAIN_LEN: usize = 1 + 4 * 8;
/// Longest text that is looked at: a token has 82 characters.
const MAX_TOKEN: usize = 128;
/// A session with an idle timeout is renewed when this part of it has passed, so that not every
/// response carries a token.
const RENEWED_AFTER: u64 = 10;

/// How the sessions of a route's backend are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// Of the cookie or header.
    pub name: HeaderName,
    /// As the policy writes it.
    pub spelling: Box<str>,
    pub place: Place,
    /// Since the session began.
    pub absolute: Option<Duration>,
    /// Since its last request.
    pub idle: Option<Duration>,
}

/// Where the token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Cookie {
        /// For the path that the route matched only.
        by_path: bool,
        /// Outlives the browser.
        permanent: bool,
    },
    Header,
}

/// A share of a route whose clients stay.
#[derive(Debug, Clone)]
pub struct ShareSession {
    pub session: Arc<Session>,
    /// Hash of the backend's name, as tokens have it.
    pub backend: u64,
}

/// What a token says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// [`EndpointInfo::session_id`].
    pub endpoint: u64,
    /// [`ShareSession::backend`].
    pub backend: u64,
    /// Milliseconds since the Unix epoch: when the session began, and was last renewed.
    pub began: u64,
    pub seen: u64,
}

/// The key that seals tokens.
pub struct SessionKey(RandomizedNonceKey);

impl std::fmt::Debug for SessionKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SessionKey")
    }
}

impl SessionKey {
    /// `None` unless there are 32 bytes.
    pub fn new(bytes: &[u8]) -> Option<Self> {
        RandomizedNonceKey::new(&AES_256_GCM, bytes).ok().map(Self)
    }

    /// A token for the route `scope`; `None` when the system has no random numbers.
    pub fn seal(&self, token: &Token, scope: &str) -> Option<String> {
        let mut sealed = Vec::with_capacity(PLAIN_LEN + 16);
        sealed.push(VERSION);
        for number in [token.endpoint, token.backend, token.began, token.seen] {
            sealed.extend_from_slice(&number.to_be_bytes());
        }
        let aad = Aad::from(scope.as_bytes());
        let nonce = self.0.seal_in_place_append_tag(aad, &mut sealed).ok()?;
        let mut bytes = nonce.as_ref().to_vec();
        bytes.extend_from_slice(&sealed);
        Some(URL_SAFE_NO_PAD.encode(bytes))
    }

    /// What a token of the route `scope` says; `None` when it is none.
    pub fn open(&self, text: &[u8], scope: &str) -> Option<Token> {
        if text.len() > MAX_TOKEN {
            return None;
        }
        let mut bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
        let (nonce, sealed) = bytes.split_at_mut_checked(NONCE_LEN)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let aad = Aad::from(scope.as_bytes());
        let plain = self.0.open_in_place(nonce, aad, sealed).ok()?;
        let (&[version], numbers) = plain.split_first_chunk::<1>()?;
        let (numbers, rest) = numbers.as_chunks::<8>();
        let &[endpoint, backend, began, seen] = numbers else {
            return None;
        };
        let read = u64::from_be_bytes;
        (version == VERSION && rest.is_empty()).then(|| Token {
            endpoint: read(endpoint),
            backend: read(backend),
            began: read(began),
            seen: read(seen),
        })
    }
}

impl EndpointInfo {
    /// What tokens call the endpoint: a hash of its workload, so that one that comes back at
    /// another address is the same; of its address when it is nobody's.
    pub fn session_id(&self) -> u64 {
        match &*self.workload {
            "" => hash_bytes(self.address.to_string().as_bytes()),
            workload => hash_bytes(workload.as_bytes()),
        }
    }
}

impl Session {
    /// Whether a session goes on at `now`, milliseconds since the Unix epoch. Times of a proxy whose
    /// clock is ahead count as now.
    fn is_live(&self, token: &Token, now: u64) -> bool {
        let within = |timeout: Option<Duration>, since: u64| {
            timeout
                .is_none_or(|timeout| u128::from(now.saturating_sub(since)) < timeout.as_millis())
        };
        within(self.absolute, token.began) && within(self.idle, token.seen)
    }

    /// The first token that a request carries for the route `scope` and that is still good.
    fn token<R: RequestView + ?Sized>(
        &self,
        key: &SessionKey,
        scope: &str,
        request: &R,
        now: u64,
    ) -> Option<Token> {
        let mut found = None;
        let mut look = |text: &[u8]| {
            found = key
                .open(text, scope)
                .filter(|token| self.is_live(token, now));
            found.is_some()
        };
        match self.place {
            Place::Header => request.values(self.name.as_str(), &mut |value| look(value)),
            Place::Cookie { .. } => request.values("cookie", &mut |value| {
                // A browser may have several of the name, for several paths.
                value.split(|&byte| byte == b';').any(|pair| {
                    let rest = pair.trim_ascii().strip_prefix(self.spelling.as_bytes());
                    rest.and_then(|rest| rest.strip_prefix(b"="))
                        .is_some_and(&mut look)
                })
            }),
        }
        found
    }
}

/// The share of a route's backends that a request's session is with, and its token. Holds for a
/// share of weight 0 too (GEP-1619, "Traffic Splitting").
pub fn resume<'r, R: RequestView + ?Sized>(
    key: &SessionKey,
    route: &'r Route,
    request: &R,
    now: u64,
) -> Option<(&'r Share, Token)> {
    let mut read: Option<(&Arc<Session>, Option<Token>)> = None;
    route.backends.iter().find_map(|share| {
        let of = share.session.as_ref()?;
        let token = match read {
            Some((session, token)) if Arc::ptr_eq(session, &of.session) => token,
            _ => of.session.token(key, &route.name, request, now),
        };
        read = Some((&of.session, token));
        token
            .filter(|token| token.backend == of.backend)
            .map(|token| (share, token))
    })
}

/// The session of one request on its way.
#[derive(Debug)]
pub struct Sticky {
    of: ShareSession,
    key: Arc<SessionKey>,
    /// Name of the route.
    scope: Arc<str>,
    token: Option<Token>,
    /// Of the cookie; empty when its Path is not set.
    path: Box<str>,
}

impl Sticky {
    /// A request for a share whose clients stay; `token` is the one it came with, `prefix` how many
    /// bytes of its path the route's prefix matched.
    pub fn new<R: RequestView + ?Sized>(
        of: &ShareSession,
        key: Arc<SessionKey>,
        route: &Route,
        token: Option<Token>,
        request: &R,
        prefix: usize,
    ) -> Self {
        let path = match of.session.place {
            Place::Cookie { by_path: true, .. } => cookie_path(&route.matches, request, prefix),
            _ => Box::default(),
        };
        Self {
            of: of.clone(),
            key,
            scope: route.name.clone(),
            token,
            path,
        }
    }

    /// The endpoint to stay with.
    pub fn endpoint(&self) -> Option<u64> {
        self.token.map(|token| token.endpoint)
    }

    /// What the response of `endpoint` says: nothing while the client's token is good.
    pub fn field(&self, endpoint: &EndpointInfo, now: u64) -> Option<Given> {
        let Session {
            name,
            spelling,
            place,
            absolute,
            idle,
        } = &*self.of.session;
        let id = endpoint.session_id();
        let began = match self.token.filter(|token| token.endpoint == id) {
            None => now,
            Some(token) => {
                let renewed = idle.as_ref()?.as_millis() / u128::from(RENEWED_AFTER);
                if u128::from(now.saturating_sub(token.seen)) < renewed {
                    return None;
                }
                token.began
            }
        };
        let token = Token {
            endpoint: id,
            backend: self.of.backend,
            began,
            seen: now,
        };
        let sealed = self.key.seal(&token, &self.scope)?;
        let Place::Cookie { permanent, .. } = place else {
            return Some(Given {
                name: name.clone(),
                spelling: spelling.clone(),
                value: HeaderValue::try_from(sealed).ok()?,
                alone: true,
            });
        };
        // Not `Secure`: what reaches the proxy is not TLS, and a client that keeps to it would
        // never send the cookie back.
        let mut cookie = format!("{spelling}={sealed}; HttpOnly; SameSite=Strict");
        if !self.path.is_empty() {
            cookie.push_str("; Path=");
            cookie.push_str(&self.path);
        }
        if let (true, Some(absolute)) = (permanent, absolute) {
            let left = absolute.saturating_sub(Duration::from_millis(now.saturating_sub(began)));
            cookie.push_str(&format!("; Max-Age={}", left.as_secs().max(1)));
        }
        Some(Given {
            name: http::header::SET_COOKIE,
            spelling: "Set-Cookie".into(),
            value: HeaderValue::try_from(cookie).ok()?,
            alone: false,
        })
    }
}

/// A field that goes into a response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    pub name: HeaderName,
    pub spelling: Box<str>,
    pub value: HeaderValue,
    /// In place of those that came under the name.
    pub alone: bool,
}

/// Milliseconds since the Unix epoch: all proxies have to understand it.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

/// The path that a session's cookie is for: what the route matched of the request's (GEP-1619,
/// "Path"); of a regular expression the elements before its first special character.
fn cookie_path<R: RequestView + ?Sized>(
    matches: &[RouteMatch],
    request: &R,
    prefix: usize,
) -> Box<str> {
    let path = path_only(request.path());
    let matched = if prefix > 1 {
        path.get(..prefix)
    } else {
        matches.iter().find_map(|one| match one.path.as_ref()? {
            PathMatch::Exact(exact) => (exact.as_bytes() == path).then_some(path),
            PathMatch::Regex(pattern) if pattern.is_match(path) => {
                let text = pattern.as_str();
                let text = text.strip_prefix("^(?:").unwrap_or(text);
                let plain = text.find(|c| r"\.+*?()|[]{}^$".contains(c));
                let plain = &text[..plain.unwrap_or(text.len())];
                plain.rfind('/').map(|end| &plain.as_bytes()[..end])
            }
            PathMatch::Prefix(_) | PathMatch::Regex(_) => None,
        })
    };
    let may_stand = |path: &&str| {
        path.len() > 1
            && path
                .bytes()
                .all(|byte| byte.is_ascii_graphic() && byte != b';')
    };
    matched
        .and_then(|path| std::str::from_utf8(path).ok())
        .filter(may_stand)
        .unwrap_or("/")
        .into()
}

#[cfg(test)]
mod tests;
