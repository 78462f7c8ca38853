//! The matches of a destination, arranged so that a request is compared with few of them.
//!
//! Paths are a trie of path elements: a request walks down its own path and meets every prefix and
//! the exact path that fit. What stands at a node, and behind each regular expression, is a
//! [`Bucket`]: its matches by the value of an exact header or query parameter, by method, and the
//! rest. Nodes are looked at from the deepest up, and a bucket that has nothing better than what is
//! found already is not looked at, so that a large table costs about what a small one does.

use std::collections::HashMap;
use std::sync::Arc;

use regex::bytes::Regex;

use super::{path_only, query_value, rest_holds};
use crate::http::RequestView;
use crate::tables::{PathMatch, Route, RouteMatch, ValueMatch};

/// Nodes of a request's path that are remembered on the way down; those of a deeper path are
/// looked at at once, which costs only time.
const DEPTH: usize = 32;

/// The matches of a destination.
#[derive(Debug)]
pub struct Index {
    /// In the order in which they win.
    entries: Vec<Entry>,
    nodes: Vec<Node>,
    patterns: Vec<(Regex, Bucket)>,
}

/// One match of one route.
#[derive(Debug)]
pub struct Entry {
    /// Place of the route in its destination.
    pub route: u32,
    /// Bytes of the path that its prefix takes; 0 for other matches.
    pub prefix: u32,
    conditions: RouteMatch,
    /// There are conditions besides the path.
    more: bool,
}

/// A place in the trie.
#[derive(Debug, Default)]
struct Node {
    /// By the next path element.
    children: HashMap<Box<[u8]>, u32>,
    /// Matches whose prefix ends here.
    prefix: Option<Bucket>,
    /// Matches whose exact path ends here.
    exact: Option<Bucket>,
}

/// Matches with the same path; numbers are places in [`Index::entries`], the lower wins.
#[derive(Debug)]
struct Bucket {
    least: u32,
    /// By the value of a header, for each name.
    headers: Named<ByValue>,
    /// By the value of a query parameter, for each name.
    query: Named<ByValue>,
    methods: HashMap<Box<[u8]>, Vec<u32>>,
    rest: Vec<u32>,
}

impl Index {
    /// `None` when the first route takes everything: nothing has to be compared then.
    pub fn new(routes: &[Arc<Route>]) -> Option<Box<Self>> {
        if routes.first()?.matches.is_empty() {
            return None;
        }
        let everything = RouteMatch::default();
        let mut all: Vec<(u32, usize, &RouteMatch)> = Vec::new();
        for (place, route) in routes.iter().enumerate() {
            if route.matches.is_empty() {
                // As many as there can be have an order; this one comes where it stands.
                all.push((everything.order, place, &everything));
            }
            all.extend(route.matches.iter().map(|m| (m.order, place, m)));
        }
        // Stable: those of the same order stay as they were.
        all.sort_by_key(|(order, _, _)| *order);
        let entries = all
            .iter()
            .map(|(_, route, m)| Entry {
                route: *route as u32,
                prefix: match &m.path {
                    Some(PathMatch::Prefix(prefix)) => prefix.trim_end_matches('/').len() as u32,
                    _ => 0,
                },
                conditions: (*m).clone(),
                more: m.method.is_some()
                    || m.grpc.is_some()
                    || !m.headers.is_empty()
                    || !m.header_patterns.is_empty()
                    || !m.query.is_empty(),
            })
            .collect();
        let mut index = Self {
            entries,
            nodes: vec![Node::default()],
            patterns: Vec::new(),
        };
        index.arrange();
        Some(Box::new(index))
    }

    /// Puts every entry at its place.
    fn arrange(&mut self) {
        let mut prefixes: HashMap<usize, Vec<u32>> = HashMap::new();
        let mut exacts: HashMap<usize, Vec<u32>> = HashMap::new();
        let mut patterns: Vec<(Regex, Vec<u32>)> = Vec::new();
        for number in 0..self.entries.len() {
            let path = self.entries[number].conditions.path.clone();
            let number = number as u32;
            match path {
                None => prefixes.entry(0).or_default().push(number),
                Some(PathMatch::Prefix(path)) => {
                    let node = self.node(path.trim_end_matches('/').as_bytes());
                    prefixes.entry(node).or_default().push(number);
                }
                Some(PathMatch::Exact(path)) => {
                    let node = self.node(path.as_bytes());
                    exacts.entry(node).or_default().push(number);
                }
                Some(PathMatch::Regex(pattern)) => {
                    let same =
                        |(known, _): &&mut (Regex, Vec<u32>)| known.as_str() == pattern.as_str();
                    match patterns.iter_mut().find(same) {
                        Some((_, numbers)) => numbers.push(number),
                        None => patterns.push((pattern, vec![number])),
                    }
                }
            }
        }
        for (node, numbers) in prefixes {
            self.nodes[node].prefix = Some(Bucket::new(&self.entries, numbers));
        }
        for (node, numbers) in exacts {
            self.nodes[node].exact = Some(Bucket::new(&self.entries, numbers));
        }
        self.patterns = patterns
            .into_iter()
            .map(|(pattern, numbers)| (pattern, Bucket::new(&self.entries, numbers)))
            .collect();
    }

    /// The node of a path, made when it is not there. The root is that of "", and of "/" as a
    /// prefix.
    fn node(&mut self, path: &[u8]) -> usize {
        let mut at = 0;
        for element in elements(path) {
            let next = self.nodes.len() as u32;
            let child = *self.nodes[at]
                .children
                .entry(element.into())
                .or_insert(next);
            if child == next {
                self.nodes.push(Node::default());
            }
            at = child as usize;
        }
        at
    }

    /// The match that wins; `None` when none holds.
    pub fn find<R: RequestView + ?Sized>(&self, request: &R) -> Option<&Entry> {
        let path = path_only(request.path());
        let mut search = Search {
            index: self,
            request,
            best: u32::MAX,
        };
        let mut way: [u32; DEPTH] = [0; DEPTH];
        let mut depth = 1;
        let mut at = 0;
        let mut whole = true;
        // A target such as "*" has no elements: it meets only what takes every path.
        for element in elements(path) {
            let Some(&child) = self.nodes[at].children.get(element) else {
                whole = false;
                break;
            };
            at = child as usize;
            if depth < DEPTH {
                way[depth] = child;
                depth += 1;
            } else {
                search.bucket(self.nodes[at].prefix.as_ref());
            }
        }
        if whole && at != 0 {
            search.bucket(self.nodes[at].exact.as_ref());
        }
        for &node in way[..depth].iter().rev() {
            search.bucket(self.nodes[node as usize].prefix.as_ref());
        }
        for (pattern, bucket) in &self.patterns {
            if bucket.least < search.best && pattern.is_match(path) {
                search.bucket(Some(bucket));
            }
        }
        self.entries.get(search.best as usize)
    }
}

/// What stands behind each "/" of a path; "/a/" has "a" and "".
fn elements(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.strip_prefix(b"/")
        .map(|rest| rest.split(|&byte| byte == b'/'))
        .into_iter()
        .flatten()
}

struct Search<'i, 'r, R: ?Sized> {
    index: &'i Index,
    request: &'r R,
    /// The best match that holds so far.
    best: u32,
}

impl<R: RequestView + ?Sized> Search<'_, '_, R> {
    fn bucket(&mut self, bucket: Option<&Bucket>) {
        let Some(bucket) = bucket else { return };
        if bucket.least >= self.best {
            return;
        }
        for (name, values) in &bucket.headers {
            if let Some(value) = self.request.header(name)
                && let Some(numbers) = values.get(value)
            {
                self.try_all(numbers);
            }
        }
        for (name, values) in &bucket.query {
            if let Some(value) = query_value(self.request.path(), name.as_bytes())
                && let Some(numbers) = values.get(&*value)
            {
                self.try_all(numbers);
            }
        }
        if !bucket.methods.is_empty()
            && let Some(numbers) = bucket.methods.get(self.request.method())
        {
            self.try_all(numbers);
        }
        self.try_all(&bucket.rest);
    }

    /// The first of them that holds, if it is better than what there is.
    fn try_all(&mut self, numbers: &[u32]) {
        for &number in numbers {
            if number >= self.best {
                return;
            }
            let entry = &self.index.entries[number as usize];
            if !entry.more || rest_holds(&entry.conditions, self.request) {
                self.best = number;
                return;
            }
        }
    }
}

impl Bucket {
    /// `numbers` are in order.
    fn new(entries: &[Entry], numbers: Vec<u32>) -> Self {
        // A match with several headers stands under the name that most have, so that few names
        // have to be looked up.
        let mut often: HashMap<&str, usize> = HashMap::new();
        for &number in &numbers {
            for (name, _) in &entries[number as usize].conditions.headers {
                *often.entry(name).or_default() += 1;
            }
        }
        let mut bucket = Self {
            least: numbers.first().copied().unwrap_or(u32::MAX),
            headers: Vec::new(),
            query: Vec::new(),
            methods: HashMap::new(),
            rest: Vec::new(),
        };
        for &number in &numbers {
            let conditions = &entries[number as usize].conditions;
            let header = conditions
                .headers
                .iter()
                .max_by_key(|(name, _)| (often.get(&**name), std::cmp::Reverse(name)));
            let query = conditions
                .query
                .iter()
                .find_map(|(name, value)| match value {
                    ValueMatch::Exact(value) => Some((name, value)),
                    ValueMatch::Regex(_) => None,
                });
            let place = if let Some((name, value)) = header {
                under(&mut bucket.headers, name).entry(value.as_bytes().into())
            } else if let Some((name, value)) = query {
                under(&mut bucket.query, name).entry(value.as_bytes().into())
            } else if let Some(method) = &conditions.method {
                bucket.methods.entry(method.as_bytes().into())
            } else {
                bucket.rest.push(number);
                continue;
            };
            place.or_default().push(number);
        }
        bucket
    }
}

type Named<V> = Vec<(Box<str>, V)>;
type ByValue = HashMap<Box<[u8]>, Vec<u32>>;

/// The value under a name, made when it is not there.
fn under<'v, V: Default>(named: &'v mut Named<V>, name: &str) -> &'v mut V {
    let place = match named.iter().position(|(known, _)| **known == *name) {
        Some(place) => place,
        None => {
            named.push((name.into(), V::default()));
            named.len() - 1
        }
    };
    &mut named[place].1
}
