//! From file system events to the paths to read.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode, CreateKind, ModifyKind, RemoveKind};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tracing::warn;

/// How long events are collected once a file is ready: an editor's save is several of them.
const DEBOUNCE: Duration = Duration::from_millis(3);
/// A file that is written to and not closed is read after this.
const UNCLOSED: Duration = Duration::from_millis(100);
/// How often everything is looked at when no event says so.
const SCAN: Duration = Duration::from_secs(5);

/// What to read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Batch {
    /// Files that changed, or are gone.
    pub(super) paths: BTreeSet<PathBuf>,
    /// Everything may have changed.
    pub(super) scan: bool,
}

/// Watches a folder and all below it.
pub(super) struct Watch {
    events: mpsc::UnboundedReceiver<notify::Result<Event>>,
    /// When each path is to be read.
    pending: BTreeMap<PathBuf, Instant>,
    scan_at: Instant,
    /// Kept for its threads; none when events are not to be had.
    _watcher: Option<RecommendedWatcher>,
}

impl Watch {
    /// Starts watching. Where that is not possible, only the slow scan is left, and it says so.
    pub(super) fn start(root: &Path) -> Self {
        let (sender, events) = mpsc::unbounded_channel();
        let watcher = notify::recommended_watcher(move |event| {
            // Nobody listens: the source has ended.
            let _ = sender.send(event);
        })
        .and_then(|mut watcher: RecommendedWatcher| {
            watcher.watch(root, RecursiveMode::Recursive)?;
            Ok(watcher)
        });
        let watcher = watcher
            .inspect_err(|error| {
                warn!(
                    "cannot watch {}: {error}; changes are seen within {SCAN:?}",
                    root.display()
                );
            })
            .ok();
        Self {
            events,
            pending: BTreeMap::new(),
            scan_at: Instant::now() + SCAN,
            _watcher: watcher,
        }
    }

    /// Waits for something to read.
    pub(super) async fn next(&mut self) -> Batch {
        loop {
            let due = self
                .pending
                .values()
                .min()
                .map_or(self.scan_at, |at| (*at).min(self.scan_at));
            tokio::select! {
                Some(event) = self.events.recv() => self.take(event),
                () = sleep_until(due) => {
                    let now = Instant::now();
                    let scan = self.scan_at <= now;
                    if scan {
                        self.scan_at = now + SCAN;
                    }
                    let paths: BTreeSet<PathBuf> = self
                        .pending
                        .iter()
                        .filter(|(_, at)| **at <= now)
                        .map(|(path, _)| path.clone())
                        .collect();
                    self.pending.retain(|_, at| *at > now);
                    if scan || !paths.is_empty() {
                        return Batch { paths, scan };
                    }
                }
            }
        }
    }

    fn take(&mut self, event: notify::Result<Event>) {
        let now = Instant::now();
        let Ok(event) = event else {
            self.scan_at = now + DEBOUNCE;
            return;
        };
        if event.need_rescan() {
            self.scan_at = now + DEBOUNCE;
        }
        match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) => {
                for path in event.paths {
                    self.pending.insert(path, now + DEBOUNCE);
                }
            }
            EventKind::Create(CreateKind::Folder) | EventKind::Remove(RemoveKind::Folder) => {
                self.scan_at = now + DEBOUNCE
            }
            EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(_)) => {
                for path in event.paths {
                    // A folder, or a link to one, was renamed or removed.
                    if !super::is_manifest(&path) {
                        self.scan_at = self.scan_at.min(now + DEBOUNCE);
                    }
                    self.pending.insert(path, now + DEBOUNCE);
                }
            }
            EventKind::Create(_) | EventKind::Modify(_) => {
                for path in event.paths {
                    self.pending.entry(path).or_insert(now + UNCLOSED);
                }
            }
            EventKind::Access(_) | EventKind::Any | EventKind::Other => {}
        }
    }
}
