//! When a server that refuses a request can be asked again, as it says itself.
//!
//! HTTP has `Retry-After` (RFC 9110 section 10.2.3). gRPC has `grpc-retry-pushback-ms` (gRFC A6),
//! and `google.rpc.RetryInfo` among the details of the status (`grpc-status-details-bin`; Google's
//! AIP-193), which the first one goes before. What cannot be read says nothing.

use std::time::Duration;

use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use prost::Message;

/// Longest time that is believed.
const LONGEST: Duration = Duration::from_secs(3600);
/// RESOURCE_EXHAUSTED and UNAVAILABLE: the codes that speak of the server, not of the call.
const SPARING: [u32; 2] = [8, 14];
const RETRY_INFO: &str = "google.rpc.RetryInfo";
/// With and without padding ("gRPC over HTTP2", Custom-Metadata).
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// What a server says of another try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Again {
    /// Not before so long.
    After(Duration),
    /// None is wanted.
    Never,
}

impl Again {
    /// Of an HTTP response: `Retry-After` in seconds; dates are left to the client.
    pub fn of_http(value: Option<&[u8]>) -> Option<Self> {
        let seconds: u64 = std::str::from_utf8(value?).ok()?.trim().parse().ok()?;
        Some(Self::After(Duration::from_secs(seconds).min(LONGEST)))
    }

    /// Of a gRPC call that has failed, by the values of its fields: `grpc-retry-pushback-ms`,
    /// `grpc-status-details-bin`, `retry-after`.
    pub fn of_grpc(
        pushback: Option<&[u8]>,
        details: Option<&[u8]>,
        after: Option<&[u8]>,
    ) -> Option<Self> {
        if let Some(pushback) = pushback {
            // A negative number, or none at all, asks for no other try.
            let millis = std::str::from_utf8(pushback).ok();
            let millis = millis.and_then(|millis| millis.trim().parse().ok());
            return Some(millis.map_or(Self::Never, |millis| {
                Self::After(Duration::from_millis(millis).min(LONGEST))
            }));
        }
        match details.and_then(retry_delay) {
            Some(delay) => Some(Self::After(delay.min(LONGEST))),
            None => Self::of_http(after),
        }
    }

    /// For how long the endpoint is left alone, after a response with this status.
    pub fn spares(self, status: u16) -> Option<Duration> {
        self.pause().filter(|_| matches!(status, 429 | 503))
    }

    /// The same after a gRPC call with this code.
    pub fn spares_calls(self, code: u32) -> Option<Duration> {
        self.pause().filter(|_| SPARING.contains(&code))
    }

    fn pause(self) -> Option<Duration> {
        match self {
            Self::After(pause) if !pause.is_zero() => Some(pause),
            _ => None,
        }
    }
}

/// `google.rpc.Status`, without what is not needed.
#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(message, repeated, tag = "3")]
    details: Vec<Any>,
}

/// `google.protobuf.Any`
#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "bytes", tag = "2")]
    value: bytes::Bytes,
}

/// `google.rpc.RetryInfo`
#[derive(Clone, PartialEq, Message)]
struct RetryInfo {
    #[prost(message, optional, tag = "1")]
    retry_delay: Option<Delay>,
}

/// `google.protobuf.Duration`
#[derive(Clone, Copy, PartialEq, Message)]
struct Delay {
    #[prost(int64, tag = "1")]
    seconds: i64,
    #[prost(int32, tag = "2")]
    nanos: i32,
}

/// The delay of the RetryInfo among a status's details, if there is one that makes sense.
fn retry_delay(details: &[u8]) -> Option<Duration> {
    // Of several values, which a comma separates, the first.
    let first = details.split(|byte| *byte == b',').next()?.trim_ascii();
    let status = Status::decode(&BASE64.decode(first).ok()?[..]).ok()?;
    status.details.into_iter().find_map(|detail| {
        let (_, name) = detail.type_url.rsplit_once('/')?;
        if name != RETRY_INFO {
            return None;
        }
        let delay = RetryInfo::decode(detail.value).ok()?.retry_delay?;
        let seconds = u64::try_from(delay.seconds).ok()?;
        let nanos = u32::try_from(delay.nanos).ok()?;
        let whole = Duration::from_secs(seconds);
        (nanos < 1_000_000_000).then(|| whole.saturating_add(Duration::from_nanos(nanos.into())))
    })
}

#[cfg(test)]
mod tests {
    use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
    use proptest::prelude::*;

    use super::*;

    fn after(seconds: u64) -> Option<Again> {
        Some(Again::After(Duration::from_secs(seconds)))
    }

    #[test]
    fn who_says_when_to_come_back_is_left_alone_until_then() {
        for (status, said, expected) in [
            (429, Some("7"), Some(7)),
            (503, Some(" 7 "), Some(7)),
            (503, Some("100000"), Some(3600)),
            (503, Some("0"), None),
            (503, Some("Fri, 31 Dec 1999 23:59:59 GMT"), None),
            (503, None, None),
            (500, Some("7"), None),
        ] {
            let again = Again::of_http(said.map(str::as_bytes));
            let spared = again.and_then(|again| again.spares(status));
            assert_eq!(
                spared,
                expected.map(Duration::from_secs),
                "{status} {said:?}"
            );
        }
        for (code, pushback, said, expected) in [
            (8, Some("1500"), None, Some(1500)),
            (14, Some("1500"), Some("9"), Some(1500)),
            (8, None, Some("9"), Some(9000)),
            (8, Some("-1"), Some("9"), None),
            (8, Some("0"), None, None),
            (8, None, None, None),
            (4, Some("1500"), None, None),
        ] {
            let bytes = |given: Option<&'static str>| given.map(str::as_bytes);
            let again = Again::of_grpc(bytes(pushback), None, bytes(said));
            let spared = again.and_then(|again| again.spares_calls(code));
            assert_eq!(
                spared,
                expected.map(Duration::from_millis),
                "{code} {pushback:?} {said:?}"
            );
        }
    }

    #[test]
    fn a_server_may_want_no_other_try() {
        for said in ["-1", "soon", "", "1.5"] {
            let again = Again::of_grpc(Some(said.as_bytes()), None, Some(b"3"));
            assert_eq!(again, Some(Again::Never), "{said:?}");
        }
    }

    /// A status as a server sends it: `message` besides, and another detail first.
    fn status(seconds: i64, nanos: i32) -> Vec<u8> {
        let retry = RetryInfo {
            retry_delay: Some(Delay { seconds, nanos }),
        };
        let detail = |name: &str, value: Vec<u8>| Any {
            type_url: format!("type.googleapis.com/{name}"),
            value: value.into(),
        };
        let status = Status {
            details: vec![
                detail("google.rpc.QuotaFailure", b"\x0a\x00".to_vec()),
                detail(RETRY_INFO, retry.encode_to_vec()),
            ],
        };
        // code: 8, message: "slow down"
        let mut bytes = b"\x08\x08\x12\x09slow down".to_vec();
        status.encode(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn retry_info_is_found_among_the_details() {
        let details = status(2, 500_000_000);
        let expected = Some(Again::After(Duration::from_millis(2500)));
        for text in [
            STANDARD.encode(&details),
            STANDARD_NO_PAD.encode(&details),
            format!("{},AAAA", STANDARD_NO_PAD.encode(&details)),
        ] {
            let again = Again::of_grpc(None, Some(text.as_bytes()), Some(b"9"));
            assert_eq!(again, expected, "{text}");
        }
        // Put together by hand: code 8, message "x", a RetryInfo of one second.
        let known = b"CAgSAXgaMAoodHlwZS5nb29nbGVhcGlzLmNvbS9nb29nbGUucnBjLlJldHJ5SW5mbxIECgIIAQ==";
        assert_eq!(Again::of_grpc(None, Some(known), Some(b"9")), after(1));
        let text = STANDARD.encode(status(i64::MAX, 0));
        assert_eq!(
            Again::of_grpc(None, Some(text.as_bytes()), None),
            after(3600)
        );
        // The pushback goes before it.
        let text = STANDARD.encode(details);
        let again = Again::of_grpc(Some(b"4000"), Some(text.as_bytes()), None);
        assert_eq!(again, after(4));
    }

    #[test]
    fn details_that_make_no_sense_say_nothing() {
        let mut cut = STANDARD_NO_PAD.encode(status(2, 0));
        cut.truncate(cut.len() - 6);
        for text in [
            STANDARD.encode(status(-1, 0)),
            STANDARD.encode(status(1, -5)),
            STANDARD.encode(status(1, 1_000_000_000)),
            STANDARD.encode(Status { details: vec![] }.encode_to_vec()),
            cut,
            "not base64!".to_owned(),
            String::new(),
        ] {
            assert_eq!(
                Again::of_grpc(None, Some(text.as_bytes()), None),
                None,
                "{text}"
            );
        }
    }

    proptest! {
        #[test]
        fn whatever_comes_is_bounded(text: Vec<u8>, bytes: Vec<u8>, seconds: i64, nanos: i32) {
            for details in [text, STANDARD.encode(bytes).into(), STANDARD.encode(status(seconds, nanos)).into()] {
                if let Some(again) = Again::of_grpc(None, Some(&details), None) {
                    prop_assert!(matches!(again, Again::After(pause) if pause <= LONGEST));
                }
            }
        }

        #[test]
        fn what_is_written_is_read(seconds in 0..3_600i64, nanos in 0..1_000_000_000i32) {
            let details = STANDARD.encode(status(seconds, nanos));
            let expected = Duration::new(seconds as u64, nanos as u32);
            let again = Again::of_grpc(None, Some(details.as_bytes()), None);
            prop_assert_eq!(again, Some(Again::After(expected)));
        }
    }
}
