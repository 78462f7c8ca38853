//! `weft install` and `weft uninstall`: Helm is the way; these print its command, or run it.

use std::process::{Command, ExitCode};

use anyhow::Context;
use clap::Args;

use crate::kube::SYSTEM;
use crate::output::show;

/// Where the chart is published.
const CHART: &str = "oci://ghcr.io/weft-mesh/charts/weft";
/// Name of the release.
const RELEASE: &str = "weft";

/// Flags of both.
#[derive(Debug, Args)]
struct Helm {
    /// Run it instead of printing it; takes helm
    #[arg(long)]
    run: bool,
    /// Kubeconfig file [default: $KUBECONFIG, else ~/.kube/config]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<String>,
    /// Context of the kubeconfig
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
}

/// Flags of `weft install`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  weft install                               prints the command
  weft install --run -- --set controlPlane.replicas=3
  weft install --chart charts/weft --run -- -f values.yaml

Weft is installed, upgraded and removed with Helm. `weft check --pre` says before whether the
cluster is ready for it, `weft check` afterwards whether all is well.")]
pub struct Install {
    /// The chart: a folder, an archive or a reference
    #[arg(long, default_value = CHART)]
    chart: String,
    /// Version of the chart [default: this program's]
    #[arg(long)]
    version: Option<String>,
    #[command(flatten)]
    helm: Helm,
    /// More flags for helm
    #[arg(last = true)]
    more: Vec<String>,
}

/// Flags of `weft uninstall`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  weft uninstall
  weft uninstall --run

Take the sidecars out first: remove the label weft.dev/inject from the namespaces and restart their
workloads. Without the control plane proxies go on with what they know until their certificates end.")]
pub struct Uninstall {
    #[command(flatten)]
    helm: Helm,
    /// More flags for helm
    #[arg(last = true)]
    more: Vec<String>,
}

impl Install {
    fn arguments(&self) -> Vec<String> {
        let mut words = vec!["upgrade", "--install", RELEASE, &self.chart];
        words.extend(["--namespace", SYSTEM, "--create-namespace"]);
        let own = env!("CARGO_PKG_VERSION");
        // A folder is of one version.
        if self.chart.contains("://") {
            words.extend(["--version", self.version.as_deref().unwrap_or(own)]);
        }
        words.extend(["--wait"]);
        self.helm.finish(words, &self.more)
    }

    pub fn execute(&self) -> anyhow::Result<ExitCode> {
        self.helm.execute(&self.arguments())
    }
}

impl Uninstall {
    fn arguments(&self) -> Vec<String> {
        let words = vec!["uninstall", RELEASE, "--namespace", SYSTEM, "--wait"];
        self.helm.finish(words, &self.more)
    }

    pub fn execute(&self) -> anyhow::Result<ExitCode> {
        self.helm.execute(&self.arguments())
    }
}

impl Helm {
    fn finish(&self, words: Vec<&str>, more: &[String]) -> Vec<String> {
        let mut words: Vec<String> = words.into_iter().map(str::to_owned).collect();
        let flags = [
            ("--kubeconfig", &self.kubeconfig),
            ("--kube-context", &self.context),
        ];
        for (flag, value) in flags {
            if let Some(value) = value {
                words.extend([flag.to_owned(), value.clone()]);
            }
        }
        words.extend(more.iter().cloned());
        words
    }

    fn execute(&self, arguments: &[String]) -> anyhow::Result<ExitCode> {
        if !self.run {
            let words: Vec<String> = arguments.iter().map(|word| quote(word)).collect();
            show(&format!("helm {}\n", words.join(" ")));
            return Ok(ExitCode::SUCCESS);
        }
        let status = Command::new("helm")
            .args(arguments)
            .status()
            .context("helm cannot be run; is it installed? https://helm.sh/docs/intro/install")?;
        let code = status.code().and_then(|code| u8::try_from(code).ok());
        Ok(ExitCode::from(code.unwrap_or(1)))
    }
}

/// A word as a shell takes it.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    enum Flags {
        Install(Install),
        Uninstall(Uninstall),
    }

    fn command(line: &[&str]) -> String {
        let words = match Flags::parse_from([&["weft"], line].concat()) {
            Flags::Install(install) => install.arguments(),
            Flags::Uninstall(uninstall) => uninstall.arguments(),
        };
        let words: Vec<String> = words.iter().map(|word| quote(word)).collect();
        words.join(" ")
    }

    #[test]
    fn helm_is_the_way() {
        assert_eq!(
            command(&["install"]),
            format!(
                "upgrade --install weft oci://ghcr.io/weft-mesh/charts/weft --namespace weft-system --create-namespace --version {} --wait",
                env!("CARGO_PKG_VERSION")
            )
        );
        assert_eq!(
            command(&[
                "install",
                "--chart",
                "charts/weft",
                "--context",
                "kind",
                "--",
                "--set",
                "a={b c}"
            ]),
            "upgrade --install weft charts/weft --namespace weft-system --create-namespace --wait --kube-context kind --set 'a={b c}'"
        );
        assert_eq!(
            command(&["uninstall"]),
            "uninstall weft --namespace weft-system --wait"
        );
        assert_eq!(quote("it's"), r"'it'\''s'");
    }
}
