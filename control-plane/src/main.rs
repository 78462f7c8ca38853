//! The control plane's command line.

#![forbid(unsafe_code)]

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;
use tracing_subscriber::EnvFilter;
use weft_api::names::{CONTROL_ADMIN_PORT, CONTROL_PORT, DEFAULT_TRUST_DOMAIN};
use weft_control_plane::serve::ca::{self, Authority};
use weft_control_plane::serve::{Config, IdentityConfig, Server, SourceConfig, webhook};
use weft_control_plane::sources::kubernetes;

/// Watches services and policies, tells proxies what to do, issues certificates.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: Serve,
}

#[derive(Args)]
struct Serve {
    /// Where services and policies come from: folder:PATH, kubernetes (the current context of
    /// KUBECONFIG, or the cluster it runs in) or kubernetes:CONTEXT
    #[arg(long, env = "WEFT_SOURCE", value_parser = source, required = true)]
    source: Option<SourceConfig>,
    #[command(flatten)]
    data: Data,
    /// Where the certificate authority is and who workloads are: folder (files in --data-dir, our
    /// own tokens) or kubernetes (a Secret, service account tokens) [default: as the source]
    #[arg(long, env = "WEFT_IDENTITY", value_enum)]
    identity: Option<IdentitySource>,
    /// Secret with your own certificate authority (tls.crt, tls.key, ca.crt), in the control
    /// plane's namespace; without it, one is made. Only with --identity kubernetes
    #[arg(long, env = "WEFT_CA_SECRET")]
    ca_secret: Option<String>,
    /// Address of discovery and identity (gRPC over TLS)
    #[arg(long, env = "WEFT_LISTEN", default_value_t = SocketAddr::from(([0, 0, 0, 0], CONTROL_PORT)))]
    listen: SocketAddr,
    /// Address of health, metrics and status (plain HTTP)
    #[arg(long, env = "WEFT_ADMIN", default_value_t = SocketAddr::from(([127, 0, 0, 1], CONTROL_ADMIN_PORT)))]
    admin: SocketAddr,
    /// Address of the admission webhook that puts sidecars into pods (HTTPS); none: there is no
    /// webhook
    #[arg(long, env = "WEFT_WEBHOOK", requires = "injector_settings")]
    webhook: Option<SocketAddr>,
    /// File with what is put into pods: settings.yaml of the ConfigMap weft-injector
    #[arg(long, env = "WEFT_INJECTOR_SETTINGS")]
    injector_settings: Option<PathBuf>,
    /// Lifetime of workload certificates, such as 24h or 10m; at least 1m
    #[arg(long, env = "WEFT_CERTIFICATE_LIFETIME", value_parser = duration, default_value = "24h")]
    certificate_lifetime: Duration,
    /// Share of the requests without a sampling decision of their own that are traced, percent, when
    /// no Telemetry says otherwise
    #[arg(long, env = "WEFT_SAMPLING_PERCENT", value_parser = percent, default_value = "1")]
    sampling_percent: f64,
    /// What is logged: error, warn, info, debug, or a tracing filter
    #[arg(long, env = "WEFT_LOG_LEVEL", default_value = "info")]
    log_level: String,
    /// How it is logged
    #[arg(long, env = "WEFT_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum IdentitySource {
    Folder,
    Kubernetes,
}

#[derive(Args, Clone)]
struct Data {
    /// Directory of the certificate authority; made when it is not there
    #[arg(long, env = "WEFT_DATA_DIR", default_value = "/var/lib/weft")]
    data_dir: PathBuf,
    /// Trust domain of all identities
    #[arg(long, env = "WEFT_TRUST_DOMAIN", default_value = DEFAULT_TRUST_DOMAIN)]
    trust_domain: String,
}

#[derive(Subcommand)]
enum Command {
    /// Print a token with which a workload's proxy gets its certificate
    Token {
        #[command(flatten)]
        data: Data,
        /// Namespace of the workload
        #[arg(long, default_value = "default")]
        namespace: String,
        /// Service account of the workload
        #[arg(long, default_value = "default")]
        service_account: String,
        /// Name of the workload, for the log (optional)
        #[arg(long)]
        workload: Option<String>,
        /// How long the token is valid
        #[arg(long, value_parser = duration, default_value = "24h")]
        expires: Duration,
    },
    /// Print the trusted root certificates (PEM); also kept in DATA_DIR/root.pem
    TrustRoot {
        #[command(flatten)]
        data: Data,
    },
    /// Ask a control plane's admin port whether it is ready; the exit code says so
    Ready {
        /// host:port
        #[arg(default_value_t = format!("127.0.0.1:{CONTROL_ADMIN_PORT}"))]
        address: String,
    },
    /// Begin to replace the root certificate; a running control plane takes it up within seconds
    RotateRoot {
        #[command(flatten)]
        data: Data,
        /// End the rotation under way now: certificates of the old root are no longer accepted
        #[arg(long)]
        finish: bool,
    },
}

fn percent(given: &str) -> Result<f64, String> {
    match given.parse() {
        Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(percent),
        _ => Err("write a number from 0 to 100".to_owned()),
    }
}

fn source(given: &str) -> Result<SourceConfig, String> {
    match given.split_once(':') {
        Some(("folder", path)) if !path.is_empty() => Ok(SourceConfig::Folder(path.into())),
        None if given == "kubernetes" => {
            Ok(SourceConfig::Kubernetes(kubernetes::Options::default()))
        }
        Some(("kubernetes", context)) if !context.is_empty() => {
            Ok(SourceConfig::Kubernetes(kubernetes::Options {
                context: Some(context.to_owned()),
            }))
        }
        _ => Err("write folder:PATH, kubernetes or kubernetes:CONTEXT".to_owned()),
    }
}

fn duration(given: &str) -> Result<Duration, String> {
    given
        .parse::<weft_api::policy::Duration>()
        .map(weft_api::policy::Duration::as_std)
        .map_err(|error| error.to_string())
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        Some(command) => run(command),
        None => serve(cli.serve),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weft-control-plane: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn open(data: &Data) -> anyhow::Result<Authority> {
    let options = ca::Options {
        trust_domain: data.trust_domain.clone(),
        // Does not lengthen what the control plane itself was told.
        lifetime: ca::MIN_LIFETIME,
    };
    Ok(Authority::open(&data.data_dir, options)?)
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Token {
            data,
            namespace,
            service_account,
            workload,
            expires,
        } => {
            let token = open(&data)?.issue_token(
                &namespace,
                &service_account,
                workload.as_deref(),
                expires,
                SystemTime::now(),
            )?;
            println!("{token}");
        }
        Command::Ready { address } => ready(&address)?,
        Command::TrustRoot { data } => print!("{}", open(&data)?.bundle()),
        Command::RotateRoot { data, finish } => {
            let request = if finish {
                ca::Request::Finish
            } else {
                ca::Request::Rotate
            };
            ca::request(&data.data_dir, request)?;
            eprintln!("asked for; a running control plane takes it up within seconds, see /status");
        }
    }
    Ok(())
}

/// Asks `/readyz` by hand: one request over one connection.
fn ready(address: &str) -> anyhow::Result<()> {
    use std::io::{Read, Write};
    use std::net::{TcpStream, ToSocketAddrs};
    let wait = Duration::from_secs(5);
    let found = address
        .to_socket_addrs()
        .with_context(|| format!("{address} cannot be looked up"))?;
    let mut refused = anyhow::anyhow!("{address} has no addresses");
    for to in found {
        let mut stream = match TcpStream::connect_timeout(&to, wait) {
            Ok(stream) => stream,
            Err(error) => {
                refused = anyhow::Error::new(error).context(format!("connecting to {to}"));
                continue;
            }
        };
        stream.set_read_timeout(Some(wait))?;
        write!(
            stream,
            "GET /readyz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream
            .read_to_string(&mut answer)
            .with_context(|| format!("asking {to}"))?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        anyhow::ensure!(
            head.split(' ').nth(1) == Some("200"),
            "{to} is not ready: {}",
            body.trim()
        );
        println!("{to}: {}", body.trim());
        return Ok(());
    }
    Err(refused)
}

fn serve(serve: Serve) -> anyhow::Result<()> {
    log(&serve)?;
    let source = serve.source.context("--source is missing")?;
    let identity = match serve.identity {
        Some(identity) => identity,
        None => match source {
            SourceConfig::Folder(_) => IdentitySource::Folder,
            SourceConfig::Kubernetes(_) => IdentitySource::Kubernetes,
        },
    };
    let identity = match (identity, serve.ca_secret) {
        (IdentitySource::Kubernetes, ca_secret) => IdentityConfig::Kubernetes { ca_secret },
        (IdentitySource::Folder, None) => IdentityConfig::Folder,
        (IdentitySource::Folder, Some(_)) => {
            anyhow::bail!("--ca-secret needs --identity kubernetes")
        }
    };
    let config = Config {
        source,
        identity,
        webhook: serve
            .webhook
            .zip(serve.injector_settings)
            .map(|(listen, settings)| webhook::Config { listen, settings }),
        sampling_percent: serve.sampling_percent,
        data_dir: serve.data.data_dir,
        listen: serve.listen,
        admin: serve.admin,
        ca: ca::Options {
            trust_domain: serve.data.trust_domain,
            lifetime: serve.certificate_lifetime,
        },
    };
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?
        .block_on(async {
            let mut terminate = signal(SignalKind::terminate())?;
            let mut interrupt = signal(SignalKind::interrupt())?;
            // In a cluster it may have to wait.
            let server = tokio::select! {
                server = Server::bind(config) => server?,
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
            };
            info!(
                listen = %server.address()?,
                admin = %server.admin_address()?,
                "control plane started"
            );
            server
                .run(async move {
                    tokio::select! {
                        _ = terminate.recv() => {}
                        _ = interrupt.recv() => {}
                    }
                })
                .await?;
            Ok(())
        })
}

fn log(serve: &Serve) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&serve.log_level)
        .with_context(|| format!("--log-level {}", serve.log_level))?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match serve.log_format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().init(),
    }
    Ok(())
}
