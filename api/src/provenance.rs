//! Which policy says what of a table, as people are shown it: the indices of
//! [`proto::Provenance`] looked up.

use serde::Serialize;

use crate::proto;

/// A field with the policy whose value is used, and those that it goes before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Field<'a> {
    pub field: &'a str,
    pub from: Option<Policy<'a>>,
    pub overridden: Vec<Policy<'a>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Policy<'a> {
    /// "Kind namespace/name".
    pub name: &'a str,
    /// What it was given for: "Service cart, port http".
    pub target: &'a str,
}

/// The fields that a policy says something of; what the message does not name is left out.
pub fn fields(given: Option<&proto::Provenance>) -> Vec<Field<'_>> {
    let Some(given) = given else {
        return Vec::new();
    };
    let policy = |index: u32| {
        let policy = given.policies.get(index as usize)?;
        Some(Policy {
            name: &policy.name,
            target: &policy.target,
        })
    };
    let fields = given.fields.iter().map(|field| Field {
        field: &field.field,
        from: policy(field.used),
        overridden: field
            .overridden
            .iter()
            .copied()
            .filter_map(policy)
            .collect(),
    });
    fields.collect()
}
