use std::io;
use std::sync::Arc;

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType};
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use weft_api::identity::SpiffeId;

use super::credentials::Issuer;
use super::testing::{Authority, DOMAIN, leaf, private, shop, trust};
use super::*;

/// What the two sides saw of one handshake.
struct Handshake {
    client: io::Result<ClientView>,
    server: io::Result<SpiffeId>,
}

#[derive(Debug)]
struct ClientView {
    alpn: Option<Vec<u8>>,
    group: rustls::NamedGroup,
    version: rustls::ProtocolVersion,
    resumed: bool,
}

/// A handshake over an in-memory pipe, and one byte from server to client: under TLS 1.3 a client
/// learns that its certificate was refused only when it reads.
async fn handshake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Handshake {
    let (a, b) = tokio::io::duplex(64 * 1024);
    let client = async move {
        let mut io = TlsConnector::from(client).connect(server_name(), a).await?;
        io.read_u8().await?;
        let tls = io.get_ref().1;
        Ok(ClientView {
            alpn: tls.alpn_protocol().map(<[u8]>::to_vec),
            group: tls.negotiated_key_exchange_group().unwrap().name(),
            version: tls.protocol_version().unwrap(),
            resumed: tls.handshake_kind() == Some(rustls::HandshakeKind::Resumed),
        })
    };
    let server = async move {
        let mut io = TlsAcceptor::from(server).accept(b).await?;
        let id = peer_identity(io.get_ref().1.peer_certificates().unwrap()).unwrap();
        io.write_u8(1).await?;
        io.flush().await?;
        Ok(id)
    };
    let (client, server) = tokio::join!(client, server);
    Handshake { client, server }
}

fn id(text: &str) -> Arc<SpiffeId> {
    Arc::new(text.parse().unwrap())
}

/// Credentials whose certificate is not checked by ourselves first: what a hostile peer shows.
fn hostile(
    authority: &Authority,
    params: &CertificateParams,
) -> (Arc<ClientConfig>, Arc<ServerConfig>) {
    let key = KeyPair::generate().unwrap();
    let chain = vec![authority.sign(params, &key)];
    let provider = credentials::provider();
    let verifier = Arc::new(verify::SpiffeVerifier {
        trust: trust(&[authority]),
        expected: None,
        algorithms: provider.signature_verification_algorithms,
    });
    let key = rustls::sign::CertifiedKey::new(
        chain,
        provider
            .key_provider
            .load_private_key(private(&key))
            .unwrap(),
    );
    let resolver = Arc::new(rustls::sign::SingleCertAndKey::from(key));
    let mut client = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(verifier.clone())
        .with_client_cert_resolver(resolver.clone());
    client.alpn_protocols = vec![Alpn::H2.wire().to_vec()];
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(resolver);
    server.alpn_protocols = vec![Alpn::H2.wire().to_vec()];
    (Arc::new(client), Arc::new(server))
}

#[tokio::test]
async fn two_workloads_meet() {
    let ca = Authority::new("root", 1);
    let cart = ca.credentials(&shop("cart"), &[&ca]);
    let web = ca.credentials(&shop("web"), &[&ca]);
    for alpn in [Alpn::Http1, Alpn::H2, Alpn::Tcp] {
        let met = handshake(
            web.client_config(&id(&shop("cart")), alpn),
            cart.server_config(),
        )
        .await;
        let view = met.client.unwrap();
        assert_eq!(view.alpn.as_deref().and_then(Alpn::from_wire), Some(alpn));
        assert_eq!(view.group, rustls::NamedGroup::X25519MLKEM768);
        assert_eq!(view.version, rustls::ProtocolVersion::TLSv1_3);
        assert_eq!(met.server.unwrap().to_string(), shop("web"));
    }
}

#[tokio::test]
async fn sessions_are_not_resumed() {
    let ca = Authority::new("root", 1);
    let cart = ca.credentials(&shop("cart"), &[&ca]);
    let web = ca.credentials(&shop("web"), &[&ca]);
    for _ in 0..3 {
        let config = web.client_config(&id(&shop("cart")), Alpn::H2);
        let met = handshake(config, cart.server_config()).await;
        assert!(!met.client.unwrap().resumed);
    }
}

#[test]
fn client_configs_are_kept_per_identity_and_alpn() {
    let ca = Authority::new("root", 1);
    let web = ca.credentials(&shop("web"), &[&ca]);
    let first = web.client_config(&id(&shop("cart")), Alpn::H2);
    assert!(Arc::ptr_eq(
        &first,
        &web.client_config(&id(&shop("cart")), Alpn::H2)
    ));
    assert!(!Arc::ptr_eq(
        &first,
        &web.client_config(&id(&shop("cart")), Alpn::Tcp)
    ));
    assert!(!Arc::ptr_eq(
        &first,
        &web.client_config(&id(&shop("card")), Alpn::H2)
    ));
}

#[tokio::test]
async fn another_workload_of_the_trust_domain_is_not_the_expected_one() {
    let ca = Authority::new("root", 1);
    let web = ca.credentials(&shop("web"), &[&ca]);
    // "car" is the beginning of "cart", "cart" that of "cart-2": the comparison is whole.
    for other in ["car", "cart-2", "carT"] {
        let imposter = ca.credentials(&shop(other), &[&ca]);
        let met = handshake(
            web.client_config(&id(&shop("cart")), Alpn::H2),
            imposter.server_config(),
        )
        .await;
        assert_eq!(
            explain(&met.client.unwrap_err()),
            format!(
                "the endpoint showed {} but {} was expected",
                shop(other),
                shop("cart")
            )
        );
        assert!(met.server.is_err());
    }
}

#[tokio::test]
async fn bad_certificates_are_refused_on_both_sides() {
    let ca = Authority::new("root", 1);
    let good = ca.credentials(&shop("cart"), &[&ca]);
    let web = shop("web");
    let with = |change: &dyn Fn(&mut CertificateParams)| {
        let mut params = leaf(&[&web]);
        change(&mut params);
        params
    };
    let dated = |from: i32, to: i32| {
        with(&|p: &mut CertificateParams| {
            p.not_before = rcgen::date_time_ymd(from, 1, 1);
            p.not_after = rcgen::date_time_ymd(to, 1, 1);
        })
    };
    let cases: Vec<(&str, CertificateParams)> = vec![
        (
            "not of the trust domain",
            leaf(&["spiffe://other.example/ns/shop/sa/web"]),
        ),
        ("names 2 URIs", leaf(&[&web, &shop("admin")])),
        ("names 0 URIs", leaf(&[])),
        (
            "does not name a workload",
            leaf(&["https://cluster.local/ns/shop/sa/web"]),
        ),
        ("expired", dated(2020, 2021)),
        ("is a clock wrong?", dated(2090, 2091)),
        (
            "is for another use",
            with(&|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning]),
        ),
        (
            "is for another use",
            with(&|p| p.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained)),
        ),
        (
            "may sign other certificates",
            with(&|p| p.key_usages = vec![KeyUsagePurpose::KeyCertSign]),
        ),
        (
            "names 0 URIs",
            with(&|p| p.subject_alt_names = vec![SanType::DnsName("web".try_into().unwrap())]),
        ),
    ];
    for (reason, params) in cases {
        let (client, server) = hostile(&ca, &params);
        let as_server = handshake(good.client_config(&id(&web), Alpn::H2), server).await;
        let said = explain(&as_server.client.unwrap_err());
        // A client wants one identity; that of another trust domain is simply not the expected.
        let reason_for_client = match reason {
            "not of the trust domain" => "but spiffe://cluster.local/ns/shop/sa/web was expected",
            other => other,
        };
        assert!(
            said.contains(reason_for_client),
            "as server: {reason}: {said}"
        );
        assert!(as_server.server.is_err(), "{reason}");
        let as_client = handshake(client, good.server_config()).await;
        let said = explain(&as_client.server.unwrap_err());
        assert!(said.contains(reason), "as client: {reason}: {said}");
        assert!(as_client.client.is_err(), "{reason}");
    }
}

#[tokio::test]
async fn one_sided_uses_do_not_serve_for_the_other_side() {
    let ca = Authority::new("root", 1);
    let good = ca.credentials(&shop("cart"), &[&ca]);
    let mut params = leaf(&[&shop("web")]);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let (client, server) = hostile(&ca, &params);
    let met = handshake(good.client_config(&id(&shop("web")), Alpn::H2), server).await;
    assert!(met.client.is_ok());
    let met = handshake(client, good.server_config()).await;
    assert!(explain(&met.server.unwrap_err()).contains("clientAuth"));
}

#[tokio::test]
async fn a_stranger_with_the_right_name_is_refused() {
    let (ours, theirs) = (Authority::new("root", 1), Authority::new("root", 1));
    let good = ours.credentials(&shop("cart"), &[&ours]);
    let (client, server) = hostile(&theirs, &leaf(&[&shop("web")]));
    let met = handshake(good.client_config(&id(&shop("web")), Alpn::H2), server).await;
    assert!(met.client.is_err());
    let met = handshake(client, good.server_config()).await;
    assert!(met.server.is_err());
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let ca = Authority::new("root", 1);
    let cart = ca.credentials(&shop("cart"), &[&ca]);
    let mut anonymous = ClientConfig::clone(
        &credentials::anonymous_config(&trust(&[&ca]), id(&shop("cart"))).unwrap(),
    );
    anonymous.alpn_protocols = vec![Alpn::H2.wire().to_vec()];
    let met = handshake(Arc::new(anonymous), cart.server_config()).await;
    assert_eq!(
        explain(&met.server.unwrap_err()),
        "the peer showed no certificate"
    );
    assert_eq!(
        explain(&met.client.unwrap_err()),
        "the peer wants a certificate and got none"
    );
}

#[tokio::test]
async fn plaintext_is_told_apart() {
    let ca = Authority::new("root", 1);
    let web = ca.credentials(&shop("web"), &[&ca]);
    let (a, mut b) = tokio::io::duplex(64 * 1024);
    b.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        .await
        .unwrap();
    let error = TlsConnector::from(web.client_config(&id(&shop("cart")), Alpn::H2))
        .connect(server_name(), a)
        .await
        .unwrap_err();
    assert!(explain(&error).contains("does not speak TLS"), "{error}");
}

#[tokio::test]
async fn roots_rotate_with_two_at_once_and_no_new_certificate() {
    let (old, new) = (Authority::new("old", 2), Authority::new("new", 1));
    let handle = Handle::new();
    handle.set(old.credentials(&shop("web"), &[&old]));
    assert_eq!(handle.generation(), 1);
    assert_eq!(handle.get().unwrap().issuer(), Issuer::Signing);
    // A peer that already has its certificate from the new root.
    let ahead = new.credentials(&shop("cart"), &[&old, &new]);
    let cart = id(&shop("cart"));
    let meet = |ahead: Arc<ServerConfig>| {
        let ours = handle.get().unwrap().client_config(&cart, Alpn::H2);
        handshake(ours, ahead)
    };
    assert!(meet(ahead.server_config()).await.client.is_err());

    handle
        .set_trust(TrustBundle::new(DOMAIN, [old.cert.clone(), new.cert.clone()]).unwrap())
        .unwrap();
    assert_eq!(handle.generation(), 2);
    assert_eq!(handle.get().unwrap().issuer(), Issuer::Signing);
    let met = meet(ahead.server_config()).await;
    assert!(met.client.is_ok());
    assert_eq!(met.server.unwrap().to_string(), shop("web"));

    // The first signs, whatever their dates say. The same again is no change.
    for _ in 0..2 {
        handle
            .set_trust(TrustBundle::new(DOMAIN, [new.cert.clone(), old.cert.clone()]).unwrap())
            .unwrap();
        assert_eq!(handle.generation(), 3);
        assert_eq!(handle.get().unwrap().issuer(), Issuer::Older);
    }

    // The old root is gone and the certificate was not renewed: it stays, and says so.
    handle
        .set_trust(TrustBundle::new(DOMAIN, [new.cert.clone()]).unwrap())
        .unwrap();
    assert_eq!(handle.get().unwrap().issuer(), Issuer::Unknown);
}

#[test]
fn roots_are_checked() {
    let ca = Authority::new("root", 1);
    let key = KeyPair::generate().unwrap();
    let not_ca = ca.sign(&leaf(&[&shop("web")]), &key);
    let bundle = |roots: Vec<rustls_pki_types::CertificateDer<'static>>| {
        TrustBundle::new(DOMAIN, roots).unwrap_err()
    };
    assert_eq!(bundle(vec![]), TrustError::Empty);
    assert_eq!(
        bundle(vec![ca.cert.clone(), not_ca]),
        TrustError::NotAuthority(1)
    );
    assert!(matches!(
        bundle(vec![vec![1, 2, 3].into()]),
        TrustError::Malformed { index: 0, .. }
    ));
    assert!(matches!(
        TrustBundle::from_pem(DOMAIN, b"no PEM here"),
        Err(TrustError::Empty)
    ));
    assert_eq!(
        TrustBundle::from_pem(DOMAIN, ca.pem.as_bytes()).unwrap(),
        *trust(&[&ca])
    );
}

#[test]
fn a_certificate_that_does_not_fit_is_not_taken() {
    let (ca, other) = (Authority::new("root", 1), Authority::new("other", 1));
    let key = KeyPair::generate().unwrap();
    let cert = ca.sign(&leaf(&[&shop("web")]), &key);
    let make = |key: &KeyPair, trusted: &Authority| {
        Credentials::new(vec![cert.clone()], private(key), trust(&[trusted]), 1)
    };
    assert!(make(&key, &ca).is_ok());
    assert!(matches!(
        make(&key, &other),
        Err(CredentialsError::Chain(_))
    ));
    let another = KeyPair::generate().unwrap();
    assert!(matches!(make(&another, &ca), Err(CredentialsError::Key(_))));
    assert!(!format!("{:?}", make(&key, &ca).unwrap()).contains("PrivateKey"));
}
