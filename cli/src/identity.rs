//! `weft identity`: the root certificates of a mesh, and their rotation.
//!
//! On a cluster with the user's kubeconfig: the state is read from the Leases of the control plane's
//! replicas, each of which says what it knows; a rotation is asked for by an annotation of the Secret
//! with the certificate authority, which the leader takes up. Elsewhere by the control plane's data
//! directory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ::kube::api::{Api, ListParams, Patch, PatchParams};
use clap::{Args, Subcommand};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;
use serde_json::json;
use weft_api::names;
use weft_control_plane::serve::ca::{self, Request, Status};
use weft_control_plane::serve::replicas::{GONE, Record};

use crate::kube::{self, Cluster, KubeArgs, SYSTEM};
use crate::output::{Cell, Format, Paint, Tone, print_json, show, span, table};
use crate::{Bad, duration};

/// How often `--wait` looks.
const AGAIN: Duration = Duration::from_secs(1);

/// Subcommands of `weft identity`.
#[derive(Debug, Subcommand)]
pub enum Identity {
    /// The root certificates, who trusts them, and where a rotation is
    #[command(after_help = "\
Examples:
  weft identity status
  weft identity status --data-dir /var/lib/weft

The exit code is 1 when a root certificate has less than 30 days left.")]
    Status(StatusArgs),
    /// Replace the root certificate, without a failed request
    #[command(after_help = "\
Examples:
  weft identity rotate-root --wait       until every proxy has a certificate of the new root
  weft identity rotate-root --finish     stop trusting the old one now, not when its last
                                         certificate has expired

The new root is made known to every proxy before it signs anything; the old one is trusted until
the last certificate it has signed has expired. With --wait the exit code is 1 when that takes too
long.")]
    RotateRoot(RotateArgs),
}

/// Where the certificate authority is.
#[derive(Debug, Args)]
pub struct Where {
    /// Data directory of a control plane that runs outside Kubernetes
    #[arg(long, value_name = "DIR", env = "WEFT_DATA_DIR")]
    data_dir: Option<PathBuf>,
    /// Namespace of the control plane
    #[arg(long, value_name = "NAME", default_value = SYSTEM)]
    control_plane_namespace: String,
    #[command(flatten)]
    kube: KubeArgs,
}

#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    place: Where,
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, Args)]
pub struct RotateArgs {
    #[command(flatten)]
    place: Where,
    /// End the rotation under way now: certificates of the old root are no longer accepted
    #[arg(long)]
    finish: bool,
    /// Wait until every connected proxy has a certificate of the new root; with --finish, until the
    /// old one is no longer trusted
    #[arg(long)]
    wait: bool,
    /// How long to wait
    #[arg(long, value_name = "DURATION", default_value = "15m", value_parser = duration)]
    timeout: Duration,
}

/// What is known of the mesh's roots.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
struct Known {
    certificate_authority: Status,
    /// Of the control plane; empty when it is a data directory that is read.
    replicas: Vec<Record>,
    /// Name of the replica that leads.
    #[serde(skip_serializing_if = "Option::is_none")]
    leader: Option<String>,
}

impl Known {
    fn connected(&self) -> u64 {
        self.replicas.iter().map(|r| r.proxies.connected).sum()
    }

    fn trusting(&self) -> u64 {
        self.replicas.iter().map(|r| r.proxies.trusting).sum()
    }

    /// Connected proxies by the root of their certificate.
    fn by_root(&self) -> BTreeMap<&str, u64> {
        let mut sums = BTreeMap::new();
        for (root, number) in self.replicas.iter().flat_map(|r| &r.proxies.by_root) {
            *sums.entry(root.as_str()).or_default() += number;
        }
        sums
    }

    /// Id of the newest root.
    fn newest(&self) -> &str {
        let roots = &self.certificate_authority.roots;
        roots.last().map_or("", |root| root.id.as_str())
    }

    /// The newest root signs, everywhere, and every connected proxy has a certificate of it.
    fn moved(&self) -> bool {
        let newest = self.newest();
        let signs = |status: &Status| {
            let mut signing = status.roots.iter().filter(|root| root.signing);
            signing.all(|root| root.id == newest)
        };
        signs(&self.certificate_authority)
            && self
                .replicas
                .iter()
                .all(|replica| signs(&replica.authority))
            && self.by_root().keys().all(|root| *root == newest)
    }

    fn stable(&self) -> bool {
        let stable = |status: &Status| status.phase == "stable";
        stable(&self.certificate_authority) && self.replicas.iter().all(|r| stable(&r.authority))
    }
}

/// The certificate authority of a command.
enum Place<'a> {
    Folder(&'a Path),
    Cluster(Cluster, &'a str),
}

impl Where {
    async fn find(&self) -> anyhow::Result<Place<'_>> {
        match &self.data_dir {
            Some(path) => Ok(Place::Folder(path)),
            None if self.kube.is_there() => Ok(Place::Cluster(
                self.kube.connect().await?,
                &self.control_plane_namespace,
            )),
            None => anyhow::bail!(
                "there is no kubeconfig; name one with --kubeconfig, or the control plane's data directory with --data-dir"
            ),
        }
    }
}

impl Place<'_> {
    async fn known(&self) -> anyhow::Result<Known> {
        match self {
            Self::Folder(path) => Ok(Known {
                certificate_authority: ca::status(path)?,
                replicas: Vec::new(),
                leader: None,
            }),
            Self::Cluster(cluster, namespace) => in_cluster(cluster, namespace).await,
        }
    }

    async fn request(&self, request: Request) -> anyhow::Result<()> {
        match self {
            Self::Folder(path) => Ok(ca::request(path, request)?),
            Self::Cluster(cluster, namespace) => {
                let annotation = match request {
                    Request::Rotate => names::ROTATE_ANNOTATION,
                    Request::Finish => names::FINISH_ANNOTATION,
                };
                let now = Timestamp::now().to_string();
                let patch = json!({ "metadata": { "annotations": { annotation: now } } });
                let secrets = Api::<Secret>::namespaced(cluster.client.clone(), namespace);
                // Only the metadata comes back: the keys are nobody's business here.
                secrets
                    .patch_metadata(
                        names::CA_SECRET,
                        &PatchParams::default(),
                        &Patch::Merge(&patch),
                    )
                    .await
                    .map_err(kube::Error::api(format!(
                        "ask for it (patch the Secret {namespace}/{})",
                        names::CA_SECRET
                    )))?;
                Ok(())
            }
        }
    }
}

async fn in_cluster(cluster: &Cluster, namespace: &str) -> anyhow::Result<Known> {
    let leases = Api::<Lease>::namespaced(cluster.client.clone(), namespace);
    let listed = leases
        .list(&ListParams::default())
        .await
        .map_err(kube::Error::api(format!("list the Leases in {namespace}")))?;
    let mut leader = None;
    let mut replicas = Vec::new();
    for lease in listed {
        let spec = lease.spec.unwrap_or_default();
        if lease.metadata.name.as_deref() == Some(names::LEADER_LEASE) {
            leader = spec.holder_identity.filter(|holder| !holder.is_empty());
            continue;
        }
        // One that was killed leaves its record until the leader removes it.
        let age = spec.renew_time.map(|renewed| {
            let renewed = renewed.0.as_second();
            Timestamp::now().as_second().saturating_sub(renewed)
        });
        let fresh = age.is_some_and(|age| age < i64::try_from(GONE.as_secs()).unwrap_or(60));
        let annotations = lease.metadata.annotations.unwrap_or_default();
        let record = annotations
            .get(names::RECORD_ANNOTATION)
            .and_then(|text| serde_json::from_str::<Record>(text).ok());
        replicas.extend(record.filter(|_| fresh));
    }
    replicas.sort_by(|a, b| a.replica.cmp(&b.replica));
    let leads = |record: &&Record| Some(&record.replica) == leader.as_ref();
    let Some(first) = replicas.iter().find(leads).or(replicas.first()) else {
        anyhow::bail!(
            "no control plane has said anything in {namespace} within the last minute; is it running there? (kubectl -n {namespace} get pods)"
        );
    };
    Ok(Known {
        certificate_authority: first.authority.clone(),
        leader,
        replicas,
    })
}

pub async fn run(command: Identity) -> anyhow::Result<ExitCode> {
    match command {
        Identity::Status(args) => status(args).await,
        Identity::RotateRoot(args) => rotate(args).await,
    }
}

async fn status(args: StatusArgs) -> anyhow::Result<ExitCode> {
    let known = args.place.find().await?.known().await?;
    let now = now();
    match args.output {
        Format::Json => print_json(&known)?,
        Format::Table => show(&render(&known, now, Paint::stdout())),
    }
    let roots = &known.certificate_authority.roots;
    let short = roots
        .iter()
        .any(|root| root.signing && left(root.not_after, now) < ca::ROOT_WARNING.as_secs_f64());
    Ok(if short {
        Bad::exit()
    } else {
        ExitCode::SUCCESS
    })
}

async fn rotate(args: RotateArgs) -> anyhow::Result<ExitCode> {
    let place = args.place.find().await?;
    let before = place.known().await?;
    let paint = Paint::stdout();
    let request = match args.finish {
        true => Request::Finish,
        false => Request::Rotate,
    };
    match (request, before.certificate_authority.phase.as_str()) {
        (Request::Rotate, "stable") | (Request::Finish, "announcing" | "draining") => {
            place.request(request).await?;
        }
        (Request::Finish, _) => {
            show("No rotation is under way.\n");
            return Ok(ExitCode::SUCCESS);
        }
        (Request::Rotate, phase) if !args.wait => {
            anyhow::bail!(
                "a rotation is already under way ({phase}); it ends by itself, or now with --finish"
            );
        }
        (Request::Rotate, _) => {}
    }
    if !args.wait {
        show(
            "Asked for; the control plane takes it up within seconds. See weft identity status.\n",
        );
        return Ok(ExitCode::SUCCESS);
    }
    let deadline = tokio::time::Instant::now() + args.timeout;
    let mut said = None;
    loop {
        // Between two leaders nothing may be said for a moment.
        if let Ok(known) = place.known().await {
            let begun = args.finish || known.newest() != before.newest() || !before.stable();
            let done = match args.finish {
                true => known.stable(),
                false => begun && known.moved(),
            };
            let line = if begun {
                rotation(&known, now())
            } else {
                "Waiting for the leader to take it up.".to_owned()
            };
            // Without what only the clock changes.
            let news = Some((
                begun,
                known.certificate_authority.phase.clone(),
                known.trusting(),
                known.by_root().len(),
            ));
            if news != said && !done {
                show(&format!("{line}\n"));
                said = news;
            }
            if done {
                show(&render(&known, now(), paint));
                return Ok(ExitCode::SUCCESS);
            }
        }
        if tokio::time::Instant::now() >= deadline {
            eprintln!("weft: not done within {}", span(args.timeout.as_secs_f64()));
            return Ok(Bad::exit());
        }
        tokio::time::sleep(AGAIN).await;
    }
}

fn now() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs_f64()
}

/// Seconds left.
fn left(not_after: u64, now: f64) -> f64 {
    not_after as f64 - now
}

/// Where the rotation is, in a sentence.
fn rotation(known: &Known, now: f64) -> String {
    let authority = &known.certificate_authority;
    let connected = known.connected();
    let moved = known.by_root().get(known.newest()).copied().unwrap_or(0);
    match authority.phase.as_str() {
        "announcing" => {
            let trusting = known.trusting();
            let proxies = match known.replicas.is_empty() {
                true => String::new(),
                false => format!(" ({trusting} of {connected} do)"),
            };
            format!(
                "The new root is being made known: it signs when every connected proxy trusts it{proxies}."
            )
        }
        "draining" => {
            let expires = authority.old_leaves_expire.unwrap_or(0);
            let proxies = match known.replicas.is_empty() {
                true => String::new(),
                false => {
                    format!("; {moved} of {connected} connected proxies have a certificate of it")
                }
            };
            format!(
                "The new root signs{proxies}. The old one is trusted for another {} at most, until all have moved or the last certificate it has signed has expired.",
                span(left(expires, now).max(0.0))
            )
        }
        _ => "No rotation is under way.".to_owned(),
    }
}

/// For people; `now` in seconds since the Unix epoch.
fn render(known: &Known, now: f64, paint: Paint) -> String {
    let authority = &known.certificate_authority;
    let by_root = known.by_root();
    let roots: Vec<Vec<Cell>> = authority
        .roots
        .iter()
        .map(|root| {
            let left = left(root.not_after, now);
            let life = match left {
                left if left <= 0.0 => Cell::new(Tone::Bad, "expired"),
                left if left < ca::ROOT_WARNING.as_secs_f64() => {
                    Cell::new(Tone::Warning, span(left))
                }
                left => Cell::from(span(left)),
            };
            let state = match root.signing {
                true => Cell::new(Tone::Good, "signs"),
                false => Cell::from("trusted"),
            };
            let certificates = match known.replicas.is_empty() {
                true => Cell::new(Tone::Dim, "unknown"),
                false => Cell::from(by_root.get(root.id.as_str()).unwrap_or(&0).to_string()),
            };
            vec![
                Cell::from(root.id.as_str()),
                Cell::from(&root.fingerprint[..root.fingerprint.len().min(32)]),
                life,
                state,
                certificates,
            ]
        })
        .collect();
    let headings = ["ROOT", "SHA-256", "EXPIRES IN", "STATE", "PROXIES"];
    let mut out = table(&headings, &roots, paint);
    if !known.replicas.is_empty() {
        let replicas: Vec<Vec<Cell>> = known
            .replicas
            .iter()
            .map(|record| {
                let leads = known.leader.as_deref() == Some(&record.replica);
                let proxies = &record.proxies;
                let behind = proxies.connected - proxies.trusting.min(proxies.connected);
                vec![
                    Cell::from(record.replica.as_str()),
                    Cell::from(record.version.as_str()),
                    Cell::from(if leads { "leader" } else { "" }),
                    Cell::from(proxies.connected.to_string()),
                    match behind {
                        0 => Cell::new(Tone::Good, "trusted by all"),
                        _ => Cell::new(Tone::Warning, format!("{behind} have not heard of them")),
                    },
                    Cell::from(span(left(record.certificate_expires, now).max(0.0))),
                ]
            })
            .collect();
        out.push('\n');
        let headings = ["REPLICA", "VERSION", "", "PROXIES", "ROOTS", "CERTIFICATE"];
        out.push_str(&table(&headings, &replicas, paint));
    }
    out.push_str(&format!("\n{}\n", rotation(known, now)));
    out
}

#[cfg(test)]
mod tests {
    use weft_control_plane::serve::ca::RootStatus;
    use weft_control_plane::serve::replicas::Proxies;

    use super::*;

    const DAY: u64 = 86_400;

    fn status(phase: &str, signing: usize) -> Status {
        Status {
            trust_domain: "cluster.local".to_owned(),
            phase: phase.to_owned(),
            old_leaves_expire: (phase == "draining").then_some(10 + 3600),
            roots: ["old", "new"]
                .iter()
                .enumerate()
                .map(|(n, id)| RootStatus {
                    id: (*id).to_owned(),
                    fingerprint: format!("{n}a").repeat(32),
                    not_after: if n == 0 {
                        10 + 20 * DAY
                    } else {
                        10 + 3000 * DAY
                    },
                    signing: n == signing,
                })
                .collect(),
        }
    }

    fn record(replica: &str, status: Status, trusting: u64, by_root: &[(&str, u64)]) -> Record {
        Record {
            replica: replica.to_owned(),
            version: "0.1.0".to_owned(),
            authority: status,
            proxies: Proxies {
                connected: by_root.iter().map(|(_, number)| number).sum(),
                workloads: 0,
                trusting,
                by_root: by_root
                    .iter()
                    .map(|(id, n)| ((*id).to_owned(), *n))
                    .collect(),
            },
            certificate_expires: 10 + DAY,
        }
    }

    fn known(replicas: Vec<Record>) -> Known {
        Known {
            certificate_authority: replicas[0].authority.clone(),
            leader: Some("a".to_owned()),
            replicas,
        }
    }

    #[test]
    fn all_have_moved_when_every_replica_says_so() {
        let (before, after) = (status("announcing", 0), status("draining", 1));
        for (a, b, moved) in [
            (
                record("a", before.clone(), 1, &[("old", 1)]),
                record("b", before.clone(), 1, &[("old", 1)]),
                false,
            ),
            (
                record("a", after.clone(), 1, &[("new", 1)]),
                record("b", after.clone(), 2, &[("old", 1), ("new", 1)]),
                false,
            ),
            // One that has not heard of it signs with the old root still.
            (
                record("a", after.clone(), 1, &[("new", 1)]),
                record("b", before.clone(), 0, &[]),
                false,
            ),
            (
                record("a", after.clone(), 1, &[("new", 1)]),
                record("b", after.clone(), 1, &[("new", 1)]),
                true,
            ),
        ] {
            let known = known(vec![a, b]);
            assert_eq!(known.moved(), moved, "{known:?}");
            assert!(!known.stable());
        }
    }

    #[test]
    fn the_tables_say_where_the_rotation_is() {
        let known = known(vec![
            record("a", status("draining", 1), 3, &[("old", 1), ("new", 2)]),
            record("b", status("draining", 1), 1, &[("new", 2)]),
        ]);
        assert_eq!(
            render(&known, 10.0, Paint::NEVER),
            "\
ROOT  SHA-256                           EXPIRES IN  STATE    PROXIES
old   0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a  20 d 0 h    trusted  1
new   1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a  3000 d 0 h  signs    4

REPLICA  VERSION          PROXIES  ROOTS                     CERTIFICATE
a        0.1.0    leader  3        trusted by all            24 h 0 min
b        0.1.0            2        1 have not heard of them  24 h 0 min

The new root signs; 4 of 5 connected proxies have a certificate of it. The old one is trusted for another 1 h 0 min at most, until all have moved or the last certificate it has signed has expired.
"
        );
    }
}
