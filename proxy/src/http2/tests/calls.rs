//! gRPC calls: their deadlines, and what servers say of another try.

use std::cell::RefCell;
use std::sync::Arc;

use super::*;
use crate::tables::RetryPolicy;

/// google.rpc.Status: code 8, and RetryInfo with a retry_delay of 60 s.
const RETRY_INFO: &str = "CAgaMAoodHlwZS5nb29nbGVhcGlzLmNvbS9nb29nbGUucnBjLlJldHJ5SW5mbxIECgIIPA";

/// Two more tries when resources are exhausted, within milliseconds.
fn retrying() -> RoutePolicy {
    let retry = RetryPolicy {
        attempts: 2,
        status_codes: vec![],
        grpc_codes: vec![8],
        connect_failure: true,
        refused_stream: true,
        reset: true,
        timeout: true,
        methods: vec!["POST".into()],
        backoff_base: Duration::from_millis(1),
        backoff_max: Duration::from_millis(2),
        max_body: 1024,
        budget_percent: 100,
        budget_min_per_second: 100,
    };
    RoutePolicy {
        retry: Some(Arc::new(retry)),
        ..RoutePolicy::default()
    }
}

/// A server that answers calls with a code and a field; the calls it has had.
async fn refusing(
    code: &'static str,
    said: (&'static str, &'static str),
) -> (SocketAddr, Rc<Cell<usize>>) {
    let calls = Rc::new(Cell::new(0));
    let count = calls.clone();
    let (address, _) = server(move |_, mut respond| {
        count.set(count.get() + 1);
        async move {
            let response = Response::builder()
                .header("grpc-status", code)
                .header(said.0, said.1);
            let response = response.body(()).unwrap();
            respond.send_response(response, true).unwrap();
        }
    })
    .await;
    (address, calls)
}

#[tokio::test]
async fn nobody_is_asked_again_before_it_wants_to_be() {
    local(async {
        for (said, asked) in [
            // Longer than the policy waits: the answer is the client's.
            (("grpc-retry-pushback-ms", "60000"), 1),
            (("grpc-retry-pushback-ms", "3"), 1),
            (("grpc-status-details-bin", RETRY_INFO), 1),
            (("retry-after", "1"), 1),
            // Not at all.
            (("grpc-retry-pushback-ms", "-1"), 1),
            (("grpc-retry-pushback-ms", "soon"), 1),
            // Soon enough, or nothing that can be read.
            (("grpc-retry-pushback-ms", "1"), 3),
            (("grpc-status-details-bin", "!!"), 3),
            (("grpc-status-details-bin", "AAAA"), 3),
            (("x-else", "60000"), 3),
        ] {
            let (address, calls) = refusing("8", said).await;
            let mut client = client(with_policy(&[address], retrying())).await;
            let (response, _) = ask(&mut client, grpc("/s/m")).await.unwrap();
            assert_eq!(response.headers()["grpc-status"], "8", "{said:?}");
            assert_eq!(response.headers()[said.0], said.1);
            assert_eq!(calls.get(), asked, "{said:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn another_endpoint_is_asked_meanwhile() {
    local(async {
        for said in [
            ("grpc-retry-pushback-ms", "60000"),
            ("grpc-status-details-bin", RETRY_INFO),
        ] {
            let (busy, calls) = refusing("8", said).await;
            let (well, _) = refusing("0", ("x-well", "yes")).await;
            let mut client = client(with_policy(&[busy, well], retrying())).await;
            for _ in 0..20 {
                let (response, _) = ask(&mut client, grpc("/s/m")).await.unwrap();
                assert_eq!(response.headers()["grpc-status"], "0", "{said:?}");
            }
            // Until it has said so.
            assert!(calls.get() <= 1, "{said:?}: {}", calls.get());
        }
    })
    .await;
}

fn within(path: &str, timeout: &str) -> Request<()> {
    let mut request = grpc(path);
    let timeout = timeout.parse().unwrap();
    request.headers_mut().insert("grpc-timeout", timeout);
    request
}

/// Microseconds.
fn told(request: &Asked) -> Option<u64> {
    let value = request.headers().get("grpc-timeout")?.to_str().unwrap();
    let (number, unit) = value.split_at(value.len() - 1);
    let unit = match unit {
        "u" => 1,
        "m" => 1_000,
        "S" => 1_000_000,
        other => panic!("{other}"),
    };
    Some(number.parse::<u64>().unwrap() * unit)
}

#[tokio::test]
async fn each_try_has_what_is_left_of_the_time() {
    local(async {
        let tries: Rc<RefCell<Vec<Option<u64>>>> = Rc::default();
        let seen = tries.clone();
        let (address, _) = server(move |request: Asked, mut respond: Answer| {
            let nth = seen.borrow().len();
            seen.borrow_mut().push(told(&request));
            async move {
                tokio::time::sleep(Duration::from_millis(5)).await;
                let code = if nth < 2 { "8" } else { "0" };
                let response = Response::builder().header("grpc-status", code);
                let response = response.body(()).unwrap();
                respond.send_response(response, true).unwrap();
            }
        })
        .await;
        let mut plain = client(with_policy(&[address], retrying())).await;
        let (response, _) = ask(&mut plain, within("/s/m", "9S")).await.unwrap();
        assert_eq!(response.headers()["grpc-status"], "0");
        let left: Vec<u64> = tries.take().into_iter().map(Option::unwrap).collect();
        assert_eq!(left.len(), 3);
        assert!(
            left[0] <= 9_000_000 && left[1] <= left[0] - 5_000,
            "{left:?}"
        );
        assert!(left[2] <= left[1] - 5_000, "{left:?}");
        // A route's own timeout is told, too, when it is the earlier one or the only one.
        let policy = RoutePolicy {
            request_timeout: Some(Duration::from_secs(5)),
            ..RoutePolicy::default()
        };
        let mut timed = client(with_policy(&[address], policy)).await;
        for (request, at_most) in [
            (within("/s/m", "9S"), Some(5_000_000)),
            (within("/s/m", "2S"), Some(2_000_000)),
            (grpc("/s/m"), Some(5_000_000)),
            // It is no call.
            (get("/"), None),
        ] {
            ask(&mut timed, request).await.unwrap();
            let told = tries.take()[0];
            assert_eq!(told.is_some(), at_most.is_some());
            assert!(told <= at_most, "{told:?} {at_most:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn there_is_no_try_after_the_deadline() {
    local(async {
        let calls = Rc::new(Cell::new(0));
        let count = calls.clone();
        // It answers when its time is over, as servers do that keep the deadline.
        let (address, _) = server(move |request: Asked, mut respond: Answer| {
            count.set(count.get() + 1);
            async move {
                let left = Duration::from_micros(told(&request).unwrap());
                tokio::time::sleep(left + Duration::from_millis(1)).await;
                let response = Response::builder().header("grpc-status", "8");
                let response = response.body(()).unwrap();
                let _ = respond.send_response(response, true);
            }
        })
        .await;
        let mut client = client(with_policy(&[address], retrying())).await;
        let (response, _) = ask(&mut client, within("/s/m", "30m")).await.unwrap();
        let code = response.headers()["grpc-status"].to_str().unwrap();
        assert!(["4", "8"].contains(&code), "{code}");
        assert_eq!(calls.get(), 1);
        // Nor is there one when there is no time at all.
        let (response, _) = ask(&mut client, within("/s/m", "0n")).await.unwrap();
        assert_eq!(response.headers()["grpc-status"], "4");
        assert_eq!(calls.get(), 1);
    })
    .await;
}
