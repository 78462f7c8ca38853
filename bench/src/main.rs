//! Measures a pair of our proxies beside an Envoy pair and the direct path, in one run.
//!
//! `main` starts all candidates at once; `measure` takes them in turn, round after round;
//! `report` takes medians of the rounds' ratios and says which targets are met. What is measured
//! lies in `candidates`, the load generator in `load`, the server at the far end in `origin`.
#![deny(unsafe_code)]

mod candidates;
mod features;
mod load;
mod measure;
mod origin;
mod process;
mod report;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;

use candidates::envoy::{self, Between, Certificates};
use candidates::{Candidate, Origin, Told, weft};
use measure::{CASES, Case, Memory};
use process::{Cpus, Placement, Side};
use report::{ENVOY, ENVOY_ONE, MemoryFigures, Report, UnusedServices, WEFT, WEFT_ONE, WEFT_OWN};

/// Services that the control plane knows and nobody calls.
const UNUSED_SERVICES: usize = 1000;

/// Measures Weft beside other proxies: load generator -> out -> mutual TLS -> in -> server.
#[derive(Debug, Parser)]
#[command(name = "weft-bench", version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// An Envoy binary to measure beside us (1.40 is what the targets are about).
    #[arg(long)]
    envoy: Option<PathBuf>,
    /// Length of one measurement, seconds.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// How often each candidate is measured in each case.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Only these: names of cases (see --list), "memory", "syscalls".
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Writes everything that was measured as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Where load generator, proxies and server run.
    #[arg(long, value_enum, default_value = "two-cpus")]
    placement: Placement,
    /// Idle connections that are opened to see what each costs; as many as the limit of open
    /// files allows.
    #[arg(long, default_value_t = 10_000)]
    idle_connections: usize,
    /// Folder with weft-proxy and weft-control-plane; without it, they are built as released.
    #[arg(long)]
    programs: Option<PathBuf>,
    /// Leaves our own pair out.
    #[arg(long)]
    without_weft: bool,
    /// Lists the cases.
    #[arg(long)]
    list: bool,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// The server at the far end; the benchmark starts it itself.
    #[command(hide = true)]
    Origin {
        http1: SocketAddr,
        http2: SocketAddr,
        mirrored: SocketAddr,
    },
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if let Some(Command::Origin {
        http1,
        http2,
        mirrored,
    }) = arguments.command
    {
        return origin::run(http1, http2, mirrored);
    }
    if arguments.list {
        for case in CASES {
            println!("{:12} {}", case.name, case.about);
        }
        return Ok(());
    }
    for name in &arguments.only {
        let known =
            ["memory", "syscalls"].contains(&name.as_str()) || CASES.iter().any(|c| c.name == name);
        anyhow::ensure!(
            known,
            "--only {name}: there is no such case; --list names them"
        );
    }
    let setup = Setup::new(&arguments)?;
    let mut report = setup.measure()?;
    report.judge();
    print!("{}", report.table());
    if let Some(path) = &arguments.json {
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// What does not change while the benchmark runs.
struct Setup<'a> {
    arguments: &'a Arguments,
    folder: tempfile::TempDir,
    cpus: Cpus,
    cores: usize,
    origin: Origin,
    open_files: u64,
    weft: Option<weft::Setup>,
    certificates: Certificates,
}

impl<'a> Setup<'a> {
    fn new(arguments: &'a Arguments) -> anyhow::Result<Self> {
        let weft = match (&arguments.programs, arguments.without_weft) {
            (_, true) => None,
            (Some(folder), _) => Some(weft::Setup::in_folder(folder)?),
            (None, _) => Some(weft::Setup::build()?),
        };
        // Before this thread is pinned to a CPU.
        let cores = std::thread::available_parallelism()?.get();
        let folder = tempfile::tempdir()?;
        let cpus = Cpus::choose(arguments.placement)?;
        let open_files = process::raise_open_files()?;
        let origin = Origin::start(&cpus, folder.path())?;
        cpus.enter(Side::Client)?;
        let certificates = Certificates::make(folder.path())?;
        Ok(Self {
            arguments,
            cpus,
            cores,
            origin,
            open_files,
            weft,
            certificates,
            folder,
        })
    }

    fn wanted(&self, name: &str) -> bool {
        let only = &self.arguments.only;
        only.is_empty() || only.iter().any(|o| o == name)
    }

    fn measure(&self) -> anyhow::Result<Report> {
        let mut report = Report {
            cores: self.cores,
            placement: self.arguments.placement,
            seconds_per_run: self.arguments.seconds,
            rounds: self.arguments.rounds,
            candidates: Vec::new(),
            cases: BTreeMap::new(),
            syscalls: BTreeMap::new(),
            memory: BTreeMap::new(),
            targets: Vec::new(),
        };
        if self.wanted("memory") {
            self.measure_memory(&mut report)?;
        }
        let candidates = self.candidates()?;
        report.candidates = candidates.iter().map(|c| c.name).collect();
        let cases: Vec<&Case> = CASES.iter().filter(|c| self.wanted(c.name)).collect();
        let window = Duration::from_secs_f64(self.arguments.seconds);
        for round in 1..=self.arguments.rounds {
            for case in &cases {
                eprintln!("round {round}/{}: {}", self.arguments.rounds, case.about);
                for candidate in &candidates {
                    // Directly, this case uses up the machine's ports, and says nothing.
                    if case.name == "connect" && candidate.pids.is_none() {
                        continue;
                    }
                    let figures = measure::run(case, candidate, &self.origin, window)?;
                    if let Some(figures) = figures {
                        report
                            .cases
                            .entry(case.name)
                            .or_default()
                            .entry(candidate.name)
                            .or_default()
                            .push(figures);
                    }
                }
            }
        }
        if self.wanted("syscalls") {
            for case in &cases {
                for candidate in &candidates {
                    if let Some(count) = measure::syscalls(case, candidate)? {
                        report
                            .syscalls
                            .entry(case.name)
                            .or_default()
                            .insert(candidate.name, count);
                    }
                }
            }
        }
        Ok(report)
    }

    /// All that are measured in turn, started at once.
    fn candidates(&self) -> anyhow::Result<Vec<Candidate>> {
        let policies = CASES
            .iter()
            .any(|c| c.feature.is_some() && self.wanted(c.name));
        let plain = Told::default();
        let with = Told { policies, ..plain };
        let one = Told {
            endpoints: 1,
            ..plain
        };
        let mut candidates = vec![self.origin.direct()];
        if self.weft.is_some() {
            candidates.push(self.start_weft(WEFT, with)?);
            let mut own = self.start_weft(WEFT_OWN, plain)?;
            // Nothing of it is shared anyway.
            own.ways.http2 = None;
            candidates.push(own);
            candidates.push(self.start_weft(WEFT_ONE, one)?);
        }
        if self.arguments.envoy.is_some() {
            let start = |name, told| self.start_envoy(name, Between::Http2, told, 0);
            candidates.push(start(ENVOY, with)?);
            candidates.push(start(ENVOY_ONE, one)?);
            let mut http1 =
                self.start_envoy("envoy, HTTP/1.1 between", Between::Http1, plain, 0)?;
            // The same as the other pair's.
            http1.ways.http2 = None;
            http1.ways.tcp = None;
            candidates.push(http1);
        }
        for candidate in &candidates {
            features::check(candidate, &self.origin)?;
        }
        Ok(candidates)
    }

    fn start_weft(&self, name: &'static str, told: Told) -> anyhow::Result<Candidate> {
        let setup = weft::Setup {
            name,
            told,
            own_connections: name == WEFT_OWN,
            ..self.weft.clone().context("our own pair is left out")?
        };
        weft::start(&setup, &self.origin, &self.cpus, self.folder.path())
    }

    fn start_envoy(
        &self,
        name: &'static str,
        between: Between,
        told: Told,
        unused_services: usize,
    ) -> anyhow::Result<Candidate> {
        let binary = self.arguments.envoy.clone();
        let setup = envoy::Setup {
            name,
            binary: binary.context("there is no Envoy")?,
            between,
            group: "X25519MLKEM768",
            told,
            unused_services,
        };
        envoy::start(
            &setup,
            &self.origin,
            &self.certificates,
            &self.cpus,
            self.folder.path(),
        )
    }

    /// Each part on a pair freshly started: memory that an earlier part has touched and given back
    /// would otherwise be counted, or hidden. Services that nobody calls are added to our own pair
    /// while it runs; Envoy's static configuration has them from the start.
    fn measure_memory(&self, report: &mut Report) -> anyhow::Result<()> {
        let told = Told::default();
        let unused = |without: Option<Memory>, with| {
            Some(UnusedServices {
                count: UNUSED_SERVICES,
                without: without?,
                with: with?,
            })
        };
        if self.weft.is_some() {
            let start = || self.start_weft(WEFT, told);
            let mut figures = self.memory_of(&start)?;
            let candidate = start()?;
            let mesh = candidate.mesh.as_ref().context("nothing tells the pair")?;
            settle();
            // Pages of the program come and go, whatever is told.
            let without = measure::anonymous(&candidate)?;
            mesh.add_unused_services(UNUSED_SERVICES)?;
            settle();
            figures.unused_services = unused(without, measure::anonymous(&candidate)?);
            report.memory.insert(WEFT, figures);
        }
        if self.arguments.envoy.is_some() {
            let start = |unused| self.start_envoy(ENVOY, Between::Http2, told, unused);
            let mut figures = self.memory_of(&|| start(0))?;
            let without = {
                let candidate = start(0)?;
                settle();
                measure::anonymous(&candidate)?
            };
            let candidate = start(UNUSED_SERVICES)?;
            settle();
            figures.unused_services = unused(without, measure::anonymous(&candidate)?);
            report.memory.insert(ENVOY, figures);
        }
        Ok(())
    }

    fn memory_of(
        &self,
        start: &dyn Fn() -> anyhow::Result<Candidate>,
    ) -> anyhow::Result<MemoryFigures> {
        let mut figures = MemoryFigures::default();
        {
            let candidate = start()?;
            eprintln!("memory of {}", candidate.name);
            settle();
            figures.idle = measure::memory(&candidate)?;
            figures.at_256_connections = measure::memory_at_256(&candidate)?;
        }
        for opaque in [false, true] {
            let candidate = start()?;
            settle();
            // An opaque connection takes two files of each proxy; some are for other things.
            let files = usize::try_from(self.open_files)?.saturating_sub(200);
            let count = self
                .arguments
                .idle_connections
                .min(if opaque { files / 2 } else { files });
            let idle = measure::idle_connections(&candidate, opaque, count)?;
            if opaque {
                figures.idle_tcp = idle;
            } else {
                figures.idle_http1 = idle;
            }
        }
        Ok(figures)
    }
}

/// Until what a start has taken for a moment is given back.
fn settle() {
    std::thread::sleep(Duration::from_secs(2));
}
