//! Who a Secret lives with: owner references of the driver's, and of everybody else.
//!
//! The driver takes away only what it has put there itself. Which owner references those are, the
//! API server keeps in `metadata.managedFields`: they are the ones that the driver's field manager
//! has. An owner that somebody else has put on a Secret stays, also when it is the very Job or
//! ReplicaSet that the driver would have put there. Where the API server no longer knows who put
//! an owner there, it stays: it goes with the object that it names.

use std::collections::BTreeSet;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use serde_json::Value;

use super::decision::{Change, Existing};

/// Whose fields the driver's are. The existing driver has the same name, from its user agent.
pub(super) const MANAGER: &str = "csi-secrets-store";

/// An object that a Secret lives with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// Group and version.
    pub api_version: String,
    /// Kind.
    pub kind: String,
    /// Name.
    pub name: String,
    /// What it is told by: a later object of that name is another.
    pub uid: String,
}

impl Owner {
    pub(super) fn reference(&self) -> OwnerReference {
        OwnerReference {
            api_version: self.api_version.clone(),
            kind: self.kind.clone(),
            name: self.name.clone(),
            uid: self.uid.clone(),
            ..OwnerReference::default()
        }
    }
}

/// The owners that a Secret should have, if they are not those it has: all that it has and ours,
/// but for those of ours whose name another object has now.
pub(super) fn owners(existing: &Existing, ours: &[Owner]) -> Option<Vec<OwnerReference>> {
    let group = |api_version: &str| {
        api_version
            .split_once('/')
            .map(|(group, _)| group.to_owned())
    };
    let put_by_us = put_by_us(existing);
    let is_earlier = |there: &OwnerReference| {
        put_by_us.contains(&there.uid)
            && ours.iter().any(|owner| {
                owner.uid != there.uid
                    && owner.kind == there.kind
                    && owner.name == there.name
                    && group(&owner.api_version) == group(&there.api_version)
            })
            && !ours.iter().any(|owner| owner.uid == there.uid)
    };
    let there = existing.owners();
    let mut wanted: Vec<_> = there.iter().filter(|o| !is_earlier(o)).cloned().collect();
    for owner in ours {
        if wanted.iter().all(|there| there.uid != owner.uid) {
            wanted.push(owner.reference());
        }
    }
    (wanted != there).then_some(wanted)
}

/// Takes one owner away that the driver has put on a Secret of its own, unless it is the last.
pub(super) fn without_owner<'a>(existing: &'a Existing, owner: &str) -> Option<Change<'a>> {
    if !existing.is_managed() || !put_by_us(existing).contains(owner) {
        return None;
    }
    let there = existing.owners();
    let rest: Vec<_> = there.iter().filter(|o| o.uid != owner).cloned().collect();
    if rest.is_empty() || rest.len() == there.len() {
        return None;
    }
    let mut change = Change::of(existing);
    change.metadata.owner_references = Some(rest);
    Some(change)
}

/// The UIDs of the owners that the driver has put on a Secret: those that the driver's field
/// manager has, and no other has as well.
fn put_by_us(existing: &Existing) -> BTreeSet<String> {
    let managers = existing.metadata.managed_fields.iter().flatten();
    let mut ours = BTreeSet::new();
    let mut theirs = BTreeSet::new();
    for entry in managers {
        let fields = entry.fields_v1.as_ref().map(|fields| &fields.0);
        let owners = fields.and_then(|fields| fields.get("f:metadata")?.get("f:ownerReferences"));
        let keys = owners.and_then(Value::as_object).into_iter().flatten();
        let uids = keys.filter_map(|(key, _)| uid_in(key));
        match entry.manager.as_deref() == Some(MANAGER) {
            true => ours.extend(uids),
            false => theirs.extend(uids),
        }
    }
    &ours - &theirs
}

/// The UID in a key of `managedFields`: `k:{"uid":"..."}`.
fn uid_in(key: &str) -> Option<String> {
    let identity: Value = serde_json::from_str(key.strip_prefix("k:")?).ok()?;
    Some(identity.get("uid")?.as_str()?.to_owned())
}
