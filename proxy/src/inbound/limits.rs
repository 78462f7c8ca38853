//! What the workload takes no more of: the rate limits of its ports, and the size of requests' heads.
//! They are kept here, at the destination, so that they hold for every caller and whatever address it has called.

use std::cell::RefCell;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::buckets::Taken;
pub use super::buckets::{Buckets, Rate};
use super::probes::Probes;
use crate::http::flow::Flow;
use crate::http::{ErrorCode, HeadSize, ProxyError, RequestView};
use crate::tables::Workload;
use crate::telemetry::Counter;
use crate::worker::Worker;

/// What a port of the workload takes.
#[derive(Debug, Clone, Default)]
pub struct PortLimits {
    /// Each has to have room for a request.
    pub rates: Vec<RateLimit>,
    /// None may be exceeded.
    pub heads: Vec<HeadLimit>,
}

/// What the policy of a Service whose requests this port takes says of their heads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadLimit {
    pub namespace: Arc<str>,
    pub service: Arc<str>,
    /// Of the Service.
    pub port: u16,
    /// 0 is no limit, here and below.
    pub max_bytes: usize,
    pub max_fields: usize,
}

/// The rate limit of a Service whose requests this port takes.
#[derive(Debug, Clone)]
pub struct RateLimit {
    pub namespace: Arc<str>,
    pub service: Arc<str>,
    /// Of the Service.
    pub port: u16,
    pub key: LimitKey,
    /// As the policy says it: `requests` every `per`, at most `burst` at once.
    pub requests: u32,
    pub per: Duration,
    pub burst: u32,
    /// The numbers are for so many replicas together.
    pub replicas: u32,
    /// What of it is ours.
    pub rate: Rate,
    /// Kept when the numbers change.
    pub buckets: Arc<Buckets>,
}

/// Who has a bucket of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LimitKey {
    /// All have one together.
    Nobody,
    /// Every identity; those without one have one together.
    ClientIdentity,
    /// Every value of this field (lower-case name); those without it have one together.
    Header(Box<str>),
    SourceAddress,
}

/// A key's value.
#[derive(Hash)]
enum Key<'r> {
    /// Namespace and service account; empty without an identity.
    Identity(&'r str, &'r str),
    Header(Option<&'r [u8]>),
    Address(IpAddr),
}

impl RateLimit {
    /// Whether it is of the same Service and keys as another, so that it takes over its buckets.
    pub fn succeeds(&self, other: &Self) -> bool {
        let of = |limit: &Self| (limit.namespace.clone(), limit.service.clone(), limit.port);
        of(self) == of(other) && self.key == other.key
    }

    /// Takes a token for a request.
    fn take<R: RequestView>(
        &self,
        flow: &Flow,
        request: &R,
        now: Instant,
    ) -> Result<Taken<'_>, Duration> {
        let key = match &self.key {
            LimitKey::Nobody => None,
            LimitKey::ClientIdentity => {
                let (account, namespace) = &flow.source;
                Some(Key::Identity(namespace, account))
            }
            LimitKey::Header(name) => Some(Key::Header(request.header(name))),
            LimitKey::SourceAddress => Some(Key::Address(flow.peer.ip().to_canonical())),
        };
        self.buckets.take(key.as_ref(), self.rate, now)
    }

    fn error(&self, wait: Duration) -> ProxyError {
        let Self {
            namespace,
            service,
            port,
            requests,
            per,
            replicas,
            ..
        } = self;
        let whose = match &self.key {
            LimitKey::Nobody => String::new(),
            LimitKey::ClientIdentity => " of each client identity".to_owned(),
            LimitKey::Header(name) => format!(" of each value of '{name}'"),
            LimitKey::SourceAddress => " of each source address".to_owned(),
        };
        let share = match replicas {
            0 | 1 => String::new(),
            n => format!(", shared by {n} replicas"),
        };
        let text = format!(
            "{namespace}/{service}:{port} takes {requests} requests{whose} in {} ms (rateLimit of \
             its TrafficPolicy{share}); the next in {} ms",
            per.as_millis(),
            wait.as_millis().max(1),
        );
        ProxyError::new(ErrorCode::RateLimited, text).again_after(wait)
    }
}

impl HeadLimit {
    fn check(&self, size: HeadSize) -> Result<(), ProxyError> {
        let Self {
            namespace,
            service,
            port,
            ..
        } = self;
        for (is, most, what, field) in [
            (size.bytes, self.max_bytes, "bytes", "maxBytes"),
            (size.fields, self.max_fields, "fields", "maxCount"),
        ] {
            if most != 0 && is > most {
                let text = format!(
                    "the head of the request has {is} {what}; {namespace}/{service}:{port} takes \
                     {most} (requestHeaders.{field} of its TrafficPolicy)"
                );
                return Err(ProxyError::new(ErrorCode::HeadTooLarge, text));
            }
        }
        Ok(())
    }
}

/// The limits of the port that a connection has come to, as they are now.
#[derive(Debug, Default)]
pub struct Guard(RefCell<Option<Guarded>>);

#[derive(Debug)]
struct Guarded {
    /// What the limits were taken from.
    workload: Arc<Workload>,
    limits: Option<Arc<PortLimits>>,
}

impl Guard {
    /// Whether a request may pass.
    ///
    /// # Errors
    /// A limit is reached; it is counted.
    pub fn admit<R: RequestView>(
        &self,
        worker: &Worker,
        flow: &Flow,
        port: u16,
        request: &R,
        now: Instant,
    ) -> Result<(), ProxyError> {
        let mut guarded = self.0.borrow_mut();
        let known = guarded.as_ref().map(|guarded| &guarded.workload);
        if let Some(workload) = worker.directory.workload_unless(known) {
            let limits = workload.limits(port);
            *guarded = Some(Guarded { workload, limits });
        }
        let Some(Guarded { workload, limits }) = &*guarded else {
            return Ok(());
        };
        match limits {
            None => Ok(()),
            Some(limits) => limits.admit(worker, flow, workload, request, now),
        }
    }
}

impl PortLimits {
    fn admit<R: RequestView>(
        &self,
        worker: &Worker,
        flow: &Flow,
        workload: &Workload,
        request: &R,
        now: Instant,
    ) -> Result<(), ProxyError> {
        // The kubelet is not to hear that a busy workload is unwell.
        let port = flow.destination.borrow().port;
        if !flow.from_mesh && Probes::of(workload, port).admit(request.method(), request.path()) {
            return Ok(());
        }
        // What is refused for its size uses nothing up.
        if !self.heads.is_empty() {
            let size = request.size();
            self.heads.iter().try_for_each(|limit| limit.check(size))?;
        }
        let mut taken = Vec::new();
        for limit in &self.rates {
            match limit.take(flow, request, now) {
                Ok(token) if self.rates.len() > 1 => taken.push(token),
                Ok(_) => {}
                Err(wait) => {
                    taken.into_iter().for_each(Taken::give_back);
                    let labels = [&*limit.service, &*limit.namespace];
                    worker.metrics.count(Counter::RateLimited, &labels);
                    return Err(limit.error(wait));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_may_be_as_large_as_it_says() {
        let limit = |max_bytes, max_fields| HeadLimit {
            namespace: "shop".into(),
            service: "cart".into(),
            port: 80,
            max_bytes,
            max_fields,
        };
        let size = HeadSize {
            bytes: 100,
            fields: 5,
        };
        for (limit, said) in [
            (limit(0, 0), None),
            (limit(100, 5), None),
            (
                limit(99, 5),
                Some("has 100 bytes; shop/cart:80 takes 99 (requestHeaders.maxBytes"),
            ),
            (
                limit(0, 4),
                Some("has 5 fields; shop/cart:80 takes 4 (requestHeaders.maxCount"),
            ),
        ] {
            match (limit.check(size), said) {
                (Ok(()), None) => {}
                (Err(error), Some(said)) => {
                    assert!(error.detail.contains(said), "{error}");
                    assert_eq!((error.status(), error.grpc_status()), (431, 8));
                }
                (result, _) => panic!("{limit:?}: {result:?}"),
            }
        }
    }
}
