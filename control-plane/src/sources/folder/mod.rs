//! A folder of manifests, watched.
//!
//! Every `*.yaml`, `*.yml` and `*.json` file below the folder is read (names that begin with a dot
//! are not: editors keep their own files there). A file is used whole or not at all: when anything
//! in it is wrong, what it said before stands and the rest of the folder is not touched.
//!
//! inotify says what changed; a slow scan is the safety net where it does not (network file
//! systems, lost events). A file is read when its writer has closed it or renamed it into place,
//! so half-written files are seen only when a writer keeps a file open; what then cannot be read,
//! or has lost objects, is read once more after [`SETTLE`].
//!
//! - [`manifest`]: text -> objects. [`yaml`]: documents and lines. [`kubernetes`]: Service and
//!   EndpointSlice as they are written.
//! - [`files`]: what all files say together, and which of two wins.
//! - [`watch`]: from file system events to the paths to read.

mod files;
mod kubernetes;
pub(crate) mod manifest;
mod watch;
mod yaml;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tracing::{info, warn};

use super::{Locate, Sink, Update};
use crate::finding::{Finding, Severity};
use crate::model::{Change, ObjectRef};
use files::{Files, Outcome};
use watch::{Batch, Watch};

/// Wait before what looks half-written is read again.
const SETTLE: Duration = Duration::from_millis(60);
/// Largest file that is read, bytes: far above any manifest, far below what would hurt.
const MAX_FILE: u64 = 32 << 20;

/// A folder as a source.
pub struct Folder {
    root: PathBuf,
    files: Arc<Mutex<Files>>,
    /// What a file looked like when it was last read.
    seen: BTreeMap<PathBuf, Stamp>,
}

/// Changes when a file's content may have.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    len: u64,
    inode: u64,
}

/// Why a folder cannot be a source.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    #[error("cannot read the folder {0}: {1}")]
    Unreadable(PathBuf, #[source] io::Error),
    #[error("{0} is not a folder")]
    NotAFolder(PathBuf),
}

/// Tells where objects of a folder are written.
#[derive(Clone)]
pub struct Locator(Arc<Mutex<Files>>);

impl Locate for Locator {
    fn locate(&self, object: &ObjectRef, path: &[String]) -> Option<(PathBuf, Option<u32>)> {
        let (file, line) = {
            let files = lock(&self.0);
            let (file, line) = files.place(object)?;
            (file.to_owned(), line)
        };
        let text = std::fs::read_to_string(&file).ok();
        let document = text.and_then(|text| line_of(&text, line, path));
        Some((file, document.or(Some(line))))
    }
}

/// Everything in one text, read once, as if it were a folder's only file of this name.
pub struct Text<'a> {
    text: &'a str,
    files: Files,
}

impl<'a> Text<'a> {
    /// Reads it: every object and everything that is wrong.
    pub fn read(name: &Path, text: &'a str) -> (Self, Vec<Change>, Vec<Finding>) {
        let mut files = Files::default();
        let changes = files.set(name, manifest::parse(name, text));
        let findings = files.findings();
        (Self { text, files }, changes, findings)
    }
}

impl Locate for Text<'_> {
    fn locate(&self, object: &ObjectRef, path: &[String]) -> Option<(PathBuf, Option<u32>)> {
        let (file, line) = self.files.place(object)?;
        let field = line_of(self.text, line, path);
        Some((file.to_owned(), field.or(Some(line))))
    }
}

/// The line of a field of the document, or of the item of a list, that begins at a line.
fn line_of(text: &str, line: u32, path: &[String]) -> Option<u32> {
    // The last that does not begin later: it, or the list in which it is.
    let documents = yaml::documents(text).into_iter().rev();
    let mut before = documents.filter(|document| document.line <= line);
    let item = before.next()?.beginning_at(line)?;
    item.document().line_of(path)
}

fn lock(files: &Mutex<Files>) -> MutexGuard<'_, Files> {
    // Nothing panics while holding it; if something did, the files are read again anyway.
    files.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Folder {
    /// A folder that is there and can be read.
    pub fn open(root: &Path) -> Result<Self, FolderError> {
        let unreadable = |error| FolderError::Unreadable(root.to_owned(), error);
        if !std::fs::metadata(root).map_err(unreadable)?.is_dir() {
            return Err(FolderError::NotAFolder(root.to_owned()));
        }
        std::fs::read_dir(root).map_err(unreadable)?;
        // The watcher tells whole paths: a file must have one name, however the folder was given.
        let root = root.canonicalize().map_err(unreadable)?;
        Ok(Self {
            root,
            files: Arc::default(),
            seen: BTreeMap::new(),
        })
    }

    /// Tells where objects are written, also while the source runs.
    pub fn locator(&self) -> Locator {
        Locator(self.files.clone())
    }

    /// Reads everything once; no watching. Returns every object and everything that is wrong.
    pub fn load(&mut self) -> (Vec<Change>, Vec<Finding>) {
        let mut changes = Vec::new();
        for path in self.changed_files() {
            let outcome = read(&path);
            changes.extend(lock(&self.files).set(&path, outcome));
        }
        (changes, lock(&self.files).findings())
    }

    /// Watches until nobody listens any more.
    pub async fn run(mut self, sink: Sink) {
        // Watching begins before the first scan, so that nothing falls between the two.
        let mut watch = Watch::start(&self.root);
        let seen = Instant::now();
        let (changes, mut findings) = self.load();
        info!(folder = %self.root.display(), objects = changes.len(), "folder read");
        for finding in &findings {
            warn!("{finding}");
        }
        let first = [
            Update::Changes { changes, seen },
            Update::Findings(findings.clone()),
            Update::Synced,
        ];
        for update in first {
            if sink.send(update).await.is_err() {
                return;
            }
        }
        loop {
            let batch = tokio::select! {
                batch = watch.next() => batch,
                () = sink.closed() => return,
            };
            let seen = Instant::now();
            let (changes, doubtful) = self.take(batch);
            if !self
                .send(&sink, changes, seen, &mut findings, doubtful.is_empty())
                .await
            {
                return;
            }
            if !doubtful.is_empty() {
                tokio::time::sleep(SETTLE).await;
                let changes = self.settle(doubtful);
                if !self.send(&sink, changes, seen, &mut findings, true).await {
                    return;
                }
            }
        }
    }

    /// Reads what changed. What looks half-written is not taken yet but returned.
    fn take(&mut self, batch: Batch) -> (Vec<Change>, Vec<PathBuf>) {
        let mut changes = Vec::new();
        let mut doubtful = Vec::new();
        let mut paths: Vec<PathBuf> = batch
            .paths
            .into_iter()
            .filter(|path| is_manifest(path))
            .collect();
        if batch.scan {
            paths.extend(self.changed_files());
            let gone: Vec<PathBuf> = lock(&self.files)
                .paths()
                .filter(|path| stamp(path).is_none())
                .cloned()
                .collect();
            paths.extend(gone);
        }
        paths.sort();
        paths.dedup();
        for path in paths {
            match stamp(&path) {
                Some(stamp) => self.seen.insert(path.clone(), stamp),
                None => {
                    doubtful.push(path);
                    continue;
                }
            };
            let outcome = read(&path);
            let mut files = lock(&self.files);
            if outcome.is_err() || files.loses(&path, &outcome) {
                doubtful.push(path);
            } else {
                changes.extend(files.set(&path, outcome));
            }
        }
        (changes, doubtful)
    }

    /// Reads for good what looked half-written or gone (editors remove a file and write it anew).
    fn settle(&mut self, paths: Vec<PathBuf>) -> Vec<Change> {
        let mut changes = Vec::new();
        // A folder that is gone as a whole (unmounted, moved away) is a mishap, not an order to
        // forget everything.
        let there = self.root.is_dir();
        for path in paths {
            let Some(stamp) = stamp(&path) else {
                if !there {
                    continue;
                }
                self.seen.remove(&path);
                let mut files = lock(&self.files);
                for path in files.under(&path) {
                    changes.extend(files.remove(&path));
                }
                continue;
            };
            self.seen.insert(path.clone(), stamp);
            let outcome = read(&path);
            changes.extend(lock(&self.files).set(&path, outcome));
        }
        changes
    }

    /// Sends changes, and findings when they are not the same as before; false when nobody listens.
    async fn send(
        &self,
        sink: &Sink,
        changes: Vec<Change>,
        seen: Instant,
        known: &mut Vec<Finding>,
        settled: bool,
    ) -> bool {
        if !changes.is_empty() && sink.send(Update::Changes { changes, seen }).await.is_err() {
            return false;
        }
        if !settled {
            return true;
        }
        let mut findings = lock(&self.files).findings();
        if !self.root.is_dir() {
            findings.push(Finding {
                file: Some(self.root.clone()),
                line: None,
                severity: Severity::Error,
                object: None,
                message: "the folder is gone; what it said last stands".to_owned(),
                help: "put it back".to_owned(),
            });
        }
        if findings == *known {
            return true;
        }
        for finding in findings.iter().filter(|finding| !known.contains(finding)) {
            warn!("{finding}");
        }
        known.clone_from(&findings);
        sink.send(Update::Findings(findings)).await.is_ok()
    }

    /// Files that look different from when they were last read.
    fn changed_files(&mut self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        walk(&self.root, 0, &mut found);
        found.retain(|path| {
            let Some(stamp) = stamp(path) else {
                return false;
            };
            self.seen.insert(path.clone(), stamp.clone()) != Some(stamp)
        });
        found
    }
}

/// Deepest folder that is looked into; symbolic links may make a circle.
const MAX_DEPTH: usize = 16;

fn walk(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let Ok(metadata) = std::fs::metadata(&path) else {
            continue;
        };
        if metadata.is_dir() {
            if depth < MAX_DEPTH && !is_hidden(&path) {
                walk(&path, depth + 1, found);
            }
        } else if is_manifest(&path) {
            found.push(path);
        }
    }
}

fn is_hidden(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

fn is_manifest(path: &Path) -> bool {
    let known = path
        .extension()
        .is_some_and(|extension| extension == "yaml" || extension == "yml" || extension == "json");
    known && !is_hidden(path)
}

fn stamp(path: &Path) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path).ok()?;
    metadata.is_file().then(|| Stamp {
        modified: metadata.modified().ok(),
        len: metadata.len(),
        inode: metadata.ino(),
    })
}

fn read(path: &Path) -> Outcome {
    let fail = |message: String, help: &str| {
        Err(vec![Finding {
            file: Some(path.to_owned()),
            line: None,
            severity: Severity::Error,
            object: None,
            message,
            help: help.to_owned(),
        }])
    };
    if std::fs::metadata(path).is_ok_and(|metadata| metadata.len() > MAX_FILE) {
        return fail(
            format!("the file is larger than {} MiB", MAX_FILE >> 20),
            "split it",
        );
    }
    match std::fs::read(path) {
        Ok(bytes) => match String::from_utf8(bytes) {
            Ok(text) => manifest::parse(path, &text),
            Err(_) => fail("the file is not UTF-8 text".to_owned(), "save it as UTF-8"),
        },
        Err(error) => fail(
            format!("the file cannot be read: {error}"),
            "let the control plane read it, or remove it",
        ),
    }
}

#[cfg(test)]
mod tests;
