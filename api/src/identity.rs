//! SPIFFE identities of workloads.

use std::fmt;
use std::str::FromStr;

/// `spiffe://<trust-domain>/ns/<namespace>/sa/<service account>`
/// (SPIFFE-ID sections 2.1 to 2.4; the path layout is the one used on Kubernetes).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    pub trust_domain: String,
    pub namespace: String,
    pub service_account: String,
}

/// Why a string is not a workload's SPIFFE id.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "'{given}' is not a workload identity: {reason}; expected spiffe://<trust-domain>/ns/<namespace>/sa/<service account>"
)]
pub struct InvalidSpiffeId {
    given: String,
    reason: &'static str,
}

/// Longest SPIFFE id that must be supported (SPIFFE-ID section 2.3), bytes.
const MAX_LEN: usize = 2048;

impl SpiffeId {
    /// Puts an identity together, checking each part.
    pub fn new(
        trust_domain: &str,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, InvalidSpiffeId> {
        format!("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}").parse()
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "spiffe://{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        )
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidSpiffeId;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        let fail = |reason| InvalidSpiffeId {
            given: given.chars().take(200).collect(),
            reason,
        };
        if given.len() > MAX_LEN {
            return Err(fail("it is longer than 2048 bytes"));
        }
        let rest = given
            .strip_prefix("spiffe://")
            .ok_or_else(|| fail("it does not begin with spiffe://"))?;
        let mut parts = rest.split('/');
        let (Some(domain), Some("ns"), Some(namespace), Some("sa"), Some(account), None) = (
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
        ) else {
            return Err(fail("its path is not /ns/<namespace>/sa/<service account>"));
        };
        let domain_char =
            |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-' | '_');
        if domain.is_empty() || domain.len() > 255 || !domain.chars().all(domain_char) {
            return Err(fail(
                "a trust domain is lowercase letters, digits, dots, dashes and underscores",
            ));
        }
        let segment_char = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        for segment in [namespace, account] {
            if segment.is_empty()
                || matches!(segment, "." | "..")
                || !segment.chars().all(segment_char)
            {
                return Err(fail(
                    "a path segment is letters, digits, dots, dashes and underscores, and not . or ..",
                ));
            }
        }
        Ok(Self {
            trust_domain: domain.to_owned(),
            namespace: namespace.to_owned(),
            service_account: account.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let id = SpiffeId::new("cluster.local", "shop", "cart").unwrap();
        assert_eq!(id.to_string(), "spiffe://cluster.local/ns/shop/sa/cart");
        assert_eq!(id.to_string().parse::<SpiffeId>().unwrap(), id);
    }

    #[test]
    fn what_is_not_an_identity_is_refused() {
        for bad in [
            "",
            "https://cluster.local/ns/a/sa/b",
            "spiffe://cluster.local/ns/a/sa/b/c",
            "spiffe://cluster.local/ns/a/sa/",
            "spiffe://cluster.local/ns//sa/b",
            "spiffe://Cluster.local/ns/a/sa/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://cluster.local/ns/a/sa/b?x=1",
            "spiffe://cluster.local/ns/../sa/b",
            "spiffe://user@cluster.local/ns/a/sa/b",
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad}");
        }
    }
}
