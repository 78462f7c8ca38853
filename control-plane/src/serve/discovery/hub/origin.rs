//! Which objects a table comes from, and which tables an object is in: what changes when it is not
//! there. So the answer needs no bookkeeping while tables are compiled, and holds for every kind.

use serde::Serialize;
use weft_api::proto::ResourceKey;

use super::status::hex;
use super::{Hub, State, Variants};
use crate::compile::{self, Inbound, Settings, compile, status_of};
use crate::model::{Change, Dirty, Name, Object, ObjectRef, World};
use crate::serve::discovery::{Key, Kind};

/// How far an object has come, among this control plane's proxies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Arrival {
    /// "Kind namespace/name".
    pub object: String,
    /// The control plane knows such an object.
    pub known: bool,
    /// `metadata.generation` of the object as it is known; absent when the source has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<i64>,
    /// The object says now what cannot be honoured; what it said before stands.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unreadable: Option<NotHonoured>,
    /// Why it is used for nothing that it names, if it is: sentences.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unused: Vec<String>,
    /// One for each proxy and table that would be another without the object.
    pub tables: Vec<Carried>,
}

/// Why an object as it is now is not in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NotHonoured {
    /// `metadata.generation` of what cannot be honoured.
    pub generation: i64,
    pub why: String,
}

/// A table that comes from an object, as one proxy has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Carried {
    /// "namespace/name" of the proxy's workload.
    pub workload: String,
    pub kind: &'static str,
    pub name: String,
    /// Hexadecimal.
    pub newest: String,
    /// Whether the proxy has acknowledged the newest.
    pub acknowledged: bool,
    /// Why it refused it, if it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

impl Hub {
    /// Which proxies' tables come from an object, and whether they have acknowledged them.
    pub fn arrival(&self, object: &ObjectRef) -> Arrival {
        let mut state = self.state();
        let keys = state.carrying(&self.settings, object);
        Arrival {
            object: object.to_string(),
            known: keys.is_some(),
            generation: state.world.generation(object),
            unreadable: state.world.unreadable(object).map(|given| NotHonoured {
                generation: given.generation,
                why: given.why.clone(),
            }),
            unused: unused(&state.world, object),
            tables: state.carried(&keys.unwrap_or_default()),
        }
    }

    /// What a workload's own proxy does with what comes to a port, and which of the proxies beside it
    /// that are connected here have been told so; `None` when there is no such workload.
    pub fn inbound(&self, workload: &Name, port: u16) -> Option<(Inbound, Vec<Carried>)> {
        let state = self.state();
        let inbound = compile::inbound(&state.world, &self.settings, workload, port)?;
        let own = Key::of(Kind::Workload, workload.to_string());
        Some((inbound, state.carried(&[own])))
    }

    /// The policies without which a table would be another one, of those that `may` be it, in
    /// order. The table is compiled once for each of them.
    pub fn policies_in(
        &self,
        key: &ResourceKey,
        may: impl Fn(&ObjectRef) -> bool,
    ) -> Vec<ObjectRef> {
        let mut state = self.state();
        let State { world, trust, .. } = &mut *state;
        let now = compile(world, &self.settings, key, trust, "").effect();
        let mut found = Vec::new();
        for policy in world.policies().into_iter().filter(may) {
            let without = state.without(&policy, |state, _| {
                compile(&state.world, &self.settings, key, &state.trust, "").effect()
            });
            if without.is_some_and(|without| without != now) {
                found.push(policy);
            }
        }
        found
    }
}

/// Why an object is accepted for none of what it names; nothing where it is for some.
fn unused(world: &World, object: &ObjectRef) -> Vec<String> {
    let Some(said) = status_of(world, object) else {
        return Vec::new();
    };
    let of_targets = said.parents.iter().flat_map(|parent| &parent.conditions);
    let accepted: Vec<_> = of_targets
        .chain(&said.conditions)
        .filter(|condition| condition.kind == "Accepted")
        .collect();
    if accepted.iter().any(|condition| condition.status) {
        return Vec::new();
    }
    let why = accepted.into_iter();
    why.map(|condition| condition.message.clone()).collect()
}

impl State {
    /// What `look` sees when an object is not there; it is given what the absence may change.
    /// `None` when the object is not there anyway.
    fn without<T>(
        &mut self,
        object: &ObjectRef,
        look: impl FnOnce(&Self, &Dirty) -> T,
    ) -> Option<T> {
        let there: Object = self.world.object(object)?;
        let generation = self.world.generation(object);
        let unreadable = self.world.unreadable(object).cloned();
        let mut dirty = Dirty::default();
        self.world.apply(Change::Remove(object.clone()), &mut dirty);
        let seen = look(self, &dirty);
        let mut ignored = Dirty::default();
        self.world.apply(Change::Set(Box::new(there)), &mut ignored);
        if let Some(generation) = generation {
            let object = object.clone();
            self.world
                .apply(Change::Generation { object, generation }, &mut ignored);
        }
        if let Some(unreadable) = unreadable {
            let change = Change::Unreadable {
                object: object.clone(),
                unreadable: Box::new(unreadable),
            };
            self.world.apply(change, &mut ignored);
        }
        Some(seen)
    }

    /// The tables somebody asked for that come from an object.
    fn carrying(&mut self, settings: &Settings, object: &ObjectRef) -> Option<Vec<Key>> {
        self.without(object, |state, dirty| {
            let mut keys = state.touched(dirty);
            keys.retain(|key| {
                let without = Variants::compile(&state.world, settings, key, &state.trust);
                let now = state.resources.get(key);
                now.is_some_and(|entry| {
                    entry.variants != without && entry.variants.effect() != without.effect()
                })
            });
            keys
        })
    }

    fn carried(&self, keys: &[Key]) -> Vec<Carried> {
        let mut tables = Vec::new();
        for key in keys {
            let Some(entry) = self.resources.get(key) else {
                continue;
            };
            for stream in entry
                .subscribers
                .iter()
                .filter_map(|id| self.streams.get(id))
            {
                let sent = stream.sent.get(key).cloned().unwrap_or_default();
                let newest = entry.variants.of(stream.audience(key)).version();
                tables.push(Carried {
                    workload: stream.proxy.workload.to_string(),
                    kind: key.kind_name(),
                    name: key.name.to_string(),
                    newest: hex(newest),
                    acknowledged: sent.acknowledged == newest,
                    refused: sent
                        .refused
                        .filter(|refused| refused.0 == newest)
                        .map(|refused| refused.1),
                });
            }
        }
        tables.sort_by(|a, b| (&a.workload, a.kind, &a.name).cmp(&(&b.workload, b.kind, &b.name)));
        tables
    }
}
