//! `weft status --wait-for httproute/cart`: has my change arrived?
//!
//! Every replica of the control plane knows its own proxies. An object has arrived when each replica
//! knows it as the apiserver has it (by `metadata.generation`), and every proxy whose tables come
//! from it has acknowledged them.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::Bad;
use crate::admin::Admin;
use crate::kube::pods::ask_all;
use crate::kube::{Cluster, Error};
use crate::output::{Format, count, print_json, show, span};
use crate::reach::Reach;

/// How often it is asked.
const AGAIN: Duration = Duration::from_millis(250);

/// What the control plane says at /arrival.
#[derive(Debug, Clone, Deserialize)]
struct Arrival {
    object: String,
    known: bool,
    #[serde(default)]
    generation: Option<i64>,
    #[serde(default)]
    unreadable: Option<NotHonoured>,
    /// Why it is used for nothing that it names, if it is.
    #[serde(default)]
    unused: Vec<String>,
    tables: Vec<Carried>,
}

/// Why the object as it is now is not in force.
#[derive(Debug, Clone, Deserialize)]
struct NotHonoured {
    generation: i64,
    why: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Carried {
    workload: String,
    kind: String,
    name: String,
    acknowledged: bool,
    #[serde(default)]
    refused: Option<String>,
}

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// There, at least of this generation; `None`: whichever.
    There(Option<i64>),
    /// It was taken away.
    Gone,
}

/// How far it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "camelCase")]
enum Progress {
    /// In force wherever it is used.
    Arrived { tables: usize, proxies: usize },
    /// A sentence about who it waits for.
    Waiting { why: String },
    /// The control plane refused it, or a proxy a table that comes from it.
    Refused { by: String, why: String },
}

/// The document of `--output json`.
#[derive(Serialize)]
struct Document<'a> {
    object: &'a str,
    seconds: f64,
    #[serde(flatten)]
    progress: &'a Progress,
}

/// Kinds that can be waited for, as they are called in the API.
fn resource(kind: &str) -> Option<ApiResource> {
    let (group, version, kind, plural) = match &*kind.to_ascii_lowercase() {
        "httproute" | "httproutes" => {
            ("gateway.networking.k8s.io", "v1", "HTTPRoute", "httproutes")
        }
        "grpcroute" | "grpcroutes" => {
            ("gateway.networking.k8s.io", "v1", "GRPCRoute", "grpcroutes")
        }
        "tlsroute" | "tlsroutes" => ("gateway.networking.k8s.io", "v1", "TLSRoute", "tlsroutes"),
        "tcproute" | "tcproutes" => ("gateway.networking.k8s.io", "v1", "TCPRoute", "tcproutes"),
        "trafficpolicy" | "trafficpolicies" => (
            weft_api::policy::GROUP,
            "v1alpha1",
            "TrafficPolicy",
            "trafficpolicies",
        ),
        "peerauthentication" | "peerauthentications" => (
            weft_api::policy::GROUP,
            "v1alpha1",
            "PeerAuthentication",
            "peerauthentications",
        ),
        "telemetry" | "telemetries" => (
            weft_api::policy::GROUP,
            "v1alpha1",
            "Telemetry",
            "telemetries",
        ),
        "egresspolicy" | "egresspolicies" => (
            weft_api::policy::GROUP,
            "v1alpha1",
            "EgressPolicy",
            "egresspolicies",
        ),
        "externalservice" | "externalservices" => (
            weft_api::policy::GROUP,
            "v1alpha1",
            "ExternalService",
            "externalservices",
        ),
        "xbackendtrafficpolicy" | "xbackendtrafficpolicies" | "xbtrafficpolicy" => (
            "gateway.networking.x-k8s.io",
            "v1alpha1",
            "XBackendTrafficPolicy",
            "xbackendtrafficpolicies",
        ),
        "service" | "services" | "svc" => ("", "v1", "Service", "services"),
        "endpointslice" | "endpointslices" => {
            ("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices")
        }
        "pod" | "pods" | "po" => ("", "v1", "Pod", "pods"),
        _ => return None,
    };
    let kind = GroupVersionKind::gvk(group, version, kind);
    Some(ApiResource::from_gvk_with_plural(&kind, plural))
}

/// Waits; the exit code says whether it arrived.
pub(super) async fn run(
    reach: &Reach,
    (object, namespace): (&str, &str),
    timeout: Duration,
    output: Format,
) -> anyhow::Result<ExitCode> {
    let kind = object.split_once('/').map(|(kind, _)| kind);
    let Some(resource) = kind.and_then(resource) else {
        bail!(
            "'{object}' cannot be waited for: write httproute/NAME, trafficpolicy/NAME, \
             peerauthentication/NAME, telemetry/NAME, externalservice/NAME, egresspolicy/NAME or \
             service/NAME"
        );
    };
    let began = Instant::now();
    let mut known_once = false;
    loop {
        let (wanted, namespace) = match reach {
            Reach::Direct(_) => (Wanted::There(None), namespace),
            Reach::Cluster(cluster) => (
                wanted(cluster, &resource, object).await?,
                &*cluster.namespace,
            ),
        };
        let path = format!("/arrival?object={object}&namespace={namespace}");
        let mut arrivals = Vec::new();
        for answer in ask_all(replicas(reach).await?, async |admin: Admin| {
            admin.json::<Arrival>(&path).await
        })
        .await
        {
            arrivals.push(answer?);
        }
        let known = (arrivals.iter()).any(|arrival| arrival.known || arrival.unreadable.is_some());
        if wanted == Wanted::Gone && !known && !known_once {
            bail!("there is no {object} in namespace {namespace}");
        }
        known_once |= known;
        let progress = judge(wanted, &arrivals);
        let waited = began.elapsed();
        let over = !matches!(progress, Progress::Waiting { .. }) || waited >= timeout;
        if over {
            let name = arrivals.first().map_or(object, |arrival| &arrival.object);
            match output {
                Format::Json => print_json(&Document {
                    object: name,
                    seconds: waited.as_secs_f64(),
                    progress: &progress,
                })?,
                Format::Table => show(&say(name, wanted, &progress, waited)),
            }
            return Ok(match progress {
                Progress::Arrived { .. } => ExitCode::SUCCESS,
                _ => Bad::exit(),
            });
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn replicas(reach: &Reach) -> Result<Vec<Admin>, Error> {
    Ok(match reach {
        Reach::Direct(admin) => vec![admin.clone()],
        Reach::Cluster(cluster) => {
            let replicas = cluster.replicas().await?;
            replicas.into_iter().map(|replica| replica.admin).collect()
        }
    })
}

/// The object as the apiserver has it now.
async fn wanted(cluster: &Cluster, of: &ApiResource, object: &str) -> anyhow::Result<Wanted> {
    let name = object.split_once('/').map_or(object, |(_, name)| name);
    let api: Api<DynamicObject> =
        Api::namespaced_with(cluster.client.clone(), &cluster.namespace, of);
    let found = api
        .get_metadata_opt(name)
        .await
        .map_err(Error::api(format!("read {object}")))
        .context("the object cannot be looked up")?;
    Ok(match found {
        Some(found) => Wanted::There(found.metadata.generation),
        None => Wanted::Gone,
    })
}

fn judge(wanted: Wanted, arrivals: &[Arrival]) -> Progress {
    let waiting = |why: String| Progress::Waiting { why };
    let total = arrivals.len();
    let of = |n: usize, what: &str| format!("{n} of {total} control plane replicas {what}");
    if let Wanted::There(generation) = wanted
        && let Some(unreadable) = arrivals.iter().find_map(|arrival| {
            let unreadable = arrival.unreadable.as_ref()?;
            let newer = generation.is_none_or(|wanted| unreadable.generation >= wanted);
            newer.then_some(unreadable)
        })
    {
        return Progress::Refused {
            by: "the control plane".to_owned(),
            why: unreadable.why.clone(),
        };
    }
    let behind = arrivals.iter().filter(|arrival| match wanted {
        Wanted::Gone => arrival.known,
        Wanted::There(generation) => {
            let old = arrival
                .generation
                .zip(generation)
                .is_some_and(|(a, b)| a < b);
            !arrival.known || old
        }
    });
    match (behind.count(), wanted) {
        (0, _) => {}
        (n, Wanted::Gone) => return waiting(of(n, "still know it")),
        (n, Wanted::There(_)) => return waiting(of(n, "do not know it yet as it is now")),
    }
    // What it names may come a moment later.
    if let Wanted::There(_) = wanted
        && let Some(unused) = arrivals.iter().find(|arrival| !arrival.unused.is_empty())
    {
        return waiting(format!("it is not used: {}", unused.unused.join("; ")));
    }
    let tables = || arrivals.iter().flat_map(|arrival| &arrival.tables);
    let refused = tables().find_map(|table| Some((table, table.refused.as_ref()?)));
    if let Some((table, why)) = refused {
        return Progress::Refused {
            by: table.workload.clone(),
            why: format!("{} {}: {why}", table.kind, table.name),
        };
    }
    let mut late: Vec<&str> = tables()
        .filter(|table| !table.acknowledged)
        .map(|table| table.workload.as_str())
        .collect();
    late.sort_unstable();
    late.dedup();
    match late.as_slice() {
        [] => {}
        [one] => return waiting(format!("{one} has not acknowledged it")),
        [one, rest @ ..] => {
            let rest = count(rest.len());
            return waiting(format!("{one} and {rest} more have not acknowledged it"));
        }
    }
    let mut users: Vec<&str> = tables().map(|table| table.workload.as_str()).collect();
    users.sort_unstable();
    users.dedup();
    Progress::Arrived {
        tables: tables().count(),
        proxies: users.len(),
    }
}

fn say(object: &str, wanted: Wanted, progress: &Progress, waited: Duration) -> String {
    let after = span(waited.as_secs_f64());
    let generation = match wanted {
        Wanted::There(Some(generation)) => format!(" (generation {generation})"),
        _ => String::new(),
    };
    let plural = |n: usize, one: &str, many: &str| {
        format!("{} {}", count(n), if n == 1 { one } else { many })
    };
    match progress {
        Progress::Arrived { .. } if wanted == Wanted::Gone => {
            format!("{object} is gone, after {after}.\n")
        }
        Progress::Arrived { tables: 0, .. } => format!(
            "{object}{generation} is known; no connected proxy has a table that comes from it. After {after}.\n"
        ),
        Progress::Arrived { tables, proxies } => format!(
            "{object}{generation} is in force: {} of {}, after {after}.\n",
            plural(*tables, "table", "tables"),
            plural(*proxies, "proxy", "proxies"),
        ),
        Progress::Waiting { why } => {
            format!("{object}{generation} has not arrived after {after}: {why}.\n")
        }
        Progress::Refused { by, why } => {
            format!("{object}{generation} was refused by {by}: {why}\n")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrival(known: bool, generation: Option<i64>, tables: &[(&str, bool)]) -> Arrival {
        Arrival {
            object: "TrafficPolicy shop/cart".to_owned(),
            known,
            generation,
            unreadable: None,
            unused: Vec::new(),
            tables: tables
                .iter()
                .map(|(workload, acknowledged)| Carried {
                    workload: (*workload).to_owned(),
                    kind: "Destination".to_owned(),
                    name: "10.96.0.1:80".to_owned(),
                    acknowledged: *acknowledged,
                    refused: None,
                })
                .collect(),
        }
    }

    #[test]
    fn it_has_arrived_when_every_replica_and_proxy_has_it() {
        let told = |wanted, arrivals: &[Arrival]| {
            let progress = judge(wanted, arrivals);
            say("TrafficPolicy shop/cart", wanted, &progress, AGAIN)
        };
        let third = Wanted::There(Some(3));
        let both = [("shop/a", true), ("shop/b", true)];
        for (wanted, arrivals, expected) in [
            (
                third,
                vec![arrival(true, Some(3), &both), arrival(true, Some(2), &[])],
                "TrafficPolicy shop/cart (generation 3) has not arrived after 250 ms: 1 of 2 control plane replicas do not know it yet as it is now.\n",
            ),
            (
                third,
                vec![
                    arrival(true, Some(3), &both),
                    arrival(true, Some(3), &[("shop/c", false)]),
                ],
                "TrafficPolicy shop/cart (generation 3) has not arrived after 250 ms: shop/c has not acknowledged it.\n",
            ),
            (
                third,
                vec![
                    arrival(true, Some(3), &both),
                    arrival(true, Some(4), &[("shop/c", true)]),
                ],
                "TrafficPolicy shop/cart (generation 3) is in force: 3 tables of 3 proxies, after 250 ms.\n",
            ),
            (
                third,
                vec![arrival(true, Some(3), &[])],
                "TrafficPolicy shop/cart (generation 3) is known; no connected proxy has a table that comes from it. After 250 ms.\n",
            ),
            (
                Wanted::Gone,
                vec![arrival(true, Some(3), &both), arrival(false, None, &[])],
                "TrafficPolicy shop/cart has not arrived after 250 ms: 1 of 2 control plane replicas still know it.\n",
            ),
            (
                Wanted::Gone,
                vec![arrival(false, None, &[])],
                "TrafficPolicy shop/cart is gone, after 250 ms.\n",
            ),
        ] {
            assert_eq!(told(wanted, &arrivals), expected);
        }
        let mut refused = arrival(true, Some(3), &both);
        refused.tables[1].refused = Some("a weight is missing".to_owned());
        assert_eq!(
            told(third, &[refused]),
            "TrafficPolicy shop/cart (generation 3) was refused by shop/b: Destination 10.96.0.1:80: a weight is missing\n"
        );
    }

    #[test]
    fn what_cannot_be_honoured_is_not_waited_for() {
        let mut refused = arrival(true, Some(2), &[("shop/a", true)]);
        refused.unreadable = Some(NotHonoured {
            generation: 3,
            why: "spec.mode: 'X' is no mode".to_owned(),
        });
        let told = |generation| {
            let wanted = Wanted::There(Some(generation));
            let progress = judge(wanted, std::slice::from_ref(&refused));
            say("EgressPolicy shop/a", wanted, &progress, AGAIN)
        };
        assert_eq!(
            told(3),
            "EgressPolicy shop/a (generation 3) was refused by the control plane: spec.mode: 'X' is no mode\n"
        );
        // Corrected meanwhile: the control plane does not know it yet.
        assert!(told(4).contains("has not arrived"), "{}", told(4));
    }

    #[test]
    fn what_is_not_used_has_not_arrived() {
        let mut arrival = arrival(true, Some(3), &[]);
        arrival.unused = vec!["there is no Service shop/cart".to_owned()];
        let told = |wanted| {
            let progress = judge(wanted, std::slice::from_ref(&arrival));
            assert!(matches!(progress, Progress::Waiting { .. }), "{progress:?}");
            say("TrafficPolicy shop/cart", wanted, &progress, AGAIN)
        };
        assert_eq!(
            told(Wanted::There(Some(3))),
            "TrafficPolicy shop/cart (generation 3) has not arrived after 250 ms: it is not used: there is no Service shop/cart.\n"
        );
    }

    #[test]
    fn kinds_are_found_in_the_api() {
        let route = resource("HTTPRoutes").unwrap();
        assert_eq!(
            (route.api_version.as_str(), route.plural.as_str()),
            ("gateway.networking.k8s.io/v1", "httproutes")
        );
        assert!(resource("configmap").is_none());
    }
}
