//! Discovery against a scripted control plane, and the store alone.

mod decode;
mod samples;
mod scripted;
mod store;
mod stream;
