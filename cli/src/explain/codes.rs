//! The errors that proxies answer themselves: what each means, and what to do.
//!
//! The same code stands in the `Proxy-Status` field of the answer, in the access log (`error`) and in
//! the metrics (`weft_errors_total`).

use serde::Serialize;

/// A code of `Proxy-Status` (RFC 9209 section 2.3).
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Code {
    pub name: &'static str,
    /// HTTP statuses that it comes with.
    pub statuses: &'static [u16],
    pub meaning: &'static str,
    /// What to do, the likeliest first.
    pub help: &'static [&'static str],
}

/// Every code there is.
pub const CODES: [Code; 16] = [
    Code {
        name: "destination_not_found",
        statuses: &[404],
        meaning: "No route of the destination matches the request.",
        help: &[
            "See which routes there are, and why they do not match: weft routes deploy/CALLER DEST --request 'METHOD PATH'.",
            "Add a rule without matches to the HTTPRoute or GRPCRoute if everything else is to go somewhere.",
        ],
    },
    Code {
        name: "proxy_configuration_error",
        statuses: &[500],
        meaning: "The route, or the backend that was drawn, cannot be used as it is configured: it names a Service or port that does not exist, or asks for something that is not supported.",
        help: &[
            "The details say which and why; so do the route's status conditions: kubectl describe httproute.",
            "weft check lists everything in routes and policies that cannot work.",
        ],
    },
    Code {
        name: "destination_unavailable",
        statuses: &[503],
        meaning: "The backend has no endpoint that may be used: there is none, none is ready, or all are ejected after failures. With a fallback in the TrafficPolicy, this is what it answered.",
        help: &[
            "See the endpoints and their states: weft routes deploy/CALLER DEST.",
            "No endpoint: does the Service select pods, and are they ready? kubectl get endpointslices -l kubernetes.io/service-name=NAME.",
            "All ejected: see what they answer with weft tap deploy/CALLER --to DEST --status error; outlierDetection in the TrafficPolicy decides when they are ejected and for how long.",
        ],
    },
    Code {
        name: "connection_refused",
        statuses: &[503],
        meaning: "The endpoint refused the connection: nothing listens on its port.",
        help: &[
            "Does the application listen on the Service's targetPort, on all addresses (0.0.0.0 or the pod's) and not on 127.0.0.1 only?",
            "An application that is still starting needs a readiness probe, so that it is no endpoint yet.",
        ],
    },
    Code {
        name: "connection_timeout",
        statuses: &[504],
        meaning: "Connecting to the endpoint took longer than the connect timeout (timeouts.connect in the TrafficPolicy, 5 s by default), or the TLS handshake did not end in time.",
        help: &[
            "Does a NetworkPolicy drop the connection? Is the endpoint's node reachable?",
            "A pod that is short of CPU answers handshakes late: see its limits and weft_tls_handshakes_total{result=\"timeout\"}.",
        ],
    },
    Code {
        name: "destination_ip_unroutable",
        statuses: &[503],
        meaning: "The connection to the endpoint failed in another way: no route to it, or it was reset while it was being opened.",
        help: &[
            "Is the endpoint's pod still there? Its address may be that of a pod that is gone: kubectl get endpointslices.",
            "See the caller's proxy log for the reason: kubectl logs POD -c weft-proxy.",
        ],
    },
    Code {
        name: "tls_protocol_error",
        statuses: &[502],
        meaning: "Mutual TLS with the endpoint's proxy failed: its certificate is not the one the table says, or is not trusted, or the handshake broke off.",
        help: &[
            "Check certificates, roots and clocks: weft check.",
            "Is the endpoint's pod injected as the control plane believes (container weft-proxy), and does its inbound port go through the proxy (weft.dev/exclude-inbound-ports)?",
        ],
    },
    Code {
        name: "connection_terminated",
        statuses: &[503],
        meaning: "The connection was lost before a response: the application closed or reset it, or ended while it had the request.",
        help: &[
            "Did the application crash or was it restarted? kubectl describe pod; its log.",
            "Reset at once, every time: the endpoint's proxy may refuse plaintext (PeerAuthentication STRICT); weft explain deploy/CALLER DEST says whether, and by which policy.",
            "Does it close idle connections sooner than its callers expect? Requests that are idempotent are tried again by themselves; retries in a TrafficPolicy widen that.",
        ],
    },
    Code {
        name: "connection_limit_reached",
        statuses: &[503],
        meaning: "A limit of the TrafficPolicy's circuit breaker is reached (maxConnections, maxRequests, maxPendingRequests), and the request was not queued; or a failed request was not tried again because the retry budget of an XBackendTrafficPolicy is spent: the details say which.",
        help: &[
            "See which: weft_limits_rejected_total by its label limit; weft routes deploy/CALLER DEST shows the limits, and which policy each comes from.",
            "Raise the limit, or scale the destination; a fallback says what callers get meanwhile.",
        ],
    },
    Code {
        name: "http_response_timeout",
        statuses: &[504],
        meaning: "A timeout of the policy or route ran out before the response (timeouts.request, timeouts.perTry, timeouts.idle, timeouts.stream).",
        help: &[
            "See how long the destination takes: weft stat svc/DEST, P99; weft tap deploy/CALLER --to DEST --status 504.",
            "weft routes deploy/CALLER DEST shows the timeouts that hold, and which policy each comes from.",
        ],
    },
    Code {
        name: "http_request_error",
        statuses: &[400, 408, 431],
        meaning: "The client's request could not be taken: it is not valid HTTP or could be read in two ways (400), its head did not arrive in time (408), or its head is larger than the proxy takes (1 MiB or 8,192 fields; 64 KiB in HTTP/2) or than requestHeaders in the destination's TrafficPolicy allows (431).",
        help: &[
            "The details name what is wrong with it (repeated lengths, a bare CR, a folded line…): mend the client.",
            "431: weft routes deploy/CALLER DEST --request 'METHOD PATH NAME: VALUE' shows which TrafficPolicy sets requestHeaders, and what the request has; raise it there, or send less (cookies, mostly).",
            "A protocol that is not HTTP on a port that is declared HTTP: correct appProtocol or the port's name in the Service.",
        ],
    },
    Code {
        name: "http_request_denied",
        statuses: &[403, 429],
        meaning: "429: a rate limit of the destination is reached (rateLimit in its TrafficPolicy). 403: the request came in plaintext to a port that takes mutual TLS only (PeerAuthentication STRICT) and is open to the kubelet's probes, and it is not one of the probes.",
        help: &[
            "429: wait as long as Retry-After says, or raise the limit: weft routes deploy/CALLER DEST --request 'METHOD PATH NAME: VALUE' shows which TrafficPolicy sets rateLimit, and among whose requests this one counts. weft_rate_limited_total of the destination's proxies counts those refused, by Service.",
            "403: give the caller a proxy (weft.dev/inject), or see why it has none: weft explain deploy/CALLER DEST.",
            "403, callers that cannot have one: PERMISSIVE for that port (portLevelMtls in the PeerAuthentication).",
        ],
    },
    Code {
        name: "destination_ip_prohibited",
        statuses: &[502],
        meaning: "The address that was called is no Service, workload or ExternalService, and the caller's namespace may call nothing else (EgressPolicy RegistryOnly).",
        help: &[
            "Declare what is called with an ExternalService in the caller's namespace; for every namespace, in weft-system.",
            "It is declared by its hosts? Then they must resolve to this address for the caller's proxy, too: its log at debug says what they resolve to.",
            "The proxy says that its control plane is away? Then it knows only what was called before: weft status.",
        ],
    },
    Code {
        name: "proxy_internal_response",
        statuses: &[503],
        meaning: "A fault that a TrafficPolicy injects on purpose (faultInjection.abort); the status is the one that the policy says, 503 if it names none.",
        help: &[
            "See which requests it is for: weft routes deploy/CALLER DEST.",
            "Take faultInjection out of the policy when the experiment is over: kubectl get trafficpolicies.",
        ],
    },
    Code {
        name: "http_protocol_error",
        statuses: &[502],
        meaning: "The server's response is not valid HTTP, or could be read in two ways.",
        help: &[
            "The details name what is wrong with it: mend the application.",
            "A protocol that is not HTTP on a port that is declared HTTP: correct appProtocol or the port's name in the Service.",
        ],
    },
    Code {
        name: "proxy_loop_detected",
        statuses: &[508],
        meaning: "The request came around to the proxy that sent it.",
        help: &[
            "A Service without a selector, or an EndpointSlice, names the address of its own caller: correct its endpoints.",
        ],
    },
];

/// A code by name.
pub fn find(name: &str) -> Option<&'static Code> {
    CODES.iter().find(|code| code.name == name)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    /// `Self::A | Self::B => VALUE` of one function of the proxy's source.
    fn arms<'a>(source: &'a str, function: &str) -> Vec<(Vec<&'a str>, &'a str)> {
        let (_, body) = source.split_once(function).unwrap();
        let (_, body) = body.split_once("match self {").unwrap();
        let (body, _) = body.split_once("\n        }").unwrap();
        let arms = body.split_inclusive(',').filter(|arm| arm.contains("=>"));
        arms.map(|arm| {
            let (variants, value) = arm.split_once("=>").unwrap();
            let variants = variants
                .split('|')
                .map(|v| v.trim().trim_start_matches("Self::"));
            (variants.collect(), value.trim().trim_end_matches(','))
        })
        .collect()
    }

    #[test]
    fn they_are_the_proxys() {
        let source = include_str!("../../../proxy/src/http/error.rs");
        let statuses: BTreeMap<&str, u16> = arms(source, "pub fn status(self)")
            .into_iter()
            .flat_map(|(variants, value)| variants.into_iter().map(move |v| (v, value)))
            .map(|(variant, value)| (variant, value.parse().unwrap()))
            .collect();
        let mut proxys: BTreeMap<&str, BTreeSet<u16>> = BTreeMap::new();
        for (variants, name) in arms(source, "pub fn name(self)") {
            for variant in variants {
                let of = proxys.entry(name.trim_matches('"')).or_default();
                of.insert(statuses[variant]);
            }
        }
        assert!(proxys.len() >= 12, "{proxys:?}");
        let ours: BTreeMap<&str, BTreeSet<u16>> = CODES
            .iter()
            .map(|code| (code.name, code.statuses.iter().copied().collect()))
            .collect();
        assert_eq!(ours, proxys);
    }

    #[test]
    fn refusals_by_a_policy_say_which_and_where_it_is_seen() {
        for (code, words) in [
            (
                "http_request_denied",
                &["429", "rateLimit", "TrafficPolicy", "weft routes"][..],
            ),
            (
                "http_request_denied",
                &["403", "PeerAuthentication", "STRICT", "weft explain"],
            ),
            (
                "http_request_error",
                &["431", "requestHeaders", "TrafficPolicy", "weft routes"],
            ),
            (
                "connection_terminated",
                &["PeerAuthentication STRICT", "weft explain"],
            ),
        ] {
            let code = find(code).unwrap();
            let help = code.help.join("\n");
            for word in words {
                let said = help.contains(word) || code.meaning.contains(word);
                assert!(said, "{word} is not in\n{}\n{help}", code.meaning);
            }
        }
    }

    #[test]
    fn each_says_what_to_do() {
        for code in &CODES {
            assert!(code.meaning.ends_with('.'), "{}", code.name);
            assert!(!code.help.is_empty() && code.help.iter().all(|h| h.ends_with(['.', '?'])));
            assert_eq!(find(code.name), Some(code));
        }
    }
}
