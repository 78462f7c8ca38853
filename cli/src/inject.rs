//! `weft inject`: puts sidecars into the pods of manifests, as the webhook of a cluster does.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use weft_api::names::INJECTOR;
use weft_control_plane::cluster::version;
use weft_control_plane::inject::manifest::{Context, Note, inject_text};
use weft_control_plane::inject::settings::KEY;
use weft_control_plane::inject::{Settings, Version};

use crate::kube::{Error, KubeArgs, SYSTEM};
use crate::output::show;

/// Flags of `weft inject`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  weft inject -f app.yaml | kubectl apply -f -
  kubectl get deployment cart -o yaml | weft inject -f - | kubectl apply -f -
  weft inject -f app.yaml --settings settings.yaml --kubernetes-version 1.34

Pods, Deployments, ReplicaSets, StatefulSets, DaemonSets, Jobs, CronJobs and Lists get their
sidecars; everything else comes out as it went in. The result is what the webhook would make of it.
What was done is said on standard error. The exit code is 2 when nothing could be written.")]
pub struct Inject {
    /// File of manifests; - is standard input. May be repeated.
    #[arg(long = "filename", short = 'f', required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// What is put in: settings.yaml of the ConfigMap weft-injector. Default: the cluster's.
    #[arg(long, value_name = "FILE")]
    settings: Option<PathBuf>,
    /// Version of Kubernetes: from 1.29 on, sidecars are init containers. Default: the cluster's;
    /// with --settings, one that has them.
    #[arg(long, value_name = "VERSION")]
    kubernetes_version: Option<Version>,
    /// `--namespace` is that of objects that name none.
    #[command(flatten)]
    kube: KubeArgs,
}

/// What is put in, and where.
struct Known {
    settings: Settings,
    kubernetes: Version,
    namespace: String,
}

pub async fn run(args: Inject) -> anyhow::Result<ExitCode> {
    let known = known(&args).await?;
    let mut notes = Vec::new();
    let mut out = String::new();
    for file in &args.files {
        let context = Context {
            namespace: &known.namespace,
            kubernetes: known.kubernetes,
            settings: &known.settings,
        };
        let text = read(file)?;
        let done =
            inject_text(&text, context, &mut notes).with_context(|| file.display().to_string())?;
        if !out.is_empty() && !done.is_empty() {
            out.push_str("---\n");
        }
        out.push_str(&done);
    }
    show(&out);
    for note in &notes {
        eprintln!("{}", said(note));
    }
    if notes.is_empty() {
        eprintln!("nothing in it makes pods");
    }
    Ok(ExitCode::SUCCESS)
}

fn said(note: &Note) -> String {
    match &note.skipped {
        None => format!("{}: injected", note.object),
        Some(reason) => format!("{}: not injected: {reason}", note.object),
    }
}

fn read(file: &Path) -> anyhow::Result<String> {
    if file == Path::new("-") {
        let mut text = String::new();
        std::io::stdin()
            .read_to_string(&mut text)
            .context("reading standard input")?;
        return Ok(text);
    }
    std::fs::read_to_string(file).with_context(|| format!("{} cannot be read", file.display()))
}

/// The settings and the version: given, or the cluster's.
async fn known(args: &Inject) -> anyhow::Result<Known> {
    if let Some(file) = &args.settings {
        let settings = Settings::parse(&read(file)?).with_context(|| file.display().to_string())?;
        let namespace = args.kube.namespace.clone();
        return Ok(Known {
            settings,
            kubernetes: args.kubernetes_version.unwrap_or(Version::NATIVE_SIDECARS),
            namespace: namespace.unwrap_or_else(|| "default".to_owned()),
        });
    }
    let cluster = args.kube.connect().await.context(
        "without a cluster, give --settings (settings.yaml of the ConfigMap weft-injector)",
    )?;
    let kubernetes = match args.kubernetes_version {
        Some(version) => version,
        None => version::for_sidecars(&cluster.client).await?,
    };
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client, SYSTEM);
    let map = maps.get_opt(INJECTOR).await;
    let map = map.map_err(Error::api(format!("read ConfigMap {SYSTEM}/{INJECTOR}")))?;
    let text = map.and_then(|map| map.data?.remove(KEY)).with_context(|| {
        format!(
            "the cluster has no ConfigMap {SYSTEM}/{INJECTOR} with {KEY}: install Weft with Helm \
             first, or give --settings"
        )
    })?;
    Ok(Known {
        settings: Settings::parse(&text)?,
        kubernetes,
        namespace: cluster.namespace,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(files: Vec<PathBuf>, settings: Option<PathBuf>) -> Inject {
        Inject {
            files,
            settings,
            kubernetes_version: None,
            kube: KubeArgs::default(),
        }
    }

    #[tokio::test]
    async fn without_a_cluster() {
        let folder = tempfile::tempdir().unwrap();
        let settings = folder.path().join("settings.yaml");
        std::fs::write(&settings, "proxy: {image: 'weft-proxy:1'}\n").unwrap();
        let found = known(&args(Vec::new(), Some(settings.clone()))).await;
        let found = found.unwrap();
        assert_eq!(found.settings.proxy.image, "weft-proxy:1");
        assert_eq!(found.kubernetes, Version::NATIVE_SIDECARS);
        assert_eq!(found.namespace, "default");

        std::fs::write(&settings, "proxy: {img: x}\n").unwrap();
        let error = known(&args(Vec::new(), Some(settings.clone()))).await;
        let error = format!("{:#}", error.err().unwrap());
        assert!(
            error.contains("settings.yaml: the injection settings cannot be read"),
            "{error}"
        );

        let missing = run(args(vec!["/no/such.yaml".into()], Some(settings))).await;
        assert!(missing.is_err());
    }

    #[test]
    fn what_is_said() {
        let note = |skipped: Option<&str>| Note {
            object: "job/a".to_owned(),
            skipped: skipped.map(str::to_owned),
        };
        assert_eq!(said(&note(None)), "job/a: injected");
        assert_eq!(said(&note(Some("why"))), "job/a: not injected: why");
    }
}
