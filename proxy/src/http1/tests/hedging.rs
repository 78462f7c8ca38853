//! A second endpoint that is asked beside the first.

use super::*;
use crate::tables::RetryPolicy;

/// Retries with a budget of so many hedges a second.
fn hedging(min_per_second: u32) -> RoutePolicy {
    RoutePolicy {
        hedge_after: Some(Duration::from_millis(30)),
        retry: Some(Arc::new(RetryPolicy {
            attempts: 1,
            status_codes: Vec::new(),
            grpc_codes: Vec::new(),
            connect_failure: true,
            refused_stream: true,
            reset: true,
            timeout: false,
            methods: Vec::new(),
            backoff_base: Duration::from_millis(1),
            backoff_max: Duration::from_millis(1),
            max_body: 1024,
            budget_percent: 0,
            budget_min_per_second: min_per_second,
        })),
        ..RoutePolicy::default()
    }
}

async fn client_of(servers: &[&Server], policy: RoutePolicy) -> TcpStream {
    let (client, proxy) = tcp_pair().await;
    let endpoints = servers.iter().map(|s| endpoint(s.address, None)).collect();
    let backend = backend(endpoints, BackendPolicy::default());
    let flow = outbound(destination(backend, policy));
    spawn_local(serve(worker(None), Stream::from(proxy), flow));
    client
}

const END: &str = "\r\n\r\n";

engine_test!(the_slower_of_two_is_cancelled, async {
    let slow = server(vec![vec![Until(END), Gone]; 2]).await;
    let answers = [Until(END), Say(OK)].repeat(6);
    let fast = server(vec![answers; 2]).await;
    let mut client = client_of(&[&slow, &fast], hedging(10)).await;
    // An endpoint without a measurement comes before one with: the slow one is asked.
    for _ in 0..6 {
        say(&mut client, GET).await;
        hear(&mut client, OK).await;
    }
    gone(&slow).await;
    assert_eq!(slow.heard.borrow()[0], format!("{GET}<gone>"));
    // Its slowness counts: once was enough.
    assert_eq!(slow.heard.borrow().len(), 1);
});

/// A slow endpoint has the request for longer than the delay, and the other one is not asked.
async fn the_first_is_waited_for(request: &'static str, end: &'static str, budget: u32) {
    let slow = server(vec![vec![Until(end), Go, Say(OK)]]).await;
    let answers = [Until(end), Say(OK)].repeat(4);
    let fast = server(vec![answers; 2]).await;
    let mut client = client_of(&[&slow, &fast], hedging(budget)).await;
    let mut answered = 0;
    // Until the slow one has it.
    loop {
        say(&mut client, request).await;
        tokio::select! {
            () = slow.hears(end) => break,
            () = hear(&mut client, OK) => answered += 1,
        }
        assert!(answered < 4, "{request}");
    }
    pass(Duration::from_millis(120)).await;
    assert_eq!(fast.heard.borrow().concat(), request.repeat(answered));
    slow.go.notify_one();
    hear(&mut client, OK).await;
    assert_eq!(fast.heard.borrow().concat(), request.repeat(answered));
}

engine_test!(
    without_budget_the_first_is_waited_for,
    the_first_is_waited_for(GET, END, 0)
);

engine_test!(without_permission_the_first_is_waited_for, async {
    const POST: &str = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi";
    the_first_is_waited_for(POST, "hi", 10).await;
});

engine_test!(one_that_fails_leaves_it_to_the_other, async {
    // Whichever is asked first, the answer of the other comes through.
    let breaks = server(vec![vec![Until(END), Go, Reset]; 3]).await;
    let slow = server(vec![vec![Until(END), Go, Say(OK)]; 3]).await;
    let mut client = client_of(&[&breaks, &slow], hedging(10)).await;
    say(&mut client, GET).await;
    breaks.hears(END).await;
    slow.hears(END).await;
    breaks.go.notify_one();
    rounds().await;
    slow.go.notify_one();
    hear(&mut client, OK).await;
    assert_eq!(slow.heard.borrow().len(), 1, "it was not asked again");
});

engine_test!(a_client_that_goes_takes_both_tries_with_it, async {
    let one = server(vec![vec![Until(END), Gone]]).await;
    let two = server(vec![vec![Until(END), Gone]]).await;
    let mut client = client_of(&[&one, &two], hedging(10)).await;
    say(&mut client, GET).await;
    one.hears(END).await;
    two.hears(END).await;
    let linger = socket2::SockRef::from(&client);
    linger.set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    gone(&one).await;
    gone(&two).await;
});

/// Hedging of what the policy names.
fn hedging_posts() -> RoutePolicy {
    let policy = hedging(10);
    let retry = RetryPolicy {
        methods: vec!["POST".into()],
        ..(**policy.retry.as_ref().unwrap()).clone()
    };
    RoutePolicy {
        retry: Some(Arc::new(retry)),
        hedge_after: Some(Duration::from_millis(100)),
        ..policy
    }
}

engine_test!(a_body_that_is_kept_is_sent_to_both, async {
    const LENGTH: &str = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n";
    const CHUNKED: &str = "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
    // With its head, behind it, and in pieces.
    for (parts, end) in [
        (vec![format!("{LENGTH}hello")], "hello"),
        (vec![LENGTH.to_owned(), "hello".to_owned()], "hello"),
        (
            vec![
                format!("{CHUNKED}2\r\nhe\r\n"),
                "3;x=y\r\nllo\r\n0\r\n".to_owned(),
                "T: 1\r\n\r\n".to_owned(),
            ],
            "T: 1\r\n\r\n",
        ),
    ] {
        let slow = server(vec![vec![Until(end), Gone]; 2]).await;
        let answers = [Until(end), Say(OK)].repeat(6);
        let fast = server(vec![answers; 2]).await;
        let mut client = client_of(&[&slow, &fast], hedging_posts()).await;
        // Whichever is asked first.
        for _ in 0..6 {
            for part in &parts {
                say(&mut client, part).await;
                rounds().await;
            }
            hear(&mut client, OK).await;
        }
        gone(&slow).await;
        let whole = parts.concat();
        assert_eq!(slow.heard.borrow()[0], format!("{whole}<gone>"));
        assert_eq!(fast.heard.borrow().concat(), whole.repeat(6));
    }
});

/// A request that is answered with `interim` before its rest comes: one server gets it, for longer than
/// the delay.
async fn is_sent_once(begin: &str, interim: Option<&'static str>, rest: &str, end: &'static str) {
    let mut script = vec![Until(end), Go, Say(OK)];
    if let Some(interim) = interim {
        script.splice(..0, [Until(END), Say(interim)]);
    }
    let one = server(vec![script.clone()]).await;
    let two = server(vec![script]).await;
    let mut client = client_of(&[&one, &two], hedging_posts()).await;
    say(&mut client, begin).await;
    hear(&mut client, interim.unwrap_or_default()).await;
    rounds().await;
    say(&mut client, rest).await;
    let asked = tokio::select! {
        () = one.hears(end) => &one,
        () = two.hears(end) => &two,
    };
    pass(Duration::from_millis(300)).await;
    let heard = || {
        let mut heard = [&one, &two].map(|server| server.heard.borrow().concat());
        heard.sort_unstable();
        heard
    };
    let once = [String::new(), format!("{begin}{rest}")];
    assert_eq!(heard(), once);
    asked.go.notify_one();
    hear(&mut client, OK).await;
    assert_eq!(heard(), once);
}

engine_test!(a_body_that_is_not_kept_is_sent_once, async {
    const BEGIN: &str = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\n\r\n";
    let long = format!("{}END", "x".repeat(1997));
    is_sent_once(BEGIN, None, &long, "END").await;
});

engine_test!(a_body_that_is_waited_for_is_sent_once, async {
    const BEGIN: &str =
        "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n";
    const CONTINUE: &str = "HTTP/1.1 100 Continue\r\n\r\n";
    is_sent_once(BEGIN, Some(CONTINUE), "hello", "hello").await;
});
