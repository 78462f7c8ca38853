//! The connected proxies, and what they have.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use serde::Serialize;

use super::{Hub, State};
use crate::model::Name;
use crate::serve::ca::{Signer, unix};
use crate::serve::discovery::Key;
use crate::serve::discovery::stream::Stream;

/// A connected proxy as `/status` shows it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ProxyStatus {
    /// `<namespace>/<name>`.
    pub workload: String,
    pub identity: String,
    pub address: SocketAddr,
    pub admin_address: String,
    pub version: String,
    pub instance: String,
    /// Seconds since the Unix epoch.
    pub connected: u64,
    pub certificate_expires: u64,
    /// Id of the root it hangs on; none when that one is not known (any more).
    pub certificate_root: Option<String>,
    #[serde(skip)]
    pub signer: Signer,
    /// Everything it was sent is acknowledged and the newest.
    pub up_to_date: bool,
    /// Resources that wait to be sent.
    pub waiting: usize,
    pub resources: Vec<ResourceStatus>,
}

/// A resource as one proxy has it. Versions are hexadecimal; empty for none.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ResourceStatus {
    pub kind: &'static str,
    pub name: String,
    pub newest: String,
    pub acknowledged: String,
    /// Why the proxy refused it, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

pub(super) fn hex(version: u64) -> String {
    if version == 0 {
        String::new()
    } else {
        format!("{version:016x}")
    }
}

/// The connected proxies and the roots.
#[derive(Clone, Debug, Default)]
pub struct Trusting {
    pub connected: u64,
    /// Workloads that are known to have a proxy; and those of them that are connected here.
    pub sidecars: u64,
    pub workloads: u64,
    /// Of these, those that have acknowledged the roots of now.
    pub trusting: u64,
    /// For each, who signed the certificate it uses.
    pub signers: Vec<Signer>,
}

impl Hub {
    /// Every connected proxy, by workload.
    pub fn status(&self) -> Vec<ProxyStatus> {
        let state = self.state();
        let mut proxies: Vec<ProxyStatus> = state
            .streams
            .values()
            .map(|stream| state.status_of(stream))
            .collect();
        drop(state);
        proxies.sort_by(|a, b| (&a.workload, a.connected).cmp(&(&b.workload, b.connected)));
        proxies
    }

    /// The connected proxies, how many of them have acknowledged the roots of now, and who signed
    /// their certificates.
    pub fn trust(&self) -> Trusting {
        let state = self.state();
        let key = Key::trust();
        let newest = state
            .resources
            .get(&key)
            .map(|entry| entry.variants.of("").version());
        let trusts = |stream: &&Stream| {
            let sent = stream.sent.get(&key);
            newest.is_some() && sent.map(|sent| sent.acknowledged) == newest
        };
        let workloads: BTreeSet<&Name> = state
            .streams
            .values()
            .map(|stream| &stream.proxy.workload)
            .filter(|name| {
                let known = state.world.workload(name);
                known.is_some_and(|workload| workload.sidecar)
            })
            .collect();
        Trusting {
            workloads: workloads.len() as u64,
            sidecars: state.world.sidecars() as u64,
            connected: state.streams.len() as u64,
            trusting: state.streams.values().filter(trusts).count() as u64,
            signers: state
                .streams
                .values()
                .map(|stream| stream.proxy.signer.clone())
                .collect(),
        }
    }
}

impl State {
    fn status_of(&self, stream: &Stream) -> ProxyStatus {
        let resources: Vec<ResourceStatus> = stream
            .explicit
            .iter()
            .chain(
                stream
                    .implied
                    .keys()
                    .filter(|key| !stream.explicit.contains(key)),
            )
            .map(|key| {
                let sent = stream.sent.get(key).cloned().unwrap_or_default();
                let client = stream.audience(key);
                let newest = self
                    .resources
                    .get(key)
                    .map_or(0, |entry| entry.variants.of(client).version());
                ResourceStatus {
                    kind: key.kind_name(),
                    name: key.name.to_string(),
                    newest: hex(newest),
                    acknowledged: hex(sent.acknowledged),
                    refused: sent
                        .refused
                        .map(|refused| format!("{}: {}", hex(refused.0), refused.1)),
                }
            })
            .collect();
        let proxy = &stream.proxy;
        ProxyStatus {
            workload: proxy.workload.to_string(),
            identity: proxy.identity.to_string(),
            address: proxy.address,
            admin_address: proxy.hello.admin_address.clone(),
            version: proxy.hello.proxy_version.clone(),
            instance: proxy.hello.instance.clone(),
            connected: unix(proxy.connected),
            certificate_expires: proxy.certificate_expires,
            certificate_root: None,
            signer: proxy.signer.clone(),
            up_to_date: stream.waiting() == 0
                && resources
                    .iter()
                    .all(|resource| resource.newest == resource.acknowledged),
            waiting: stream.waiting(),
            resources,
        }
    }
}
