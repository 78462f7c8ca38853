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

thread_local! {
    /// What the application's side of a connection says.
    pub(crate) static PLAINTEXT: RefCell<Box<[u8]>> = RefCell::new(vec![0; SIZE].into());
    /// What comes from the network to be decrypted (both are in use at once then).
    pub(super) static CIPHERTEXT: RefCell<Box<[u8]>> = RefCell::new(vec![0; SIZE].into());
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
