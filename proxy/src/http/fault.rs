//! Faults that a policy injects: requests that wait, requests that fail.
//!
//! They come before backend, permit and endpoint are chosen, so that what waits takes nobody's
//! place, nothing of it counts for or against an endpoint, and no retry repeats it: to the
//! application it is what the destination did.

use std::time::Instant;

use super::{ErrorCode, ProxyError, RequestView};
use crate::tables::{Destination, FaultAbort, FaultInjection};
use crate::telemetry::Counter;
use crate::worker::Worker;

impl FaultInjection {
    /// Whether a request is one of those meant; how many of them is drawn for each.
    pub fn concerns<R: RequestView>(&self, request: &R) -> bool {
        self.headers
            .iter()
            .all(|(name, value)| request.header(name) == Some(value.as_bytes()))
    }

    /// Delays a request, fails it, both or neither. `place` names its route.
    ///
    /// # Errors
    /// The request was aborted, or its timeout ran out in the delay.
    pub async fn inject(
        &self,
        worker: &Worker,
        destination: &Destination,
        place: &str,
        grpc: bool,
        deadline: Option<Instant>,
    ) -> Result<(), ProxyError> {
        let count = |fault: &str| {
            let labels = [fault, &destination.service, &destination.namespace];
            worker.metrics.count(Counter::FaultsInjected, &labels);
        };
        if let Some(delay) = self.delay
            && worker.random() < delay.share
        {
            count("delay");
            let end = Instant::now() + delay.duration;
            let until = deadline.map_or(end, |deadline| deadline.min(end));
            tokio::time::sleep_until(until.into()).await;
            if until < end {
                let text = format!(
                    "{place}: the request timeout ran out in a delay of {} ms that its \
                     TrafficPolicy injects (faultInjection)",
                    delay.duration.as_millis()
                );
                return Err(ProxyError::new(ErrorCode::ResponseTimeout, text));
            }
        }
        if let Some(abort) = self.abort
            && let Some((status, grpc_status)) = abort.answer(grpc)
            && worker.random() < abort.share
        {
            count("abort");
            let text =
                format!("{place}: a fault that its TrafficPolicy injects (faultInjection.abort)");
            let error = ProxyError::new(ErrorCode::InjectedFault, text);
            return Err(error.answered_with(status, grpc_status));
        }
        Ok(())
    }
}

impl FaultAbort {
    /// HTTP and gRPC status; `None`: such requests are not aborted.
    fn answer(self, grpc: bool) -> Option<(u16, u32)> {
        match self.status {
            Some(status) => Some((status, self.grpc_status)),
            // gRPC runs over HTTP/2, where the HTTP status is not seen.
            None => grpc.then_some((503, self.grpc_status)),
        }
    }
}

/// What gRPC makes of an HTTP status ("HTTP to gRPC Status Code Mapping").
pub fn grpc_of_status(status: u16) -> u32 {
    match status {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502..=504 => 14,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::tables::{BackendPolicy, FaultDelay, RoutePolicy};
    use crate::telemetry::labels::EventLabels;
    use crate::testing::{backend, destination, worker};

    struct Asked(&'static [(&'static str, &'static str)]);

    impl RequestView for Asked {
        fn size(&self) -> crate::http::HeadSize {
            crate::http::HeadSize::default()
        }
        fn method(&self) -> &[u8] {
            b"GET"
        }
        fn path(&self) -> &[u8] {
            b"/"
        }
        fn header(&self, name: &str) -> Option<&[u8]> {
            let found = self.0.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| value.as_bytes())
        }
    }

    fn fault() -> FaultInjection {
        FaultInjection {
            headers: Vec::new(),
            delay: None,
            abort: None,
        }
    }

    async fn inject(
        worker: &Worker,
        fault: &FaultInjection,
        grpc: bool,
        deadline: Option<Instant>,
    ) -> Result<(), ProxyError> {
        let backend = backend(Vec::new(), BackendPolicy::default());
        let destination = destination(backend, RoutePolicy::default());
        let injected = fault.inject(worker, &destination, "route cart", grpc, deadline);
        injected.await
    }

    #[test]
    fn every_header_has_to_be_there_with_its_value() {
        let some = FaultInjection {
            headers: vec![
                ("x-chaos".into(), "on".into()),
                ("user".into(), "ann".into()),
            ],
            ..fault()
        };
        for (headers, concerned) in [
            (&[("x-chaos", "on"), ("user", "ann")][..], true),
            (&[("x-chaos", "on"), ("user", "bob")], false),
            (&[("x-chaos", "ON"), ("user", "ann")], false),
            (&[("user", "ann")], false),
            (&[], false),
        ] {
            assert_eq!(some.concerns(&Asked(headers)), concerned, "{headers:?}");
            assert!(fault().concerns(&Asked(headers)));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_delay_takes_its_time_and_no_more_than_the_request_has() {
        let worker = worker(None);
        let slow = FaultInjection {
            delay: Some(FaultDelay {
                share: 1.0,
                duration: Duration::from_secs(60),
            }),
            ..fault()
        };
        let begun = tokio::time::Instant::now();
        inject(&worker, &slow, false, None).await.unwrap();
        let waited = begun.elapsed();
        assert!((59..=61).contains(&waited.as_secs()), "{waited:?}");
        let deadline = Instant::now() + Duration::from_millis(1);
        let error = inject(&worker, &slow, false, Some(deadline)).await;
        assert_eq!(error.unwrap_err().status(), 504);
        let counted = worker.metrics.registry().snapshot().counters;
        let delays = |labels: &EventLabels<Counter>| labels.event == Counter::FaultsInjected;
        let delays = counted.iter().filter(|(labels, _)| delays(labels));
        assert_eq!(delays.map(|(_, n)| n).sum::<u64>(), 2);
    }

    #[tokio::test]
    async fn an_abort_has_the_status_of_its_kind() {
        let worker = worker(None);
        let abort = |status, grpc_status| FaultInjection {
            abort: Some(FaultAbort {
                share: 1.0,
                status,
                grpc_status,
            }),
            ..fault()
        };
        let error = inject(&worker, &abort(Some(418), 2), true, None).await;
        let error = error.unwrap_err();
        assert_eq!((error.status(), error.grpc_status()), (418, 2));
        let said = error.proxy_status();
        assert!(
            said.starts_with("weft; error=proxy_internal_response; details=\"route cart: a fault"),
            "{said}"
        );
        let only_grpc = abort(None, 8);
        assert_eq!(inject(&worker, &only_grpc, false, None).await, Ok(()));
        let error = inject(&worker, &only_grpc, true, None).await.unwrap_err();
        assert_eq!(error.grpc_status(), 8);
    }

    #[tokio::test]
    async fn as_many_as_it_says() {
        let worker = worker(None);
        let some = FaultInjection {
            abort: Some(FaultAbort {
                share: 0.25,
                status: Some(500),
                grpc_status: 13,
            }),
            ..fault()
        };
        let mut aborted = 0;
        for _ in 0..4_000 {
            aborted += u32::from(inject(&worker, &some, false, None).await.is_err());
        }
        // Six standard deviations.
        assert!((836..=1164).contains(&aborted), "{aborted}");
    }
}
