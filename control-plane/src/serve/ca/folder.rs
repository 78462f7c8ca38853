//! The store of the folder source: files of the data directory, 0600 in a directory of 0700, each
//! written whole or not at all.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::rotation::Request;
use super::store::{Change, Files, Snapshot, Store};
use super::{CaError, rotation};

const REQUEST_FILE: &str = "rotation-request";

/// The data directory.
#[derive(Clone, Debug)]
pub(super) struct Folder(PathBuf);

#[tonic::async_trait]
impl Store for Folder {
    fn place(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    async fn load(&self) -> Result<Option<Snapshot>, CaError> {
        self.read_all()
    }

    async fn create(&self, files: &Files) -> Result<String, CaError> {
        self.apply(&Change::creating(files))?;
        Ok(String::new())
    }

    async fn save(&self, _: &str, change: &Change) -> Result<String, CaError> {
        self.apply(change)?;
        Ok(String::new())
    }

    async fn take_request(&self) -> Result<Option<Request>, CaError> {
        let Some(text) = self.read(REQUEST_FILE)? else {
            return Ok(None);
        };
        self.remove(REQUEST_FILE)?;
        Ok(Request::named(text.trim()))
    }
}

impl Folder {
    /// Makes the directory if it is not there and takes others' rights away if they have any.
    pub(super) fn open(path: &Path) -> Result<Self, CaError> {
        let fail = |action| move |source| io(action, path, source);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(fail("cannot make the directory"))?;
        let mode = fs::metadata(path)
            .map_err(fail("cannot read"))?
            .permissions()
            .mode();
        if mode & 0o077 != 0 {
            fs::set_permissions(path, fs::Permissions::from_mode(0o700))
                .map_err(fail("cannot take other users' rights from"))?;
        }
        Ok(Self(path.to_owned()))
    }

    /// All files; `None` when no authority has been made here.
    pub(super) fn read_all(&self) -> Result<Option<Snapshot>, CaError> {
        let mut files = Files::new();
        let entries = fs::read_dir(&self.0).map_err(|error| io("cannot read", &self.0, error))?;
        for entry in entries {
            let entry = entry.map_err(|error| io("cannot read", &self.0, error))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let ours = name == rotation::STATE_FILE || name.ends_with(".pem");
            if ours
                && !name.starts_with('.')
                && let Some(text) = self.read(&name)?
            {
                files.insert(name, text);
            }
        }
        let made = files.contains_key(rotation::STATE_FILE);
        Ok(made.then(|| Snapshot {
            files,
            ..Snapshot::default()
        }))
    }

    /// Writes and removes files, in an order that is good at every step: nothing uses new files
    /// until the state, which comes after them, names them; what it no longer names goes last.
    pub(super) fn apply(&self, change: &Change) -> Result<(), CaError> {
        let is_state = |(name, _): &&(String, String)| name == rotation::STATE_FILE;
        for (name, text) in change.put.iter().filter(|file| !is_state(file)) {
            self.write(name, text.as_bytes())?;
        }
        for (name, text) in change.put.iter().filter(is_state) {
            self.write(name, text.as_bytes())?;
        }
        for name in &change.remove {
            // What stays behind does no harm.
            if let Err(error) = self.remove(name) {
                tracing::warn!("{error}");
            }
        }
        Ok(())
    }

    /// Leaves a request for the control plane that runs.
    pub(super) fn leave_request(&self, request: Request) -> Result<(), CaError> {
        self.write(REQUEST_FILE, format!("{}\n", request.name()).as_bytes())
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The content of a file; `None` when it is not there.
    pub(super) fn read(&self, name: &str) -> Result<Option<String>, CaError> {
        let path = self.path(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io("cannot read", &path, error)),
        }
    }

    /// Writes a file so that after a crash either the old or the new content is there.
    pub(super) fn write(&self, name: &str, content: &[u8]) -> Result<(), CaError> {
        let path = self.path(name);
        let new = self.path(&format!(".{name}.new"));
        let write = || {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&new)?;
            file.write_all(content)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(&self.0)?.sync_all()
        };
        write().map_err(|error| io("cannot write", &path, error))
    }

    /// Removes a file; that it is not there is well.
    pub(super) fn remove(&self, name: &str) -> Result<(), CaError> {
        let path = self.path(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(io("cannot remove", &path, error))
            }
            _ => Ok(()),
        }
    }

    /// Held while files are made for the first time, so that two processes do not make them twice.
    pub(super) fn lock_for_change(&self) -> Result<File, CaError> {
        let (path, file) = self.lock_file("change.lock")?;
        file.lock()
            .map_err(|error| io("cannot lock", &path, error))?;
        Ok(file)
    }

    /// Held by the one control plane that runs.
    pub(super) fn lock_for_serving(&self) -> Result<File, CaError> {
        let (path, file) = self.lock_file("serve.lock")?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(CaError::InUse(self.0.clone())),
            Err(TryLockError::Error(error)) => Err(io("cannot lock", &path, error)),
        }
    }

    fn lock_file(&self, name: &str) -> Result<(PathBuf, File), CaError> {
        let path = self.path(name);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|error| io("cannot open", &path, error))?;
        Ok((path, file))
    }
}

fn io(action: &'static str, path: &Path, source: std::io::Error) -> CaError {
    CaError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}
