//! Where the world comes from. A source watches something and reports [`Update`]s; everything
//! after it (model, compiler, server) is the same for all of them.
//!
//! - [`folder`]: a folder of manifests.
//! - [`kubernetes`]: a cluster.
//! - [`gateway`]: routes of the Gateway API, read the same from both; so is what [`slices`] say.

pub mod folder;
pub mod gateway;
pub mod kubernetes;
mod slices;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use crate::finding::Finding;
use crate::model::{Change, ObjectRef};

/// What a source reports, in order.
#[derive(Debug)]
pub enum Update {
    /// Objects changed. To be applied together.
    Changes {
        changes: Vec<Change>,
        /// When the source learnt of it.
        seen: Instant,
    },
    /// Everything the source cannot read now; replaces what it reported before.
    Findings(Vec<Finding>),
    /// Everything that was there at the start has been reported.
    Synced,
}

/// Where updates go. A source ends when nobody listens any more.
pub type Sink = mpsc::Sender<Update>;

/// A source that is open.
pub enum Source {
    Folder(folder::Folder),
    Kubernetes(kubernetes::Kubernetes),
}

impl Source {
    /// Tells where objects are written, also while the source runs.
    pub fn locator(&self) -> Arc<dyn Locate> {
        match self {
            Self::Folder(folder) => Arc::new(folder.locator()),
            Self::Kubernetes(_) => Arc::new(kubernetes::NoFiles),
        }
    }

    /// Watches until nobody listens any more.
    pub async fn run(self, sink: Sink) {
        match self {
            Self::Folder(folder) => folder.run(sink).await,
            Self::Kubernetes(cluster) => cluster.run(sink).await,
        }
    }
}

/// Tells where an object is written, for messages.
pub trait Locate: Send + Sync {
    /// The file and the line of a field (names from the object's root; list items by their
    /// index), or of the nearest field above it. `None` when the source has no files.
    fn locate(&self, object: &ObjectRef, path: &[String]) -> Option<(PathBuf, Option<u32>)>;
}
