//! Capture with real connections: two network namespaces joined by a veth pair, in a user namespace
//! of our own, so that no right is needed. Where the machine forbids user namespaces, each test
//! says so and passes without having tested anything.
//!
//! A user namespace can only be entered by a process with one thread, so each test runs itself
//! again as a child that unshares before it executes (`in_namespaces`).

// Helpers are tests too.
#![allow(clippy::unwrap_used)]

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt as _;
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::{LinkUnspec, LinkVeth, RouteMessageBuilder};
use weft_proxy::capture::{self, Backend, Config, is_not_redirected, original_destination};

const CHILD: &str = "WEFT_TEST_IN_NAMESPACES";
const MARK: u32 = 0x539;
const PATIENCE: Duration = Duration::from_secs(5);

/// Runs `body` in a process that is root in new user and network namespaces.
fn in_namespaces(test: &str, body: impl FnOnce()) {
    isolated(test, true, body);
}

/// Runs `body` in a process with a new network namespace; as this user, or as the only user of a
/// new user namespace.
fn isolated(test: &str, new_users: bool, body: impl FnOnce()) {
    if std::env::var_os(CHILD).is_some() {
        body();
        return;
    }
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", test, "--nocapture"]).env(CHILD, "1");
    let maps = [
        ("/proc/self/setgroups", "deny".to_owned()),
        ("/proc/self/uid_map", format!("0 {uid} 1")),
        ("/proc/self/gid_map", format!("0 {gid} 1")),
    ];
    // SAFETY: between fork and exec there are only system calls on data prepared here.
    unsafe {
        child.pre_exec(move || {
            if !new_users {
                return Ok(unshare(CloneFlags::CLONE_NEWNET)?);
            }
            unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET)?;
            maps.iter()
                .try_for_each(|(path, text)| std::fs::write(path, text))
        });
    }
    match child.status() {
        Ok(status) => assert!(status.success(), "{test} failed in its namespaces"),
        Err(error) => eprintln!("skipped {test}: no namespaces here ({error})"),
    }
}

/// Runs `body` on a thread in another network namespace.
fn within<T: Send>(namespace: &OwnedFd, body: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
            body()
        });
        thread.join().unwrap()
    })
}

fn rtnetlink<T>(act: impl AsyncFnOnce(rtnetlink::Handle) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().unwrap();
        tokio::spawn(connection);
        act(handle).await
    })
}

async fn index_of(handle: &rtnetlink::Handle, name: &str) -> u32 {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    links.try_next().await.unwrap().unwrap().header.index
}

async fn set_up(handle: &rtnetlink::Handle, name: &str, addresses: &[&str]) {
    // IPv6 addresses are usable at once, without duplicate address detection.
    std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/accept_dad"), "0").unwrap();
    let index = index_of(handle, name).await;
    for address in addresses {
        let (address, length) = address.split_once('/').unwrap();
        let (address, length) = (address.parse::<IpAddr>().unwrap(), length.parse().unwrap());
        handle
            .address()
            .add(index, address, length)
            .execute()
            .await
            .unwrap();
    }
    for index in [1, index] {
        let up = LinkUnspec::new_with_index(index).up().build();
        handle.link().set(up).execute().await.unwrap();
    }
}

/// "Here" has 10.77.0.1 and fd77::1; the returned namespace has 10.77.0.2 and fd77::2, and an
/// address in each of two networks that "here" reaches through it.
fn two_hosts() -> OwnedFd {
    let far: OwnedFd = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        std::fs::File::open("/proc/thread-self/ns/net")
            .unwrap()
            .into()
    })
    .join()
    .unwrap();
    rtnetlink(async |handle| {
        handle
            .link()
            .add(LinkVeth::new("near", "far").build())
            .execute()
            .await
            .unwrap();
        let index = index_of(&handle, "far").await;
        let moved = LinkUnspec::new_with_index(index)
            .setns_by_fd(far.as_raw_fd())
            .build();
        handle.link().set(moved).execute().await.unwrap();
    });
    let addresses = ["10.77.0.2/24", "fd77::2/64", "10.99.0.2/32", "fd99::2/128"];
    within(&far, || {
        rtnetlink(async |handle| set_up(&handle, "far", &addresses).await)
    });
    rtnetlink(async |handle| {
        set_up(&handle, "near", &["10.77.0.1/24", "fd77::1/64"]).await;
        for (everything, gateway) in [("0.0.0.0", "10.77.0.2"), ("::", "fd77::2")] {
            let route = RouteMessageBuilder::<IpAddr>::new()
                .destination_prefix(everything.parse().unwrap(), 0)
                .unwrap()
                .gateway(gateway.parse().unwrap())
                .unwrap();
            handle.route().add(route.build()).execute().await.unwrap();
        }
    });
    far
}

fn listen(address: &str) -> TcpListener {
    TcpListener::bind(address).unwrap()
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// A connection from one of this namespace's addresses.
fn dial_from(source: SocketAddr, target: SocketAddr) -> TcpStream {
    let domain = socket2::Domain::for_address(target);
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None).unwrap();
    socket.bind(&source.into()).unwrap();
    socket
        .connect_timeout(&target.into(), PATIENCE)
        .unwrap_or_else(|error| panic!("{source} to {target}: {error}"));
    socket.into()
}

fn dial(target: SocketAddr, mark: Option<u32>) -> TcpStream {
    let domain = socket2::Domain::for_address(target);
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None).unwrap();
    if let Some(mark) = mark {
        socket.set_mark(mark).unwrap();
    }
    socket
        .connect_timeout(&target.into(), PATIENCE)
        .unwrap_or_else(|error| panic!("{target}: {error}"));
    socket.into()
}

/// Accepts `client` at `listener`, sends a word each way, and returns the accepted side.
fn converse(listener: &TcpListener, mut client: TcpStream) -> TcpStream {
    listener.set_nonblocking(true).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let mut accepted = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let target = client.peer_addr().unwrap();
                assert!(
                    Instant::now() < deadline,
                    "the connection to {target} went elsewhere"
                );
                std::thread::yield_now();
            }
            Err(error) => panic!("{error}"),
        }
    };
    accepted.set_nonblocking(false).unwrap();
    for stream in [&client, &accepted] {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    let mut word = [0; 4];
    client.write_all(b"ping").unwrap();
    accepted.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"ping");
    accepted.write_all(b"pong").unwrap();
    client.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"pong");
    accepted
}

fn reaches(listener: &TcpListener, target: &str) -> TcpStream {
    converse(listener, dial(addr(target), None))
}

fn config() -> Config {
    Config {
        proxy_mark: Some(MARK),
        exclude_outbound_ports: vec!["3306".parse().unwrap()],
        exclude_outbound_cidrs: vec![
            "10.99.0.0/17".parse().unwrap(),
            "fd99::/16".parse().unwrap(),
        ],
        exclude_inbound_ports: vec!["2222-2223".parse().unwrap()],
        // One prefix that ends inside a byte.
        exclude_inbound_cidrs: vec![
            "10.98.0.0/15".parse().unwrap(),
            "fd99::/16".parse().unwrap(),
        ],
        ..Config::default()
    }
}

/// Everything a captured workload sees, whichever backend set the rules.
fn captured_outbound(far: &OwnedFd) {
    let v4 = listen("127.0.0.1:15001");
    let v6 = listen("[::1]:15001");
    // Any destination, there or not, becomes ours, and we learn where it was going.
    for (listener, target) in [
        (&v4, "10.77.0.2:80"),
        (&v4, "10.96.0.15:443"),
        (&v4, "10.99.128.1:443"),
        (&v6, "[fd77::2]:80"),
        (&v6, "[fd96::15]:443"),
    ] {
        let accepted = reaches(listener, target);
        assert_eq!(original_destination(&accepted).unwrap(), addr(target));
    }
    // The proxy's own, excluded ports and excluded networks arrive where they were going.
    let (there, database) = within(far, || (listen("[::]:80"), listen("[::]:3306")));
    for target in ["10.77.0.2:80", "[fd77::2]:80"] {
        converse(&there, dial(addr(target), Some(MARK)));
    }
    for target in ["10.99.0.2:80", "[fd99::2]:80"] {
        reaches(&there, target);
    }
    for target in ["10.77.0.2:3306", "[fd77::2]:3306"] {
        reaches(&database, target);
    }
    // Loopback, and this workload's own addresses, are left alone.
    let application = listen("[::]:8080");
    for target in [
        "127.0.0.1:8080",
        "[::1]:8080",
        "10.77.0.1:8080",
        "[fd77::1]:8080",
    ] {
        let accepted = reaches(&application, target);
        assert!(is_not_redirected(
            &original_destination(&accepted).unwrap_err()
        ));
    }
    // DNS passes over TCP too, whoever asks: the proxy's own resolvers have no mark for it.
    let names = within(far, || listen("[::]:53"));
    for target in ["10.77.0.2:53", "[fd77::2]:53"] {
        reaches(&names, target);
    }
    // UDP passes.
    let there = within(far, || UdpSocket::bind("10.77.0.2:53").unwrap());
    there.set_read_timeout(Some(PATIENCE)).unwrap();
    UdpSocket::bind("10.77.0.1:0")
        .unwrap()
        .send_to(b"query", "10.77.0.2:53")
        .unwrap();
    let mut word = [0; 5];
    there.recv_from(&mut word).unwrap();
    assert_eq!(&word, b"query");
}

fn captured_inbound(far: &OwnedFd) {
    let inbound = listen("[::]:15006");
    let from_afar = |listener: &TcpListener, target: &str| {
        converse(listener, within(far, || dial(addr(target), None)))
    };
    // The application's port becomes ours, whether it listens or not; a dual-stack listener learns
    // the plain IPv4 address.
    let application = listen("[::]:8080");
    for target in [
        "10.77.0.1:8080",
        "[fd77::1]:8080",
        "10.77.0.1:9",
        "[fd77::1]:9",
    ] {
        let accepted = from_afar(&inbound, target);
        assert_eq!(original_destination(&accepted).unwrap(), addr(target));
    }
    // The proxy's own ports are reached as they are, and told apart.
    for target in ["10.77.0.1:15006", "[fd77::1]:15006"] {
        let accepted = from_afar(&inbound, target);
        assert!(is_not_redirected(
            &original_destination(&accepted).unwrap_err()
        ));
    }
    let admin = listen("[::]:15020");
    let shell = listen("[::]:2223"); // excluded
    for address in ["10.77.0.1", "[fd77::1]"] {
        from_afar(&admin, &format!("{address}:15020"));
        from_afar(&shell, &format!("{address}:2223"));
    }
    // Whoever comes from an excluded network reaches the application itself, on any port; the
    // same host by its other address does not.
    for (source, target) in [
        ("10.99.0.2:0", "10.77.0.1:8080"),
        ("[fd99::2]:0", "[fd77::1]:8080"),
    ] {
        let client = within(far, || dial_from(addr(source), addr(target)));
        let accepted = converse(&application, client);
        let came_from = accepted.peer_addr().unwrap().ip().to_canonical();
        assert_eq!(came_from, addr(source).ip());
    }
    from_afar(&inbound, "10.77.0.1:8080");
}

/// With the rules gone, connections arrive where they were going.
fn captured_no_more(far: &OwnedFd) {
    let there = within(far, || listen("[::]:80"));
    for target in ["10.77.0.2:80", "[fd77::2]:80"] {
        reaches(&there, target);
    }
}

#[test]
fn nftables_captures_once_and_is_removed() {
    in_namespaces("nftables_captures_once_and_is_removed", || {
        let far = two_hosts();
        let config = config();
        assert!(
            capture::check(&config, Backend::Nftables)
                .unwrap()
                .is_some()
        );
        for _ in 0..2 {
            assert_eq!(
                capture::apply(&config, Backend::Auto).unwrap(),
                Backend::Nftables
            );
            assert_eq!(capture::check(&config, Backend::Nftables).unwrap(), None);
        }
        // A different wish is noticed, in number and in kind.
        let fewer = Config {
            proxy_mark: None,
            ..config.clone()
        };
        assert!(capture::check(&fewer, Backend::Nftables).unwrap().is_some());
        let ports = vec!["3307".parse().unwrap()];
        let other = Config {
            exclude_outbound_ports: ports,
            ..config.clone()
        };
        let difference = capture::check(&other, Backend::Nftables).unwrap().unwrap();
        assert!(
            difference.contains("excluded outbound port"),
            "{difference}"
        );
        captured_outbound(&far);
        captured_inbound(&far);
        for _ in 0..2 {
            capture::remove(Backend::Nftables).unwrap();
            assert!(
                capture::check(&config, Backend::Nftables)
                    .unwrap()
                    .is_some()
            );
        }
        captured_no_more(&far);
    });
}

#[test]
fn only_what_is_included_is_captured() {
    in_namespaces("only_what_is_included_is_captured", || {
        let far = two_hosts();
        let config = Config {
            include_outbound_cidrs: vec!["10.96.0.0/12".parse().unwrap()],
            include_outbound_ports: vec!["80-90".parse().unwrap()],
            include_inbound_ports: vec!["8080".parse().unwrap()],
            ..Config::default()
        };
        capture::apply(&config, Backend::Nftables).unwrap();
        assert_eq!(capture::check(&config, Backend::Nftables).unwrap(), None);
        let (outbound, inbound) = (listen("127.0.0.1:15001"), listen("0.0.0.0:15006"));
        for target in ["10.96.0.1:80", "10.111.255.255:90", "10.99.0.2:85"] {
            reaches(&outbound, target);
        }
        let (there, other_port) = within(&far, || (listen("[::]:80"), listen("[::]:91")));
        reaches(&there, "10.77.0.2:80");
        reaches(&there, "[fd77::2]:80");
        reaches(&other_port, "10.99.0.2:91");
        let application = listen("0.0.0.0:8081");
        for (listener, target) in [
            (&inbound, "10.77.0.1:8080"),
            (&application, "10.77.0.1:8081"),
        ] {
            converse(listener, within(&far, || dial(addr(target), None)));
        }
    });
}

#[test]
fn iptables_captures_once_and_is_removed() {
    in_namespaces("iptables_captures_once_and_is_removed", || {
        if Command::new("iptables-restore")
            .arg("--version")
            .output()
            .is_err()
        {
            eprintln!("skipped: iptables-restore is not installed");
            return;
        }
        let far = two_hosts();
        let config = config();
        for _ in 0..2 {
            // What nftables has set makes way.
            capture::apply(&config, Backend::Nftables).unwrap();
            assert_eq!(
                capture::apply(&config, Backend::Iptables).unwrap(),
                Backend::Iptables
            );
            assert!(
                capture::check(&config, Backend::Nftables)
                    .unwrap()
                    .is_some()
            );
            assert_eq!(capture::check(&config, Backend::Iptables).unwrap(), None);
            assert_eq!(capture::check(&config, Backend::Auto).unwrap(), None);
        }
        let other = Config {
            admin_port: 15021,
            ..config.clone()
        };
        assert!(capture::check(&other, Backend::Iptables).unwrap().is_some());
        captured_outbound(&far);
        captured_inbound(&far);
        for _ in 0..2 {
            capture::remove(Backend::Auto).unwrap();
            assert!(
                capture::check(&config, Backend::Iptables)
                    .unwrap()
                    .is_some()
            );
        }
        captured_no_more(&far);
    });
}

/// Only root has more than one user to try.
#[test]
fn the_proxys_user_and_group_are_left_alone() {
    const TEST: &str = "the_proxys_user_and_group_are_left_alone";
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped {TEST}: it takes root");
        return;
    }
    isolated(TEST, false, || {
        let far = two_hosts();
        let (there, outbound) = (
            within(&far, || listen("[::]:80")),
            listen("127.0.0.1:15001"),
        );
        let config = Config {
            ipv4_only: true,
            ..Config::default()
        };
        // The rules see the file-system ids a socket was made with; those are a thread's own.
        let dial_as = |set_ids: fn()| {
            let dialled = std::thread::spawn(move || {
                set_ids();
                dial(addr("10.77.0.2:80"), None)
            });
            dialled.join().unwrap()
        };
        let mut backends = vec![Backend::Nftables];
        if Command::new("iptables-restore")
            .arg("--version")
            .output()
            .is_ok()
        {
            backends.push(Backend::Iptables);
        }
        for backend in backends {
            // Rules for IPv6 that stand go when IPv6 is not wanted.
            capture::apply(&Config::default(), backend).unwrap();
            assert!(capture::check(&config, backend).unwrap().is_some());
            capture::apply(&config, backend).unwrap();
            assert_eq!(capture::check(&config, backend).unwrap(), None);
            converse(&there, dial_as(|| _ = nix::unistd::setfsuid(1337.into())));
            converse(&there, dial_as(|| _ = nix::unistd::setfsgid(1337.into())));
            converse(
                &outbound,
                dial_as(|| _ = nix::unistd::setfsuid(1338.into())),
            );
            reaches(&there, "[fd77::2]:80");
        }
    });
}

/// A question's answer, as a DNS server that says over UDP only that it has more to say than fits.
/// It has 192.0.2.9 for a name in IPv4, and nothing in IPv6.
fn answer(question: &[u8], truncated: bool) -> Vec<u8> {
    // RFC 1035 section 4.1: header of 12 bytes, then the name, its type and its class.
    let name = 12 + question[12..].iter().position(|byte| *byte == 0).unwrap() + 1;
    let is_v4 = question[name..name + 2] == [0, 1];
    let has = u8::from(is_v4 && !truncated);
    let mut said = question[..2].to_vec();
    said.extend([0x80 | 0x01 | if truncated { 0x02 } else { 0 }, 0x80]);
    said.extend([0, 1, 0, has, 0, 0, 0, 0]);
    said.extend(&question[12..name + 4]);
    if has == 1 {
        said.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 9]);
    }
    said
}

/// Over UDP its answers are cut off, so that it is asked again over TCP; counts those questions.
fn dns_server(far: &OwnedFd, address: &str) -> std::sync::Arc<std::sync::atomic::AtomicUsize> {
    let asked = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let (datagrams, connections) =
        within(far, || (UdpSocket::bind(address).unwrap(), listen(address)));
    std::thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((length, from)) = datagrams.recv_from(&mut buffer) {
            let _ = datagrams.send_to(&answer(&buffer[..length], true), from);
        }
    });
    let count = asked.clone();
    std::thread::spawn(move || {
        for connection in connections.incoming() {
            let Ok(mut connection) = connection else {
                return;
            };
            let count = count.clone();
            // RFC 1035 section 4.2.2: each message after its length.
            std::thread::spawn(move || {
                let mut length = [0; 2];
                while connection.read_exact(&mut length).is_ok() {
                    let mut question = vec![0; usize::from(u16::from_be_bytes(length))];
                    connection.read_exact(&mut question).unwrap();
                    count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                    let answer = answer(&question, false);
                    let length = u16::try_from(answer.len()).unwrap().to_be_bytes();
                    let whole = [&length[..], &answer].concat();
                    if connection.write_all(&whole).is_err() {
                        return;
                    }
                }
            });
        }
    });
    asked
}

/// A proxy that shares its user with the application asks for names: what capture would take for
/// the application's are its questions over TCP, on a port that is not DNS's own. Those have its mark.
#[test]
fn the_proxys_own_questions_for_names_pass() {
    in_namespaces("the_proxys_own_questions_for_names_pass", || {
        use weft_proxy::dns::{Lookup as _, SystemDns};
        let far = two_hosts();
        let config = Config {
            proxy_uid: None,
            proxy_gid: None,
            proxy_mark: Some(MARK),
            ..Config::default()
        };
        capture::apply(&config, Backend::Nftables).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let ask = |server: &str, mark: Option<u32>| {
            let dns = SystemDns::new(vec![addr(server)], mark);
            runtime.block_on(dns.lookup("api.example.org"))
        };
        let (usual, other) = (
            dns_server(&far, "10.77.0.2:53"),
            dns_server(&far, "10.77.0.2:5353"),
        );
        let asked = |count: &std::sync::atomic::AtomicUsize| {
            count.load(std::sync::atomic::Ordering::SeqCst)
        };
        for mark in [None, Some(MARK)] {
            let found = ask("10.77.0.2:53", mark).unwrap();
            assert_eq!(found.addresses, ["192.0.2.9".parse::<IpAddr>().unwrap()]);
        }
        assert!(asked(&usual) >= 2, "over TCP");
        let found = ask("10.77.0.2:5353", Some(MARK)).unwrap();
        assert_eq!(found.addresses, ["192.0.2.9".parse::<IpAddr>().unwrap()]);
        // Without the mark it is anybody's connection: captured, and there is no proxy here.
        let marked = asked(&other);
        assert!(marked >= 1, "over TCP");
        let _ = ask("10.77.0.2:5353", None);
        assert_eq!(asked(&other), marked);
    });
}
