//! `weft routes`: what a proxy would do with a connection or a request, and why.
//!
//! - [`config`]: what the proxy says at /config that it knows
//! - [`request`]: the request that is asked about
//! - [`mod@judge`]: the way of a connection or request through it, as the proxy's own way out goes
//!   (`proxy/src/outbound`, `proxy/src/http/route`)
//! - [`text`]: what of it people read

mod config;
mod judge;
mod request;
#[cfg(test)]
mod tests;
mod text;

use std::process::ExitCode;

use clap::Args;

use self::config::Config;
use self::judge::judge;
use self::request::Request;
use self::text::{explain, list};
use crate::Bad;
use crate::kube::target::Target;
use crate::output::{Format, Paint, print_json, show};
use crate::reach::{ProxyArgs, Reach};

/// Flags of `weft routes`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  weft routes deploy/front                       every destination its proxies know
  weft routes deploy/front catalog:80            a connection of deploy/front to a Service
  weft routes pod/front-1 catalog.shop --request 'GET /items/3'
  weft routes deploy/front 10.96.0.20:80 --request 'GET /x canary: yes'
  weft routes catalog:80 --proxy http://10.210.0.2:15020
                                                 without a cluster: ask this proxy

A proxy knows what its application has called. Of several pods the first that knows the destination
is asked. The exit code is 1 when the request would fail: no route matches, or no endpoint is well.")]
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
    args: &ProxyArgs,
    target: Option<&Target>,
    destination: Option<&str>,
) -> anyhow::Result<Config> {
    let (cluster, target) = match (args.reach().await?, target) {
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

pub async fn run(args: Routes) -> anyhow::Result<ExitCode> {
    let (target, destination) = read(&args.what)?;
    let config = ask(&args.proxy, target.as_ref(), destination).await?;
    let paint = Paint::stdout();
    let Some(given) = destination else {
        match args.output {
            Format::Json => print_json(&config.destinations)?,
            Format::Table => show(&list(&config, paint)),
        }
        return Ok(ExitCode::SUCCESS);
    };
    let verdict = judge(&config, given, args.request.as_ref());
    match args.output {
        Format::Json => print_json(&verdict)?,
        Format::Table => show(&explain(&verdict, paint)),
    }
    Ok(if verdict.served {
        ExitCode::SUCCESS
    } else {
        Bad::exit()
    })
}
