//! Whether a try that failed is tried again.
//!
//! Without a policy only what was never processed is tried again; with one, the conditions it
//! names, for the methods it names (the idempotent ones if it names none).

use std::time::Duration;

use crate::tables::RetryPolicy;

/// How a try failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// No connection; nothing was sent.
    Connect,
    /// The server said that it has not processed the request: REFUSED_STREAM, a GOAWAY below the
    /// stream (RFC 9113 section 8.7), or an idle pooled connection that was found closed.
    NeverProcessed,
    /// The connection was lost before any byte of the response.
    Reset,
    /// The per-try timeout ran out.
    Timeout,
    /// A response with this status code.
    Status(u16),
    /// A response with this gRPC status code.
    Grpc(u32),
}

impl Failure {
    /// For metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect_failure",
            Self::NeverProcessed => "never_processed",
            Self::Reset => "reset",
            Self::Timeout => "timeout",
            Self::Status(_) => "status",
            Self::Grpc(_) => "grpc_status",
        }
    }
}

/// Tries of never-processed requests beyond the first, when there is no policy.
pub const DEFAULT_ATTEMPTS: u32 = 2;
/// Request bytes kept for another try when no policy says otherwise.
pub const DEFAULT_REPLAY_BYTES: usize = 64 * 1024;

/// The methods of RFC 9110 section 9.2.2.
pub fn is_idempotent(method: &[u8]) -> bool {
    matches!(
        method,
        b"GET" | b"HEAD" | b"OPTIONS" | b"TRACE" | b"PUT" | b"DELETE"
    )
}

/// Whether `failure` may be tried again after `tries` tries. Budget and the replay buffer are
/// asked afterwards.
pub fn wanted(
    policy: Option<&RetryPolicy>,
    method: &[u8],
    grpc: bool,
    failure: Failure,
    tries: u32,
) -> bool {
    let attempts = policy.map_or(DEFAULT_ATTEMPTS, |p| p.attempts.max(DEFAULT_ATTEMPTS));
    let never_processed = matches!(failure, Failure::Connect | Failure::NeverProcessed);
    if never_processed {
        // Switched off only by a policy that allows no tries at all.
        return tries <= attempts && policy.is_none_or(|p| p.attempts > 0);
    }
    let Some(policy) = policy else { return false };
    if tries > policy.attempts {
        return false;
    }
    let named = match failure {
        Failure::Connect | Failure::NeverProcessed => true,
        Failure::Reset => policy.reset,
        Failure::Timeout => policy.timeout,
        Failure::Status(code) => policy.status_codes.contains(&code),
        Failure::Grpc(code) => policy.grpc_codes.contains(&code),
    };
    if !named {
        return false;
    }
    if policy.methods.is_empty() {
        // Every gRPC call is a POST: naming a gRPC code is the operator's word that it is safe.
        is_idempotent(method) || (grpc && matches!(failure, Failure::Grpc(_)))
    } else {
        policy.methods.iter().any(|m| m.as_bytes() == method)
    }
}

/// Whether a request of this method may be processed twice.
pub fn is_repeatable(policy: &RetryPolicy, method: &[u8]) -> bool {
    if policy.methods.is_empty() {
        return is_idempotent(method);
    }
    policy.methods.iter().any(|m| m.as_bytes() == method)
}

/// Pause before the next try: exponential from the base, half of it random, at most the maximum.
/// `least` is what a server asks for that would be asked again; `None`: that is longer than the
/// policy waits.
pub fn backoff(
    policy: Option<&RetryPolicy>,
    failure: Failure,
    tries: u32,
    least: Option<Duration>,
    random: f64,
) -> Option<Duration> {
    let Some(policy) = policy else {
        return Some(Duration::ZERO);
    };
    if matches!(failure, Failure::Connect | Failure::NeverProcessed) && tries == 1 {
        return Some(Duration::ZERO);
    }
    let exponent = tries.saturating_sub(1).min(16);
    let full = policy
        .backoff_base
        .saturating_mul(1 << exponent)
        .min(policy.backoff_max);
    let jittered = full.mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0));
    match least {
        Some(least) if least > policy.backoff_max => None,
        Some(least) => Some(jittered.max(least)),
        None => Some(jittered),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> RetryPolicy {
        RetryPolicy {
            attempts: 2,
            status_codes: vec![503],
            grpc_codes: vec![14],
            connect_failure: true,
            refused_stream: true,
            reset: true,
            timeout: false,
            methods: vec![],
            backoff_base: Duration::from_millis(25),
            backoff_max: Duration::from_millis(250),
            max_body: 1024,
            budget_percent: 20,
            budget_min_per_second: 10,
        }
    }

    #[test]
    fn by_default_only_what_was_never_processed() {
        for method in [&b"GET"[..], b"POST"] {
            assert!(wanted(None, method, false, Failure::Connect, 1));
            assert!(wanted(None, method, false, Failure::NeverProcessed, 2));
            assert!(!wanted(None, method, false, Failure::NeverProcessed, 3));
            for failure in [Failure::Reset, Failure::Timeout, Failure::Status(503)] {
                assert!(!wanted(None, method, false, failure, 1), "{failure:?}");
            }
        }
    }

    #[test]
    fn a_policy_names_conditions_and_methods() {
        let mut p = policy();
        assert!(wanted(Some(&p), b"GET", false, Failure::Status(503), 1));
        assert!(!wanted(Some(&p), b"GET", false, Failure::Status(500), 1));
        assert!(!wanted(Some(&p), b"GET", false, Failure::Status(503), 3));
        assert!(!wanted(Some(&p), b"POST", false, Failure::Status(503), 1));
        assert!(wanted(Some(&p), b"POST", true, Failure::Grpc(14), 1));
        assert!(!wanted(Some(&p), b"GET", false, Failure::Timeout, 1));
        p.methods = vec!["POST".into()];
        assert!(wanted(Some(&p), b"POST", false, Failure::Status(503), 1));
        assert!(!wanted(Some(&p), b"GET", false, Failure::Status(503), 1));
    }

    #[test]
    fn zero_attempts_switch_retries_off() {
        let p = RetryPolicy {
            attempts: 0,
            ..policy()
        };
        assert!(!wanted(Some(&p), b"GET", false, Failure::Connect, 1));
    }

    #[test]
    fn backoff_grows_and_is_capped() {
        let p = policy();
        let millis = |n| Some(Duration::from_millis(n));
        let at = |tries, random| backoff(Some(&p), Failure::Status(503), tries, None, random);
        assert_eq!(at(1, 1.0), millis(25));
        assert_eq!(at(2, 0.0), millis(25));
        assert_eq!(at(9, 1.0), millis(250));
        // Never earlier than the server wants, nor later than the policy waits.
        let asked = |least| backoff(Some(&p), Failure::Status(503), 1, millis(least), 1.0);
        assert_eq!(asked(10), millis(25));
        assert_eq!(asked(200), millis(200));
        assert_eq!(asked(251), None);
    }
}
