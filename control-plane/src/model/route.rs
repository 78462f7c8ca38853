//! Routes of the Gateway API with Services as parents, whatever kind they were written as.

use std::collections::BTreeSet;

use weft_api::policy::Duration;

use super::{Kind, Name, ObjectRef, SessionPersistence};

/// The kinds of routes, in the order in which they win a Service port (GEP-1294): only one kind
/// applies to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RouteKind {
    Grpc,
    Http,
    Tls,
    Tcp,
}

impl RouteKind {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Grpc => "GRPCRoute",
            Self::Http => "HTTPRoute",
            Self::Tls => "TLSRoute",
            Self::Tcp => "TCPRoute",
        }
    }

    pub fn kind(self) -> Kind {
        match self {
            Self::Grpc => Kind::GRPCRoute,
            Self::Http => Kind::HTTPRoute,
            Self::Tls => Kind::TLSRoute,
            Self::Tcp => Kind::TCPRoute,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    pub kind: RouteKind,
    pub name: Name,
    /// RFC 3339; empty when not known.
    pub created: String,
    /// Of the object's spec, for `observedGeneration`.
    pub generation: i64,
    pub parents: Vec<ParentRef>,
    /// TLSRoute: server names (SNI). Other kinds: not used with Services as parents (GEP-1294).
    pub hostnames: Vec<String>,
    pub rules: Vec<Rule>,
}

impl Route {
    pub fn reference(&self) -> ObjectRef {
        ObjectRef {
            kind: self.kind.kind(),
            name: self.name.clone(),
        }
    }

    /// Which of two routes wins a tie: the oldest, then the first by namespace and name (those
    /// without a time last).
    pub fn precedence(&self) -> (bool, &str, &Name) {
        (self.created.is_empty(), &self.created, &self.name)
    }

    /// Services it names as parents, each once.
    pub fn services(&self) -> Vec<Name> {
        let mut names: Vec<Name> = self
            .parents
            .iter()
            .filter(|parent| parent.is_service())
            .map(|parent| parent.target(&self.name.namespace))
            .collect();
        names.sort();
        names.dedup();
        names
    }
}

impl Route {
    /// Every Service that it names, as a parent or as a backend.
    pub(super) fn mentions(&self) -> BTreeSet<Name> {
        let backends = self.rules.iter().flat_map(Rule::references);
        self.services()
            .into_iter()
            .chain(backends.map(|backend| backend.name.clone()))
            .collect()
    }
}

/// What a route is attached to, as it was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParentRef {
    pub group: Option<String>,
    pub kind: Option<String>,
    pub namespace: Option<String>,
    pub name: String,
    pub section_name: Option<String>,
    pub port: Option<u16>,
}

impl ParentRef {
    /// A Service; anything else, such as a Gateway, is somebody else's to look after.
    pub fn is_service(&self) -> bool {
        matches!(self.group.as_deref(), Some("" | "core"))
            && self.kind.as_deref() == Some("Service")
    }

    pub fn target(&self, own_namespace: &str) -> Name {
        let namespace = self.namespace.as_deref().unwrap_or(own_namespace);
        Name::new(namespace, self.name.as_str())
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rule {
    pub name: Option<String>,
    /// Any of them; none only when `dropped` or for opaque connections.
    pub matches: Vec<RouteMatch>,
    pub filters: Vec<Filter>,
    pub backends: Vec<BackendRef>,
    pub request_timeout: Option<Duration>,
    pub backend_timeout: Option<Duration>,
    pub retry: Option<RouteRetry>,
    pub session: Option<SessionPersistence>,
    /// What it says that cannot be honoured. Its requests are answered 500.
    pub refused: Vec<Refused>,
    /// A match is not understood: the rule takes no request.
    pub dropped: bool,
}

impl Rule {
    /// Every backend that it names, mirrors included.
    pub fn references(&self) -> impl Iterator<Item = &BackendRef> {
        let filters = self
            .filters
            .iter()
            .chain(self.backends.iter().flat_map(|backend| &backend.filters));
        let mirrors = filters.filter_map(|filter| match filter {
            Filter::Mirror(mirror) => Some(&mirror.backend),
            _ => None,
        });
        self.backends.iter().chain(mirrors)
    }
}

/// Something that a rule says and that cannot be honoured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    pub reason: RefusedReason,
    /// A sentence without a full stop.
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RefusedReason {
    UnsupportedValue,
    IncompatibleFilters,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteMatch {
    pub method: Option<String>,
    pub path: PathMatch,
    /// Lower-case names.
    pub headers: Vec<ValueMatch>,
    pub query: Vec<ValueMatch>,
    /// GRPCRoute: characters of the service and of the method that are matched exactly.
    pub grpc: (usize, usize),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathMatch {
    Exact(String),
    /// By path elements.
    Prefix(String),
    /// The whole path.
    Regex(String),
}

impl Default for PathMatch {
    fn default() -> Self {
        Self::Prefix("/".to_owned())
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValueMatch {
    pub name: String,
    pub value: TextMatch,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TextMatch {
    Exact(String),
    /// The whole value.
    Regex(String),
}

#[derive(Clone, Debug, PartialEq)]
pub enum Filter {
    RequestHeaders(HeaderEdits),
    ResponseHeaders(HeaderEdits),
    Redirect(Redirect),
    Rewrite(Rewrite),
    Mirror(Mirror),
    Cors(Cors),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderEdits {
    pub set: Vec<(String, String)>,
    pub add: Vec<(String, String)>,
    pub remove: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Redirect {
    pub scheme: Option<String>,
    pub hostname: Option<String>,
    pub path: Option<PathEdit>,
    pub port: Option<u16>,
    pub status: u16,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rewrite {
    pub hostname: Option<String>,
    pub path: Option<PathEdit>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathEdit {
    Full(String),
    Prefix(String),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Mirror {
    pub backend: BackendRef,
    /// Share of the requests.
    pub numerator: u32,
    pub denominator: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cors {
    pub allow_origins: Vec<String>,
    pub allow_credentials: bool,
    pub allow_methods: Vec<String>,
    pub allow_headers: Vec<String>,
    pub expose_headers: Vec<String>,
    /// Seconds.
    pub max_age: u32,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct BackendRef {
    pub group: String,
    pub kind: String,
    pub name: Name,
    pub port: Option<u16>,
    pub weight: u32,
    pub filters: Vec<Filter>,
}

impl BackendRef {
    pub fn is_service(&self) -> bool {
        matches!(self.group.as_str(), "" | "core") && self.kind == "Service"
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteRetry {
    pub codes: Vec<u16>,
    pub attempts: Option<u32>,
    pub backoff: Option<Duration>,
}
