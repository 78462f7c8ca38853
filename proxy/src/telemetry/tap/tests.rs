use std::time::SystemTime;

use futures_util::StreamExt;

use super::*;
use crate::telemetry::labels::FlowProtocol;

fn record(method: &str, path: &str, status: u16) -> AccessRecord {
    let mut record = AccessRecord::new(Direction::Outbound, FlowProtocol::Http1, SystemTime::now());
    record.method = method.into();
    record.path = path.into();
    record.status = status;
    record.destination_service = "shop/cart".into();
    record.destination_workload = "shop/cart-v1".into();
    record.source_workload = "shop/front".into();
    record
}

fn filter(query: &[(&str, &str)]) -> Result<Filter, InvalidFilter> {
    let parameters = query
        .iter()
        .map(|(name, value)| (*name, (*value).to_owned()));
    Filter::read(parameters).map(|(filter, _)| filter)
}

#[test]
fn filters_show_what_they_name() {
    let get = record("GET", "/api/items?x=1", 503);
    for (query, wanted) in [
        (&[][..], true),
        (&[("method", "get")], true),
        (&[("method", "POST")], false),
        (&[("path", "/api")], true),
        (&[("path", "/items")], false),
        (&[("status", "5xx")], true),
        (&[("status", "200,503")], true),
        (&[("status", "4xx")], false),
        (&[("status", "error")], true),
        (&[("to", "cart")], true),
        (&[("to", "shop/cart")], true),
        (&[("to", "cart-v1")], true),
        (&[("to", "other/cart")], false),
        (&[("from", "front")], true),
        (&[("from", "back")], false),
        (&[("direction", "inbound")], false),
        (
            &[
                ("direction", "outbound"),
                ("path", "/api/"),
                ("status", "503"),
            ],
            true,
        ),
    ] {
        assert_eq!(filter(query).unwrap().wants(&get), wanted, "{query:?}");
    }
    let mut failed_call = record("POST", "/Greeter/Hello", 200);
    failed_call.grpc_status = Some(14);
    assert!(filter(&[("status", "error")]).unwrap().wants(&failed_call));
    for query in [
        ("status", "6xx"),
        ("status", ""),
        ("status", "20"),
        ("direction", "up"),
        ("max_per_second", "0"),
        ("max_per_second", "1001"),
        ("pth", "/"),
    ] {
        assert!(filter(&[query]).is_err(), "{query:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_too_much_is_counted_and_told() {
    let taps = Arc::new(Taps::default());
    assert!(!taps.is_on());
    let query = [
        ("path", "/a".to_owned()),
        ("max_per_second", "2".to_owned()),
    ];
    let (filter, rate) = Filter::read(query).unwrap();
    let mut lines = Box::pin(taps.listen(filter, rate).unwrap());
    assert!(taps.is_on());
    for path in ["/a/1", "/b", "/a/2", "/a/3", "/a/4"] {
        taps.offer(&record("GET", path, 200));
    }
    let mut next = async || {
        let frame = lines.next().await.unwrap().unwrap();
        String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap()
    };
    for path in ["/a/1", "/a/2"] {
        let line: serde_json::Value = serde_json::from_str(&next().await).unwrap();
        assert_eq!(line["path"], path);
        assert_eq!(line["destination_service"], "shop/cart");
    }
    assert_eq!(next().await, "{\"left_out\":2}\n");
    assert_eq!(next().await, "\n", "nothing new: still there");
    drop(lines);
    assert!(!taps.is_on());
    assert!(taps.list.load().is_empty());
}

#[tokio::test]
async fn there_is_room_for_so_many_listeners() {
    let taps = Arc::new(Taps::default());
    let listen = || taps.listen(Filter::default(), 1);
    let mut all: Vec<_> = (0..MAX_TAPS).map(|_| listen().unwrap()).collect();
    assert!(listen().is_err());
    all.pop();
    assert!(listen().is_ok());
}

#[test]
fn a_rate_starts_again_with_each_second() {
    let rate = Rate::new(3);
    let taken = |at: u64| {
        let now = rate.began + Duration::from_millis(at);
        (0..5).filter(|_| rate.take(now)).count()
    };
    assert_eq!(
        (taken(0), taken(999), taken(1_000), taken(5_500)),
        (3, 0, 3, 3)
    );
    assert!(
        !rate.take(rate.began),
        "an older clock counts with the newer second"
    );
}
