//! Namespaces as `weft demo` uses them, for real: as this user, and when that is root also as an
//! unprivileged one. The program runs itself again for each scenario, because namespaces are
//! entered before the first thread starts, which a test harness's threads preclude.

#![allow(clippy::unwrap_used)] // The whole file is a test.

#[allow(dead_code, unused_imports)]
#[path = "../src/netns/mod.rs"]
mod netns;

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use netns::{Fabric, FabricOptions, Host, Launch, Network, hosts_file, isolate};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The exit code of a scenario that the machine does not allow.
const SKIPPED: i32 = 77;
const NOBODY: u32 = 65534;
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["scenario", rest @ ..] => scenario(rest),
        // Asked by test runners; there is one test.
        [.., "--list"] | ["--list", ..] => println!("netns: test"),
        _ => {
            all(None);
            if nix::unistd::geteuid().is_root() {
                all(Some(NOBODY));
                let shared = start(None, "shared").wait_with_output().unwrap();
                assert!(
                    matches!(shared.status.code(), Some(0 | SKIPPED)),
                    "shared network"
                );
                println!("shared network: {}", shared.status);
            }
        }
    }
    ExitCode::SUCCESS
}

/// Runs every scenario as the given user.
fn all(user: Option<u32>) {
    let name = user.map_or("this user".to_owned(), |uid| format!("user {uid}"));
    match start(user, "hosts").wait_with_output() {
        Ok(output) if output.status.code() == Some(SKIPPED) => {
            println!(
                "skipped as {name}: {}",
                String::from_utf8_lossy(&output.stdout).trim()
            );
            return;
        }
        output => assert!(output.unwrap().status.success(), "hosts as {name}"),
    }
    assert_eq!(
        start(user, "exit").wait().unwrap().code(),
        Some(7),
        "exit code as {name}"
    );
    for (signal, whom, code) in [
        (Signal::SIGKILL, 0, None),
        (Signal::SIGKILL, 1, Some(128 + 9)),
        (Signal::SIGKILL, 2, Some(128 + 9)),
        (Signal::SIGTERM, 0, Some(128 + 15)),
    ] {
        nothing_outlives(user, signal, whom, code);
        println!("{signal} at depth {whom} as {name}: nothing left");
    }
    println!("ok as {name}");
}

fn start(user: Option<u32>, scenario: &str) -> Child {
    // Not by its path: that may lie in a folder closed to the user it becomes.
    let mut command = Command::new("/proc/self/exe");
    command.args(["scenario", scenario]).stdout(Stdio::piped());
    if let Some(uid) = user {
        command.uid(uid).gid(uid);
    }
    command.spawn().unwrap()
}

/// A process deep inside holds our pipe open; the pipe's end shows that it is gone.
fn nothing_outlives(user: Option<u32>, signal: Signal, depth: usize, code: Option<i32>) {
    let mut outermost = start(user, "linger");
    let mut output = BufReader::new(outermost.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "lingering\n");
    let mut pid = outermost.id();
    for _ in 0..depth {
        let children = format!("/proc/{pid}/task/{pid}/children");
        let children = std::fs::read_to_string(children).unwrap();
        pid = children.split_whitespace().next().unwrap().parse().unwrap();
    }
    kill(Pid::from_raw(pid.cast_signed()), signal).unwrap();
    let (ended, end) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut rest = Vec::new();
        ended.send(output.read_to_end(&mut rest)).unwrap();
    });
    end.recv_timeout(PATIENCE)
        .expect("a process outlived its parent")
        .unwrap();
    assert_eq!(outermost.wait().unwrap().code(), code);
}

fn scenario(words: &[&str]) {
    match words {
        ["hosts"] => hosts(),
        ["shared"] => shared(),
        ["exit"] => {
            enter();
            std::process::exit(7);
        }
        ["linger"] => {
            let fabric = enter();
            let host = fabric.add_host("a").unwrap();
            // A child of a child in a host, which nobody waits for.
            let mut child = again(&host, &Launch::default(), &["linger-inside"])
                .spawn()
                .unwrap();
            child.wait().unwrap();
            println!("lingering");
            std::io::stdout().flush().unwrap();
            sleep_forever();
        }
        #[expect(clippy::zombie_processes, reason = "an orphan is what is wanted")]
        ["linger-inside"] => {
            let exe = "/proc/self/exe";
            Command::new(exe)
                .args(["scenario", "sleep"])
                .spawn()
                .unwrap();
        }
        ["sleep"] => sleep_forever(),
        ["dial", target] => {
            let target = target.to_socket_addrs().unwrap().next().unwrap();
            let mut stream = TcpStream::connect_timeout(&target, PATIENCE).unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            println!("{} says {text}", target.ip());
        }
        ["dial-nobody", target] => {
            let target: SocketAddr = target.parse().unwrap();
            let error = TcpStream::connect_timeout(&target, PATIENCE).unwrap_err();
            println!("{:?}", error.kind());
        }
        ["whoami"] => {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let field = |name: &str| {
                let line = status.lines().find(|line| line.starts_with(name)).unwrap();
                line.split_whitespace().nth(1).unwrap().to_owned()
            };
            println!("{} {} {}", field("Uid:"), field("Gid:"), field("CapEff:"));
        }
        other => panic!("no such scenario: {other:?}"),
    }
}

fn sleep_forever() -> ! {
    loop {
        std::thread::park();
    }
}

fn enter() -> Fabric {
    if let Err(refused) = isolate(Network::Private) {
        println!("{refused}");
        std::process::exit(SKIPPED);
    }
    Fabric::new(FabricOptions::default()).unwrap()
}

fn again(host: &Host, launch: &Launch, words: &[&str]) -> Command {
    let mut command = host.command_with("/proc/self/exe", launch).unwrap();
    command.arg("scenario").args(words);
    command
}

/// What a scenario prints when it runs in a host.
fn prints(host: &Host, launch: &Launch, words: &[&str]) -> String {
    let output = again(host, launch, words)
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(output.status.success(), "{words:?} in {}", host.name());
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// On a network that others share, a fabric is joined by the next, hosts have different addresses,
/// and the last to go takes the bridge away.
fn shared() {
    // Not the machine's own: one that stands for it.
    if let Err(errno) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
        println!("{errno}");
        std::process::exit(SKIPPED);
    }
    if let Err(refused) = isolate(Network::Shared) {
        println!("{refused}");
        std::process::exit(SKIPPED);
    }
    let bridge = || {
        std::fs::read_to_string("/proc/self/net/dev")
            .unwrap()
            .contains("weft0")
    };
    let options = FabricOptions {
        refuse_unknown: false,
        ..FabricOptions::default()
    };
    let first = Fabric::new(options.clone()).unwrap();
    let second = Fabric::new(options).unwrap();
    let (cart, shop) = (
        first.add_host("cart").unwrap(),
        second.add_host("shop").unwrap(),
    );
    assert_ne!(cart.v4(), shop.v4());
    let target = SocketAddr::new(shop.v4().into(), 80);
    let listener = shop.within(|| TcpListener::bind(target)).unwrap();
    let server = std::thread::spawn(move || listener.accept().unwrap().0.write_all(b"shop"));
    let said = prints(&cart, &Launch::default(), &["dial", &target.to_string()]);
    assert_eq!(said, format!("{} says shop", shop.v4()));
    server.join().unwrap().unwrap();
    drop((cart, first));
    assert!(bridge(), "the bridge went while a host was joined to it");
    drop((shop, second));
    assert!(!bridge(), "the bridge stayed behind");
}

/// Two hosts reach each other and this process by both families, see their own /etc/hosts, and are
/// told at once when nobody has an address.
fn hosts() {
    let fabric = enter();
    let cart = fabric.add_host("cart").unwrap();
    let shop = fabric.add_host("shop").unwrap();
    assert_ne!(cart.v4(), shop.v4());
    let mut homes: Vec<(&str, Option<&Host>, IpAddr)> = vec![
        ("shop", Some(&shop), shop.v4().into()),
        ("bridge", None, fabric.v4().into()),
    ];
    homes.extend(shop.v6().map(|v6| ("shop", Some(&shop), v6.into())));
    homes.extend(fabric.v6().map(|v6| ("bridge", None, v6.into())));
    assert!(homes.len() == 4 || !std::path::Path::new("/proc/self/net/if_inet6").exists());
    for (name, host, address) in homes {
        let bind = || TcpListener::bind(SocketAddr::new(address, 80));
        let listener = match host {
            Some(host) => host.within(bind).unwrap(),
            None => bind().unwrap(),
        };
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                stream.unwrap().write_all(name.as_bytes()).unwrap();
            }
        });
        let target = SocketAddr::new(address, 80).to_string();
        let said = prints(&cart, &Launch::default(), &["dial", &target]);
        assert_eq!(said, format!("{address} says {name}"));
    }

    let before = std::fs::read("/etc/hosts").unwrap();
    let names = hosts_file([(shop.v4().into(), "shop.example")]);
    let launch = Launch::default().file("/etc/hosts", names);
    let said = prints(&cart, &launch, &["dial", "shop.example:80"]);
    assert_eq!(said, format!("{} says shop", shop.v4()));
    assert_eq!(std::fs::read("/etc/hosts").unwrap(), before);

    let start = Instant::now();
    let kind = prints(&cart, &Launch::default(), &["dial-nobody", "10.96.0.15:80"]);
    let expected = [ErrorKind::NetworkUnreachable, ErrorKind::HostUnreachable];
    assert!(
        expected.iter().any(|one| format!("{one:?}") == kind),
        "{kind}"
    );
    assert!(start.elapsed() < PATIENCE / 2);

    let exemption = fabric.exemption();
    let said = prints(&cart, &exemption.launch(), &["whoami"]);
    match exemption.mark() {
        None => assert_eq!(said, "1337 1337 0000000000000000"),
        Some(_) => assert!(
            said.starts_with("0 0 ") && !said.ends_with(" 0000000000000000"),
            "{said}"
        ),
    }

    let start = Instant::now();
    let many: Vec<Host> = (0..20)
        .map(|number| fabric.add_host(&format!("many-{number}")).unwrap())
        .collect();
    println!("{} hosts in {:?}", many.len(), start.elapsed());
}
