//! Tables of pods, and files (`golden/`) of what comes out; `UPDATE_GOLDEN=1 cargo test` writes them.

use std::path::Path;

use base64::Engine as _;
use proptest::prelude::*;
use serde_json::{Value, json};
use weft_api::names::PROTOCOL_ANNOTATION;

use super::manifest::{Context, Note, inject_text};
use super::review::{Verdict, patch, review};
use super::*;

const SETTINGS: &str = "
proxy:
  image: registry.example/weft-proxy:0.1.0
";

fn settings() -> Settings {
    Settings::parse(SETTINGS).unwrap()
}

fn newest() -> Version {
    "1.34".parse().unwrap()
}

fn request(pod: &Value) -> Request<'_> {
    Request {
        pod,
        namespace: "shop",
        namespace_enabled: true,
        kubernetes: newest(),
    }
}

fn injected(pod: &Value) -> Value {
    match inject(request(pod), &settings()) {
        Ok(Outcome::Injected(pod)) => pod,
        other => panic!("{other:?}"),
    }
}

fn refused(pod: &Value) -> String {
    match inject(request(pod), &settings()) {
        Err(Refused(reason)) => reason,
        other => panic!("{other:?}"),
    }
}

fn plain() -> Value {
    json!({"metadata": {}, "spec": {"containers": [{"name": "app", "image": "app"}]}})
}

fn with_annotation(key: &str, value: &str) -> Value {
    let mut pod = plain();
    pod["metadata"]["annotations"] = json!({key: value});
    pod
}

/// What comes out of a file, for each version of Kubernetes that makes a difference.
#[test]
fn golden() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/inject/golden");
    let mut seen = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let input = entry.unwrap().path();
        let name = input.file_name().unwrap().to_str().unwrap().to_owned();
        let Some(stem) = name.strip_suffix(".in.yaml") else {
            continue;
        };
        seen += 1;
        let text = std::fs::read_to_string(&input).unwrap();
        let kubernetes = match stem.split_once("-on-") {
            Some((_, version)) => version.parse().unwrap(),
            None => newest(),
        };
        let settings = settings();
        let context = Context {
            namespace: "shop",
            kubernetes,
            settings: &settings,
        };
        let mut notes = Vec::new();
        let out = inject_text(&text, context, &mut notes).unwrap();
        let file = folder.join(format!("{stem}.out.yaml"));
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&file, &out).unwrap();
        }
        let expected = std::fs::read_to_string(&file).unwrap_or_default();
        assert!(
            out == expected,
            "{name} comes out otherwise than {} says:\n{out}",
            file.display()
        );
        // What was written is read as the same, and is left alone the second time.
        let again = inject_text(&out, context, &mut Vec::new()).unwrap();
        assert!(again == out, "{name}: a second time changes it:\n{again}");
    }
    assert!(seen >= 4, "{seen} files");
}

#[test]
fn who_gets_one() {
    let cases: [(&str, bool, Value, &str); 13] = [
        ("the namespace asks", true, json!({}), "yes"),
        ("nobody asks", false, json!({}), "no: neither the namespace"),
        (
            "the label asks",
            false,
            json!({"metadata": {"labels": {"weft.dev/inject": "enabled"}}}),
            "yes",
        ),
        (
            "the annotation asks",
            false,
            json!({"metadata": {"annotations": {"weft.dev/inject": "true"}}}),
            "yes",
        ),
        (
            "the label declines",
            true,
            json!({"metadata": {"labels": {"weft.dev/inject": "disabled"}}}),
            "no: the pod's label",
        ),
        (
            "the annotation declines",
            true,
            json!({"metadata": {"annotations": {"weft.dev/inject": "disabled"}}}),
            "no: the pod's annotation",
        ),
        (
            "the label comes before the annotation",
            true,
            json!({"metadata": {
                "labels": {"weft.dev/inject": "enabled"},
                "annotations": {"weft.dev/inject": "disabled"},
            }}),
            "yes",
        ),
        (
            "a slip",
            true,
            json!({"metadata": {"labels": {"weft.dev/inject": "enable"}}}),
            "refused: label weft.dev/inject: 'enable' is not known; write enabled or disabled",
        ),
        (
            "the node's network",
            true,
            json!({"spec": {"hostNetwork": true}}),
            "impossible: the pod uses the node's network",
        ),
        (
            "hostNetwork that nobody asked for",
            false,
            json!({"spec": {"hostNetwork": true}}),
            "no: neither",
        ),
        (
            "Windows by os",
            true,
            json!({"spec": {"os": {"name": "windows"}}}),
            "impossible: the pod is for Windows",
        ),
        (
            "Windows by node",
            true,
            json!({"spec": {"nodeSelector": {"kubernetes.io/os": "windows"}}}),
            "impossible: the pod is for Windows",
        ),
        (
            "Linux by node",
            true,
            json!({"spec": {"nodeSelector": {"kubernetes.io/os": "linux"}}}),
            "yes",
        ),
    ];
    for (case, namespace_enabled, extra, expected) in cases {
        let mut pod = plain();
        merge(&mut pod, &extra);
        let request = Request {
            namespace_enabled,
            ..request(&pod)
        };
        let got = match inject(request, &settings()) {
            Ok(Outcome::Injected(_)) => "yes".to_owned(),
            Ok(Outcome::Impossible { pod, reason }) => {
                let said = annotation(&pod, STATUS).unwrap();
                assert_eq!(said, format!("not injected: {reason}"), "{case}");
                format!("impossible: {reason}")
            }
            Ok(Outcome::NotWanted(reason)) => format!("no: {reason}"),
            Err(Refused(reason)) => format!("refused: {reason}"),
        };
        assert!(got.starts_with(expected), "{case}: {got}");
    }
}

#[test]
fn some_namespaces_never() {
    for namespace in ["kube-system", "kube-node-lease", "weft-system"] {
        let pod = plain();
        let request = Request {
            namespace,
            ..request(&pod)
        };
        let outcome = inject(request, &settings()).unwrap();
        assert!(
            matches!(&outcome, Outcome::Impossible { reason, .. } if reason.contains(namespace)),
            "{outcome:?}"
        );
    }
}

/// Each is refused with a sentence that has the annotation, the value and what is allowed.
#[test]
fn slips_are_refused() {
    for (key, value, allowed) in [
        (annotations::EXCLUDE_INBOUND_PORTS, "http", "3306,9000-9100"),
        (annotations::EXCLUDE_INBOUND_PORTS, "0", "3306,9000-9100"),
        (
            annotations::EXCLUDE_INBOUND_CIDRS,
            "10.0.0.0/33",
            "fd00::/8",
        ),
        (annotations::EXCLUDE_OUTBOUND_PORTS, "80,", "3306,9000-9100"),
        (
            annotations::EXCLUDE_OUTBOUND_PORTS,
            "90-80",
            "3306,9000-9100",
        ),
        (
            annotations::EXCLUDE_OUTBOUND_PORTS,
            "65536",
            "3306,9000-9100",
        ),
        (
            annotations::EXCLUDE_OUTBOUND_CIDRS,
            "10.0.0.0/33",
            "fd00::/8",
        ),
        (annotations::EXCLUDE_OUTBOUND_CIDRS, "db", "fd00::/8"),
        (annotations::INCLUDE_INBOUND_PORTS, "*", "3306,9000-9100"),
        (annotations::INCLUDE_OUTBOUND_PORTS, "", "3306,9000-9100"),
        (
            annotations::INCLUDE_OUTBOUND_CIDRS,
            "fd00::/129",
            "fd00::/8",
        ),
        (annotations::CPU_REQUEST, "fast", "50m or 0.5"),
        (annotations::CPU_LIMIT, "-1", "50m or 0.5"),
        (annotations::MEMORY_REQUEST, "64MB", "64Mi"),
        (annotations::MEMORY_LIMIT, "0", "64Mi"),
        (annotations::LOG_LEVEL, "verbose", "trace or off"),
        (annotations::LOG_LEVEL, "weft_proxy=loud", "trace or off"),
        (annotations::DRAIN_SECONDS, "1m", "seconds from 0 to 86400"),
        (
            annotations::DRAIN_SECONDS,
            "86401",
            "seconds from 0 to 86400",
        ),
        (annotations::OWN_CONNECTIONS, "yes", "true or false"),
        ("weft.dev/weight", "10001", "0 to 10000"),
        (PROTOCOL_ANNOTATION, "8080", "8080=grpc,9000=tcp"),
        (PROTOCOL_ANNOTATION, "8080=gprc", "8080=grpc,9000=tcp"),
        (
            PROTOCOL_ANNOTATION,
            "8080=grpc,8080=tcp",
            "8080=grpc,9000=tcp",
        ),
    ] {
        let reason = refused(&with_annotation(key, value));
        assert!(
            reason.starts_with(&format!(
                "annotation {key}: '{value}' does not work; write "
            )) && reason.contains(allowed),
            "{reason}"
        );
    }
    let reason = refused(&with_annotation("weft.dev/exclude-ports", "80"));
    assert!(
        reason.starts_with("annotation weft.dev/exclude-ports is not known; there are ")
            && reason.contains("weft.dev/exclude-inbound-ports"),
        "{reason}"
    );
}

#[test]
fn annotations_reach_the_containers() {
    let mut pod = plain();
    pod["metadata"]["annotations"] = json!({
        "weft.dev/exclude-inbound-ports": "9090, 9100-9200",
        "weft.dev/exclude-inbound-cidrs": "10.0.5.0/24, fd05::/16",
        "weft.dev/exclude-outbound-ports": "3306",
        "weft.dev/exclude-outbound-cidrs": "169.254.169.254/32,fd00::/8",
        "weft.dev/proxy-cpu-request": "250m",
        "weft.dev/proxy-memory-limit": "128Mi",
        "weft.dev/log-level": "info,weft_proxy=debug",
        "weft.dev/drain-seconds": "5",
        "weft.dev/own-connections": "true",
        "weft.dev/protocol": "8080=grpc, 9000=tcp",
    });
    let settings = Settings::parse(
        "
proxy:
  image: p
capture:
  excludeOutboundPorts: ['9999']
  excludeInboundCidrs: [192.0.2.7]
tracing:
  otlpEndpoint: http://jaeger.tracing:4317
",
    )
    .unwrap();
    let Ok(Outcome::Injected(pod)) = inject(request(&pod), &settings) else {
        panic!()
    };
    assert_eq!(
        pod["spec"]["initContainers"][0]["args"],
        json!([
            "init",
            "--exclude-inbound-cidrs=192.0.2.7,10.0.5.0/24,fd05::/16",
            "--exclude-inbound-ports=9090,9100-9200",
            "--exclude-outbound-cidrs=169.254.169.254/32,fd00::/8",
            "--exclude-outbound-ports=9999,3306",
        ])
    );
    let proxy = &pod["spec"]["initContainers"][1];
    assert_eq!(
        proxy["resources"],
        json!({
            "requests": {"cpu": "250m", "memory": "32Mi"},
            "limits": {"memory": "128Mi"},
        })
    );
    let env = |name: &str| {
        let all = proxy["env"].as_array().unwrap();
        let found = all.iter().find(|entry| entry["name"] == name).unwrap();
        found["value"].as_str().unwrap().to_owned()
    };
    assert_eq!(env("WEFT_LOG"), "info,weft_proxy=debug");
    assert_eq!(env("WEFT_DRAIN_SECONDS"), "5");
    assert_eq!(env("WEFT_OWN_CONNECTIONS"), "true");
    assert_eq!(env("WEFT_OTLP_ENDPOINT"), "http://jaeger.tracing:4317");
    assert_eq!(
        env("WEFT_CONTROL_PLANE"),
        "weft-control-plane.weft-system.svc:15010"
    );
}

/// `weft-proxy init` and `weft-proxy run` know these flags and variables.
#[test]
fn the_proxy_knows_what_it_is_told() {
    let proxy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proxy/src");
    let read = |file: &str| std::fs::read_to_string(proxy.join(file)).unwrap();
    let (flags, variables) = (read("capture/command.rs"), read("config.rs"));
    let mut pod = plain();
    pod["metadata"]["annotations"] = json!({
        "weft.dev/exclude-inbound-ports": "1", "weft.dev/exclude-outbound-ports": "1",
        "weft.dev/exclude-outbound-cidrs": "::/0", "weft.dev/include-inbound-ports": "1",
        "weft.dev/include-outbound-ports": "1", "weft.dev/include-outbound-cidrs": "::/0",
    });
    let pod = injected(&pod);
    let args = pod["spec"]["initContainers"][0]["args"].as_array().unwrap();
    assert_eq!(args.len(), 7);
    for flag in &args[1..] {
        let flag = flag.as_str().unwrap();
        let field = flag[2..].split('=').next().unwrap().replace('-', "_");
        assert!(flags.contains(&format!("pub {field}: ")), "{flag}");
    }
    for entry in pod["spec"]["initContainers"][1]["env"].as_array().unwrap() {
        let name = entry["name"].as_str().unwrap();
        if name.starts_with("WEFT_") {
            assert!(variables.contains(&format!("env = \"{name}\"")), "{name}");
        }
    }
}

#[test]
fn what_would_bypass_the_mesh_is_refused() {
    let cases = [
        (
            json!({"securityContext": {"runAsUser": 1337}}),
            "the pod runs as user 1337",
        ),
        (
            json!({"containers": [{"name": "a"}, {"name": "b", "securityContext": {"runAsUser": 1337}}]}),
            "container b runs as user 1337",
        ),
        (
            json!({"initContainers": [{"name": "i", "securityContext": {"runAsGroup": 1337}}]}),
            "container i runs as group 1337",
        ),
        (
            json!({"containers": [{"name": "a", "ports": [{"containerPort": 15020}]}]}),
            "container a listens on port 15020",
        ),
        (
            json!({"containers": [{"name": "weft-proxy"}]}),
            "the pod has a container named weft-proxy",
        ),
    ];
    for (spec, expected) in cases {
        let mut pod = plain();
        merge(&mut pod, &json!({"spec": spec}));
        let reason = refused(&pod);
        assert!(reason.starts_with(expected), "{reason}");
    }
    // The kernel matches a socket's own group, not the others a process is in.
    let mut pod = plain();
    merge(
        &mut pod,
        &json!({"spec": {"securityContext": {"fsGroup": 1337, "supplementalGroups": [1337], "runAsNonRoot": true}}}),
    );
    injected(&pod);
}

#[test]
fn the_applications_own_scraping_stays() {
    let pod = injected(&with_annotation("prometheus.io/scrape", "true"));
    assert_eq!(annotation(&pod, "prometheus.io/port"), None);
    let pod = injected(&plain());
    assert_eq!(annotation(&pod, "prometheus.io/port"), Some("15020"));
    let settings =
        Settings::parse(&format!("{SETTINGS}prometheus: {{annotations: false}}")).unwrap();
    let Ok(Outcome::Injected(pod)) = inject(request(&plain()), &settings) else {
        panic!()
    };
    assert_eq!(annotation(&pod, "prometheus.io/scrape"), None);
}

/// Other webhooks add containers, and things to ours; what changes with the settings is replaced.
#[test]
fn a_second_look() {
    let mut once = injected(&plain());
    once["spec"]["initContainers"]
        .as_array_mut()
        .unwrap()
        .push(json!({"name": "late"}));
    once["spec"]["initContainers"][1]["volumeMounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"name": "api", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}));
    assert_eq!(injected(&once), once);

    let other = Settings::parse("proxy: {image: 'weft-proxy:0.2.0'}").unwrap();
    let Ok(Outcome::Injected(twice)) = inject(request(&once), &other) else {
        panic!()
    };
    let names = |pod: &Value| -> Vec<String> {
        let init = pod["spec"]["initContainers"].as_array().unwrap();
        init.iter().map(|c| name(c).unwrap().to_owned()).collect()
    };
    assert_eq!(names(&twice), ["weft-init", "weft-proxy", "late"]);
    assert_eq!(
        twice["spec"]["initContainers"][1]["image"],
        "weft-proxy:0.2.0"
    );
    assert_eq!(twice["spec"]["volumes"].as_array().unwrap().len(), 2);
    assert_ne!(annotation(&once, STATUS), annotation(&twice, STATUS));
    // From an older Kubernetes to a newer one, nothing is left of the other shape.
    let old = Request {
        kubernetes: "1.28".parse().unwrap(),
        ..request(&twice)
    };
    let Ok(Outcome::Injected(classic)) = inject(old, &other) else {
        panic!()
    };
    assert_eq!(names(&classic), ["late", "weft-init"]);
    let Ok(Outcome::Injected(native)) = inject(request(&classic), &other) else {
        panic!()
    };
    assert_eq!(names(&native), ["weft-init", "weft-proxy", "late"]);
    assert_eq!(native["spec"]["containers"].as_array().unwrap().len(), 1);
}

fn admission(pod: &Value) -> Vec<u8> {
    json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "request": {
            "uid": "u-1", "namespace": "shop", "operation": "CREATE",
            "kind": {"group": "", "version": "v1", "kind": "Pod"},
            "object": pod,
        },
    })
    .to_string()
    .into_bytes()
}

#[test]
fn reviews() {
    let ask = |pod: &Value| review(&admission(pod), true, &settings(), newest()).unwrap();
    // generateName, no labels, no namespace, as controllers make them.
    let pod = json!({
        "metadata": {"generateName": "web-"},
        "spec": {"containers": [{"name": "app", "image": "app"}]},
    });
    let (answer, verdict) = ask(&pod);
    assert_eq!(verdict, Verdict::Injected);
    let response = &answer["response"];
    assert_eq!(response["uid"], "u-1");
    assert_eq!(response["allowed"], true);
    assert_eq!(response["patchType"], "JSONPatch");
    let patch = base64::engine::general_purpose::STANDARD
        .decode(response["patch"].as_str().unwrap())
        .unwrap();
    let patch: json_patch::Patch = serde_json::from_slice(&patch).unwrap();
    let mut patched = pod.clone();
    json_patch::patch(&mut patched, &patch).unwrap();
    assert_eq!(patched, injected(&pod));

    let mut host = pod.clone();
    host["spec"]["hostNetwork"] = json!(true);
    let (answer, verdict) = ask(&host);
    assert!(matches!(verdict, Verdict::Skipped(_)));
    let warning = answer["response"]["warnings"][0].as_str().unwrap();
    assert!(
        warning.starts_with("pod web-* has no sidecar: the pod uses the node's network"),
        "{warning}"
    );
    assert_eq!(answer["response"]["allowed"], true);

    let mut slip = pod.clone();
    slip["metadata"]["annotations"] = json!({"weft.dev/drain-seconds": "soon"});
    let (answer, verdict) = ask(&slip);
    assert!(matches!(verdict, Verdict::Refused(_)));
    assert_eq!(answer["response"]["allowed"], false);
    let message = answer["response"]["status"]["message"].as_str().unwrap();
    assert!(
        message.contains("weft.dev/drain-seconds: 'soon'"),
        "{message}"
    );

    // Nothing to do: no patch at all.
    let (answer, _) = ask(&injected(&pod));
    assert_eq!(answer["response"], json!({"uid": "u-1", "allowed": true}));

    for bad in [&b"{"[..], b"{}", b"{\"request\": {\"uid\": \"1\"}}"] {
        assert!(review(bad, true, &settings(), newest()).is_err());
    }
}

#[test]
fn manifests() {
    let settings = settings();
    let context = Context {
        namespace: "default",
        kubernetes: newest(),
        settings: &settings,
    };
    let text = "# a service\nkind: Service # untouched\nmetadata: {name: a}\n---\n\
                kind: List\nitems:\n- kind: Pod\n  metadata: {name: p, namespace: kube-system}\n  \
                spec: {containers: []}\n- kind: ConfigMap\n---\nkind: CronJob\nmetadata: {name: c}\n\
                spec: {jobTemplate: {spec: {template: {spec: {containers: [{name: x}]}}}}}\n";
    let mut notes = Vec::new();
    let out = inject_text(text, context, &mut notes).unwrap();
    assert!(
        out.starts_with("# a service\nkind: Service # untouched\nmetadata: {name: a}\n---\n"),
        "{out}"
    );
    assert_eq!(
        notes,
        [
            Note {
                object: "pod/p".to_owned(),
                skipped: Some("pods of the namespace kube-system get no sidecar".to_owned()),
            },
            Note {
                object: "cronjob/c".to_owned(),
                skipped: None,
            },
        ]
    );
    let documents: Vec<Value> = serde_saphyr::from_multiple(&out).unwrap();
    let template = &documents[2]["spec"]["jobTemplate"]["spec"]["template"];
    assert_eq!(
        template["spec"]["initContainers"][1]["name"],
        PROXY_CONTAINER
    );

    let error = inject_text("kind: Job\nmetadata: {name: j}\n", context, &mut notes).unwrap_err();
    assert_eq!(error.to_string(), "job/j: spec/template is missing");
    let slip = "kind: Pod\nmetadata: {name: p, annotations: {weft.dev/drain: '1'}}\n";
    let error = inject_text(slip, context, &mut notes).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("pod/p: annotation weft.dev/drain is not known"),
        "{error}"
    );
}

#[test]
fn versions() {
    for (given, expected) in [("1.34", "1.34"), ("v1.29.3", "1.29"), ("1.28+", "1.28")] {
        assert_eq!(given.parse::<Version>().unwrap().to_string(), expected);
    }
    for bad in ["", "1", "one.two", "1.x"] {
        assert!(bad.parse::<Version>().is_err(), "{bad}");
    }
}

#[test]
fn settings_are_checked() {
    for (text, expected) in [
        ("proxy: {image: p, colour: red}", "colour"),
        ("proxy: {image: ''}", "proxy.image is empty"),
        (
            "proxy: {image: p, logLevel: loud}",
            "proxy.logLevel: 'loud'",
        ),
        (
            "proxy: {image: p, resources: {limits: {memory: lots}}}",
            "'lots' is not a quantity",
        ),
        (
            "{proxy: {image: p}, capture: {excludeInboundPorts: ['x']}}",
            "capture.excludeInboundPorts: 'x'",
        ),
    ] {
        let error = Settings::parse(text).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

/// Merges objects into objects; anything else is replaced.
fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from.clone(),
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-z0-9./:$()-]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::btree_map("[a-z]{1,6}", inner, 0..3)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

fn any_container() -> impl Strategy<Value = Value> {
    ("[a-z]{1,8}", any_json())
        .prop_map(|(name, rest)| json!({"name": name, "image": "i", "x": rest}))
}

prop_compose! {
    fn any_pod()(
        labels in prop::option::of(prop::collection::btree_map("[a-z]{1,5}", "[a-z]{0,5}", 0..3)),
        annotations in prop::option::of(prop::collection::btree_map("[a-z./]{1,9}", "[a-z]{0,5}", 0..3)),
        init in prop::option::of(prop::collection::vec(any_container(), 0..3)),
        containers in prop::collection::vec(any_container(), 1..3),
        volumes in prop::option::of(prop::collection::vec(any_container(), 0..3)),
        other in any_json(),
        metadata in any::<bool>(),
    ) -> Value {
        let mut pod = json!({"spec": {"containers": containers, "other": other}, "extra": other});
        if metadata {
            pod["metadata"] = json!({"labels": labels, "annotations": annotations, "uid": other});
        }
        if let Some(init) = init {
            pod["spec"]["initContainers"] = json!(init);
        }
        if let Some(volumes) = volumes {
            pod["spec"]["volumes"] = json!(volumes);
        }
        pod
    }
}

/// The pod without everything of ours.
fn without_ours(pod: &Value) -> Value {
    let mut pod = pod.clone();
    for field in ["initContainers", "containers", "volumes"] {
        if let Some(items) = pod["spec"].get_mut(field).and_then(Value::as_array_mut) {
            items.retain(|item| !name(item).unwrap_or("").starts_with("weft-"));
        }
    }
    if let Some(annotations) = pod["metadata"]["annotations"].as_object_mut() {
        annotations.retain(|key, _| {
            !key.starts_with("weft.dev/")
                && !key.starts_with("prometheus.io/")
                && !key.starts_with("kubectl.kubernetes.io/")
        });
    }
    normal(pod)
}

/// Empty and missing are the same here.
fn normal(mut pod: Value) -> Value {
    for at in ["metadata", "spec"] {
        if let Some(object) = pod.get_mut(at).and_then(Value::as_object_mut) {
            object
                .retain(|_, value| !value.is_null() && *value != json!([]) && *value != json!({}));
        }
    }
    if pod
        .get("metadata")
        .is_some_and(|m| m.is_null() || *m == json!({}))
    {
        pod.as_object_mut().unwrap().remove("metadata");
    }
    pod
}

proptest! {
    #[test]
    fn twice_is_once(pod in any_pod(), minor in 20u32..40) {
        let kubernetes = Version { major: 1, minor };
        let first = Request { kubernetes, ..request(&pod) };
        let Ok(Outcome::Injected(once)) = inject(first, &settings()) else {
            panic!("{pod}");
        };
        let second = Request { kubernetes, ..request(&once) };
        prop_assert_eq!(inject(second, &settings()), Ok(Outcome::Injected(once)));
    }

    #[test]
    fn nothing_of_the_pod_is_lost(pod in any_pod(), minor in 20u32..40) {
        let request = Request { kubernetes: Version { major: 1, minor }, ..request(&pod) };
        let Ok(Outcome::Injected(after)) = inject(request, &settings()) else {
            panic!("{pod}");
        };
        prop_assert_eq!(without_ours(&after), normal(pod));
    }

    /// The patch that the webhook answers with makes exactly what `weft inject` writes.
    #[test]
    fn the_patch_is_the_difference(pod in any_pod(), minor in 20u32..40) {
        let request = Request { kubernetes: Version { major: 1, minor }, ..request(&pod) };
        let Ok(Outcome::Injected(after)) = inject(request, &settings()) else {
            panic!("{pod}");
        };
        let operations = patch(&pod, &after);
        let operations: json_patch::Patch = serde_json::from_value(json!(operations)).unwrap();
        // The apiserver's pods always have metadata.
        prop_assume!(pod.get("metadata").is_some());
        let mut patched = pod.clone();
        json_patch::patch(&mut patched, &operations).unwrap();
        prop_assert_eq!(patched, after);
    }

    #[test]
    fn nothing_panics(body in any_json(), pod in any_json()) {
        let _ = review(body.to_string().as_bytes(), true, &settings(), newest());
        let _ = review(&admission(&pod), true, &settings(), newest());
        let _ = review(&admission(&json!({"metadata": body, "spec": pod})), true, &settings(), newest());
    }
}
