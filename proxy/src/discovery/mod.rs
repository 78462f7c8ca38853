//! What the control plane says, kept where the workers read it.

pub mod backoff;
pub mod dial;
