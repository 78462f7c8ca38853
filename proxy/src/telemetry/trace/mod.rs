//! Traces: where a request comes from ([`context`]), whether it is followed ([`Sampler`]), and
//! the record of this proxy's part of its way ([`SpanRecord`]).
//!
//! A request that is not followed builds nothing. The rules:
//!
//! - Without an exporter, tracing is off: nothing is decided, added or changed.
//! - A decision that came with the request is respected. "Not sampled" passes untouched; "sampled"
//!   makes a span, and the request goes on with this span as its parent.
//! - Without a decision, the [`Sampler`] makes one. "No" is told onwards too (a `traceparent` with
//!   the flag 00), so that the next proxy does not throw the dice again and start a trace in the
//!   middle; with a rate of 0 nothing is said.
//! - B3 is read, never written: its headers pass as they came, and the next proxy reads our
//!   `traceparent` first.

pub mod context;
mod span;

use std::cell::RefCell;
use std::time::{Instant, SystemTime};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

pub use context::{Ids, TraceContext, Traceparent};
pub use span::{ActiveSpan, SPAN_QUEUE, SpanKind, SpanRecord, SpanSink, SpanSource, span_channel};

/// Share of the requests that carry no decision which are traced, in 1/10000.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sampler {
    per_myriad: u32,
}

impl Sampler {
    /// Above 10,000 is all.
    pub const fn per_myriad(per_myriad: u32) -> Self {
        Self { per_myriad }
    }

    fn decide(self, rng: &mut SmallRng) -> bool {
        match self.per_myriad {
            0 => false,
            10_000.. => true,
            n => rng.random_range(0..10_000) < n,
        }
    }
}

/// What comes of a request's head.
#[derive(Debug, Default)]
#[must_use]
pub struct Started {
    /// Put in place of the request's `traceparent`; `None`: leave the headers alone.
    pub propagate: Option<Traceparent>,
    /// To be filled in and finished; `None`: not sampled.
    pub span: Option<Box<ActiveSpan>>,
}

/// Starts spans; one per worker.
#[derive(Debug)]
pub struct Tracer {
    rng: RefCell<SmallRng>,
    sink: SpanSink,
}

impl Tracer {
    pub fn new(sink: SpanSink) -> Self {
        Self::seeded(sink, rand::random())
    }

    /// With ids and decisions that can be foretold, for tests.
    pub fn seeded(sink: SpanSink, seed: u64) -> Self {
        Self {
            rng: RefCell::new(SmallRng::seed_from_u64(seed)),
            sink,
        }
    }

    /// True when spans go anywhere: else there is no need to look for a context.
    #[inline]
    pub fn on(&self) -> bool {
        self.sink.on()
    }

    /// Begins the way of a request through this proxy.
    #[inline]
    pub fn start(
        &self,
        incoming: Option<&TraceContext>,
        sampler: Sampler,
        kind: SpanKind,
    ) -> Started {
        if !self.on() {
            return Started::default();
        }
        match incoming.and_then(|context| context.decision) {
            Some(false) => Started::default(),
            Some(true) => self.sampled(incoming, kind),
            None if sampler.per_myriad == 0 => Started::default(),
            None => {
                if sampler.decide(&mut self.rng.borrow_mut()) {
                    self.sampled(incoming, kind)
                } else {
                    let ids = incoming
                        .and_then(|c| c.ids)
                        .unwrap_or_else(|| self.fresh(None));
                    Started {
                        propagate: Some(Traceparent { ids, flags: 0 }),
                        span: None,
                    }
                }
            }
        }
    }

    fn fresh(&self, trace_id: Option<u128>) -> Ids {
        let mut rng = self.rng.borrow_mut();
        // Zero means "invalid" in W3C trace context.
        let trace_id = trace_id.unwrap_or_else(|| rng.random::<u128>().max(1));
        Ids {
            trace_id,
            span_id: rng.random::<u64>().max(1),
        }
    }

    #[cold]
    fn sampled(&self, incoming: Option<&TraceContext>, kind: SpanKind) -> Started {
        let parent = incoming.and_then(|context| context.ids);
        let ids = self.fresh(parent.map(|ids| ids.trace_id));
        let random = incoming.map_or(0, |context| context.flags & context::RANDOM_TRACE_ID);
        let flags = random | context::SAMPLED;
        let record = SpanRecord::new(ids, parent.map(|ids| ids.span_id), kind, SystemTime::now());
        Started {
            propagate: Some(Traceparent { ids, flags }),
            span: Some(Box::new(ActiveSpan::new(
                record,
                Instant::now(),
                self.sink.clone(),
            ))),
        }
    }
}

#[cfg(test)]
mod tests;
