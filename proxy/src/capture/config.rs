//! What a person asks of capture.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// The user and group the proxy runs as unless told otherwise.
pub const DEFAULT_PROXY_ID: u32 = 1337;
/// The port the proxy's outbound listener has unless told otherwise.
pub const DEFAULT_OUTBOUND_PORT: u16 = 15001;
/// The port the proxy's inbound listener has unless told otherwise.
pub const DEFAULT_INBOUND_PORT: u16 = 15006;
/// The port of health, metrics and the rest of the admin server unless told otherwise.
pub const DEFAULT_ADMIN_PORT: u16 = 15020;

/// What to capture and what to leave alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Connections of this user are the proxy's own.
    pub proxy_uid: Option<u32>,
    /// Connections of this group are the proxy's own.
    pub proxy_gid: Option<u32>,
    /// Connections whose socket carries this mark (`SO_MARK`) are the proxy's own.
    pub proxy_mark: Option<u32>,
    /// Where outbound connections go.
    pub outbound_port: u16,
    /// Where inbound connections go.
    pub inbound_port: u16,
    /// Reached from outside as it is: the admin server.
    pub admin_port: u16,
    /// Outbound connections to these ports are left alone.
    pub exclude_outbound_ports: Vec<PortRange>,
    /// Outbound connections to these networks are left alone.
    pub exclude_outbound_cidrs: Vec<Cidr>,
    /// When not empty, only these ports are captured outbound.
    pub include_outbound_ports: Vec<PortRange>,
    /// When not empty, only these networks are captured outbound (a family that none of them
    /// belongs to is then not captured at all).
    pub include_outbound_cidrs: Vec<Cidr>,
    /// Inbound connections to these ports are left alone.
    pub exclude_inbound_ports: Vec<PortRange>,
    /// Inbound connections from these networks are left alone.
    pub exclude_inbound_cidrs: Vec<Cidr>,
    /// When not empty, only these ports are captured inbound.
    pub include_inbound_ports: Vec<PortRange>,
    /// Leave IPv6 alone even where the kernel has it.
    pub ipv4_only: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            proxy_uid: Some(DEFAULT_PROXY_ID),
            proxy_gid: Some(DEFAULT_PROXY_ID),
            proxy_mark: None,
            outbound_port: DEFAULT_OUTBOUND_PORT,
            inbound_port: DEFAULT_INBOUND_PORT,
            admin_port: DEFAULT_ADMIN_PORT,
            exclude_outbound_ports: Vec::new(),
            exclude_outbound_cidrs: Vec::new(),
            include_outbound_ports: Vec::new(),
            include_outbound_cidrs: Vec::new(),
            exclude_inbound_ports: Vec::new(),
            exclude_inbound_cidrs: Vec::new(),
            include_inbound_ports: Vec::new(),
            ipv4_only: false,
        }
    }
}

/// One port or an inclusive range, written `80` or `8000-8100`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    /// A single port.
    #[must_use]
    pub fn single(port: u16) -> Self {
        Self {
            first: port,
            last: port,
        }
    }

    /// The lowest port.
    #[must_use]
    pub fn first(self) -> u16 {
        self.first
    }

    /// The highest port, included.
    #[must_use]
    pub fn last(self) -> u16 {
        self.last
    }
}

/// Text that is no port or range of ports.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a port: write a number from 1 to 65535, or a range such as 8000-8100")]
pub struct ParsePortRangeError(String);

impl FromStr for PortRange {
    type Err = ParsePortRangeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParsePortRangeError(text.to_owned());
        let port = |part: &str| match part.trim().parse::<u16>() {
            Ok(port) if port != 0 => Ok(port),
            _ => Err(wrong()),
        };
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let range = Self {
            first: port(first)?,
            last: port(last)?,
        };
        if range.first > range.last {
            Err(wrong())
        } else {
            Ok(range)
        }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

/// A network, written `10.0.0.0/8`, `fd00::/8`, or a bare address for that address alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    network: IpAddr,
    prefix: u8,
}

impl Cidr {
    /// The network's first address; bits beyond the prefix are zero.
    #[must_use]
    pub fn network(self) -> IpAddr {
        self.network
    }

    /// How many leading bits are fixed.
    #[must_use]
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The network's address as the bytes that stand in a packet.
    #[must_use]
    pub fn octets(self) -> Vec<u8> {
        octets(self.network)
    }

    /// The mask as the bytes that a packet's address is and-ed with.
    #[must_use]
    pub fn mask(self) -> Vec<u8> {
        let mut left = usize::from(self.prefix);
        octets(self.network)
            .iter()
            .map(|_| {
                let bits = left.min(8);
                left -= bits;
                // `bits` is at most 8, so the shift is of a u16 and always defined.
                (0xff00_u16 >> bits) as u8
            })
            .collect()
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// Text that is no network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a network: write 10.0.0.0/8, fd00::/8, or a single address")]
pub struct ParseCidrError(String);

impl FromStr for Cidr {
    type Err = ParseCidrError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseCidrError(text.to_owned());
        let (address, prefix) = match text.trim().split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text.trim(), None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            Some(text) => text.parse::<u8>().map_err(|_| wrong())?,
            None => most,
        };
        if prefix > most {
            return Err(wrong());
        }
        let network = match address {
            IpAddr::V4(v4) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
                IpAddr::V4((u32::from(v4) & mask).into())
            }
            IpAddr::V6(v6) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
                IpAddr::V6((u128::from(v6) & mask).into())
            }
        };
        Ok(Self { network, prefix })
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ports_and_ranges_parse() {
        assert_eq!("80".parse(), Ok(PortRange::single(80)));
        assert_eq!(
            "8000-8100".parse(),
            Ok(PortRange {
                first: 8000,
                last: 8100
            })
        );
        for wrong in ["", "0", "65536", "9-8", "-", "1-", "http", "0-5"] {
            assert!(wrong.parse::<PortRange>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn networks_parse_and_lose_their_host_bits() {
        let cidr: Cidr = "10.9.8.7/8".parse().unwrap();
        assert_eq!(cidr.to_string(), "10.0.0.0/8");
        assert_eq!(cidr.mask(), [255, 0, 0, 0]);
        assert_eq!(
            "10.1.2.3".parse::<Cidr>().unwrap().to_string(),
            "10.1.2.3/32"
        );
        assert_eq!("::/0".parse::<Cidr>().unwrap().mask(), [0; 16]);
        assert_eq!("0.0.0.0/0".parse::<Cidr>().unwrap().mask(), [0; 4]);
        assert_eq!(
            "fd00::1:2/127".parse::<Cidr>().unwrap().to_string(),
            "fd00::1:2/127"
        );
        for wrong in [
            "",
            "10.0.0.0/33",
            "::/129",
            "10.0.0/8",
            "10.0.0.0/",
            "10.0.0.0/-1",
        ] {
            assert!(wrong.parse::<Cidr>().is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn a_network_is_its_own_masked_address(bits: u128, prefix in 0u8..=128) {
            let cidr: Cidr = format!("{}/{prefix}", std::net::Ipv6Addr::from(bits)).parse().unwrap();
            let masked: Vec<u8> = bits.to_be_bytes().iter().zip(cidr.mask()).map(|(b, m)| b & m).collect();
            prop_assert_eq!(&masked, &cidr.octets());
            let ones: u32 = cidr.mask().iter().map(|byte| byte.count_ones()).sum();
            prop_assert_eq!(ones, u32::from(prefix));
        }
    }
}
