//! nf_tables over netlink, with no program needed.
//!
//! Numbers are from `linux/netfilter/nf_tables.h`. A table is replaced by one batch: create it (so
//! that deleting cannot fail), delete it, create it again, fill it. The kernel carries a batch out
//! as a whole or not at all, so a caller that is interrupted leaves either the old rules or the new
//! ones, and doing it twice is the same as once.

use nix::errno::Errno;

use super::config::Cidr;
use super::error::Error;
use super::netlink::{
    ACK, APPEND, Answer, CREATE, DUMP, Encoder, REQUEST, Socket, attributes, find,
};
use super::rules::{Chain, Family, Hook, Match, PRIORITY, Rule, TABLE, Table, Verdict};

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const DELETE_TABLE: u16 = SUBSYSTEM << 8 | 2;
const NEW_CHAIN: u16 = SUBSYSTEM << 8 | 3;
const GET_CHAIN: u16 = SUBSYSTEM << 8 | 4;
const NEW_RULE: u16 = SUBSYSTEM << 8 | 6;
const GET_RULE: u16 = SUBSYSTEM << 8 | 7;

/// Attributes, by what they belong to.
mod attr {
    pub(super) const TABLE_NAME: u16 = 1;
    pub(super) const CHAIN_TABLE: u16 = 1;
    pub(super) const CHAIN_NAME: u16 = 3;
    pub(super) const CHAIN_HOOK: u16 = 4;
    pub(super) const CHAIN_POLICY: u16 = 5;
    pub(super) const CHAIN_TYPE: u16 = 7;
    pub(super) const HOOK_NUMBER: u16 = 1;
    pub(super) const HOOK_PRIORITY: u16 = 2;
    pub(super) const RULE_TABLE: u16 = 1;
    pub(super) const RULE_CHAIN: u16 = 2;
    pub(super) const RULE_EXPRESSIONS: u16 = 4;
    pub(super) const RULE_USERDATA: u16 = 7;
    pub(super) const LIST_ELEMENT: u16 = 1;
    pub(super) const EXPRESSION_NAME: u16 = 1;
    pub(super) const EXPRESSION_DATA: u16 = 2;
    pub(super) const DATA_VALUE: u16 = 1;
    pub(super) const DATA_VERDICT: u16 = 2;
    pub(super) const VERDICT_CODE: u16 = 1;
}

/// The registers of nf_tables' machine: the verdict, and one of 16 bytes.
const VERDICT_REGISTER: u32 = 0;
const REGISTER: u32 = 1;
/// `NFT_RETURN`, as it stands in a message.
const RETURN: u32 = (-5_i32).cast_unsigned();
/// `NF_ACCEPT`.
const ACCEPT: u32 = 1;
/// The index of `lo` in every network namespace (`LOOPBACK_IFINDEX`).
const LOOPBACK_INDEX: u32 = 1;
/// `RTN_LOCAL`: an address of this machine.
const LOCAL_ADDRESS: u32 = 2;

fn number(family: Family) -> u8 {
    match family {
        Family::V4 => 2,  // NFPROTO_IPV4
        Family::V6 => 10, // NFPROTO_IPV6
    }
}

/// Replaces our tables by `tables`, at once.
///
/// # Errors
/// [`Error::NotPermitted`], or what the kernel lacks.
pub fn apply(tables: &[Table]) -> Result<(), Error> {
    let (batch, steps) = apply_batch(tables);
    commit(&batch, &steps)?;
    // A family that was wanted once and is no longer; not in the batch, which a machine without
    // IPv6 would refuse.
    Family::missing_from(tables).try_for_each(remove_if_supported)
}

/// Deletes our tables in both families; it is no error when they are not there.
///
/// # Errors
/// [`Error::NotPermitted`], or the kernel has no nf_tables.
pub fn remove() -> Result<(), Error> {
    // One batch each: on a machine without IPv6 the second is refused, which leaves nothing to do.
    remove_family(Family::V4)?;
    remove_if_supported(Family::V6)
}

fn remove_if_supported(family: Family) -> Result<(), Error> {
    match remove_family(family) {
        Err(error) if error.is_unsupported() => Ok(()),
        other => other,
    }
}

fn remove_family(family: Family) -> Result<(), Error> {
    let mut batch = Batch::new();
    batch.clear(family);
    let (bytes, steps) = batch.finish();
    commit(&bytes, &steps)
}

/// Compares what stands with `tables`: `None` when it is the same, otherwise the first difference.
///
/// # Errors
/// When the kernel does not answer.
pub fn check(tables: &[Table]) -> Result<Option<String>, Error> {
    let socket = open()?;
    for table in tables {
        let family = table.family.nft_name();
        let chains = dump(&socket, GET_CHAIN, NEW_CHAIN, table.family, |_| {})?;
        let rules = dump(&socket, GET_RULE, NEW_RULE, table.family, |encoder| {
            encoder.text(attr::RULE_TABLE, TABLE);
        })?;
        for chain in &table.chains {
            let name = chain.hook.chain_name();
            let wanted = chain_attributes(chain);
            if !chains.iter().any(|standing| holds(standing, &wanted)) {
                return Ok(Some(format!(
                    "the chain `{family} {TABLE} {name}` is not there"
                )));
            }
            let standing: Vec<&Vec<u8>> = rules
                .iter()
                .filter(|rule| text(rule, attr::RULE_TABLE) == Some(TABLE.as_bytes()))
                .filter(|rule| text(rule, attr::RULE_CHAIN) == Some(name.as_bytes()))
                .collect();
            if standing.len() != chain.rules.len() {
                return Ok(Some(format!(
                    "the chain `{family} {TABLE} {name}` has {} rules instead of {}",
                    standing.len(),
                    chain.rules.len()
                )));
            }
            for (at, (standing, rule)) in standing.iter().zip(&chain.rules).enumerate() {
                if !holds(standing, &rule_attributes(chain, rule, table.family)) {
                    return Ok(Some(format!(
                        "rule {} of the chain `{family} {TABLE} {name}` is not \"{}\"",
                        at + 1,
                        rule.comment
                    )));
                }
            }
        }
    }
    for family in Family::missing_from(tables) {
        let ours = |chain: &Vec<u8>| text(chain, attr::CHAIN_TABLE) == Some(TABLE.as_bytes());
        match dump(&socket, GET_CHAIN, NEW_CHAIN, family, |_| {}) {
            Ok(chains) if chains.iter().any(ours) => {
                let family = family.nft_name();
                return Ok(Some(format!(
                    "the table `{family} {TABLE}` stands and is not wanted"
                )));
            }
            Err(error) if !error.is_unsupported() => return Err(error),
            Ok(_) | Err(_) => {}
        }
    }
    Ok(None)
}

fn text(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    find(attributes, kind).map(|value| value.strip_suffix(&[0]).unwrap_or(value))
}

/// Whether `standing` says all that `wanted` says. The kernel adds attributes of its own (handles,
/// counters, defaults) and has its own order, but the kinds we set occur as often as we set them,
/// and a list (the expressions of a rule) keeps its order.
fn holds(standing: &[u8], wanted: &[u8]) -> bool {
    let mut seen = Vec::new();
    attributes(wanted).all(|(kind, value)| {
        let before = seen.iter().filter(|other| **other == kind).count();
        seen.push(kind);
        let same = |bytes| {
            attributes(bytes)
                .filter(|(other, _)| *other == kind)
                .count()
        };
        same(standing) == same(wanted)
            && attributes(standing)
                .filter(|(other, _)| *other == kind)
                .nth(before)
                .is_some_and(|(_, found)| found == value || (is_nest(value) && holds(found, value)))
    })
}

/// Whether `value` is wholly made of attributes, as a nested attribute's value is.
fn is_nest(value: &[u8]) -> bool {
    let covered: usize = attributes(value)
        .map(|(_, inner)| (4 + inner.len()).next_multiple_of(4))
        .sum();
    !value.is_empty() && covered == value.len()
}

fn dump(
    socket: &Socket,
    request: u16,
    wanted: u16,
    family: Family,
    body: impl FnOnce(&mut Encoder),
) -> Result<Vec<Vec<u8>>, Error> {
    let step = "reading the nftables rules";
    let mut encoder = Encoder::default();
    encoder.message(request, REQUEST | DUMP, 1, (number(family), 0), body);
    let mut objects = Vec::new();
    for answer in socket
        .exchange(&encoder.finish())
        .map_err(|error| exchange(step, error))?
    {
        match answer {
            // The table is not there: nothing stands.
            Answer::Result {
                errno: Some(Errno::ENOENT),
                ..
            } => return Ok(Vec::new()),
            Answer::Result {
                errno: Some(errno), ..
            } => {
                return Err(Error::from_errno(step, errno));
            }
            Answer::Object { kind, attributes } if kind == wanted => objects.push(attributes),
            Answer::Object { .. } | Answer::Done | Answer::Result { errno: None, .. } => {}
        }
    }
    Ok(objects)
}

fn open() -> Result<Socket, Error> {
    Socket::open().map_err(|errno| Error::from_errno("opening a netfilter netlink socket", errno))
}

fn exchange(step: &str, error: std::io::Error) -> Error {
    match error.raw_os_error() {
        Some(raw) => Error::from_errno(step, Errno::from_raw(raw)),
        None => Error::Netlink(error),
    }
}

/// Sends a batch; `steps[sequence]` names each message for a person.
fn commit(batch: &[u8], steps: &[String]) -> Result<(), Error> {
    let answers = open()?
        .exchange(batch)
        .map_err(|error| exchange("setting the nftables rules", error))?;
    let mut committed = false;
    for answer in answers {
        if let Answer::Result { sequence, errno } = answer {
            match errno {
                Some(errno) => {
                    let step = steps
                        .get(sequence as usize)
                        .map_or("setting rules", String::as_str);
                    return Err(Error::from_errno(step, errno));
                }
                // Only the last message asks to be acknowledged, after the commit.
                None => committed = true,
            }
        }
    }
    if committed {
        Ok(())
    } else {
        Err(Error::Netlink(std::io::Error::other(
            "the kernel did not acknowledge the batch",
        )))
    }
}

/// The batch that puts `tables` in place, and what each of its messages does.
#[must_use]
pub fn apply_batch(tables: &[Table]) -> (Vec<u8>, Vec<String>) {
    let mut batch = Batch::new();
    for table in tables {
        let family = table.family;
        batch.clear(family);
        batch.table(NEW_TABLE, CREATE, family);
        for chain in &table.chains {
            let step = format!(
                "adding the {} nat chain {}",
                family.nft_name(),
                chain.hook.nft_name()
            );
            let body = chain_attributes(chain);
            batch.add(NEW_CHAIN, CREATE, family, step, &body);
            for rule in &chain.rules {
                let step = format!("adding the {} rule \"{}\"", family.nft_name(), rule.comment);
                let body = rule_attributes(chain, rule, family);
                batch.add(NEW_RULE, CREATE | APPEND, family, step, &body);
            }
        }
    }
    batch.finish()
}

/// The messages of one transaction.
struct Batch {
    messages: Vec<(u16, u16, Family, Vec<u8>)>,
    steps: Vec<String>,
}

impl Batch {
    fn new() -> Self {
        Self {
            messages: Vec::new(),
            steps: vec!["starting an nftables transaction".to_owned()],
        }
    }

    fn add(&mut self, kind: u16, flags: u16, family: Family, step: String, body: &[u8]) {
        self.messages.push((kind, flags, family, body.to_vec()));
        self.steps.push(step);
    }

    fn table(&mut self, kind: u16, flags: u16, family: Family) {
        let mut body = Encoder::default();
        body.text(attr::TABLE_NAME, TABLE);
        let verb = if kind == DELETE_TABLE {
            "deleting"
        } else {
            "adding"
        };
        let step = format!("{verb} the table `{} {TABLE}`", family.nft_name());
        self.add(kind, flags, family, step, &body.finish());
    }

    /// The table is gone afterwards, whether it was there or not.
    fn clear(&mut self, family: Family) {
        self.table(NEW_TABLE, CREATE, family);
        self.table(DELETE_TABLE, 0, family);
    }

    fn finish(self) -> (Vec<u8>, Vec<String>) {
        let mut encoder = Encoder::default();
        encoder.message(BATCH_BEGIN, REQUEST, 0, (0, SUBSYSTEM), |_| {});
        let last = self.messages.len();
        for (index, (kind, flags, family, body)) in self.messages.into_iter().enumerate() {
            let sequence = index + 1;
            let acknowledge = if sequence == last { ACK } else { 0 };
            encoder.message(
                kind,
                REQUEST | flags | acknowledge,
                sequence as u32,
                (number(family), 0),
                |encoder| encoder.raw(&body),
            );
        }
        encoder.message(BATCH_END, REQUEST, last as u32 + 1, (0, SUBSYSTEM), |_| {});
        (encoder.finish(), self.steps)
    }
}

fn chain_attributes(chain: &Chain) -> Vec<u8> {
    let mut encoder = Encoder::default();
    encoder.text(attr::CHAIN_TABLE, TABLE);
    encoder.text(attr::CHAIN_NAME, chain.hook.chain_name());
    encoder.nested(attr::CHAIN_HOOK, |hook| {
        hook.number(
            attr::HOOK_NUMBER,
            match chain.hook {
                Hook::Prerouting => 0, // NF_INET_PRE_ROUTING
                Hook::Output => 3,     // NF_INET_LOCAL_OUT
            },
        );
        hook.number(attr::HOOK_PRIORITY, PRIORITY.cast_unsigned());
    });
    encoder.number(attr::CHAIN_POLICY, ACCEPT);
    encoder.text(attr::CHAIN_TYPE, "nat");
    encoder.finish()
}

fn rule_attributes(chain: &Chain, rule: &Rule, family: Family) -> Vec<u8> {
    let mut encoder = Encoder::default();
    encoder.text(attr::RULE_TABLE, TABLE);
    encoder.text(attr::RULE_CHAIN, chain.hook.chain_name());
    encoder.nested(attr::RULE_EXPRESSIONS, |list| {
        for one in &rule.matches {
            condition(list, *one, family);
        }
        verdict(list, rule.verdict);
    });
    // What `nft list ruleset` shows as the comment: type 0, a length, text ended by zero.
    let mut comment = vec![0, rule.comment.len() as u8 + 1];
    comment.extend_from_slice(rule.comment.as_bytes());
    comment.push(0);
    encoder.bytes(attr::RULE_USERDATA, &comment);
    encoder.finish()
}

fn expression(list: &mut Encoder, name: &str, data: impl FnOnce(&mut Encoder)) {
    list.nested(attr::LIST_ELEMENT, |element| {
        element.text(attr::EXPRESSION_NAME, name);
        element.nested(attr::EXPRESSION_DATA, data);
    });
}

fn condition(list: &mut Encoder, one: Match, family: Family) {
    // Keys of the "meta" expression (enum nft_meta_keys); its values are in host order.
    const MARK: u32 = 3;
    const IN_INTERFACE: u32 = 4;
    const OUT_INTERFACE: u32 = 5;
    const SOCKET_UID: u32 = 10;
    const SOCKET_GID: u32 = 11;
    const PROTOCOL: u32 = 16;
    let mut meta = |key, value: &[u8]| {
        expression(list, "meta", |data| {
            data.number(1, REGISTER); // NFTA_META_DREG
            data.number(2, key); // NFTA_META_KEY
        });
        compare(list, EQUAL, value);
    };
    match one {
        Match::SocketUid(uid) => meta(SOCKET_UID, &uid.to_ne_bytes()),
        Match::SocketGid(gid) => meta(SOCKET_GID, &gid.to_ne_bytes()),
        Match::Mark(mark) => meta(MARK, &mark.to_ne_bytes()),
        Match::LeavesByLoopback => meta(OUT_INTERFACE, &LOOPBACK_INDEX.to_ne_bytes()),
        Match::CameByLoopback => meta(IN_INTERFACE, &LOOPBACK_INDEX.to_ne_bytes()),
        Match::Tcp => meta(PROTOCOL, &[6]),
        // Where the addresses stand in the IP header.
        Match::Source(cidr) => match family {
            Family::V4 => network(list, 12, cidr),
            Family::V6 => network(list, 8, cidr),
        },
        Match::Destination(cidr) => match family {
            Family::V4 => network(list, 16, cidr),
            Family::V6 => network(list, 24, cidr),
        },
        Match::DestinationPort(ports) => {
            payload(list, 2, 2, 2);
            if ports.first() == ports.last() {
                compare(list, EQUAL, &ports.first().to_be_bytes());
            } else {
                compare(list, AT_LEAST, &ports.first().to_be_bytes());
                compare(list, AT_MOST, &ports.last().to_be_bytes());
            }
        }
        Match::DestinationIsLocal => {
            expression(list, "fib", |data| {
                data.number(1, REGISTER); // NFTA_FIB_DREG
                data.number(2, 3); // NFTA_FIB_RESULT: NFT_FIB_RESULT_ADDRTYPE
                data.number(3, 1 << 1); // NFTA_FIB_FLAGS: NFTA_FIB_F_DADDR
            });
            compare(list, EQUAL, &LOCAL_ADDRESS.to_ne_bytes());
        }
    }
}

/// The address at this place in the IP header is of a network. As nft does: the bytes that the
/// prefix covers, masked only when it ends inside one.
fn network(list: &mut Encoder, offset: u32, cidr: Cidr) {
    let length = u32::from(cidr.prefix()).div_ceil(8);
    let whole = usize::from(cidr.prefix() / 8);
    if length == 0 {
        return; // Every address.
    }
    payload(list, 1, offset, length);
    if whole < length as usize {
        expression(list, "bitwise", |data| {
            data.number(1, REGISTER); // NFTA_BITWISE_SREG
            data.number(2, REGISTER); // NFTA_BITWISE_DREG
            data.number(3, length); // NFTA_BITWISE_LEN
            data.nested(4, |inner| {
                inner.bytes(attr::DATA_VALUE, &cidr.mask()[..length as usize]);
            });
            data.nested(5, |inner| {
                inner.bytes(attr::DATA_VALUE, &vec![0; length as usize]);
            });
        });
    }
    compare(list, EQUAL, &cidr.octets()[..length as usize]);
}

// Operators of the "cmp" expression (enum nft_cmp_ops).
const EQUAL: u32 = 0;
const AT_MOST: u32 = 3;
const AT_LEAST: u32 = 5;

fn compare(list: &mut Encoder, operator: u32, value: &[u8]) {
    expression(list, "cmp", |data| {
        data.number(1, REGISTER); // NFTA_CMP_SREG
        data.number(2, operator); // NFTA_CMP_OP
        data.nested(3, |inner| inner.bytes(attr::DATA_VALUE, value));
    });
}

/// Bytes of the packet: base 1 is the IP header, 2 the TCP header.
fn payload(list: &mut Encoder, base: u32, offset: u32, length: u32) {
    expression(list, "payload", |data| {
        data.number(1, REGISTER); // NFTA_PAYLOAD_DREG
        data.number(2, base);
        data.number(3, offset);
        data.number(4, length);
    });
}

fn verdict(list: &mut Encoder, verdict: Verdict) {
    match verdict {
        Verdict::LeaveAlone => expression(list, "immediate", |data| {
            data.number(1, VERDICT_REGISTER); // NFTA_IMMEDIATE_DREG
            data.nested(2, |inner| {
                inner.nested(attr::DATA_VERDICT, |code| {
                    code.number(attr::VERDICT_CODE, RETURN)
                });
            });
        }),
        Verdict::Redirect(port) => {
            expression(list, "immediate", |data| {
                data.number(1, REGISTER);
                data.nested(2, |inner| {
                    inner.bytes(attr::DATA_VALUE, &port.to_be_bytes())
                });
            });
            expression(list, "redir", |data| data.number(1, REGISTER)); // NFTA_REDIR_REG_PROTO_MIN
        }
    }
}
