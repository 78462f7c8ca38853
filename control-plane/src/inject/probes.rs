//! Probes that the kubelet cannot make past a proxy are made by the proxy: a `tcpSocket` probe would
//! succeed as soon as the proxy listens, and what an `httpGet` with `scheme: HTTPS` asks cannot be seen
//! where mutual TLS is required. Both become requests to the proxy's admin port
//! ([`PROBE_PATH`]), which asks the application. Other probes stay as they are.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use weft_api::names::{ADMIN_PORT, INIT_CONTAINER, PROBE_PATH, PROXY_CONTAINER};

use super::{containers, name};

const PROBES: [&str; 3] = ["livenessProbe", "readinessProbe", "startupProbe"];

/// What the proxy is to be asked: "tcp/5432", "https/8443/healthz". The same of a pod in which
/// [`rewrite`] has been.
pub fn asked(pod: &Value) -> BTreeSet<String> {
    containers(pod)
        .filter(|container| !is_ours(container))
        .flat_map(|container| {
            PROBES
                .into_iter()
                .filter_map(|field| container.get(field))
                .filter_map(|probe| by_proxy(container, probe).or_else(|| rewritten(probe)))
        })
        .collect()
}

/// Turns those probes of the applications into requests to the proxy.
pub fn rewrite(pod: &mut Value) {
    for list in ["/spec/initContainers", "/spec/containers"] {
        let containers = pod.pointer_mut(list).and_then(Value::as_array_mut);
        for container in containers.into_iter().flatten() {
            if is_ours(container) {
                continue;
            }
            for field in PROBES {
                let asked = match container.get(field) {
                    Some(probe) => by_proxy(container, probe),
                    None => continue,
                };
                let (Some(asked), Some(probe)) = (asked, container[field].as_object_mut()) else {
                    continue;
                };
                // Headers that are to be sent go the same way.
                let headers = probe
                    .remove("httpGet")
                    .and_then(|mut http| http.as_object_mut()?.remove("httpHeaders"));
                probe.remove("tcpSocket");
                let mut http = json!({"path": format!("{PROBE_PATH}{asked}"), "port": ADMIN_PORT});
                if let Some(headers) = headers {
                    http["httpHeaders"] = headers;
                }
                probe.insert("httpGet".to_owned(), http);
            }
        }
    }
}

fn is_ours(container: &Value) -> bool {
    name(container).is_some_and(|name| name == INIT_CONTAINER || name == PROXY_CONTAINER)
}

/// What a probe is for the proxy, if it is one for the proxy.
fn by_proxy(container: &Value, probe: &Value) -> Option<String> {
    // A host is somebody else's address.
    let of_pod = |action: &Value| {
        let host = action.get("host").and_then(Value::as_str);
        host.is_none_or(str::is_empty)
    };
    if let Some(tcp) = probe.get("tcpSocket").filter(|tcp| of_pod(tcp)) {
        return Some(format!("tcp/{}", port(container, tcp)?));
    }
    let http = probe.get("httpGet").filter(|http| of_pod(http))?;
    if http.get("scheme")?.as_str()? != "HTTPS" {
        return None;
    }
    let path = http.get("path").and_then(Value::as_str).unwrap_or("/");
    let slash = if path.starts_with('/') { "" } else { "/" };
    // Paths that would not come out as they went in stay with the kubelet.
    let plain = path
        .bytes()
        .all(|byte| byte.is_ascii_graphic() && !b"#\"<>`{}|^\\".contains(&byte));
    plain.then_some(())?;
    Some(format!("https/{}{slash}{path}", port(container, http)?))
}

fn rewritten(probe: &Value) -> Option<String> {
    let http = probe.get("httpGet")?;
    let path = http.get("path")?.as_str()?.strip_prefix(PROBE_PATH)?;
    (http.get("port")?.as_u64()? == u64::from(ADMIN_PORT)).then(|| path.to_owned())
}

/// A port by number, or by the name that the container gives it.
fn port(container: &Value, action: &Value) -> Option<u16> {
    let given = action.get("port")?;
    let number = match given.as_str() {
        None => given.as_u64()?,
        Some(text) => match text.parse() {
            Ok(number) => number,
            Err(_) => container
                .get("ports")?
                .as_array()?
                .iter()
                .find(|port| name(port) == Some(text))?
                .get("containerPort")?
                .as_u64()?,
        },
    };
    u16::try_from(number).ok().filter(|port| *port != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(probe: Value) -> Value {
        json!({"spec": {"containers": [{
            "name": "app",
            "ports": [{"name": "db", "containerPort": 5432}],
            "readinessProbe": probe,
        }]}})
    }

    #[test]
    fn what_becomes_of_probes() {
        let cases = [
            (
                json!({"tcpSocket": {"port": 5432}, "periodSeconds": 7}),
                json!({"httpGet": {"path": "/probe/tcp/5432", "port": 15020}, "periodSeconds": 7}),
                Some("tcp/5432"),
            ),
            (
                json!({"tcpSocket": {"port": "db"}}),
                json!({"httpGet": {"path": "/probe/tcp/5432", "port": 15020}}),
                Some("tcp/5432"),
            ),
            (
                json!({"tcpSocket": {"port": "8080"}}),
                json!({"httpGet": {"path": "/probe/tcp/8080", "port": 15020}}),
                Some("tcp/8080"),
            ),
            (
                json!({"httpGet": {
                    "scheme": "HTTPS", "port": 8443, "path": "healthz?full=1",
                    "httpHeaders": [{"name": "Host", "value": "a.example"}],
                }}),
                json!({"httpGet": {
                    "path": "/probe/https/8443/healthz?full=1", "port": 15020,
                    "httpHeaders": [{"name": "Host", "value": "a.example"}],
                }}),
                Some("https/8443/healthz?full=1"),
            ),
            (
                json!({"httpGet": {"scheme": "HTTPS", "port": 8443}}),
                json!({"httpGet": {"path": "/probe/https/8443/", "port": 15020}}),
                Some("https/8443/"),
            ),
        ];
        for (probe, expected, asked_for) in cases {
            let before = pod(probe);
            let mut after = before.clone();
            rewrite(&mut after);
            assert_eq!(after, pod(expected), "{before}");
            let wanted: BTreeSet<String> = asked_for.into_iter().map(str::to_owned).collect();
            assert_eq!(asked(&before), wanted);
            assert_eq!(asked(&after), wanted);
            let once = after.clone();
            rewrite(&mut after);
            assert_eq!(after, once, "twice is once");
        }
    }

    #[test]
    fn what_stays_with_the_kubelet() {
        for probe in [
            json!({"httpGet": {"path": "/healthz", "port": 8080}}),
            json!({"grpc": {"port": 9000}}),
            json!({"exec": {"command": ["true"]}}),
            json!({"tcpSocket": {"port": 5432, "host": "192.0.2.1"}}),
            json!({"tcpSocket": {"port": "nobody"}}),
            json!({"tcpSocket": {"port": 0}}),
            json!({"httpGet": {"scheme": "HTTPS", "port": 8443, "host": "192.0.2.1"}}),
            json!({"httpGet": {"scheme": "HTTPS", "port": 8443, "path": "/a b"}}),
            json!({"tcpSocket": 1}),
            json!("nonsense"),
        ] {
            let mut after = pod(probe.clone());
            rewrite(&mut after);
            assert_eq!(after, pod(probe));
            assert!(asked(&after).is_empty());
        }
    }
}
