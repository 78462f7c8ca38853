use super::*;

fn reading(pod: &str, at: Instant, text: &str) -> Reading {
    Reading {
        pod: Meshed {
            namespace: "shop".to_owned(),
            name: pod.to_owned(),
            owner: format!("deploy/{}", pod.split('-').next().unwrap()),
            admin_port: 15020,
            ready: true,
            node: String::new(),
        },
        at,
        samples: Ok(scrape::parse(text, &FAMILIES)),
    }
}

/// What a proxy of front, or of cart, has after `n` requests.
fn text(direction: &str, n: u32, failed: u32) -> String {
    let flow = format!(
        "direction=\"{direction}\",destination_service=\"cart\",destination_namespace=\"shop\",mtls=\"true\""
    );
    let ok = n - failed;
    format!(
        "weft_requests_total{{{flow},response_class=\"2xx\",grpc_status=\"\"}} {ok}
weft_requests_total{{{flow},response_class=\"5xx\",grpc_status=\"\"}} {failed}
weft_request_duration_seconds_bucket{{{flow},le=\"0.002\"}} {n}
weft_request_duration_seconds_bucket{{{flow},le=\"+Inf\"}} {n}
weft_requests_in_flight{{{flow}}} 1
weft_tcp_connections_active{{{flow}}} 2
weft_retries_total{{reason=\"reset\",destination_service=\"cart\",destination_namespace=\"shop\"}} {failed}
"
    )
}

/// front-1 calls cart-1 and cart-2, 400 requests in two seconds.
fn both() -> (Vec<Reading>, Vec<Reading>) {
    let then = Instant::now();
    let now = then + Duration::from_secs(2);
    let idle = "weft_retries_total{reason=\"reset\"} 0\n";
    (
        vec![
            reading("cart-1", then, &text("inbound", 1000, 0)),
            reading("cart-2", then, &text("inbound", 1000, 0)),
            reading("front-1", then, &text("outbound", 2000, 0)),
            reading("idle-1", then, idle),
        ],
        vec![
            reading("cart-1", now, &text("inbound", 1200, 0)),
            reading("cart-2", now, &text("inbound", 1200, 4)),
            reading("front-1", now, &text("outbound", 2400, 4)),
            reading("idle-1", now, idle),
        ],
    )
}

fn shown(what: Option<&str>) -> String {
    let view = View::read(what).unwrap();
    let (before, mut now) = both();
    now.push(Reading {
        samples: Err("it did not answer within five seconds".to_owned()),
        ..reading("lost-1", Instant::now(), "")
    });
    let (rows, silent) = rows(&view, &before, &now, |namespace| namespace == "shop");
    render(&view, &rows, &silent, Paint::NEVER)
}

#[test]
fn workloads_show_what_they_take_in() {
    assert_eq!(
        shown(None),
        "\
NAMESPACE  WORKLOAD      PODS  REQ/S  SUCCESS  P50      P99      MTLS   RETRIES/S  RUNNING  TCP
shop       deploy/cart   2     200    99.0 %   1.00 ms  1.98 ms  100 %  2.0        2        4
shop       deploy/front  1     0      -        -        -        -      2.0        0        0
shop       deploy/idle   1     0      -        -        -        -      0          0        0
no answer from shop/lost-1: it did not answer within five seconds
"
    );
}

#[test]
fn services_show_what_their_callers_see() {
    assert_eq!(
        shown(Some("svc")),
        "\
NAMESPACE  SERVICE  REQ/S  SUCCESS  P50      P99      MTLS   RETRIES/S  RUNNING  TCP
shop       cart     200    99.0 %   1.00 ms  1.98 ms  100 %  4.0        1        2
no answer from shop/lost-1: it did not answer within five seconds
"
    );
}

#[test]
fn one_of_them() {
    assert!(shown(Some("pod/cart-2")).contains("\nshop       cart-2  100    98.0 % "));
    assert!(!shown(Some("pod/cart-2")).contains("cart-1"));
    assert!(shown(Some("deploy/front")).contains("deploy/front"));
    assert!(!shown(Some("deploy/front")).contains("deploy/cart"));
    assert!(View::read(Some("nothing")).is_err());
}
