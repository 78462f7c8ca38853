//! The examples of docs/reference/policies.md are what they say they are.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::Path;

use weft_control_plane::check::check_folder;

/// A page, and its YAML blocks with the lines they begin at.
fn examples() -> (String, Vec<(usize, String)>) {
    examples_of("policies.md")
}

fn examples_of(page: &str) -> (String, Vec<(usize, String)>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference");
    let page = folder.join(page);
    let text = std::fs::read_to_string(page).unwrap();
    let mut blocks = Vec::new();
    let mut block: Option<(usize, String)> = None;
    for (index, line) in text.lines().enumerate() {
        match (&mut block, line) {
            (None, "```yaml") => block = Some((index + 2, String::new())),
            (Some(_), "```") => blocks.extend(block.take()),
            (Some((_, content)), line) => {
                content.push_str(line);
                content.push('\n');
            }
            (None, _) => {}
        }
    }
    assert!(block.is_none(), "a block does not end");
    (text, blocks)
}

#[test]
fn every_example_is_right() {
    let (_, blocks) = examples();
    assert!(blocks.len() >= 7);
    for (line, block) in blocks {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("example.yaml"), block).unwrap();
        let report = check_folder(dir.path()).unwrap();
        assert!(report.objects > 0);
        assert!(
            report.findings.is_empty(),
            "example at line {line}: {report}"
        );
    }
}

/// Every example of a route is used for its parent, and leads somewhere.
#[test]
fn every_route_is_accepted() {
    let (_, blocks) = examples_of("routes.md");
    assert_eq!(blocks.len(), 6);
    let services: String = ["echo", "echo-v1", "echo-v2"]
        .iter()
        .enumerate()
        .map(|(index, name)| {
            let ports: String = [80, 443, 7070, 8080, 9090]
                .iter()
                .map(|port| format!("  - {{name: p{port}, port: {port}}}\n"))
                .collect();
            format!(
                "apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: shop}}
spec:
  clusterIP: 10.96.0.{}
  ports:
{ports}---
",
                index + 1
            )
        })
        .collect();
    for (line, block) in blocks {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("services.yaml"), &services).unwrap();
        std::fs::write(dir.path().join("example.yaml"), block).unwrap();
        let report = check_folder(dir.path()).unwrap();
        assert_eq!(report.objects, 4, "example at line {line}: {report}");
        let of_routes = report
            .findings
            .iter()
            .filter(|finding| {
                finding
                    .object
                    .as_deref()
                    .is_none_or(|o| o.contains("Route"))
            })
            .count();
        assert_eq!(of_routes, 0, "example at line {line}: {report}");
    }
}

/// Every field of the kinds stands in an example, so that no field is left out.
#[test]
fn every_field_has_an_example() {
    let (_, blocks) = examples();
    let all: String = blocks.into_iter().map(|(_, block)| block).collect();
    let written: BTreeSet<&str> = all.split(|c: char| !(c.is_ascii_alphanumeric())).collect();
    let policy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../api/src/policy");
    for file in [
        "workload.rs",
        "health.rs",
        "traffic.rs",
        "resilience.rs",
        "security.rs",
        "telemetry.rs",
        "external.rs",
        "egress.rs",
    ] {
        let source = std::fs::read_to_string(policy.join(file)).unwrap();
        let mut renamed = None;
        for line in source.lines().map(str::trim) {
            if let Some(rename) = line.strip_prefix("rename = \"") {
                renamed = rename.split('"').next();
            }
            let Some(field) = line
                .strip_prefix("pub ")
                .filter(|rest| rest.ends_with(','))
                .and_then(|rest| rest.split_once(':'))
                .map(|(name, _)| name)
            else {
                continue;
            };
            let camel = camel_case(field);
            let name = renamed.take().unwrap_or(&camel);
            if ["status", "group"].contains(&name) && !written.contains(name) {
                continue;
            }
            assert!(written.contains(name), "{file}: {name} has no example");
        }
    }
}

fn camel_case(snake: &str) -> String {
    let mut words = snake.split('_');
    let first = words.next().unwrap_or_default().to_owned();
    words.fold(first, |mut camel, word| {
        let (head, tail) = word.split_at(1);
        camel.push_str(&head.to_ascii_uppercase());
        camel.push_str(tail);
        camel
    })
}

#[test]
fn a_report_says_where_and_what() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(
        dir.path().join("a.yaml"),
        "apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec:\n  ports: [{port: 80}]\n  selector:\n    app: nobody\n---\napiVersion: policy.weft.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: p}\nspec:\n  targetRefs:\n  - kind: Service\n    name: x\n  - kind: Service\n    name: nobody\n  timeouts: {connect: 1s}\n",
    )
    .unwrap();
    std::fs::write(
        dir.path().join("b.yaml"),
        "apiVersion: policy.weft.dev/v1alpha1\nkind: Worklod\n",
    )
    .unwrap();
    let report = check_folder(dir.path()).unwrap();
    assert!(report.has_errors());
    let lines: Vec<(String, Option<u32>)> = report
        .findings
        .iter()
        .map(|finding| {
            let file = finding.file.as_ref().unwrap().file_name().unwrap();
            (file.to_string_lossy().into_owned(), finding.line)
        })
        .collect();
    assert_eq!(
        lines,
        [
            ("a.yaml".to_owned(), Some(6)),
            ("a.yaml".to_owned(), Some(17)),
            ("b.yaml".to_owned(), Some(1)),
        ]
    );
    let text = report.to_string();
    assert!(
        text.contains("a.yaml:6: warning: Service default/x: no Workload"),
        "{text}"
    );
    assert!(text.ends_with("2 objects, 1 errors, 2 warnings"), "{text}");
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["findings"][2]["severity"], "error");
    assert!(check_folder(&dir.path().join("nowhere")).is_err());
}
