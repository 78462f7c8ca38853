//! `weft routes`: what a proxy would do with a connection or a request, and why.
//!
//! - [`config`]: what the proxy says at /config that it knows
//! - [`request`]: the request that is asked about
//! - [`mod@judge`]: the way of a connection or request through it, as the proxy's own way out goes
//!   (`proxy/src/outbound`, `proxy/src/http/route`)
//! - [`inbound`]: what the proxies of its endpoints do with it
//! - [`text`]: what of it people read

mod config;
mod inbound;
mod judge;
mod request;
#[cfg(test)]
mod tests;
mod text;

use std::process::ExitCode;

use anyhow::Context;
use clap::Args;

use self::config::Config;
use self::inbound::{Caller, Client, Side};
use self::judge::{Verdict, judge};
use self::request::Request;
use self::text::{explain, list};
use crate::Bad;
use crate::kube::target::{NoPods, Target};
use crate::output::{Format, Paint, print_json, show};
use crate::reach::{ControlPlaneUrl, ProxyArgs, Reach};

/// Flags of `weft routes`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  weft routes deploy/front                       every destination its proxies know
  weft routes deploy/front catalog:80            a connection of deploy/front to a Service
  weft routes pod/front-1 catalog.shop --request 'GET /items/3'
  weft routes deploy/front 10.96.0.20:80 --request 'GET /x canary: yes'
  weft routes catalog:80 --proxy http://10.210.0.2:15020 \\
      --control-plane http://10.210.0.1:15014
                                                 without a cluster: ask these

A proxy knows what its application has called. Of several pods the first that knows the destination
is asked. The control plane is asked what the proxies of the endpoints do: mutual TLS, rate limits,
size of heads. Pods without a proxy come to a Service's own endpoints, and only those proxies have a
say. The exit code is 1 when the request would fail: no route matches, no endpoint is
well, or their proxies refuse it.")]
pub struct Routes {
    /// Whose connection (deploy/NAME, sts/NAME, pod/NAME…; not with --proxy), and where to:
    #[allow(rustdoc::broken_intra_doc_links)] // As it is shown by --help.
    /// SERVICE[.NAMESPACE][:PORT] or ADDRESS:PORT, as the application connects to it
    #[arg(value_name = "[WORKLOAD] [DESTINATION]", num_args = 0..=2)]
    what: Vec<String>,
    /// A request: METHOD PATH [NAME: VALUE]…
    #[arg(long, value_name = "REQUEST", requires = "what")]
    request: Option<Request>,
    #[command(flatten)]
    control_plane: ControlPlaneUrl,
    /// Of a client that has no proxy: what the destination's proxies do with it
    #[arg(long, requires = "what")]
    without_proxy: bool,
    #[command(flatten)]
    proxy: ProxyArgs,
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

/// Whose connection, and where to.
fn read(what: &[String]) -> anyhow::Result<(Option<Target>, Option<&str>)> {
    Ok(match what {
        [] => (None, None),
        [one] if one.contains('/') => (Some(one.parse()?), None),
        [one] => (None, Some(one)),
        [workload, destination, ..] => (Some(workload.parse()?), Some(destination)),
    })
}

/// What the proxy knows; of several the first that knows the destination.
async fn ask(
    reach: &Reach,
    target: Option<&Target>,
    destination: Option<&str>,
) -> anyhow::Result<Config> {
    let (cluster, target) = match (reach, target) {
        (Reach::Direct(admin), _) => return Ok(admin.json("/config").await?),
        (Reach::Cluster(_), None) => {
            anyhow::bail!("say whose connection: weft routes deploy/NAME [DESTINATION]")
        }
        (Reach::Cluster(cluster), Some(target)) => (cluster, target),
    };
    let mut first = None;
    for pod in cluster.pods_of(target).await? {
        let config: Config = cluster.proxy(&pod).json("/config").await?;
        if destination.is_none_or(|destination| config.find(destination).is_some()) {
            return Ok(config);
        }
        first.get_or_insert(config);
    }
    first.ok_or_else(|| anyhow::anyhow!("{target} has no pod"))
}

/// What the proxies do that a request comes to; `None` when it comes to none.
async fn destinations_side(
    args: &Routes,
    reach: &Reach,
    config: &Config,
    verdict: &Verdict<'_>,
) -> anyhow::Result<Option<Side>> {
    let (Some(destination), Some(route)) = (verdict.destination, verdict.arrives_by()) else {
        return Ok(None);
    };
    let named = args.control_plane.admin()?;
    let client = Client::Of(&config.workload.namespace);
    let asked = inbound::ask(reach, named.as_ref(), &destination.address, client);
    Ok(Some(match asked.await {
        Ok(explained) => {
            let caller = Caller {
                identity: config.identity.as_ref().map(|identity| &*identity.id),
                request: args.request.as_ref(),
                opaque: destination.is_opaque(),
            };
            inbound::judge(route, &explained, caller)
        }
        // Whoever names it wants to hear it.
        Err(why) if named.is_some() => anyhow::bail!(why),
        Err(why) => Side::unknown(why),
    }))
}

/// What becomes of a connection or request of somebody without a proxy.
async fn bare(args: &Routes, reach: &Reach, given: &str) -> anyhow::Result<Verdict<'static>> {
    let named = args.control_plane.admin()?;
    let name = match reach {
        Reach::Cluster(cluster) if named.is_none() => {
            crate::explain::resolve(cluster, given).await?.0
        }
        _ => given.to_owned(),
    };
    let asked = inbound::ask(reach, named.as_ref(), &name, Client::WithoutProxy);
    let explained = asked.await.map_err(anyhow::Error::msg)?;
    anyhow::ensure!(
        explained.known,
        "no Service and no workload of the mesh has this address or name and port: {name}"
    );
    let side = inbound::judge_direct(&explained, args.request.as_ref());
    Ok(Verdict::bare(&explained).with(side))
}

fn tell(verdict: &Verdict<'_>, output: Format) -> anyhow::Result<ExitCode> {
    match output {
        Format::Json => print_json(verdict)?,
        Format::Table => show(&explain(verdict, Paint::stdout())),
    }
    Ok(if verdict.served {
        ExitCode::SUCCESS
    } else {
        Bad::exit()
    })
}

pub async fn run(args: Routes) -> anyhow::Result<ExitCode> {
    let (target, destination) = read(&args.what)?;
    let reach = args.proxy.reach().await?;
    if args.without_proxy {
        let given = destination.context("say where to: SERVICE.NAMESPACE:PORT")?;
        return tell(&bare(&args, &reach, given).await?, args.output);
    }
    let config = match (ask(&reach, target.as_ref(), destination).await, destination) {
        (Ok(config), _) => config,
        (Err(error), Some(given)) if is_bare(&error) => {
            return tell(&bare(&args, &reach, given).await?, args.output);
        }
        (Err(error), _) => return Err(error),
    };
    let Some(given) = destination else {
        match args.output {
            Format::Json => print_json(&config.destinations)?,
            Format::Table => show(&list(&config, Paint::stdout())),
        }
        return Ok(ExitCode::SUCCESS);
    };
    let mut verdict = judge(&config, given, args.request.as_ref());
    if let Some(side) = destinations_side(&args, &reach, &config, &verdict).await? {
        verdict = verdict.with(side);
    }
    tell(&verdict, args.output)
}

/// Whether nobody could be asked because the caller's pods have no proxy.
fn is_bare(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(NoPods::NotMeshed { .. }))
}
