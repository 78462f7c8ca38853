//! Faults, and what a destination takes no more of.

use weft_api::policy::resilience::FaultInjection;
use weft_api::proto;

pub(super) fn fault(given: &FaultInjection) -> proto::FaultInjection {
    proto::FaultInjection {
        headers: given
            .headers
            .iter()
            .map(|header| proto::Header {
                name: header.name.clone(),
                value: header.value.clone(),
            })
            .collect(),
        delay: given.delay.map(|delay| proto::FaultDelay {
            percent: delay.percent.get(),
            duration_ms: delay.duration.as_millis(),
        }),
        abort: given.abort.map(|abort| proto::FaultAbort {
            percent: abort.percent.get(),
            status: abort.status.map_or(0, u32::from),
            grpc_status: abort.grpc_status.map_or(0, |code| code as u32),
        }),
    }
}

#[cfg(test)]
mod tests {
    use weft_api::proto::Header;

    use super::super::tests::{route_policy, with};

    #[test]
    fn the_most_specific_fault_is_used_whole() {
        let world = with(
            "
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: all, namespace: shop}
spec: {faultInjection: {headers: [{name: x-chaos, value: 'on'}], delay: {duration: 2s}}}
---
apiVersion: policy.weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: cart-http, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart, sectionName: http}]
  timeouts: {request: 5s}
  faultInjection: {abort: {percent: 5, status: 503, grpcStatus: ABORTED}}
",
        );
        let fault = |name| route_policy(&world, name).fault_injection.unwrap();
        let http = fault("cart.shop:80");
        let abort = http.abort.unwrap();
        assert!(http.delay.is_none() && http.headers.is_empty());
        assert_eq!(
            (abort.percent, abort.status, abort.grpc_status),
            (5, 503, 10)
        );
        let admin = fault("cart.shop:9000");
        let header = |name: &str, value: &str| Header {
            name: name.to_owned(),
            value: value.to_owned(),
        };
        assert_eq!(admin.headers, [header("x-chaos", "on")]);
        let delay = admin.delay.unwrap();
        assert_eq!((delay.percent, delay.duration_ms), (100, 2_000));
        assert!(admin.abort.is_none());
    }
}
