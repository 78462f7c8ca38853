use std::fs;
use std::io::Write;
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::*;
use crate::model::{Kind, Name, Object};

/// Longer than anything takes that works, the slow scan included.
const PATIENCE: Duration = Duration::from_secs(15);

fn service(name: &str, vip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {vip}, ports: [{{port: 80}}]}}\n"
    )
}

struct Watched {
    dir: TempDir,
    updates: mpsc::Receiver<Update>,
    objects: BTreeMap<ObjectRef, Object>,
    findings: Vec<Finding>,
}

impl Watched {
    async fn start(files: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let (sink, updates) = mpsc::channel(16);
        tokio::spawn(Folder::open(dir.path()).unwrap().run(sink));
        let mut watched = Self {
            dir,
            updates,
            objects: BTreeMap::new(),
            findings: Vec::new(),
        };
        while !watched.next().await {}
        watched
    }

    /// Takes the next update; true for the end of the first reading.
    async fn next(&mut self) -> bool {
        match timeout(PATIENCE, self.updates.recv())
            .await
            .expect("no update")
            .unwrap()
        {
            Update::Changes { changes, .. } => {
                for change in changes {
                    match change {
                        Change::Set(object) => {
                            self.objects.insert(object.reference(), *object);
                        }
                        Change::Generation { .. } | Change::Unreadable { .. } => {
                            panic!("a folder knows no generations, and writes no statuses")
                        }
                        Change::Remove(reference) => {
                            self.objects.remove(&reference).expect("removed twice");
                        }
                    }
                }
                false
            }
            Update::Findings(findings) => {
                self.findings = findings;
                false
            }
            Update::Synced => true,
        }
    }

    async fn until(&mut self, wanted: impl Fn(&Self) -> bool) {
        while !wanted(self) {
            self.next().await;
        }
    }

    fn vip(&self, name: &str) -> Option<String> {
        let reference = ObjectRef {
            kind: Kind::Service,
            name: Name::new("default", name),
        };
        match self.objects.get(&reference) {
            Some(Object::Service(service)) => Some(service.vips[0].to_string()),
            _ => None,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

#[tokio::test]
async fn files_are_followed() {
    let mut folder =
        Watched::start(&[("a.yaml", &service("a", "10.0.0.1")), ("notes.txt", "{")]).await;
    assert_eq!(folder.vip("a").as_deref(), Some("10.0.0.1"));
    assert!(folder.findings.is_empty());
    // Written in place.
    fs::write(folder.path("a.yaml"), service("a", "10.0.0.2")).unwrap();
    folder
        .until(|folder| folder.vip("a").as_deref() == Some("10.0.0.2"))
        .await;
    // Renamed into place, as editors do; several documents; JSON.
    let both = format!(
        "{}---\n# nothing\n---\n{}",
        service("b", "10.0.0.3"),
        service("c", "10.0.0.4")
    );
    fs::write(folder.path(".b.swp"), both).unwrap();
    fs::rename(folder.path(".b.swp"), folder.path("b.yml")).unwrap();
    folder.until(|folder| folder.vip("c").is_some()).await;
    assert_eq!(folder.vip("b").as_deref(), Some("10.0.0.3"));
    let json = r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "j"}, "spec": {"clusterIP": "10.0.0.5", "ports": [{"port": 80}]}}"#;
    fs::write(folder.path("j.json"), json).unwrap();
    folder.until(|folder| folder.vip("j").is_some()).await;
    // Removed.
    fs::remove_file(folder.path("b.yml")).unwrap();
    folder
        .until(|folder| folder.vip("b").is_none() && folder.vip("c").is_none())
        .await;
    // A folder within, made and moved away.
    fs::create_dir(folder.path("sub")).unwrap();
    fs::write(folder.path("sub/d.yaml"), service("d", "10.0.0.6")).unwrap();
    folder.until(|folder| folder.vip("d").is_some()).await;
    fs::rename(folder.path("sub"), folder.path(".sub")).unwrap();
    folder.until(|folder| folder.vip("d").is_none()).await;
    assert_eq!(folder.vip("a").as_deref(), Some("10.0.0.2"));
}

#[tokio::test]
async fn what_a_broken_file_said_before_stands() {
    let mut folder = Watched::start(&[("a.yaml", &service("a", "10.0.0.1"))]).await;
    let broken = format!("{}---\nkind: [\n", service("a", "10.0.0.9"));
    fs::write(folder.path("a.yaml"), broken).unwrap();
    folder.until(|folder| !folder.findings.is_empty()).await;
    assert_eq!(folder.vip("a").as_deref(), Some("10.0.0.1"));
    let finding = &folder.findings[0];
    assert_eq!(finding.file, Some(folder.path("a.yaml")));
    assert!(finding.line.is_some_and(|line| line >= 6), "{finding}");
    fs::write(folder.path("b.yaml"), service("b", "10.0.0.2")).unwrap();
    folder.until(|folder| folder.vip("b").is_some()).await;
    fs::write(folder.path("a.yaml"), service("a", "10.0.0.3")).unwrap();
    folder.until(|folder| folder.findings.is_empty()).await;
    assert_eq!(folder.vip("a").as_deref(), Some("10.0.0.3"));
}

#[tokio::test]
async fn a_file_that_is_being_written_takes_nothing_away() {
    let both = format!(
        "{}---\n{}",
        service("a", "10.0.0.1"),
        service("b", "10.0.0.2")
    );
    let mut folder = Watched::start(&[("a.yaml", &both)]).await;
    // Truncated, then written in two steps with the file kept open.
    let mut file = fs::File::create(folder.path("a.yaml")).unwrap();
    file.write_all(service("a", "10.0.0.7").as_bytes()).unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    file.write_all(format!("---\n{}", service("b", "10.0.0.8")).as_bytes())
        .unwrap();
    drop(file);
    // Whatever comes, neither is ever gone.
    folder
        .until(|folder| {
            assert!(folder.vip("a").is_some() && folder.vip("b").is_some());
            folder.vip("b").as_deref() == Some("10.0.0.8")
        })
        .await;
    assert_eq!(folder.vip("a").as_deref(), Some("10.0.0.7"));
}

#[tokio::test]
async fn of_two_files_the_first_by_name_wins() {
    let mut folder = Watched::start(&[
        ("a.yaml", &service("same", "10.0.0.1")),
        ("b.yaml", &service("same", "10.0.0.2")),
    ])
    .await;
    assert_eq!(folder.vip("same").as_deref(), Some("10.0.0.1"));
    assert_eq!(folder.findings.len(), 1);
    assert_eq!(folder.findings[0].file, Some(folder.path("b.yaml")));
    assert!(folder.findings[0].message.contains("a.yaml:1"));
    fs::remove_file(folder.path("a.yaml")).unwrap();
    folder
        .until(|folder| folder.vip("same").as_deref() == Some("10.0.0.2"))
        .await;
    folder.until(|folder| folder.findings.is_empty()).await;
}

#[tokio::test]
async fn a_folder_that_is_gone_is_no_order_to_forget() {
    let mut folder = Watched::start(&[("a.yaml", &service("a", "10.0.0.1"))]).await;
    fs::remove_file(folder.path("a.yaml")).unwrap();
    fs::remove_dir(folder.dir.path()).unwrap();
    folder.until(|folder| !folder.findings.is_empty()).await;
    assert!(folder.findings[0].message.contains("gone"));
    assert!(folder.vip("a").is_some());
}

#[test]
fn findings_name_the_line() {
    let file = Path::new("x.yaml");
    for (text, line, said) in [
        ("kind: Service\n", 1, "apiVersion"),
        ("apiVersion: v1\nkind: Servce\n", 1, "'Servce'"),
        (
            "# c\n---\napiVersion: v1\nkind: Service\nmetadata:\n  name: x\nspec:\n  ports:\n  - port: http\n",
            9,
            "u16",
        ),
        (
            "apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec:\n  clusterIP: nowhere\n",
            5,
            "cluster IP",
        ),
        (
            "apiVersion: policy.weft.dev/v1alpha1\nkind: Workload\nmetadata:\n  name: x\n  lables: {}\nspec: {addresses: [1.2.3.4]}\n",
            5,
            "lables",
        ),
        (
            "apiVersion: policy.weft.dev/v1alpha1\nkind: Workload\nmetadata: {name: x}\nspec:\n  addresses: [1.2.3.4]\n  weight: 99999\n",
            6,
            "out of range",
        ),
        (
            "apiVersion: policy.weft.dev/v1alpha1\nkind: Workload\nmetadata: {name: X_x}\nspec: {addresses: [1.2.3.4]}\n",
            3,
            "not a valid name",
        ),
        (
            "apiVersion: policy.weft.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: x}\nspec:\n  retries:\n    attempts: 11\n    codes: [200]\n",
            6,
            "overload",
        ),
        (
            "apiVersion: policy.weft.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: x}\nspec:\n  timeouts:\n    request: 1s\n    perTry: 2s\n",
            7,
            "never run out",
        ),
        (
            "apiVersion: policy.weft.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: x}\nspec:\n  timeouts:\n    request: 1s\n    request: 2s\n",
            7,
            "request",
        ),
        (
            "apiVersion: policy.weft.dev/v1alpha1\nkind: Telemetry\nmetadata: {name: x}\nspec:\n  tracing:\n    samplingPercent: 101\n",
            6,
            "percentage",
        ),
        (
            "apiVersion: policy.weft.dev/v1alpha1\nkind: PeerAuthentication\nmetadata: {name: x}\nspec:\n  portLevelMtls:\n    80: {mode: STRICT}\n",
            5,
            "selector",
        ),
    ] {
        let findings = manifest::parse(file, text)
            .err()
            .or_else(|| {
                manifest::parse(file, text)
                    .ok()
                    .map(|(_, findings)| findings)
            })
            .unwrap();
        let finding = findings
            .first()
            .unwrap_or_else(|| panic!("nothing found in\n{text}"));
        assert_eq!(finding.line, Some(line), "{finding}\n{text}");
        assert!(finding.message.contains(said), "{finding}");
        assert!(!finding.help.is_empty());
    }
}

#[test]
fn other_kinds_are_no_mistake() {
    let text = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n";
    let (objects, findings) = manifest::parse(Path::new("x.yaml"), text).unwrap();
    assert!(objects.is_empty());
    assert_eq!(findings[0].severity, Severity::Warning);
}

#[test]
fn documents_are_told_apart_wherever_they_begin() {
    let lines = |text: &str| {
        yaml::documents(text)
            .iter()
            .map(|document| document.line)
            .collect::<Vec<_>>()
    };
    assert_eq!(lines(""), [0u32; 0]);
    assert_eq!(lines("# only\n---\n# comments\n"), [0u32; 0]);
    assert_eq!(lines("a: 1\n---\nb: 2\n"), [1, 2]);
    assert_eq!(lines("---\na: 1\n--- # two\nb: 2\n---\n"), [1, 3]);
    assert_eq!(lines("--- {a: 1}\n---\tb\n"), [1, 2]);
    assert_eq!(lines("a: |\n  ---\n  text\nb: ---x\n---x: 1\n"), [1]);
}

proptest::proptest! {
    #[test]
    fn no_text_panics(text in "[-a-z:{}\\[\\]#|>&*!%@\"' \n\t0-9]{0,200}") {
        let _ = manifest::parse(Path::new("x.yaml"), &text);
        for document in yaml::documents(&text) {
            let _ = document.line_of(&["spec".to_owned(), "0".to_owned()]);
            let _ = document.items();
        }
        for list in [format!("items:\n- {text}\n- x"), format!("items: [{text}]")] {
            for document in yaml::documents(&list) {
                let _ = document.items();
            }
        }
    }
}

/// As `kubectl get -o yaml` prints it.
const LIST: &str = "\
apiVersion: v1
items:
- apiVersion: v1
  kind: Service
  metadata:
    annotations:
      note: |
        - apiVersion: v1
          kind: Service
    creationTimestamp: \"2026-01-01T00:00:00Z\"
    name: a
    namespace: shop
  spec:
    clusterIP: 10.96.0.1
    internalTrafficPolicy: Cluster
    ports:
    - name: http
      port: 80
      protocol: TCP
      targetPort: 8080
    sessionAffinity: None
    type: ClusterIP
  status:
    loadBalancer: {}
# What nobody has indented.
- addressType: IPv4
  apiVersion: discovery.k8s.io/v1
  endpoints: null
  kind: EndpointSlice
  metadata:
    labels: {kubernetes.io/service-name: a}
    name: a-1
    namespace: shop
  ports: null
- apiVersion: policy.weft.dev/v1alpha1
  kind: TrafficPolicy
  metadata:
    managedFields:
    - apiVersion: policy.weft.dev/v1alpha1
      manager: kubectl
    name: a
    namespace: shop
  spec:
    targetRefs:
    - kind: Service
      name: a
    timeouts:
      request: 5s
kind: List
metadata:
  resourceVersion: \"\"
";

fn references(parsed: &[manifest::Parsed]) -> Vec<(String, u32)> {
    let parsed = parsed.iter();
    parsed
        .map(|parsed| (parsed.object.reference().to_string(), parsed.line))
        .collect()
}

#[test]
fn the_items_of_a_list_are_objects() {
    let expected = [
        ("Service shop/a", 3),
        ("EndpointSlice shop/a-1", 26),
        ("TrafficPolicy shop/a", 35),
    ]
    .map(|(name, line)| (name.to_owned(), line));
    let file = Path::new("list.yaml");
    let (parsed, findings) = manifest::parse(file, LIST).unwrap();
    assert_eq!(findings, []);
    assert_eq!(references(&parsed), expected);

    // The same in a list in a list, behind another document.
    let indented: String = LIST.lines().map(|line| format!("    {line}\n")).collect();
    let nested = format!(
        "{}---\nkind: List\napiVersion: v1\nitems:\n  -\n{indented}",
        service("b", "10.96.0.2")
    );
    let (parsed, findings) = manifest::parse(file, &nested).unwrap();
    assert_eq!(findings, []);
    let names: Vec<String> = references(&parsed)
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert_eq!(names[0], "Service default/b");
    assert_eq!(names[1..], expected.clone().map(|(name, _)| name));
    assert_eq!(parsed[1].line, expected[0].1 + 9);

    // As JSON, in one line and in many; in YAML's own flow style.
    let json = r#"{"kind": "List", "apiVersion": "v1", "items": [
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a", "labels": {"q": "}]'\"{"}}, "spec": {"ports": [{"port": 80}]}},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "b"}, "spec": {"ports": []}}], "metadata": {}}"#;
    let (parsed, findings) = manifest::parse(file, json).unwrap();
    assert_eq!(findings, []);
    let both = [("Service default/a", 2), ("Service default/b", 3)];
    assert_eq!(
        references(&parsed),
        both.map(|(name, line)| (name.to_owned(), line))
    );
    let line = json.replace('\n', " ");
    let (parsed, _) = manifest::parse(file, &line).unwrap();
    assert_eq!(
        references(&parsed),
        both.map(|(name, _)| (name.to_owned(), 1))
    );
    let flow = "{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: Service, metadata: {name: it's-b, labels: {a: 'it''s }'}}, spec: {}}, ]}";
    let error = manifest::parse(file, flow).unwrap_err();
    assert_eq!(error.len(), 1, "{error:?}");
    assert_eq!(error[0].object.as_deref(), Some("Service default/it's-b"));

    for empty in ["items: []", "items: null", "items:", ""] {
        let text = format!("apiVersion: v1\nkind: List\n{empty}\n");
        assert_eq!(
            manifest::parse(file, &text).unwrap(),
            (vec![], vec![]),
            "{empty}"
        );
    }
}

#[test]
fn findings_name_the_item_of_a_list() {
    let file = Path::new("list.yaml");
    let found = |text: &str| -> Vec<(Option<u32>, String)> {
        let findings = match manifest::parse(file, text) {
            Ok((_, findings)) | Err(findings) => findings,
        };
        let findings = findings.into_iter();
        findings
            .map(|found| {
                (
                    found.line,
                    format!("{}: {}", found.object.unwrap_or_default(), found.message),
                )
            })
            .collect()
    };
    // A field that cannot be read, in the third item.
    let bad = found(&LIST.replace("request: 5s", "request: soon"));
    assert_eq!(bad.len(), 1, "{bad:?}");
    assert_eq!(bad[0].0, Some(48));
    assert!(
        bad[0].1.starts_with("items[2], TrafficPolicy shop/a: "),
        "{bad:?}"
    );
    // One that can be read and means nothing.
    let bad = found(&LIST.replace("port: 80\n", "port: 0\n"));
    assert_eq!(bad.len(), 1, "{bad:?}");
    assert_eq!(bad[0].0, Some(18), "{bad:?}");
    assert!(bad[0].1.starts_with("Service shop/a: "), "{bad:?}");
    // An item that is no object, and one of a kind that is nobody's.
    let odd = "apiVersion: v1\nkind: List\nitems:\n- 7\n- metadata: {name: x}\n- {apiVersion: apps/v1, kind: Deployment, metadata: {name: d}}\n";
    let bad = found(odd);
    let lines: Vec<Option<u32>> = bad.iter().map(|(line, _)| *line).collect();
    assert_eq!(lines, [Some(4), Some(5), Some(6)], "{bad:?}");
    assert!(bad[0].1.starts_with("items[0]: "), "{bad:?}");
    assert!(bad[1].1.contains("items[1] has no apiVersion"), "{bad:?}");
    assert!(
        bad[2].1.starts_with("items[2], Deployment default/d: "),
        "{bad:?}"
    );
    let items = found("apiVersion: v1\nkind: List\nitems: 7\n");
    assert_eq!(items[0].0, Some(3), "{items:?}");
    let mut deep = "{apiVersion: v1, kind: List, items: []}".to_owned();
    for _ in 0..9 {
        deep = format!("{{apiVersion: v1, kind: List, items: [{deep}]}}");
    }
    assert!(
        found(&deep)[0].1.contains("deeper than"),
        "{:?}",
        found(&deep)
    );
}

#[test]
fn what_is_wrong_between_objects_names_the_line_in_a_list() {
    let lost = LIST.replace(
        "    - kind: Service\n      name: a\n",
        "    - kind: Service\n      name: z\n",
    );
    let report = crate::check::check_text(Path::new("<stdin>"), &lost);
    assert_eq!(report.objects, 3);
    let found: Vec<(Option<u32>, Option<&str>)> = report
        .findings
        .iter()
        .map(|found| (found.line, found.object.as_deref()))
        .collect();
    // The port that no slice has, and the Service that is not there.
    let expected = [
        (Some(16), Some("Service shop/a")),
        (Some(46), Some("TrafficPolicy shop/a")),
    ];
    assert_eq!(found, expected, "{report}");

    let dir = tempfile::tempdir().unwrap();
    fs::write(
        dir.path().join("a.yaml"),
        service("b", "10.96.0.9") + "---\n" + &lost,
    )
    .unwrap();
    let report = crate::check::check_folder(dir.path()).unwrap();
    let lines: Vec<Option<u32>> = report.findings.iter().map(|found| found.line).collect();
    assert_eq!(lines, [Some(4), Some(16 + 5), Some(46 + 5)], "{report}");
}
