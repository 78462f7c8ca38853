//! Copies of requests (HTTPRequestMirrorFilter): each goes its own way in a task of its own, and
//! what is answered is thrown away. The request itself never waits for a copy: a copy that cannot
//! keep up, or is one too many, is given up.
//!
//! The engines send ([`crate::http1`], [`crate::http2`]); here is what they share.

use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::tables::{Backend, Plan};
use crate::worker::Worker;

/// Copies under way of one worker; further ones are left out.
const MAX_MIRRORS: usize = 256;
/// Chunks of a body that wait for a copy's connection; a copy that is further behind is given up.
const BEHIND: usize = 64;
/// How long a copy may take, its answer included.
const LIMIT: Duration = Duration::from_secs(30);

/// Where a request's body goes beside its way.
#[derive(Debug)]
pub struct Tees(RefCell<Vec<mpsc::Sender<Bytes>>>);

impl Tees {
    /// Bytes of the body, once each.
    pub fn push(&self, bytes: &[u8]) {
        if !bytes.is_empty() && !self.0.borrow().is_empty() {
            self.push_bytes(&Bytes::copy_from_slice(bytes));
        }
    }

    /// The same without a copy of them.
    pub fn push_bytes(&self, bytes: &Bytes) {
        self.0
            .borrow_mut()
            .retain(|tee| tee.try_send(bytes.clone()).is_ok());
    }

    /// The body has ended as it should; said by an empty chunk.
    pub fn end(&self) {
        self.push_bytes(&Bytes::new());
        self.0.borrow_mut().clear();
    }
}

/// Why a copy was given up.
pub type Failed = Box<dyn std::error::Error>;

/// Starts the copies of a request whose body is still to come if `more`; `send` makes the way of
/// one. `None` when nothing of the body is wanted.
pub fn start<F>(
    worker: &Rc<Worker>,
    plan: &Plan,
    more: bool,
    mut send: impl FnMut(Arc<Backend>, mpsc::Receiver<Bytes>) -> F,
) -> Option<Rc<Tees>>
where
    F: Future<Output = Result<(), Failed>> + 'static,
{
    let mut tees = Vec::new();
    for mirror in &plan.mirrors {
        if worker.random() >= mirror.share {
            continue;
        }
        let Some(room) = Room::take(worker) else {
            tracing::debug!("a copy is left out: {MAX_MIRRORS} are under way");
            continue;
        };
        let (tee, body) = mpsc::channel(BEHIND);
        tees.push(tee);
        let backend = mirror.backend.clone();
        let sending = send(backend.clone(), body);
        tokio::task::spawn_local(async move {
            let _room = room;
            let to = (&backend.namespace, &backend.service);
            match tokio::time::timeout(LIMIT, sending).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!("copy to {}/{}: {error}", to.0, to.1),
                Err(_) => tracing::debug!("copy to {}/{}: not done in time", to.0, to.1),
            }
        });
    }
    (more && !tees.is_empty()).then(|| Rc::new(Tees(RefCell::new(tees))))
}

/// A place among the copies under way.
struct Room(Rc<Worker>);

impl Room {
    fn take(worker: &Rc<Worker>) -> Option<Self> {
        let under_way = worker.mirrors.get();
        (under_way < MAX_MIRRORS).then(|| {
            worker.mirrors.set(under_way + 1);
            Self(worker.clone())
        })
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.0.mirrors.set(self.0.mirrors.get() - 1);
    }
}
