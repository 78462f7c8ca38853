//! From configuration to rules: plain data, no I/O, the same for both backends.

use std::fmt::Write as _;

use super::config::{Cidr, Config, PortRange};

/// The name of our tables, and of nothing else in the namespace.
pub const TABLE: &str = "weft";

/// nftables priority of our chains. `dstnat`, where iptables, kube-proxy and Docker have theirs, is
/// -100; a step before it, a connection to a virtual address is ours before such a rule in the same
/// namespace has translated it.
pub const PRIORITY: i32 = -105;

/// Names must resolve even while the proxy is starting or draining, over TCP as over UDP.
const DNS_PORT: u16 = 53;

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// Those for which `tables` has nothing.
    pub(super) fn missing_from(tables: &[Table]) -> impl Iterator<Item = Self> {
        Self::ALL
            .into_iter()
            .filter(|family| tables.iter().all(|table| table.family != *family))
    }

    /// nftables' name of the family.
    #[must_use]
    pub fn nft_name(self) -> &'static str {
        match self {
            Self::V4 => "ip",
            Self::V6 => "ip6",
        }
    }

    fn has(self, cidr: Cidr) -> bool {
        cidr.network().is_ipv4() == (self == Self::V4)
    }
}

/// Everything for one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// The family.
    pub family: Family,
    /// Its chains, outbound first.
    pub chains: Vec<Chain>,
}

/// One nat chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Where the kernel runs it.
    pub hook: Hook,
    /// Its rules; the first that matches decides, and none means "leave alone".
    pub rules: Vec<Rule>,
}

/// Where the kernel runs a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Connections that begin in this namespace.
    Output,
    /// Connections that arrive here.
    Prerouting,
}

impl Hook {
    /// The chain's name in our nftables table.
    #[must_use]
    pub fn chain_name(self) -> &'static str {
        match self {
            Self::Output => "outbound",
            Self::Prerouting => "inbound",
        }
    }

    /// nftables' name of the hook.
    #[must_use]
    pub fn nft_name(self) -> &'static str {
        match self {
            Self::Output => "output",
            Self::Prerouting => "prerouting",
        }
    }
}

/// All of `matches` and then `verdict`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// What has to hold, all of it.
    pub matches: Vec<Match>,
    /// What then happens.
    pub verdict: Verdict,
    /// Why, for a person who lists the rules.
    pub comment: &'static str,
}

/// One condition on a connection's first packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Match {
    /// Its socket belongs to this user.
    SocketUid(u32),
    /// Its socket belongs to this group.
    SocketGid(u32),
    /// Its socket carries this mark.
    Mark(u32),
    /// It leaves by `lo`.
    LeavesByLoopback,
    /// It came in by `lo`.
    CameByLoopback,
    /// It is TCP.
    Tcp,
    /// It comes from this network.
    Source(Cidr),
    /// It is for this network.
    Destination(Cidr),
    /// It is for one of these TCP ports; always after [`Match::Tcp`].
    DestinationPort(PortRange),
    /// It is for an address of this namespace.
    DestinationIsLocal,
}

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes where it was going.
    LeaveAlone,
    /// It goes to this local port instead.
    Redirect(u16),
}

/// The tables for each of `families`.
#[must_use]
pub fn tables(config: &Config, families: &[Family]) -> Vec<Table> {
    families
        .iter()
        .map(|&family| Table {
            family,
            chains: vec![
                Chain {
                    hook: Hook::Output,
                    rules: outbound(config, family),
                },
                Chain {
                    hook: Hook::Prerouting,
                    rules: inbound(config, family),
                },
            ],
        })
        .collect()
}

fn leave_alone(matches: Vec<Match>, comment: &'static str) -> Rule {
    Rule {
        matches,
        verdict: Verdict::LeaveAlone,
        comment,
    }
}

fn outbound(config: &Config, family: Family) -> Vec<Rule> {
    let mut rules = vec![leave_alone(
        vec![Match::LeavesByLoopback],
        "stays on this machine",
    )];
    if let Some(uid) = config.proxy_uid {
        rules.push(leave_alone(
            vec![Match::SocketUid(uid)],
            "the proxy's own, by user",
        ));
    }
    if let Some(gid) = config.proxy_gid {
        rules.push(leave_alone(
            vec![Match::SocketGid(gid)],
            "the proxy's own, by group",
        ));
    }
    if let Some(mark) = config.proxy_mark {
        rules.push(leave_alone(
            vec![Match::Mark(mark)],
            "the proxy's own, by mark",
        ));
    }
    rules.push(leave_alone(
        vec![
            Match::Tcp,
            Match::DestinationPort(PortRange::single(DNS_PORT)),
        ],
        "DNS over TCP, like DNS over UDP",
    ));
    for &ports in &config.exclude_outbound_ports {
        rules.push(leave_alone(
            vec![Match::Tcp, Match::DestinationPort(ports)],
            "excluded outbound port",
        ));
    }
    for &cidr in config
        .exclude_outbound_cidrs
        .iter()
        .filter(|&&cidr| family.has(cidr))
    {
        rules.push(leave_alone(
            vec![Match::Destination(cidr)],
            "excluded outbound network",
        ));
    }
    // Each included network with each included port; an empty list stands for "any".
    let networks: Vec<Option<Cidr>> = if config.include_outbound_cidrs.is_empty() {
        vec![None]
    } else {
        let ours = config
            .include_outbound_cidrs
            .iter()
            .filter(|&&cidr| family.has(cidr));
        ours.copied().map(Some).collect()
    };
    for network in networks {
        for ports in any_or_each(&config.include_outbound_ports) {
            let mut matches: Vec<Match> = network.map(Match::Destination).into_iter().collect();
            matches.push(Match::Tcp);
            matches.extend(ports.map(Match::DestinationPort));
            let verdict = Verdict::Redirect(config.outbound_port);
            rules.push(Rule {
                matches,
                verdict,
                comment: "to the outbound listener",
            });
        }
    }
    rules
}

fn inbound(config: &Config, family: Family) -> Vec<Rule> {
    let mut rules = vec![leave_alone(
        vec![Match::CameByLoopback],
        "stays on this machine",
    )];
    for port in [config.outbound_port, config.inbound_port, config.admin_port] {
        rules.push(leave_alone(
            vec![Match::Tcp, Match::DestinationPort(PortRange::single(port))],
            "the proxy's own port",
        ));
    }
    for &ports in &config.exclude_inbound_ports {
        rules.push(leave_alone(
            vec![Match::Tcp, Match::DestinationPort(ports)],
            "excluded inbound port",
        ));
    }
    for &cidr in config
        .exclude_inbound_cidrs
        .iter()
        .filter(|&&cidr| family.has(cidr))
    {
        rules.push(leave_alone(
            vec![Match::Source(cidr)],
            "excluded inbound network",
        ));
    }
    for ports in any_or_each(&config.include_inbound_ports) {
        let mut matches = vec![Match::DestinationIsLocal, Match::Tcp];
        matches.extend(ports.map(Match::DestinationPort));
        let verdict = Verdict::Redirect(config.inbound_port);
        rules.push(Rule {
            matches,
            verdict,
            comment: "to the inbound listener",
        });
    }
    rules
}

fn any_or_each(ports: &[PortRange]) -> Vec<Option<PortRange>> {
    if ports.is_empty() {
        vec![None]
    } else {
        ports.iter().copied().map(Some).collect()
    }
}

/// The tables in nft's own language; `nft -f -` accepts it and replaces what stands.
#[must_use]
pub fn nft_text(tables: &[Table]) -> String {
    let mut text = String::new();
    for table in tables {
        let family = table.family.nft_name();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "add table {family} {TABLE}");
        let _ = writeln!(text, "delete table {family} {TABLE}");
        let _ = writeln!(text, "table {family} {TABLE} {{");
        for chain in &table.chains {
            let _ = writeln!(text, "\tchain {} {{", chain.hook.chain_name());
            let hook = chain.hook.nft_name();
            let _ = writeln!(
                text,
                "\t\ttype nat hook {hook} priority {PRIORITY}; policy accept;"
            );
            for rule in &chain.rules {
                let _ = writeln!(text, "\t\t{}", nft_rule(rule, table.family));
            }
            let _ = writeln!(text, "\t}}");
        }
        let _ = writeln!(text, "}}");
    }
    text
}

fn nft_rule(rule: &Rule, family: Family) -> String {
    let has_port = rule
        .matches
        .iter()
        .any(|m| matches!(m, Match::DestinationPort(_)));
    let mut words: Vec<String> = Vec::new();
    for one in &rule.matches {
        words.push(match one {
            Match::SocketUid(uid) => format!("meta skuid {uid}"),
            Match::SocketGid(gid) => format!("meta skgid {gid}"),
            Match::Mark(mark) => format!("meta mark {mark:#x}"),
            Match::LeavesByLoopback => "oif \"lo\"".to_owned(),
            Match::CameByLoopback => "iif \"lo\"".to_owned(),
            Match::Tcp if has_port => continue,
            Match::Tcp => "meta l4proto tcp".to_owned(),
            Match::Source(cidr) => format!("{} saddr {cidr}", family.nft_name()),
            Match::Destination(cidr) => format!("{} daddr {cidr}", family.nft_name()),
            Match::DestinationPort(ports) => format!("tcp dport {ports}"),
            Match::DestinationIsLocal => "fib daddr type local".to_owned(),
        });
    }
    words.push(match rule.verdict {
        Verdict::LeaveAlone => "return".to_owned(),
        Verdict::Redirect(port) => format!("redirect to :{port}"),
    });
    words.push(format!("comment \"{}\"", rule.comment));
    words.join(" ")
}
