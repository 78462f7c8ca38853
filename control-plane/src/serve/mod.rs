//! What others reach the control plane by.

pub mod ca;
