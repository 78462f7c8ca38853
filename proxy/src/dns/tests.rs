//! Names: their lives, both families, failures.

use std::collections::VecDeque;

use super::*;
use crate::tables::EndpointsCell;

/// Answers from a script, the last one again and again; counts.
#[derive(Default)]
struct Script {
    answers: Mutex<VecDeque<Result<Found, Failure>>>,
    asked: Mutex<Vec<String>>,
}

impl Script {
    fn say(&self, answers: impl IntoIterator<Item = Result<Found, Failure>>) {
        *self.answers.lock().unwrap() = answers.into_iter().collect();
    }

    fn asked(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

impl Lookup for Script {
    fn lookup<'a>(&'a self, host: &'a str) -> lookup::Answering<'a> {
        self.asked.lock().unwrap().push(host.to_owned());
        let mut answers = self.answers.lock().unwrap();
        let answer = match answers.len() {
            0 => Err(Failure::Failed("nobody there".into())),
            1 => answers[0].clone(),
            _ => answers.pop_front().unwrap(),
        };
        Box::pin(async move { answer })
    }
}

fn found(addresses: &[&str], seconds: u64) -> Result<Found, Failure> {
    Ok(Found {
        addresses: addresses.iter().map(|a| ip(a)).collect(),
        ttl: Duration::from_secs(seconds),
    })
}

fn away() -> Result<Found, Failure> {
    Err(Failure::Failed("away".into()))
}

fn ip(address: &str) -> IpAddr {
    address.parse().unwrap()
}

fn dns() -> (Arc<Dns>, Arc<Script>) {
    let script = Arc::new(Script::default());
    (Dns::new(script.clone()), script)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(1)
}

#[tokio::test(start_paused = true)]
async fn a_name_is_asked_for_when_wanted_and_again_when_its_answer_runs_out() {
    let (dns, script) = dns();
    script.say([found(&["10.0.0.1"], 30), found(&["10.0.0.2"], 30)]);
    let name = dns.name("API.example.org.");
    assert_eq!(&*name.host, "api.example.org");
    assert!(Arc::ptr_eq(&name, &dns.name("api.example.org")));
    sleep(Duration::from_secs(100)).await;
    assert_eq!(script.asked(), 0, "nobody wants it");

    assert_eq!(name.asked(soon()).await.addresses, [ip("10.0.0.1")]);
    sleep(Duration::from_secs(29)).await;
    assert_eq!(script.asked(), 1);
    sleep(Duration::from_secs(2)).await;
    assert_eq!(script.asked(), 2);
    assert_eq!(name.answer().addresses, [ip("10.0.0.2")]);

    // Nobody holds it: nobody asks.
    drop(name);
    sleep(Duration::from_secs(100)).await;
    assert_eq!(script.asked(), 2);
}

#[tokio::test(start_paused = true)]
async fn without_dns_the_last_answer_stays() {
    let (dns, script) = dns();
    script.say([found(&["10.0.0.1"], 5), away()]);
    let name = dns.name("api.example.org");
    name.asked(soon()).await;
    sleep(Duration::from_secs(3600)).await;
    let answer = name.answer();
    assert_eq!(answer.addresses, [ip("10.0.0.1")]);
    assert!(answer.failing);
    // 1, 2, 4, 8, 16, then every 30 seconds.
    let tries = script.asked();
    assert!((100..=130).contains(&tries), "{tries}");

    script.say([found(&["10.0.0.3"], 5)]);
    sleep(Duration::from_secs(31)).await;
    assert_eq!(name.answer().addresses, [ip("10.0.0.3")]);
    assert!(!name.answer().failing);
}

#[tokio::test(start_paused = true)]
async fn a_name_that_is_no_more_has_no_addresses() {
    let (dns, script) = dns();
    let ttl = Duration::from_secs(20);
    script.say([found(&["10.0.0.1"], 5), Err(Failure::NoSuchName { ttl })]);
    let name = dns.name("api.example.org");
    name.asked(soon()).await;
    sleep(Duration::from_secs(6)).await;
    let answer = name.answer();
    assert!(answer.addresses.is_empty() && !answer.failing);
    assert!(answer.problem.as_ref().unwrap().contains("api.example.org"));
    assert_eq!(script.asked(), 2);
    sleep(Duration::from_secs(20)).await;
    assert_eq!(script.asked(), 3, "its own time is kept");
}

#[tokio::test(start_paused = true)]
async fn an_address_is_the_names_when_dns_says_so_now_or_said_so_of_late() {
    let (dns, script) = dns();
    script.say([found(&["10.0.0.1"], 300), found(&["10.0.0.2"], 300)]);
    let name = dns.name("api.example.org");
    assert!(name.has(ip("10.0.0.1"), soon()).await);
    assert_eq!(script.asked(), 1);
    // Asked a moment ago: not again.
    assert!(!name.has(ip("10.0.0.2"), soon()).await);
    assert_eq!(script.asked(), 1);
    sleep(Duration::from_secs(2)).await;
    // Names of many addresses tell others each time.
    assert!(name.has(ip("10.0.0.2"), soon()).await);
    assert!(
        name.has(ip("10.0.0.1"), soon()).await,
        "an old one still is"
    );
    assert!(name.has(ip("::ffff:10.0.0.1"), soon()).await);
    assert_eq!(script.asked(), 2);
    sleep(Duration::from_secs(601)).await;
    assert!(!name.has(ip("10.0.0.1"), soon()).await, "not for ever");
    assert!(!name.has(ip("10.66.6.6"), soon()).await);
}

#[tokio::test(start_paused = true)]
async fn endpoints_follow_names() {
    let (dns, script) = dns();
    script.say([
        found(&["10.0.0.1", "10.0.0.2", "0.0.0.0"], 10),
        found(&["10.0.0.2", "fd00::1"], 10),
    ]);
    let cell: Arc<EndpointsCell> =
        Feed::cell(&dns, "dns/api.example.org:443,192.0.2.1:8443").unwrap();
    let addresses = || -> Vec<String> {
        let set = cell.current.load();
        let all = set.endpoints.iter();
        all.map(|endpoint| endpoint.address.to_string()).collect()
    };
    assert_eq!(addresses(), ["192.0.2.1:8443"]);
    let feed = cell.feed.as_ref().unwrap();
    feed.settled(soon()).await;
    assert_eq!(
        addresses(),
        ["10.0.0.1:443", "10.0.0.2:443", "192.0.2.1:8443"]
    );
    let set = cell.current.load_full();
    assert!(set.endpoints.iter().all(|e| e.siblings.is_none()));
    assert_eq!(&*set.endpoints[0].workload, "api.example.org");
    sleep(Duration::from_secs(11)).await;
    assert_eq!(
        addresses(),
        ["10.0.0.2:443", "[fd00::1]:443", "192.0.2.1:8443"]
    );
    let now = cell.current.load_full();
    assert!(now.generation > set.generation);
    assert!(
        Arc::ptr_eq(&now.endpoints[0].health, &set.endpoints[1].health),
        "what was learnt of an address stays"
    );
    assert!(now.endpoints.iter().all(|e| e.siblings.is_some()));
    assert_eq!(feed.problem(), None);
}

#[test]
fn endpoints_by_name() {
    assert!(is_local("dns/a.example:1") && is_local("original") && is_local("original/10.0.0.1:1"));
    assert!(!is_local("external/shop/api:443") && !is_local("originals/x:1"));
    assert_eq!(
        parts("dns/a.example:443,[fd00::1]:80").unwrap(),
        [
            feed::Part::Name("a.example", 443),
            feed::Part::Address("[fd00::1]:80".parse().unwrap())
        ]
    );
    assert_eq!(parts("shop/cart:80").unwrap(), []);
    for bad in [
        "dns/",
        "dns/a",
        "dns/a:0",
        "dns/:1",
        "dns/a:1,",
        "original/a:1",
    ] {
        assert!(parts(bad).is_err(), "{bad}");
    }
}
