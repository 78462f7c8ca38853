//! Certificates over real sockets.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, SystemTime};

use support::{ControlPlane, csr};
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn a_token_gets_a_certificate() {
    let plane = ControlPlane::start(&[]).await;
    let (csr, _) = csr();
    let token = plane.token("shop", "cart");
    let response = plane.certify_csr(csr, &token).await.unwrap();
    assert_eq!(response.chain.len(), 1);
    assert_eq!(response.roots, plane.authority.roots());
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_secs() as i64;
    assert!(response.not_before < now);
    assert!((response.not_after - now - 24 * 3600).abs() < 60);
    let metrics = plane.admin("GET", "/metrics").await;
    assert!(metrics.contains("weft_control_plane_certificates_issued_total 1\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_good_token_there_is_none() {
    let plane = ControlPlane::start(&[]).await;
    let other = ControlPlane::start(&[]).await;
    let expired = plane
        .authority
        .issue_token(
            "shop",
            "cart",
            None,
            Duration::from_secs(60),
            SystemTime::now() - Duration::from_secs(3600),
        )
        .unwrap();
    for (token, said) in [
        (String::new(), "empty"),
        ("nonsense".to_owned(), "compact form"),
        (
            other.token("shop", "cart"),
            "not signed by this control plane",
        ),
        (expired, "expired"),
    ] {
        let (csr, _) = csr();
        let error = plane.certify_csr(csr, &token).await.unwrap_err();
        assert_eq!(error.code(), Code::Unauthenticated);
        assert!(error.message().contains(said), "{error}");
    }
    let token = plane.token("shop", "cart");
    let error = plane.certify_csr(vec![1, 2, 3], &token).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
}
