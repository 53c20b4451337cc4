//! Decides which objects own a Secret, that is, which owner references it has.
//!
//! A Secret is owned by the controllers of the pods that use it (ReplicaSets, Jobs and so on), and
//! by the pod status of a pod that has no controller; see [`Cluster::pod_owners`]. Kubernetes
//! deletes the Secret with the last of its owners.
//!
//! The driver adds owners, and removes those of a pod that has ended while others remain, if it has
//! added them itself. The API server records that in `metadata.managedFields`: they are the ones that
//! belong to the driver's field manager alone. Any other owner stays, also if it is the very Job or ReplicaSet that the driver would
//! have added, and so does an owner whose manager is unknown: it goes with the object that it names.
//! Owners of others that the driver has carried over to a new Secret count as its own.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ManagedFieldsEntry, OwnerReference};
use kube::{
    api::GetParams,
    core::{ObjectMeta, Request, Resource as _},
};
use serde::Deserialize;
use serde_json::Value;

use super::{
    super::resources::{API_VERSION, SecretProviderClassPodStatus},
    Cluster,
    object::{Existing, MergePatch},
};
use crate::{
    error::{Error, Result},
    record::Pod,
};

/// The driver's field manager. The existing driver has the same name, from its user agent.
pub(super) const MANAGER: &str = "csi-secrets-store";

/// An object that owns a Secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// The group and version of its kind.
    pub api_version: String,
    /// Its kind.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Its UID. A later object of the same name is another owner.
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

/// The owners that a pod gives its Secrets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodOwners {
    /// The pod's controllers, or its pod status if it has none.
    pub owners: Vec<Owner>,
    /// Whether the pod has ended or is being deleted, so that it needs no Secrets any more.
    pub pod_ended: bool,
    /// Whether the owners have ended with the pod: its pod status, or its Job.
    pub owners_ended: bool,
}

impl PodOwners {
    /// Returns all owners that several pods give their Secrets, each once.
    pub fn merged<'a>(pods: impl IntoIterator<Item = &'a Self>) -> Vec<Owner> {
        let owners = pods.into_iter().flat_map(|pod| &pod.owners);
        let by_uid: BTreeMap<&str, &Owner> =
            owners.map(|owner| (owner.uid.as_str(), owner)).collect();
        by_uid.into_values().cloned().collect()
    }
}

#[derive(Deserialize)]
struct Metadata {
    metadata: ObjectMeta,
}

impl Cluster {
    /// Finds the owners that a pod gives its Secrets. Returns `None` if the pod is gone, or if it
    /// has no controller and no pod status.
    ///
    /// # Errors
    /// Fails if the API server does not answer, or its answer says nothing about this pod.
    pub async fn pod_owners(&self, pod: &Pod, pod_status: &str) -> Result<Option<PodOwners>> {
        let failed =
            |error: Error| error.context(format_args!("failed to find the owners of pod {pod}"));
        let found = self.pod(pod).await.map_err(failed)?;
        // The mirror of a static pod has another UID, and nothing lives with it.
        let itself = found.filter(|found| found.metadata.uid.as_deref() == Some(&pod.uid));
        let Some(found) = itself else {
            return Ok(None);
        };
        let finished = matches!(found.status.phase.as_str(), "Succeeded" | "Failed");
        let controllers = found.metadata.owner_references.unwrap_or_default();
        let owners_ended = finished && controllers.iter().all(|owner| owner.kind == "Job");
        let mut owners: Vec<Owner> = controllers
            .into_iter()
            .map(|owner| Owner {
                api_version: owner.api_version,
                kind: owner.kind,
                name: owner.name,
                uid: owner.uid,
            })
            .collect();
        if owners.is_empty() {
            match self
                .pod_status_owner(pod, pod_status)
                .await
                .map_err(failed)?
            {
                Some(owner) => owners.push(owner),
                None => return Ok(None),
            }
        }
        Ok(Some(PodOwners {
            owners,
            pod_ended: finished || found.metadata.deletion_timestamp.is_some(),
            owners_ended,
        }))
    }

    /// Returns the pod status of a pod as an owner, if it exists and belongs to this very pod.
    async fn pod_status_owner(&self, pod: &Pod, name: &str) -> Result<Option<Owner>> {
        let statuses = SecretProviderClassPodStatus::url_path(&(), Some(&pod.namespace));
        let request = Request::new(statuses).get(name, &GetParams::default());
        let status: Metadata = match self.ask(request).await {
            Err(failure) if failure.is_not_found(name) => return Ok(None),
            Err(failure) => return Err(failure.into_error()),
            Ok(status) => status,
        };
        let mut pods = status.metadata.owner_references.iter().flatten();
        // Otherwise it belongs to an earlier pod of that name and is deleted soon, or to a later one.
        let is_of_pod = pods.any(|owner| owner.uid == pod.uid);
        Ok(is_of_pod.then(|| Owner {
            api_version: API_VERSION.to_owned(),
            kind: SecretProviderClassPodStatus::kind(&()).into_owned(),
            name: name.to_owned(),
            uid: status.metadata.uid.unwrap_or_default(),
        }))
    }
}

/// Returns the owner references that a Secret should have, if it lacks any of ours.
///
/// An owner of ours whose name another object has now stays: which of the two exists is known to the
/// garbage collector alone, which removes owners that do not. On the node of an earlier pod of the same
/// name, the owner that exists would be the one to look foreign.
pub(super) fn owners(existing: &Existing, ours: &[Owner]) -> Option<Vec<OwnerReference>> {
    let there = existing.owners();
    let missing = ours
        .iter()
        .filter(|owner| there.iter().all(|there| there.uid != owner.uid));
    let missing: Vec<_> = missing.map(Owner::reference).collect();
    (!missing.is_empty()).then(|| [there, &missing].concat())
}

/// Returns the owner references of a Secret and those that others have added to the former Secret in
/// its place, if the Secret lacks any of these.
pub(super) fn owners_with_foreign_of(
    existing: &Existing,
    former: &Existing,
) -> Option<Vec<OwnerReference>> {
    let added_by_us = added_by_us(former);
    let there = existing.owners();
    let is_lost = |owner: &&OwnerReference| {
        !added_by_us.contains(&owner.uid) && there.iter().all(|o| o.uid != owner.uid)
    };
    let has_controller = there.iter().any(|owner| owner.controller == Some(true));
    let lost = former.owners().iter().filter(is_lost);
    // The API server accepts one controller only.
    let lost = lost.map(|owner| OwnerReference {
        controller: owner.controller.filter(|_| !has_controller),
        ..owner.clone()
    });
    let lost: Vec<_> = lost.collect();
    (!lost.is_empty()).then(|| [there, &lost].concat())
}

/// Returns the change that removes an owner which the driver has added to a Secret of its own,
/// unless it is the last owner.
pub(super) fn without_owner<'a>(existing: &'a Existing, owner: &str) -> Option<MergePatch<'a>> {
    if !existing.is_managed() || !added_by_us(existing).contains(owner) {
        return None;
    }
    let there = existing.owners();
    let rest: Vec<_> = there.iter().filter(|o| o.uid != owner).cloned().collect();
    if rest.is_empty() || rest.len() == there.len() {
        return None;
    }
    let mut change = MergePatch::of(existing);
    change.metadata.owner_references = Some(rest);
    Some(change)
}

/// Returns the UIDs of the owners that the driver has added to a Secret: those that belong to its
/// field manager, and to no other.
fn added_by_us(existing: &Existing) -> BTreeSet<String> {
    let managers = existing.metadata.managed_fields.iter().flatten();
    let mut ours = BTreeSet::new();
    let mut theirs = BTreeSet::new();
    for entry in managers {
        let fields = entry.fields_v1.as_ref().map(|fields| &fields.0);
        let owners = fields.and_then(|fields| fields.get("f:metadata")?.get("f:ownerReferences"));
        let keys = owners.and_then(Value::as_object).into_iter().flatten();
        let uids = keys.filter_map(|(key, _)| uid_in(key));
        if entry.manager.as_deref() == Some(MANAGER) {
            ours.extend(uids);
        } else {
            theirs.extend(uids);
        }
    }
    &ours - &theirs
}

/// Returns whether somebody other than the driver has set an annotation to its present value, as far as the API
/// server has recorded that.
pub(super) fn is_set_by_others(existing: &Existing, annotation: &str) -> bool {
    let key = format!("f:{annotation}");
    let sets = |entry: &&ManagedFieldsEntry| {
        let fields = entry.fields_v1.as_ref().map(|fields| &fields.0);
        let annotations = fields.and_then(|fields| fields.get("f:metadata")?.get("f:annotations"));
        annotations.is_some_and(|annotations| annotations.get(&key).is_some())
    };
    let managers = existing.metadata.managed_fields.iter().flatten();
    let mut who = managers
        .filter(sets)
        .map(|entry| entry.manager.as_deref())
        .peekable();
    who.peek().is_some() && who.all(|manager| manager != Some(MANAGER))
}

/// Returns the UID in a key of `managedFields`: `k:{"uid":"..."}`.
fn uid_in(key: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Identity {
        uid: String,
    }

    let identity: Identity = serde_json::from_str(key.strip_prefix("k:")?).ok()?;
    Some(identity.uid)
}
