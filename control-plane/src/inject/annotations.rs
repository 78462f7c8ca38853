//! What a pod sets for itself, by annotations `weft.dev/…`.
//!
//! A value that makes no sense, and an annotation that nobody knows, is refused: a slip must not run
//! unnoticed without what it was meant to do.

use std::net::IpAddr;

use serde_json::Value;
use weft_api::names::{ANNOTATION_PREFIX, INJECT, PROTOCOL_ANNOTATION, STATUS, WEIGHT_ANNOTATION};

use super::{Refused, Settings};
use crate::model::is_known_protocol;

/// Longest drain: the longest that `terminationGracePeriodSeconds` is seen with.
const MAX_DRAIN_SECONDS: u64 = 24 * 3600;

/// Largest weight, as for a Workload.
const MAX_WEIGHT: u32 = 10_000;

pub const EXCLUDE_INBOUND_PORTS: &str = "weft.dev/exclude-inbound-ports";
pub const EXCLUDE_INBOUND_CIDRS: &str = "weft.dev/exclude-inbound-cidrs";
pub const EXCLUDE_OUTBOUND_PORTS: &str = "weft.dev/exclude-outbound-ports";
pub const EXCLUDE_OUTBOUND_CIDRS: &str = "weft.dev/exclude-outbound-cidrs";
pub const INCLUDE_INBOUND_PORTS: &str = "weft.dev/include-inbound-ports";
pub const INCLUDE_OUTBOUND_PORTS: &str = "weft.dev/include-outbound-ports";
pub const INCLUDE_OUTBOUND_CIDRS: &str = "weft.dev/include-outbound-cidrs";
pub const CPU_REQUEST: &str = "weft.dev/proxy-cpu-request";
pub const MEMORY_REQUEST: &str = "weft.dev/proxy-memory-request";
pub const CPU_LIMIT: &str = "weft.dev/proxy-cpu-limit";
pub const MEMORY_LIMIT: &str = "weft.dev/proxy-memory-limit";
pub const LOG_LEVEL: &str = "weft.dev/log-level";
pub const DRAIN_SECONDS: &str = "weft.dev/drain-seconds";
pub const OWN_CONNECTIONS: &str = "weft.dev/own-connections";

/// All that there are.
pub const KNOWN: [&str; 18] = [
    INJECT,
    STATUS,
    PROTOCOL_ANNOTATION,
    WEIGHT_ANNOTATION,
    EXCLUDE_INBOUND_PORTS,
    EXCLUDE_INBOUND_CIDRS,
    EXCLUDE_OUTBOUND_PORTS,
    EXCLUDE_OUTBOUND_CIDRS,
    INCLUDE_INBOUND_PORTS,
    INCLUDE_OUTBOUND_PORTS,
    INCLUDE_OUTBOUND_CIDRS,
    CPU_REQUEST,
    MEMORY_REQUEST,
    CPU_LIMIT,
    MEMORY_LIMIT,
    LOG_LEVEL,
    DRAIN_SECONDS,
    OWN_CONNECTIONS,
];

/// What a pod sets for itself, read and checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Annotations {
    /// Flag of `weft-proxy init` and its items, in the order of the flags.
    pub capture: Vec<(&'static str, Vec<String>)>,
    pub cpu_request: Option<String>,
    pub memory_request: Option<String>,
    pub cpu_limit: Option<String>,
    pub memory_limit: Option<String>,
    pub log_level: Option<String>,
    /// Seconds.
    pub drain_seconds: Option<u64>,
    /// The proxy shares no connections.
    pub own_connections: bool,
}

/// The flag of each capture annotation, and what its items are.
const CAPTURE: [(&str, &str, Item); 7] = [
    ("exclude-inbound-ports", EXCLUDE_INBOUND_PORTS, Item::Ports),
    ("exclude-inbound-cidrs", EXCLUDE_INBOUND_CIDRS, Item::Cidr),
    (
        "exclude-outbound-ports",
        EXCLUDE_OUTBOUND_PORTS,
        Item::Ports,
    ),
    ("exclude-outbound-cidrs", EXCLUDE_OUTBOUND_CIDRS, Item::Cidr),
    ("include-inbound-ports", INCLUDE_INBOUND_PORTS, Item::Ports),
    (
        "include-outbound-ports",
        INCLUDE_OUTBOUND_PORTS,
        Item::Ports,
    ),
    ("include-outbound-cidrs", INCLUDE_OUTBOUND_CIDRS, Item::Cidr),
];

#[derive(Clone, Copy)]
enum Item {
    Ports,
    Cidr,
}

impl Item {
    fn is(self, text: &str) -> bool {
        match self {
            Self::Ports => is_ports(text),
            Self::Cidr => is_cidr(text),
        }
    }

    fn allowed(self) -> &'static str {
        match self {
            Self::Ports => "ports from 1 to 65535 or ranges, separated by commas: 3306,9000-9100",
            Self::Cidr => "networks, separated by commas: 169.254.169.254/32,fd00::/8",
        }
    }
}

impl Annotations {
    /// Reads the annotations of a pod.
    ///
    /// # Errors
    /// A value makes no sense, or an annotation with our prefix is not known.
    pub fn read(pod: &Value) -> Result<Self, Refused> {
        let mut read = Self::default();
        let Some(given) = pod
            .pointer("/metadata/annotations")
            .and_then(Value::as_object)
        else {
            return Ok(read);
        };
        for (key, value) in given {
            if key.starts_with(ANNOTATION_PREFIX) && !KNOWN.contains(&key.as_str()) {
                return Err(Refused(format!(
                    "annotation {key} is not known; there are {}",
                    KNOWN.join(", ")
                )));
            }
            if key.starts_with(ANNOTATION_PREFIX) && !value.is_string() {
                return Err(Refused(format!(
                    "annotation {key}: {value} is not a string; put it in quotes"
                )));
            }
        }
        let text = |key: &str| given.get(key).and_then(Value::as_str).map(str::trim);
        for (flag, key, item) in CAPTURE {
            if let Some(value) = text(key) {
                read.capture.push((flag, items(key, value, item)?));
            }
        }
        let checked = |key: &str, is: fn(&str) -> bool, allowed: &str| match text(key) {
            Some(value) if !is(value) => Err(wrong(key, value, allowed)),
            value => Ok(value.map(str::to_owned)),
        };
        let cpu = "a quantity such as 50m or 0.5";
        let memory = "a quantity such as 64Mi";
        read.cpu_request = checked(CPU_REQUEST, is_quantity, cpu)?;
        read.cpu_limit = checked(CPU_LIMIT, is_quantity, cpu)?;
        read.memory_request = checked(MEMORY_REQUEST, is_quantity, memory)?;
        read.memory_limit = checked(MEMORY_LIMIT, is_quantity, memory)?;
        read.log_level = checked(LOG_LEVEL, is_log_level, LOG_LEVELS)?;
        if let Some(value) = text(DRAIN_SECONDS) {
            let seconds = value.parse().ok().filter(|s| *s <= MAX_DRAIN_SECONDS);
            read.drain_seconds = Some(seconds.ok_or_else(|| {
                wrong(
                    DRAIN_SECONDS,
                    value,
                    "a whole number of seconds from 0 to 86400",
                )
            })?);
        }
        if let Some(value) = text(OWN_CONNECTIONS) {
            let said = value.parse();
            read.own_connections =
                said.map_err(|_| wrong(OWN_CONNECTIONS, value, "true or false"))?;
        }
        if let Some(value) = text(PROTOCOL_ANNOTATION) {
            check_protocols(value)?;
        }
        let weight = |value: &str| value.parse().is_ok_and(|weight: u32| weight <= MAX_WEIGHT);
        if let Some(value) = text(WEIGHT_ANNOTATION).filter(|value| !weight(value)) {
            let allowed = "a whole number from 0 to 10000; 1 is usual, 0 takes no traffic";
            return Err(wrong(WEIGHT_ANNOTATION, value, allowed));
        }
        Ok(read)
    }
}

const LOG_LEVELS: &str =
    "error, warn, info, debug, trace or off, also by module: info,weft_proxy=debug";

fn wrong(key: &str, value: &str, allowed: &str) -> Refused {
    Refused(format!(
        "annotation {key}: '{value}' does not work; write {allowed}"
    ))
}

fn items(key: &str, value: &str, item: Item) -> Result<Vec<String>, Refused> {
    value
        .split(',')
        .map(str::trim)
        .map(|text| {
            if item.is(text) {
                Ok(text.to_owned())
            } else {
                Err(wrong(key, value, item.allowed()))
            }
        })
        .collect()
}

/// The data plane reads it from the pod; here it is only checked.
fn check_protocols(value: &str) -> Result<(), Refused> {
    let allowed = "PORT=PROTOCOL, separated by commas, with http, http2, grpc, tcp or tls: \
                   8080=grpc,9000=tcp";
    let mut seen = std::collections::BTreeSet::new();
    for pair in value.split(',') {
        let port = pair.split_once('=').and_then(|(port, protocol)| {
            let port: u16 = port.trim().parse().ok().filter(|port| *port != 0)?;
            is_known_protocol(protocol.trim()).then_some(port)
        });
        match port {
            Some(port) if seen.insert(port) => {}
            _ => return Err(wrong(PROTOCOL_ANNOTATION, value, allowed)),
        }
    }
    Ok(())
}

/// The same rules for what the settings say.
pub(super) fn check_settings(settings: &Settings) -> Result<(), Refused> {
    let capture = &settings.capture;
    for (field, given, item) in [
        (
            "excludeInboundPorts",
            &capture.exclude_inbound_ports,
            Item::Ports,
        ),
        (
            "excludeInboundCidrs",
            &capture.exclude_inbound_cidrs,
            Item::Cidr,
        ),
        (
            "excludeOutboundPorts",
            &capture.exclude_outbound_ports,
            Item::Ports,
        ),
        (
            "excludeOutboundCidrs",
            &capture.exclude_outbound_cidrs,
            Item::Cidr,
        ),
    ] {
        for text in given {
            if !item.is(text) {
                return Err(Refused(format!(
                    "capture.{field}: '{text}' does not work; write {}",
                    item.allowed()
                )));
            }
        }
    }
    let resources = &settings.proxy.resources;
    for (what, much) in resources.requests.iter().chain(&resources.limits) {
        if !is_quantity(much) {
            return Err(Refused(format!(
                "proxy.resources: {what}: '{much}' is not a quantity such as 50m or 64Mi"
            )));
        }
    }
    if !is_log_level(&settings.proxy.log_level) {
        return Err(Refused(format!(
            "proxy.logLevel: '{}' does not work; write {LOG_LEVELS}",
            settings.proxy.log_level
        )));
    }
    Ok(())
}

fn is_ports(text: &str) -> bool {
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0);
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    matches!((port(first), port(last)), (Some(first), Some(last)) if first <= last)
}

fn is_cidr(text: &str) -> bool {
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length)),
        None => (text, None),
    };
    let Ok(address) = address.parse::<IpAddr>() else {
        return false;
    };
    let most = if address.is_ipv4() { 32 } else { 128 };
    length.is_none_or(|length| length.parse::<u8>().is_ok_and(|length| length <= most))
}

/// A quantity above zero as Kubernetes writes it, such as `50m`, `0.5`, `64Mi` or `1e3`.
fn is_quantity(text: &str) -> bool {
    const UNITS: [&str; 16] = [
        "", "n", "u", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei",
    ];
    let digits = text.len()
        - text
            .trim_start_matches(|c: char| c.is_ascii_digit() || c == '.')
            .len();
    let (number, unit) = text.split_at(digits);
    let exponent = unit
        .strip_prefix(['e', 'E'])
        .is_some_and(|exponent| !exponent.is_empty() && exponent.parse::<i8>().is_ok());
    number.parse::<f64>().is_ok_and(|number| number > 0.0) && (exponent || UNITS.contains(&unit))
}

/// What the proxy's log filter takes, except for names of modules that stand alone: they would be
/// misspelt levels more often than modules.
fn is_log_level(text: &str) -> bool {
    const LEVELS: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];
    text.split(',').all(|directive| {
        let (target, level) = match directive.split_once('=') {
            Some((target, level)) => (Some(target), level),
            None => (None, directive),
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
        LEVELS.contains(&level)
            && target.is_none_or(|target| !target.is_empty() && target.chars().all(plain))
    })
}
