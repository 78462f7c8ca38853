use clap::Parser;

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    Init(weft_proxy::capture::command::Args),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Init(args) => weft_proxy::capture::command::run(&args),
    }
}
