//! Ports, ALPN names and other constants that both ends must spell alike.

/// Port netfilter redirects a workload's outgoing connections to.
pub const OUTBOUND_PORT: u16 = 15001;
/// Port netfilter redirects a workload's incoming connections to.
pub const INBOUND_PORT: u16 = 15006;
/// The proxy's admin port: health, readiness, metrics, config dump, drain.
pub const ADMIN_PORT: u16 = 15020;
/// The control plane's gRPC port: discovery and identity.
pub const CONTROL_PORT: u16 = 15010;
/// The control plane's admin port: health, metrics, status.
pub const CONTROL_ADMIN_PORT: u16 = 15014;
/// User id the proxy runs as; its own connections are not captured.
pub const PROXY_UID: u32 = 1337;

/// ALPN: HTTP/2 inside.
pub const ALPN_H2: &[u8] = b"weft/h2";
/// ALPN: HTTP/1.1 inside.
pub const ALPN_HTTP1: &[u8] = b"weft/http1";
/// ALPN: opaque bytes inside.
pub const ALPN_TCP: &[u8] = b"weft/tcp";

/// Trust domain when none is configured.
pub const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
/// Audience of workload tokens.
pub const TOKEN_AUDIENCE: &str = "weft.dev/control-plane";
/// Namespace of the control plane's own identity.
pub const CONTROL_PLANE_NAMESPACE: &str = "weft-system";
/// Service account of the control plane's own identity.
pub const CONTROL_PLANE_SERVICE_ACCOUNT: &str = "weft-control-plane";
/// Name of the container that the proxy runs in beside a pod's own.
pub const PROXY_CONTAINER: &str = "weft-proxy";
