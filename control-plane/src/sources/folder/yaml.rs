//! YAML documents (JSON is YAML too), and the line a field stands on.

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{DuplicateKeyPolicy, Spanned, UserMessageFormatter};

/// One document of a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Document<'a> {
    text: &'a str,
    /// Line in the file of the first line of `text`, from 1.
    pub(super) line: u32,
}

/// Why a document cannot be read.
#[derive(Debug)]
pub(super) struct Unreadable {
    /// Line in the file, from 1.
    pub(super) line: Option<u32>,
    /// What is wrong.
    pub(super) message: String,
}

/// The documents of a file. A line that begins with `---` always begins a document, even inside a
/// block scalar (YAML 1.2.2 section 9.1.2); documents with nothing but comments are left out.
pub(super) fn documents(text: &str) -> Vec<Document<'_>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut found = Vec::new();
    let (mut start, mut start_line) = (0, 1);
    let (mut offset, mut line) = (0, 1);
    for part in text.split_inclusive('\n') {
        let marker = part.strip_prefix("---");
        if offset > 0 && marker.is_some_and(|rest| rest.trim_start() != rest || rest.is_empty()) {
            found.push(Document {
                text: &text[start..offset],
                line: start_line,
            });
            (start, start_line) = (offset, line);
        }
        offset += part.len();
        line += 1;
    }
    found.push(Document {
        text: &text[start..],
        line: start_line,
    });
    found.retain(|document| {
        document.text.lines().any(|line| {
            let line = line.strip_prefix("---").unwrap_or(line).trim();
            !line.is_empty() && !line.starts_with('#') && !line.starts_with('%') && line != "..."
        })
    });
    found
}

impl Document<'_> {
    pub(super) fn read<T: DeserializeOwned>(&self) -> Result<T, Unreadable> {
        let options = serde_saphyr::options! {
            duplicate_keys: DuplicateKeyPolicy::Error,
            with_snippet: false,
        };
        serde_saphyr::from_str_with_options(self.text, options).map_err(|error| {
            let line = error
                .location()
                .map(|location| location.line() as u32)
                .filter(|line| *line > 0)
                .map(|line| line + self.line - 1);
            let rendered = error
                .without_snippet()
                .render_with_formatter(&UserMessageFormatter);
            // The line is said beside it, and is one of the document, not of the file.
            let message = match rendered.rfind(" at line ") {
                Some(at) => rendered[..at].to_owned(),
                None => rendered,
            };
            Unreadable { line, message }
        })
    }

    /// Line in the file of a field, or of the nearest one above it.
    pub(super) fn line_of(&self, path: &[String]) -> Option<u32> {
        let root: Node = self.read().ok()?;
        let mut node = &root;
        let mut line = None;
        for step in path {
            let Some((at, next)) = node.step(step) else {
                break;
            };
            line = Some(at + self.line - 1);
            node = next;
        }
        line.or(Some(self.line))
    }
}

/// Any value, with the lines of what is in it.
enum Node {
    Scalar,
    List(Vec<Spanned<Node>>),
    Map(Vec<(Spanned<String>, Node)>),
}

impl Node {
    fn step(&self, name: &str) -> Option<(u32, &Node)> {
        match self {
            Self::Scalar => None,
            Self::List(items) => {
                let item = items.get(name.parse::<usize>().ok()?)?;
                Some((item.referenced.line() as u32, &item.value))
            }
            Self::Map(fields) => {
                let (key, value) = fields.iter().find(|(key, _)| key.value == name)?;
                Some((key.referenced.line() as u32, value))
            }
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_bool<E>(self, _: bool) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_str<E>(self, _: &str) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        Node::deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Node, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Node::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Node, A::Error> {
        let mut map = Vec::new();
        while let Some(field) = fields.next_entry()? {
            map.push(field);
        }
        Ok(Node::Map(map))
    }
}
