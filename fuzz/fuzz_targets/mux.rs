//! Frames of shared connections: it does not matter in which pieces they come, and what is read is
//! what was written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_proxy::transport::mux::frame::{Decoder, Frame, FrameError, MAX_DATA};

/// What was read: frames, data of one stream that follows on another put together.
fn read(bytes: &[u8], piece: usize) -> (Vec<Frame<Vec<u8>>>, Option<FrameError>) {
    let mut decoder = Decoder::default();
    let mut frames: Vec<Frame<Vec<u8>>> = Vec::new();
    for mut input in bytes.chunks(piece) {
        while !input.is_empty() {
            let frame = match decoder.next(&mut input) {
                Ok(None) => break,
                Ok(Some(frame)) => frame,
                Err(error) => return (frames, Some(error)),
            };
            match (frame, frames.last_mut()) {
                (Frame::Data(_, []), _) => {}
                (Frame::Data(id, more), Some(Frame::Data(last, data))) if *last == id => {
                    data.extend_from_slice(more);
                }
                (Frame::Data(id, data), _) => frames.push(Frame::Data(id, data.to_vec())),
                (Frame::Open(id, inside), _) => frames.push(Frame::Open(id, inside)),
                (Frame::End(id), _) => frames.push(Frame::End(id)),
                (Frame::Reset(id), _) => frames.push(Frame::Reset(id)),
                (Frame::Credit(id, bytes), _) => frames.push(Frame::Credit(id, bytes)),
                (Frame::Leaving, _) => frames.push(Frame::Leaving),
            }
        }
    }
    (frames, None)
}

fuzz_target!(|data: &[u8]| {
    let whole = read(data, data.len().max(1));
    assert_eq!(whole, read(data, 1));
    assert_eq!(whole, read(data, 7));
    let mut written = Vec::new();
    for frame in &whole.0 {
        match frame {
            Frame::Data(id, data) => {
                for part in data.chunks(MAX_DATA) {
                    written.extend_from_slice(&Frame::Data(*id, part.len()).header());
                    written.extend_from_slice(part);
                }
            }
            Frame::Open(id, inside) => written.extend(Frame::Open(*id, *inside).header()),
            Frame::End(id) => written.extend(Frame::End(*id).header()),
            Frame::Reset(id) => written.extend(Frame::Reset(*id).header()),
            Frame::Credit(id, bytes) => written.extend(Frame::Credit(*id, *bytes).header()),
            Frame::Leaving => written.extend(Frame::Leaving.header()),
        }
    }
    assert_eq!(read(&written, written.len().max(1)), (whole.0, None));
});
