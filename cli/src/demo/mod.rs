//! `weft demo`: a small shop behind a mesh, on this machine, driven through failures.
//!
//! - [`topology`] and [`manifests`]: who takes part, as the demo and as the control plane know it.
//! - [`stage`]: the processes in their namespaces. [`script`]: what is done to them, and when.
//! - [`observe`], [`figures`], [`collector`]: what is measured; [`board`] holds it all.
//! - [`view`]: what a person sees meanwhile; [`report`]: what stands there at the end.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Args;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpListener;
use tokio::process::ChildStdout;

use crate::admin::Admin;
use crate::apps::terminated;
use crate::apps::visitor::Report;
use crate::netns;
use crate::output::{Paint, show};
use crate::{Bad, duration};

mod board;
mod collector;
mod figures;
mod manifests;
mod observe;
pub mod relay;
mod report;
mod script;
mod stage;
mod topology;
mod trace;
mod view;

use board::{ControlView, Shared};
use collector::{Collector, Traces};
use observe::ProxyView;
use relay::Relay;
use script::Director;
use stage::{Plan, Stage};
use topology::{HUB, MEMBERS, OTLP_PORT};

/// A demo cannot be shorter: endpoints need their time to be ejected and to come back.
const SHORTEST: Duration = Duration::from_secs(15);
/// The first visitor must have been served by then.
const OPENING: Duration = Duration::from_secs(20);
/// How often the front's proxy is asked, by which the acts are measured.
const CLOSELY: Duration = Duration::from_millis(100);
/// How often the others are.
const LOOSELY: Duration = Duration::from_millis(500);
/// How often the picture is drawn.
const FRAME: Duration = Duration::from_millis(250);
/// How often a line says how it goes, where there is no terminal.
const LINE: Duration = Duration::from_secs(5);

/// Flags of `weft demo`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  weft demo                              a minute, live
  weft demo --for 20s --json             for scripts: one JSON document at the end
  weft demo --folder examples/demo       with manifests that you can edit meanwhile
  weft demo --otlp-endpoint http://localhost:4317

Needs no rights where user namespaces are allowed; root otherwise. The exit code is 0 when the mesh
did what is expected of it, 1 when it did not, 2 when the demo could not be run.")]
pub struct Demo {
    /// Length of the demo, from 15s; the script is stretched or shrunk to it.
    #[arg(long = "for", value_name = "DURATION", default_value = "60s", value_parser = duration)]
    length: Duration,
    /// Print one JSON document at the end, and nothing else.
    #[arg(long)]
    json: bool,
    /// OTLP/gRPC collector that spans are sent to, as well as to the demo's own.
    #[arg(long, value_name = "URL")]
    otlp_endpoint: Option<String>,
    /// Keep the folder of logs and state, and say where it is.
    #[arg(long)]
    keep: bool,
    /// Folder of manifests to use in place of the built-in ones (see examples/demo). The script
    /// changes mtls.yaml in it, and puts it back at the end.
    #[arg(long, value_name = "PATH")]
    folder: Option<PathBuf>,
    /// Requests a second.
    #[arg(long, value_name = "N", default_value_t = 200, hide_short_help = true)]
    rate: u32,
}

/// Runs the demo. To be called before there is any thread.
pub fn run(args: Demo) -> anyhow::Result<ExitCode> {
    ensure!(
        args.length >= SHORTEST,
        "a demo of {} s is too short to see an endpoint come back; give it {} s or more",
        args.length.as_secs(),
        SHORTEST.as_secs()
    );
    ensure!(args.rate > 0, "the rate is at least one request a second");
    // Named before the namespaces are entered, where paths could look different.
    let folder = args.folder.as_ref().map(std::fs::canonicalize).transpose();
    let folder = folder.context("the folder of manifests cannot be found")?;
    for program in [crate::binaries::PROXY, crate::binaries::CONTROL_PLANE] {
        crate::binaries::find(program)?;
    }
    let relay = args
        .otlp_endpoint
        .as_deref()
        .map(Relay::start)
        .transpose()?;
    netns::isolate(netns::Network::Private)?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(perform(args, folder, relay))
}

/// Folder of logs and state; removed at the end unless it is to be kept.
fn home(keep: bool) -> anyhow::Result<(PathBuf, Option<tempfile::TempDir>)> {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::Builder::new()
        .prefix("weft-demo-")
        .tempdir()
        .context("no folder for logs and state can be made")?;
    // The proxies' user passes through; what is secret is so by itself.
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o711))?;
    let path = folder.path().to_owned();
    if keep {
        let _ = folder.keep();
        return Ok((path, None));
    }
    Ok((path, Some(folder)))
}

async fn perform(
    args: Demo,
    folder: Option<PathBuf>,
    relay: Option<Relay>,
) -> anyhow::Result<ExitCode> {
    let (home, _removed_at_the_end) = home(args.keep)?;
    let manifests = match folder {
        Some(folder) => folder,
        None => {
            let folder = home.join("manifests");
            manifests::write(&folder)?;
            folder
        }
    };
    let restored = Restored::of(manifests.join(script::MTLS_FILE));
    let mut stage = Stage::new(Plan {
        home: home.clone(),
        manifests: manifests.clone(),
        rate: args.rate,
    })?;
    let screen = Screen::of(&args);
    let board = Shared::new();
    let traces = Arc::new(Mutex::new(Traces::default()));
    let onward = relay.map(|relay| relay.forward()).transpose()?;
    let listener = TcpListener::bind((HUB, OTLP_PORT)).await?;
    tokio::spawn(Collector::new(traces.clone(), onward).serve(listener));

    let outcome = tokio::select! {
        outcome = put_on(&mut stage, &args, &board, &manifests, screen, &traces) => outcome,
        () = terminated() => Err(Interrupted.into()),
    };
    if outcome.is_ok() {
        finish_traces(&board, &traces).await;
    }
    stage.tear_down().await;
    drop(restored);
    outcome?;

    let board = board.lock();
    let spans = traces.lock().ok();
    let trace = spans.as_deref().and_then(Traces::richest).map(trace::tree);
    let summary = report::summary(&board, trace.unwrap_or_default());
    if args.json {
        crate::output::print_json(&summary)?;
    } else {
        screen.last(&board, args.length.as_secs_f64());
        show(&report::render(&summary, Paint::stdout()));
    }
    if args.keep {
        eprintln!("Logs and state are kept in {}", home.display());
    }
    Ok(if summary.held {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(1)
    })
}

/// Ctrl-C or SIGTERM.
#[derive(Debug, thiserror::Error)]
#[error("interrupted; everything is taken down")]
pub struct Interrupted;

/// Puts a file back as it was.
struct Restored {
    path: PathBuf,
    contents: Option<String>,
}

impl Restored {
    fn of(path: PathBuf) -> Self {
        let contents = std::fs::read_to_string(&path).ok();
        Self { path, contents }
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        if let Some(contents) = &self.contents
            && std::fs::read_to_string(&self.path).is_ok_and(|now| now != *contents)
        {
            let _ = script::replace(&self.path, contents);
        }
    }
}

/// Sets up, plays the script, and lets the load run out.
async fn put_on(
    stage: &mut Stage,
    args: &Demo,
    board: &Shared,
    manifests: &std::path::Path,
    screen: Screen,
    traces: &Mutex<Traces>,
) -> anyhow::Result<()> {
    screen.say("Setting up: a control plane, eight workloads, each behind its own proxy…");
    stage.set_up().await?;
    let visitor = topology::find("visitor").context("there is no visitor")?;
    let reports = stage.start_visitor(visitor)?;
    let mut reading = std::pin::pin!(read_reports(reports, board.clone()));
    tokio::select! {
        read = &mut reading => {
            read?;
            bail!("the visitor has gone: {}", stage.casualty().unwrap_or_default());
        }
        served = tokio::time::timeout(OPENING, first_success(board)) => {
            if served.is_err() {
                let said = board.lock().reports.last_words().to_owned();
                bail!("no visitor was served in {} s: {said}", OPENING.as_secs());
            }
        }
    }
    board.lock().begin();
    let total = args.length.as_secs_f64();
    let mut director = Director {
        stage,
        board: board.clone(),
        total,
        manifests: manifests.to_owned(),
    };
    tokio::select! {
        played = director.play() => played?,
        read = &mut reading => {
            read?;
            let why = director.stage.casualty().unwrap_or_default();
            bail!("the visitor has gone: {why}");
        }
        () = observe_front(board) => {}
        () = observe_all(board, traces) => {}
        () = screen.run(board, total) => {}
    }
    {
        let mut board = board.lock();
        board.ended = Some(board.now());
    }
    director.stage.stop_visitor();
    // What still runs is reported before the pipe closes.
    let _ = tokio::time::timeout(Duration::from_secs(6), reading).await;
    observe_once(board).await;
    if let Some(who) = director.stage.casualty_but("visitor") {
        bail!("{who}");
    }
    Ok(())
}

/// Until a visitor was served: then the shop is open and the story can begin.
async fn first_success(board: &Shared) {
    loop {
        if board.lock().reports.any_success() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn read_reports(reports: ChildStdout, board: Shared) -> anyhow::Result<()> {
    let mut lines = BufReader::new(reports).lines();
    while let Some(line) = lines.next_line().await? {
        let report: Report = serde_json::from_str(&line)?;
        board.lock().reports.push(report);
    }
    Ok(())
}

/// What one proxy says; nothing while it is not there.
async fn ask(admin: &Admin) -> Option<ProxyView> {
    ProxyView::read(&admin.text("/stats.json").await.ok()?).ok()
}

async fn observe_front(board: &Shared) {
    let Some(admin) = topology::find("front-1")
        .map(Stage::proxy_admin)
        .and_then(|url| Admin::new(&url).ok())
    else {
        return;
    };
    let mut due = tokio::time::interval(CLOSELY);
    due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        due.tick().await;
        if let Some(view) = ask(&admin).await {
            let mut board = board.lock();
            let now = board.now();
            board.proxies.insert("front-1", view.clone());
            board.front.push((now, view));
        }
    }
}

async fn observe_all(board: &Shared, traces: &Mutex<Traces>) {
    let mut due = tokio::time::interval(LOOSELY);
    due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        due.tick().await;
        if let Ok(traces) = traces.lock() {
            board.lock().spans = traces.received();
        }
        observe_once(board).await;
    }
}

/// Every proxy, and the control plane, once.
async fn observe_once(board: &Shared) {
    for member in &MEMBERS {
        if let Ok(admin) = Admin::new(&Stage::proxy_admin(member))
            && let Some(view) = ask(&admin).await
        {
            board.lock().proxies.insert(member.name, view);
        }
    }
    let control = match Admin::new(&Stage::control_admin()) {
        Ok(admin) => crate::status::fetch(&admin).await.ok(),
        Err(_) => None,
    };
    board.lock().control = match control {
        Some(status) => ControlView {
            up: true,
            connected: status.connected(),
            behind: status.behind(),
            refused: status.refused(),
        },
        None => ControlView::default(),
    };
}

/// Proxies export spans in batches: waits until no more come, at most a few seconds.
async fn finish_traces(board: &Shared, traces: &Mutex<Traces>) {
    let received = || traces.lock().map_or(0, |t| t.received());
    for _ in 0..6 {
        let before = received();
        tokio::time::sleep(Duration::from_millis(500)).await;
        if before > 0 && received() == before {
            break;
        }
    }
    board.lock().spans = received();
}

/// Where and how things are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Screen {
    /// Redrawn in place.
    Terminal,
    /// A line now and then.
    Lines,
    /// For programs: nothing until the end.
    Silent,
}

impl Screen {
    fn of(args: &Demo) -> Self {
        use std::io::IsTerminal;
        if args.json {
            Self::Silent
        } else if std::io::stdout().is_terminal() {
            Self::Terminal
        } else {
            Self::Lines
        }
    }

    fn say(self, text: &str) {
        if self != Self::Silent {
            show(&format!("{text}\n"));
        }
    }

    async fn run(self, board: &Shared, total: f64) {
        match self {
            Self::Silent => std::future::pending().await,
            Self::Terminal => {
                let mut canvas = view::Canvas::new();
                let mut due = tokio::time::interval(FRAME);
                loop {
                    due.tick().await;
                    let size = size();
                    let picture = view::picture(&board.lock(), total, size.0, Paint::stdout());
                    canvas.draw(&picture, size);
                }
            }
            Self::Lines => {
                let mut due = tokio::time::interval(FRAME);
                let mut line = std::time::Instant::now();
                loop {
                    due.tick().await;
                    let mut board = board.lock();
                    board.told += tell(&board.acts[board.told..]);
                    if line.elapsed() >= LINE {
                        line = std::time::Instant::now();
                        let now = board.now();
                        show(&format!(
                            "{now:>5.1} s  {}",
                            view::headline(&board, now, Paint::NEVER)
                        ));
                    }
                }
            }
        }
    }

    /// What was not shown yet when the script ended.
    fn last(self, board: &board::Board, total: f64) {
        match self {
            Self::Silent => {}
            Self::Terminal => {
                // The whole of it once more: on a low terminal something was left out.
                let (width, height) = size();
                let picture = view::picture(board, total, width, Paint::stdout());
                let left_out = picture.lines().count() >= height;
                if left_out {
                    show(&format!("\n{picture}"));
                }
            }
            Self::Lines => {
                tell(&board.acts[board.told..]);
            }
        }
    }
}

/// Tells the acts that have ended; how many.
fn tell(acts: &[board::Act]) -> usize {
    let ended = acts.iter().take_while(|act| act.ended.is_some());
    ended
        .inspect(|act| show(&view::story(act, 100, Paint::NEVER)))
        .count()
}

fn size() -> (usize, usize) {
    terminal_size::terminal_size().map_or((100, 40), |(width, height)| {
        (usize::from(width.0), usize::from(height.0))
    })
}

/// The exit code of an error of the demo.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<Interrupted>() {
        130
    } else {
        Bad::CANNOT
    }
}
