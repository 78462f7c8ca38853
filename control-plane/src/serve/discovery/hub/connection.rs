//! A proxy's open stream: what it says, and what goes to it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use rustls_pki_types::CertificateDer;
use tokio::sync::Notify;
use tonic::Status;
use tracing::{info, warn};
use weft_api::proto::{DiscoveryResponse, Held, Hello, ResourceKey};

use super::Hub;
use crate::model::{Name, World};
use crate::serve::discovery::stream::{Proxy, Stream};
use crate::serve::discovery::{Key, Kind};
use crate::serve::tls::{Peer, peer};

/// Resources one proxy may ask for: far above what a workload calls.
const MAX_SUBSCRIPTIONS: usize = 100_000;
/// Longest name of a resource, bytes: a host name of 253 with a port has room.
const MAX_NAME: usize = 512;

impl Hub {
    /// Opens a proxy's stream.
    ///
    /// # Errors
    /// The workload it names is not its certificate's.
    pub(crate) fn connect(
        self: &Arc<Self>,
        peer: &Peer,
        address: SocketAddr,
        hello: Hello,
    ) -> Result<Connection, Status> {
        let mut state = self.state();
        let name = authorize(&state.world, peer, &hello.workload).inspect_err(|status| {
            self.metrics.streams_refused.add(1);
            warn!(%address, identity = %peer.identity, "stream refused: {}", status.message());
        })?;
        let id = state.next_stream;
        state.next_stream += 1;
        info!(%address, workload = %name, identity = %peer.identity, version = hello.proxy_version, "proxy connected");
        let node = state.world.workload(&name);
        let node = node.map_or(String::new(), |workload| workload.node.clone());
        let proxy = Proxy {
            workload: name,
            identity: peer.identity.clone(),
            address,
            connected: SystemTime::now(),
            signer: peer.signer.clone(),
            certificate_expires: peer.not_after,
            hello,
        };
        let stream = Stream::new(proxy, node);
        let wake = stream.wake.clone();
        state.streams.insert(id, stream);
        self.metrics.streams_opened.add(1);
        Ok(Connection {
            hub: self.clone(),
            id,
            wake,
        })
    }
}

/// Who may speak for a workload: the certificate's namespace and service account must be those of
/// the workload. One that is not known (yet) must at least be of the certificate's namespace.
pub(super) fn authorize(world: &World, peer: &Peer, workload: &str) -> Result<Name, Status> {
    let name = Name::parse(workload).ok_or_else(|| {
        Status::invalid_argument(format!(
            "Hello names the workload '{workload}'; write <namespace>/<name>"
        ))
    })?;
    let identity = &peer.identity;
    let known = world.workload(&name);
    let account = known.map(|workload| workload.service_account.as_str());
    if name.namespace != identity.namespace
        || account.is_some_and(|account| account != identity.service_account)
    {
        return Err(Status::permission_denied(format!(
            "workload {name} runs as service account {}/{}, but the client certificate is {identity}",
            name.namespace,
            account.unwrap_or("?"),
        )));
    }
    Ok(name)
}

/// A proxy's open stream; dropping it closes it.
pub(crate) struct Connection {
    hub: Arc<Hub>,
    id: u64,
    wake: Arc<Notify>,
}

impl Connection {
    /// Waits for what is to be sent next.
    ///
    /// # Errors
    /// The stream is to end.
    pub(crate) async fn next(&self) -> Result<DiscoveryResponse, Status> {
        loop {
            {
                let mut state = self.hub.state();
                let Some(stream) = state.streams.get_mut(&self.id) else {
                    return Err(Status::unavailable("the stream was closed"));
                };
                if let Some(status) = stream.ended() {
                    return Err(status);
                }
                if let Some((response, seen)) = stream.take() {
                    self.hub.metrics.pushes.add(response.resources.len() as u64);
                    for seen in seen.into_iter().flatten() {
                        self.hub.metrics.push.observe(seen.elapsed());
                    }
                    return Ok(response);
                }
            }
            self.wake.notified().await;
        }
    }

    /// Everything that waits to be sent, taken.
    #[cfg(test)]
    pub(crate) fn waiting(&self) -> Vec<weft_api::proto::Resource> {
        let mut state = self.hub.state();
        let Some(stream) = state.streams.get_mut(&self.id) else {
            return Vec::new();
        };
        let mut resources = Vec::new();
        while let Some((response, _)) = stream.take() {
            resources.extend(response.resources);
        }
        resources
    }

    /// Its requests, as a handle that does not keep it open.
    pub(crate) fn requests(&self) -> Requests {
        Requests {
            hub: self.hub.clone(),
            id: self.id,
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut state = self.hub.state();
        let Some(stream) = state.streams.remove(&self.id) else {
            return;
        };
        for key in stream.explicit.iter().chain(stream.implied.keys()) {
            state.unsubscribe(self.id, key);
        }
        drop(state);
        info!(workload = %stream.proxy.workload, address = %stream.proxy.address, "proxy disconnected");
    }
}

/// What a proxy says on its stream.
pub(crate) struct Requests {
    hub: Arc<Hub>,
    id: u64,
}

impl Requests {
    /// The proxy asks for resources and says which versions it has.
    ///
    /// # Errors
    /// A resource has no name or kind, or is another workload's.
    pub(crate) fn subscribe(&self, resources: Vec<Held>) -> Result<(), Status> {
        let mut wanted = Vec::with_capacity(resources.len());
        for held in resources {
            let key = read_key(held.key)?;
            wanted.push((key, held.version));
        }
        let mut state = self.hub.state();
        let Some(stream) = state.streams.get_mut(&self.id) else {
            return Ok(());
        };
        if stream.explicit.len() + wanted.len() > MAX_SUBSCRIPTIONS {
            return Err(Status::resource_exhausted(format!(
                "a proxy may ask for at most {MAX_SUBSCRIPTIONS} resources"
            )));
        }
        for (key, _) in &wanted {
            if key.rank == Kind::Workload as u8 && *key.name != *stream.proxy.workload.to_string() {
                return Err(Status::permission_denied(format!(
                    "workload {} asked for the table of {}; a proxy may ask only for its own",
                    stream.proxy.workload, key.name
                )));
            }
        }
        // Endpoints come before the destinations that lead to them, so that what the proxy holds
        // of them is known when the destinations are looked at.
        wanted.sort();
        let mut subscribed = Vec::with_capacity(wanted.len());
        for (key, version) in &wanted {
            let (key, compiled) = state.subscribe(&self.hub.settings, self.id, key);
            if let Some(stream) = state.streams.get_mut(&self.id) {
                stream.explicit.insert(key.clone());
                stream.holds(&key, *version);
            }
            subscribed.push((key, compiled));
        }
        for (key, compiled) in &subscribed {
            state.follow(&self.hub.settings, self.id, key, compiled, None);
            if let Some(stream) = state.streams.get_mut(&self.id) {
                stream.offer(key, compiled, None);
            }
        }
        Ok(())
    }

    /// The proxy no longer wants resources.
    ///
    /// # Errors
    /// A resource has no name or kind.
    pub(crate) fn unsubscribe(&self, keys: Vec<ResourceKey>) -> Result<(), Status> {
        let mut state = self.hub.state();
        for key in keys {
            let key = read_key(Some(key))?;
            let Some(stream) = state.streams.get_mut(&self.id) else {
                return Ok(());
            };
            stream.explicit.remove(&key);
            if !stream.wants(&key) {
                stream.forget(&key);
                state.unsubscribe(self.id, &key);
            }
            if key.rank == Kind::Destination as u8 {
                state.let_go(self.id, &key, &BTreeSet::new());
            }
        }
        Ok(())
    }

    /// The proxy has taken a version.
    pub(crate) fn acknowledge(&self, key: Option<ResourceKey>, version: u64) -> Result<(), Status> {
        let key = read_key(key)?;
        let seen = self
            .hub
            .state()
            .streams
            .get_mut(&self.id)
            .and_then(|stream| stream.acknowledge(&key, version));
        if let Some(seen) = seen {
            self.hub.metrics.acknowledged.observe(seen.elapsed());
        }
        Ok(())
    }

    /// The proxy has refused a version.
    pub(crate) fn refuse(
        &self,
        key: Option<ResourceKey>,
        version: u64,
        reason: String,
    ) -> Result<(), Status> {
        let key = read_key(key)?;
        self.hub.metrics.nacks.add(1);
        if let Some(stream) = self.hub.state().streams.get_mut(&self.id) {
            warn!(workload = %stream.proxy.workload, resource = %key.name, "proxy refused a resource: {reason}");
            stream.refuse(&key, version, reason);
        }
        Ok(())
    }

    /// The proxy has a new certificate.
    ///
    /// # Errors
    /// It is somebody else's.
    pub(crate) fn certificate(&self, leaf: Vec<u8>) -> Result<(), Status> {
        let leaf = CertificateDer::from(leaf);
        let mut state = self.hub.state();
        let Some(stream) = state.streams.get_mut(&self.id) else {
            return Ok(());
        };
        let proxy = &mut stream.proxy;
        let shown = peer(&leaf, &self.hub.settings.trust_domain)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        if shown.identity != proxy.identity {
            return Err(Status::permission_denied(format!(
                "the proxy of {} says it has a certificate of {}, but came with one of {}",
                proxy.workload, shown.identity, proxy.identity
            )));
        }
        proxy.signer = shown.signer;
        proxy.certificate_expires = shown.not_after;
        Ok(())
    }

    /// Ends the stream.
    pub(crate) fn end(&self, status: Status) {
        if let Some(stream) = self.hub.state().streams.get_mut(&self.id) {
            stream.end(status);
        }
    }
}

fn read_key(key: Option<ResourceKey>) -> Result<Key, Status> {
    let key = key.ok_or_else(|| Status::invalid_argument("a resource without a key"))?;
    if key.name.is_empty() || key.name.len() > MAX_NAME {
        return Err(Status::invalid_argument(format!(
            "a resource name has 1 to {MAX_NAME} bytes"
        )));
    }
    let kind = key.kind();
    Key::new(kind, key.name)
        .ok_or_else(|| Status::invalid_argument("a resource of an unknown kind"))
}
