//! Keeps Secrets as classes ask for them. Each is read by name, and written only where the driver's
//! part of it differs, against the version that was read.
//!
//! The driver's part of a Secret is its data and type, the labels and annotations that the class
//! asks for, the driver's own annotations, and the owners that it adds. Everything else stays as it
//! is. Drivers on many nodes agree without talking to each other, because each decides from what the
//! Secret says about itself: which class made it, and the order of its content. Newer content
//! replaces older, never the other way round, and equal content is never written.
//!
//! # Which content is newer
//!
//! The order of a content is the resource version of the SecretProviderClassPodStatus that was
//! written when a volume got that content. All nodes write pod statuses to the same API server, so
//! their resource versions are one order that depends on no clock. The Secret carries the order of
//! its content ([`ORDER`]); the higher one wins. If a content was fetched before another, but its pod
//! status was written after the other's, it counts as the newer one until the next refresh of its
//! volume.
//!
//! A refresh that finds its content unchanged keeps the order and writes nothing, unless the Secret
//! has other content of a higher order: the store may have gone back to an earlier value, and the
//! node that saw the later value may have missed that. Such a refresh writes the pod status once, so
//! that the content has the order of the moment at which it was fetched last.
//!
//! The class decides, too: an edit changes type, keys, labels and annotations of a Secret. A node that has not read
//! the edit yet must not undo it, however new its content is. So the Secret says with which generation of its
//! class it was written ([`GENERATION`]). A node that would change it and knows an earlier one, or a class
//! of the same name with another UID, reads the class from the API server's store first. If it finds another state
//! than it knows, it leaves the Secret until it has computed it with that one.
//!
//! A volume that an earlier driver mounted has no order until a refresh gives it one, and replaces
//! no content whose order is known.
//!
//! If the order on the Secret is missing or cannot be true, the times since when the volumes have
//! held their contents decide ([`SINCE`]), by the nodes' clocks:
//!
//! - on a Secret that an earlier driver wrote. It gets an order with its next content, or at once if
//!   its content is that of the volume;
//! - on a Secret that was restored into another cluster: its order is not below its own resource
//!   version, although its pod status must have been written before it. If the API server says that somebody
//!   other than the driver has written that order, the volume's content counts as newer;
//! - where resource versions are not numbers.

mod decision;
mod digest;
mod error;
mod missing;
mod object;
mod owners;
mod refusal;
mod replace;

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use kube::{
    api::{GetParams, Patch, PatchParams, PostParams},
    core::Request,
};
use tonic::Code;

use super::{Cluster, Freshness, Wanted, request::Failure};
use crate::{record::ClassState, secret::Secret};
#[cfg(any(test, fuzzing))]
pub(crate) use decision::fuzz;
use decision::{Decision, NamedClass, decide};
pub use digest::Digest;
pub use error::{ErrorType, SyncError};
pub(in crate::cluster) use missing::Missing;
use missing::Replacing;
use object::{Existing, MergePatch, NewSecret};
use owners::{MANAGER, without_owner};
pub use owners::{Owner, PodOwners};
use refusal::Subject;

/// The label of every Secret that the driver keeps, as in the existing driver.
pub const MANAGED: &str = "secrets-store.csi.k8s.io/managed";
/// The annotation with which a user lets the driver adopt a Secret that it has not made.
pub const ADOPT: &str = "secrets-store.csi.k8s.io/adopt";
/// The annotation with the name of the class that made the content.
pub const CLASS: &str = "secrets-store.csi.k8s.io/class";
/// The annotation with the UID of that class.
pub const CLASS_UID: &str = "secrets-store.csi.k8s.io/class-uid";
/// The annotation with the generation of that class with which the content was made.
pub const GENERATION: &str = "secrets-store.csi.k8s.io/class-generation";
/// The annotation with the time since when a volume has held the content.
pub const SINCE: &str = "secrets-store.csi.k8s.io/content-since";
/// The annotation with the order of the content; see the documentation of the module.
pub const ORDER: &str = "secrets-store.csi.k8s.io/content-order";
/// The annotation with the type that was refused for a new Secret in this one's place.
pub const REFUSED_TYPE: &str = "secrets-store.csi.k8s.io/refused-type";
/// The annotation that lists the labels that the class asked for, so that they can be removed when
/// it no longer does.
const LABELS: &str = "secrets-store.csi.k8s.io/class-labels";
/// The annotation that lists the annotations that the class asked for.
const ANNOTATIONS: &str = "secrets-store.csi.k8s.io/class-annotations";

/// The number of attempts to write a Secret that others write at the same time.
const ATTEMPTS: usize = 5;

/// The data of a Secret, or its digest.
#[derive(Clone, Copy)]
pub enum Data<'a> {
    /// The values, by key.
    Values(&'a BTreeMap<String, Secret>),
    /// The digest of the values, of which there is at least one. It is enough for a check, and not
    /// for writing.
    Digest(Digest),
}

impl Data<'_> {
    /// Returns the digest of some values.
    pub fn digest(values: &BTreeMap<String, Secret>) -> Digest {
        let parts = values.iter();
        Digest::of(parts.flat_map(|(key, value)| [key.as_bytes(), value.expose()]))
    }
}

/// A Secret as it should be.
#[derive(Clone, Copy)]
pub struct DesiredSecret<'a> {
    /// The namespace.
    pub namespace: &'a str,
    /// The name, which has been checked to be one.
    pub name: &'a str,
    /// The type.
    pub type_: &'a str,
    /// The labels that the class asks for.
    pub labels: &'a BTreeMap<String, String>,
    /// The annotations that the class asks for.
    pub annotations: &'a BTreeMap<String, String>,
    /// The whole data.
    pub data: Data<'a>,
    /// The class that asks for it.
    pub class: &'a ClassState,
    /// The time since when a volume has held this content.
    pub since: Timestamp,
    /// The order of this content, if it is known.
    pub order: Option<u64>,
    /// The owners that this node's pods give it, at least one.
    pub owners: &'a [Owner],
}

/// The action for a Secret that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IfAbsent {
    /// It is created.
    Create,
    /// It is left to other nodes.
    Leave,
}

/// The result of a reconciliation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reconciled {
    /// The Secret was as desired, or its content is newer by the clocks.
    Unchanged,
    /// The Secret was left as it is, because it has other content of a higher order.
    Overtaken {
        /// The order of that content; see [`ORDER`].
        order: u64,
    },
    /// The Secret does not exist, and was left to other nodes.
    Absent,
    /// The Secret did not exist and was created.
    Created,
    /// The driver's part of the Secret differed and was written.
    Updated,
    /// The type of the Secret had to change, so it was replaced by a new one.
    Recreated,
}

impl Cluster {
    /// Checks whether a Secret is as desired, in the API server's cache, which may be a moment old.
    /// Returns `None` if something is to be written.
    ///
    /// # Errors
    /// Fails if the Secret differs and is not the driver's to change, or the API server does not answer.
    pub async fn check_secret(
        &self,
        desired: &DesiredSecret<'_>,
    ) -> Result<Option<Reconciled>, SyncError> {
        if self.missing.find(&desired.key()).is_some() {
            return Ok(None);
        }
        let (namespace, name) = (desired.namespace, desired.name);
        let existing = self.existing(namespace, name, &GetParams::any()).await?;
        let Some(existing) = existing else {
            return Ok(None);
        };
        match decide(&existing, desired, NamedClass::MayBeLater) {
            Decision::Unchanged => Ok(Some(Reconciled::Unchanged)),
            Decision::Overtaken { order } => Ok(Some(Reconciled::Overtaken { order })),
            Decision::Unmanaged => Err(unmanaged(desired)),
            Decision::Immutable => Err(SyncError::immutable(namespace, name)),
            Decision::OtherClass(other) if self.makes(desired, &other).await? => {
                Err(conflict(&other))
            }
            Decision::OtherClass(_)
            | Decision::OtherState
            | Decision::Write(_)
            | Decision::WriteData
            | Decision::Replace => Ok(None),
        }
    }

    /// Writes whatever of a Secret is not as desired. Its data must be values.
    ///
    /// # Errors
    /// Fails if the Secret is not the driver's, or the API server refuses it or does not answer.
    pub async fn reconcile_secret(
        &self,
        desired: &DesiredSecret<'_>,
        if_absent: IfAbsent,
    ) -> Result<Reconciled, SyncError> {
        let (namespace, name) = (desired.namespace, desired.name);
        for _ in 0..ATTEMPTS {
            let former = match self.missing.find(&desired.key()) {
                Some((step @ (Replacing::Deleting | Replacing::Creating), _)) => {
                    return Err(step.error(namespace, desired.type_));
                }
                Some((Replacing::Failed(_), former)) => Some(former),
                None => None,
            };
            let how = GetParams::default();
            let existing = self.existing(namespace, name, &how).await?;
            // `None`: it was changed, created or deleted by another client since it was read.
            let reconciled = match (existing, former) {
                (None, Some(former)) => self.recreate(desired, &former).await?,
                (None, None) => self.create_secret(desired, if_absent).await?,
                (Some(existing), _) if existing.metadata.deletion_timestamp.is_some() => {
                    return Err(SyncError::unavailable(
                        "it is being deleted; it is made again when it is gone",
                    ));
                }
                (Some(existing), Some(former)) => {
                    let complete = match existing.with_foreign_of(&former) {
                        Some(change) => self.patch(namespace, name, change).await?.is_some(),
                        None => true,
                    };
                    if complete {
                        self.missing.remove(&desired.key());
                    }
                    None
                }
                (Some(existing), None) => self.update_secret(desired, existing).await?,
            };
            if let Some(reconciled) = reconciled {
                return Ok(reconciled);
            }
        }
        Err(SyncError::unavailable(
            "it kept changing; trying again later",
        ))
    }

    /// Creates a Secret, with its owners. Returns `None` if another client has created it.
    async fn create_secret(
        &self,
        desired: &DesiredSecret<'_>,
        if_absent: IfAbsent,
    ) -> Result<Option<Reconciled>, SyncError> {
        if if_absent == IfAbsent::Leave {
            return Ok(Some(Reconciled::Absent));
        }
        let secret: NewSecret<'_> = desired.object(None)?;
        let body =
            serde_json::to_vec(&secret).map_err(|error| Failure::NoAnswer(error.to_string()))?;
        let how = PostParams {
            field_manager: Some(MANAGER.to_owned()),
            ..PostParams::default()
        };
        let request = Request::new(path(desired.namespace)).create(&how, body);
        match self.ask::<Existing>(request).await {
            Ok(stored) if stored.type_ != desired.type_ => {
                Err(self.note_type(desired.type_, &stored).await)
            }
            Ok(stored) => as_written(desired, &stored).map(|()| Some(Reconciled::Created)),
            Err(Failure::Refused { code: 409, .. }) => Ok(None),
            Err(failure) => {
                let subject = Subject {
                    namespace: desired.namespace,
                    name: desired.name,
                    values: secret.values().collect(),
                };
                Err(SyncError::refused(failure, Some(&subject)))
            }
        }
    }

    /// Writes whatever differs in an existing Secret. Returns `None` if it has changed or gone since
    /// it was read.
    async fn update_secret(
        &self,
        desired: &DesiredSecret<'_>,
        existing: Existing,
    ) -> Result<Option<Reconciled>, SyncError> {
        let existing = Arc::new(existing);
        let mut decision = decide(&existing, desired, NamedClass::MayBeLater);
        if matches!(decision, Decision::OtherState) {
            if !self.is_present(desired).await? {
                return Err(later_state());
            }
            decision = decide(&existing, desired, NamedClass::IsPresent);
        }
        if let Decision::OtherClass(other) = &decision {
            if self.makes(desired, other).await? {
                return Err(conflict(other));
            }
            decision = decide(&existing, desired, NamedClass::HasReleasedIt);
        }
        match decision {
            Decision::Unchanged => Ok(Some(Reconciled::Unchanged)),
            Decision::Overtaken { order } => Ok(Some(Reconciled::Overtaken { order })),
            Decision::Unmanaged => Err(unmanaged(desired)),
            Decision::Immutable => Err(SyncError::immutable(desired.namespace, desired.name)),
            // Decided above.
            Decision::OtherClass(other) => Err(conflict(&other)),
            Decision::OtherState => Err(later_state()),
            Decision::Write(change) => {
                let patched = self.patch(desired.namespace, desired.name, change).await?;
                patched
                    .map(|stored| as_written(desired, &stored).map(|()| Reconciled::Updated))
                    .transpose()
            }
            Decision::WriteData => Err(without_values()),
            Decision::Replace => self.replace(desired, &existing).await,
        }
    }

    /// Removes an owner that the driver has added to a Secret of its own, if the Secret has other
    /// owners.
    ///
    /// # Errors
    /// Fails if the API server refuses the change or does not answer.
    pub async fn remove_owner(
        &self,
        namespace: &str,
        name: &str,
        owner: &str,
    ) -> Result<(), SyncError> {
        let existing = self
            .existing(namespace, name, &GetParams::default())
            .await?;
        if let Some(change) = existing.as_ref().and_then(|e| without_owner(e, owner)) {
            self.patch(namespace, name, change).await?;
        }
        Ok(())
    }

    /// Notes on a Secret that a class no longer makes it, so that another class may. Content and
    /// owners stay, because running pods may still use them; the Secret goes with the last of its
    /// owners.
    ///
    /// # Errors
    /// Fails if the API server refuses the change or does not answer.
    pub async fn release_secret(
        &self,
        namespace: &str,
        name: &str,
        class: &ClassState,
    ) -> Result<(), SyncError> {
        let existing = self
            .existing(namespace, name, &GetParams::default())
            .await?;
        // A class that was deleted and created again under its name is the same class.
        let is_of_class = |existing: &Existing| {
            existing.annotation(CLASS_UID) == Some(&class.uid)
                || existing.annotation(CLASS) == Some(&class.name)
        };
        if let Some(existing) = existing.filter(|e| e.is_managed() && is_of_class(e)) {
            let mut change = MergePatch::of(&existing);
            for ours in [CLASS, CLASS_UID, GENERATION, SINCE, ORDER] {
                change.metadata.annotations.insert(ours, None);
            }
            self.patch(namespace, name, change).await?;
        }
        Ok(())
    }

    async fn existing(
        &self,
        namespace: &str,
        name: &str,
        how: &GetParams,
    ) -> Result<Option<Existing>, SyncError> {
        let request = Request::new(path(namespace)).get(name, how);
        match self.ask::<Existing>(request).await {
            // A proxy that answers in the API server's place knows no Secret.
            Ok(existing) if !existing.is_named(name) => Err(Failure::WrongObject.into()),
            Ok(existing) => Ok(Some(existing)),
            Err(Failure::Refused { code: 404, .. }) => Ok(None),
            Err(failure) => Err(failure.into()),
        }
    }

    /// Changes a Secret. Returns what is stored then, or nothing if it has changed or gone since it was read.
    async fn patch(
        &self,
        namespace: &str,
        name: &str,
        change: MergePatch<'_>,
    ) -> Result<Option<Existing>, SyncError> {
        let how = PatchParams {
            field_manager: Some(MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let request = Request::new(path(namespace)).patch(name, &how, &Patch::Merge(&change));
        match self.ask::<Existing>(request).await {
            Ok(stored) => Ok(Some(stored)),
            Err(Failure::Refused {
                code: 404 | 409, ..
            }) => Ok(None),
            Err(failure) => {
                let subject = Subject {
                    namespace,
                    name,
                    values: change.values().collect(),
                };
                Err(SyncError::refused(failure, Some(&subject)))
            }
        }
    }

    /// Notes on a Secret that a new one got another type than was asked for, so that no later check deletes it for
    /// that. Returns the error that the pods are told.
    async fn note_type(&self, asked: &str, stored: &Existing) -> SyncError {
        let metadata = &stored.metadata;
        let names = [&metadata.namespace, &metadata.name].map(|name| name.as_deref().unwrap_or(""));
        let mut change = MergePatch::of(stored);
        change.annotate(stored, REFUSED_TYPE, Some(asked.to_owned()));
        let noted = self.patch(names[0], names[1], change).await;
        // The type that is there is not repeated: a webhook may have put anything into it.
        let error = SyncError::type_stays(
            asked,
            format_args!(
                "the API server has given a new one another type. Does an admission webhook change Secrets in namespace {}?",
                names[0]
            ),
        );
        match noted {
            Ok(_) => error,
            Err(why) => error.and(format_args!("and it could not be annotated: {why}")),
        }
    }

    /// Returns whether the state of the class that asks for a Secret is the present one, by the API server's store.
    async fn is_present(&self, desired: &DesiredSecret<'_>) -> Result<bool, SyncError> {
        let wanted = Wanted {
            freshness: Freshness::Present,
            known: None,
            with_parameters: false,
        };
        let read = self.known_class(desired.namespace, &desired.class.name, &wanted);
        match read.await {
            Ok(class) => {
                let now = &class.identity;
                Ok(now.uid == desired.class.uid && now.generation == desired.class.generation)
            }
            Err(error) if error.code() == Code::NotFound => Ok(false),
            Err(error) => Err(SyncError::unavailable(error)),
        }
    }

    /// Returns whether the class of this name, whichever UID it has now, makes a Secret.
    async fn makes(&self, desired: &DesiredSecret<'_>, class: &str) -> Result<bool, SyncError> {
        let makes = self.class_makes(desired.namespace, class, desired.name);
        makes.await.map_err(SyncError::unavailable)
    }
}

fn unmanaged(desired: &DesiredSecret<'_>) -> SyncError {
    let (namespace, name) = (desired.namespace, desired.name);
    SyncError::new(
        ErrorType::Unmanaged,
        format!(
            "a Secret of this name exists that the driver did not make; it stays as it is. To hand it to the driver, which then replaces its data: kubectl annotate secret -n {namespace} {name} {ADOPT}=true"
        ),
    )
}

fn conflict(other: &str) -> SyncError {
    SyncError::new(
        ErrorType::Conflict,
        format!(
            "SecretProviderClass {other} makes other content of this Secret, and it is left as it is; give one of the two another secretName"
        ),
    )
}

/// Checks that what the API server has stored is what was written.
fn as_written(desired: &DesiredSecret<'_>, stored: &Existing) -> Result<(), SyncError> {
    match decide(stored, desired, NamedClass::IsPresent) {
        Decision::Unchanged | Decision::Overtaken { .. } => Ok(()),
        _ => Err(SyncError::new(
            ErrorType::Refused,
            format!(
                "the API server has not stored it as it was written. Does an admission webhook change Secrets in namespace {}? Their data, type, owners, and the labels and annotations that the driver sets have to stay",
                desired.namespace
            ),
        )),
    }
}

/// Makes the error of a Secret that a node has written which knows a later state of its class.
fn later_state() -> SyncError {
    let why = "another node has written it with a later state of the class, which is read now";
    SyncError::unavailable(why).awaited()
}

fn without_values() -> SyncError {
    SyncError::unavailable("a bug in the driver: the values of the Secret were not computed")
}

fn path(namespace: &str) -> String {
    format!("/api/v1/namespaces/{namespace}/secrets")
}

#[cfg(test)]
mod tests;
