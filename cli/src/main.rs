//! The command line of Weft.
//!
//! One file or folder for each command: [`demo`], [`run`]; [`check`], [`inject`], [`status`], [`routes`],
//! [`explain`], [`stat`], [`tap`], which ask control planes and proxies ([`reach`] says whom, [`admin`]
//! speaks to them, [`kube`] gets there on a cluster); [`install`].
//! [`netns`] makes network namespaces; [`apps`] are the applications of the demo.

#![deny(unsafe_code)]

use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

mod admin;
mod apps;
mod binaries;
mod check;
mod demo;
mod explain;
mod identity;
mod inject;
mod install;
mod kube;
// Its own tests (cli/tests/netns.rs) use all of it.
#[allow(unsafe_code, dead_code, unused_imports)]
mod netns;
mod output;
mod reach;
mod routes;
mod run;
mod stat;
mod status;
mod tap;

/// A service mesh of sidecar proxies: mutual TLS, retries, circuit breaking, balancing and tracing
/// for every connection, with nothing changed in the applications.
#[derive(Debug, Parser)]
#[command(
    name = "weft",
    version,
    propagate_version = false,
    after_help = "\
Examples:
  weft demo                              a mesh on this machine, driven through failures
  weft check examples/demo               what is wrong with a folder of manifests
  weft status                            which proxies have the latest tables
  weft completions bash > /etc/bash_completion.d/weft

Exit codes: 0 is well; 1, the thing asked about is not; 2, it could not be done."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// A small shop behind a mesh, on this machine, driven through failures
    Demo(demo::Demo),
    /// Run a program behind a sidecar of its own, joined to a control plane
    Run(run::Run),
    /// What is wrong with the mesh, with a cluster before installing, or with a folder of manifests
    Check(check::Check),
    /// Put sidecars into the pods of manifests, as the webhook of a cluster does
    Inject(inject::Inject),
    /// Which proxies are connected, and what each has acknowledged
    Status(status::StatusArgs),
    /// What a proxy would do with a connection or a request, and why
    Routes(routes::Routes),
    /// Why a connection is as it is; what an error of a proxy means
    Explain(explain::Explain),
    /// Requests a second, success, latency, mutual TLS, from the proxies' own metrics
    Stat(stat::Stat),
    /// `weft stat`, live
    Top(stat::Top),
    /// The root certificates of the mesh, and their rotation
    #[command(subcommand)]
    Identity(identity::Identity),
    /// Live requests of a workload, as they end
    Tap(tap::Tap),
    /// How to install or upgrade Weft in a cluster: with Helm
    Install(install::Install),
    /// How to remove it
    Uninstall(install::Uninstall),
    /// Completions for a shell, on standard output
    #[command(after_help = "\
Examples:
  weft completions bash > /etc/bash_completion.d/weft
  weft completions zsh > \"${fpath[1]}/_weft\"
  weft completions fish > ~/.config/fish/completions/weft.fish")]
    Completions { shell: Shell },
    /// The version of this program
    Version,
    /// The applications of the demo
    #[command(subcommand, hide = true)]
    App(apps::App),
}

/// Exit codes.
struct Bad;

impl Bad {
    /// The thing asked about is bad.
    const BAD: u8 = 1;
    /// It could not be found out or done.
    const CANNOT: u8 = 2;

    fn exit() -> ExitCode {
        ExitCode::from(Self::BAD)
    }
}

/// "30s", "500ms", "1m30s": as durations are written in manifests.
fn duration(given: &str) -> Result<Duration, String> {
    given
        .parse::<weft_api::policy::Duration>()
        .map(weft_api::policy::Duration::as_std)
        .map_err(|e| e.to_string())
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    log(&cli.command);
    let (outcome, cannot): (anyhow::Result<ExitCode>, fn(&anyhow::Error) -> u8) = match cli.command
    {
        // These enter namespaces, which must be done before there are threads.
        Command::Demo(args) => (demo::run(args), demo::exit_code),
        Command::Run(args) => (run::run(args), |_| Bad::CANNOT),
        other => (on_runtime(other), |_| Bad::CANNOT),
    };
    outcome.unwrap_or_else(|e| {
        eprintln!("weft: {e:#}");
        ExitCode::from(cannot(&e))
    })
}

#[tokio::main(flavor = "current_thread")]
async fn on_runtime(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Demo(_) | Command::Run(_) => unreachable!("handled before the runtime is made"),
        Command::Check(args) => return check::run(&args).await,
        Command::Inject(args) => return inject::run(args).await,
        Command::Routes(args) => return routes::run(args).await,
        Command::Stat(args) => return stat::run(args).await,
        Command::Top(args) => return stat::top(args).await,
        Command::Explain(args) => return explain::run(args).await,
        Command::Install(args) => return args.execute(),
        Command::Uninstall(args) => return args.execute(),
        Command::Tap(args) => return tap::run(args).await,
        Command::Status(args) => return status::run(args).await,
        Command::Identity(command) => return identity::run(command).await,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "weft", &mut script);
            output::show(&String::from_utf8_lossy(&script));
        }
        Command::Version => output::show(&format!("weft {}\n", env!("CARGO_PKG_VERSION"))),
        Command::App(app) => apps::run(app).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Warnings on standard error; RUST_LOG says otherwise.
fn log(command: &Command) {
    use tracing_subscriber::EnvFilter;
    let default = match command {
        Command::App(_) => "info",
        _ => "warn",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(output::Paint::stderr() != output::Paint::NEVER)
        .init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    /// Where `--help` wraps by itself: what is laid out by hand stays as it is.
    const WIDTH: usize = 100;

    #[test]
    fn examples_are_no_wider_than_the_page() {
        let mut commands = vec![Cli::command()];
        while let Some(command) = commands.pop() {
            let text = command.get_after_help().map(ToString::to_string);
            for line in text.unwrap_or_default().lines() {
                let name = command.get_name();
                assert!(line.chars().count() <= WIDTH, "{name}: {line}");
            }
            commands.extend(command.get_subcommands().cloned());
        }
    }
}
