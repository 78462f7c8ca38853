//! Buffers that belong to the worker, not to a connection.
//!
//! A read goes into the worker's buffer, which is large and warm in the cache; what cannot be
//! passed on at once is copied to where it waits. A connection that is idle holds none.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use tokio::io::{AsyncRead, ReadBuf};

/// Bytes per read: four full TLS records, and as much as rustls buffers for one write.
pub const SIZE: usize = 64 * 1024;

/// What an empty buffer gets on its first read, so that the next ones need no reallocation: a
/// usual request head.
const FIRST: usize = 4 * 1024;

/// Empty buffers that a worker keeps for [`Spare`].
const SPARES: usize = 4;

thread_local! {
    static SPARE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
    /// What the application's side of a connection says.
    pub(crate) static PLAINTEXT: RefCell<Box<[u8]>> = RefCell::new(vec![0; SIZE].into());
    /// What comes from the network to be decrypted (both are in use at once then).
    pub(super) static CIPHERTEXT: RefCell<Box<[u8]>> = RefCell::new(vec![0; SIZE].into());
}

/// A buffer of the worker's while something stands in it, with room for [`SIZE`] bytes; nothing
/// otherwise.
#[derive(Default)]
pub struct Spare(Vec<u8>);

impl Spare {
    /// To be appended to.
    pub fn fill(&mut self) -> &mut Vec<u8> {
        if self.0.capacity() == 0 {
            let spare = SPARE.with_borrow_mut(Vec::pop);
            self.0 = spare.unwrap_or_else(|| Vec::with_capacity(SIZE + 1024));
        }
        &mut self.0
    }

    /// Empties it, and gives it back.
    pub fn clear(&mut self) {
        let mut buffer = std::mem::take(&mut self.0);
        if (SIZE..=2 * SIZE).contains(&buffer.capacity()) {
            buffer.clear();
            // A thread that ends has no use for it.
            let _ = SPARE.try_with(|spare| {
                let mut spare = spare.borrow_mut();
                if spare.len() < SPARES {
                    spare.push(buffer);
                }
            });
        }
    }
}

impl std::ops::Deref for Spare {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Reads once and appends to `buf`, which needs no room before. 0 is the end.
///
/// # Errors
/// Those of the stream.
pub fn poll_read_buf<R: AsyncRead + Unpin>(
    from: &mut R,
    cx: &mut Context<'_>,
    buf: &mut BytesMut,
) -> Poll<io::Result<usize>> {
    PLAINTEXT.with(|scratch| {
        let mut scratch = scratch.borrow_mut();
        let mut read = ReadBuf::new(&mut scratch);
        ready!(Pin::new(from).poll_read(cx, &mut read))?;
        let read = read.filled();
        if !read.is_empty() {
            if buf.is_empty() {
                buf.reserve(read.len().max(FIRST));
            }
            buf.extend_from_slice(read);
        }
        Poll::Ready(Ok(read.len()))
    })
}
