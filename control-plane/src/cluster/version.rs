//! Which Kubernetes sidecars have to suit.
//!
//! The apiserver comes first when a cluster is upgraded, its kubelets later: a kubelet below 1.29 refuses
//! pods with a native sidecar (`InitContainerRestartPolicyForbidden`), whatever the apiserver's version
//! is. So the oldest of all decides.

use k8s_openapi::api::core::v1::Node;
use kube::api::ListParams;
use kube::{Api, Client};
use tracing::{info, warn};

use super::{ClusterError, answer};
use crate::inject::Version;

/// Nodes asked for at once: one is some 20 KB, most of it names of images.
const PAGE: u32 = 100;

/// The apiserver's version, or that of the oldest kubelet when native sidecars are not for all of them.
/// Who may not list nodes gets the apiserver's.
///
/// # Errors
/// The apiserver does not say its own version.
pub async fn for_sidecars(client: &Client) -> Result<Version, ClusterError> {
    let said = answer("say its version".to_owned(), client.apiserver_version()).await?;
    let said = format!("{}.{}", said.major, said.minor).parse();
    // A version we cannot read is newer than those we know.
    let apiserver = said.unwrap_or(Version::NATIVE_SIDECARS);
    if apiserver < Version::NATIVE_SIDECARS {
        return Ok(apiserver);
    }
    let kubelet = match oldest_kubelet(client).await {
        Ok(kubelet) => kubelet,
        Err(error) => {
            warn!(
                "pods get sidecars for Kubernetes {apiserver}, and older nodes refuse them: {error}"
            );
            return Ok(apiserver);
        }
    };
    Ok(match kubelet {
        Some(kubelet) if kubelet < Version::NATIVE_SIDECARS => {
            info!(
                "the apiserver is of {apiserver}, a node of {kubelet}: sidecars are ordinary containers"
            );
            kubelet
        }
        Some(_) | None => apiserver,
    })
}

async fn oldest_kubelet(client: &Client) -> Result<Option<Version>, ClusterError> {
    let nodes: Api<Node> = Api::all(client.clone());
    let mut page = ListParams::default().limit(PAGE);
    let mut found = None;
    loop {
        let list = answer("list the nodes".to_owned(), nodes.list(&page)).await?;
        let kubelets = list.items.iter().filter_map(|node| {
            let info = node.status.as_ref()?.node_info.as_ref()?;
            Some(info.kubelet_version.as_str())
        });
        found = oldest(kubelets).into_iter().chain(found).min();
        match list.metadata.continue_ {
            Some(next) if !next.is_empty() => page = page.continue_token(&next),
            _ => return Ok(found),
        }
    }
}

/// The oldest of versions as kubelets say theirs; what is none is passed over.
fn oldest<'a>(said: impl Iterator<Item = &'a str>) -> Option<Version> {
    said.filter_map(|version| version.parse().ok()).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_kubelet() {
        for (said, expected) in [
            (&["v1.34.8", "v1.28.15", "v1.30.0"][..], Some("1.28")),
            (&["v1.29.3+k3s1", "v1.29.0-gke.1"], Some("1.29")),
            (&["v1.9.11", "v1.28.15"], Some("1.9")),
            (&["", "someone's own"], None),
            (&[], None),
        ] {
            let found = oldest(said.iter().copied());
            assert_eq!(
                found,
                expected.map(|text| text.parse().unwrap()),
                "{said:?}"
            );
        }
    }
}
