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
        }
    }
}
