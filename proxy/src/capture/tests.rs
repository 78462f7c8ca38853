//! Configuration in, rules out, in each of the three languages.

use nix::errno::Errno;
use proptest::prelude::*;

use super::netlink::{Answer, answers, attributes, find};
use super::rules::{Family, nft_text, tables};
use super::{Config, Error, iptables, nftables};

fn config() -> Config {
    Config {
        proxy_mark: Some(0x539),
        exclude_outbound_ports: vec!["3306".parse().unwrap(), "9000-9100".parse().unwrap()],
        exclude_outbound_cidrs: vec!["10.5.0.0/17".parse().unwrap(), "fd05::/16".parse().unwrap()],
        include_outbound_cidrs: vec!["10.0.0.0/8".parse().unwrap()],
        include_outbound_ports: vec!["80".parse().unwrap(), "443".parse().unwrap()],
        exclude_inbound_ports: vec!["22".parse().unwrap()],
        exclude_inbound_cidrs: vec!["10.6.0.0/15".parse().unwrap(), "fd06::/16".parse().unwrap()],
        ..Config::default()
    }
}

#[test]
fn nft_text_of_both_families() {
    let expected = r#"add table ip weft
delete table ip weft
table ip weft {
	chain outbound {
		type nat hook output priority -105; policy accept;
		oif "lo" return comment "stays on this machine"
		meta skuid 1337 return comment "the proxy's own, by user"
		meta skgid 1337 return comment "the proxy's own, by group"
		meta mark 0x539 return comment "the proxy's own, by mark"
		tcp dport 53 return comment "DNS over TCP, like DNS over UDP"
		tcp dport 3306 return comment "excluded outbound port"
		tcp dport 9000-9100 return comment "excluded outbound port"
		ip daddr 10.5.0.0/17 return comment "excluded outbound network"
		ip daddr 10.0.0.0/8 tcp dport 80 redirect to :15001 comment "to the outbound listener"
		ip daddr 10.0.0.0/8 tcp dport 443 redirect to :15001 comment "to the outbound listener"
	}
	chain inbound {
		type nat hook prerouting priority -105; policy accept;
		iif "lo" return comment "stays on this machine"
		tcp dport 15001 return comment "the proxy's own port"
		tcp dport 15006 return comment "the proxy's own port"
		tcp dport 15020 return comment "the proxy's own port"
		tcp dport 22 return comment "excluded inbound port"
		ip saddr 10.6.0.0/15 return comment "excluded inbound network"
		fib daddr type local meta l4proto tcp redirect to :15006 comment "to the inbound listener"
	}
}
"#;
    assert_eq!(nft_text(&tables(&config(), &[Family::V4])), expected);
    // No included network is IPv6's, so IPv6 has exclusions and nothing to redirect.
    let v6 = nft_text(&tables(&config(), &[Family::V6]));
    assert!(v6.contains("ip6 daddr fd05::/16 return"), "{v6}");
    assert!(v6.contains("ip6 saddr fd06::/16 return"), "{v6}");
    assert!(!v6.contains("10.6.0.0"), "{v6}");
    assert!(!v6.contains(":15001"), "{v6}");
    assert!(v6.contains("redirect to :15006"), "{v6}");
}

#[test]
fn iptables_text_of_one_family() {
    let config = Config {
        exclude_inbound_ports: vec!["22-23".parse().unwrap()],
        exclude_inbound_cidrs: vec!["10.6.0.0/15".parse().unwrap(), "fd06::/16".parse().unwrap()],
        ..Config::default()
    };
    let expected = "\
*nat
:WEFT_OUTBOUND - [0:0]
:WEFT_INBOUND - [0:0]
-D OUTPUT -p tcp -j WEFT_OUTBOUND
-A WEFT_OUTBOUND -o lo -j RETURN
-A WEFT_OUTBOUND -m owner --uid-owner 1337 -j RETURN
-A WEFT_OUTBOUND -m owner --gid-owner 1337 -j RETURN
-A WEFT_OUTBOUND -p tcp --dport 53:53 -j RETURN
-A WEFT_OUTBOUND -p tcp -j REDIRECT --to-ports 15001
-I OUTPUT -p tcp -j WEFT_OUTBOUND
-A WEFT_INBOUND -i lo -j RETURN
-A WEFT_INBOUND -p tcp --dport 15001:15001 -j RETURN
-A WEFT_INBOUND -p tcp --dport 15006:15006 -j RETURN
-A WEFT_INBOUND -p tcp --dport 15020:15020 -j RETURN
-A WEFT_INBOUND -p tcp --dport 22:23 -j RETURN
-A WEFT_INBOUND -s 10.6.0.0/15 -j RETURN
-A WEFT_INBOUND -m addrtype --dst-type LOCAL -p tcp -j REDIRECT --to-ports 15006
-I PREROUTING -p tcp -j WEFT_INBOUND
COMMIT
";
    let tables = tables(&config, &[Family::V4]);
    // An interrupted run has left one jump; it goes in the same transaction.
    assert_eq!(iptables::restore_text(&tables[0], [1, 0]), expected);
}

/// A batch is: begin; per family create, delete, create the table, two chains and the rules; end.
#[test]
fn the_netlink_batch_is_one_transaction() {
    let config = Config::default();
    let tables = tables(&config, &[Family::V4, Family::V6]);
    let (batch, steps) = nftables::apply_batch(&tables);
    let messages: Vec<(u16, Vec<u8>)> = answers(&batch)
        .into_iter()
        .map(|message| match message {
            Answer::Object { kind, attributes } => (kind, attributes),
            other => panic!("{other:?}"),
        })
        .collect();
    let kinds: Vec<u16> = messages.iter().map(|(kind, _)| *kind).collect();
    let (table, delete, chain, rule) = (0xa00, 0xa02, 0xa03, 0xa06);
    let mut family = vec![table, delete, table, chain];
    family.extend([rule; 5]);
    family.push(chain);
    family.extend([rule; 5]);
    let expected = [vec![0x10], family.clone(), family, vec![0x11]].concat();
    assert_eq!(kinds, expected);
    // Every message but the end has a name for error messages.
    assert_eq!(steps.len(), kinds.len() - 1);

    // The last rule redirects to 15006: its expressions by name, and the port in network order.
    let expressions = find(&messages[messages.len() - 2].1, 4).unwrap();
    let names: Vec<&[u8]> = attributes(expressions)
        .map(|(_, element)| find(element, 1).unwrap())
        .collect();
    let wanted: [&[u8]; 6] = [
        b"fib\0",
        b"cmp\0",
        b"meta\0",
        b"cmp\0",
        b"immediate\0",
        b"redir\0",
    ];
    assert_eq!(names, wanted);
    let (_, immediate) = attributes(expressions).nth(4).unwrap();
    let port = find(find(find(immediate, 2).unwrap(), 2).unwrap(), 1).unwrap();
    assert_eq!(port, 15006_u16.to_be_bytes());
}

#[test]
fn cut_off_answers_are_no_answers() {
    let (batch, _) = nftables::apply_batch(&tables(&Config::default(), &[Family::V4]));
    let whole = answers(&batch).len();
    for length in 0..batch.len() {
        assert!(answers(&batch[..length]).len() < whole);
    }
}

/// A kernel without a part of nf_tables makes way for iptables; missing rights do not, because
/// iptables needs them too.
#[test]
fn refusals_are_told_apart() {
    for errno in [
        Errno::EOPNOTSUPP,
        Errno::EPROTONOSUPPORT,
        Errno::ENOENT,
        Errno::EAFNOSUPPORT,
    ] {
        let error = Error::from_errno("adding the ip6 nat chain output", errno);
        assert!(error.is_unsupported());
        assert!(error.to_string().contains("modprobe"), "{error}");
    }
    let error = Error::from_errno("adding the table", Errno::EPERM);
    assert!(!error.is_unsupported());
    assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
    assert!(!Error::from_errno("adding the table", Errno::ENOMEM).is_unsupported());
}

#[test]
fn arguments_make_a_configuration() {
    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: super::command::Args,
    }
    let parse = |line: &str| {
        let words = ["init"].into_iter().chain(line.split_whitespace());
        <Cli as clap::Parser>::try_parse_from(words).map(|cli| cli.args.config())
    };
    assert_eq!(parse("").unwrap(), Config::default());
    let line = "--proxy-mark 0x539 --exclude-outbound-ports 3306,9000-9100 \
                --exclude-outbound-cidrs 10.5.0.0/17,fd05::/16 --include-outbound-cidrs 10.0.0.0/8 \
                --include-outbound-ports 80,443 --exclude-inbound-ports 22 \
                --exclude-inbound-cidrs 10.6.0.0/15,fd06::/16";
    assert_eq!(parse(line).unwrap(), config());
    for wrong in [
        "--proxy-mark 0",
        "--proxy-mark x",
        "--outbound-port 0",
        "--exclude-outbound-ports 0",
        "--exclude-outbound-cidrs 10.0.0.0/40",
        "--exclude-inbound-cidrs fd00::/129",
        "--remove --check",
        "--check --dry-run",
    ] {
        assert!(parse(wrong).is_err(), "{wrong}");
    }
}

proptest! {
    /// Whatever comes, it is read without a panic and within its bounds.
    #[test]
    fn any_bytes_are_read(bytes: Vec<u8>) {
        for answer in answers(&bytes) {
            if let Answer::Object { attributes: inner, .. } = answer {
                prop_assert!(inner.len() <= bytes.len());
                prop_assert!(attributes(&inner).all(|(_, value)| value.len() <= inner.len()));
            }
        }
    }

    /// The same with a batch of ours that has been damaged.
    #[test]
    fn damaged_messages_are_read(at: prop::sample::Index, value: u8) {
        let (mut batch, _) = nftables::apply_batch(&tables(&config(), &Family::ALL));
        let at = at.index(batch.len());
        batch[at] = value;
        prop_assert!(answers(&batch).len() <= batch.len() / 16);
    }
}
