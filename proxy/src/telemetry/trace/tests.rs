use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::context::{ContextHeaders, SAMPLED};
use super::*;
use crate::telemetry::metrics::Registry;

const PARENT: &[u8] = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const NOT_SAMPLED: &[u8] = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
const IDS: Ids = Ids {
    trace_id: 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c,
    span_id: 0xb7ad_6b71_6920_3331,
};

fn tracer() -> (Tracer, span::SpanSource) {
    let (sink, source) = span_channel(Registry::new());
    source.on.store(true, Ordering::Relaxed);
    (Tracer::seeded(sink, 7), source)
}

#[test]
fn traceparent_is_read_by_the_letter() {
    let context = TraceContext::from_traceparent(PARENT).unwrap();
    assert_eq!(context.ids, Some(IDS));
    assert_eq!(context.decision, Some(true));
    let context = TraceContext::from_traceparent(NOT_SAMPLED).unwrap();
    assert_eq!(context.decision, Some(false));
    // A later version may be longer; version 00 may not.
    let later = b"cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more";
    assert_eq!(
        TraceContext::from_traceparent(later).unwrap().ids,
        Some(IDS)
    );
    for wrong in [
        &b""[..],
        b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0",
        b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
        b"00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        b"00-00000000000000000000000000000000-b7ad6b7169203331-01",
        b"00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        b"ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        b"cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01x",
        b"00-0af7651916cd43dd8448eb211c80319c_b7ad6b7169203331-01",
    ] {
        assert_eq!(TraceContext::from_traceparent(wrong), None, "{wrong:?}");
    }
}

#[test]
fn b3_is_read_in_both_forms() {
    let single = b"0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-1-05e3ac9a4f6e3b90";
    let context = TraceContext::from_b3(single).unwrap();
    assert_eq!((context.ids, context.decision), (Some(IDS), Some(true)));
    let short = TraceContext::from_b3(b"8448eb211c80319c-b7ad6b7169203331").unwrap();
    assert_eq!(short.ids.unwrap().trace_id, 0x8448_eb21_1c80_319c);
    assert_eq!(short.decision, None);
    let deny = TraceContext::from_b3(b"0").unwrap();
    assert_eq!((deny.ids, deny.decision), (None, Some(false)));
    assert_eq!(TraceContext::from_b3(b"d").unwrap().decision, Some(true));
    for wrong in [
        &b""[..],
        b"2",
        b"8448eb211c80319c-b7ad6b7169203331-x",
        b"1-2",
        b"-",
    ] {
        assert_eq!(TraceContext::from_b3(wrong), None, "{wrong:?}");
    }

    let multi = TraceContext::from_b3_headers(
        Some(b"0af7651916cd43dd8448eb211c80319c"),
        Some(b"b7ad6b7169203331"),
        Some(b"0"),
        None,
    )
    .unwrap();
    assert_eq!((multi.ids, multi.decision), (Some(IDS), Some(false)));
    let debug = TraceContext::from_b3_headers(None, None, Some(b"0"), Some(b"1")).unwrap();
    assert_eq!(debug.decision, Some(true));
    assert_eq!(TraceContext::from_b3_headers(None, None, None, None), None);
    assert_eq!(
        TraceContext::from_b3_headers(Some(b"8448eb211c80319c"), None, None, None),
        None
    );
}

#[test]
fn traceparent_goes_before_b3_and_two_of_them_are_none() {
    let mut headers = ContextHeaders::default();
    assert!(!headers.take(b"tracestate", b"a=b"));
    assert!(headers.take(b"B3", b"0"));
    assert!(headers.take(b"TraceParent", PARENT));
    assert_eq!(headers.context().unwrap().decision, Some(true));
    assert!(headers.take(b"traceparent", NOT_SAMPLED));
    assert_eq!(
        headers.context().unwrap().decision,
        Some(false),
        "b3 is left"
    );
    assert_eq!(headers.context().unwrap().ids, None);
}

#[test]
fn nothing_is_added_or_changed_unless_it_is_traced() {
    let (tracer, source) = tracer();
    let all = Sampler::per_myriad(10_000);
    let none = Sampler::default();
    let no = TraceContext::from_traceparent(NOT_SAMPLED).unwrap();

    for (incoming, sampler) in [(None, none), (Some(&no), all)] {
        let started = tracer.start(incoming, sampler, SpanKind::Client);
        assert!(started.propagate.is_none() && started.span.is_none());
    }
    source.on.store(false, Ordering::Relaxed);
    let yes = TraceContext::from_traceparent(PARENT).unwrap();
    let started = tracer.start(Some(&yes), all, SpanKind::Client);
    assert!(started.propagate.is_none() && started.span.is_none());
}

#[test]
fn the_decision_is_made_once_along_the_way() {
    let (tracer, _source) = tracer();
    let one_percent = Sampler::per_myriad(100);
    let mut sampled = 0;
    for _ in 0..20_000 {
        let client = tracer.start(None, one_percent, SpanKind::Client);
        let onwards = TraceContext::from(client.propagate.unwrap());
        let server = tracer.start(Some(&onwards), one_percent, SpanKind::Server);
        assert_eq!(client.span.is_some(), server.span.is_some());
        sampled += u32::from(client.span.is_some());
    }
    assert!((120..=280).contains(&sampled), "{sampled} of 20000 at 1 %");
}

#[test]
fn a_server_span_is_the_child_of_the_client_span() {
    let (tracer, mut source) = tracer();
    let incoming = TraceContext::from_traceparent(PARENT).unwrap();
    let client = tracer.start(Some(&incoming), Sampler::default(), SpanKind::Client);
    let wire = client.propagate.unwrap().to_bytes();
    let onwards = TraceContext::from_traceparent(&wire).unwrap();
    let server = tracer.start(Some(&onwards), Sampler::default(), SpanKind::Server);
    server.span.unwrap().finish();
    drop(client.span);

    let server = source.queue.try_recv().unwrap();
    let client = source.queue.try_recv().unwrap();
    assert_eq!(client.ids.trace_id, IDS.trace_id);
    assert_eq!(client.parent, Some(IDS.span_id));
    assert_eq!(server.ids.trace_id, IDS.trace_id);
    assert_eq!(server.parent, Some(client.ids.span_id));
    assert_eq!(server.error, None);
    assert_eq!(client.error.as_deref(), Some("cancelled"));
    assert!(source.queue.try_recv().is_err(), "sent once each");
}

#[test]
fn flags_of_the_trace_go_with_it_and_unknown_ones_do_not() {
    let (tracer, _source) = tracer();
    let incoming = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-ff";
    let incoming = TraceContext::from_traceparent(incoming).unwrap();
    let started = tracer.start(Some(&incoming), Sampler::default(), SpanKind::Client);
    assert!(started.propagate.unwrap().to_bytes().ends_with(b"-03"));
}

#[test]
fn a_full_queue_drops_and_counts() {
    let registry = Registry::new();
    let (sink, source) = span_channel(registry.clone());
    source.on.store(true, Ordering::Relaxed);
    let tracer = Tracer::seeded(sink, 1);
    for _ in 0..SPAN_QUEUE + 3 {
        let started = tracer.start(None, Sampler::per_myriad(10_000), SpanKind::Server);
        started.span.unwrap().finish();
    }
    let snapshot = registry.snapshot();
    let (labels, dropped) = &snapshot.counters[0];
    assert_eq!(
        (labels.event, *dropped),
        (crate::telemetry::Counter::SpansDropped, 3)
    );
}

proptest! {
    #[test]
    fn what_is_written_is_read(trace in 1u128.., span in 1u64.., flags: u8) {
        let parent = Traceparent { ids: Ids { trace_id: trace, span_id: span }, flags };
        let read = TraceContext::from_traceparent(&parent.to_bytes()).unwrap();
        prop_assert_eq!(read, TraceContext::from(parent));
        prop_assert_eq!(read.decision, Some(flags & SAMPLED != 0));
    }

    #[test]
    fn bytes_from_outside_never_panic(bytes: Vec<u8>, more: Option<Vec<u8>>) {
        let more = more.as_deref();
        let _ = TraceContext::from_traceparent(&bytes);
        let _ = TraceContext::from_b3(&bytes);
        let _ = TraceContext::from_b3_headers(Some(&bytes), more, more, Some(&bytes));
    }

    /// One wrong byte in a good header either stays a context with valid ids or is none.
    #[test]
    fn a_bent_traceparent_is_refused_or_valid(at in 0usize..55, byte: u8) {
        let mut bent = PARENT.to_vec();
        bent[at] = byte;
        if let Some(read) = TraceContext::from_traceparent(&bent) {
            prop_assert!(byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte) || byte == b'-');
            let ids = read.ids.unwrap();
            prop_assert!(ids.trace_id != 0 && ids.span_id != 0);
        }
    }
}
