//! `weft explain`: why a connection is as it is ([`connection`]), and what an error of a proxy means
//! ([`codes`]).

pub mod codes;
pub mod connection;

use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::api::Api;
use serde::Deserialize;

use crate::Bad;
use crate::kube::pods::{self, is_running};
use crate::kube::target::{Kind, Target};
use crate::kube::{Cluster, Error, KubeArgs};
use crate::output::{Cell, Format, Paint, Tone, print_json, show, table};
use codes::{CODES, Code};
use connection::{Caller, CallersProxy, Destination, Verdict, Way, summary, verdicts};

/// Flags of `weft explain`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  weft explain deploy/front catalog:80           why is it plaintext, refused, to that endpoint?
  weft explain pod/front-1 db.data:5432 -n shop
  weft explain deploy/front 10.96.0.20:80
  weft explain connection_refused                what a code in Proxy-Status means, what to do
  weft explain codes                             all of them

The exit code is 1 when a connection would not come about.")]
pub struct Explain {
    /// A code of Proxy-Status (or 'codes'), or whose connection: deploy/NAME, pod/NAME…
    #[arg(value_name = "CODE|WORKLOAD")]
    what: String,
    #[allow(rustdoc::broken_intra_doc_links)] // As it is shown by --help.
    /// Where to: SERVICE[.NAMESPACE][:PORT] or ADDRESS:PORT
    #[arg(value_name = "DESTINATION")]
    destination: Option<String>,
    #[command(flatten)]
    kube: KubeArgs,
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

pub async fn run(args: Explain) -> anyhow::Result<ExitCode> {
    let Some(destination) = &args.destination else {
        return code(&args);
    };
    let target: Target = args.what.parse()?;
    let cluster = args.kube.connect().await?;
    let (name, address) = resolve(&cluster, destination).await?;
    let replicas = cluster.replicas().await?;
    let replica = replicas.first().context("no control plane")?;
    let path = format!("/explain?destination={}", crate::admin::encode(&name));
    let known: Destination = replica.admin.json(&path).await?;
    let caller = caller(&cluster, &target, &known, address).await?;
    let verdicts = verdicts(&caller, &known);
    let (works, sentence) = summary(&caller, &known, &verdicts);
    match args.output {
        Format::Json => print_json(&serde_json::json!({
            "caller": caller.workload,
            "identity": caller.proxy.as_ref().and_then(|proxy| proxy.identity.as_ref()),
            "destination": known.destination,
            "works": works,
            "summary": sentence,
            "policies": known.policies,
            "endpoints": verdicts,
        }))?,
        Format::Table => {
            let told = Told {
                caller: &caller,
                destination: &known,
                verdicts: &verdicts,
                works,
                sentence: &sentence,
            };
            show(&told.render(Paint::stdout()));
        }
    }
    Ok(if works {
        ExitCode::SUCCESS
    } else {
        Bad::exit()
    })
}

/// `weft explain CODE`.
fn code(args: &Explain) -> anyhow::Result<ExitCode> {
    let paint = Paint::stdout();
    if args.what == "codes" {
        match args.output {
            Format::Json => print_json(&CODES)?,
            Format::Table => show(&all_codes(paint)),
        }
        return Ok(ExitCode::SUCCESS);
    }
    let Some(code) = codes::find(&args.what) else {
        if args.what.parse::<Target>().is_ok() {
            bail!("say where to: weft explain {} SERVICE:PORT", args.what);
        }
        bail!(
            "there is no code '{}'; `weft explain codes` lists all, and a connection is explained \
             with weft explain deploy/NAME SERVICE:PORT",
            args.what
        );
    };
    match args.output {
        Format::Json => print_json(code)?,
        Format::Table => show(&one_code(code, paint)),
    }
    Ok(ExitCode::SUCCESS)
}

fn statuses(code: &Code) -> String {
    let statuses: Vec<String> = code.statuses.iter().map(u16::to_string).collect();
    statuses.join(", ")
}

fn all_codes(paint: Paint) -> String {
    let rows: Vec<Vec<Cell>> = CODES
        .iter()
        .map(|code| {
            let first = code
                .meaning
                .split_once(": ")
                .map_or(code.meaning, |(first, _)| first);
            vec![
                Cell::from(code.name),
                Cell::from(statuses(code)),
                Cell::from(first.trim_end_matches('.')),
            ]
        })
        .collect();
    table(&["CODE", "STATUS", "MEANING"], &rows, paint)
}

fn one_code(code: &Code, paint: Paint) -> String {
    let mut out = format!(
        "{} (HTTP {})\n\n{}\n\n",
        paint.paint(Tone::Strong, code.name),
        statuses(code),
        code.meaning
    );
    for help in code.help {
        let _ = writeln!(out, "- {help}");
    }
    out
}

/// The name by which the control plane knows a destination, and the address that the caller's
/// connection goes to, where that is known.
pub async fn resolve(
    cluster: &Cluster,
    given: &str,
) -> anyhow::Result<(String, Option<SocketAddr>)> {
    if let Ok(address) = given.parse::<SocketAddr>() {
        return Ok((given.to_owned(), Some(address)));
    }
    if given.parse::<IpAddr>().is_ok() {
        bail!("'{given}' is without a port: write {given}:PORT");
    }
    let (host, port) = match given.rsplit_once(':') {
        Some((host, port)) => {
            let number = port.parse::<u16>();
            (
                host,
                Some(number.with_context(|| format!("'{port}' is no port"))?),
            )
        }
        None => (given, None),
    };
    let mut labels = host.trim_end_matches('.').split('.');
    let name = labels.next().unwrap_or_default();
    let namespace = labels.next().unwrap_or(&cluster.namespace);
    let api: Api<Service> = Api::namespaced(cluster.client.clone(), namespace);
    let service = api
        .get_opt(name)
        .await
        .map_err(Error::api(format!("read Service {namespace}/{name}")))?
        .with_context(|| format!("there is no Service {name} in namespace {namespace}"))?;
    let spec = service.spec.unwrap_or_default();
    let ports: Vec<u16> = (spec.ports.iter().flatten())
        .filter_map(|port| u16::try_from(port.port).ok())
        .collect();
    let port = match (port, ports.as_slice()) {
        (Some(port), _) => port,
        (None, [one]) => *one,
        (None, _) => bail!("Service {namespace}/{name} has the ports {ports:?}: say which"),
    };
    let address = spec.cluster_ip.and_then(|ip| ip.parse::<IpAddr>().ok());
    let address = address.map(|ip| SocketAddr::new(ip, port));
    Ok((format!("{name}.{namespace}:{port}"), address))
}

/// The part of the caller's proxy's /config that is used here.
#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    identity: Option<Identity>,
    #[serde(default)]
    discovery: serde_json::Value,
    destinations: Vec<Known>,
}

#[derive(Deserialize)]
struct Identity {
    id: String,
}

#[derive(Deserialize)]
struct Known {
    address: String,
    namespace: String,
    service: String,
    port: u16,
    routes: Vec<KnownRoute>,
}

#[derive(Deserialize)]
struct KnownRoute {
    backends: Vec<KnownBackend>,
}

#[derive(Deserialize)]
struct KnownBackend {
    endpoints: Vec<KnownEndpoint>,
}

#[derive(Deserialize)]
struct KnownEndpoint {
    address: String,
    state: String,
}

impl Config {
    fn states(&self, of: &Destination) -> Option<Vec<(String, String)>> {
        let known = self.destinations.iter().find(|known| {
            let same = known.namespace == of.namespace
                && known.service == of.service
                && known.port == of.port;
            same || known.address == of.destination
        })?;
        let backends = known.routes.iter().flat_map(|route| &route.backends);
        let endpoints = backends.flat_map(|backend| &backend.endpoints);
        Some(
            endpoints
                .map(|endpoint| (endpoint.address.clone(), endpoint.state.clone()))
                .collect(),
        )
    }
}

/// The first running pod of the target, with what its proxy says.
async fn caller(
    cluster: &Cluster,
    target: &Target,
    destination: &Destination,
    address: Option<SocketAddr>,
) -> anyhow::Result<Caller> {
    if target.kind == Kind::Service {
        bail!("a Service makes no connections: name the workload, deploy/NAME");
    }
    let namespace = cluster.namespace.as_str();
    let all = cluster.pods(Some(namespace)).await?;
    let is = |pod: &&Pod| match target.kind {
        Kind::Pod => pod.metadata.name.as_ref() == Some(&target.name),
        _ => pods::owner(pod) == target.to_string(),
    };
    let pod = all
        .iter()
        .filter(|pod| is_running(pod))
        .find(is)
        .with_context(|| format!("no pod of {target} runs in namespace {namespace}"))?;
    let name = pod.metadata.name.clone().unwrap_or_default();
    let annotations = pod.metadata.annotations.iter().flatten();
    let excluded = address.and_then(|address| connection::excluded(annotations, address));
    let proxy = match pods::meshed(pod) {
        None => None,
        Some(meshed) => {
            let config: Config = cluster.proxy(&meshed).json("/config").await?;
            Some(CallersProxy {
                states: config.states(destination),
                connected: config.discovery["stream"] == "connected",
                identity: config.identity.map(|identity| identity.id),
            })
        }
    };
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    Ok(Caller {
        workload: format!("{namespace}/{name}"),
        node: node.unwrap_or_default(),
        proxy,
        excluded,
    })
}

/// Everything that is told of a connection.
struct Told<'a> {
    caller: &'a Caller,
    destination: &'a Destination,
    verdicts: &'a [Verdict],
    works: bool,
    sentence: &'a str,
}

impl Told<'_> {
    fn render(&self, paint: Paint) -> String {
        let mut out = String::new();
        let (caller, destination) = (self.caller, self.destination);
        let mut line = |name: &str, text: &str| {
            let _ = writeln!(out, "{name:<12} {text}");
        };
        line(
            "connection",
            &format!("{} -> {}", caller.workload, destination.destination),
        );
        let tone = if self.works { Tone::Good } else { Tone::Bad };
        line("is", &paint.paint(tone, self.sentence));
        match &caller.proxy {
            None => line(
                "caller",
                &paint.paint(
                    Tone::Warning,
                    "no proxy: it is not injected (weft.dev/inject)",
                ),
            ),
            Some(proxy) => {
                let identity = proxy.identity.as_deref().unwrap_or("no certificate yet");
                line("caller", identity);
                if !proxy.connected {
                    let text = "its proxy is not connected to the control plane: it goes on with what it knows";
                    line("", &paint.paint(Tone::Warning, text));
                }
                if let Some(excluded) = &caller.excluded {
                    let text = format!("not captured: {excluded}");
                    line("", &paint.paint(Tone::Warning, &text));
                }
                if destination.known && proxy.states.is_none() && caller.excluded.is_none() {
                    line(
                        "",
                        "its proxy has not called it lately: it will ask at the first connection",
                    );
                }
            }
        }
        if destination.known {
            line(
                "destination",
                &format!(
                    "{}/{}:{}, protocol {}",
                    destination.namespace,
                    destination.service,
                    destination.port,
                    destination.protocol
                ),
            );
            let routes: Vec<&str> = destination.routes.iter().map(|r| r.name.as_str()).collect();
            line("routes", &routes.join(", "));
            let policies = destination.policies.join(", ");
            line(
                "policies",
                if policies.is_empty() {
                    "none"
                } else {
                    &policies
                },
            );
        }
        if self.verdicts.is_empty() {
            return out;
        }
        let rows: Vec<Vec<Cell>> = self
            .verdicts
            .iter()
            .map(|verdict| {
                let (tone, way) = match verdict.way {
                    Way::MutualTls => (Tone::Good, "mutual TLS"),
                    Way::Plaintext => (Tone::Warning, "plaintext"),
                    Way::Refused => (Tone::Bad, "refused"),
                    Way::Unused => (Tone::Dim, "not used"),
                };
                let mut why = verdict.why.clone();
                if !verdict.policies.is_empty() {
                    let _ = write!(why, " ({})", verdict.policies.join(", "));
                }
                vec![
                    Cell::from(verdict.address.as_str()),
                    Cell::from(verdict.workload.as_str()),
                    Cell::new(tone, way),
                    Cell::from(why),
                ]
            })
            .collect();
        out.push('\n');
        out.push_str(&table(
            &["ENDPOINT", "WORKLOAD", "WAY", "WHY"],
            &rows,
            paint,
        ));
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_told() {
        let destination: Destination = serde_json::from_value(serde_json::json!({
            "destination": "cart.shop:80", "known": true, "namespace": "shop", "service": "cart",
            "port": 80, "protocol": "http", "policies": ["TrafficPolicy shop/cart"],
            "routes": [{"name": "Service/shop/cart", "backends": [{
                "namespace": "shop", "service": "cart", "port": 80, "endpoints": [{
                    "address": "10.0.0.1:8080", "workload": "shop/cart-1",
                    "identity": "spiffe://cluster.local/ns/shop/sa/cart", "health": "Ready",
                    "inbound": {"mtls": "STRICT", "policies": ["PeerAuthentication shop/strict"]},
                }],
            }]}],
        }))
        .unwrap();
        let caller = Caller {
            workload: "shop/front-1".to_owned(),
            ..Caller::default()
        };
        let verdicts = verdicts(&caller, &destination);
        let (works, sentence) = summary(&caller, &destination, &verdicts);
        let told = Told {
            caller: &caller,
            destination: &destination,
            verdicts: &verdicts,
            works,
            sentence: &sentence,
        };
        assert_eq!(
            told.render(Paint::NEVER),
            "\
connection   shop/front-1 -> cart.shop:80
is           refused by 1 of 1 endpoint
caller       no proxy: it is not injected (weft.dev/inject)
destination  shop/cart:80, protocol http
routes       Service/shop/cart
policies     TrafficPolicy shop/cart

ENDPOINT       WORKLOAD     WAY      WHY
10.0.0.1:8080  shop/cart-1  refused  the caller has no proxy, and the endpoint takes mutual TLS only (STRICT) (PeerAuthentication shop/strict)
"
        );
    }

    #[test]
    fn codes_are_listed_and_told() {
        let all = all_codes(Paint::NEVER);
        assert!(all.contains("http_request_error         400, 408, 431  The client's request could not be taken\n"), "{all}");
        let one = one_code(codes::find("connection_refused").unwrap(), Paint::NEVER);
        assert!(
            one.starts_with("connection_refused (HTTP 503)\n\nThe endpoint refused"),
            "{one}"
        );
    }
}
