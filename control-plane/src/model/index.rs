//! Names by some other key.

use std::collections::{BTreeSet, HashMap};

use super::Name;

/// Names by key; a key without names is not kept.
#[derive(Debug)]
pub(crate) struct Index<K>(HashMap<K, Names>);

/// Nearly every key has one name: a set of its own for each would be most of the model's memory.
#[derive(Debug)]
enum Names {
    One(Name),
    Many(BTreeSet<Name>),
}

impl Names {
    fn iter(&self) -> impl Iterator<Item = &Name> {
        let (one, many) = match self {
            Self::One(name) => (Some(name), None),
            Self::Many(names) => (None, Some(names)),
        };
        one.into_iter().chain(many.into_iter().flatten())
    }
}

impl<K> Default for Index<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: std::hash::Hash + Eq> Index<K> {
    pub(super) fn insert(&mut self, key: K, name: &Name) {
        match self.0.get_mut(&key) {
            None => {
                self.0.insert(key, Names::One(name.clone()));
            }
            Some(Names::One(one)) if one == name => {}
            Some(names @ Names::One(_)) => {
                let both = names.iter().chain([name]).cloned().collect();
                *names = Names::Many(both);
            }
            Some(Names::Many(names)) => {
                names.insert(name.clone());
            }
        }
    }

    pub(super) fn remove(&mut self, key: &K, name: &Name) {
        let empty = match self.0.get_mut(key) {
            None => return,
            Some(Names::One(one)) => one == name,
            Some(Names::Many(names)) => {
                names.remove(name);
                names.is_empty()
            }
        };
        if empty {
            self.0.remove(key);
        }
    }

    /// Names at `key`, in order.
    pub(crate) fn get(&self, key: &K) -> impl Iterator<Item = &Name> {
        self.0.get(key).into_iter().flat_map(Names::iter)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn contains(&self, key: &K) -> bool {
        self.0.contains_key(key)
    }

    /// Every key with its names, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, impl Iterator<Item = &Name>)> {
        self.0.iter().map(|(key, names)| (key, names.iter()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_in_order_and_go() {
        let name = |name: &str| Name::new("shop", name);
        let mut index = Index::default();
        for given in ["b", "c", "a", "a"] {
            index.insert(7, &name(given));
        }
        let all = |index: &Index<i32>| -> Vec<String> {
            index.get(&7).map(|name| name.name.clone()).collect()
        };
        assert_eq!(all(&index), ["a", "b", "c"]);
        index.remove(&7, &name("b"));
        index.remove(&7, &name("x"));
        assert_eq!(all(&index), ["a", "c"]);
        index.remove(&7, &name("a"));
        index.remove(&7, &name("c"));
        assert!(!index.contains(&7) && index.iter().next().is_none());
        index.insert(7, &name("b"));
        index.remove(&7, &name("a"));
        assert_eq!(all(&index), ["b"]);
        index.remove(&7, &name("b"));
        assert!(!index.contains(&7));
    }
}
