//! Sessions: what a client is given, and where it leads.

use super::*;
use crate::tables::{Backend, RoutePolicy, fresh_id};

const NOW: u64 = 1_800_000_000_000;

struct Request {
    path: &'static str,
    fields: Vec<(&'static str, String)>,
}

impl RequestView for Request {
    fn size(&self) -> crate::http::HeadSize {
        crate::http::HeadSize::default()
    }

    fn method(&self) -> &[u8] {
        b"GET"
    }
    fn path(&self) -> &[u8] {
        self.path.as_bytes()
    }
    fn header(&self, name: &str) -> Option<&[u8]> {
        let mut fields = self.fields.iter();
        let found = fields.find(|(known, _)| *known == name);
        found.map(|(_, value)| value.as_bytes())
    }
    fn values(&self, name: &str, each: &mut dyn FnMut(&[u8]) -> bool) {
        let named = self.fields.iter().filter(|(known, _)| *known == name);
        for (_, value) in named {
            if each(value.as_bytes()) {
                return;
            }
        }
    }
}

fn key() -> Arc<SessionKey> {
    Arc::new(SessionKey::new(&[7; 32]).unwrap())
}

fn token() -> Token {
    Token {
        endpoint: 1,
        backend: 2,
        began: NOW,
        seen: NOW,
    }
}

fn session(place: Place) -> Session {
    Session {
        name: HeaderName::from_static("x-session"),
        spelling: "X-Session".into(),
        place,
        absolute: Some(Duration::from_secs(100)),
        idle: Some(Duration::from_secs(10)),
    }
}

const COOKIE: Place = Place::Cookie {
    by_path: true,
    permanent: false,
};

fn endpoint(workload: &str) -> EndpointInfo {
    EndpointInfo {
        address: ([10, 0, 0, 7], 8080).into(),
        identity: None,
        workload: workload.into(),
        zone: Arc::default(),
        weight: 1,
        state: crate::tables::Health::Ready,
        health: Arc::default(),
        siblings: None,
    }
}

fn sticky(session: Session, token: Option<Token>) -> Sticky {
    Sticky {
        of: ShareSession {
            session: Arc::new(session),
            backend: 2,
        },
        key: key(),
        scope: "r".into(),
        token,
        path: "/a".into(),
    }
}

#[test]
fn a_token_is_read_with_its_key_and_for_its_route_only() {
    let text = key().seal(&token(), "r").unwrap();
    assert_eq!(key().open(text.as_bytes(), "r"), Some(token()));
    assert_ne!(text, key().seal(&token(), "r").unwrap(), "they can be told");
    assert_eq!(key().open(text.as_bytes(), "other"), None);
    let other = SessionKey::new(&[8; 32]).unwrap();
    assert_eq!(other.open(text.as_bytes(), "r"), None);
    for bad in ["", "x", "10.0.0.7:8080", &text[1..], &format!("{text}A")] {
        assert_eq!(key().open(bad.as_bytes(), "r"), None, "{bad}");
    }
    // Every bit counts.
    let bytes = URL_SAFE_NO_PAD.decode(&text).unwrap();
    for at in 0..bytes.len() * 8 {
        let mut bytes = bytes.clone();
        bytes[at / 8] ^= 1 << (at % 8);
        let text = URL_SAFE_NO_PAD.encode(bytes);
        assert_eq!(key().open(text.as_bytes(), "r"), None, "bit {at}");
    }
    assert!(SessionKey::new(&[7; 31]).is_none());
}

#[test]
fn timeouts_end_sessions() {
    let session = session(COOKIE);
    for (began, seen, now, live) in [
        (NOW, NOW, NOW, true),
        (NOW, NOW, NOW + 9_999, true),
        (NOW, NOW, NOW + 10_000, false),
        (NOW, NOW + 95_000, NOW + 99_999, true),
        (NOW, NOW + 95_000, NOW + 100_000, false),
        // Another proxy's clock is ahead.
        (NOW + 60_000, NOW + 60_000, NOW, true),
    ] {
        let token = Token {
            began,
            seen,
            ..token()
        };
        assert_eq!(session.is_live(&token, now), live, "{began} {seen} {now}");
    }
}

#[test]
fn the_first_good_token_of_several_counts() {
    let good = key().seal(&token(), "r").unwrap();
    let of = |place| session(place);
    let cookies = |values: &[String]| Request {
        path: "/",
        fields: values.iter().map(|v| ("cookie", v.clone())).collect(),
    };
    let read = |request: &Request| of(COOKIE).token(&key(), "r", request, NOW);
    for values in [
        vec![format!("X-Session={good}")],
        vec![format!("a=b; X-Session={good}; c=d")],
        vec![format!("X-Session=old; X-Session={good}")],
        vec!["a=b".to_owned(), format!("X-Session={good}")],
    ] {
        assert_eq!(read(&cookies(&values)), Some(token()), "{values:?}");
    }
    for values in [
        vec![],
        vec![format!("x-session={good}")],
        vec![format!("AX-Session={good}")],
        vec![format!("X-Session={good}x")],
    ] {
        assert_eq!(read(&cookies(&values)), None, "{values:?}");
    }
    let header = Request {
        path: "/",
        fields: vec![("x-session", good)],
    };
    let read = of(Place::Header).token(&key(), "r", &header, NOW);
    assert_eq!(read, Some(token()));
}

#[test]
fn a_token_is_given_out_when_it_is_new_moved_or_getting_old() {
    let here = endpoint("shop/cart-1");
    let with = |seen: u64| {
        let token = Token {
            endpoint: here.session_id(),
            seen,
            ..token()
        };
        sticky(session(COOKIE), Some(token))
    };
    let given = sticky(session(COOKIE), None).field(&here, NOW).unwrap();
    let text = given.value.to_str().unwrap();
    assert_eq!(given.name, http::header::SET_COOKIE);
    assert!(
        text.starts_with("X-Session=") && text.ends_with("; HttpOnly; SameSite=Strict; Path=/a"),
        "{text}"
    );
    assert!(!given.alone && !text.contains("10.0.0.7") && !text.contains("cart"));
    assert_eq!(with(NOW).field(&here, NOW + 999), None);
    let renewed = with(NOW).field(&here, NOW + 1_000).unwrap();
    let text = renewed.value.to_str().unwrap();
    let inner = &text["X-Session=".len()..text.find(';').unwrap()];
    let opened = key().open(inner.as_bytes(), "r").unwrap();
    assert_eq!((opened.began, opened.seen), (NOW, NOW + 1_000));
    let moved = with(NOW).field(&endpoint("shop/cart-2"), NOW + 5);
    assert!(moved.is_some());
    // Without an idle timeout nothing is renewed.
    let mut eternal = with(NOW);
    eternal.of.session = Arc::new(Session {
        idle: None,
        ..session(COOKIE)
    });
    assert_eq!(eternal.field(&here, NOW + 99_000), None);
}

#[test]
fn a_permanent_cookie_says_how_long_and_a_header_stands_alone() {
    let here = endpoint("");
    let permanent = Place::Cookie {
        by_path: false,
        permanent: true,
    };
    let token = Token {
        endpoint: here.session_id(),
        ..token()
    };
    let given = sticky(session(permanent), Some(token))
        .field(&here, NOW + 30_000)
        .unwrap();
    assert!(given.value.to_str().unwrap().ends_with("; Max-Age=70"));
    let given = sticky(session(Place::Header), None)
        .field(&here, NOW)
        .unwrap();
    assert!(given.alone);
    assert_eq!(
        (given.name.as_str(), &*given.spelling),
        ("x-session", "X-Session")
    );
}

#[test]
fn a_session_stays_with_its_backend_whatever_the_weights() {
    let share = |backend: u64, weight: u32, name: &str| Share {
        weight,
        backend: Ok(Arc::new(Backend {
            id: fresh_id(),
            namespace: "shop".into(),
            service: name.into(),
            port: 80,
            endpoints: Arc::default(),
            policy: crate::tables::BackendPolicy::default(),
            limits: Arc::default(),
        })),
        plan: None,
        session: Some(ShareSession {
            session: Arc::new(session(COOKIE)),
            backend,
        }),
    };
    let first = share(1, 100, "v1");
    let backend = first.backend.clone().unwrap();
    let route = Route {
        backends: vec![first, share(2, 0, "v2")],
        sessions: true,
        ..Route::simple("r", backend, RoutePolicy::default())
    };
    let request = |text: String| Request {
        path: "/",
        fields: vec![("cookie", format!("X-Session={text}"))],
    };
    let good = key().seal(&token(), "r").unwrap();
    let (share, found) = resume(&key(), &route, &request(good), NOW).unwrap();
    assert_eq!((share.weight, found), (0, token()));
    let elsewhere = Token {
        backend: 3,
        ..token()
    };
    let elsewhere = key().seal(&elsewhere, "r").unwrap();
    assert!(resume(&key(), &route, &request(elsewhere), NOW).is_none());
}

#[test]
fn a_cookie_is_for_what_the_route_matched() {
    let of = |path: PathMatch| RouteMatch {
        path: Some(path),
        ..RouteMatch::default()
    };
    let regex = |text: &str| PathMatch::Regex(regex::bytes::Regex::new(text).unwrap());
    for (matched, path, prefix, expected) in [
        (None, "/a/b", 0, "/"),
        (Some(PathMatch::Prefix("/".into())), "/a/b", 0, "/"),
        (Some(PathMatch::Prefix("/a".into())), "/a/b?x", 2, "/a"),
        (Some(PathMatch::Exact("/a/b".into())), "/a/b?x", 0, "/a/b"),
        (
            Some(regex("^(?:/p1/p2/[a-z]+/p3)$")),
            "/p1/p2/foo/p3",
            0,
            "/p1/p2",
        ),
        (Some(regex("^(?:/x.*)$")), "/xy", 0, "/"),
        (Some(PathMatch::Exact("/a;b".into())), "/a;b", 0, "/"),
    ] {
        let matches: Vec<_> = matched.into_iter().map(of).collect();
        let request = Request {
            path,
            fields: Vec::new(),
        };
        assert_eq!(
            &*cookie_path(&matches, &request, prefix),
            expected,
            "{path}"
        );
    }
}
