//! A bridge, and hosts joined to it.

use std::ffi::OsStr;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use super::error::Error;
use super::launch::Launch;
use super::{PROXY_ID, PROXY_MARK, links};

/// The number of addresses we hand out: the last two bytes of each, less the network's own.
const MOST_HOSTS: u16 = u16::MAX - 2;

/// What a fabric is called and which networks it has.
#[derive(Clone, Debug)]
pub struct FabricOptions {
    /// The bridge's name, and the beginning of the names of the hosts' devices; ten bytes at most.
    pub name: String,
    /// The IPv4 network, of 65,536 addresses; the bridge has the first.
    pub v4: Ipv4Addr,
    /// The IPv6 network, of 64 bits; the bridge has the first address.
    pub v6: Ipv6Addr,
    /// Answer at once that there is no way to an address nobody has, instead of silence. Changes
    /// the namespace's forwarding settings, so only for a network of our own.
    pub refuse_unknown: bool,
}

impl Default for FabricOptions {
    fn default() -> Self {
        Self {
            name: "weft0".to_owned(),
            v4: Ipv4Addr::new(10, 210, 0, 0),
            v6: Ipv6Addr::new(0xfd77, 0x6566, 0x7400, 0, 0, 0, 0, 0),
            refuse_unknown: true,
        }
    }
}

/// A bridge in the namespace of this process, which has the first address of its networks.
///
/// Deleted when dropped, unless a host is still joined to it.
#[derive(Debug)]
pub struct Fabric {
    options: FabricOptions,
    has_v6: bool,
}

/// A network namespace on the fabric. It lives as long as a clone of this value or a process in it;
/// with the last clone it is cut off from the bridge.
#[derive(Clone, Debug)]
pub struct Host {
    name: String,
    v4: Ipv4Addr,
    v6: Option<Ipv6Addr>,
    namespace: Arc<OwnedFd>,
    /// Dropped with the last clone.
    _cable: Arc<Cable>,
}

/// The near end of a host's veth pair, by name.
#[derive(Debug)]
struct Cable(String);

impl Drop for Cable {
    fn drop(&mut self) {
        // The kernel does it too, some time after the last process in the namespace has gone; a
        // bridge on the machine's own network should be free of it at once.
        let _ = links::cut(&self.0);
    }
}

impl Fabric {
    /// Lays the bridge in the network namespace this process is in, or joins the one that is there.
    ///
    /// # Errors
    /// When the rights or the kernel's bridge module are missing.
    pub fn new(options: FabricOptions) -> Result<Self, Error> {
        // There exactly when the kernel's IPv6 is on.
        let has_v6 = Path::new("/proc/self/net/if_inet6").exists();
        let fabric = Self { options, has_v6 };
        let mut addresses: Vec<links::Address> = vec![(fabric.v4().into(), 16)];
        addresses.extend(fabric.v6().map(|v6| (v6.into(), 64)));
        links::lay_bridge(&fabric.options.name, &addresses).map_err(|error| {
            Error::step(format!("lay the bridge {}", fabric.options.name), error)
        })?;
        if fabric.options.refuse_unknown {
            // A router that has no route says so. Where /proc/sys is read-only, silence is all
            // there is, and everything else works.
            let _ = std::fs::write("/proc/sys/net/ipv4/ip_forward", "1");
            let _ = std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1");
        }
        Ok(fabric)
    }

    /// The bridge's IPv4 address, where this process is reachable from every host.
    #[must_use]
    pub fn v4(&self) -> Ipv4Addr {
        nth_v4(self.options.v4, 1)
    }

    /// The bridge's IPv6 address, if the kernel has IPv6.
    #[must_use]
    pub fn v6(&self) -> Option<Ipv6Addr> {
        self.has_v6.then(|| nth_v6(self.options.v6, 1))
    }

    /// Makes a network namespace, joined to the bridge, with the next free addresses.
    ///
    /// # Errors
    /// When the rights or the kernel's veth module are missing, or no address is free.
    pub fn add_host(&self, name: &str) -> Result<Host, Error> {
        let failed = |error| Error::step(format!("make a network namespace for {name}"), error);
        let namespace = links::new_namespace().map_err(failed)?;
        // The near end's name carries the host's number: taking the name takes the addresses.
        let mut number = 2;
        let cable = loop {
            let near = format!("{}-{number}", self.options.name);
            if links::join(&self.options.name, &near, namespace.as_fd()).map_err(failed)? {
                break Cable(near);
            }
            number += 1;
            if number > MOST_HOSTS {
                return Err(Error::Full(MOST_HOSTS));
            }
        };
        let v4 = nth_v4(self.options.v4, number);
        let v6 = self.has_v6.then(|| nth_v6(self.options.v6, number));
        let mut addresses: Vec<links::Address> = vec![(v4.into(), 16)];
        addresses.extend(v6.map(|v6| (v6.into(), 64)));
        let mut gateways: Vec<IpAddr> = vec![self.v4().into()];
        gateways.extend(self.v6().map(IpAddr::from));
        links::furnish(namespace.as_fd(), &addresses, &gateways).map_err(failed)?;
        Ok(Host {
            name: name.to_owned(),
            v4,
            v6,
            namespace: Arc::new(namespace),
            _cable: Arc::new(cable),
        })
    }

    /// How capture can tell the proxy's connections from the application's here: by user where
    /// users can be switched, else (a user namespace without newuidmap has one user only) by mark.
    #[must_use]
    pub fn exemption(&self) -> Exemption {
        let switchable = ["/proc/self/uid_map", "/proc/self/gid_map"]
            .iter()
            .all(|map| {
                std::fs::read_to_string(map).is_ok_and(|text| id_is_mapped(PROXY_ID, &text))
            });
        if switchable {
            Exemption::User(PROXY_ID)
        } else {
            Exemption::Mark(PROXY_MARK)
        }
    }
}

/// What exempts a proxy's own connections from capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exemption {
    /// It runs as this user and group, which nobody else does.
    User(u32),
    /// It sets this mark on its sockets (`SO_MARK`, which takes CAP_NET_ADMIN).
    Mark(u32),
}

impl Exemption {
    /// What `weft-proxy init` is told.
    #[must_use]
    pub fn init_arguments(self) -> Vec<String> {
        match self {
            Self::User(id) => {
                vec![format!("--proxy-uid={id}"), format!("--proxy-gid={id}")]
            }
            Self::Mark(mark) => vec![format!("--proxy-mark={mark:#x}")],
        }
    }

    /// The mark the proxy has to set on its connections, if it has to.
    #[must_use]
    pub fn mark(self) -> Option<u32> {
        match self {
            Self::User(_) => None,
            Self::Mark(mark) => Some(mark),
        }
    }

    /// How the proxy is launched.
    #[must_use]
    pub fn launch(self) -> Launch {
        match self {
            Self::User(id) => Launch::default().user(id, id),
            Self::Mark(_) => Launch::default(),
        }
    }
}

impl Drop for Fabric {
    fn drop(&mut self) {
        // In a network of our own it would vanish anyway; on the machine's it stays while others
        // (of another `weft run`) are joined to it.
        let _ = links::take_up_bridge(&self.options.name);
    }
}

impl Host {
    /// The name it was given.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its IPv4 address.
    #[must_use]
    pub fn v4(&self) -> Ipv4Addr {
        self.v4
    }

    /// Its IPv6 address, if the kernel has IPv6.
    #[must_use]
    pub fn v6(&self) -> Option<Ipv6Addr> {
        self.v6
    }

    /// Its network namespace, for `setns`.
    #[must_use]
    pub fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    /// A command that runs here, as this process's user and with its files. Convert it with
    /// `tokio::process::Command::from` where that is wanted.
    ///
    /// # Errors
    /// Never for a plain launch.
    pub fn command(&self, program: impl AsRef<OsStr>) -> io::Result<Command> {
        self.command_with(program, &Launch::default())
    }

    /// A command that runs here as `launch` says.
    ///
    /// # Errors
    /// When the program cannot be opened for another user, or a path holds a zero byte.
    pub fn command_with(&self, program: impl AsRef<OsStr>, launch: &Launch) -> io::Result<Command> {
        launch.command(Arc::clone(&self.namespace), program)
    }

    /// Runs `body` on a thread of its own in this host: sockets it makes belong to the host, and
    /// may be used anywhere afterwards.
    ///
    /// # Errors
    /// What `body` returns, or that the namespace could not be entered.
    pub fn within<T: Send>(&self, body: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        links::within(self.namespace.as_fd(), body)
    }

    /// Takes the host off the network, as if its machine were gone.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn unplug(&self) -> io::Result<()> {
        links::unplug(self.namespace.as_fd())
    }
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

fn nth_v4(network: Ipv4Addr, number: u16) -> Ipv4Addr {
    (u32::from(network) + u32::from(number)).into()
}

fn nth_v6(network: Ipv6Addr, number: u16) -> Ipv6Addr {
    (u128::from(network) + u128::from(number)).into()
}

#[cfg(test)]
mod tests {
    use super::id_is_mapped;

    #[test]
    fn ids_are_looked_up_in_maps() {
        let all = "         0          0 4294967295\n";
        let one = "         0       1000          1\n";
        let two = "0 1000 1\n1 100000 65536\n";
        for (map, id, expected) in [
            (all, 1337, true),
            (one, 0, true),
            (one, 1337, false),
            (two, 1337, true),
            ("", 0, false),
        ] {
            assert_eq!(id_is_mapped(id, map), expected, "{id} in {map:?}");
        }
    }
}
