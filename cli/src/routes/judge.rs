//! What becomes of a connection or a request: a walk through what the proxy knows.

use std::borrow::Cow;

use percent_encoding::percent_decode_str;
use serde::Serialize;

use super::config::{Config, Destination, Header, Match, Outside, Parameter, Path, Pattern, Route};
use super::inbound::{Explained, Side};
use super::request::Request;

impl Destination {
    /// The route that takes a request, with the match that did; `None` there: it takes everything.
    pub fn route(&self, request: &Request) -> Option<(&Route, Option<&Match>)> {
        let mut best: Option<(u64, &Route, Option<&Match>)> = None;
        for (position, route) in (0u64..).zip(&self.routes) {
            let all = route.matches.is_empty();
            let holding = route.matches.iter().filter(|m| m.holds(request)).map(Some);
            for matched in holding.chain(all.then_some(None)) {
                let order = matched.and_then(|m| m.order).map(u64::from);
                let order = order.unwrap_or(position);
                if best.is_none_or(|(first, ..)| order < first) {
                    best = Some((order, route, matched));
                }
            }
        }
        best.map(|(_, route, matched)| (route, matched))
    }

    /// Whether its connections are declared to be something else than HTTP.
    pub fn is_opaque(&self) -> bool {
        matches!(self.protocol.as_str(), "PROTOCOL_TCP" | "PROTOCOL_TLS")
    }

    /// The route that a connection takes which is no HTTP, or of which no request is known.
    pub fn connection(&self) -> Option<&Route> {
        let any = self.opaque.iter().find(|o| o.server_names.is_empty());
        match any.or_else(|| self.opaque.first()) {
            Some(opaque) => Some(&opaque.route),
            None => self.routes.first(),
        }
    }
}

/// Whether a pattern is found anywhere in `text`; the control plane has anchored those that must
/// match all of it.
fn is_match(pattern: &str, text: &str) -> bool {
    regex::Regex::new(pattern).is_ok_and(|pattern| pattern.is_match(text))
}

/// The first value of a query's parameter, percent-decoded.
fn query_value<'r>(target: &'r str, name: &str) -> Option<Cow<'r, str>> {
    let (_, query) = target.split_once('?')?;
    let decoded = |text: &'r str| percent_decode_str(text).decode_utf8_lossy();
    query
        .split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .find(|(key, _)| decoded(key) == name)
        .map(|(_, value)| decoded(value))
}

/// `application/grpc`, also with a message format or parameters; gRPC-Web is something else.
fn is_grpc(content_type: &str) -> bool {
    let rest = content_type.strip_prefix("application/grpc");
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['+', ';']))
}

impl Match {
    /// Whether every condition holds.
    pub fn holds(&self, request: &Request) -> bool {
        self.conditions(Some(request))
            .iter()
            .all(|(_, holds)| *holds)
    }

    /// What it asks for.
    pub fn describe(&self) -> String {
        let conditions = self.conditions(None);
        let words: Vec<String> = conditions.into_iter().map(|(words, _)| words).collect();
        words.join(" and ")
    }

    /// What of it a request does not have.
    pub fn missing(&self, request: &Request) -> Vec<String> {
        let conditions = self.conditions(Some(request)).into_iter();
        let missing = conditions.filter(|(_, holds)| !holds);
        missing.map(|(words, _)| words).collect()
    }

    /// Each condition in words, and whether a request has it.
    fn conditions(&self, request: Option<&Request>) -> Vec<(String, bool)> {
        let mut all = Vec::new();
        let holds = |test: &dyn Fn(&Request) -> bool| request.is_some_and(test);
        let header = |request: &Request, name: &str| {
            let found = request.headers.iter().find(|(known, _)| known == name);
            found.map(|(_, value)| value.clone())
        };
        if let Some(method) = &self.method {
            let test = |request: &Request| *method == request.method;
            all.push((format!("method {method}"), holds(&test)));
        }
        if let Some(path) = &self.path {
            let words = match path {
                Path::Exact(path) => format!("path {path}"),
                Path::Prefix(path) => format!("path under {path}"),
                Path::Regex(path) => format!("path like {path}"),
            };
            all.push((words, holds(&|request| path.holds(request))));
        }
        for Header { name, value } in &self.headers {
            let test = |request: &Request| header(request, name).as_ref() == Some(value);
            all.push((format!("{name}: {value}"), holds(&test)));
        }
        for Pattern { name, regex } in &self.header_patterns {
            let test = |request: &Request| {
                header(request, name).is_some_and(|value| is_match(regex, &value))
            };
            all.push((format!("{name}: like {regex}"), holds(&test)));
        }
        for Parameter { name, exact, regex } in &self.query {
            let words = match (exact, regex) {
                (Some(value), _) => format!("?{name}={value}"),
                (None, regex) => format!("?{name} like {}", regex.as_deref().unwrap_or(".*")),
            };
            let test = |request: &Request| {
                query_value(&request.path, name).is_some_and(|value| {
                    exact.as_ref().is_none_or(|exact| *exact == value)
                        && regex.as_ref().is_none_or(|regex| is_match(regex, &value))
                })
            };
            all.push((words, holds(&test)));
        }
        if let Some(wanted) = self.grpc {
            let test = |request: &Request| {
                header(request, "content-type").is_some_and(|value| is_grpc(&value)) == wanted
            };
            let words = if wanted { "gRPC" } else { "no gRPC" };
            all.push((words.to_owned(), holds(&test)));
        }
        all
    }
}

impl Path {
    fn holds(&self, request: &Request) -> bool {
        let path = request.path.split('?').next().unwrap_or_default();
        match self {
            Self::Exact(exact) => path == exact,
            Self::Prefix(prefix) => {
                let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
                // "/" takes every request, "*" too.
                prefix.is_empty()
                    || path
                        .strip_prefix(prefix)
                        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            Self::Regex(pattern) => is_match(pattern, path),
        }
    }
}

/// A route that a request does not take.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Other<'a> {
    pub route: &'a str,
    pub why: String,
}

/// Why a request does not take the other routes of its destination.
fn others<'a>(
    destination: &'a Destination,
    request: &Request,
    taken: Option<&Route>,
) -> Vec<Other<'a>> {
    let is_taken = |route: &Route| taken.is_some_and(|taken| std::ptr::eq(taken, route));
    destination
        .routes
        .iter()
        .filter(|route| !is_taken(route))
        .map(|route| {
            let missing = route.matches.iter().map(|one| one.missing(request));
            let why = match missing.min_by_key(Vec::len) {
                None => "takes everything, and comes later".to_owned(),
                Some(none) if none.is_empty() => {
                    "its match holds too, and comes later: another one is more specific, or its \
                     route older"
                        .to_owned()
                }
                Some(missing) => {
                    let nearest = match route.matches.len() {
                        1 => String::new(),
                        n => format!(" by the nearest of its {n} matches"),
                    };
                    format!("wants {}{nearest}", missing.join(" and "))
                }
            };
            Other {
                route: &route.name,
                why,
            }
        })
        .collect()
}

impl Outside {
    /// The host that `given` names: itself, or the first wildcard above it.
    fn find(&self, given: &str) -> Option<&Destination> {
        let (host, port) = match given.rsplit_once(':') {
            Some((host, port)) => (host, Some(port.parse::<u16>().ok()?)),
            None => (given, None),
        };
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let find = |wanted: &dyn Fn(&str) -> bool| {
            let mut hosts = self.hosts.iter();
            hosts.find(|known| {
                wanted(&known.host) && port.is_none_or(|port| known.destination.port == port)
            })
        };
        find(&|known| known == host)
            .or_else(|| find(&|known| weft_api::policy::external::host_matches(known, &host)))
            .map(|known| &known.destination)
    }
}

impl Config {
    /// The destination that `given` names: by address, or by the Service's name as the workload's
    /// own resolver would have it.
    pub fn find(&self, given: &str) -> Option<&Destination> {
        self.destinations
            .iter()
            .find(|d| d.address == given)
            .or_else(|| self.outside.find(given))
            .or_else(|| {
                let (host, port) = match given.rsplit_once(':') {
                    Some((host, port)) => (host, Some(port.parse::<u16>().ok()?)),
                    None => (given, None),
                };
                let host = host.trim_end_matches('.');
                self.destinations.iter().find(|d| {
                    let full = format!("{}.{}", d.service, d.namespace);
                    let own = d.namespace == self.workload.namespace && host == d.service;
                    let known = own
                        || host == full
                        || host
                            .strip_prefix(full.as_str())
                            .is_some_and(|rest| rest == ".svc" || rest.starts_with(".svc."));
                    known && port.is_none_or(|port| d.port == port)
                })
            })
    }
}

/// What would become of it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Verdict<'a> {
    /// Whether it would be sent to an endpoint (or passed through).
    pub served: bool,
    /// Why, in a sentence.
    pub why: String,
    pub destination: Option<&'a Destination>,
    pub route: Option<&'a Route>,
    /// The routes that the request does not take, and why.
    pub others: Vec<Other<'a>>,
    /// What the proxies of its endpoints do with it; none when it comes to none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inbound: Option<Side>,
}

impl<'a> Verdict<'a> {
    /// Of a caller without a proxy.
    pub fn bare(explained: &Explained) -> Self {
        let (namespace, service) = (&explained.namespace, &explained.service);
        let name = format!("{namespace}/{service}:{}", explained.port);
        let ready = explained.direct().filter(|one| one.health == "Ready");
        let ready = ready.count();
        Self {
            served: ready > 0,
            why: match ready {
                0 => format!("{name} has no endpoint that is ready: nothing answers"),
                n => {
                    let which = match n {
                        1 => "the one ready endpoint".to_owned(),
                        n => format!("any of the {n} ready endpoints"),
                    };
                    format!(
                        "A caller without a proxy comes to {which} of {name}, in plaintext; no \
                         route, timeout or retry of the mesh holds for it"
                    )
                }
            },
            destination: None,
            route: None,
            others: Vec::new(),
            inbound: None,
        }
    }

    /// The route by which the request comes to endpoints, if it does.
    pub fn arrives_by(&self) -> Option<&'a Route> {
        let answered = |route: &&Route| route.refused.is_some() || route.redirect.is_some();
        self.route.filter(|route| !answered(route))
    }

    /// With what the proxies of its endpoints do.
    pub fn with(mut self, side: Side) -> Self {
        let (all, refusals) = side.refusals();
        let refusing: usize = refusals.iter().map(|(n, _)| n).sum();
        if let Some((_, why)) = refusals.first() {
            // A retry elsewhere may come through, this request need not.
            self.served &= refusing < all;
            self.why = match refusing == all {
                true => format!("{}, and it is refused there: {why}", self.why),
                false => format!("{}, and {refusing} of {all} refuse it: {why}", self.why),
            };
        }
        self.inbound = Some(side);
        self
    }
}

pub fn judge<'a>(config: &'a Config, given: &str, request: Option<&Request>) -> Verdict<'a> {
    let Some(destination) = config.find(given) else {
        return Verdict {
            served: !config.outside.registry_only,
            why: format!(
                "The proxy of {}/{} does not know {given}: its application has not called it \
                 lately, or it is not of the mesh. The first connection asks the control plane; \
                 what that does not know either {}",
                config.workload.namespace,
                config.workload.name,
                match config.outside.registry_only {
                    true => "is refused (EgressPolicy RegistryOnly)",
                    false => "passes through to its original address, untouched",
                }
            ),
            destination: None,
            route: None,
            others: Vec::new(),
            inbound: None,
        };
    };
    let taken = match request {
        Some(request) => destination.route(request),
        None => destination.connection().map(|route| (route, None)),
    };
    let others = |taken: Option<&Route>| match request {
        Some(request) => others(destination, request, taken),
        None => Vec::new(),
    };
    let Some((route, matched)) = taken else {
        return Verdict {
            served: false,
            why: match request {
                Some(_) => "No route matches: the proxy answers 404 itself".to_owned(),
                None => "The destination has no route: the connection is refused".to_owned(),
            },
            destination: Some(destination),
            route: None,
            others: others(None),
            inbound: None,
        };
    };
    let (mut well, mut all) = (0, 0);
    for backend in route.backends.iter().filter(|b| b.weight > 0) {
        all += backend.endpoints.len();
        well += backend
            .endpoints
            .iter()
            .filter(|e| e.state == "ready")
            .count();
    }
    let because = match (request, matched.map(Match::describe)) {
        (None, _) => "the first route, as any connection does".to_owned(),
        (Some(_), None) => "the first route that takes everything".to_owned(),
        (Some(_), Some(m)) => format!("the first route whose match holds ({m})"),
    };
    let verdict = |served, why| Verdict {
        served,
        why,
        destination: Some(destination),
        route: Some(route),
        others: others(Some(route)),
        inbound: None,
    };
    if let Some(why) = &route.refused {
        return verdict(
            false,
            format!("It takes {because}, which cannot be used: 500 ({why})"),
        );
    }
    if let Some(redirect) = &route.redirect {
        return verdict(
            true,
            format!("It takes {because}, which redirects: {redirect}"),
        );
    }
    let refused: Vec<&str> = (route.refused_backends.iter())
        .filter(|backend| backend.weight > 0)
        .map(|backend| backend.why.as_str())
        .collect();
    if !refused.is_empty() {
        let why = refused.join("; ");
        let how = if all == 0 {
            "answered 500"
        } else {
            "in part answered 500"
        };
        return verdict(all > 0, format!("It takes {because}, and is {how}: {why}"));
    }
    let why = match (well, all) {
        (0, 0) => format!("It takes {because}, which has no endpoint: 503"),
        (0, _) => format!(
            "It takes {because}; none of its {all} endpoints is well: all are used while so few \
             are (panic threshold), else 503"
        ),
        _ => format!("It takes {because}; {well} of its {all} endpoints are well"),
    };
    verdict(well > 0, why)
}
