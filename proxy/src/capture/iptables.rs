//! The fallback: `iptables-restore` and `ip6tables-restore`, where the kernel has no nf_tables.
//!
//! Our rules stand in chains of our own, `WEFT_OUTBOUND` and `WEFT_INBOUND`, reached by one jump
//! each at the head of OUTPUT and PREROUTING. `iptables-restore --noflush` replaces the chains and
//! the jumps of one family in one transaction.

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use super::error::Error;
use super::rules::{Family, Hook, Match, Rule, Table, Verdict};

/// How the programs may be called: the distribution's choice first, then each flavour by name.
const FLAVOURS: [&str; 3] = ["", "-legacy", "-nft"];

/// How long to wait for another program that holds iptables' lock, in seconds.
const LOCK_WAIT: &str = "5";

fn program(family: Family, flavour: &str, suffix: &str) -> String {
    let base = match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    };
    format!("{base}{flavour}{suffix}")
}

/// Our chain's name, and the built-in chain that jumps to it.
fn chain_names(hook: Hook) -> (&'static str, &'static str) {
    match hook {
        Hook::Output => ("WEFT_OUTBOUND", "OUTPUT"),
        Hook::Prerouting => ("WEFT_INBOUND", "PREROUTING"),
    }
}

/// The jump's specification: only TCP concerns us.
fn jump(hook: Hook) -> String {
    let (ours, builtin) = chain_names(hook);
    format!("{builtin} -p tcp -j {ours}")
}

/// Replaces our chains by `tables`.
///
/// # Errors
/// When no flavour of the programs is installed, or the first that runs refuses.
pub fn apply(tables: &[Table]) -> Result<(), Error> {
    let tables = &representable(tables);
    with_flavour(tables, |table, flavour| {
        let standing = standing_jumps(&save(table.family, flavour)?);
        restore(table.family, flavour, &restore_text(table, standing))
    })?;
    // A family that was wanted once and is no longer.
    Family::missing_from(tables).try_for_each(remove_family)
}

/// Deletes our chains and jumps, in every flavour that is installed and holds them.
///
/// # Errors
/// When a program that holds them refuses.
pub fn remove() -> Result<(), Error> {
    Family::ALL.into_iter().try_for_each(remove_family)
}

fn remove_family(family: Family) -> Result<(), Error> {
    for flavour in FLAVOURS {
        if holds_rules(family, flavour)? {
            restore(family, flavour, &remove_text(&save(family, flavour)?))?;
        }
    }
    Ok(())
}

fn holds_rules(family: Family, flavour: &str) -> Result<bool, Error> {
    Ok(may_hold_rules(family, flavour) && save(family, flavour)?.contains("WEFT_"))
}

/// Compares what stands with `tables`: `None` when it is the same, otherwise the first difference.
///
/// # Errors
/// When the programs are missing or fail.
pub fn check(tables: &[Table]) -> Result<Option<String>, Error> {
    let tables = &representable(tables);
    let mut difference = None;
    with_flavour(tables, |table, flavour| {
        let saved = save(table.family, flavour)?;
        for chain in &table.chains {
            let (ours, builtin) = chain_names(chain.hook);
            let first = saved
                .lines()
                .find(|line| line.starts_with(&format!("-A {builtin} ")));
            if !first.is_some_and(|line| line.ends_with(&format!("-j {ours}"))) {
                difference.get_or_insert(format!(
                    "{} does not begin {builtin} with a jump to {ours}",
                    program(table.family, flavour, "")
                ));
                return Ok(());
            }
            let count = saved
                .lines()
                .filter(|l| l.starts_with(&format!("-A {ours} ")))
                .count();
            let missing = chain.rules.iter().find(|rule| {
                let mut arguments = vec!["-t".to_owned(), "nat".into(), "-C".into(), ours.into()];
                arguments.extend(words(rule));
                run(&program(table.family, flavour, ""), &arguments, None).is_err()
            });
            if count != chain.rules.len() || missing.is_some() {
                let what = missing.map_or_else(
                    || format!("{count} rules instead of {}", chain.rules.len()),
                    |rule| format!("no rule \"{}\"", rule.comment),
                );
                difference.get_or_insert(format!("the chain {ours} has {what}"));
                return Ok(());
            }
        }
        Ok(())
    })?;
    for family in Family::missing_from(tables) {
        if difference.is_none() && holds_rules(family, "")? {
            let name = program(family, "", "");
            difference = Some(format!("{name} has chains of ours that are not wanted"));
        }
    }
    Ok(difference)
}

/// The tables without rules for users and groups that do not exist in this user namespace: the
/// kernel's owner match refuses such ids, and no socket here can belong to them.
fn representable(tables: &[Table]) -> Vec<Table> {
    let mapped = |id: u32, map: &str| match std::fs::read_to_string(map) {
        Ok(text) => id_is_mapped(id, &text),
        Err(_) => true,
    };
    let mut tables = tables.to_vec();
    for chain in tables.iter_mut().flat_map(|table| &mut table.chains) {
        chain.rules.retain(|rule| {
            rule.matches.iter().all(|one| match one {
                Match::SocketUid(uid) => mapped(*uid, "/proc/self/uid_map"),
                Match::SocketGid(gid) => mapped(*gid, "/proc/self/gid_map"),
                _ => true,
            })
        });
    }
    tables
}

/// `map` has lines of: first id inside, first id outside, count (user_namespaces(7)).
fn id_is_mapped(id: u32, map: &str) -> bool {
    map.lines().any(|line| {
        let mut numbers = line
            .split_whitespace()
            .filter_map(|word| word.parse::<u64>().ok());
        match (numbers.next(), numbers.nth(1)) {
            (Some(first), Some(count)) => (first..first + count).contains(&u64::from(id)),
            _ => false,
        }
    })
}

/// Runs `act` for each table with the first flavour that is installed and works for all of them.
fn with_flavour(
    tables: &[Table],
    mut act: impl FnMut(&Table, &str) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut failure = None;
    for flavour in FLAVOURS {
        match tables.iter().try_for_each(|table| act(table, flavour)) {
            Ok(()) => return Ok(()),
            Err(Error::Spawn { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            // Of several refusals, the distribution's own choice explains best.
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    Err(failure.unwrap_or_else(|| {
        Error::ProgramMissing(
            "iptables-restore, iptables-legacy-restore, iptables-nft-restore".into(),
        )
    }))
}

/// How many jumps to our chains stand now, outbound and inbound.
fn standing_jumps(saved: &str) -> [usize; 2] {
    [Hook::Output, Hook::Prerouting].map(|hook| {
        let line = format!("-A {}", jump(hook));
        saved.lines().filter(|standing| **standing == line).count()
    })
}

/// What `iptables-restore --noflush` is given for one family.
#[must_use]
pub fn restore_text(table: &Table, standing_jumps: [usize; 2]) -> String {
    let mut lines = vec!["*nat".to_owned()];
    // Declaring a chain creates it, or empties it.
    lines.extend(
        table
            .chains
            .iter()
            .map(|chain| format!(":{} - [0:0]", chain_names(chain.hook).0)),
    );
    for (chain, standing) in table.chains.iter().zip(standing_jumps) {
        lines.extend(std::iter::repeat_n(
            format!("-D {}", jump(chain.hook)),
            standing,
        ));
        let (ours, _) = chain_names(chain.hook);
        lines.extend(
            chain
                .rules
                .iter()
                .map(|rule| format!("-A {ours} {}", words(rule).join(" "))),
        );
        lines.push(format!("-I {}", jump(chain.hook)));
    }
    lines.push("COMMIT".to_owned());
    lines.join("\n") + "\n"
}

/// Whether a program is there and could know rules of ours. A legacy program that finds no table
/// creates one, which is no way to look.
fn may_hold_rules(family: Family, flavour: &str) -> bool {
    let Ok(version) = run(
        &program(family, flavour, "-save"),
        &["--version".to_owned()],
        None,
    ) else {
        return false;
    };
    if String::from_utf8_lossy(&version.stdout).contains("nf_tables") {
        return true;
    }
    let names = match family {
        Family::V4 => "/proc/self/net/ip_tables_names",
        Family::V6 => "/proc/self/net/ip6_tables_names",
    };
    std::fs::read_to_string(names).is_ok_and(|names| names.lines().any(|name| name == "nat"))
}

fn remove_text(saved: &str) -> String {
    let mut lines = vec!["*nat".to_owned()];
    let hooks = [Hook::Output, Hook::Prerouting];
    let standing = standing_jumps(saved);
    for (hook, standing) in hooks.into_iter().zip(standing) {
        lines.extend(std::iter::repeat_n(format!("-D {}", jump(hook)), standing));
    }
    for hook in hooks {
        let (ours, _) = chain_names(hook);
        if saved.contains(&format!(":{ours} ")) {
            lines.extend([format!("-F {ours}"), format!("-X {ours}")]);
        }
    }
    lines.push("COMMIT".to_owned());
    lines.join("\n") + "\n"
}

fn words(rule: &Rule) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    let mut add = |text: &str| words.extend(text.split(' ').map(str::to_owned));
    for one in &rule.matches {
        match one {
            Match::SocketUid(uid) => add(&format!("-m owner --uid-owner {uid}")),
            Match::SocketGid(gid) => add(&format!("-m owner --gid-owner {gid}")),
            Match::Mark(mark) => add(&format!("-m mark --mark {mark:#x}")),
            Match::LeavesByLoopback => add("-o lo"),
            Match::CameByLoopback => add("-i lo"),
            Match::Tcp => add("-p tcp"),
            Match::Source(cidr) => add(&format!("-s {cidr}")),
            Match::Destination(cidr) => add(&format!("-d {cidr}")),
            Match::DestinationPort(ports) => {
                add(&format!("--dport {}:{}", ports.first(), ports.last()));
            }
            Match::DestinationIsLocal => add("-m addrtype --dst-type LOCAL"),
        }
    }
    match rule.verdict {
        Verdict::LeaveAlone => add("-j RETURN"),
        Verdict::Redirect(port) => add(&format!("-j REDIRECT --to-ports {port}")),
    }
    words
}

fn save(family: Family, flavour: &str) -> Result<String, Error> {
    let arguments = ["-t".to_owned(), "nat".to_owned()];
    let output = run(&program(family, flavour, "-save"), &arguments, None)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn restore(family: Family, flavour: &str, input: &str) -> Result<(), Error> {
    let arguments = [
        "--noflush".to_owned(),
        "-w".to_owned(),
        LOCK_WAIT.to_owned(),
    ];
    run(
        &program(family, flavour, "-restore"),
        &arguments,
        Some(input),
    )
    .map(drop)
}

fn run(program: &str, arguments: &[String], input: Option<&str>) -> Result<Output, Error> {
    let spawn = |source| Error::Spawn {
        program: program.to_owned(),
        source,
    };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(if input.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(spawn)?;
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        // A program that refuses at once closes its input; its message says more than EPIPE.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(spawn)?;
    if output.status.success() {
        return Ok(output);
    }
    let stderr = String::from_utf8_lossy(&output.stderr)
        .trim()
        .replace('\n', "; ");
    let denied = stderr.contains("ermission denied") || stderr.contains("not permitted");
    let hint = if denied {
        ". It needs CAP_NET_ADMIN and CAP_NET_RAW in this network namespace: run it as root"
    } else if program.starts_with("ip6tables") {
        ". If this machine has no IPv6 traffic, --ipv4-only leaves IPv6 alone"
    } else {
        ""
    };
    let program = format!("{program} {}", arguments.join(" "));
    Err(Error::Program {
        program,
        status: output.status.to_string(),
        stderr,
        hint,
    })
}
