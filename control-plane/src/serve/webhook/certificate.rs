//! The webhook's certificate: issued by the mesh's authority to the Service's names, and renewed
//! while it runs.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::time::{MissedTickBehavior, interval};
use tracing::error;
use weft_api::names::CONTROL_PLANE;

use crate::serve::ca::{Authority, unix};
use crate::serve::tls::TlsError;

/// After a renewal that failed, before the next.
const AGAIN: Duration = Duration::from_secs(5);

/// The names by which the apiserver may call the Service.
pub fn names(namespace: &str) -> Vec<String> {
    vec![
        format!("{CONTROL_PLANE}.{namespace}.svc"),
        format!("{CONTROL_PLANE}.{namespace}.svc.cluster.local"),
    ]
}

/// A server configuration with a fresh certificate, and when that one is half used up.
///
/// # Errors
/// Signing fails.
pub fn server_config(
    authority: &Authority,
    names: &[String],
    now: SystemTime,
) -> Result<(Arc<ServerConfig>, SystemTime), TlsError> {
    let (issued, key) = authority.server_certificate(names, now)?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(
            issued.full_chain(),
            PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        )?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let life = Duration::from_secs(issued.not_after.saturating_sub(unix(now)));
    Ok((Arc::new(config), now + life / 2))
}

/// Renews the certificate at half its life, and when the roots change.
pub async fn keep(
    authority: Arc<Authority>,
    names: Vec<String>,
    tls: Arc<ArcSwap<ServerConfig>>,
    mut renew_at: SystemTime,
) {
    let mut changes = authority.changes();
    let mut ticks = interval(Duration::from_secs(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let changed = tokio::select! {
            _ = ticks.tick() => false,
            changed = changes.changed() => changed.is_ok(),
        };
        let now = SystemTime::now();
        if !changed && now < renew_at {
            continue;
        }
        match server_config(&authority, &names, now) {
            Ok((config, next)) => {
                tls.store(config);
                renew_at = next;
            }
            Err(error) => {
                error!("renewing the webhook's certificate: {error}");
                renew_at = now + AGAIN;
            }
        }
    }
}
