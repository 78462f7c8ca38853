//! The destination's side of `weft routes`: what the proxies beside a request's endpoints do with it.
//! The control plane is asked, as the one that tells them, and that knows which policies it comes from.
//!
//! - [`mod@ask`]: what the control plane says at /explain
//! - [`known`]: the part of it that is used here
//! - [`mod@judge`]: what becomes of this very request, as the proxy's own way in goes
//!   (`proxy/src/inbound`)
//! - [`text`]: what of it people read

mod ask;
mod judge;
mod known;
#[cfg(test)]
mod tests;
mod text;

pub use ask::{Client, ask};
pub use judge::{Caller, Side, judge, judge_direct};
pub use known::Explained;
pub use text::show;
