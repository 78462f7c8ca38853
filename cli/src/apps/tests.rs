//! The whole shop over real sockets, without a mesh.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;

use super::knobs::{Knobs, Order};
use super::visitor::{Report, Visitor};
use super::*;

struct Shop {
    front: SocketAddr,
    catalog: Arc<Knobs>,
    pricing: Arc<Knobs>,
    ledger: SocketAddr,
}

fn common(listen: SocketAddr, name: &str) -> Common {
    Common {
        listen,
        name: name.to_owned(),
        control: None,
    }
}

async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

async fn shop() -> Shop {
    let never = std::future::pending::<()>;
    let knobs = Arc::<Knobs>::default;
    let (catalog_knobs, pricing_knobs) = (knobs(), knobs());
    let (l, catalog) = listener().await;
    let args = catalog::Catalog {
        common: common(catalog, "catalog-1"),
        version: "v2".to_owned(),
    };
    tokio::spawn(catalog::serve(l, args, catalog_knobs.clone(), never()));
    let (l, pricing) = listener().await;
    tokio::spawn(pricing::serve(
        l,
        "pricing-1".to_owned(),
        pricing_knobs.clone(),
        never(),
    ));
    let (l, ledger) = listener().await;
    tokio::spawn(ledger::serve(l, "ledger-1".to_owned(), knobs(), never()));
    let (l, front) = listener().await;
    let args = front::Front {
        common: common(front, "front-1"),
        catalog: format!("http://{catalog}"),
        pricing: format!("http://{pricing}"),
        ledger: ledger.to_string(),
    };
    tokio::spawn(front::serve(l, args, knobs(), never()));
    Shop {
        front,
        catalog: catalog_knobs,
        pricing: pricing_knobs,
        ledger,
    }
}

/// Visits for a while and hands back what became of it.
async fn visit(front: SocketAddr, rate: u32, how_long: Duration) -> Vec<Report> {
    let (reports, mut received) = tokio::sync::mpsc::unbounded_channel();
    let args = Visitor {
        front: format!("http://{front}"),
        rate,
    };
    visitor::drive(args, reports, tokio::time::sleep(how_long))
        .await
        .unwrap();
    let mut all = Vec::new();
    while let Some(report) = received.recv().await {
        all.push(report);
    }
    all
}

#[tokio::test]
async fn every_kind_of_request_succeeds() {
    let shop = shop().await;
    let reports = visit(shop.front, 200, Duration::from_millis(500)).await;
    assert!(reports.len() >= 20, "{}", reports.len());
    for report in &reports {
        assert_eq!(report.status, 200, "{report:?}");
    }
    for path in ["/page/", "/offers", "/orders/"] {
        assert!(reports.iter().any(|r| r.path.starts_with(path)), "{path}");
    }
    // Each order was written down, once.
    let orders = reports.iter().filter(|r| r.method == "POST").count() as u64;
    let mut ledger = ledger::Connection::open(&shop.ledger.to_string())
        .await
        .unwrap();
    assert_eq!(ledger.record(1, 1).await.unwrap(), orders + 1);
}

#[tokio::test]
async fn a_failing_application_is_named() {
    let shop = shop().await;
    shop.catalog.apply(Order::Fail {
        status: 500,
        percent: 100,
    });
    let reports = visit(shop.front, 200, Duration::from_millis(200)).await;
    let page = reports
        .iter()
        .find(|r| r.path.starts_with("/page"))
        .unwrap();
    assert_eq!(page.status, 502);
    assert!(page.said.contains("the catalog answered 500"), "{page:?}");
    let order = reports.iter().find(|r| r.method == "POST").unwrap();
    assert_eq!(order.status, 200, "{order:?}");

    shop.catalog.apply(Order::Well);
    shop.pricing.apply(Order::Fail {
        status: 503,
        percent: 100,
    });
    let reports = visit(shop.front, 200, Duration::from_millis(200)).await;
    assert!(!reports.is_empty());
    for report in reports {
        assert_eq!(report.status, 502);
        assert!(
            report.said.contains("pricing answered Unavailable"),
            "{report:?}"
        );
    }
}

#[tokio::test]
async fn a_slow_application_is_slow() {
    let shop = shop().await;
    shop.catalog.apply(Order::Latency { ms: 120 });
    let reports = visit(shop.front, 50, Duration::from_millis(100)).await;
    let page = reports
        .iter()
        .find(|r| r.path.starts_with("/page"))
        .unwrap();
    assert!(page.took >= 120.0, "{page:?}");
}

#[tokio::test]
async fn the_ledger_speaks_first() {
    use tokio::io::AsyncReadExt;
    let shop = shop().await;
    let mut stream = tokio::net::TcpStream::connect(shop.ledger).await.unwrap();
    let mut greeting = [0; 20];
    stream.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"220 ledger-1 ready\r\n");
}
