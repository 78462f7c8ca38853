//! The data plane of Weft: a transparent proxy beside each workload.
//!
//! Read [`outbound`] for the way of a connection from the application into the mesh, [`inbound`]
//! for the way from the mesh to the application.

pub mod admin;
pub mod balance;
pub mod config;
pub mod identity;
pub mod tables;
pub mod telemetry;
pub mod transport;
