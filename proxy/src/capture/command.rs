//! `weft-proxy init`: sets, shows, checks and removes the capture rules.

use std::io::Write as _;

use anyhow::Context as _;

use super::config::{
    Cidr, Config, DEFAULT_ADMIN_PORT, DEFAULT_INBOUND_PORT, DEFAULT_OUTBOUND_PORT,
    DEFAULT_PROXY_ID, PortRange,
};
use super::{Backend, apply, check, families, iptables, remove, rules};

/// Hand this network namespace's TCP connections to the proxy.
///
/// Replaces rules set earlier, so it may be run any number of times. UDP, DNS and whatever goes
/// over loopback are left alone.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Remove the rules instead of setting them.
    #[arg(long, conflicts_with_all = ["check", "dry_run"])]
    pub remove: bool,
    /// Change nothing; exit with 0 when exactly these rules stand, with 1 and the first difference
    /// when not.
    #[arg(long, conflicts_with = "dry_run")]
    pub check: bool,
    /// Change nothing; print the rules, as `nft -f -` (or iptables-restore, with --backend
    /// iptables) would take them.
    #[arg(long)]
    pub dry_run: bool,
    /// What sets the rules; `auto` takes nftables, and iptables when the kernel refuses it.
    #[arg(long, value_enum, default_value = "auto")]
    pub backend: Backend,
    /// The user the proxy runs as; its connections are not captured.
    #[arg(long, default_value_t = DEFAULT_PROXY_ID, value_name = "UID")]
    pub proxy_uid: u32,
    /// The group the proxy runs as; its connections are not captured.
    #[arg(long, default_value_t = DEFAULT_PROXY_ID, value_name = "GID")]
    pub proxy_gid: u32,
    /// A socket mark (SO_MARK) whose connections are not captured, for a proxy that shares its user
    /// with the application.
    #[arg(long, value_parser = parse_mark, value_name = "MARK")]
    pub proxy_mark: Option<u32>,
    /// The port that outbound connections are handed to.
    #[arg(long, default_value_t = DEFAULT_OUTBOUND_PORT, value_parser = clap::value_parser!(u16).range(1..), value_name = "PORT")]
    pub outbound_port: u16,
    /// The port that inbound connections are handed to.
    #[arg(long, default_value_t = DEFAULT_INBOUND_PORT, value_parser = clap::value_parser!(u16).range(1..), value_name = "PORT")]
    pub inbound_port: u16,
    /// The proxy's admin port, reachable from outside as it is.
    #[arg(long, default_value_t = DEFAULT_ADMIN_PORT, value_parser = clap::value_parser!(u16).range(1..), value_name = "PORT")]
    pub admin_port: u16,
    /// Outbound ports to leave alone, such as 3306,9000-9100.
    #[arg(long, value_delimiter = ',', value_name = "PORTS")]
    pub exclude_outbound_ports: Vec<PortRange>,
    /// Outbound networks to leave alone, such as 169.254.169.254,fd00::/8.
    #[arg(long, value_delimiter = ',', value_name = "CIDRS")]
    pub exclude_outbound_cidrs: Vec<Cidr>,
    /// Capture only these outbound ports.
    #[arg(long, value_delimiter = ',', value_name = "PORTS")]
    pub include_outbound_ports: Vec<PortRange>,
    /// Capture only these outbound networks.
    #[arg(long, value_delimiter = ',', value_name = "CIDRS")]
    pub include_outbound_cidrs: Vec<Cidr>,
    /// Inbound ports to leave alone.
    #[arg(long, value_delimiter = ',', value_name = "PORTS")]
    pub exclude_inbound_ports: Vec<PortRange>,
    /// Networks from which inbound connections are left alone, such as 10.0.5.0/24: they reach the
    /// application as they are, also where mutual TLS is required.
    #[arg(long, value_delimiter = ',', value_name = "CIDRS")]
    pub exclude_inbound_cidrs: Vec<Cidr>,
    /// Capture only these inbound ports.
    #[arg(long, value_delimiter = ',', value_name = "PORTS")]
    pub include_inbound_ports: Vec<PortRange>,
    /// Leave IPv6 alone.
    #[arg(long)]
    pub ipv4_only: bool,
}

/// A number, decimal or with 0x; 0 is every unmarked socket's and would exempt them all.
fn parse_mark(text: &str) -> Result<u32, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    match parsed {
        Ok(0) => Err("0 is the mark of every socket that has none; choose another".to_owned()),
        Ok(mark) => Ok(mark),
        Err(_) => Err("write a number such as 0x539".to_owned()),
    }
}

impl Args {
    /// The configuration these arguments ask for.
    #[must_use]
    pub fn config(&self) -> Config {
        Config {
            proxy_uid: Some(self.proxy_uid),
            proxy_gid: Some(self.proxy_gid),
            proxy_mark: self.proxy_mark,
            outbound_port: self.outbound_port,
            inbound_port: self.inbound_port,
            admin_port: self.admin_port,
            exclude_outbound_ports: self.exclude_outbound_ports.clone(),
            exclude_outbound_cidrs: self.exclude_outbound_cidrs.clone(),
            include_outbound_ports: self.include_outbound_ports.clone(),
            include_outbound_cidrs: self.include_outbound_cidrs.clone(),
            exclude_inbound_ports: self.exclude_inbound_ports.clone(),
            exclude_inbound_cidrs: self.exclude_inbound_cidrs.clone(),
            include_inbound_ports: self.include_inbound_ports.clone(),
            ipv4_only: self.ipv4_only,
        }
    }
}

/// Does what the arguments say.
///
/// # Errors
/// When the rules cannot be set, removed or read, and with `--check` when they do not stand.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let config = args.config();
    if args.remove {
        return remove(args.backend).context("the capture rules could not be removed");
    }
    if args.check {
        let difference = check(&config, args.backend)
            .context("whether the capture rules stand could not be found out")?;
        return match difference {
            None => Ok(()),
            Some(difference) => Err(anyhow::anyhow!(
                "the capture rules do not stand: {difference}"
            )),
        };
    }
    if args.dry_run {
        let tables = rules::tables(&config, &families(&config));
        let text = match args.backend {
            Backend::Iptables => tables
                .iter()
                .map(|table| {
                    let family = if table.family == rules::Family::V4 {
                        ""
                    } else {
                        "6"
                    };
                    let rules = iptables::restore_text(table, [0, 0]);
                    format!("# ip{family}tables-restore --noflush\n{rules}")
                })
                .collect(),
            Backend::Auto | Backend::Nftables => rules::nft_text(&tables),
        };
        return std::io::stdout()
            .write_all(text.as_bytes())
            .context("cannot print the rules");
    }
    if args.proxy_uid == 0 || args.proxy_gid == 0 {
        tracing::warn!("whatever runs as root is exempt from capture, the application too");
    }
    let backend = apply(&config, args.backend).context("the capture rules could not be set")?;
    let version = if families(&config).len() == 2 {
        "IPv4 and IPv6"
    } else {
        "IPv4"
    };
    tracing::info!(?backend, "capture rules for {version} are in place");
    Ok(())
}
