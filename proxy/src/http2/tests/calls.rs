//! gRPC calls: their deadlines, and what servers say of another try.

use std::cell::RefCell;
use std::sync::Arc;

use super::*;
use crate::tables::RetryPolicy;

/// google.rpc.Status: code 8, and RetryInfo with a retry_delay of 60 s.
const RETRY_INFO: &str = "CAgaMAoodHlwZS5nb29nbGVhcGlzLmNvbS9nb29nbGUucnBjLlJldHJ5SW5mbxIECgIIPA";

/// Two more tries when resources are exhausted, within milliseconds.
fn retrying() -> RoutePolicy {
    waiting(2)
}

/// The same after at most so many milliseconds.
fn waiting(backoff_max: u64) -> RoutePolicy {
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
        backoff_max: Duration::from_millis(backoff_max),
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
                let code = if nth < 2 { "8" } else { "0" };
                // The proxy waits between two tries.
                let response = Response::builder()
                    .header("grpc-status", code)
                    .header("grpc-retry-pushback-ms", "5");
                let response = response.body(()).unwrap();
                respond.send_response(response, true).unwrap();
            }
        })
        .await;
        let mut plain = client(with_policy(&[address], waiting(10))).await;
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
        // The policy would wait for as long as the server wants, and the call's time is over before.
        let (address, calls) = refusing("8", ("grpc-retry-pushback-ms", "10000")).await;
        let mut client = client(with_policy(&[address], waiting(10_000))).await;
        let (response, _) = ask(&mut client, within("/s/m", "9S")).await.unwrap();
        assert_eq!(response.headers()["grpc-status"], "8");
        assert_eq!(calls.get(), 1);
        // Nor is there one when there is no time at all.
        let (response, _) = ask(&mut client, within("/s/m", "0n")).await.unwrap();
        assert_eq!(response.headers()["grpc-status"], "4");
        assert_eq!(calls.get(), 1);
    })
    .await;
}

/// Another endpoint is asked too after a while, for calls.
fn hedging() -> RoutePolicy {
    RoutePolicy {
        hedge_after: Some(Duration::from_millis(50)),
        ..retrying()
    }
}

#[tokio::test]
async fn a_calls_message_is_sent_to_both_endpoints() {
    local(async {
        let message = Bytes::from(vec![b'm'; 700]);
        let heard: Rc<RefCell<Vec<(&str, Bytes, bool)>>> = Rc::default();
        let endpoint = async |name: &'static str, answers: bool| {
            let heard = heard.clone();
            let handle = move |request: Asked, mut respond: Answer| {
                let heard = heard.clone();
                async move {
                    let (bytes, trailers) = read(&mut request.into_body()).await.unwrap();
                    heard.borrow_mut().push((name, bytes, trailers.is_some()));
                    if answers {
                        return ok(respond, "fast");
                    }
                    poll_fn(|cx| respond.poll_reset(cx)).await.unwrap();
                }
            };
            server(handle).await.0
        };
        let (slow, fast) = (endpoint("slow", false).await, endpoint("fast", true).await);
        let mut client = client(with_policy(&[slow, fast], hedging())).await;
        // An endpoint without a measurement comes before one with: the slow one is asked.
        let calls = 6;
        for n in 0..calls {
            let with_trailers = n % 2 == 1;
            let (response, mut sink) = client.send_request(grpc("/s/m"), false).unwrap();
            sink.send_data(message.slice(..300), false).unwrap();
            sink.send_data(message.slice(300..), !with_trailers)
                .unwrap();
            if with_trailers {
                let mut trailers = HeaderMap::new();
                trailers.insert("x-end", "1".parse().unwrap());
                sink.send_trailers(trailers).unwrap();
            }
            let mut body = response.await.unwrap().into_body();
            assert_eq!(read(&mut body).await.unwrap().0, "fast");
        }
        let heard = heard.borrow();
        assert!(heard.iter().any(|(name, ..)| *name == "slow"));
        assert!(
            heard.iter().all(|(_, bytes, _)| *bytes == message),
            "{heard:?}"
        );
        let fast = heard.iter().filter(|(name, ..)| *name == "fast");
        assert_eq!(fast.clone().count(), calls);
        assert_eq!(fast.filter(|(_, _, trailers)| *trailers).count(), calls / 2);
    })
    .await;
}

#[tokio::test]
async fn a_stream_that_goes_on_is_not_sent_twice() {
    local(async {
        let asked = watch::Sender::new(0);
        let count = asked.clone();
        let handle = move |request: Asked, respond: Answer| {
            count.send_modify(|asked| *asked += 1);
            async move {
                let (bytes, _) = read(&mut request.into_body()).await.unwrap();
                assert_eq!(bytes, "onetwo");
                ok(respond, "once");
            }
        };
        let (first, _) = server(handle.clone()).await;
        let (second, _) = server(handle).await;
        let mut client = client(with_policy(&[first, second], hedging())).await;
        let (response, mut sink) = client.send_request(grpc("/s/m"), false).unwrap();
        sink.send_data("one".into(), false).unwrap();
        let mut one = asked.subscribe();
        one.wait_for(|asked| *asked > 0).await.unwrap();
        // Longer than the delay.
        pass(Duration::from_millis(150)).await;
        sink.send_data("two".into(), true).unwrap();
        let mut body = response.await.unwrap().into_body();
        assert_eq!(read(&mut body).await.unwrap().0, "once");
        assert_eq!(*asked.borrow(), 1);
    })
    .await;
}
