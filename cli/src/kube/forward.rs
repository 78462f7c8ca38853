//! Connections to a pod's ports through the apiserver.

use std::io;

use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::Api;
use kube::client::UpgradeConnectionError;
use tokio::io::DuplexStream;

/// A port of a pod.
#[derive(Clone)]
pub struct PodPort {
    client: Client,
    pub namespace: String,
    pub pod: String,
    pub port: u16,
}

impl std::fmt::Debug for PodPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl std::fmt::Display for PodPort {
    /// As it is shown in errors.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "pod/{}/{}:{}", self.namespace, self.pod, self.port)
    }
}

impl PodPort {
    pub fn new(client: Client, namespace: &str, pod: &str, port: u16) -> Self {
        Self {
            client,
            namespace: namespace.to_owned(),
            pod: pod.to_owned(),
            port,
        }
    }

    /// Opens a connection.
    ///
    /// # Errors
    /// The apiserver cannot be reached, or the user may not, or the pod is not there. That nothing
    /// listens on the port shows only when it is used: the connection then ends at once.
    pub async fn open(&self) -> io::Result<DuplexStream> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let mut forwarder = pods
            .portforward(&self.pod, &[self.port])
            .await
            .map_err(|error| self.explain(&error))?;
        forwarder
            .take_stream(self.port)
            .ok_or_else(|| io::Error::other("the port was not forwarded"))
    }

    fn explain(&self, error: &kube::Error) -> io::Error {
        let code = match error {
            kube::Error::UpgradeConnection(UpgradeConnectionError::ProtocolSwitch(code)) => {
                code.as_u16()
            }
            kube::Error::Api(status) => status.code,
            _ => 0,
        };
        match code {
            401 | 403 => io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!(
                    "the apiserver does not let you; it takes the verbs get and create on \
                     pods/portforward in namespace {}",
                    self.namespace
                ),
            ),
            404 => io::Error::new(io::ErrorKind::NotFound, "there is no such pod"),
            _ => io::Error::other(super::explain(error)),
        }
    }
}
