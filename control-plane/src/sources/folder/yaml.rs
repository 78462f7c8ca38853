//! YAML documents (JSON is YAML too), the items of a list in one, and the line a field stands on.

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{DuplicateKeyPolicy, Spanned, UserMessageFormatter};

/// One document of a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Document<'a> {
    text: &'a str,
    /// Line in the file of the first line of `text`, from 1.
    pub(super) line: u32,
}

/// An item of a document's `items`, as a document of its own.
#[derive(Debug)]
pub(super) struct Item {
    text: String,
    line: u32,
}

impl Item {
    pub(super) fn document(&self) -> Document<'_> {
        Document {
            text: &self.text,
            line: self.line,
        }
    }
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

    /// The `items` of a list. Each is cut out of the text, so that it is read as any document is,
    /// with its lines; what it refers to by an alias must stand in it.
    pub(super) fn items(&self) -> Result<Vec<Item>, Unreadable> {
        #[derive(Deserialize)]
        struct List {
            #[serde(default)]
            items: Option<Vec<Spanned<IgnoredAny>>>,
        }
        let list: List = self.read()?;
        let items = list.items.unwrap_or_default().into_iter();
        Ok(items
            .filter_map(|item| {
                let line = u32::try_from(item.referenced.line()).ok()?;
                let start = usize::try_from(item.referenced.span().byte_offset()?).ok()?;
                Some(Item {
                    text: cut(self.text, start),
                    line: line + self.line - 1,
                })
            })
            .collect())
    }

    /// The document that begins at a line of the file: itself, or an item in it.
    pub(super) fn beginning_at(&self, line: u32) -> Option<Item> {
        if self.line == line {
            return Some(Item {
                text: self.text.to_owned(),
                line,
            });
        }
        let items = self.items().ok()?;
        // The last that does not begin later: it, or something in it.
        let item = items.iter().rev().find(|item| item.line <= line)?;
        item.document().beginning_at(line)
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

/// A value that begins at a byte of the text, alone. What is before it in its line becomes spaces:
/// the lines of a block have to begin in the same column.
fn cut(text: &str, start: usize) -> String {
    let rest = text.get(start..).unwrap_or_default();
    if rest.starts_with(['{', '[']) {
        return rest[..flow(rest)].to_owned();
    }
    let before = text[..start].rfind('\n').map_or(start, |at| start - at - 1);
    let mut alone = " ".repeat(before);
    for (nth, line) in rest.split_inclusive('\n').enumerate() {
        let content = line.trim_start_matches(' ');
        let indented = line.len() - content.len() >= before;
        let is_empty = content.trim_end().is_empty() || content.starts_with('#');
        if nth > 0 && !indented && !is_empty {
            break;
        }
        alone.push_str(line);
    }
    alone
}

/// Length of the flow collection that a text begins with, bytes.
fn flow(text: &str) -> usize {
    let (mut depth, mut quote, mut escaped) = (0u32, None, false);
    // A quote is one at the beginning of a value only: what's in a word is not.
    let mut begins = true;
    // Two of them in single quotes are one that does not end it.
    let mut closed = false;
    for (at, char) in text.char_indices() {
        let again = std::mem::take(&mut closed) && char == '\'';
        match (quote, char) {
            _ if escaped => escaped = false,
            (Some('"'), '\\') => escaped = true,
            (Some(open), _) if char == open => {
                quote = None;
                closed = open == '\'';
            }
            (Some(_), _) => {}
            (None, '"' | '\'') if begins || again => quote = Some(char),
            (None, '{' | '[') => depth += 1,
            (None, '}' | ']') => {
                depth -= 1;
                if depth == 0 {
                    return at + 1;
                }
            }
            (None, _) => {}
        }
        if quote.is_none() && !char.is_whitespace() {
            begins = matches!(char, '{' | '[' | ',' | ':');
        }
    }
    text.len()
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
