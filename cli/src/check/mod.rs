//! `weft check`: what is wrong with a folder of manifests, without a running control plane; whether a
//! cluster is ready for the mesh ([`before`]); whether the mesh in a cluster is well ([`after`]).

mod after;
mod before;
mod items;
mod webhook;

use std::fmt::Write;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use serde::Serialize;
use weft_control_plane::check::{Report, check_folder, check_text};
use weft_control_plane::finding::{Finding, Severity};

use crate::Bad;
use crate::kube::KubeArgs;
use crate::output::{self, Format, Paint, Tone, print_json, show};
use items::Items;

/// Seconds.
const DAY: i64 = 86_400;
const HOUR: i64 = 3_600;

/// Flags of `weft check`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  weft check --pre                       is the cluster ready for Weft?
  weft check                             is the mesh in the cluster well?
  weft check -n shop --output json | jq '.checks[] | select(.level != \"ok\")'
  weft check examples/demo               what is wrong with these manifests? (without a cluster)
  weft check --output json policies/ | jq '.findings[].message'
  helm template shop | weft check -      the same of manifests on standard input
  kubectl get svc,endpointslices,trafficpolicies -o yaml | weft check -

For a folder it says what a control plane with it would say, with file and line. The exit code is 1
when there is an error; warnings alone are 0.")]
pub struct Check {
    /// Folder of manifests, or - for standard input; without it the cluster is checked
    path: Option<PathBuf>,
    /// Before installing
    #[arg(long, conflicts_with = "path")]
    pre: bool,
    #[command(flatten)]
    kube: KubeArgs,
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

/// The document of `--output json`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    errors: usize,
    warnings: usize,
    #[serde(flatten)]
    report: &'a Report,
}

pub async fn run(args: &Check) -> anyhow::Result<ExitCode> {
    match &args.path {
        Some(path) => folder(path, args.output),
        None => cluster(args).await,
    }
}

async fn cluster(args: &Check) -> anyhow::Result<ExitCode> {
    if !args.kube.is_there() {
        anyhow::bail!(
            "there is no kubeconfig: name one with --kubeconfig, or a folder of manifests"
        );
    }
    let cluster = args.kube.connect().await?;
    let mut items = Items::default();
    if args.pre {
        before::check(&cluster, &mut items).await?;
    } else {
        after::check(&cluster, &mut items).await?;
    }
    match args.output {
        Format::Json => print_json(&items.document())?,
        Format::Table => show(&items.render(Paint::stdout())),
    }
    Ok(if items.count(items::Level::Error) > 0 {
        Bad::exit()
    } else {
        ExitCode::SUCCESS
    })
}

/// How long something lives: well, soon at its end (seconds left, seconds to be warned at), or over.
fn life(what: &str, left: i64, warn: i64, help: &str, items: &mut Items) {
    let span = output::span(left as f64);
    if left <= 0 {
        items.error(
            what,
            format!("has ended {} ago", output::span(-left as f64)),
            help,
        );
    } else if left < warn {
        items.warning(what, format!("ends in {span}"), help);
    } else {
        items.ok(what, format!("ends in {span}"));
    }
}

/// What is wrong with manifests.
fn folder(path: &Path, output: Format) -> anyhow::Result<ExitCode> {
    let report = if path == Path::new("-") {
        let mut text = String::new();
        let read = std::io::stdin().lock().read_to_string(&mut text);
        read.context("standard input cannot be read")?;
        check_text(Path::new("<stdin>"), &text)
    } else {
        check_folder(path).with_context(|| format!("{} cannot be checked", path.display()))?
    };
    match output {
        Format::Json => print_json(&Document {
            errors: report.count(Severity::Error),
            warnings: report.count(Severity::Warning),
            report: &report,
        })?,
        Format::Table => show(&render(&report, Paint::stdout())),
    }
    Ok(if report.has_errors() {
        Bad::exit()
    } else {
        ExitCode::SUCCESS
    })
}

fn render(report: &Report, paint: Paint) -> String {
    let mut out = String::new();
    for finding in &report.findings {
        let _ = writeln!(out, "{}", one(finding, paint));
    }
    let (errors, warnings) = (
        report.count(Severity::Error),
        report.count(Severity::Warning),
    );
    let summary = format!(
        "{}, {}, {}.",
        number(report.objects, "object"),
        number(errors, "error"),
        number(warnings, "warning")
    );
    let tone = match (errors, warnings) {
        (0, 0) => Tone::Good,
        (0, _) => Tone::Warning,
        _ => Tone::Bad,
    };
    let _ = writeln!(out, "{}", paint.paint(tone, &summary));
    out
}

fn number(n: usize, of: &str) -> String {
    format!("{n} {of}{}", if n == 1 { "" } else { "s" })
}

/// Two lines, such that an editor finds the place in the first.
fn one(finding: &Finding, paint: Paint) -> String {
    let mut out = String::new();
    if let Some(file) = &finding.file {
        let _ = write!(out, "{}:", file.display());
        if let Some(line) = finding.line {
            let _ = write!(out, "{line}:");
        }
        out.push(' ');
    }
    let severity = match finding.severity {
        Severity::Error => paint.paint(Tone::Bad, "error"),
        Severity::Warning => paint.paint(Tone::Warning, "warning"),
    };
    let _ = write!(out, "{severity}: ");
    if let Some(object) = &finding.object {
        let _ = write!(out, "{}: ", paint.paint(Tone::Strong, object));
    }
    let _ = write!(
        out,
        "{}\n    {} {}",
        finding.message,
        paint.paint(Tone::Dim, "do:"),
        finding.help
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demos_manifests_are_right() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/demo");
        let report = check_folder(folder.as_ref()).unwrap();
        assert_eq!(report.findings, []);
        assert!(report.objects >= 16, "{}", report.objects);
    }

    #[test]
    fn a_mistake_is_named_with_its_line() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(
            folder.path().join("bad.yaml"),
            "apiVersion: policy.weft.dev/v1alpha1\n\
             kind: TrafficPolicy\n\
             metadata:\n  name: cart\n\
             spec:\n  timeouts:\n    request: 5 seconds\n",
        )
        .unwrap();
        let report = check_folder(folder.path()).unwrap();
        assert!(report.has_errors());
        let text = render(&report, Paint::NEVER);
        assert!(text.contains("bad.yaml:7: error: "), "{text}");
        assert!(text.contains("'5 seconds' is not a duration"), "{text}");
        assert!(text.contains("\n    do: "), "{text}");
        assert!(
            text.ends_with("0 objects, 1 error, 0 warnings.\n"),
            "{text}"
        );
    }

    #[test]
    fn a_folder_that_is_not_there_cannot_be_checked() {
        let error = folder("/nowhere/at/all".as_ref(), Format::Table).unwrap_err();
        let error = format!("{error:#}");
        assert!(
            error.contains("/nowhere/at/all cannot be checked"),
            "{error}"
        );
    }
}
