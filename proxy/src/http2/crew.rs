//! Tasks that serve streams, one after another.
//!
//! A stream's future is some kilobytes. A task of its own for each stream would take that memory
//! (from the slow side of the allocator: a task is aligned to cache lines), move the future into
//! it, and give it back, again and again; measured, a twelfth of all instructions of a call. So
//! a task that has served its stream waits for the next one.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::Request;

use super::stream;
use crate::http::flow::Flow;
use crate::worker::Worker;

/// A stream to be served.
pub(super) struct Job {
    pub(super) worker: Rc<Worker>,
    pub(super) flow: Rc<Flow>,
    pub(super) request: Request<RecvStream>,
    pub(super) respond: SendResponse<Bytes>,
}

/// The tasks of one worker that wait for streams.
#[derive(Default)]
pub struct Crew {
    idle: Rc<Idle>,
}

#[derive(Default)]
struct Idle {
    /// The one that has just ended is on top: its memory is warm.
    tasks: RefCell<Vec<Rc<Slot>>>,
    /// The fewest that waited since the last sweep: so many were not needed.
    fewest: Cell<usize>,
}

/// Where a waiting task is handed its next stream.
#[derive(Default)]
struct Slot {
    next: Cell<Option<Job>>,
    waker: Cell<Option<Waker>>,
    dismissed: Cell<bool>,
}

impl Crew {
    /// Serves a stream, in a task that waits or in a new one.
    pub(super) fn serve(&self, job: Job) {
        let waiting = {
            let mut tasks = self.idle.tasks.borrow_mut();
            let slot = tasks.pop();
            self.idle
                .fewest
                .set(self.idle.fewest.get().min(tasks.len()));
            slot
        };
        match waiting {
            Some(slot) => {
                slot.next.set(Some(job));
                slot.wake();
            }
            None => {
                let crew = Rc::downgrade(&self.idle);
                tokio::task::spawn_local(work(crew, job));
            }
        }
    }

    /// Dismisses the tasks that were not needed since the last call.
    pub fn sweep(&self) {
        let mut tasks = self.idle.tasks.borrow_mut();
        for slot in tasks.drain(..self.idle.fewest.get()) {
            slot.dismiss();
        }
        tasks.shrink_to_fit();
        self.idle.fewest.set(tasks.len());
    }

    /// Tasks that wait.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.idle.tasks.borrow().len()
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        for slot in self.idle.tasks.take() {
            slot.dismiss();
        }
    }
}

impl Slot {
    fn wake(&self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn dismiss(&self) {
        self.dismissed.set(true);
        self.wake();
    }

    /// The next stream; `None`: there is nothing more to do.
    async fn next(&self) -> Option<Job> {
        poll_fn(|cx| match self.next.take() {
            Some(job) => Poll::Ready(Some(job)),
            None if self.dismissed.get() => Poll::Ready(None),
            None => {
                self.waker.set(Some(cx.waker().clone()));
                Poll::Pending
            }
        })
        .await
    }
}

async fn work(crew: Weak<Idle>, mut job: Job) {
    let slot = Rc::new(Slot::default());
    loop {
        stream::serve(job.worker, job.flow, job.request, job.respond).await;
        match crew.upgrade() {
            Some(idle) => idle.tasks.borrow_mut().push(slot.clone()),
            None => return,
        }
        match slot.next().await {
            Some(next) => job = next,
            None => return,
        }
    }
}
