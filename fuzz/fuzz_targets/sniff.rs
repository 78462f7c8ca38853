//! The first bytes of a connection: an answer once given stays, and what it says is so.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_proxy::detect::{HTTP2_PREFACE, Sniff, client_hello, sniff};

fuzz_target!(|data: &[u8]| {
    let answer = sniff(data);
    let mut decided = None;
    // Every prefix of what is short; of what is long, a few.
    let step = data.len() / 512 + 1;
    for end in (0..=data.len()).step_by(step) {
        let now = sniff(&data[..end]);
        if let Some(before) = decided {
            assert_eq!(now, before, "it changed its mind at {end}");
        }
        if now != Sniff::NeedMore {
            decided = Some(now);
        }
    }
    if let Some(decided) = decided {
        assert_eq!(answer, decided);
    }
    match answer {
        Sniff::Http2 => assert!(data.starts_with(HTTP2_PREFACE)),
        Sniff::Tls => assert_eq!(data[0], 0x16),
        Sniff::Http1 => assert!(!data.starts_with(HTTP2_PREFACE) && data.contains(&b'\n')),
        Sniff::Opaque => assert!(!data.is_empty() && !matches!(client_hello(data), Ok(Some(_)))),
        Sniff::NeedMore => {}
    }
});
