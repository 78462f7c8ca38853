//! The data plane of Weft: a transparent proxy beside each workload.
//!
//! Read [`outbound`] for the way of a connection from the application into the mesh, [`inbound`]
//! for the way from the mesh to the application.

pub mod admin;
pub mod balance;
pub mod capture;
pub mod config;
pub mod detect;
pub mod discovery;
pub mod dns;
pub mod hashing;
pub mod health;
pub mod http;
pub mod http1;
pub mod http2;
pub mod identity;
pub mod inbound;
pub mod introspect;
pub mod listen;
pub mod outbound;
pub mod resident;
pub mod run;
pub mod tables;
pub mod tcp;
pub mod telemetry;
#[cfg(test)]
mod testing;
pub mod transport;
pub mod wait;
pub mod worker;
