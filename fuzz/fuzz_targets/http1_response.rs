//! A server's bytes: our engine and hyper find the same response in them, or one refuses.
#![no_main]

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt, Empty};
use libfuzzer_sys::fuzz_target;
use weft_fuzz::{Memory, Message, check_written_on, data_of, drive, end_of_body};
use weft_proxy::http1::framing::BodyReader;
use weft_proxy::http1::head::{self, Head, Parsed};

/// The first response that is not interim.
fn ours(bytes: &[u8], method: &Method, step: usize) -> Option<Message> {
    let mut rest = bytes;
    loop {
        let mut found = Head::default();
        let parse = |bytes: &[u8], head: &mut Head| {
            head::parse_response(bytes, method.as_str().as_bytes(), head)
        };
        if parse(rest, &mut found) != Ok(Parsed::Complete) {
            return None;
        }
        check_written_on(rest, &found, |bytes, head| {
            parse(bytes, head) == Ok(Parsed::Complete)
        });
        if matches!(found.status, 100..=199) && found.status != 101 {
            rest = &rest[found.end..];
            continue;
        }
        let body = &rest[found.end..];
        let framing = found.framing.body;
        let reader = BodyReader::of_response(framing);
        let whole = end_of_body(reader, body, usize::MAX);
        assert_eq!(
            end_of_body(reader, body, step),
            whole,
            "it depends on the pieces"
        );
        return whole.map(|length| Message {
            method: Vec::new(),
            status: found.status,
            body: data_of(framing, &body[..length]),
        });
    }
}

fn theirs(bytes: &[u8], method: &Method) -> Option<Message> {
    let mut memory = Memory::new(bytes);
    memory.wait_for_write = true;
    drive(async {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(memory).await.ok()?;
        let request = Request::builder()
            .method(method)
            .uri("/")
            .header("host", "x")
            .body(Empty::<Bytes>::new())
            .ok()?;
        let mut connection = std::pin::pin!(connection);
        let mut answer = std::pin::pin!(async {
            let response = sender.send_request(request).await.ok()?;
            let status = response.status().as_u16();
            let body = response
                .into_body()
                .collect()
                .await
                .ok()?
                .to_bytes()
                .to_vec();
            Some(Message {
                method: Vec::new(),
                status,
                body,
            })
        });
        let mut ended = false;
        std::future::poll_fn(|cx| {
            use std::future::Future;
            use std::task::Poll;
            if let Poll::Ready(answer) = answer.as_mut().poll(cx) {
                return Poll::Ready(answer);
            }
            if !ended && connection.as_mut().poll(cx).is_ready() {
                ended = true;
                cx.waker().wake_by_ref();
            }
            Poll::Pending
        })
        .await
    })
    .flatten()
}

fuzz_target!(|data: &[u8]| {
    let [step, method, bytes @ ..] = data else {
        return;
    };
    let method = match method % 4 {
        0 | 1 => Method::GET,
        2 => Method::HEAD,
        _ => Method::POST,
    };
    let Some(ours) = ours(bytes, &method, usize::from(*step) + 1) else {
        return;
    };
    if ours.status == 101 {
        return;
    }
    if let Some(theirs) = theirs(bytes, &method) {
        assert_eq!(ours, theirs);
    }
});
