//! Asking the control plane.

use weft_api::names;

use super::known::Explained;
use crate::admin::{Admin, encode};
use crate::reach::Reach;

/// Who calls.
#[derive(Debug, Clone, Copy)]
pub enum Client<'a> {
    /// Somebody of a namespace, with a proxy.
    Of(&'a str),
    WithoutProxy,
}

/// What the control plane says of a destination. Of several replicas each
/// knows all policies, and which of them have come to the proxies that are connected to it. `named`:
/// the control plane to ask, if the user says so.
///
/// # Errors
/// Nobody could be asked: a clause that says why.
pub async fn ask(
    reach: &Reach,
    named: Option<&Admin>,
    destination: &str,
    client: Client<'_>,
) -> Result<Explained, String> {
    let (replicas, hint) = match (named, reach) {
        (Some(admin), _) => (vec![admin.clone()], ""),
        (None, Reach::Cluster(cluster)) => {
            let replicas = cluster.replicas().await.map_err(|e| e.to_string())?;
            (replicas.into_iter().map(|one| one.admin).collect(), "")
        }
        (None, Reach::Direct(_)) => {
            let usual = format!("127.0.0.1:{}", names::CONTROL_ADMIN_PORT);
            let usual = Admin::new(&usual).map_err(|e| e.to_string())?;
            let hint = " (--control-plane names the control plane's admin port)";
            (vec![usual], hint)
        }
    };
    let client = match client {
        Client::Of(namespace) => format!("namespace={}", encode(namespace)),
        Client::WithoutProxy => "proxy=none".to_owned(),
    };
    let path = format!("/explain?destination={}&{client}", encode(destination));
    let mut found: Option<Explained> = None;
    let mut failed = "no control plane runs".to_owned();
    for replica in &replicas {
        match (replica.json::<Explained>(&path).await, &mut found) {
            (Ok(other), Some(known)) => known.complete(&other),
            (Ok(first), None) => found = Some(first),
            (Err(error), _) => failed = format!("{error}{hint}"),
        }
        if found.as_ref().is_some_and(Explained::is_complete) {
            break;
        }
    }
    found.ok_or(failed)
}
