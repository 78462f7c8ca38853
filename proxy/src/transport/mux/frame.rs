//! The frames of a shared connection.
//!
//! ```text
//!  0               4       5                8
//!  ├ stream, u32 ──┼ kind ─┼ value, u24 ────┼ data: `value` bytes, kind 0 only
//! ```
//!
//! Numbers are big-endian. What they say:
//!
//! | kind | | value |
//! |---|---|---|
//! | 0 | data of the stream | its length |
//! | 1 | the stream begins; from the side that connected only, numbers grow | what is inside: 1 HTTP/1, 2 opaque bytes |
//! | 2 | the sender has said everything on the stream (FIN) | 0 |
//! | 3 | the stream is cut off, in both directions (RST) | 0 |
//! | 4 | the receiver has room for so many more bytes | bytes |
//! | 5 | no stream begins any more (stream 0) | 0 |

/// Bytes before the data.
pub const HEADER: usize = 8;
/// Bytes of data that a frame may have (24 bits could say more).
pub const MAX_DATA: usize = 64 * 1024;

/// What a stream carries, as ALPN says it of a connection that is not shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inside {
    Http1,
    Tcp,
}

/// What a frame says. `D` is where data stands: its length when written, its bytes when read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame<D> {
    Data(u32, D),
    Open(u32, Inside),
    End(u32),
    Reset(u32),
    Credit(u32, u32),
    Leaving,
}

/// Why bytes are no frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("a frame of kind {0} is not known")]
    Kind(u8),
    #[error("a stream with {0} inside is not known")]
    Inside(u32),
    #[error("{0} bytes of data are more than a frame may have")]
    TooLong(u32),
}

impl Frame<usize> {
    /// The frame; after [`Frame::Data`], the data must follow.
    pub fn header(self) -> [u8; HEADER] {
        let (stream, kind, value) = match self {
            Self::Data(stream, length) => (stream, 0, length as u32),
            Self::Open(stream, inside) => (stream, 1, 1 + inside as u32),
            Self::End(stream) => (stream, 2, 0),
            Self::Reset(stream) => (stream, 3, 0),
            Self::Credit(stream, bytes) => (stream, 4, bytes),
            Self::Leaving => (0, 5, 0),
        };
        let [_, a, b, c] = value.to_be_bytes();
        let [s, t, u, v] = stream.to_be_bytes();
        [s, t, u, v, kind, a, b, c]
    }
}

/// Reads frames out of bytes that come in pieces.
#[derive(Debug, Default)]
pub struct Decoder {
    header: [u8; HEADER],
    have: usize,
    /// The stream whose data comes, and how much of it is still to come.
    pub(super) data: (u32, usize),
}

impl Decoder {
    /// The next frame, taken off `input`; `None` when there is none whole in it. Data that is
    /// there in part is handed on in parts.
    ///
    /// # Errors
    /// The bytes are no frame; nothing after it can be read.
    pub fn next<'a>(
        &mut self,
        input: &mut &'a [u8],
    ) -> Result<Option<Frame<&'a [u8]>>, FrameError> {
        if self.data.1 == 0 {
            let n = input.len().min(HEADER - self.have);
            self.header[self.have..self.have + n].copy_from_slice(&input[..n]);
            self.have += n;
            *input = &input[n..];
            if self.have < HEADER {
                return Ok(None);
            }
            self.have = 0;
            let [s, t, u, v, kind, a, b, c] = self.header;
            let stream = u32::from_be_bytes([s, t, u, v]);
            let value = u32::from_be_bytes([0, a, b, c]);
            match kind {
                0 if value as usize > MAX_DATA => return Err(FrameError::TooLong(value)),
                0 => self.data = (stream, value as usize),
                1 => {
                    let inside = match value {
                        1 => Inside::Http1,
                        2 => Inside::Tcp,
                        other => return Err(FrameError::Inside(other)),
                    };
                    return Ok(Some(Frame::Open(stream, inside)));
                }
                2 => return Ok(Some(Frame::End(stream))),
                3 => return Ok(Some(Frame::Reset(stream))),
                4 => return Ok(Some(Frame::Credit(stream, value))),
                5 => return Ok(Some(Frame::Leaving)),
                other => return Err(FrameError::Kind(other)),
            }
        }
        let (stream, left) = self.data;
        let n = left.min(input.len());
        if n == 0 && left > 0 {
            return Ok(None);
        }
        let (data, rest) = input.split_at(n);
        self.data.1 -= n;
        *input = rest;
        Ok(Some(Frame::Data(stream, data)))
    }
}
