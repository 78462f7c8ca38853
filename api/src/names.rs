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
/// ALPN: many streams inside, each of HTTP/1.1 or opaque bytes.
pub const ALPN_MUX: &[u8] = b"weft/mux";

/// Trust domain when none is configured.
pub const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
/// Audience of workload tokens.
pub const TOKEN_AUDIENCE: &str = "weft.dev/control-plane";
/// Namespace of the control plane's own identity.
pub const CONTROL_PLANE_NAMESPACE: &str = "weft-system";
/// Service account of the control plane's own identity.
pub const CONTROL_PLANE_SERVICE_ACCOUNT: &str = "weft-control-plane";

/// Label of everything the control plane itself makes in a cluster, and its value.
pub const MANAGED_BY_LABEL: &str = "app.kubernetes.io/managed-by";
pub const MANAGED_BY: &str = "weft-control-plane";
/// Lease by which replicas of the control plane agree on a leader.
pub const LEADER_LEASE: &str = "weft-control-plane";
/// Secret of the control plane's own certificate authority.
pub const CA_SECRET: &str = "weft-ca";
/// ConfigMap, in every namespace, with the trusted roots, and its key.
pub const TRUST_CONFIG_MAP: &str = "weft-trust";
pub const TRUST_KEY: &str = "root.pem";
/// Annotation of that ConfigMap: the namespace of the control plane that keeps it.
pub const KEEPER_ANNOTATION: &str = "weft.dev/control-plane";
/// Port of the admission webhook (HTTPS).
pub const WEBHOOK_PORT: u16 = 15017;
/// The control plane's Deployment, Service, ServiceAccount, Lease and so on.
pub const CONTROL_PLANE: &str = "weft-control-plane";
/// MutatingWebhookConfiguration and ConfigMap of injection.
pub const INJECTOR: &str = "weft-injector";
/// The capture init container of an injected pod.
pub const INIT_CONTAINER: &str = "weft-init";
/// The proxy's container in an injected pod.
pub const PROXY_CONTAINER: &str = "weft-proxy";
/// Path on the proxy's admin port below which it asks the application what the kubelet cannot ask past
/// the proxy: "/probe/tcp/5432", "/probe/https/8443/healthz".
pub const PROBE_PATH: &str = "/probe/";
/// Where an injected pod's proxy has its token and the trusted roots.
pub const TOKEN_PATH: &str = "/var/run/secrets/weft/token";
pub const TRUST_PATH: &str = "/var/run/weft/trust/root.pem";
/// What all our labels and annotations begin with.
pub const ANNOTATION_PREFIX: &str = "weft.dev/";
/// Label (of namespaces and pods) or annotation (of pods): a sidecar is wanted, or not.
pub const INJECT: &str = "weft.dev/inject";
/// Annotation of a pod: what became of injection.
pub const STATUS: &str = "weft.dev/status";
/// Annotation of a pod: what is spoken on its ports, "8080=grpc,9000=tcp".
pub const PROTOCOL_ANNOTATION: &str = "weft.dev/protocol";
/// Annotation of a pod: its share of the traffic relative to other endpoints; 1 is usual.
pub const WEIGHT_ANNOTATION: &str = "weft.dev/weight";
/// Annotations of the Secret [`CA_SECRET`]: begin a root rotation, end the one under way. Their value
/// is new each time.
pub const ROTATE_ANNOTATION: &str = "weft.dev/rotate";
pub const FINISH_ANNOTATION: &str = "weft.dev/finish-rotation";
/// Label of the Leases that replicas of the control plane keep for themselves, and the annotation
/// with what they say there.
pub const REPLICA_LABEL: &str = "weft.dev/replica";
pub const RECORD_ANNOTATION: &str = "weft.dev/replica-record";
/// Metadata of the status with which a control plane that is ending ends a stream: come back at
/// once, another replica is there. It has spread the ends itself.
pub const MOVE_METADATA: &str = "weft-move";
