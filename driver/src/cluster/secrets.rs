//! Keeps Secrets as they should be: read by name, and written only where something of ours
//! differs, against the version that was read.
//!
//! Of a Secret the driver owns its data and its type, the labels and annotations that the class
//! asks for, its own annotations, and the owners that it adds; everything else is left as it is.
//! What a Secret says about itself decides, so that drivers on many nodes agree without talking:
//! which class made it, and what the order of its content is. Newer content replaces older, never
//! the other way round, and equal content is never written.
//!
//! # Which content is newer
//!
//! The order of a content is the resource version of the SecretProviderClassPodStatus that was
//! written when a volume got that content. All nodes write pod statuses to the same API server,
//! and so their resource versions are one order that no clock has a part in. The Secret carries
//! the order of its content ([`ORDER`]); the higher one wins. A content that was fetched before
//! another and whose pod status was written after it counts as the newer one, until the next
//! refresh of its volume.
//!
//! A refresh that finds its content unchanged keeps its order and writes nothing, unless the
//! Secret has other content of a higher order: the store may have gone back to an earlier value,
//! and the node that saw the later one may have missed that. Such a refresh writes the pod status
//! once, so that the content has an order of the moment at which it was fetched last.
//!
//! A volume that an earlier driver mounted has no order until a refresh gives it one, and replaces
//! no content whose order is known.
//!
//! Where the order on the Secret is missing or cannot be believed, the moments since when the
//! volumes have held their contents decide instead ([`SINCE`]), by the nodes' clocks:
//!
//! - on a Secret that an earlier driver wrote. It gets an order with its next content, or at once
//!   when its content is that of the volume;
//! - on a Secret that was restored into another cluster: its order is not below its own resource
//!   version, although its pod status must have been written before it;
//! - where resource versions are not numbers.

mod decision;
mod digest;
mod missing;
mod owners;
mod refusal;
mod replace;

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use kube::{
    api::{GetParams, Patch, PatchParams, PostParams},
    core::Request,
};
use serde::de::IgnoredAny;

use super::{Cluster, request::Failure};
use crate::{
    error::{Error, Result},
    record::Class,
    secret::Secret,
};
use decision::{Change, Decision, Existing, Holder, Object, decide};
pub use digest::Digest;
pub(in crate::cluster) use missing::Missing;
use missing::Step;
use owners::{MANAGER, without_owner};
pub use owners::{Owner, PodOwners};
pub use refusal::Refusal;

/// On every Secret that the driver keeps, as on those of the existing driver.
pub const MANAGED: &str = "secrets-store.csi.k8s.io/managed";
/// On a Secret of somebody else's: the driver may have it.
pub const ADOPT: &str = "secrets-store.csi.k8s.io/adopt";
/// Which class made the content: its name and its UID.
pub const CLASS: &str = "secrets-store.csi.k8s.io/class";
/// See [`CLASS`].
pub const CLASS_UID: &str = "secrets-store.csi.k8s.io/class-uid";
/// Since when the volume that the content was taken from has held it.
pub const SINCE: &str = "secrets-store.csi.k8s.io/content-since";
/// The order of the content among the contents of all volumes; see the module.
pub const ORDER: &str = "secrets-store.csi.k8s.io/content-order";
/// The type that a new Secret in this one's place should have had, and that was refused.
pub const REFUSED_TYPE: &str = "secrets-store.csi.k8s.io/refused-type";
/// How often a write is tried against others who write the same Secret.
const ATTEMPTS: usize = 5;

/// All of a Secret's data, or what it is told by.
#[derive(Clone, Copy)]
pub enum Data<'a> {
    /// The values, by key.
    Values(&'a BTreeMap<String, Secret>),
    /// The digest of the values, which must not be empty. It is enough to look, and not to write.
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
pub struct Wanted<'a> {
    /// Where it is.
    pub namespace: &'a str,
    /// Its name, which must be one.
    pub name: &'a str,
    /// Its type.
    pub type_: &'a str,
    /// Labels that the class asks for.
    pub labels: &'a BTreeMap<String, String>,
    /// Annotations that the class asks for.
    pub annotations: &'a BTreeMap<String, String>,
    /// All of its data.
    pub data: Data<'a>,
    /// The class that asks for it.
    pub class: &'a Class,
    /// Since when the volume has held this content.
    pub since: Timestamp,
    /// The order of this content, where it is known.
    pub order: Option<u64>,
    /// Who needs it, at least one. It goes when the last of all its owners is gone.
    pub owners: &'a [Owner],
    /// Whether it is created where it is not there.
    pub create: bool,
}

/// What became of a Secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// It was as it should be, or newer by the clocks.
    Unchanged,
    /// It was left as it is: it has other content of this order, which is higher.
    Overtaken {
        /// See [`ORDER`].
        order: u64,
    },
    /// It is not there, and was not to be created.
    Absent,
    /// It was not there.
    Created,
    /// Something of ours was not as it should be.
    Updated,
    /// Its type had to change, which only a new Secret can.
    Recreated,
}

impl Cluster {
    /// Looks whether a Secret is as it should be, at what the API server has at hand, which may
    /// be a moment old. None when something is to be written.
    ///
    /// # Errors
    /// When it is not and that is not for the driver to change, or the API server does not answer.
    pub async fn secret_is_kept(&self, wanted: &Wanted<'_>) -> Result<Option<Kept>, Refusal> {
        if self.missing.find(&wanted.key()).is_some() {
            return Ok(None);
        }
        let Some(existing) = self.secret(wanted, &GetParams::any()).await? else {
            return Ok(None);
        };
        match decide(&existing, wanted, false) {
            Decision::Nothing => Ok(Some(Kept::Unchanged)),
            Decision::Overtaken { order } => Ok(Some(Kept::Overtaken { order })),
            Decision::Unmanaged => Err(Refusal::Unmanaged),
            Decision::OtherClass(holder) if self.holds(wanted, &holder).await? => {
                Err(Refusal::OtherClass(holder.name))
            }
            Decision::OtherClass(_)
            | Decision::Write(_)
            | Decision::Content
            | Decision::Replace => Ok(None),
        }
    }

    /// Makes a Secret as it should be. All of its values must be there.
    ///
    /// # Errors
    /// When the Secret is not the driver's, or the API server does not take it.
    pub async fn keep_secret(&self, wanted: &Wanted<'_>) -> Result<Kept, Refusal> {
        for _ in 0..ATTEMPTS {
            let missing = self.missing.find(&wanted.key());
            let former = match missing {
                Some((step @ (Step::Deleting | Step::Making), _)) => return Err(step.refusal()),
                Some((Step::Failed(_), former)) => Some(former),
                None => None,
            };
            let Some(existing) = self.secret(wanted, &GetParams::default()).await? else {
                if let Some(former) = &former {
                    match self.make_again(wanted, former).await? {
                        Some(kept) => return Ok(kept),
                        None => continue,
                    }
                }
                if !wanted.create {
                    return Ok(Kept::Absent);
                }
                let object = wanted.object(None)?;
                match self.create_new(wanted.namespace, object).await {
                    Ok(()) => return Ok(Kept::Created),
                    // Somebody was faster.
                    Err(Failure::Refused { code: 409, .. }) => continue,
                    Err(failure) => return Err(failure.into()),
                }
            };
            if existing.metadata.deletion_timestamp.is_some() {
                return Err(Refusal::Failed(Error::unavailable(
                    "it is being deleted; it is made again when it is gone",
                )));
            }
            if let Some(former) = &former {
                // Somebody else was faster.
                let taken = match existing.with_foreign_of(former) {
                    Some(change) => self.patch(wanted.namespace, wanted.name, change).await?,
                    None => true,
                };
                if taken {
                    self.missing.is_there(&wanted.key());
                }
                continue;
            }
            let existing = Arc::new(existing);
            let mut decision = decide(&existing, wanted, false);
            if let Decision::OtherClass(holder) = &decision {
                if self.holds(wanted, holder).await? {
                    return Err(Refusal::OtherClass(holder.name.clone()));
                }
                decision = decide(&existing, wanted, true);
            }
            let written = match decision {
                Decision::Nothing => return Ok(Kept::Unchanged),
                Decision::Overtaken { order } => return Ok(Kept::Overtaken { order }),
                Decision::Unmanaged => return Err(Refusal::Unmanaged),
                // Decided above.
                Decision::OtherClass(holder) => return Err(Refusal::OtherClass(holder.name)),
                Decision::Write(change) => {
                    let patched = self.patch(wanted.namespace, wanted.name, change).await?;
                    patched.then_some(Kept::Updated)
                }
                Decision::Content => return Err(without_values()),
                Decision::Replace => self.replace(wanted, &existing).await?,
            };
            // None: changed or gone since it was read.
            if let Some(kept) = written {
                return Ok(kept);
            }
        }
        Err(Refusal::Failed(Error::unavailable(
            "it kept changing; trying again later",
        )))
    }

    /// Lets a Secret of the driver's go on without an owner that the driver has put there, if
    /// others are left to keep it. Returns whether anything was written.
    ///
    /// # Errors
    /// When the API server does not take it.
    pub async fn disown_secret(
        &self,
        namespace: &str,
        name: &str,
        owner: &str,
    ) -> Result<bool, Refusal> {
        let Some(existing) = self
            .existing(namespace, name, &GetParams::default())
            .await?
        else {
            return Ok(false);
        };
        match without_owner(&existing, owner) {
            Some(change) => self.patch(namespace, name, change).await,
            None => Ok(false),
        }
    }

    /// Says that a class no longer makes a Secret, so that another may. Content and owners stay:
    /// running pods may still use them, and it goes with the last of its owners.
    ///
    /// # Errors
    /// When the API server does not take it.
    pub async fn release_secret(
        &self,
        namespace: &str,
        name: &str,
        class: &Class,
    ) -> Result<bool, Refusal> {
        let Some(existing) = self
            .existing(namespace, name, &GetParams::default())
            .await?
        else {
            return Ok(false);
        };
        // A class that was made anew under its name is the same class.
        let is_of = existing.annotation(CLASS_UID) == Some(&class.uid)
            || existing.annotation(CLASS) == Some(&class.name);
        if !existing.is_managed() || !is_of {
            return Ok(false);
        }
        let mut change = Change::of(&existing);
        for ours in [CLASS, CLASS_UID, SINCE, ORDER] {
            change.metadata.annotations.insert(ours, None);
        }
        self.patch(namespace, name, change).await
    }

    async fn secret(
        &self,
        wanted: &Wanted<'_>,
        how: &GetParams,
    ) -> Result<Option<Existing>, Refusal> {
        self.existing(wanted.namespace, wanted.name, how).await
    }

    async fn existing(
        &self,
        namespace: &str,
        name: &str,
        how: &GetParams,
    ) -> Result<Option<Existing>, Refusal> {
        let request = Request::new(path(namespace)).get(name, how);
        match self.ask::<Existing>(request).await {
            // A proxy that answers in the API server's place knows no Secret.
            Ok(existing) if !existing.is_named(name) => Err(Failure::WrongObject.into()),
            Ok(existing) => Ok(Some(existing)),
            Err(Failure::Refused { code: 404, .. }) => Ok(None),
            Err(failure) => Err(failure.into()),
        }
    }

    /// Changes a Secret as it was read. False: it has changed or gone since.
    async fn patch(
        &self,
        namespace: &str,
        name: &str,
        change: Change<'_>,
    ) -> Result<bool, Refusal> {
        let how = PatchParams {
            field_manager: Some(MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let request = Request::new(path(namespace)).patch(name, &how, &Patch::Merge(change));
        match self.ask::<IgnoredAny>(request).await {
            Ok(_) => Ok(true),
            Err(Failure::Refused {
                code: 404 | 409, ..
            }) => Ok(false),
            Err(failure) => Err(failure.into()),
        }
    }

    /// Makes the Secret, with its owners.
    async fn create_new(&self, namespace: &str, object: Object<'_>) -> Result<(), Failure> {
        let body =
            serde_json::to_vec(&object).map_err(|error| Failure::NoAnswer(error.to_string()))?;
        let how = PostParams {
            field_manager: Some(MANAGER.to_owned()),
            ..PostParams::default()
        };
        let request = Request::new(path(namespace)).create(&how, body);
        self.ask::<IgnoredAny>(request).await.map(|_| ())
    }

    /// Whether the class that a Secret names still makes it, whichever UID it has now.
    async fn holds(&self, wanted: &Wanted<'_>, holder: &Holder) -> Result<bool, Refusal> {
        let makes = self
            .class_makes(wanted.namespace, &holder.name, wanted.name)
            .await;
        makes.map_err(Refusal::Failed)
    }
}

/// A caller has asked for something to be written without having the values.
fn without_values() -> Refusal {
    Refusal::Failed(Error::internal(
        "a bug in the driver: the values of the Secret are not at hand",
    ))
}

fn path(namespace: &str) -> String {
    format!("/api/v1/namespaces/{namespace}/secrets")
}

#[cfg(test)]
mod tests;
