//! The data plane's binary.

use clap::{Parser, Subcommand};
use weft_proxy::config::Config;
use weft_proxy::telemetry::log;
use weft_proxy::{capture, run, wait};

/// Weft's transparent proxy: runs beside a workload and carries its connections.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the proxy.
    Run(Box<Config>),
    /// Set up, check or remove the netfilter rules that hand connections to the proxy.
    Init(capture::command::Args),
    /// Wait until the proxy is ready, or until the application has ended: for lifecycle hooks.
    Wait(wait::Command),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Run(config) => {
            let log = log::init(&config.log)?;
            run::run(*config, log)
        }
        Command::Init(args) => {
            log::init("info")?;
            capture::command::run(&args)
        }
        Command::Wait(command) => wait::run(&command),
    }
}
