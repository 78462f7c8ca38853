//! `weft check`: whether an installed mesh is well.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{SystemTime, UNIX_EPOCH};

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::api::{Api, ListParams};
use serde::Deserialize;
use weft_api::names::{INJECT, STATUS};

use super::items::Items;
use super::{DAY, HOUR, life, webhook};
use crate::kube::pods::{self, Meshed, ask_all};
use crate::kube::{CONTROL_PLANE, Cluster, Error, Replica, SYSTEM, explain};
use crate::output::span;
use crate::status::Status;

/// Clocks this far apart are warned of, seconds: answers carry whole seconds and take some time.
const SKEW: i64 = 5;
/// Clocks this far apart break certificates that have just been issued, seconds.
const BAD_SKEW: i64 = 60;
/// Proxies whose clocks are looked at.
const CLOCKS: usize = 50;
/// Lines of one kind before the rest is only counted.
const LINES: usize = 10;

/// The part of /status that is used here.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ReplicaStatus {
    version: String,
    ready: bool,
    #[serde(default)]
    certificate_expires: i64,
    #[serde(default)]
    warnings: Vec<String>,
    #[serde(default)]
    objects: BTreeMap<String, usize>,
    certificate_authority: Authority,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Authority {
    #[serde(default)]
    phase: String,
    roots: Vec<Root>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Root {
    id: String,
    not_after: i64,
    signing: bool,
}

/// A replica's answer, and by how many seconds its clock is ahead of ours.
struct Answered {
    name: String,
    own: ReplicaStatus,
    all: Status,
    skew: Option<i64>,
}

pub async fn check(cluster: &Cluster, items: &mut Items) -> Result<(), Error> {
    let now = seconds();
    deployment(cluster, items).await?;
    leader(cluster, now, items).await;
    let replicas = match cluster.replicas().await {
        Err(error @ Error::NoReplica) => {
            let help = "proxies go on with what they know; bring the control plane back";
            items.error("replicas", error.to_string(), help);
            return Ok(());
        }
        replicas => replicas?,
    };
    let answered = ask(&replicas, items).await;
    agree(&answered, items);
    authority(&answered, now, items);
    webhook::check(cluster, &replicas, now, items).await;
    let known: Vec<&crate::status::Proxy> = answered.iter().flat_map(|a| &a.all.proxies).collect();
    proxies(&known, now, items);
    let running = match cluster.pods(cluster.wide_scope()).await {
        Ok(all) => {
            let meshed = connected(&all, &known, items);
            missing(cluster, &all, items).await;
            meshed
        }
        Err(error) => {
            items.unseen("pods", &error);
            Vec::new()
        }
    };
    clocks(cluster, &answered, &running, items).await;
    findings(&answered, items);
    Ok(())
}

fn seconds() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    i64::try_from(now.unwrap_or_default().as_secs()).unwrap_or(i64::MAX)
}

async fn deployment(cluster: &Cluster, items: &mut Items) -> Result<(), Error> {
    let deployment = cluster.control_plane().await?;
    let wanted = deployment.spec.and_then(|spec| spec.replicas).unwrap_or(1);
    let status = deployment.status.unwrap_or_default();
    let ready = status.ready_replicas.unwrap_or(0);
    let message = format!("{ready} of {wanted} replicas are ready");
    let help = format!("see kubectl -n {SYSTEM} describe pods, and their logs");
    match ready {
        0 => items.error("control plane", message, help),
        ready if ready < wanted => items.warning("control plane", message, help),
        _ => items.ok("control plane", message),
    }
    Ok(())
}

async fn leader(cluster: &Cluster, now: i64, items: &mut Items) {
    let api: Api<Lease> = Api::namespaced(cluster.client.clone(), SYSTEM);
    let spec = match api.get_opt(CONTROL_PLANE).await {
        Ok(lease) => lease.and_then(|lease| lease.spec).unwrap_or_default(),
        Err(error) => return items.unseen("leader", &explain(&error)),
    };
    let holder = spec.holder_identity.unwrap_or_default();
    let age = spec
        .renew_time
        .map_or(i64::MAX, |time| now - time.0.as_second());
    let lasts = i64::from(spec.lease_duration_seconds.unwrap_or(15));
    if holder.is_empty() || age > lasts + SKEW {
        items.error(
            "leader",
            "no replica leads: roots are not handed out, certificates of the webhook not renewed",
            format!("see the replicas' logs; they write the Lease {SYSTEM}/{CONTROL_PLANE}"),
        );
    } else {
        items.ok("leader", holder);
    }
}

async fn ask(replicas: &[Replica], items: &mut Items) -> Vec<Answered> {
    let ask = async |replica: &Replica| {
        let answer = replica.admin.get("/status").await;
        (replica.name.clone(), answer, seconds())
    };
    let mut answered = Vec::new();
    for (name, answer, at) in ask_all(replicas, ask).await {
        let read = answer.map_err(|e| e.to_string()).and_then(|answer| {
            let own = serde_json::from_slice(&answer.body).map_err(|e| e.to_string())?;
            let all = serde_json::from_slice(&answer.body).map_err(|e| e.to_string())?;
            let skew = answer
                .date
                .and_then(|date| http_date(&date))
                .map(|date| date - at);
            Ok((own, all, skew))
        });
        match read {
            Ok((own, all, skew)) => answered.push(Answered {
                name,
                own,
                all,
                skew,
            }),
            Err(error) => items.error(
                "replicas",
                format!("{name} does not tell its state: {error}"),
                format!("see kubectl -n {SYSTEM} logs {name}"),
            ),
        }
    }
    answered
}

/// Replicas know the same, whoever asks them.
fn agree(answered: &[Answered], items: &mut Items) {
    let Some((first, others)) = answered.split_first() else {
        return;
    };
    let own = env!("CARGO_PKG_VERSION");
    let mut agreed = true;
    for other in others {
        let roots = |a: &Answered| -> BTreeSet<String> {
            a.own
                .certificate_authority
                .roots
                .iter()
                .map(|r| r.id.clone())
                .collect()
        };
        let differs = [
            (roots(first) != roots(other), "the trusted roots"),
            (
                first.own.objects != other.own.objects,
                "how many objects there are",
            ),
            (first.own.version != other.own.version, "their version"),
        ];
        let on: Vec<&str> = differs
            .iter()
            .filter(|(d, _)| *d)
            .map(|(_, what)| *what)
            .collect();
        if !on.is_empty() {
            agreed = false;
            items.warning(
                "replicas",
                format!("{} and {} do not agree on {}", first.name, other.name, on.join(", ")),
                "ask again in some seconds; a replica that stays behind does not reach the apiserver",
            );
        }
    }
    for unready in answered.iter().filter(|a| !a.own.ready) {
        agreed = false;
        items.warning(
            "replicas",
            format!("{} is not ready", unready.name),
            format!("see kubectl -n {SYSTEM} logs {}", unready.name),
        );
    }
    if agreed {
        let objects: Vec<String> = first
            .own
            .objects
            .iter()
            .map(|(kind, n)| format!("{n} {kind}"))
            .collect();
        items.ok(
            "replicas",
            format!("{} agree: {}", answered.len(), objects.join(", ")),
        );
    }
    if first.own.version == own {
        items.ok(
            "version",
            format!("{own}, the control plane's and this program's"),
        );
    } else {
        items.warning(
            "version",
            format!(
                "the control plane is {}, this program {own}",
                first.own.version
            ),
            "use the program of the same version",
        );
    }
}

fn authority(answered: &[Answered], now: i64, items: &mut Items) {
    let Some(first) = answered.first() else {
        return;
    };
    let authority = &first.own.certificate_authority;
    for root in &authority.roots {
        let role = if root.signing { "signs" } else { "is trusted" };
        life(
            "root",
            root.not_after - now,
            30 * DAY,
            "weft identity rotate-root replaces it without an interruption",
            items,
        );
        if let Some(last) = items.0.last_mut() {
            last.message = format!("{} ({}, {role})", last.message, root.id);
        }
    }
    if !matches!(authority.phase.as_str(), "" | "stable" | "steady") {
        items.ok("root rotation", authority.phase.clone());
    }
    for one in answered.iter().filter(|a| a.own.certificate_expires > 0) {
        life(
            "own certificate",
            one.own.certificate_expires - now,
            HOUR,
            "the control plane renews it by itself; see its log for why it did not",
            items,
        );
        if let Some(last) = items.0.last_mut() {
            last.message = format!("{} ({})", last.message, one.name);
        }
    }
    let warnings: BTreeSet<&String> = answered.iter().flat_map(|a| &a.own.warnings).collect();
    for warning in warnings {
        items.warning(
            "certificates",
            warning.clone(),
            "weft identity shows what there is",
        );
    }
}

/// Adds the first lines, and how many more there are.
fn some(items: &mut Items, found: Vec<(String, String)>, what: &str, bad: bool) {
    let more = found.len().saturating_sub(LINES);
    for (message, help) in found.into_iter().take(LINES) {
        if bad {
            items.error(what, message, help);
        } else {
            items.warning(what, message, help);
        }
    }
    if more > 0 {
        items.warning(
            what,
            format!("and {more} more"),
            "weft status, or --output json, shows all",
        );
    }
}

fn proxies(known: &[&crate::status::Proxy], now: i64, items: &mut Items) {
    let (mut late, mut refused, mut expired) = (Vec::new(), Vec::new(), Vec::new());
    let mut soonest = i64::MAX;
    for proxy in known {
        for (table, reason) in proxy.refused() {
            refused.push((
                format!(
                    "{} refused {} {}: {reason}",
                    proxy.workload, table.kind, table.name
                ),
                "it goes on with the last good one; correct the object that it comes from"
                    .to_owned(),
            ));
        }
        if proxy.behind() > 0 {
            late.push((
                format!(
                    "{} has not acknowledged {} tables",
                    proxy.workload,
                    proxy.behind()
                ),
                "ask again in some seconds; else see the proxy's log (kubectl logs -c weft-proxy)"
                    .to_owned(),
            ));
        }
        let left = proxy.certificate_expires - now;
        if proxy.certificate_expires > 0 {
            soonest = soonest.min(left);
        }
        if proxy.certificate_expires > 0 && left < HOUR {
            expired.push((
                format!(
                    "the certificate of {} ends in {}",
                    proxy.workload,
                    span(left as f64)
                ),
                "it renews at half of its life; see the proxy's log for why it did not".to_owned(),
            ));
        }
    }
    if late.is_empty() && refused.is_empty() {
        items.ok(
            "proxies",
            format!("{} are connected and up to date", known.len()),
        );
    }
    let certificates = expired.is_empty() && soonest < i64::MAX;
    some(items, refused, "proxies", true);
    some(items, late, "proxies", false);
    some(items, expired, "certificates", true);
    if certificates {
        items.ok(
            "certificates",
            format!("of workloads: the first ends in {}", span(soonest as f64)),
        );
    }
}

/// Every pod with a proxy is known to a control plane.
fn connected(all: &[Pod], known: &[&crate::status::Proxy], items: &mut Items) -> Vec<Meshed> {
    let running = all.iter().filter(|pod| pods::is_running(pod));
    let meshed: Vec<Meshed> = running.filter_map(pods::meshed).collect();
    let lost: Vec<(String, String)> = meshed
        .iter()
        .filter(|pod| !known.iter().any(|proxy| proxy.workload == pod.workload()))
        .map(|pod| {
            (
                format!(
                    "the proxy of {} is not connected to any control plane",
                    pod.workload()
                ),
                format!(
                    "see kubectl -n {} logs {} -c weft-proxy",
                    pod.namespace, pod.name
                ),
            )
        })
        .collect();
    if lost.is_empty() {
        items.ok(
            "pods",
            format!("{} with a proxy, all connected", meshed.len()),
        );
    }
    some(items, lost, "pods", true);
    meshed
}

/// Pods that should have a proxy and have none.
async fn missing(cluster: &Cluster, all: &[Pod], items: &mut Items) {
    let what = "injection";
    let api: Api<Namespace> = Api::all(cluster.client.clone());
    let namespaces = match api.list(&ListParams::default()).await {
        Ok(namespaces) => namespaces.items,
        Err(error) => return items.unseen(what, &explain(&error)),
    };
    for namespace in &namespaces {
        for (message, help) in super::before::conflicts(namespace) {
            items.warning(what, message, help);
        }
    }
    let enabled: BTreeSet<&str> = namespaces
        .iter()
        .filter(|namespace| {
            let labels = namespace.metadata.labels.as_ref();
            wants(labels.and_then(|labels| labels.get(INJECT)))
        })
        .filter_map(|namespace| namespace.metadata.name.as_deref())
        .collect();
    let mut found = Vec::new();
    for pod in all
        .iter()
        .filter(|pod| pods::is_running(pod) && lacks_proxy(pod, &enabled))
    {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        let owner = pods::owner(pod);
        let status = pod
            .metadata
            .annotations
            .as_ref()
            .and_then(|a| a.get(STATUS));
        let why = status.map_or(
            "it is older than the label, or was made while no control plane ran".to_owned(),
            Clone::clone,
        );
        let help = match owner.split_once('/') {
            Some(("pod", name)) => {
                format!("delete and create it again: kubectl -n {namespace} delete pod {name}")
            }
            Some(("job", name)) => format!("run Job {namespace}/{name} again"),
            _ => format!("kubectl -n {namespace} rollout restart {owner}"),
        };
        found.push((
            format!("{namespace}/{name} should have a proxy and has none: {why}"),
            help,
        ));
    }
    if found.is_empty() {
        let message = match enabled.len() {
            0 => "no namespace asks for it (weft.dev/inject=enabled)".to_owned(),
            1 => "one namespace asks for it; every pod that should has a proxy".to_owned(),
            n => format!("{n} namespaces ask for it; every pod that should has a proxy"),
        };
        items.ok(what, message);
    }
    some(items, found, what, false);
}

fn wants(value: Option<&String>) -> bool {
    matches!(value.map(String::as_str), Some("enabled" | "true"))
}

/// Whether a pod should have a proxy, by its own word or its namespace's, could, and has none.
fn lacks_proxy(pod: &Pod, enabled: &BTreeSet<&str>) -> bool {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let label = pod
        .metadata
        .labels
        .as_ref()
        .and_then(|labels| labels.get(INJECT));
    let annotation = pod
        .metadata
        .annotations
        .as_ref()
        .and_then(|a| a.get(INJECT));
    let asked = match label.or(annotation) {
        Some(own) => wants(Some(own)),
        None => enabled.contains(namespace),
    };
    let host = pod.spec.as_ref().and_then(|spec| spec.host_network) == Some(true);
    let never = matches!(namespace, "kube-system" | "kube-node-lease") || namespace == SYSTEM;
    asked && !host && !never && pods::proxy_container(pod).is_none()
}

async fn clocks(cluster: &Cluster, answered: &[Answered], pods: &[Meshed], items: &mut Items) {
    let what = "clocks";
    let read = async |pod: &Meshed| {
        let answer = cluster.proxy(pod).get("/healthz").await;
        let at = seconds();
        let date = answer.ok().and_then(|answer| http_date(&answer.date?));
        Some((pod.workload(), date? - at))
    };
    let of_proxies = ask_all(pods.iter().take(CLOCKS), read).await;
    let of_replicas = answered.iter().map(|a| Some((a.name.clone(), a.skew?)));
    let all: Vec<(String, i64)> = of_replicas.chain(of_proxies).flatten().collect();
    let widest = all
        .iter()
        .map(|(_, skew)| *skew)
        .max()
        .zip(all.iter().map(|(_, s)| *s).min());
    let Some((ahead, behind)) = widest else {
        return;
    };
    // What matters is how far they are apart from each other, not from here.
    let apart = ahead - behind;
    let name = |skew: i64| {
        all.iter()
            .find(|(_, s)| *s == skew)
            .map_or("", |(name, _)| name)
    };
    let message = format!("{} is {apart} s ahead of {}", name(ahead), name(behind));
    let help = "certificates are refused by clocks that are wrong: keep the nodes' clocks by NTP";
    match apart {
        BAD_SKEW.. => items.error(what, message, help),
        SKEW.. => items.warning(what, message, help),
        _ => items.ok(what, format!("{} agree within {SKEW} s", all.len())),
    }
}

/// What in the objects cannot work.
fn findings(answered: &[Answered], items: &mut Items) {
    let all: BTreeSet<&crate::status::Finding> =
        answered.iter().flat_map(|a| &a.all.findings).collect();
    if all.is_empty() {
        items.ok(
            "policies",
            "nothing in routes, policies and Services stands against them",
        );
    }
    for finding in all {
        let object = finding.object.as_deref().unwrap_or_default();
        let message = match object {
            "" => finding.message.clone(),
            object => format!("{object}: {}", finding.message),
        };
        if finding.severity == "error" {
            items.error("policies", message, finding.help.clone());
        } else {
            items.warning("policies", message, finding.help.clone());
        }
    }
}

/// "Sun, 06 Nov 1994 08:49:37 GMT" (RFC 9110 section 5.6.7) in seconds since the Unix epoch.
fn http_date(text: &str) -> Option<i64> {
    let mut words = text.split_once(", ")?.1.split_whitespace();
    let day: i64 = words.next()?.parse().ok()?;
    let month = words.next()?;
    let months = "JanFebMarAprMayJunJulAugSepOctNovDec";
    let month = i64::try_from(months.find(month)? / 3).ok()? + 1;
    let year: i64 = words.next()?.parse().ok()?;
    let mut time = words
        .next()?
        .splitn(3, ':')
        .map(|part| part.parse::<i64>().ok());
    let (hour, minute, second) = (time.next()??, time.next()??, time.next()??);
    // Civil date to days, in years that begin in March (Hinnant, "chrono-compatible low-level date
    // algorithms").
    let (y, m) = if month <= 2 {
        (year - 1, month + 9)
    } else {
        (year, month - 3)
    };
    let era = y.div_euclid(400);
    let year_of_era = y - era * 400;
    let day_of_year = (153 * m + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    let days = era * 146_097 + day_of_era - 719_468;
    Some(days * 86_400 + hour * 3_600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::super::items::Level;
    use super::*;

    #[test]
    fn dates_of_http() {
        assert_eq!(
            http_date("Sun, 06 Nov 1994 08:49:37 GMT"),
            Some(784_111_777)
        );
        assert_eq!(http_date("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        assert_eq!(
            http_date("Thu, 29 Feb 2024 12:34:56 GMT"),
            Some(1_709_210_096)
        );
        assert_eq!(http_date("yesterday"), None);
    }

    fn pod(value: serde_json::Value) -> Pod {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn pods_that_should_have_a_proxy() {
        let enabled = BTreeSet::from(["shop", "kube-system"]);
        let plain = |namespace: &str, labels: serde_json::Value| {
            pod(serde_json::json!({
                "metadata": {"name": "a", "namespace": namespace, "labels": labels},
                "spec": {"containers": [{"name": "app"}]},
            }))
        };
        let none = serde_json::json!({});
        assert!(lacks_proxy(&plain("shop", none.clone()), &enabled));
        assert!(!lacks_proxy(&plain("other", none.clone()), &enabled));
        assert!(!lacks_proxy(&plain("kube-system", none), &enabled));
        let own = |value: &str| serde_json::json!({INJECT: value});
        assert!(lacks_proxy(&plain("other", own("enabled")), &enabled));
        assert!(!lacks_proxy(&plain("shop", own("disabled")), &enabled));
        let host = pod(serde_json::json!({
            "metadata": {"name": "a", "namespace": "shop"},
            "spec": {"hostNetwork": true, "containers": [{"name": "app"}]},
        }));
        assert!(!lacks_proxy(&host, &enabled));
        let meshed = pod(serde_json::json!({
            "metadata": {"name": "a", "namespace": "shop"},
            "spec": {"containers": [{"name": "app"}], "initContainers": [{"name": "weft-proxy"}]},
        }));
        assert!(!lacks_proxy(&meshed, &enabled));
    }

    #[test]
    fn replicas_that_differ_are_named() {
        let status = |root: &str, services: usize| {
            serde_json::json!({
                "version": env!("CARGO_PKG_VERSION"), "ready": true, "proxies": [], "findings": [],
                "objects": {"services": services},
                "certificateAuthority": {"phase": "", "roots": [
                    {"id": root, "notAfter": 40 * DAY, "signing": true},
                ]},
            })
        };
        let answered = |all: &[serde_json::Value]| -> Vec<Answered> {
            all.iter()
                .enumerate()
                .map(|(n, status)| Answered {
                    name: format!("cp-{n}"),
                    own: serde_json::from_value(status.clone()).unwrap(),
                    all: serde_json::from_value(status.clone()).unwrap(),
                    skew: Some(0),
                })
                .collect()
        };
        let mut items = Items::default();
        agree(&answered(&[status("a", 3), status("a", 3)]), &mut items);
        assert_eq!(items.0[0].message, "2 agree: 3 services");
        let mut items = Items::default();
        agree(&answered(&[status("a", 3), status("b", 4)]), &mut items);
        assert_eq!(
            items.0[0].message,
            "cp-0 and cp-1 do not agree on the trusted roots, how many objects there are"
        );
        let mut items = Items::default();
        authority(&answered(&[status("a", 3)]), 0, &mut items);
        assert_eq!(items.0[0].message, "ends in 40 d 0 h (a, signs)");
        authority(&answered(&[status("a", 3)]), 15 * DAY, &mut items);
        assert_eq!(items.0[1].level, Level::Warning);
        authority(&answered(&[status("a", 3)]), 41 * DAY, &mut items);
        assert_eq!(items.0[2].level, Level::Error);
    }
}
