//! What runs in the pods of the tests on Kubernetes: a server, a client that keeps count, and an ear
//! on the wire.

#![allow(clippy::unwrap_used)] // For tests only.

mod listen;
mod load;
mod serve;
mod tls;

use clap::Parser;

#[derive(Parser)]
enum Probe {
    /// HTTP/1.1 and HTTP/2 on one port, a TCP server that speaks first on another
    Serve(serve::Options),
    /// Sends requests at a steady rate; what became of them, as one line of JSON
    Load(load::Options),
    /// Opens a TCP connection, reads the greeting, says a line and reads the answer
    Greet {
        /// host:port
        to: String,
        /// So many connections, one after another
        #[arg(long, default_value_t = 1)]
        count: u32,
    },
    /// Kills (SIGKILL) the processes of this host that have a variable, `NAME=value`
    Kill { variable: String },
    /// Looks for bytes on every network device of the host
    Listen(listen::Options),
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    match Probe::parse() {
        Probe::Serve(options) => serve::run(options).await,
        Probe::Load(options) => load::run(options).await,
        Probe::Greet { to, count } => load::greet(&to, count).await,
        Probe::Kill { variable } => kill(&variable),
        Probe::Listen(options) => listen::run(&options),
    }
}

/// Needs the host's processes in sight, and the right to read their environment.
fn kill(variable: &str) {
    let mut killed = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else {
            continue;
        };
        let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        if environment
            .split(|b| *b == 0)
            .any(|pair| pair == variable.as_bytes())
        {
            let signal = nix::sys::signal::Signal::SIGKILL;
            if nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).is_ok() {
                killed.push(pid);
            }
        }
    }
    println!("{}", serde_json::json!({ "killed": killed }));
}
