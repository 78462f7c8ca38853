//! What of it people read.

use std::fmt::Write;

use super::config::{
    Backend, Config, Connection, Destination, Fault, Policy, Retry, Route, Source,
};
use super::inbound;
use super::judge::Verdict;
use crate::output::{Cell, Paint, Tone, span, table};

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
pub fn list(config: &Config, paint: Paint) -> String {
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

pub fn explain(verdict: &Verdict<'_>, paint: Paint) -> String {
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
    let there = verdict.inbound.as_ref();
    let there = there.map(|side| inbound::show(side, paint));
    let there = there.unwrap_or_default();
    let Some(route) = verdict.route else {
        out.push_str(&there);
        out.push_str(&others(verdict));
        return out;
    };
    let _ = writeln!(
        out,
        "\nroute     {}",
        paint.paint(Tone::Strong, &route.name)
    );
    let _ = writeln!(out, "timeouts  {}", timeouts(route));
    let _ = writeln!(out, "retries   {}", retries(route.retry.as_ref()));
    if let Some(delay) = route.hedge_after_ms {
        let _ = writeln!(
            out,
            "hedging   another endpoint is asked too after {}",
            millis(delay)
        );
    }
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
    out.push_str(&sources(&route.sources, paint));
    let total: u32 = route.backends.iter().map(|b| b.weight).sum();
    for backend in &route.backends {
        out.push_str(&self::backend(backend, total, paint));
    }
    out.push_str(&there);
    out.push_str(&others(verdict));
    out
}

/// Other routes that are shown; a table may have a thousand.
const OTHERS: usize = 20;

/// Why the other routes are not taken.
fn others(verdict: &Verdict<'_>) -> String {
    let mut out = String::new();
    for (index, other) in verdict.others.iter().take(OTHERS).enumerate() {
        let begin = if index == 0 {
            "\nnot       "
        } else {
            "          "
        };
        let _ = writeln!(out, "{begin}{}: {}", other.route, other.why);
    }
    if let Some(more) = verdict.others.len().checked_sub(OTHERS).filter(|n| *n > 0) {
        let _ = writeln!(out, "          … and {more} more (--output json)");
    }
    out
}

/// Which policy each field comes from, and which others it goes before.
pub(super) fn sources(sources: &[Source], paint: Paint) -> String {
    let mut out = String::new();
    let widest = sources.iter().map(|source| source.field.len()).max();
    let width = widest.unwrap_or_default();
    let name = |policy: &Policy| format!("{} ({})", policy.name, policy.target);
    for (index, source) in sources.iter().enumerate() {
        let begin = if index == 0 { "policies" } else { "" };
        let _ = write!(
            out,
            "{begin:<8}  {:<width$}  {}",
            source.field,
            name(&source.from)
        );
        if !source.overridden.is_empty() {
            let overridden: Vec<String> = source.overridden.iter().map(name).collect();
            let overridden = format!("overrides {}", overridden.join(", "));
            let _ = write!(out, "; {}", paint.paint(Tone::Dim, &overridden));
        }
        out.push('\n');
    }
    out
}

fn millis(ms: u64) -> String {
    span(ms as f64 / 1e3)
}

fn timeouts(route: &Route) -> String {
    let stream = route.stream_idle_timeout_ms;
    let each = [
        ("request", route.request_timeout_ms),
        ("each try", route.per_try_timeout_ms),
        ("idle", route.idle_timeout_ms),
        (
            "idle streams",
            stream.filter(|_| stream != route.idle_timeout_ms),
        ),
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

/// How connections are kept.
fn connection(given: &Connection) -> String {
    let mut parts = Vec::new();
    if given.max_requests > 0 {
        parts.push(format!("{} requests each", given.max_requests));
    }
    if let Some(idle) = given.idle_timeout_ms {
        parts.push(format!("idle {}", millis(idle)));
    }
    parts.push(match &given.keepalive {
        None => "no keep-alive".to_owned(),
        Some(keepalive) => format!(
            "keep-alive after {}, {} times every {}",
            millis(keepalive.time_ms),
            keepalive.probes,
            millis(keepalive.interval_ms)
        ),
    });
    parts.push(format!(
        "HTTP/2 windows {} (stream) and {} bytes",
        given.stream_window, given.connection_window
    ));
    parts.join("; ")
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
        "balancer  {}, connect timeout {}{}{}{}",
        algorithm(&backend.algorithm),
        millis(backend.connect_timeout_ms),
        match backend.zone_threshold_percent {
            Some(percent) => format!(", own zone while it takes {percent} % of its part"),
            None => String::new(),
        },
        match backend.slow_start_ms {
            Some(window) => format!(", slow start {}", millis(window)),
            None => String::new(),
        },
        match backend.node_local {
            true => ", on its own node only (internalTrafficPolicy: Local)",
            false => "",
        }
    );
    if let Some(connection) = &backend.connection {
        let _ = writeln!(out, "connects  {}", self::connection(connection));
    }
    if let Some(session) = &backend.session {
        let ends = [
            ("idle", session.idle_timeout_ms),
            ("in all", session.absolute_timeout_ms),
        ];
        let ends = ends.iter().filter_map(|(what, ms)| {
            let ms = (*ms)?;
            Some(format!(", {what} {}", millis(ms)))
        });
        let ends: String = ends.collect();
        let _ = writeln!(
            out,
            "session   by the {} {}{ends}",
            session.place, session.name
        );
    }
    if let Some(check) = &backend.health_check {
        let _ = writeln!(
            out,
            "checks    {} every {} within {}; unwell after {}, well after {}",
            check.probe,
            millis(check.interval_ms),
            millis(check.timeout_ms),
            check.unhealthy_threshold,
            check.healthy_threshold
        );
    }
    if let Some(budget) = &backend.retry_constraint {
        let _ = writeln!(
            out,
            "budget    {} % of the requests of the last {} and {} retries",
            budget.percent,
            millis(budget.interval_ms),
            budget.floor
        );
    }
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
    out.push_str(&sources(&backend.sources, paint));
    let rows: Vec<Vec<Cell>> = backend
        .endpoints
        .iter()
        .map(|e| {
            let tone = match e.state.as_str() {
                "ready" => Tone::Good,
                "ejected" | "unhealthy" => Tone::Bad,
                _ => Tone::Warning,
            };
            vec![
                Cell::from(e.address.as_str()),
                Cell::from(e.workload.as_str()),
                Cell::new(
                    tone,
                    match e.near && backend.zone_threshold_percent.is_none() {
                        true => format!("{}, preferred", e.state.replace('_', " ")),
                        false => e.state.replace('_', " "),
                    },
                ),
                Cell::from(e.weight.to_string()),
                match &e.identity {
                    Some(identity) => Cell::from(identity.as_str()),
                    None => Cell::new(Tone::Warning, "plaintext"),
                },
            ]
        })
        .collect();
    if rows.is_empty() {
        let none = match backend.node_local {
            true => "no endpoints on this node",
            false => "no endpoints",
        };
        let _ = writeln!(out, "{}", paint.paint(Tone::Bad, none));
    } else {
        out.push_str(&table(
            &["ENDPOINT", "WORKLOAD", "STATE", "WEIGHT", "IDENTITY"],
            &rows,
            paint,
        ));
    }
    out
}
