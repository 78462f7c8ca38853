//! Trace context on the wire: W3C `traceparent` in and out, B3 (single and multiple headers) in.
//!
//! <https://www.w3.org/TR/trace-context/>, <https://github.com/openzipkin/b3-propagation>

/// Flag of a sampled request (W3C Trace Context section 3.2.2.5.1).
pub const SAMPLED: u8 = 0x01;

/// Flag of a trace id that was made at random (level 2, section 3.2.2.5.2): belongs to the trace,
/// and so goes with it. The other flags mean nothing yet and are not passed on.
pub const RANDOM_TRACE_ID: u8 = 0x02;

/// Length of a version 00 `traceparent`.
pub const TRACEPARENT_LENGTH: usize = 55;

/// Trace and span; neither is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ids {
    pub trace_id: u128,
    pub span_id: u64,
}

/// What a request brought with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    /// `None`: a decision only (B3 "0", "1" or "d").
    pub ids: Option<Ids>,
    /// `None`: left to us (B3 without a sampling state).
    pub decision: Option<bool>,
    /// Flags of the `traceparent`.
    pub flags: u8,
}

/// A `traceparent` to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traceparent {
    pub ids: Ids,
    pub flags: u8,
}

/// The headers that may carry a context, as the request's head has them.
#[derive(Debug, Clone, Copy, Default)]
pub struct ContextHeaders<'a> {
    pub traceparent: Option<&'a [u8]>,
    pub b3: Option<&'a [u8]>,
    pub b3_trace_id: Option<&'a [u8]>,
    pub b3_span_id: Option<&'a [u8]>,
    pub b3_sampled: Option<&'a [u8]>,
    pub b3_flags: Option<&'a [u8]>,
}

impl<'a> ContextHeaders<'a> {
    /// Takes the header if it is one of those; the first of each name counts, and a second
    /// `traceparent` makes both invalid as nobody can tell which one is meant. True if taken.
    #[inline]
    pub fn take(&mut self, name: &[u8], value: &'a [u8]) -> bool {
        // The lengths alone rule out most headers.
        let slot = match name.len() {
            11 if name.eq_ignore_ascii_case(b"traceparent") => {
                self.traceparent = match self.traceparent {
                    None => Some(value),
                    Some(_) => Some(b""),
                };
                return true;
            }
            2 if name.eq_ignore_ascii_case(b"b3") => &mut self.b3,
            12 if name.eq_ignore_ascii_case(b"x-b3-traceid") => &mut self.b3_trace_id,
            11 if name.eq_ignore_ascii_case(b"x-b3-spanid") => &mut self.b3_span_id,
            12 if name.eq_ignore_ascii_case(b"x-b3-sampled") => &mut self.b3_sampled,
            10 if name.eq_ignore_ascii_case(b"x-b3-flags") => &mut self.b3_flags,
            _ => return false,
        };
        slot.get_or_insert(value);
        true
    }

    /// The context they carry: `traceparent` before `b3` before the `X-B3-` headers. One that
    /// cannot be read counts as not there.
    #[inline]
    pub fn context(&self) -> Option<TraceContext> {
        if let Some(context) = self.traceparent.and_then(TraceContext::from_traceparent) {
            return Some(context);
        }
        if let Some(context) = self.b3.and_then(TraceContext::from_b3) {
            return Some(context);
        }
        TraceContext::from_b3_headers(
            self.b3_trace_id,
            self.b3_span_id,
            self.b3_sampled,
            self.b3_flags,
        )
    }
}

impl TraceContext {
    /// Reads a `traceparent`. Versions above 00 are read as far as 00 goes (section 4.3); what is
    /// malformed is `None`.
    pub fn from_traceparent(value: &[u8]) -> Option<Self> {
        let (head, rest) = value.split_at_checked(TRACEPARENT_LENGTH)?;
        if head[2] != b'-' || head[35] != b'-' || head[52] != b'-' {
            return None;
        }
        match lower_hex(&head[..2])? {
            0xff => return None,
            0x00 if !rest.is_empty() => return None,
            _ if !rest.is_empty() && rest[0] != b'-' => return None,
            _ => {}
        }
        let ids = Ids::new(lower_hex(&head[3..35])?, lower_hex(&head[36..52])? as u64)?;
        let flags = lower_hex(&head[53..])? as u8;
        Some(Self {
            ids: Some(ids),
            decision: Some(flags & SAMPLED != 0),
            flags,
        })
    }

    /// Reads the single header `b3`: "{trace}-{span}[-{state}[-{parent}]]" or "{state}".
    pub fn from_b3(value: &[u8]) -> Option<Self> {
        let mut parts = value.split(|b| *b == b'-');
        let first = parts.next()?;
        let Some(span) = parts.next() else {
            return Some(Self::from_decision(b3_state(first)?));
        };
        let ids = Ids::new(b3_trace_id(first)?, b3_span_id(span)?)?;
        let decision = parts.next().map(b3_state);
        if let Some(parent) = parts.next() {
            b3_span_id(parent)?;
        }
        if decision == Some(None) || parts.next().is_some() {
            return None;
        }
        Some(Self {
            ids: Some(ids),
            ..Self::from_optional_decision(decision.flatten())
        })
    }

    /// Reads `X-B3-TraceId`, `X-B3-SpanId`, `X-B3-Sampled` and `X-B3-Flags`.
    pub fn from_b3_headers(
        trace_id: Option<&[u8]>,
        span_id: Option<&[u8]>,
        sampled: Option<&[u8]>,
        flags: Option<&[u8]>,
    ) -> Option<Self> {
        let decision = match (flags, sampled) {
            // Debug: sampled, whatever else is said.
            (Some(b"1"), _) => Some(true),
            (_, Some(b"1" | b"true")) => Some(true),
            (_, Some(b"0" | b"false")) => Some(false),
            (_, Some(_)) => return None,
            (_, None) => None,
        };
        let ids = match (trace_id, span_id) {
            (Some(trace), Some(span)) => Some(Ids::new(b3_trace_id(trace)?, b3_span_id(span)?)?),
            (None, None) => None,
            _ => return None,
        };
        if ids.is_none() && decision.is_none() {
            return None;
        }
        Some(Self {
            ids,
            ..Self::from_optional_decision(decision)
        })
    }

    fn from_decision(sampled: bool) -> Self {
        Self::from_optional_decision(Some(sampled))
    }

    fn from_optional_decision(decision: Option<bool>) -> Self {
        Self {
            ids: None,
            decision,
            flags: if decision == Some(true) { SAMPLED } else { 0 },
        }
    }
}

impl Ids {
    fn new(trace_id: u128, span_id: u64) -> Option<Self> {
        (trace_id != 0 && span_id != 0).then_some(Self { trace_id, span_id })
    }
}

impl From<Traceparent> for TraceContext {
    fn from(parent: Traceparent) -> Self {
        Self {
            ids: Some(parent.ids),
            decision: Some(parent.flags & SAMPLED != 0),
            flags: parent.flags,
        }
    }
}

impl Traceparent {
    /// The header's value, version 00.
    pub fn to_bytes(&self) -> [u8; TRACEPARENT_LENGTH] {
        let mut out = [b'-'; TRACEPARENT_LENGTH];
        out[..2].copy_from_slice(b"00");
        put_hex(&mut out[3..35], &self.ids.trace_id.to_be_bytes());
        put_hex(&mut out[36..52], &self.ids.span_id.to_be_bytes());
        put_hex(&mut out[53..], &[self.flags]);
        out
    }
}

fn b3_state(value: &[u8]) -> Option<bool> {
    match value {
        b"0" => Some(false),
        b"1" | b"d" => Some(true),
        _ => None,
    }
}

fn b3_trace_id(value: &[u8]) -> Option<u128> {
    match value.len() {
        16 | 32 => any_hex(value),
        _ => None,
    }
}

fn b3_span_id(value: &[u8]) -> Option<u64> {
    match value.len() {
        16 => Some(any_hex(value)? as u64),
        _ => None,
    }
}

/// What no hex digit is worth.
const NO_DIGIT: u8 = 0xff;

/// Worth of every byte as a hex digit.
const fn digits(upper: bool) -> [u8; 256] {
    let mut table = [NO_DIGIT; 256];
    let mut value = 0;
    while value < 16 {
        let digit = DIGITS[value];
        table[digit as usize] = value as u8;
        if upper {
            table[digit.to_ascii_uppercase() as usize] = value as u8;
        }
        value += 1;
    }
    table
}

const DIGITS: &[u8; 16] = b"0123456789abcdef";
/// W3C trace context takes lower case only.
static LOWER: [u8; 256] = digits(false);
static ANY: [u8; 256] = digits(true);

fn lower_hex(digits: &[u8]) -> Option<u128> {
    hex(digits, &LOWER)
}

fn any_hex(digits: &[u8]) -> Option<u128> {
    hex(digits, &ANY)
}

/// Up to 32 digits; the caller has cut them to length.
fn hex(digits: &[u8], worth: &[u8; 256]) -> Option<u128> {
    // Two halves, as shifting 128 bits is slow.
    let (high, low) = digits.split_at(digits.len().saturating_sub(16));
    Some(u128::from(hex64(high, worth)?) << 64 | u128::from(hex64(low, worth)?))
}

fn hex64(digits: &[u8], worth: &[u8; 256]) -> Option<u64> {
    let mut number = 0u64;
    let mut all = 0u8;
    for digit in digits {
        let value = worth[usize::from(*digit)];
        all |= value;
        number = number << 4 | u64::from(value & 0xf);
    }
    // A worth is below 16, and NO_DIGIT has the bits above.
    (all < 16).then_some(number)
}

fn put_hex(out: &mut [u8], bytes: &[u8]) {
    for (place, byte) in out.chunks_exact_mut(2).zip(bytes) {
        place[0] = DIGITS[usize::from(byte >> 4)];
        place[1] = DIGITS[usize::from(byte & 0xf)];
    }
}
