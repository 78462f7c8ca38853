//! `weft routes`: what a proxy would do with a connection or a request, and why.
//!
//! The proxy says what it knows at /config; this walks through it as the proxy's own way out does
//! (`proxy/src/outbound`, `proxy/src/http/route.rs`).

use std::fmt::Write;
use std::process::ExitCode;

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::Bad;
use crate::kube::target::Target;
use crate::output::{Cell, Format, Paint, Tone, print_json, show, span, table};
use crate::reach::{ProxyArgs, Reach};

/// Flags of `weft routes`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  weft routes deploy/front                       every destination its proxies know
  weft routes deploy/front catalog:80            a connection of deploy/front to a Service
  weft routes pod/front-1 catalog.shop --request 'GET /items/3'
  weft routes deploy/front 10.96.0.20:80 --request 'GET /x canary: yes'
  weft routes catalog:80 --proxy http://10.210.0.2:15020
                                                 without a cluster: ask this proxy

A proxy knows what its application has called. Of several pods the first that knows the destination
is asked. The exit code is 1 when the request would fail: no route matches, or no endpoint is well.")]
pub struct Routes {
    /// Whose connection (deploy/NAME, sts/NAME, pod/NAME…; not with --proxy), and where to:
    #[allow(rustdoc::broken_intra_doc_links)] // As it is shown by --help.
    /// SERVICE[.NAMESPACE][:PORT] or ADDRESS:PORT, as the application connects to it
    #[arg(value_name = "[WORKLOAD] [DESTINATION]", num_args = 0..=2)]
    what: Vec<String>,
    /// A request: METHOD PATH [NAME: VALUE]…
    #[arg(long, value_name = "REQUEST", requires = "what")]
    request: Option<Request>,
    #[command(flatten)]
    proxy: ProxyArgs,
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

/// What a request is matched by.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Request {
    method: String,
    path: String,
    /// Lower-case names.
    headers: Vec<(String, String)>,
}

impl std::str::FromStr for Request {
    type Err = String;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        let wrong =
            || format!("'{given}' is not a request: write 'GET /path' or 'GET /path name: value'");
        let mut words = given.split_whitespace();
        let (Some(method), Some(path)) = (words.next(), words.next()) else {
            return Err(wrong());
        };
        let mut headers: Vec<(String, String)> = Vec::new();
        for word in words {
            match (
                word.strip_suffix(':'),
                word.split_once(':'),
                headers.last_mut(),
            ) {
                (Some(name), _, _) if !name.is_empty() => {
                    headers.push((name.to_ascii_lowercase(), String::new()));
                }
                (None, Some((name, value)), _) if !name.is_empty() && is_token(name) => {
                    headers.push((name.to_ascii_lowercase(), value.to_owned()));
                }
                (None, _, Some((_, value))) => {
                    if !value.is_empty() {
                        value.push(' ');
                    }
                    value.push_str(word);
                }
                _ => return Err(wrong()),
            }
        }
        if !is_token(method) || !path.starts_with(['/', '*']) {
            return Err(wrong());
        }
        Ok(Self {
            method: method.to_owned(),
            path: path.to_owned(),
            headers,
        })
    }
}

/// RFC 9110 section 5.6.2.
fn is_token(text: &str) -> bool {
    let special = |c: char| "!#$%&'*+-.^_`|~".contains(c);
    !text.is_empty()
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || special(c))
}

/// The part of /config that is used here.
#[derive(Debug, Deserialize)]
struct Config {
    workload: Workload,
    destinations: Vec<Destination>,
}

#[derive(Debug, Deserialize)]
struct Workload {
    namespace: String,
    name: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Destination {
    address: String,
    namespace: String,
    service: String,
    port: u16,
    protocol: String,
    routes: Vec<Route>,
    /// For connections that are not HTTP; empty: they take the first of `routes`.
    #[serde(default)]
    opaque: Vec<Opaque>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Opaque {
    /// SNI; none: every connection.
    server_names: Vec<String>,
    route: Route,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Route {
    name: String,
    matches: Vec<Match>,
    backends: Vec<Backend>,
    request_timeout_ms: Option<u64>,
    per_try_timeout_ms: Option<u64>,
    idle_timeout_ms: Option<u64>,
    retry: Option<Retry>,
    fallback: Option<serde_json::Value>,
    #[serde(default)]
    fault: Option<Fault>,
    /// Why its requests are answered 500.
    #[serde(default)]
    refused: Option<String>,
    #[serde(default)]
    redirect: Option<serde_json::Value>,
    #[serde(default)]
    refused_backends: Vec<RefusedBackend>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct RefusedBackend {
    weight: u32,
    why: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Match {
    method: Option<String>,
    path: Option<Path>,
    headers: Vec<Header>,
    #[serde(default)]
    header_patterns: Vec<Pattern>,
    #[serde(default)]
    query: Vec<Parameter>,
    /// Which match comes first of those that hold; none: the order of the routes.
    #[serde(default)]
    order: Option<u32>,
    /// Only gRPC, or only what is none.
    #[serde(default)]
    grpc: Option<bool>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Pattern {
    name: String,
    regex: String,
}

/// A condition on a query's parameter.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Parameter {
    name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    exact: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    regex: Option<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Path {
    Exact(String),
    Prefix(String),
    Regex(String),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Header {
    name: String,
    value: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Retry {
    attempts: u32,
    status_codes: Vec<u16>,
    grpc_codes: Vec<u32>,
    connect_failure: bool,
    refused_stream: bool,
    reset: bool,
    timeout: bool,
    methods: Vec<String>,
    budget_percent: u32,
    budget_min_per_second: u32,
}

/// Faults that are injected on purpose.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Fault {
    headers: Vec<Header>,
    delay: Option<Delay>,
    abort: Option<Abort>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Delay {
    percent: f64,
    duration_ms: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Abort {
    percent: f64,
    status: Option<u16>,
    grpc_status: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Backend {
    weight: u32,
    namespace: String,
    service: String,
    port: u16,
    algorithm: String,
    /// Until a new endpoint has its full weight.
    #[serde(default)]
    slow_start_ms: Option<u64>,
    connect_timeout_ms: u64,
    limits: Limits,
    outlier_detection: Option<Outlier>,
    endpoints: Vec<Endpoint>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Limits {
    max_connections: u32,
    max_requests: u32,
    max_pending_requests: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Outlier {
    consecutive_gateway_errors: u32,
    consecutive_5xx: u32,
    base_ejection_ms: u64,
    max_ejection_percent: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Endpoint {
    address: String,
    workload: String,
    identity: Option<String>,
    weight: u32,
    state: String,
}

impl Destination {
    /// The route that takes a request, with the match that did; `None` there: it takes everything.
    fn route(&self, request: &Request) -> Option<(&Route, Option<&Match>)> {
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

    /// The route that a connection takes which is no HTTP, or of which no request is known.
    fn connection(&self) -> Option<&Route> {
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

/// The first value of a query's parameter.
fn query_value<'r>(target: &'r str, name: &str) -> Option<&'r str> {
    let (_, query) = target.split_once('?')?;
    let pairs = query
        .split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs
        .into_iter()
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value)
}

impl Match {
    fn holds(&self, request: &Request) -> bool {
        let path = request.path.split('?').next().unwrap_or_default();
        let path_holds = match &self.path {
            None => true,
            Some(Path::Exact(exact)) => path == exact,
            Some(Path::Prefix(prefix)) => {
                let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
                path.strip_prefix(prefix)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            Some(Path::Regex(pattern)) => is_match(pattern, path),
        };
        let header = |name: &str| {
            let found = request.headers.iter().find(|(known, _)| known == name);
            found.map(|(_, value)| value.as_str())
        };
        let has = |h: &Header| header(&h.name) == Some(&h.value);
        let has_pattern =
            |p: &Pattern| header(&p.name).is_some_and(|value| is_match(&p.regex, value));
        let has_parameter = |p: &Parameter| {
            query_value(&request.path, &p.name).is_some_and(|value| {
                p.exact.as_ref().is_none_or(|exact| exact == value)
                    && p.regex.as_ref().is_none_or(|regex| is_match(regex, value))
            })
        };
        let grpc = header("content-type").is_some_and(|t| t.starts_with("application/grpc"));
        self.method.as_ref().is_none_or(|m| *m == request.method)
            && path_holds
            && self.headers.iter().all(has)
            && self.header_patterns.iter().all(has_pattern)
            && self.query.iter().all(has_parameter)
            && self.grpc.is_none_or(|wanted| wanted == grpc)
    }

    fn describe(&self) -> String {
        let mut parts = Vec::new();
        if let Some(method) = &self.method {
            parts.push(format!("method {method}"));
        }
        match &self.path {
            Some(Path::Exact(path)) => parts.push(format!("path {path}")),
            Some(Path::Prefix(path)) => parts.push(format!("path under {path}")),
            Some(Path::Regex(path)) => parts.push(format!("path like {path}")),
            None => {}
        }
        for Header { name, value } in &self.headers {
            parts.push(format!("{name}: {value}"));
        }
        for Pattern { name, regex } in &self.header_patterns {
            parts.push(format!("{name}: like {regex}"));
        }
        for Parameter { name, exact, regex } in &self.query {
            match (exact, regex) {
                (Some(value), _) => parts.push(format!("?{name}={value}")),
                (None, regex) => {
                    parts.push(format!("?{name} like {}", regex.as_deref().unwrap_or(".*")));
                }
            }
        }
        match self.grpc {
            Some(true) => parts.push("gRPC".to_owned()),
            Some(false) => parts.push("no gRPC".to_owned()),
            None => {}
        }
        parts.join(" and ")
    }
}

impl Config {
    /// The destination that `given` names: by address, or by the Service's name as the workload's
    /// own resolver would have it.
    fn find(&self, given: &str) -> Option<&Destination> {
        self.destinations
            .iter()
            .find(|d| d.address == given)
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
struct Verdict<'a> {
    /// Whether it would be sent to an endpoint (or passed through).
    served: bool,
    /// Why, in a sentence.
    why: String,
    destination: Option<&'a Destination>,
    route: Option<&'a Route>,
}

fn judge<'a>(config: &'a Config, given: &str, request: Option<&Request>) -> Verdict<'a> {
    let Some(destination) = config.find(given) else {
        return Verdict {
            served: true,
            why: format!(
                "The proxy of {}/{} does not know {given}: its application has not called it \
                 lately, or it is not of the mesh. The first connection asks the control plane; \
                 what that does not know either passes through to its original address, untouched",
                config.workload.namespace, config.workload.name
            ),
            destination: None,
            route: None,
        };
    };
    let taken = match request {
        Some(request) => destination.route(request),
        None => destination.connection().map(|route| (route, None)),
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

/// Whose connection, and where to.
fn read(what: &[String]) -> anyhow::Result<(Option<Target>, Option<&str>)> {
    Ok(match what {
        [] => (None, None),
        [one] if one.contains('/') => (Some(one.parse()?), None),
        [one] => (None, Some(one)),
        [workload, destination, ..] => (Some(workload.parse()?), Some(destination)),
    })
}

/// What the proxy knows; of several the first that knows the destination.
async fn ask(
    args: &ProxyArgs,
    target: Option<&Target>,
    destination: Option<&str>,
) -> anyhow::Result<Config> {
    let (cluster, target) = match (args.reach().await?, target) {
        (Reach::Direct(admin), _) => return Ok(admin.json("/config").await?),
        (Reach::Cluster(_), None) => {
            anyhow::bail!("say whose connection: weft routes deploy/NAME [DESTINATION]")
        }
        (Reach::Cluster(cluster), Some(target)) => (cluster, target),
    };
    let mut first = None;
    for pod in cluster.pods_of(target).await? {
        let config: Config = cluster.proxy(&pod).json("/config").await?;
        if destination.is_none_or(|destination| config.find(destination).is_some()) {
            return Ok(config);
        }
        first.get_or_insert(config);
    }
    first.ok_or_else(|| anyhow::anyhow!("{target} has no pod"))
}

pub async fn run(args: Routes) -> anyhow::Result<ExitCode> {
    let (target, destination) = read(&args.what)?;
    let config = ask(&args.proxy, target.as_ref(), destination).await?;
    let paint = Paint::stdout();
    let Some(given) = destination else {
        match args.output {
            Format::Json => print_json(&config.destinations)?,
            Format::Table => show(&list(&config, paint)),
        }
        return Ok(ExitCode::SUCCESS);
    };
    let verdict = judge(&config, given, args.request.as_ref());
    match args.output {
        Format::Json => print_json(&verdict)?,
        Format::Table => show(&explain(&verdict, paint)),
    }
    Ok(if verdict.served {
        ExitCode::SUCCESS
    } else {
        Bad::exit()
    })
}

/// "PROTOCOL_HTTP2" as people write it.
fn protocol(name: &str) -> String {
    name.trim_start_matches("PROTOCOL_").to_ascii_lowercase()
}

/// "ALGORITHM_PEAK_EWMA" as policies have it.
fn algorithm(name: &str) -> &str {
    match name.trim_start_matches("ALGORITHM_") {
        "PEAK_EWMA" => "PeakEWMA",
        "LEAST_REQUEST" => "LeastRequest",
        "ROUND_ROBIN" => "RoundRobin",
        "RANDOM" => "Random",
        "RING_HASH" => "RingHash",
        "MAGLEV" => "Maglev",
        other => other,
    }
}

/// Every destination known.
fn list(config: &Config, paint: Paint) -> String {
    if config.destinations.is_empty() {
        return format!(
            "The proxy of {}/{} knows no destination: its application has not called any yet.\n",
            config.workload.namespace, config.workload.name
        );
    }
    let mut rows: Vec<Vec<Cell>> = Vec::new();
    let mut destinations: Vec<&Destination> = config.destinations.iter().collect();
    destinations.sort_by(|a, b| a.address.cmp(&b.address));
    for d in destinations {
        let endpoints = d
            .routes
            .iter()
            .flat_map(|r| &r.backends)
            .flat_map(|b| &b.endpoints);
        let (mut well, mut all) = (0, 0);
        for endpoint in endpoints {
            all += 1;
            well += usize::from(endpoint.state == "ready");
        }
        let tone = match (well, all) {
            (0, _) => Tone::Bad,
            (w, a) if w < a => Tone::Warning,
            _ => Tone::Good,
        };
        rows.push(vec![
            Cell::from(d.address.as_str()),
            Cell::from(format!("{}/{}:{}", d.namespace, d.service, d.port)),
            Cell::from(protocol(&d.protocol)),
            Cell::from(d.routes.len().to_string()),
            Cell::new(tone, format!("{well} of {all} well")),
        ]);
    }
    table(
        &["ADDRESS", "SERVICE", "PROTOCOL", "ROUTES", "ENDPOINTS"],
        &rows,
        paint,
    )
}

fn explain(verdict: &Verdict<'_>, paint: Paint) -> String {
    let mut out = String::new();
    let tone = if verdict.served {
        Tone::Good
    } else {
        Tone::Bad
    };
    if let Some(d) = verdict.destination {
        let _ = writeln!(
            out,
            "{} is {}/{}:{}, protocol {}",
            d.address,
            d.namespace,
            d.service,
            d.port,
            protocol(&d.protocol)
        );
    }
    let _ = writeln!(out, "{}.", paint.paint(tone, &verdict.why));
    let Some(route) = verdict.route else {
        return out;
    };
    let _ = writeln!(
        out,
        "\nroute     {}",
        paint.paint(Tone::Strong, &route.name)
    );
    let _ = writeln!(out, "timeouts  {}", timeouts(route));
    let _ = writeln!(out, "retries   {}", retries(route.retry.as_ref()));
    if let Some(fallback) = &route.fallback {
        let _ = writeln!(out, "fallback  {fallback}");
    }
    if let Some(fault) = &route.fault {
        let _ = writeln!(
            out,
            "faults    {}",
            paint.paint(Tone::Warning, &faults(fault))
        );
    }
    let total: u32 = route.backends.iter().map(|b| b.weight).sum();
    for backend in &route.backends {
        out.push_str(&self::backend(backend, total, paint));
    }
    out
}

fn millis(ms: u64) -> String {
    span(ms as f64 / 1e3)
}

fn timeouts(route: &Route) -> String {
    let each = [
        ("request", route.request_timeout_ms),
        ("each try", route.per_try_timeout_ms),
        ("idle", route.idle_timeout_ms),
    ];
    let set: Vec<String> = each
        .iter()
        .filter_map(|(name, ms)| Some(format!("{name} {}", millis((*ms)?))))
        .collect();
    if set.is_empty() {
        "none".to_owned()
    } else {
        set.join(", ")
    }
}

fn retries(retry: Option<&Retry>) -> String {
    let Some(retry) = retry.filter(|r| r.attempts > 0) else {
        return "only what was never processed".to_owned();
    };
    let mut on: Vec<String> = [
        (retry.connect_failure, "connect failure"),
        (retry.refused_stream, "refused stream"),
        (retry.reset, "reset"),
        (retry.timeout, "timeout"),
    ]
    .iter()
    .filter(|(set, _)| *set)
    .map(|(_, name)| (*name).to_owned())
    .collect();
    on.extend(retry.status_codes.iter().map(u16::to_string));
    on.extend(retry.grpc_codes.iter().map(|code| format!("gRPC {code}")));
    let methods = if retry.methods.is_empty() {
        "idempotent methods".to_owned()
    } else {
        retry.methods.join(", ")
    };
    format!(
        "{} more on {}; {methods}; budget {} % and {}/s",
        retry.attempts,
        on.join(", "),
        retry.budget_percent,
        retry.budget_min_per_second
    )
}

fn faults(fault: &Fault) -> String {
    let mut parts = Vec::new();
    if let Some(delay) = &fault.delay {
        let (percent, how_long) = (delay.percent, millis(delay.duration_ms));
        parts.push(format!("{percent} % wait {how_long}"));
    }
    if let Some(abort) = &fault.abort {
        let grpc = format!("gRPC calls with code {}", abort.grpc_status);
        let with = match abort.status {
            Some(status) => format!("with {status}, {grpc}"),
            None => grpc,
        };
        parts.push(format!("{} % fail, {with}", abort.percent));
    }
    let mut text = parts.join("; ");
    if !fault.headers.is_empty() {
        let headers = fault.headers.iter();
        let headers: Vec<String> = headers
            .map(|h| format!("{}: {}", h.name, h.value))
            .collect();
        text.push_str(&format!(" (of requests with {})", headers.join(", ")));
    }
    text
}

fn backend(backend: &Backend, total: u32, paint: Paint) -> String {
    let mut out = String::new();
    let share = match total {
        0 => 0.0,
        total => f64::from(backend.weight) * 100.0 / f64::from(total),
    };
    let _ = writeln!(
        out,
        "\nbackend   {} ({share:.0} %)",
        paint.paint(
            Tone::Strong,
            &format!("{}/{}:{}", backend.namespace, backend.service, backend.port)
        )
    );
    let _ = writeln!(
        out,
        "balancer  {}, connect timeout {}{}",
        algorithm(&backend.algorithm),
        millis(backend.connect_timeout_ms),
        match backend.slow_start_ms {
            Some(window) => format!(", slow start {}", millis(window)),
            None => String::new(),
        }
    );
    let limits: Vec<String> = [
        (backend.limits.max_connections, "connections"),
        (backend.limits.max_requests, "requests at once"),
        (backend.limits.max_pending_requests, "waiting requests"),
    ]
    .iter()
    .filter(|(n, _)| *n > 0)
    .map(|(n, what)| format!("{n} {what}"))
    .collect();
    if !limits.is_empty() {
        let _ = writeln!(out, "limits    {}", limits.join(", "));
    }
    if let Some(o) = &backend.outlier_detection {
        let after: Vec<String> = [
            (o.consecutive_gateway_errors, "gateway errors in a row"),
            (o.consecutive_5xx, "5xx in a row"),
        ]
        .iter()
        .filter(|(n, _)| *n > 0)
        .map(|(n, what)| format!("{n} {what}"))
        .collect();
        let _ = writeln!(
            out,
            "ejection  after {}, for {} at first, at most {} % at once",
            if after.is_empty() {
                "too low a success rate".to_owned()
            } else {
                after.join(" or ")
            },
            millis(o.base_ejection_ms),
            o.max_ejection_percent
        );
    }
    let rows: Vec<Vec<Cell>> = backend
        .endpoints
        .iter()
        .map(|e| {
            let tone = match e.state.as_str() {
                "ready" => Tone::Good,
                "ejected" => Tone::Bad,
                _ => Tone::Warning,
            };
            vec![
                Cell::from(e.address.as_str()),
                Cell::from(e.workload.as_str()),
                Cell::new(tone, e.state.replace('_', " ")),
                Cell::from(e.weight.to_string()),
                match &e.identity {
                    Some(identity) => Cell::from(identity.as_str()),
                    None => Cell::new(Tone::Warning, "plaintext"),
                },
            ]
        })
        .collect();
    if rows.is_empty() {
        let _ = writeln!(out, "{}", paint.paint(Tone::Bad, "no endpoints"));
    } else {
        out.push_str(&table(
            &["ENDPOINT", "WORKLOAD", "STATE", "WEIGHT", "IDENTITY"],
            &rows,
            paint,
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config() -> Config {
        let endpoint = |address: &str, state: &str| {
            json!({
                "address": address, "workload": "shop/catalog-1", "zone": "", "weight": 1,
                "identity": "spiffe://cluster.local/ns/shop/sa/catalog", "state": state,
            })
        };
        let route = |name: &str, matches: serde_json::Value, endpoints: serde_json::Value| {
            json!({
                "name": name, "matches": matches,
                "backends": [{
                    "weight": 1, "namespace": "shop", "service": "catalog", "port": 80,
                    "algorithm": "ALGORITHM_PEAK_EWMA", "hash_key": null, "connect_timeout_ms": 1000, "slow_start_ms": 30000,
                    "limits": {"max_connections": 0, "max_requests": 100, "max_pending_requests": 0},
                    "outlier_detection": {
                        "consecutive_gateway_errors": 3, "consecutive_5xx": 5,
                        "success_rate_threshold_percent": 0, "base_ejection_ms": 3000,
                        "max_ejection_percent": 50,
                    },
                    "endpoints": endpoints,
                }],
                "request_timeout_ms": 3000, "per_try_timeout_ms": null, "idle_timeout_ms": null,
                "retry": {
                    "attempts": 2, "status_codes": [503], "grpc_codes": [], "connect_failure": true,
                    "refused_stream": false, "reset": false, "timeout": false, "methods": [],
                    "budget_percent": 20, "budget_min_per_second": 10,
                },
                "fallback": null,
                "fault": {
                    "headers": [{"name": "x-chaos", "value": "on"}],
                    "delay": {"percent": 10.0, "duration_ms": 2000},
                    "abort": {"percent": 2.0, "status": 503, "grpc_status": 14},
                },
            })
        };
        let canary = json!([{
            "method": "GET", "path": {"prefix": "/items"},
            "headers": [{"name": "canary", "value": "yes please"}],
        }]);
        serde_json::from_value(json!({
            "version": "0.1.0",
            "workload": {"namespace": "shop", "name": "front-1"},
            "destinations": [
                {
                    "address": "10.96.0.20:80", "namespace": "shop", "service": "catalog",
                    "port": 80, "protocol": "PROTOCOL_HTTP",
                    "routes": [
                        route("HTTPRoute/shop/canary", canary, json!([])),
                        route("Service/shop/catalog", json!([]), json!([
                            endpoint("10.77.0.5:8080", "ready"),
                            endpoint("10.77.0.6:8080", "ejected"),
                        ])),
                    ],
                },
                {
                    "address": "10.96.0.9:80", "namespace": "other", "service": "catalog",
                    "port": 80, "protocol": "PROTOCOL_AUTO",
                    "routes": [route("x", json!([{"method": "GET", "path": {"exact": "/only"}, "headers": []}]), json!([]))],
                },
            ],
        }))
        .unwrap()
    }

    #[test]
    fn requests_are_read() {
        let request: Request = "GET /x?q=1 Host: shop canary: yes please".parse().unwrap();
        assert_eq!(request.path, "/x?q=1");
        let headers = [("host", "shop"), ("canary", "yes please")];
        assert_eq!(
            request.headers,
            headers.map(|(n, v)| (n.to_owned(), v.to_owned()))
        );
        assert!(
            "GET / a:b"
                .parse::<Request>()
                .is_ok_and(|r| r.headers[0].1 == "b")
        );
        for bad in ["", "GET", "GET x", "GET / value", "G@T /"] {
            assert!(bad.parse::<Request>().is_err(), "{bad}");
        }
    }

    #[test]
    fn destinations_are_found_as_the_application_names_them() {
        let config = config();
        let address = |given: &str| config.find(given).map(|d| d.address.as_str());
        for (given, expected) in [
            ("10.96.0.20:80", Some("10.96.0.20:80")),
            ("catalog:80", Some("10.96.0.20:80")),
            ("catalog.shop:80", Some("10.96.0.20:80")),
            ("catalog.shop.svc.cluster.local.:80", Some("10.96.0.20:80")),
            ("catalog.other.svc:80", Some("10.96.0.9:80")),
            ("catalog:81", None),
            ("catalog", Some("10.96.0.20:80")),
            ("catalog:http", None),
            ("catalog.shopping:80", None),
        ] {
            assert_eq!(address(given), expected, "{given}");
        }
    }

    #[test]
    fn matches_of_the_gateway_api_are_understood() {
        let mut config = config();
        let destination = &mut config.destinations[0];
        let conditions = json!({
            "method": null, "path": {"regex": "^(?:/v[0-9]+/.*)$"}, "headers": [],
            "header_patterns": [{"name": "user", "regex": "^(?:a.*)$"}],
            "query": [{"name": "q", "exact": "1"}, {"name": "r", "regex": "^(?:[xy])$"}],
            "order": 0, "grpc": false,
        });
        let mut first = destination.routes[1].clone();
        first.name = "HTTPRoute/shop/patterns/0".to_owned();
        first.matches = vec![serde_json::from_value(conditions).unwrap()];
        destination.routes.push(first);
        destination.routes[0].matches[0].order = Some(1);
        let taken = |request: &str| {
            let request: Request = request.parse().unwrap();
            let (route, _) = config.destinations[0].route(&request).unwrap();
            route.name.clone()
        };
        assert_eq!(
            taken("GET /v2/a?r=x&q=1 user: anna"),
            "HTTPRoute/shop/patterns/0"
        );
        for other in [
            "GET /va/a?r=x&q=1 user: anna",
            "GET /v2/a?r=z&q=1 user: anna",
            "GET /v2/a?r=x user: anna",
            "GET /v2/a?r=x&q=1 user: bea",
            "GET /v2/a?r=x&q=1 user: anna content-type: application/grpc",
        ] {
            assert_eq!(taken(other), "Service/shop/catalog", "{other}");
        }
        config.destinations[0].routes[1].refused = Some("no such Service".to_owned());
        let verdict = judge(&config, "catalog:80", Some(&"GET /else".parse().unwrap()));
        assert!(!verdict.served && verdict.why.contains("500 (no such Service)"));
    }

    #[test]
    fn the_first_route_that_matches_is_taken_and_explained() {
        let config = config();
        let judge = |given: &str, request: &str| {
            let request = (!request.is_empty()).then(|| request.parse().unwrap());
            judge(&config, given, request.as_ref())
        };
        let plain = judge("catalog:80", "GET /items/3");
        assert!(plain.served);
        assert_eq!(plain.route.unwrap().name, "Service/shop/catalog");
        assert!(plain.why.contains("1 of its 2 endpoints"), "{}", plain.why);
        let text = explain(&plain, Paint::NEVER);
        for part in [
            "10.96.0.20:80 is shop/catalog:80, protocol http\n",
            "timeouts  request 3.0 s\n",
            "retries   2 more on connect failure, 503; idempotent methods; budget 20 % and 10/s\n",
            "faults    10 % wait 2.0 s; 2 % fail, with 503, gRPC calls with code 14 (of requests with x-chaos: on)\n",
            "backend   shop/catalog:80 (100 %)\n",
            "balancer  PeakEWMA, connect timeout 1.0 s, slow start 30.0 s\n",
            "limits    100 requests at once\n",
            "ejection  after 3 gateway errors in a row or 5 5xx in a row, for 3.0 s at first, at most 50 % at once\n",
            "10.77.0.6:8080  shop/catalog-1  ejected  1       spiffe://cluster.local/ns/shop/sa/catalog\n",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        let canary = judge("catalog:80", "GET /items?x canary: yes please");
        assert_eq!(canary.route.unwrap().name, "HTTPRoute/shop/canary");
        assert!(!canary.served);
        assert!(canary.why.contains("has no endpoint"), "{}", canary.why);
        assert!(judge("catalog.other:80", "GET /else").why.contains("404"));
        assert!(judge("10.1.2.3:443", "").why.contains("passes through"));
        assert!(list(&config, Paint::NEVER).contains("10.96.0.9:80   other/catalog:80  auto"));
    }
}
