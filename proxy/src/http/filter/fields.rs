//! Header edits, on both kinds of heads.

use http::HeaderMap;

use crate::http::session::Given;
use crate::http1::head::{Edit, Head, Span};
use crate::tables::FieldEdit;

/// Adds the edits of an HTTP/1.1 head. A field that is replaced keeps its place and its spelling;
/// what is added comes last. Whoever calls sorts the edits by their place.
pub fn of_head(changes: &[FieldEdit], head: &Head, buf: &[u8], edits: &mut Vec<Edit>) {
    for change in changes {
        let mut values = &change.values[..];
        let mut placed = false;
        for field in head.all(buf, change.name.as_str()) {
            if change.keep {
                break;
            }
            let line = head.line(buf, field);
            // A field of the hop is gone already.
            let gone = |edit: &Edit| {
                edit.put.is_empty() && edit.place.start <= line.start && line.end <= edit.place.end
            };
            if edits.iter().any(gone) {
                continue;
            }
            match values.split_first() {
                Some((first, rest)) if !placed => {
                    placed = true;
                    values = rest;
                    edits.push(Edit {
                        place: field.value,
                        put: first.as_bytes().to_vec(),
                    });
                }
                _ => edits.push(Edit::remove(line)),
            }
        }
        append(change, values.iter(), head, buf, edits);
    }
}

fn append<'v>(
    change: &FieldEdit,
    values: impl Iterator<Item = &'v http::HeaderValue>,
    head: &Head,
    buf: &[u8],
    edits: &mut Vec<Edit>,
) {
    for value in values {
        let mut line = Vec::with_capacity(change.spelling.len() + value.len() + 4);
        line.extend_from_slice(change.spelling.as_bytes());
        line.extend_from_slice(b": ");
        line.extend_from_slice(value.as_bytes());
        line.extend_from_slice(b"\r\n");
        edits.push(Edit::insert(head.tail(buf), line));
    }
}

/// Adds lines of our own at the end of a head, in place of those that came under the same names.
pub fn add_to_head(
    fields: &[(&'static str, String)],
    head: &Head,
    buf: &[u8],
    edits: &mut Vec<Edit>,
) {
    for (name, value) in fields {
        for field in head.all(buf, name) {
            edits.push(Edit::remove(head.line(buf, field)));
        }
        let line = format!("{name}: {value}\r\n").into_bytes();
        edits.push(Edit::insert(head.tail(buf), line));
    }
}

/// Adds the field that tells a client of its session.
pub fn session_to_head(given: &Given, head: &Head, buf: &[u8], edits: &mut Vec<Edit>) {
    if given.alone {
        for field in head.all(buf, given.name.as_str()) {
            edits.push(Edit::remove(head.line(buf, field)));
        }
    }
    let mut line = given.spelling.as_bytes().to_vec();
    line.extend_from_slice(b": ");
    line.extend_from_slice(given.value.as_bytes());
    line.extend_from_slice(b"\r\n");
    edits.push(Edit::insert(head.tail(buf), line));
}

/// The same for an HTTP/2 message.
pub fn session_to_map(given: Given, headers: &mut HeaderMap) {
    if given.alone {
        headers.remove(&given.name);
    }
    headers.append(given.name, given.value);
}

/// Puts the edits in the order in which a head is written; where two touch the same bytes, the
/// larger one stands.
pub fn sort(edits: &mut [Edit]) {
    edits.sort_by_key(|edit| (edit.place.start, std::cmp::Reverse(edit.place.end)));
}

/// The edit that puts another target into a request's head. The scheme and authority of a target in
/// absolute form stay, unless `host` replaces the authority.
pub fn target(
    head: &Head,
    buf: &[u8],
    path: Option<Vec<u8>>,
    host: Option<&str>,
    edits: &mut Vec<Edit>,
) {
    let target = head.target.get(buf);
    let authority = authority_of(target);
    if let Some(path) = path {
        let start = match &authority {
            Some(authority) => authority.end,
            None => 0,
        };
        let start = head.target.start + start as u32;
        let end = head.target.end;
        edits.push(Edit {
            place: Span { start, end },
            put: path,
        });
    }
    if let (Some(host), Some(authority)) = (host, authority) {
        let at = |offset: usize| head.target.start + offset as u32;
        edits.push(Edit {
            place: Span {
                start: at(authority.start),
                end: at(authority.end),
            },
            put: host.as_bytes().to_vec(),
        });
    }
    if let Some(host) = host {
        for field in head.all(buf, "host") {
            edits.push(Edit {
                place: field.value,
                put: host.as_bytes().to_vec(),
            });
        }
    }
}

/// Where the authority of a target in absolute form stands (RFC 9112 section 3.2.2).
fn authority_of(target: &[u8]) -> Option<std::ops::Range<usize>> {
    if target.first() == Some(&b'/') {
        return None;
    }
    let start = target.windows(3).position(|w| w == b"://")? + 3;
    let end = target[start..]
        .iter()
        .position(|byte| b"/?".contains(byte))
        .map_or(target.len(), |end| start + end);
    Some(start..end)
}

/// Edits the fields of an HTTP/2 message.
pub fn of_map(changes: &[FieldEdit], headers: &mut HeaderMap) {
    for change in changes {
        if !change.keep {
            headers.remove(&change.name);
        }
        for value in &change.values {
            headers.append(change.name.clone(), value.clone());
        }
    }
}

/// Adds fields of our own, in place of those that came under the same names.
pub fn add_to_map(fields: &[(&'static str, String)], headers: &mut HeaderMap) {
    for (name, value) in fields {
        if let Ok(value) = value.parse() {
            headers.insert(*name, value);
        }
    }
}
