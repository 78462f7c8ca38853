use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use proptest::prelude::*;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P384_SHA384};
use x509_parser::prelude::*;

use super::*;
use crate::serve::tls::peer;

/// All proxies trust the roots; some may still have certificates of the old one.
const TRUSTED: Moving = Moving {
    all_trust: true,
    all_moved_for: None,
};
const HOUR: Duration = Duration::from_secs(3600);

fn open(dir: &Path) -> Authority {
    Authority::open(dir, Options::default()).unwrap()
}

fn token(authority: &Authority, now: SystemTime) -> String {
    authority
        .issue_token("shop", "cart", Some("shop/cart-1"), HOUR, now)
        .unwrap()
}

fn csr(key: &KeyPair) -> Vec<u8> {
    // What is asked for in the request counts for nothing.
    let params = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
    params.serialize_request(key).unwrap().der().to_vec()
}

#[test]
fn a_leaf_is_as_spiffe_wants_it() {
    let dir = tempfile::tempdir().unwrap();
    let authority = open(dir.path());
    let now = SystemTime::now();
    let key = KeyPair::generate().unwrap();
    let (issued, claims) = authority
        .certify(&csr(&key), &token(&authority, now), now)
        .unwrap();
    assert_eq!(claims.workload.as_deref(), Some("shop/cart-1"));
    assert_eq!(issued.not_after, unix(now) + 24 * 3600);
    let (_, leaf) = parse_x509_certificate(&issued.leaf).unwrap();
    assert_eq!(
        leaf.public_key().subject_public_key.data.as_ref(),
        key.public_key_raw()
    );
    assert_eq!(leaf.subject().iter().count(), 0);
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical);
    assert_eq!(
        names.value.general_names,
        [GeneralName::URI("spiffe://cluster.local/ns/shop/sa/cart")]
    );
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_cert_sign());
    let extended = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.server_auth && extended.client_auth);
    assert!(!leaf.is_ca());
    let (_, root) = parse_x509_certificate(&authority.roots()[0])
        .map(|(rest, root)| (rest.len(), root.validity().not_after.timestamp()))
        .unwrap();
    assert!(root as u64 > unix(now) + 3649 * 24 * 3600);
    let identity = peer(&issued.leaf, "cluster.local").unwrap().identity;
    assert_eq!(
        identity.to_string(),
        "spiffe://cluster.local/ns/shop/sa/cart"
    );
    assert!(peer(&issued.leaf, "other.example").is_err());
}

#[test]
fn what_is_not_a_proper_request_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let authority = open(dir.path());
    let now = SystemTime::now();
    let token = token(&authority, now);
    let refused = |csr: &[u8]| match authority.certify(csr, &token, now) {
        Err(CertifyError::Csr(reason)) => reason,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(b""), InvalidCsr::Malformed);
    assert_eq!(refused(b"nonsense"), InvalidCsr::Malformed);
    let p384 = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
    assert_eq!(refused(&csr(&p384)), InvalidCsr::NotP256);
    let mut forged = csr(&KeyPair::generate().unwrap());
    let last = forged.len() - 1;
    forged[last] ^= 1;
    assert_eq!(refused(&forged), InvalidCsr::Signature);
    // Somebody else's public key under one's own signature.
    let (mine, theirs) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let mut stolen = csr(&mine);
    let at = stolen
        .windows(65)
        .position(|bytes| bytes == mine.public_key_raw())
        .unwrap();
    stolen[at..at + 65].copy_from_slice(theirs.public_key_raw());
    assert_eq!(refused(&stolen), InvalidCsr::Signature);
    let mut longer = csr(&mine);
    longer.push(0);
    assert_eq!(refused(&longer), InvalidCsr::Malformed);
}

#[test]
fn tokens_are_checked() {
    let (dir, other_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (authority, other) = (open(dir.path()), open(other_dir.path()));
    let now = SystemTime::now();
    let good = token(&authority, now);
    let check = |token: &str, now| authority.check_token(token, now);
    assert_eq!(check(&good, now).unwrap().service_account, "cart");
    assert_eq!(check(&format!("{good}\n"), now).unwrap().namespace, "shop");
    assert_eq!(check("", now), Err(InvalidToken::Missing));
    assert_eq!(check(&good, now + HOUR), Err(InvalidToken::Expired));
    assert_eq!(check(&good, now - HOUR), Err(InvalidToken::NotYet));
    assert_eq!(
        check(&token(&other, now), now),
        Err(InvalidToken::Signature)
    );
    assert_eq!(
        authority
            .token_key
            .as_ref()
            .unwrap()
            .check(&good, "other.example", now),
        Err(InvalidToken::TrustDomain("cluster.local".to_owned()))
    );
    let parts: Vec<&str> = good.split('.').collect();
    let encode = |json: &str| URL_SAFE_NO_PAD.encode(json);
    // Claims changed under the old signature; the algorithm talked down.
    let payload = String::from_utf8(URL_SAFE_NO_PAD.decode(parts[1]).unwrap()).unwrap();
    let admin = encode(&payload.replace("shop/cart", "shop/admin"));
    assert_eq!(
        check(&format!("{}.{admin}.{}", parts[0], parts[2]), now),
        Err(InvalidToken::Signature)
    );
    for header in [
        r#"{"alg":"none","typ":"JWT"}"#,
        r#"{"alg":"HS256","typ":"JWT"}"#,
    ] {
        let header = encode(header);
        assert_eq!(
            check(&format!("{header}.{}.{}", parts[1], parts[2]), now),
            Err(InvalidToken::Signature)
        );
        assert!(check(&format!("{header}.{}.", parts[1]), now).is_err());
    }
    // Signed by the right key, for somebody else.
    let sign = |payload: String| {
        use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
        let pem = std::fs::read_to_string(dir.path().join("token.key.pem")).unwrap();
        let key = KeyPair::from_pem(&pem).unwrap();
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, key.serialized_der())
            .unwrap();
        let signed = format!("{}.{}", parts[0], encode(&payload));
        let random = aws_lc_rs::rand::SystemRandom::new();
        let signature = key.sign(&random, signed.as_bytes()).unwrap();
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    };
    assert!(check(&sign(payload.clone()), now).is_ok());
    assert_eq!(
        check(
            &sign(payload.replace("weft.dev/control-plane", "elsewhere")),
            now
        ),
        Err(InvalidToken::Audience("elsewhere".to_owned()))
    );
    assert_eq!(
        check(
            &sign(payload.replace("shop/cart\"", "weft-system/weft-control-plane\"")),
            now
        ),
        Err(InvalidToken::Reserved)
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_token_and_no_request_panics(token in "[A-Za-z0-9_.-]{0,200}", csr in proptest::collection::vec(any::<u8>(), 0..300)) {
        let dir = tempfile::tempdir().unwrap();
        let authority = open(dir.path());
        let now = SystemTime::now();
        prop_assert!(authority.certify(&csr, &token, now).is_err());
        prop_assert!(super::csr::public_key(&csr).is_err());
    }
}

#[test]
fn files_are_for_their_owner_only_and_stay() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("a/b");
    let roots = open(&dir).roots();
    assert_eq!(
        std::fs::metadata(&dir).unwrap().permissions().mode() & 0o777,
        0o700
    );
    let mut files = 0;
    for entry in std::fs::read_dir(&dir).unwrap() {
        let entry = entry.unwrap();
        let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{:?}", entry.file_name());
        files += 1;
    }
    assert!(files >= 5);
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    let again = open(&dir);
    assert_eq!(again.roots(), roots);
    assert_eq!(
        std::fs::metadata(&dir).unwrap().permissions().mode() & 0o777,
        0o700
    );
    assert_eq!(
        std::fs::read_to_string(dir.join("root.pem")).unwrap(),
        again.bundle()
    );
}

#[test]
fn one_data_directory_serves_one_control_plane() {
    let dir = tempfile::tempdir().unwrap();
    let first = lock(dir.path()).unwrap();
    assert!(matches!(lock(dir.path()), Err(CaError::InUse(_))));
    drop(first);
    assert!(lock(dir.path()).is_ok());
}

#[test]
fn damage_is_named_and_nothing_is_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path());
    std::fs::write(dir.path().join("state.json"), "{}").unwrap();
    let error = Authority::open(dir.path(), Options::default())
        .err()
        .unwrap();
    assert!(matches!(error, CaError::Damaged { .. }), "{error}");
    assert!(error.to_string().contains("state.json"));
}

#[tokio::test]
async fn a_rotation_goes_its_way_and_survives_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let now = SystemTime::now();
    let authority = open(dir.path());
    let old = authority.roots();
    authority.step(Request::Rotate, now).await.unwrap();
    assert!(matches!(
        authority.step(Request::Rotate, now).await,
        Err(CaError::Rotating("announcing"))
    ));
    let both = authority.roots();
    assert_eq!(both.len(), 2);
    assert_eq!(both[0], old[0]);
    let signer = |authority: &Authority, now| {
        let key = KeyPair::generate().unwrap();
        let (issued, _) = authority
            .certify(&csr(&key), &token(authority, now), now)
            .unwrap();
        let (_, leaf) = parse_x509_certificate(&issued.leaf).unwrap();
        both.iter()
            .position(|root| {
                let (_, root) = parse_x509_certificate(root).unwrap();
                root.subject() == leaf.issuer()
            })
            .unwrap()
    };
    assert_eq!(signer(&authority, now), 0);

    // Restarted while it is announced.
    let authority = open(dir.path());
    assert_eq!(authority.roots(), both);
    authority
        .tick(TRUSTED, now + Duration::from_secs(1))
        .await
        .unwrap();
    assert_eq!(authority.status().phase, "announcing", "too early");
    authority
        .tick(Moving::default(), now + Duration::from_secs(60))
        .await
        .unwrap();
    assert_eq!(authority.status().phase, "announcing", "not all trust it");
    let later = now + Duration::from_secs(61);
    authority.tick(TRUSTED, later).await.unwrap();
    assert_eq!(authority.status().phase, "draining");
    assert_eq!(signer(&authority, later), 1);
    let told = authority.roots();
    assert_eq!(told, [both[1].clone(), both[0].clone()], "who signs first");
    // Its own certificate is still one that everybody trusts.
    let (own, _) = authority.own_certificate(later).unwrap();
    let (_, own) = parse_x509_certificate(&own.leaf).unwrap();
    let (_, first) = parse_x509_certificate(&both[0]).unwrap();
    assert_eq!(own.issuer(), first.subject());

    // Restarted while the old one drains.
    let authority = open(dir.path());
    assert_eq!(signer(&authority, later), 1);
    authority.tick(TRUSTED, later + 24 * HOUR).await.unwrap();
    assert_eq!(authority.status().phase, "draining", "clocks may be behind");
    authority
        .tick(TRUSTED, later + 24 * HOUR + Duration::from_secs(30))
        .await
        .unwrap();
    assert_eq!(authority.status().phase, "stable");
    assert_eq!(authority.roots(), both[1..]);
    assert_eq!(open(dir.path()).roots(), both[1..]);
    let keys = std::fs::read_dir(dir.path())
        .unwrap()
        .filter(|entry| {
            let name = entry.as_ref().unwrap().file_name();
            name.to_string_lossy().ends_with(".key.pem")
        })
        .count();
    assert_eq!(keys, 2, "the new root's and the token key");
}

#[tokio::test]
async fn proxies_that_never_acknowledge_do_not_stop_a_rotation() {
    let dir = tempfile::tempdir().unwrap();
    let now = SystemTime::now();
    let authority = open(dir.path());
    authority.step(Request::Rotate, now).await.unwrap();
    authority
        .tick(Moving::default(), now + Duration::from_secs(599))
        .await
        .unwrap();
    assert_eq!(authority.status().phase, "announcing");
    authority
        .tick(Moving::default(), now + Duration::from_secs(600))
        .await
        .unwrap();
    assert_eq!(authority.status().phase, "draining");
}

#[tokio::test]
async fn a_rotation_can_be_asked_for_from_outside() {
    let dir = tempfile::tempdir().unwrap();
    let now = SystemTime::now();
    let running = open(dir.path());
    let mut changes = running.changes();
    request(dir.path(), Request::Rotate).unwrap();
    running.tick(Moving::default(), now).await.unwrap();
    assert_eq!(running.status().phase, "announcing");
    assert!(changes.has_changed().unwrap());
    changes.mark_unchanged();
    running.tick(Moving::default(), now).await.unwrap();
    assert!(!changes.has_changed().unwrap(), "asked for once, done once");
    assert!(matches!(
        request(dir.path(), Request::Rotate),
        Err(CaError::Rotating(_))
    ));
    request(dir.path(), Request::Finish).unwrap();
    running.tick(Moving::default(), now).await.unwrap();
    assert_eq!(running.status().phase, "stable");
}

#[tokio::test]
async fn the_old_root_goes_when_all_are_seen_to_have_moved() {
    let dir = tempfile::tempdir().unwrap();
    let now = SystemTime::now();
    let authority = open(dir.path());
    authority.step(Request::Rotate, now).await.unwrap();
    let later = now + Duration::from_secs(10);
    let moved_for = |seconds| Moving {
        all_trust: true,
        all_moved_for: Some(Duration::from_secs(seconds)),
    };
    // Before the new one signs, it means nothing.
    authority.tick(moved_for(100), later).await.unwrap();
    assert_eq!(authority.status().phase, "draining");
    authority.tick(moved_for(29), later).await.unwrap();
    assert_eq!(authority.status().phase, "draining");
    authority.tick(moved_for(30), later).await.unwrap();
    assert_eq!(authority.status().phase, "stable");
}

/// A lifetime that is longer than before: until the leader has noted it, certificates are as short as
/// before, and are to be renewed as early.
#[test]
fn own_certificates_are_renewed_at_half_of_their_own_life() {
    let dir = tempfile::tempdir().unwrap();
    let authority = open(dir.path());
    assert_eq!(authority.options.lifetime, Duration::from_secs(24 * 3600));
    authority.inner().state.longest_lifetime_secs = 60;
    let now = SystemTime::now();
    let own = crate::serve::tls::server_config(&authority, now).unwrap();
    assert_eq!(own.not_after, unix(now) + 60);
    assert!(own.renew_at <= now + Duration::from_secs(30));
}

#[tokio::test]
async fn leaves_from_before_the_lifetime_was_shortened_count() {
    let dir = tempfile::tempdir().unwrap();
    let now = SystemTime::now();
    drop(open(dir.path()));
    let options = Options {
        lifetime: MIN_LIFETIME,
        ..Options::default()
    };
    // Only reading it, as `weft-control-plane token` does, shortens nothing.
    let authority = Authority::open(dir.path(), options.clone()).unwrap();
    assert_eq!(authority.inner().state.longest_lifetime_secs, 24 * 3600);
    authority.tick(TRUSTED, now).await.unwrap();
    let authority = Authority::open(dir.path(), options).unwrap();
    assert_eq!(authority.inner().state.longest_lifetime_secs, 60);
    let hours = |n: u64| now + Duration::from_secs(n * 3600);
    for (rotated, expire) in [
        (hours(1), unix(hours(24)) + 30),
        (hours(25), unix(hours(25)) + 90),
    ] {
        let mut state = authority.inner().state.clone();
        state.sign_with_new(rotated);
        let Phase::Draining { old_leaves_expire } = state.phase else {
            panic!("{state:?}")
        };
        assert_eq!(old_leaves_expire, expire);
    }
}
