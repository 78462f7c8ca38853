//! Bytes that were sent as urgent (RFC 9293 section 3.8.5; telnet, FTP's ABOR, databases that break
//! off a query), and those behind them.
//!
//! They pass in their place among the others, as RFC 6093 section 6 has it: between proxies nothing
//! says that a byte is urgent. But the kernel ends a read before one, whatever stands behind it, and
//! tokio takes a read that has not filled its buffer for the last one until more comes. So the kernel
//! is asked to say when something urgent comes (`SIGURG`), and those who copy read once more then;
//! where nothing is urgent, it costs two system calls a connection and none a read.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use tokio::io::ReadBuf;
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};

use crate::hashing::TableMap;
use crate::transport::Io;

/// When is looked after a signal: it comes with the announcement, which may be before the byte.
const LOOKS: [Duration; 3] = [
    Duration::ZERO,
    Duration::from_millis(10),
    Duration::from_millis(100),
];

thread_local! {
    static WATCHED: RefCell<Watched> = RefCell::default();
}

/// The connections of this worker.
#[derive(Default)]
struct Watched {
    newest: u64,
    all: TableMap<u64, Rc<State>>,
}

struct State {
    fd: RawFd,
    /// A read that would wait is to be tried once more.
    again: Cell<bool>,
    reader: RefCell<Option<Waker>>,
}

/// A connection on which something urgent may come.
pub(super) struct Urgent {
    id: u64,
    state: Rc<State>,
}

impl std::fmt::Debug for Urgent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Urgent").finish_non_exhaustive()
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        // A thread that ends has no use for it.
        let _ = WATCHED.try_with(|watched| watched.borrow_mut().all.remove(&self.id));
    }
}

impl Urgent {
    /// Only an application's own connection has such bytes.
    pub fn watch(io: &Io) -> Option<Self> {
        let Io::Plain(tcp) = io else { return None };
        let fd = tcp.as_raw_fd();
        // SAFETY: the descriptor is open, and F_SETOWN takes a process id. A failure is that of a
        // kernel without it: then there is no signal.
        unsafe { libc::fcntl(fd, libc::F_SETOWN, libc::getpid()) };
        let state = Rc::new(State {
            fd,
            // What came before nobody has been told of.
            again: Cell::new(true),
            reader: RefCell::default(),
        });
        let id = WATCHED.with_borrow_mut(|watched| {
            watched.newest += 1;
            watched.all.insert(watched.newest, state.clone());
            watched.newest
        });
        Some(Self { id, state })
    }

    /// Reads what a read that waits may have overlooked. `tcp` is the connection that is watched.
    pub fn poll_read(
        &self,
        cx: &mut Context<'_>,
        tcp: &TcpStream,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.state.again.get() {
            let unfilled = buf.initialize_unfilled();
            match recv(tcp.as_raw_fd(), unfilled, MsgFlags::MSG_DONTWAIT) {
                Ok(n) => {
                    buf.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::EAGAIN) => self.state.again.set(false),
                Err(Errno::EINTR) => cx.waker().wake_by_ref(),
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
        match &mut *self.state.reader.borrow_mut() {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }
}

/// Wakes this worker's connections when something urgent has come on them.
///
/// # Errors
/// The signal cannot be listened to.
pub async fn run() -> io::Result<()> {
    let mut signals = signal(SignalKind::from_raw(libc::SIGURG))?;
    while signals.recv().await.is_some() {
        for pause in LOOKS {
            tokio::time::sleep(pause).await;
            WATCHED.with_borrow(look);
        }
    }
    Ok(())
}

/// Asks the kernel which have something urgent.
fn look(watched: &Watched) {
    let of = |state: &Rc<State>| libc::pollfd {
        fd: state.fd,
        events: libc::POLLPRI,
        revents: 0,
    };
    let mut asked: Vec<_> = watched.all.values().map(of).collect();
    // SAFETY: as many entries as there are, and it does not wait. A descriptor that has been closed
    // since is answered as such, or as another's, who reads once in vain.
    let some = unsafe { libc::poll(asked.as_mut_ptr(), asked.len() as libc::nfds_t, 0) };
    if some <= 0 {
        return;
    }
    for (asked, state) in asked.iter().zip(watched.all.values()) {
        if asked.revents & libc::POLLPRI != 0 {
            state.again.set(true);
            if let Some(reader) = state.reader.borrow_mut().take() {
                reader.wake();
            }
        }
    }
}
