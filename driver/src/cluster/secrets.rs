//! Keeps Secrets as they should be: read by name, and written only where something of ours
//! differs, against the version that was read.
//!
//! Of a Secret the driver owns its data and its type, the labels and annotations that the class
//! asks for, its own annotations, and the owners that it adds; everything else is left as it is.
//! What a Secret says about itself decides, so that drivers on many nodes agree without talking:
//! which class made it, and since when its content is what it is. Newer content replaces older,
//! never the other way round, and equal content is never written.

mod decision;

use std::collections::BTreeMap;

use base64::{display::Base64Display, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use kube::{
    api::{DeleteParams, GetParams, Patch, PatchParams, PostParams, Preconditions},
    core::Request,
};
use serde::de::{DeserializeOwned, IgnoredAny};

use super::{Cluster, Failure, limited};
use crate::{
    error::{Error, Result},
    secret::Secret,
    volume::record::Class,
};
use decision::{Change, Decision, Existing, Holder, decide, without_owner};

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
/// How often a write is tried against others who write the same Secret.
const ATTEMPTS: usize = 5;
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
    pub data: &'a BTreeMap<String, Secret>,
    /// The class that asks for it.
    pub class: &'a Class,
    /// Since when the volume has held this content.
    pub since: Timestamp,
    /// Who needs it, at least one. It goes when the last of all its owners is gone.
    pub owners: &'a [Owner],
}

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

/// What became of a Secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// It was as it should be, or newer.
    Unchanged,
    /// It was not there.
    Created,
    /// Something of ours was not as it should be.
    Updated,
    /// Its type had to change, which only a new Secret can.
    Recreated,
}

/// Why a Secret is not as it should be.
#[derive(Debug, Clone)]
pub enum Refusal {
    /// It belongs to somebody else.
    Unmanaged,
    /// Another class, this one, makes something else of it.
    OtherClass(String),
    /// The driver may not do that.
    Forbidden(String),
    /// The API server does not take such a Secret.
    Invalid(String),
    /// It did not work, and may later.
    Failed(Error),
}

impl Cluster {
    /// Looks whether a Secret is as it should be, at what the API server has at hand, which may
    /// be a moment old.
    ///
    /// # Errors
    /// When it is not and that is not for the driver to change, or the API server does not answer.
    pub async fn secret_is_kept(&self, wanted: &Wanted<'_>) -> Result<bool, Refusal> {
        let Some(existing) = self.secret(wanted, &GetParams::any()).await? else {
            return Ok(false);
        };
        match decide(&existing, wanted, false) {
            Decision::Nothing => Ok(true),
            Decision::Unmanaged => Err(Refusal::Unmanaged),
            Decision::OtherClass(holder) if self.holds(wanted, &holder).await? => {
                Err(Refusal::OtherClass(holder.name))
            }
            Decision::OtherClass(_) | Decision::Write(_) | Decision::Replace => Ok(false),
        }
    }

    /// Makes a Secret as it should be.
    ///
    /// # Errors
    /// When the Secret is not the driver's, or the API server does not take it.
    pub async fn keep_secret(&self, wanted: &Wanted<'_>) -> Result<Kept, Refusal> {
        for _ in 0..ATTEMPTS {
            let Some(existing) = self.secret(wanted, &GetParams::default()).await? else {
                match self.create(wanted, None).await {
                    Ok(()) => return Ok(Kept::Created),
                    // Somebody was faster.
                    Err(Failure::Refused { code: 409, .. }) => continue,
                    Err(failure) => return Err(refused(wanted, failure)),
                }
            };
            if existing.metadata.deletion_timestamp.is_some() {
                return Err(Refusal::Failed(Error::unavailable(
                    "it is being deleted; it is made again when it is gone",
                )));
            }
            let mut decision = decide(&existing, wanted, false);
            if let Decision::OtherClass(holder) = &decision {
                if self.holds(wanted, holder).await? {
                    return Err(Refusal::OtherClass(holder.name.clone()));
                }
                decision = decide(&existing, wanted, true);
            }
            let written = match decision {
                Decision::Nothing => return Ok(Kept::Unchanged),
                Decision::Unmanaged => return Err(Refusal::Unmanaged),
                // Decided above.
                Decision::OtherClass(holder) => return Err(Refusal::OtherClass(holder.name)),
                Decision::Write(change) => {
                    let patch = Patch::Merge(change);
                    let request = Request::new(path(wanted.namespace)).patch(
                        wanted.name,
                        &PatchParams::default(),
                        &patch,
                    );
                    let patched = self.ask::<IgnoredAny>(request).await;
                    patched.map(|_| Kept::Updated)
                }
                Decision::Replace => self.replace(wanted, &existing).await,
            };
            match written {
                Ok(kept) => return Ok(kept),
                // Changed or gone since it was read.
                Err(Failure::Refused {
                    code: 404 | 409, ..
                }) => {}
                Err(failure) => return Err(refused(wanted, failure)),
            }
        }
        Err(Refusal::Failed(Error::unavailable(
            "it kept changing; trying again later",
        )))
    }

    /// Lets a Secret go on without an owner, if others are left to keep it. Returns whether
    /// anything was written.
    ///
    /// # Errors
    /// When the API server does not take it.
    pub async fn disown_secret(
        &self,
        namespace: &str,
        name: &str,
        owner: &str,
    ) -> Result<bool, Refusal> {
        let request = Request::new(path(namespace)).get(name, &GetParams::default());
        let existing = match self.ask::<Existing>(request).await {
            Ok(existing) => existing,
            Err(Failure::Refused { code: 404, .. }) => return Ok(false),
            Err(failure) => return Err(plainly_refused(failure)),
        };
        let Some(change) = without_owner(&existing, owner) else {
            return Ok(false);
        };
        let patch = Patch::Merge(change);
        let request = Request::new(path(namespace)).patch(name, &PatchParams::default(), &patch);
        match self.ask::<IgnoredAny>(request).await {
            Ok(_) => Ok(true),
            Err(Failure::Refused {
                code: 404 | 409, ..
            }) => Ok(false),
            Err(failure) => Err(plainly_refused(failure)),
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
        let request = Request::new(path(namespace)).get(name, &GetParams::default());
        let existing = match self.ask::<Existing>(request).await {
            Ok(existing) => existing,
            Err(Failure::Refused { code: 404, .. }) => return Ok(false),
            Err(failure) => return Err(plainly_refused(failure)),
        };
        if existing.annotation(CLASS_UID) != Some(&class.uid) {
            return Ok(false);
        }
        let mut change = Change::of(&existing);
        for ours in [CLASS, CLASS_UID, SINCE] {
            change.metadata.annotations.insert(ours, None);
        }
        let patch = Patch::Merge(change);
        let request = Request::new(path(namespace)).patch(name, &PatchParams::default(), &patch);
        match self.ask::<IgnoredAny>(request).await {
            Ok(_) => Ok(true),
            Err(failure) => Err(plainly_refused(failure)),
        }
    }

    async fn secret(
        &self,
        wanted: &Wanted<'_>,
        how: &GetParams,
    ) -> Result<Option<Existing>, Refusal> {
        let request = Request::new(path(wanted.namespace)).get(wanted.name, how);
        match self.ask(request).await {
            Ok(existing) => Ok(Some(existing)),
            Err(Failure::Refused { code: 404, .. }) => Ok(None),
            Err(failure) => Err(refused(wanted, failure)),
        }
    }

    /// Makes the Secret, with its owners, and with what others had put on an earlier one.
    async fn create(&self, wanted: &Wanted<'_>, earlier: Option<&Existing>) -> Result<(), Failure> {
        let body = serde_json::to_vec(&wanted.object(earlier))
            .map_err(|error| Failure::NoAnswer(error.to_string()))?;
        let request = Request::new(path(wanted.namespace)).create(&PostParams::default(), body);
        self.ask::<IgnoredAny>(request).await.map(|_| ())
    }

    async fn replace(&self, wanted: &Wanted<'_>, existing: &Existing) -> Result<Kept, Failure> {
        let only_this = DeleteParams {
            preconditions: Some(Preconditions {
                uid: existing.metadata.uid.clone(),
                resource_version: existing.metadata.resource_version.clone(),
            }),
            ..DeleteParams::default()
        };
        let request = Request::new(path(wanted.namespace)).delete(wanted.name, &only_this);
        self.ask::<IgnoredAny>(request).await?;
        self.create(wanted, Some(existing)).await?;
        Ok(Kept::Recreated)
    }

    /// Whether a class that a Secret names is there and still makes that Secret.
    async fn holds(&self, wanted: &Wanted<'_>, holder: &Holder) -> Result<bool, Refusal> {
        if holder.name == wanted.class.name {
            return Ok(false);
        }
        match self.remembered_class(wanted.namespace, &holder.name).await {
            Ok(class) => Ok(class.identity.uid == holder.uid
                && class
                    .secret_objects
                    .iter()
                    .any(|object| object.secret_name.trim() == wanted.name)),
            Err(error) if error.code() == tonic::Code::Unavailable => Err(Refusal::Failed(error)),
            // Gone, or not a class that could make anything.
            Err(_) => Ok(false),
        }
    }

    /// Sends a request and reads its answer.
    pub(super) async fn ask<T: DeserializeOwned>(
        &self,
        request: Result<http::Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<T, Failure> {
        let no_answer = |error: &dyn std::error::Error| Failure::NoAnswer(error.to_string());
        let request = request.map_err(|error| no_answer(&error))?;
        let client = self.client().await.map_err(|error| no_answer(&error))?;
        match *request.method() {
            http::Method::GET => self.read(client.request(request)).await,
            _ => limited(client.request(request)).await,
        }
    }
}

fn path(namespace: &str) -> String {
    format!("/api/v1/namespaces/{namespace}/secrets")
}

fn refused(wanted: &Wanted<'_>, failure: Failure) -> Refusal {
    match plainly_refused(failure) {
        Refusal::Invalid(message) => Refusal::Invalid(wanted.scrubbed(message)),
        Refusal::Forbidden(message) => Refusal::Forbidden(wanted.scrubbed(message)),
        Refusal::Failed(error) => {
            let message = wanted.scrubbed(error.to_string());
            Refusal::Failed(Error::new(error.code(), message))
        }
        other => other,
    }
}

fn plainly_refused(failure: Failure) -> Refusal {
    match failure {
        // A namespace that goes is no question of permissions.
        Failure::Refused { code: 403, message } if !message.contains("being terminated") => {
            Refusal::Forbidden(message)
        }
        Failure::Refused {
            code: 400 | 413 | 422,
            message,
        } => Refusal::Invalid(message),
        other => Refusal::Failed(other.into_error()),
    }
}

impl Wanted<'_> {
    /// A message of the API server's or of a webhook's, unless it quotes one of the values.
    fn scrubbed(&self, message: String) -> String {
        let quotes = |value: &Secret| {
            let value = value.expose().trim_ascii();
            let text = std::str::from_utf8(value).unwrap_or_default();
            let encoded = Secret::from(Base64Display::new(value, &STANDARD).to_string());
            let encoded = std::str::from_utf8(encoded.expose()).unwrap_or_default();
            let start = encoded.trim_end_matches('=');
            text.len() > 2 && message.contains(text) || start.len() > 3 && message.contains(start)
        };
        if self.data.values().any(quotes) {
            return "the API server refused it with a message that quotes the content".to_owned();
        }
        message
    }
}

#[cfg(test)]
mod tests;
