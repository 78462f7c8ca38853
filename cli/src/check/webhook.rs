//! The injection webhook: whether the apiserver could call it, and until when.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use kube::api::Api;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use weft_api::names::{INJECTOR, WEBHOOK_PORT};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::items::Items;
use super::{HOUR, life};
use crate::kube::forward::PodPort;
use crate::kube::{CONTROL_PLANE, Cluster, Replica, SYSTEM, explain};

/// What a handshake through the apiserver may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
const WHAT: &str = "webhook";

pub async fn check(cluster: &Cluster, replicas: &[Replica], now: i64, items: &mut Items) {
    let api: Api<MutatingWebhookConfiguration> = Api::all(cluster.client.clone());
    let configuration = match api.get_opt(INJECTOR).await {
        Ok(Some(configuration)) => configuration,
        Ok(None) => {
            return items.warning(
                WHAT,
                format!("there is no MutatingWebhookConfiguration {INJECTOR}: no pod is injected"),
                "install with injection.enabled=true, or inject by hand with weft inject",
            );
        }
        Err(error) => return items.unseen(WHAT, &explain(&error)),
    };
    let hooks = configuration.webhooks.unwrap_or_default();
    let mut bundles: Vec<Vec<u8>> = hooks
        .iter()
        .map(|hook| {
            hook.client_config
                .ca_bundle
                .clone()
                .map_or(Vec::new(), |b| b.0)
        })
        .collect();
    bundles.dedup();
    let bundle = match bundles.as_slice() {
        [one] if !one.is_empty() => one,
        [] => {
            let help = "helm upgrade it";
            return items.error(WHAT, format!("{INJECTOR} has no webhook"), help);
        }
        _ => {
            return items.error(
                WHAT,
                "its caBundle is not (everywhere) there: the apiserver cannot call it",
                format!("the control plane's leader writes it; see kubectl -n {SYSTEM} logs deploy/{CONTROL_PLANE}"),
            );
        }
    };
    let mut ends = i64::MAX;
    for replica in replicas {
        match presented(cluster, replica, bundle).await {
            Ok(end) => ends = ends.min(end),
            Err(reason) => {
                return items.error(
                    WHAT,
                    format!("replica {} cannot be called as the apiserver would: {reason}", replica.name),
                    format!("its certificate must be signed by the caBundle of {INJECTOR}; see the replica's log"),
                );
            }
        }
    }
    let policy = hooks.first().and_then(|hook| hook.failure_policy.clone());
    let message = format!(
        "its caBundle is that of the certificate it shows, failurePolicy {}",
        policy.as_deref().unwrap_or("Fail")
    );
    items.ok(WHAT, message);
    life(
        "webhook certificate",
        ends - now,
        HOUR,
        "the control plane renews it by itself; see its log for why it did not",
        items,
    );
}

/// Connects as the apiserver does; when what it shows ends, seconds since the Unix epoch.
async fn presented(cluster: &Cluster, replica: &Replica, bundle: &[u8]) -> Result<i64, String> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(bundle) {
        let certificate = certificate.map_err(|e| format!("the caBundle cannot be read: {e}"))?;
        let added = roots.add(certificate);
        added.map_err(|e| format!("the caBundle cannot be used: {e}"))?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(format!("{CONTROL_PLANE}.{SYSTEM}.svc"));
    let name = name.map_err(|e| e.to_string())?;
    let port = PodPort::new(cluster.client.clone(), SYSTEM, &replica.name, WEBHOOK_PORT);
    let handshake = async {
        let stream = port.open().await.map_err(|e| e.to_string())?;
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let stream = connector.connect(name, stream).await;
        stream.map_err(|e| e.to_string())
    };
    let stream = tokio::time::timeout(HANDSHAKE, handshake).await;
    let stream = stream.map_err(|_| "it does not answer".to_owned())??;
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let leaf = chain.first().ok_or("it shows no certificate")?;
    let (_, leaf) = X509Certificate::from_der(leaf).map_err(|e| e.to_string())?;
    Ok(leaf.validity().not_after.timestamp())
}
