//! The application that `weft demo` runs: a small shop. Real servers on real sockets that know
//! nothing of the mesh: they call each other by Service names, and forward the `traceparent` header
//! as well-behaved applications do.
//!
//! - [`front`]: HTTP/1.1, what a browser sees; calls the others.
//! - [`catalog`]: HTTP/1.1, in two versions and several processes.
//! - [`pricing`]: gRPC, unary and streaming.
//! - [`ledger`]: TCP where the server speaks first, as MySQL and SMTP do.
//! - [`visitor`]: the load; says what became of each request, one JSON line each.
//!
//! [`knobs`] makes any of them misbehave: slow, or failing.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand};

pub mod catalog;
pub mod front;
mod http;
pub mod knobs;
pub mod ledger;
pub mod pricing;
pub mod visitor;

/// Generated from `cli/proto`.
#[allow(clippy::all, clippy::pedantic, clippy::unwrap_used)]
pub mod proto {
    tonic::include_proto!("weft.demo.v1");
}

/// `weft app …`
#[derive(Debug, Subcommand)]
pub enum App {
    /// The HTTP/1.1 front of the shop.
    Front(front::Front),
    /// The list of items.
    Catalog(catalog::Catalog),
    /// Prices, over gRPC.
    Pricing(pricing::Pricing),
    /// What was sold, over a protocol of lines in which the server speaks first.
    Ledger(ledger::Ledger),
    /// Load at a fixed rate.
    Visitor(visitor::Visitor),
    /// Hands spans to a collector outside the demo's network.
    Relay {
        /// http://HOST:PORT
        #[arg(long)]
        endpoint: String,
    },
}

/// What the servers have in common.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// Address to listen on.
    #[arg(long)]
    pub listen: SocketAddr,
    /// Name given in answers.
    #[arg(long, default_value = "app")]
    pub name: String,
    /// Unix socket on which misbehaviour is ordered (see `knobs`).
    #[arg(long)]
    pub control: Option<PathBuf>,
}

/// Runs one application until SIGTERM or SIGINT.
pub async fn run(app: App) -> anyhow::Result<()> {
    match app {
        App::Front(a) => front::run(a).await,
        App::Catalog(a) => catalog::run(a).await,
        App::Pricing(a) => pricing::run(a).await,
        App::Ledger(a) => ledger::run(a).await,
        App::Visitor(a) => visitor::run(a).await,
        App::Relay { endpoint } => crate::demo::relay::run(endpoint).await,
    }
}

/// Ends with the first SIGTERM or SIGINT.
pub async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        // No handlers: the signals' default action ends the process.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}

#[cfg(test)]
mod tests;
