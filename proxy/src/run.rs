//! `weft-proxy run`: two kinds of runtime. One thread for control, admin and telemetry export; a
//! thread for each data worker, so that a metrics scrape or a burst of tables costs no request
//! anything.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::net::TcpListener;
use tokio::runtime::LocalOptions;
use tokio::sync::watch;

use crate::admin::{self, AdminState, Introspect};
use crate::config::Config;
use crate::introspect::Introspection;
use crate::listen::{self, Listener};
use crate::telemetry::export::{self, ExportConfig};
use crate::telemetry::log::LogControl;
use crate::telemetry::{Registry, access_log, trace::span_channel};
use crate::worker::{Shared, Worker};
use crate::{discovery, health, identity, resident, tcp};

/// How far the proxy is on its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Running,
    /// No new work; what runs is finished.
    Draining,
    /// The deadline has passed: what still runs is cut.
    Cutting,
}

/// How often a draining worker looks whether it has finished.
const DRAIN_POLL: Duration = Duration::from_millis(20);
/// How long peers may take what was written before the end, once the deadline has passed.
const CUT_GRACE: Duration = Duration::from_secs(1);

/// Runs the proxy until it is told to end.
///
/// # Errors
/// When it cannot start: an address is taken, a file of its identity is missing.
pub fn run(config: Config, log: LogControl) -> anyhow::Result<()> {
    let config = Arc::new(config);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_name("weft-control")
        .build()
        .context("the control runtime could not be started")?;
    runtime.block_on(control(config, log))
}

async fn control(config: Arc<Config>, log: LogControl) -> anyhow::Result<()> {
    let registry = Registry::new();
    let (spans, span_source) = span_channel(registry.clone());
    let (access_log, access_log_source) = access_log::channel(registry.clone());
    let handle = identity::Handle::new();
    let identity_settings = identity::renewal::Settings::from_config(&config)?;
    let discovery_settings = discovery::Settings::from_config(&config)?;
    let (client, directory) =
        discovery::Client::new(discovery_settings, handle.clone(), registry.clone());

    let shared = Shared {
        config: config.clone(),
        directory,
        identity: handle.clone(),
        registry,
        spans,
        access_log,
        taps: Arc::default(),
    };
    // All listeners before any worker: an address that is taken is an error at once.
    let mut listeners = Vec::new();
    for _ in 0..config.workers.max(1) {
        listeners.push(listen::open(&config)?);
    }
    let (stage, watching) = watch::channel(Stage::Running);
    let open = Arc::new(AtomicUsize::new(0));
    let mut workers = Vec::new();
    for (number, listeners) in listeners.into_iter().enumerate() {
        let (shared, watching, open) = (shared.clone(), watching.clone(), open.clone());
        let worker = std::thread::Builder::new()
            .name(format!("weft-worker-{number}"))
            .spawn(move || work(&shared, number, listeners, watching, &open))
            .context("a worker thread could not be started")?;
        workers.push(worker);
    }
    tokio::spawn(identity::renewal::run(identity_settings, handle));
    tokio::spawn(client.run());
    tokio::spawn(access_log_source.run(tokio::io::stdout()));
    let (export, exporting) = watch::channel(ExportConfig::default());
    tokio::spawn(export::run(
        span_source,
        exporting,
        export::marked(config.mark),
    ));
    let introspection = Arc::new(Introspection::new(&shared, stage.clone()));
    tokio::spawn(introspection.clone().watch(export));
    tokio::spawn(stay_small(introspection.clone()));
    let admin = TcpListener::bind(config.admin)
        .await
        .with_context(|| format!("the admin port cannot listen on {}", config.admin))?;
    tokio::spawn(admin::serve(
        admin,
        AdminState {
            registry: shared.registry.clone(),
            taps: shared.taps.clone(),
            trusted: config.admin_trust.clone(),
            probes: config.probes.clone(),
            introspect: introspection,
            log: Some(log),
        },
    ));
    tracing::info!(
        workload = config.workload,
        outbound = config.outbound_port,
        inbound = config.inbound_port,
        workers = config.workers,
        "weft-proxy {} is running",
        env!("CARGO_PKG_VERSION"),
    );

    let mut told = watching;
    tokio::select! {
        ended = terminated() => ended?,
        _ = told.wait_for(|stage| *stage >= Stage::Draining) => {}
    }
    let began = Instant::now();
    tracing::info!("draining for at most {} s", config.drain_seconds);
    let _ = stage.send(Stage::Draining);
    while workers.iter().any(|worker| !worker.is_finished()) && began.elapsed() < config.drain() {
        tokio::time::sleep(DRAIN_POLL).await;
    }
    let left = open.load(Ordering::Relaxed);
    let _ = stage.send(Stage::Cutting);
    for worker in workers {
        let joined = tokio::task::spawn_blocking(move || worker.join()).await?;
        joined.map_err(|_| anyhow::anyhow!("a worker has panicked"))?;
    }
    tracing::info!(
        "ended after {} ms; {left} connections were cut",
        began.elapsed().as_millis()
    );
    Ok(())
}

/// Gives back what only starting needed, and later what was needed once.
async fn stay_small(introspection: Arc<Introspection>) {
    while introspection.ready().is_err() {
        tokio::time::sleep(resident::SETTLED).await;
    }
    tokio::time::sleep(resident::SETTLED).await;
    loop {
        if let Err(error) = resident::give_back() {
            tracing::debug!("no memory was given back: {error}");
            return;
        }
        tokio::time::sleep(resident::EVERY).await;
    }
}

/// Until SIGTERM or SIGINT.
async fn terminated() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// A worker's thread. The first one asks endpoints whether they are well.
fn work(
    shared: &Shared,
    number: usize,
    listeners: Vec<Listener>,
    mut stage: watch::Receiver<Stage>,
    open: &AtomicUsize,
) {
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(LocalOptions::default())
    {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!("a worker could not be started: {error}");
            return;
        }
    };
    runtime.block_on(async {
        let worker = Worker::new(shared);
        let mut accepting = Vec::new();
        for listener in listeners {
            let accept = listen::run(worker.clone(), listener);
            accepting.push(tokio::task::spawn_local(async move {
                if let Err(error) = accept.await {
                    tracing::error!("a listener ended: {error}");
                }
            }));
        }
        let sweeping = tokio::task::spawn_local(Rc::clone(&worker).sweep());
        let urging = tokio::task::spawn_local(async {
            if let Err(error) = tcp::urgent::run().await {
                tracing::warn!("what follows urgent bytes may be late: {error}");
            }
        });
        let asking = (number == 0).then(|| tokio::task::spawn_local(health::run(worker.clone())));
        let _ = stage.wait_for(|stage| *stage >= Stage::Draining).await;
        worker.drain.begin();
        if let Some(asking) = asking {
            asking.abort();
        }
        for accept in accepting {
            let _ = accept.await;
        }
        let mut counted = 0;
        loop {
            let now = worker.open_connections();
            // Wrapping: the difference may be negative.
            open.fetch_add(now.wrapping_sub(counted), Ordering::Relaxed);
            counted = now;
            if now == 0 || *stage.borrow() == Stage::Cutting {
                break;
            }
            tokio::time::sleep(DRAIN_POLL).await;
        }
        worker.drain.end();
        worker.clear();
        let cut = async {
            let _ = stage.wait_for(|stage| *stage >= Stage::Cutting).await;
            tokio::time::sleep(CUT_GRACE).await;
        };
        tokio::select! {
            () = worker.sessions.end() => {}
            () = cut => {}
        }
        // What is cut is told so: a moment for the resets to leave.
        if counted > 0 {
            tokio::time::sleep(DRAIN_POLL).await;
        }
        sweeping.abort();
        urging.abort();
    });
}
