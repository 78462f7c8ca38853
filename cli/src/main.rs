//! The command line of Weft.

#![forbid(unsafe_code)]

mod apps;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "weft", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The applications of the demo.
    #[command(subcommand, hide = true)]
    App(apps::App),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    match cli.command {
        Command::App(app) => apps::run(app).await,
    }
}
