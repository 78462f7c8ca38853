//! What of the destination's side people read.

use std::fmt::Write;

use super::judge::{Alike, Side};
use super::known::{Connection, Heads, Key, OfService, RateLimit};
use crate::explain::connection::Way;
use crate::output::{Paint, Tone, span};
use crate::routes::config::Source;
use crate::routes::text::sources;

/// Workloads that are named.
const NAMED: usize = 5;

/// One paragraph for those proxies that do the same.
pub fn show(side: &Side, paint: Paint) -> String {
    let mut out = String::new();
    if let Some(why) = &side.unknown {
        let text = format!("not known: {why}");
        let _ = writeln!(out, "\ninbound   {}", paint.paint(Tone::Warning, &text));
    }
    for alike in &side.proxies {
        out.push_str(&of_proxies(alike, paint));
    }
    if !side.gone.is_empty() {
        let text = format!(
            "the control plane does not know {}",
            shortened(&side.gone, NAMED)
        );
        let _ = writeln!(out, "\ninbound   {}", paint.paint(Tone::Warning, &text));
    }
    out
}

fn of_proxies(alike: &Alike, paint: Paint) -> String {
    let rules = &alike.rules;
    let names = paint.paint(Tone::Strong, &shortened(&alike.workloads, NAMED));
    let mut out = format!("\ninbound   {names}, port {}\n", rules.port);
    let mut line = |name: &str, text: &str| {
        let _ = writeln!(out, "{name:<8}  {text}");
    };
    if let Some(why) = &alike.refused {
        line("", &paint.paint(Tone::Bad, &format!("refused: {why}")));
    }
    for late in &alike.late {
        let text = format!("{}: {}", late.workload, late.why);
        line("", &paint.paint(Tone::Warning, &text));
    }
    if !rules.sidecar {
        let text = "no proxy stands before it: what comes is not checked and not limited";
        line("", &paint.paint(Tone::Warning, text));
        return out;
    }
    let mode = match rules.mtls.as_str() {
        "STRICT" => "STRICT, nothing else is taken",
        "DISABLE" => "DISABLE, plaintext only",
        _ => "PERMISSIVE, plaintext is taken too",
    };
    match alike.way {
        Way::Refused => line("mtls", mode),
        _ => line("mtls", &format!("{mode}; {}", alike.comes)),
    }
    for service in &rules.services {
        let name = &service.service;
        if let Some(limit) = &service.rate_limit {
            line("rate", &format!("{name}: {}", rate(limit)));
            let bucket = alike.buckets.iter().find(|bucket| bucket.service == *name);
            if let Some(bucket) = bucket {
                line("", &format!("this one counts among {}", bucket.of));
            }
        }
        if let Some(limits) = &service.request_headers {
            let mut text = format!("{name}: {}", heads(limits));
            if let Some(head) = alike.head.filter(|_| alike.unlimited.is_none()) {
                let (bytes, fields) = (head.bytes, head.fields);
                let fields = match fields {
                    1 => "1 field".to_owned(),
                    n => format!("{n} fields"),
                };
                let _ = write!(
                    text,
                    "; this one as written here: {bytes} bytes and {fields}"
                );
            }
            line("heads", &text);
        }
        if let Some(connection) = &service.connection {
            let text = self::connection(connection);
            line("connects", &format!("{name}: to the application, {text}"));
        }
    }
    let limits = |one: &OfService| one.rate_limit.is_some() || one.request_headers.is_some();
    if let Some(why) = alike
        .unlimited
        .filter(|_| rules.services.iter().any(limits))
    {
        line("", why);
    }
    let logged = match rules.telemetry.access_log.as_str() {
        "All" => "every request",
        "Errors" => "errors",
        _ => "nothing",
    };
    let traced = rules.telemetry.sampling_percent;
    line(
        "records",
        &format!("{logged} in the access log, {traced} % traced"),
    );
    let mut all: Vec<Source> = Vec::new();
    let services = rules.services.iter().flat_map(|service| &service.sources);
    for source in rules.sources.iter().chain(services) {
        if !all.contains(source) {
            all.push(source.clone());
        }
    }
    out.push_str(&sources(&all, paint));
    out
}

fn shortened(names: &[String], most: usize) -> String {
    let shown = names.iter().take(most).map(String::as_str);
    let mut text = shown.collect::<Vec<_>>().join(", ");
    if let Some(more) = names.len().checked_sub(most).filter(|more| *more > 0) {
        let _ = write!(text, " and {more} more");
    }
    text
}

fn rate(limit: &RateLimit) -> String {
    let whose = match &limit.key {
        None => String::new(),
        Some(Key::ClientIdentity(_)) => " of each client identity".to_owned(),
        Some(Key::Header(name)) => format!(" of each value of {name}"),
        Some(Key::SourceAddress(_)) => " of each source address".to_owned(),
    };
    let mut text = format!(
        "{} requests{whose} in {}, {} at once",
        limit.requests,
        span(limit.per_ms as f64 / 1e3),
        limit.burst
    );
    if limit.replicas > 0 {
        let replicas = limit.replicas;
        let here = f64::from(limit.requests) / f64::from(replicas);
        let here = if here < 1.0 {
            format!("one every {}", span(limit.per_ms as f64 / 1e3 / here))
        } else {
            // "50", "3.3"
            ((here * 10.0).round() / 10.0).to_string()
        };
        let _ = write!(
            text,
            "; shared by {replicas} ready {}: {here} here, {} at once",
            if replicas == 1 { "replica" } else { "replicas" },
            limit.burst.div_ceil(replicas)
        );
    }
    text
}

fn heads(limits: &Heads) -> String {
    let each = [(limits.max_bytes, "bytes"), (limits.max_count, "fields")];
    let each = each.iter().filter(|(most, _)| *most > 0);
    let each: Vec<String> = each.map(|(most, what)| format!("{most} {what}")).collect();
    format!("at most {}", each.join(", "))
}

fn connection(given: &Connection) -> String {
    let each = [
        (given.max_requests, "requests each"),
        (given.stream_window, "bytes HTTP/2 window of a stream"),
        (given.connection_window, "bytes HTTP/2 window"),
    ];
    let each = each.iter().filter(|(n, _)| *n > 0);
    let each: Vec<String> = each.map(|(n, what)| format!("{n} {what}")).collect();
    each.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_is_shared_is_said_with_its_part() {
        let said = |requests, burst, replicas, key| {
            rate(&RateLimit {
                requests,
                per_ms: 1000,
                burst,
                replicas,
                key,
            })
        };
        assert_eq!(said(10, 20, 0, None), "10 requests in 1.0 s, 20 at once");
        for (requests, burst, replicas, part) in [
            (10, 20, 1, "shared by 1 ready replica: 10 here, 20 at once"),
            (10, 20, 3, "shared by 3 ready replicas: 3.3 here, 7 at once"),
            (
                10,
                20,
                1000,
                "shared by 1000 ready replicas: one every 1 min 40 s here, 1 at once",
            ),
        ] {
            let text = said(requests, burst, replicas, Some(Key::SourceAddress(true)));
            let whole = "10 requests of each source address in 1.0 s, 20 at once";
            assert_eq!(text, format!("{whole}; {part}"));
        }
    }
}
