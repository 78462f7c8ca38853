//! The policies that are measured, as the Gateway API writes them: a Service and its HTTPRoutes
//! for each.

use std::fmt::Write as _;
use std::net::SocketAddr;

use super::{retries, service};
use crate::features::{ANSWERED, FEATURES, Feature, REMOVED, REWRITTEN, SET};
use crate::process::free_port;

/// Rules of one HTTPRoute, as its schema allows them; those of several add up.
const RULES: u16 = 16;

/// The Service of a feature: its virtual address, and the port of the outbound proxy that stands
/// for it.
pub struct Carried {
    pub feature: Feature,
    pub vip: SocketAddr,
    pub port: u16,
}

pub fn carried() -> anyhow::Result<Vec<Carried>> {
    FEATURES
        .into_iter()
        .zip(1..)
        .map(|(feature, i)| {
            Ok(Carried {
                feature,
                vip: SocketAddr::from(([10, 96, 1, i], 80)),
                port: free_port()?,
            })
        })
        .collect()
}

/// `target`, `mirrored`: ports of the inbound proxy, for the server and for copies.
pub fn manifests(features: &[Carried], target: u16, mirrored: u16) -> anyhow::Result<String> {
    let mut yaml = String::new();
    let of_copies = SocketAddr::from(([10, 96, 2, 1], 80));
    service(&mut yaml, "mirrored", of_copies, mirrored, "http")?;
    for c in features {
        let name = c.feature.name();
        service(&mut yaml, &name, c.vip, target, "http")?;
        let rules = rules(c.feature);
        for (i, rules) in rules.chunks(usize::from(RULES)).enumerate() {
            write!(
                yaml,
                "---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: {name}-{i}, namespace: bench}}
spec:
  parentRefs: [{{group: '', kind: Service, name: {name}}}]
  rules:
"
            )?;
            for rule in rules {
                writeln!(
                    yaml,
                    "  - backendRefs: [{{name: {name}, port: 80}}]\n{rule}"
                )?;
            }
        }
        if c.feature == Feature::Retries {
            retries(&mut yaml, &name)?;
        }
    }
    Ok(yaml)
}

/// What each rule of a feature's routes has besides its backend.
fn rules(feature: Feature) -> Vec<String> {
    let rule = match feature {
        Feature::Rules(count) => {
            return (0..count)
                .map(|i| format!("    matches: [{{path: {{type: PathPrefix, value: /r{i}}}}}]"))
                .collect();
        }
        Feature::Headers => {
            let set = SET.map(|(name, value)| format!("{{name: {name}, value: {value}}}"));
            let (name, value) = ANSWERED;
            format!(
                "    filters:
    - type: RequestHeaderModifier
      requestHeaderModifier: {{set: [{}], remove: [{REMOVED}]}}
    - type: ResponseHeaderModifier
      responseHeaderModifier: {{set: [{{name: {name}, value: {value}}}]}}",
                set.join(", ")
            )
        }
        Feature::Rewrite => {
            let (prefix, host) = REWRITTEN;
            format!(
                "    matches: [{{path: {{type: PathPrefix, value: /from}}}}]
    filters:
    - type: URLRewrite
      urlRewrite:
        hostname: {host}
        path: {{type: ReplacePrefixMatch, replacePrefixMatch: {prefix}}}"
            )
        }
        Feature::Mirror => "    filters:
    - type: RequestMirror
      requestMirror: {backendRef: {name: mirrored, port: 80}}"
            .to_owned(),
        // By a TrafficPolicy.
        Feature::Retries => String::new(),
    };
    vec![rule]
}
