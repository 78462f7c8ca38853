//! A client's bytes: our engine and hyper find the same requests in them, or one refuses.
#![no_main]

use std::cell::RefCell;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::service::service_fn;
use libfuzzer_sys::fuzz_target;
use weft_fuzz::{Memory, Message, drive, our_requests};
use weft_proxy::http1::head::{self, Head, HeadError};

/// What hyper's server takes for whole requests.
fn theirs(bytes: &[u8]) -> Vec<Message> {
    let messages = RefCell::new(Vec::new());
    let service = service_fn(|request: http::Request<hyper::body::Incoming>| async {
        let method = request.method().as_str().as_bytes().to_vec();
        let body = request.into_body().collect().await?.to_bytes().to_vec();
        messages.borrow_mut().push(Message {
            method,
            status: 0,
            body,
        });
        Ok::<_, hyper::Error>(http::Response::new(Empty::<Bytes>::new()))
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .header_read_timeout(None)
        .half_close(true)
        .serve_connection(Memory::new(bytes), service);
    let _ = drive(connection);
    messages.into_inner()
}

fuzz_target!(|data: &[u8]| {
    let Some((step, bytes)) = data.split_first() else {
        return;
    };
    // As the engine does with what it cannot read.
    let mut bytes = bytes.to_vec();
    if matches!(
        head::parse_request(&bytes, &mut Head::default()),
        Err(HeadError::Syntax(_))
    ) {
        head::unfold(&mut bytes);
        assert!(!head::unfold(&mut bytes), "a fold was left");
    }
    let ours = our_requests(&bytes, usize::from(*step) + 1);
    if ours.is_empty() {
        return;
    }
    for (i, (ours, theirs)) in ours.iter().zip(theirs(&bytes)).enumerate() {
        assert_eq!(*ours, theirs, "request {i}");
    }
});
