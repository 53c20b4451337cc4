//! Keeps Secrets as they should be: read by name, and written only where something of ours
//! differs, against the version that was read.
//!
//! Of a Secret the driver owns its data and its type, the labels and annotations that the class
//! asks for, its own annotations, and the owners that it adds; everything else is left as it is.
//! What a Secret says about itself decides, so that drivers on many nodes agree without talking:
//! which class made it, and since when its content is what it is. Newer content replaces older,
//! never the other way round, and equal content is never written.

use std::collections::BTreeMap;

use base64::{display::Base64Display, engine::general_purpose::STANDARD};
use jiff::{Timestamp, ToSpan as _};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{
    api::{DeleteParams, GetParams, Patch, PatchParams, PostParams, Preconditions},
    core::{ObjectMeta, Request},
};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, DeserializeOwned, IgnoredAny, Visitor},
};

use super::{Cluster, Failure, limited};
use crate::{
    error::{Error, Result},
    secret::Secret,
    volume::record::Class,
};

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
/// The keys of the labels that the class asked for, so that they can go when it no longer does.
const LABELS: &str = "secrets-store.csi.k8s.io/class-labels";
/// The same for annotations.
const ANNOTATIONS: &str = "secrets-store.csi.k8s.io/class-annotations";

/// How often a write is tried against others who write the same Secret.
const ATTEMPTS: usize = 5;
/// A node whose clock is further ahead does not keep others from writing.
const CLOCKS_DIFFER: i64 = 300;

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
        limited(client.request(request)).await
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

/// A Secret as the API server has it. It has no `Debug`.
#[derive(Deserialize)]
struct Existing {
    metadata: ObjectMeta,
    #[serde(rename = "type", default)]
    type_: String,
    #[serde(default)]
    data: BTreeMap<String, Decoded>,
}

struct Decoded(Secret);

impl<'de> Deserialize<'de> for Decoded {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Base64;

        impl Visitor<'_> for Base64 {
            type Value = Decoded;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("base64")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Decoded, E> {
                use base64::Engine as _;
                let decoded = STANDARD.decode(text).map_err(|_| E::custom("not base64"))?;
                Ok(Decoded(decoded.into()))
            }

            fn visit_unit<E: de::Error>(self) -> Result<Decoded, E> {
                Ok(Decoded(Secret::default()))
            }
        }
        deserializer.deserialize_any(Base64)
    }
}

/// A value on its way to the API server, encoded without another copy.
struct Encoded<'a>(&'a Secret);

impl Serialize for Encoded<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&Base64Display::new(self.0.expose(), &STANDARD))
    }
}

impl Existing {
    fn annotation(&self, key: &str) -> Option<&String> {
        self.metadata.annotations.as_ref()?.get(key)
    }

    fn label(&self, key: &str) -> Option<&String> {
        self.metadata.labels.as_ref()?.get(key)
    }

    fn owners(&self) -> &[OwnerReference] {
        self.metadata.owner_references.as_deref().unwrap_or(&[])
    }

    fn has(&self, data: &BTreeMap<String, Secret>) -> bool {
        self.data.len() == data.len()
            && data
                .iter()
                .all(|(key, value)| self.data.get(key).is_some_and(|there| there.0 == *value))
    }
}

/// A merge patch: what is absent stays, what is null goes.
#[derive(Serialize)]
struct Change<'a> {
    metadata: ChangedMeta<'a>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    data: BTreeMap<&'a str, Option<Encoded<'a>>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ChangedMeta<'a> {
    uid: Option<&'a str>,
    resource_version: Option<&'a str>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    labels: BTreeMap<&'a str, Option<String>>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<&'a str, Option<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    owner_references: Option<Vec<OwnerReference>>,
}

impl<'a> Change<'a> {
    /// No change yet. It applies only to what was read.
    fn of(existing: &'a Existing) -> Self {
        Self {
            metadata: ChangedMeta {
                uid: existing.metadata.uid.as_deref(),
                resource_version: existing.metadata.resource_version.as_deref(),
                labels: BTreeMap::new(),
                annotations: BTreeMap::new(),
                owner_references: None,
            },
            data: BTreeMap::new(),
        }
    }

    fn is_empty(&self) -> bool {
        self.metadata.labels.is_empty()
            && self.metadata.annotations.is_empty()
            && self.metadata.owner_references.is_none()
            && self.data.is_empty()
    }
}

/// The class that a Secret says it is of.
#[derive(Debug, PartialEq, Eq)]
struct Holder {
    name: String,
    uid: String,
}

/// What has to be done.
enum Decision<'a> {
    /// Nothing: it is as it should be, or newer.
    Nothing,
    /// Nothing, because it is somebody else's.
    Unmanaged,
    /// Nothing, if that class still makes it.
    OtherClass(Holder),
    /// This change.
    Write(Change<'a>),
    /// A new Secret in its place.
    Replace,
}

/// The decision, by what the Secret says about itself. `released`: the class that it names does
/// not make it any more.
fn decide<'a>(existing: &'a Existing, wanted: &Wanted<'a>, released: bool) -> Decision<'a> {
    let is_yes = |value: Option<&String>| value.is_some_and(|value| value == "true");
    let holder = existing.annotation(CLASS_UID).map(|uid| Holder {
        name: existing.annotation(CLASS).cloned().unwrap_or_default(),
        uid: uid.clone(),
    });
    let managed = is_yes(existing.label(MANAGED)) || holder.is_some();
    if !managed && !is_yes(existing.annotation(ADOPT)) {
        return Decision::Unmanaged;
    }
    let equal = existing.type_ == wanted.type_ && existing.has(wanted.data);
    let mut change = Change::of(existing);
    change.metadata.owner_references = owners(existing, wanted.owners);
    // A class that was made anew under its name is the same class to those who look at names.
    let other = holder.as_ref().is_some_and(|holder| {
        !released && holder.uid != wanted.class.uid && holder.name != wanted.class.name
    });
    if other && !equal {
        return Decision::OtherClass(holder.unwrap_or(Holder {
            name: String::new(),
            uid: String::new(),
        }));
    }
    if !other {
        let latest = Timestamp::now().saturating_add(CLOCKS_DIFFER.seconds());
        let since = existing
            .annotation(SINCE)
            .and_then(|text| text.parse::<Timestamp>().ok());
        let newer_there = since.is_some_and(|since| {
            !released && since > wanted.since && latest.is_ok_and(|latest| since <= latest)
        });
        let replace_content = !equal && !newer_there;
        if replace_content && existing.type_ != wanted.type_ {
            return Decision::Replace;
        }
        wanted.change_metadata(existing, &mut change);
        if replace_content {
            wanted.change_data(existing, &mut change);
        }
        if replace_content || holder.is_none() || released {
            for (key, value) in wanted.origin() {
                if existing.annotation(key) != Some(&value) {
                    change.metadata.annotations.insert(key, Some(value));
                }
            }
        }
    }
    if change.is_empty() {
        Decision::Nothing
    } else {
        Decision::Write(change)
    }
}

/// The owners that a Secret should have, if they are not those it has: all that it has, but for
/// earlier objects of the name of one of ours, and ours.
fn owners(existing: &Existing, ours: &[Owner]) -> Option<Vec<OwnerReference>> {
    let group = |api_version: &str| {
        api_version
            .split_once('/')
            .map(|(group, _)| group.to_owned())
    };
    let is_earlier = |there: &OwnerReference| {
        ours.iter().any(|owner| {
            owner.uid != there.uid
                && owner.kind == there.kind
                && owner.name == there.name
                && group(&owner.api_version) == group(&there.api_version)
        }) && !ours.iter().any(|owner| owner.uid == there.uid)
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

/// Takes one owner away, unless it is the last.
fn without_owner<'a>(existing: &'a Existing, owner: &str) -> Option<Change<'a>> {
    let there = existing.owners();
    let rest: Vec<_> = there.iter().filter(|o| o.uid != owner).cloned().collect();
    if rest.is_empty() || rest.len() == there.len() {
        return None;
    }
    let mut change = Change::of(existing);
    change.metadata.owner_references = Some(rest);
    Some(change)
}

impl Owner {
    fn reference(&self) -> OwnerReference {
        OwnerReference {
            api_version: self.api_version.clone(),
            kind: self.kind.clone(),
            name: self.name.clone(),
            uid: self.uid.clone(),
            ..OwnerReference::default()
        }
    }
}

impl<'a> Wanted<'a> {
    /// Where the content comes from.
    fn origin(&self) -> [(&'static str, String); 3] {
        [
            (CLASS, self.class.name.clone()),
            (CLASS_UID, self.class.uid.clone()),
            (SINCE, self.since.to_string()),
        ]
    }

    /// The keys of what the class asks for, as an annotation's value.
    fn keys(map: &BTreeMap<String, String>) -> Option<String> {
        let keys: Vec<&str> = map.keys().map(String::as_str).collect();
        (!keys.is_empty()).then(|| keys.join(","))
    }

    /// Labels and annotations: set what is asked for, take away what no longer is.
    fn change_metadata(&self, existing: &'a Existing, change: &mut Change<'a>) {
        let set = |there: Option<&String>, value: &str| there.map(String::as_str) != Some(value);
        let earlier = |key: &str| {
            existing
                .annotation(key)
                .map_or("", String::as_str)
                .split(',')
        };
        let (labels, annotations) = (
            &mut change.metadata.labels,
            &mut change.metadata.annotations,
        );
        for key in earlier(LABELS) {
            if existing.label(key).is_some() && !self.labels.contains_key(key) && key != MANAGED {
                labels.insert(key, None);
            }
        }
        for key in earlier(ANNOTATIONS) {
            if existing.annotation(key).is_some() && !self.annotations.contains_key(key) {
                annotations.insert(key, None);
            }
        }
        for (key, value) in self.labels {
            if key != MANAGED && set(existing.label(key), value) {
                labels.insert(key, Some(value.clone()));
            }
        }
        if set(existing.label(MANAGED), "true") {
            labels.insert(MANAGED, Some("true".to_owned()));
        }
        for (key, value) in self.annotations {
            if !is_reserved(key) && set(existing.annotation(key), value) {
                annotations.insert(key, Some(value.clone()));
            }
        }
        for (key, map) in [(LABELS, self.labels), (ANNOTATIONS, self.annotations)] {
            let keys = Self::keys(map);
            if existing.annotation(key) != keys.as_ref() {
                annotations.insert(key, keys);
            }
        }
    }

    fn change_data(&self, existing: &'a Existing, change: &mut Change<'a>) {
        for key in existing.data.keys() {
            if !self.data.contains_key(key) {
                change.data.insert(key, None);
            }
        }
        for (key, value) in self.data {
            if existing.data.get(key).is_none_or(|there| there.0 != *value) {
                change.data.insert(key, Some(Encoded(value)));
            }
        }
    }

    /// The whole Secret, with what others had put on an earlier one.
    fn object(&self, earlier: Option<&Existing>) -> Object<'a> {
        let mut labels = BTreeMap::new();
        let mut annotations = BTreeMap::new();
        let mut owner_references: Vec<_> = self.owners.iter().map(Owner::reference).collect();
        if let Some(earlier) = earlier {
            let of_class = |key: &str, list: &str| {
                let listed = earlier.annotation(list).map_or("", String::as_str);
                listed.split(',').any(|listed| listed == key)
            };
            let foreign = earlier.metadata.labels.iter().flatten();
            labels.extend(
                foreign
                    .filter(|(key, _)| !of_class(key, LABELS))
                    .map(|(key, value)| (key.clone(), value.clone())),
            );
            let foreign = earlier.metadata.annotations.iter().flatten();
            annotations.extend(
                foreign
                    .filter(|(key, _)| !of_class(key, ANNOTATIONS) && !is_reserved(key))
                    .map(|(key, value)| (key.clone(), value.clone())),
            );
            if let Some(all) = owners(earlier, self.owners) {
                owner_references = all;
            } else {
                owner_references = earlier.owners().to_vec();
            }
        }
        labels.extend(self.labels.clone());
        labels.insert(MANAGED.to_owned(), "true".to_owned());
        let asked_for = self.annotations.iter().filter(|(key, _)| !is_reserved(key));
        annotations.extend(asked_for.map(|(key, value)| (key.clone(), value.clone())));
        let ours = self.origin().map(|(key, value)| (key.to_owned(), value));
        annotations.extend(ours);
        for (key, map) in [(LABELS, self.labels), (ANNOTATIONS, self.annotations)] {
            annotations.extend(Self::keys(map).map(|keys| (key.to_owned(), keys)));
        }
        Object {
            api_version: "v1",
            kind: "Secret",
            metadata: ObjectMeta {
                name: Some(self.name.to_owned()),
                namespace: Some(self.namespace.to_owned()),
                labels: Some(labels),
                annotations: Some(annotations),
                owner_references: Some(owner_references),
                ..ObjectMeta::default()
            },
            type_: self.type_,
            data: self
                .data
                .iter()
                .map(|(key, value)| (key.as_str(), Encoded(value)))
                .collect(),
        }
    }

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

/// Annotations that are the driver's to set.
fn is_reserved(key: &str) -> bool {
    [CLASS, CLASS_UID, SINCE, LABELS, ANNOTATIONS].contains(&key)
}

/// A Secret to be created.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Object<'a> {
    api_version: &'static str,
    kind: &'static str,
    metadata: ObjectMeta,
    #[serde(rename = "type")]
    type_: &'a str,
    data: BTreeMap<&'a str, Encoded<'a>>,
}

#[cfg(test)]
mod tests;
