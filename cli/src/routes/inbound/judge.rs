//! What becomes of a request at the proxies of its endpoints: a walk through what holds there. No I/O.

use serde::Serialize;

use super::known::{Explained, Heads, Inbound, Key, OfService, Probe, Rules};
use crate::explain::connection::Way;
use crate::routes::config::Route;
use crate::routes::request::Request;

/// The caller's side, as far as it matters there.
#[derive(Debug, Clone, Copy, Default)]
pub struct Caller<'a> {
    /// SPIFFE id; `None` while its proxy has no certificate.
    pub identity: Option<&'a str>,
    pub request: Option<&'a Request>,
    /// The destination is declared to speak something else than HTTP: connections are copied.
    pub opaque: bool,
}

/// The destination's side.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Side {
    /// Why nothing is known of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unknown: Option<String>,
    /// Endpoints of workloads that the control plane does not know (any more).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub gone: Vec<String>,
    pub proxies: Vec<Alike>,
}

/// Endpoints whose proxies do the same with the request.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Alike {
    /// "shop/cart-1".
    pub workloads: Vec<String>,
    pub way: Way,
    /// How the caller comes, a clause.
    pub comes: String,
    /// Why it is refused, if it is: a clause.
    pub refused: Option<String>,
    /// Why rate limits and those of heads do not hold for it, if so: a sentence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unlimited: Option<&'static str>,
    pub buckets: Vec<Bucket>,
    /// How large the request's head is, as it is written.
    pub head: Option<HeadSize>,
    /// Proxies that do not have these rules.
    pub late: Vec<Late>,
    pub rules: Rules,
}

/// The bucket of a rate limit that a request takes from.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Bucket {
    pub service: String,
    /// Whose requests it is of: "those with x-user: ann".
    pub of: String,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Late {
    pub workload: String,
    /// A clause.
    pub why: String,
}

/// As the proxy measures it: the request line and the fields, with the empty line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct HeadSize {
    pub bytes: usize,
    pub fields: usize,
}

impl HeadSize {
    fn of(request: &Request) -> Self {
        let line = request.method.len() + request.path.len() + "  HTTP/1.1\r\n".len();
        let fields = request.headers.iter();
        let fields = fields.map(|(name, value)| name.len() + value.len() + ": \r\n".len());
        Self {
            bytes: line + fields.sum::<usize>() + "\r\n".len(),
            fields: request.headers.len(),
        }
    }
}

impl Side {
    pub fn unknown(why: String) -> Self {
        Self {
            unknown: Some(why),
            ..Self::default()
        }
    }

    /// Of how many workloads it is known what they do, and the refusal of those that refuse.
    pub fn refusals(&self) -> (usize, Vec<(usize, &str)>) {
        let all = self.proxies.iter().map(|one| one.workloads.len()).sum();
        let refusals = self.proxies.iter().filter_map(|one| {
            let why = one.refused.as_deref()?;
            Some((one.workloads.len(), why))
        });
        (all, refusals.collect())
    }
}

/// Where a request may come to.
#[derive(Debug, Clone, Copy)]
struct End<'a> {
    address: &'a str,
    workload: &'a str,
    /// The caller speaks mutual TLS with it.
    mtls: bool,
}

/// What the proxies of a route's endpoints do.
pub fn judge(route: &Route, explained: &Explained, caller: Caller<'_>) -> Side {
    let backends = route.backends.iter().filter(|backend| backend.weight > 0);
    let endpoints = backends.flat_map(|backend| &backend.endpoints);
    let ends = endpoints.map(|endpoint| End {
        address: &endpoint.address,
        workload: &endpoint.workload,
        mtls: endpoint.identity.is_some(),
    });
    of(ends, explained, caller)
}

/// What the proxies do of those endpoints that whoever has no proxy comes to.
pub fn judge_direct(explained: &Explained, request: Option<&Request>) -> Side {
    let caller = Caller {
        identity: None,
        request,
        opaque: matches!(explained.protocol.as_str(), "tcp" | "tls"),
    };
    let ready = explained.direct().filter(|one| one.health == "Ready");
    let ends = ready.map(|endpoint| End {
        address: &endpoint.address,
        workload: &endpoint.workload,
        mtls: false,
    });
    of(ends, explained, caller)
}

fn of<'a>(ends: impl Iterator<Item = End<'a>>, explained: &Explained, caller: Caller<'_>) -> Side {
    let mut side = Side::default();
    let mut seen: Vec<&str> = Vec::new();
    for end in ends {
        // What is outside the mesh has no workload.
        if end.workload.is_empty() || seen.contains(&end.address) {
            continue;
        }
        seen.push(end.address);
        let known = explained.endpoint(end.address);
        match known.and_then(|known| known.inbound.as_ref()) {
            Some(inbound) => side.add(end, inbound, caller),
            None => side
                .gone
                .push(format!("{} ({})", end.address, end.workload)),
        }
    }
    side
}

impl Side {
    fn add(&mut self, end: End<'_>, inbound: &Inbound, caller: Caller<'_>) {
        let one = Alike::of(end, inbound, caller);
        let same = |known: &&mut Alike| {
            let of = |alike: &Alike| (alike.way, alike.refused.clone(), alike.comes.clone());
            known.rules == one.rules && of(known) == of(&one)
        };
        match self.proxies.iter_mut().find(same) {
            Some(known) => {
                known.workloads.extend(one.workloads);
                known.late.extend(one.late);
            }
            None => self.proxies.push(one),
        }
    }
}

impl Alike {
    fn of(end: End<'_>, inbound: &Inbound, caller: Caller<'_>) -> Self {
        let rules = &inbound.rules;
        let (way, comes) = comes(end, rules, caller);
        let probe = way == Way::Plaintext && caller.request.is_some_and(|one| is_probe(rules, one));
        let unlimited = if caller.opaque {
            Some("limits are of HTTP requests, and this port is declared to speak something else")
        } else if probe {
            Some("limits do not hold for the kubelet's probes, and this is one")
        } else {
            None
        };
        let limited = rules.sidecar && unlimited.is_none();
        let head = caller.request.map(HeadSize::of);
        let refused = match way {
            Way::Refused => Some(comes.clone()),
            _ => head
                .filter(|_| limited)
                .and_then(|head| too_large(rules, head)),
        };
        let buckets = rules.services.iter().filter_map(|service| {
            let key = service.rate_limit.as_ref()?.key.as_ref();
            Some(Bucket {
                service: service.service.clone(),
                of: bucket(key, way, caller),
            })
        });
        let late = match (inbound.acknowledged, &inbound.refused) {
            (_, Some(why)) => Some(format!("its proxy refused this: {why}")),
            (Some(false), None) => Some("its proxy has not confirmed this yet".to_owned()),
            _ => None,
        };
        Self {
            workloads: vec![end.workload.to_owned()],
            way,
            comes,
            refused,
            unlimited,
            buckets: if limited {
                buckets.collect()
            } else {
                Vec::new()
            },
            head,
            late: late
                .filter(|_| rules.sidecar)
                .map(|why| Late {
                    workload: end.workload.to_owned(),
                    why,
                })
                .into_iter()
                .collect(),
            rules: rules.clone(),
        }
    }
}

/// How a request comes to an endpoint, and whether it is let in: a clause.
fn comes(end: End<'_>, rules: &Rules, caller: Caller<'_>) -> (Way, String) {
    let mode = rules.mtls.as_str();
    let (way, why) = match (end.mtls, caller.identity) {
        (true, None) => (
            Way::Refused,
            "the caller's proxy has no certificate yet".to_owned(),
        ),
        (true, Some(_)) if mode == "DISABLE" => (
            Way::Refused,
            "the caller's proxy speaks mutual TLS still, which is switched off there (DISABLE)"
                .to_owned(),
        ),
        (true, Some(own)) => (Way::MutualTls, format!("this caller comes as {own}")),
        (false, _) if mode == "STRICT" && rules.sidecar => {
            match caller.request.filter(|one| is_probe(rules, one)) {
                Some(_) => (
                    Way::Plaintext,
                    "the caller comes in plaintext, with a probe".to_owned(),
                ),
                None => (
                    Way::Refused,
                    "the caller comes in plaintext, and mutual TLS is required (STRICT)".to_owned(),
                ),
            }
        }
        (false, _) => (Way::Plaintext, "the caller comes in plaintext".to_owned()),
    };
    (way, why)
}

/// Whether a request is one of the probes that are let in from outside the mesh.
fn is_probe(rules: &Rules, request: &Request) -> bool {
    rules.probes.iter().any(|probe| match probe {
        Probe::Http(path) => request.method == "GET" && request.path == *path,
        Probe::Grpc(_) => {
            request.method == "POST" && request.path == "/grpc.health.v1.Health/Check"
        }
        Probe::Tcp(_) => false,
    })
}

/// Why a head is refused, if it is.
fn too_large(rules: &Rules, head: HeadSize) -> Option<String> {
    let limits = rules.services.iter().filter_map(|service| {
        let OfService {
            service,
            request_headers,
            ..
        } = service;
        Some((service, request_headers.as_ref()?))
    });
    let mut each = limits.flat_map(
        |(
            service,
            Heads {
                max_bytes,
                max_count,
            },
        )| {
            [
                (service, head.bytes, *max_bytes, "bytes", "maxBytes"),
                (service, head.fields, *max_count, "fields", "maxCount"),
            ]
        },
    );
    let (service, is, most, what, field) =
        each.find(|(_, is, most, ..)| *most != 0 && is > most)?;
    Some(format!(
        "431, its head has {is} {what} and {service} takes {most} (requestHeaders.{field})"
    ))
}

/// Whose requests are counted together with this one.
fn bucket(key: Option<&Key>, way: Way, caller: Caller<'_>) -> String {
    match (key, caller.request) {
        (None, _) => "all requests".to_owned(),
        (Some(Key::SourceAddress(_)), _) => "those of the caller's address".to_owned(),
        (Some(Key::ClientIdentity(_)), _) => {
            match caller.identity.filter(|_| way == Way::MutualTls) {
                Some(identity) => format!("those of {identity}"),
                None => "those without an identity, together".to_owned(),
            }
        }
        (Some(Key::Header(name)), None) => format!("those with the same {name}"),
        (Some(Key::Header(name)), Some(request)) => {
            match request.headers.iter().find(|(known, _)| known == name) {
                Some((_, value)) => format!("those with {name}: {value}"),
                None => format!("those without {name}, together"),
            }
        }
    }
}
