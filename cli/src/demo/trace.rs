//! One request's way through the mesh, as a tree.

use std::fmt::Write;

use serde::Serialize;

/// What is kept of a span.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    pub trace_id: Vec<u8>,
    pub id: Vec<u8>,
    /// Empty for a root.
    pub parent: Vec<u8>,
    pub service: String,
    pub name: String,
    /// OTLP: 2 is server, 3 is client.
    pub kind: i32,
    /// Nanoseconds since the Unix epoch.
    pub start: u64,
    pub end: u64,
    pub failed: bool,
    pub attributes: Vec<(String, String)>,
}

/// A span with what it caused.
#[derive(Debug, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Node {
    pub service: String,
    pub name: String,
    pub kind: &'static str,
    /// From the beginning of the trace, milliseconds.
    pub starts: f64,
    /// Milliseconds.
    pub took: f64,
    pub failed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub children: Vec<Node>,
}

/// The trees of a trace: one, if every span's parent has arrived.
pub fn tree(spans: &[Span]) -> Vec<Node> {
    let begin = spans.iter().map(|s| s.start).min().unwrap_or_default();
    let known = |id: &[u8]| spans.iter().any(|s| s.id == id);
    let mut roots: Vec<&Span> = spans
        .iter()
        .filter(|s| s.parent.is_empty() || s.parent == s.id || !known(&s.parent))
        .collect();
    roots.sort_by_key(|s| s.start);
    roots
        .into_iter()
        .map(|root| node(root, spans, begin, 0))
        .collect()
}

/// Deepest level shown; a cycle of parents ends here too.
const MAX_DEPTH: usize = 32;

fn node(span: &Span, spans: &[Span], begin: u64, depth: usize) -> Node {
    let mut children: Vec<&Span> = spans
        .iter()
        .filter(|s| depth < MAX_DEPTH && s.parent == span.id && s.id != span.id)
        .collect();
    children.sort_by_key(|s| s.start);
    let attribute = |key: &str| {
        let found = span.attributes.iter().find(|(k, _)| k == key)?;
        Some(found.1.clone())
    };
    Node {
        service: span.service.clone(),
        name: span.name.clone(),
        kind: match span.kind {
            2 => "server",
            3 => "client",
            _ => "internal",
        },
        starts: millis(span.start.saturating_sub(begin)),
        took: millis(span.end.saturating_sub(span.start)),
        failed: span.failed,
        status: attribute("http.response.status_code")
            .or_else(|| attribute("rpc.response.status_code"))
            .or_else(|| attribute("rpc.grpc.status_code").map(|code| format!("grpc {code}"))),
        children: children
            .into_iter()
            .map(|child| node(child, spans, begin, depth + 1))
            .collect(),
    }
}

fn millis(nanos: u64) -> f64 {
    (nanos as f64 / 1e4).round() / 1e2
}

/// The trees for people.
pub fn render(nodes: &[Node]) -> String {
    let mut lines = Vec::new();
    for root in nodes {
        collect(root, "", "", &mut lines);
    }
    let width = lines
        .iter()
        .map(|(left, _)| left.chars().count())
        .max()
        .unwrap_or(0);
    let mut out = String::new();
    for (left, right) in lines {
        let pad = width - left.chars().count();
        let _ = writeln!(out, "{left}{:pad$}  {right}", "");
    }
    out
}

fn collect(node: &Node, first: &str, rest: &str, lines: &mut Vec<(String, String)>) {
    let mut right = format!("{:>8.2} ms", node.took);
    if let Some(status) = &node.status {
        right.push_str("  ");
        right.push_str(status);
    }
    if node.failed {
        right.push_str("  failed");
    }
    lines.push((
        format!("{first}{} {} ({})", node.service, node.name, node.kind),
        right,
    ));
    for (n, child) in node.children.iter().enumerate() {
        let last = n + 1 == node.children.len();
        let (branch, stem) = if last {
            ("└─ ", "   ")
        } else {
            ("├─ ", "│  ")
        };
        collect(
            child,
            &format!("{rest}{branch}"),
            &format!("{rest}{stem}"),
            lines,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(id: u8, parent: u8, service: &str, kind: i32, start: u64, end: u64) -> Span {
        Span {
            trace_id: vec![1],
            id: vec![id],
            parent: if parent == 0 { vec![] } else { vec![parent] },
            service: service.to_owned(),
            name: "GET".to_owned(),
            kind,
            start: start * 1_000_000,
            end: end * 1_000_000,
            failed: false,
            attributes: vec![("http.response.status_code".to_owned(), "200".to_owned())],
        }
    }

    #[test]
    fn children_stand_under_their_parents_in_order_of_time() {
        let mut spans = vec![
            span(4, 2, "front", 3, 3, 7),
            span(3, 2, "front", 3, 2, 5),
            span(2, 1, "front", 2, 1, 9),
            span(1, 0, "visitor", 3, 0, 10),
            span(5, 3, "catalog", 2, 3, 4),
        ];
        spans[4].failed = true;
        assert_eq!(
            render(&tree(&spans)),
            "\
visitor GET (client)              10.00 ms  200
└─ front GET (server)              8.00 ms  200
   ├─ front GET (client)           3.00 ms  200
   │  └─ catalog GET (server)      1.00 ms  200  failed
   └─ front GET (client)           4.00 ms  200
"
        );
    }

    #[test]
    fn a_span_whose_parent_is_missing_is_a_root_and_a_cycle_ends() {
        let spans = [span(2, 9, "front", 2, 1, 9), span(3, 3, "odd", 2, 1, 9)];
        assert_eq!(tree(&spans).len(), 2);
        let cycle = [span(1, 2, "a", 2, 0, 1), span(2, 1, "b", 2, 0, 1)];
        assert_eq!(tree(&cycle).len(), 0);
    }
}
