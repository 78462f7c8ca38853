//! What is let in as plaintext where everybody else has to speak mutual TLS: the probes of the
//! workload's own pod, which the kubelet makes from outside the mesh. Exactly those: this port, this
//! way, this path. Whoever else asks the same gets the same answer, which says no more than whether
//! the workload is well.

use crate::detect::Detected;
use crate::tables::{Check, Workload};

/// Method and path of a gRPC health check (grpc.health.v1).
const GRPC_METHOD: &[u8] = b"POST";
const GRPC_PATH: &[u8] = b"/grpc.health.v1.Health/Check";

/// The probes of one port.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Probes(Vec<Check>);

/// What becomes of a connection that is not mutual TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    Refuse,
    /// Request by request: those that are probes.
    Serve,
    /// It was a probe, and it is over.
    Ended,
}

impl Probes {
    pub fn of(workload: &Workload, port: u16) -> Self {
        let of_port = workload.probes.iter().filter(|probe| probe.port == port);
        Self(of_port.map(|probe| probe.check.clone()).collect())
    }

    /// Whether a request is a probe.
    pub fn admit(&self, method: &[u8], target: &[u8]) -> bool {
        self.0.iter().any(|check| match check {
            Check::Http(path) => method == b"GET" && target == path.as_bytes(),
            Check::Grpc => method == GRPC_METHOD && target == GRPC_PATH,
            Check::Tcp => false,
        })
    }

    /// What becomes of a connection. A first request that is no probe is refused as a connection
    /// is: nothing answers.
    pub fn decide<U>(&self, detected: &Detected<U>) -> Decision {
        match detected {
            Detected::Http1 { buf } => match request_line(buf) {
                Some((method, target)) if self.admit(method, target) => Decision::Serve,
                _ => Decision::Refuse,
            },
            Detected::Http2 { .. } if self.0.contains(&Check::Grpc) => Decision::Serve,
            // The client connected, and went without a word.
            Detected::Opaque { buf, .. } | Detected::Reset { buf, .. }
                if buf.is_empty() && self.0.contains(&Check::Tcp) =>
            {
                Decision::Ended
            }
            _ => Decision::Refuse,
        }
    }
}

/// Method and target of the request that a buffer begins with.
fn request_line(buf: &[u8]) -> Option<(&[u8], &[u8])> {
    let start = buf.iter().position(|byte| !b"\r\n".contains(byte))?;
    let line = buf[start..].split(|byte| b"\r\n".contains(byte)).next()?;
    let mut words = line.split(|byte| *byte == b' ');
    Some((words.next()?, words.next()?))
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;

    use super::*;
    use crate::tables::Probe;

    fn probes(port: u16) -> Probes {
        let probe = |port, check| Probe { port, check };
        let workload = Workload {
            probes: vec![
                probe(8080, Check::Http("/healthz?full=1".into())),
                probe(8080, Check::Http("/ready".into())),
                probe(5432, Check::Tcp),
                probe(9000, Check::Grpc),
            ],
            ..Workload::default()
        };
        Probes::of(&workload, port)
    }

    fn http1(text: &str) -> Detected<()> {
        Detected::Http1 { buf: text.into() }
    }

    #[test]
    fn exactly_the_path_on_exactly_the_port() {
        for (port, text, decision) in [
            (8080, "GET /ready HTTP/1.1\r\nHost: x\r\n", Decision::Serve),
            (
                8080,
                "\r\nGET /healthz?full=1 HTTP/1.1\r\n",
                Decision::Serve,
            ),
            (8080, "GET /healthz HTTP/1.1\r\n", Decision::Refuse),
            (8080, "GET /ready?x HTTP/1.1\r\n", Decision::Refuse),
            (8080, "GET /ready/ HTTP/1.1\r\n", Decision::Refuse),
            (8080, "GET /READY HTTP/1.1\r\n", Decision::Refuse),
            (8080, "GET //ready HTTP/1.1\r\n", Decision::Refuse),
            (8080, "GET http://x/ready HTTP/1.1\r\n", Decision::Refuse),
            (8080, "POST /ready HTTP/1.1\r\n", Decision::Refuse),
            (8080, "HEAD /ready HTTP/1.1\r\n", Decision::Refuse),
            (8080, "GET", Decision::Refuse),
            (8081, "GET /ready HTTP/1.1\r\n", Decision::Refuse),
            (5432, "GET /ready HTTP/1.1\r\n", Decision::Refuse),
            (9000, "GET /ready HTTP/1.1\r\n", Decision::Refuse),
        ] {
            assert_eq!(probes(port).decide(&http1(text)), decision, "{port} {text}");
        }
    }

    #[test]
    fn a_connection_that_says_nothing() {
        let silent = |text: &str| -> Detected<()> {
            Detected::Opaque {
                buf: text.into(),
                upstream: None,
            }
        };
        let reset: Detected<()> = Detected::Reset {
            buf: BytesMut::new(),
            upstream: None,
        };
        assert_eq!(probes(5432).decide(&silent("")), Decision::Ended);
        assert_eq!(probes(5432).decide(&reset), Decision::Ended);
        assert_eq!(probes(5432).decide(&silent("\0")), Decision::Refuse);
        assert_eq!(probes(8080).decide(&silent("")), Decision::Refuse);
    }

    #[test]
    fn grpc_health_checks_and_nothing_else() {
        let preface: Detected<()> = Detected::Http2 {
            buf: BytesMut::new(),
        };
        assert_eq!(probes(9000).decide(&preface), Decision::Serve);
        assert_eq!(probes(8080).decide(&preface), Decision::Refuse);
        assert!(probes(9000).admit(b"POST", GRPC_PATH));
        assert!(!probes(9000).admit(b"GET", GRPC_PATH));
        assert!(!probes(9000).admit(b"POST", b"/grpc.health.v1.Health/Watch"));
        assert!(!probes(8080).admit(b"POST", GRPC_PATH));
    }
}
