//! Names by some other key.

use std::collections::{BTreeSet, HashMap};

use super::Name;

/// Names by key; a key without names is not kept.
#[derive(Debug)]
pub(crate) struct Index<K>(HashMap<K, BTreeSet<Name>>);

impl<K> Default for Index<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: std::hash::Hash + Eq> Index<K> {
    pub(super) fn insert(&mut self, key: K, name: &Name) {
        self.0.entry(key).or_default().insert(name.clone());
    }

    pub(super) fn remove(&mut self, key: &K, name: &Name) {
        if let Some(names) = self.0.get_mut(key) {
            names.remove(name);
            if names.is_empty() {
                self.0.remove(key);
            }
        }
    }

    /// Names at `key`, in order.
    pub(crate) fn get(&self, key: &K) -> impl Iterator<Item = &Name> {
        self.0.get(key).into_iter().flatten()
    }

    pub(crate) fn contains(&self, key: &K) -> bool {
        self.0.contains_key(key)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &BTreeSet<Name>)> {
        self.0.iter()
    }
}
