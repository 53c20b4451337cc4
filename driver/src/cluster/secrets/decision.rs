//! What has to be done about a Secret, by what it says about itself.

use std::collections::BTreeMap;

use base64::{Engine as _, display::Base64Display, engine::general_purpose::STANDARD};
use jiff::{Timestamp, ToSpan as _};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::core::ObjectMeta;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, Visitor},
};

use super::{
    ADOPT, CLASS, CLASS_UID, Data, MANAGED, ORDER, Owner, REFUSED_TYPE, Refusal, SINCE, Wanted,
    digest::Digest, owners::owners, without_values,
};
use crate::secret::Secret;

/// The keys of the labels that the class asked for, so that they can go when it no longer does.
pub(super) const LABELS: &str = "secrets-store.csi.k8s.io/class-labels";
/// The same for annotations.
pub(super) const ANNOTATIONS: &str = "secrets-store.csi.k8s.io/class-annotations";

/// A node whose clock is further ahead does not keep others from writing.
const CLOCKS_DIFFER: i64 = 300;

/// A Secret as the API server has it. It has no `Debug`.
#[derive(Deserialize)]
pub(super) struct Existing {
    pub(super) metadata: ObjectMeta,
    #[serde(rename = "type", default)]
    type_: String,
    #[serde(default)]
    data: BTreeMap<String, Decoded>,
    #[serde(default)]
    immutable: Option<bool>,
}

pub(super) struct Decoded(Secret);

impl<'de> Deserialize<'de> for Decoded {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Base64;

        impl Visitor<'_> for Base64 {
            type Value = Decoded;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("base64")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Decoded, E> {
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
pub(super) struct Encoded<'a>(&'a Secret);

impl Serialize for Encoded<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&Base64Display::new(self.0.expose(), &STANDARD))
    }
}

impl Existing {
    pub(super) fn annotation(&self, key: &str) -> Option<&String> {
        self.metadata.annotations.as_ref()?.get(key)
    }

    fn label(&self, key: &str) -> Option<&String> {
        self.metadata.labels.as_ref()?.get(key)
    }

    pub(super) fn owners(&self) -> &[OwnerReference] {
        self.metadata.owner_references.as_deref().unwrap_or(&[])
    }

    /// Returns whether this is the object of a name.
    pub(super) fn is_named(&self, name: &str) -> bool {
        self.metadata.name.as_deref() == Some(name)
    }

    /// Whether it is one that a driver keeps.
    pub(super) fn is_managed(&self) -> bool {
        self.label(MANAGED).is_some_and(|value| value == "true")
            || self.annotation(CLASS_UID).is_some()
    }

    /// Labels and annotations that are neither the driver's nor the class's.
    fn foreign(&self) -> [Vec<(&String, &String)>; 2] {
        let listed = |list: &str| {
            let keys = self.annotation(list).map_or("", String::as_str);
            keys.split(',').collect::<Vec<_>>()
        };
        let ours = [listed(LABELS), listed(ANNOTATIONS)];
        let all = [&self.metadata.labels, &self.metadata.annotations];
        let is_foreign = |key: &String, ours: &[&str]| {
            !ours.contains(&key.as_str()) && key != MANAGED && !is_reserved(key)
        };
        let of = |at: usize| {
            let all = all[at].iter().flatten();
            all.filter(|(key, _)| is_foreign(key, &ours[at])).collect()
        };
        [of(0), of(1)]
    }

    /// The change that gives this Secret what others had put on one that it has taken the place
    /// of. None when there is nothing to change, or this Secret is not the driver's.
    pub(super) fn with_foreign_of<'a>(&'a self, former: &'a Self) -> Option<Change<'a>> {
        let mut change = Change::of(self);
        let [labels, annotations] = former.foreign();
        let labels = labels.into_iter();
        let labels = labels.filter(|(key, _)| self.label(key).is_none());
        let annotations = annotations.into_iter();
        let annotations = annotations.filter(|(key, _)| self.annotation(key).is_none());
        let set = |(key, value): (&'a String, &String)| (key.as_str(), Some(value.clone()));
        change.metadata.labels.extend(labels.map(set));
        change.metadata.annotations.extend(annotations.map(set));
        (self.is_managed() && !change.is_empty()).then_some(change)
    }

    /// This Secret as it is to be put back, with a note of the type that it could not get.
    pub(super) fn object<'a>(&'a self, wanted: &Wanted<'a>, refused: &str) -> Object<'a> {
        let mut annotations = self.metadata.annotations.clone().unwrap_or_default();
        annotations.insert(REFUSED_TYPE.to_owned(), refused.to_owned());
        let data = self.data.iter();
        Object {
            api_version: "v1",
            kind: "Secret",
            metadata: ObjectMeta {
                name: Some(wanted.name.to_owned()),
                namespace: Some(wanted.namespace.to_owned()),
                labels: self.metadata.labels.clone(),
                annotations: Some(annotations),
                owner_references: self.metadata.owner_references.clone(),
                ..ObjectMeta::default()
            },
            type_: &self.type_,
            data: data
                .map(|(key, value)| (key.as_str(), Encoded(&value.0)))
                .collect(),
            immutable: self.immutable,
        }
    }

    fn has(&self, data: &Data<'_>) -> bool {
        match data {
            Data::Values(data) => {
                let has = |(key, value): (&String, &Secret)| {
                    self.data.get(key).is_some_and(|there| there.0 == *value)
                };
                self.data.len() == data.len() && data.iter().all(has)
            }
            Data::Digest(digest) => {
                let parts = self.data.iter();
                let parts = parts.flat_map(|(key, value)| [key.as_bytes(), value.0.expose()]);
                Digest::of(parts) == *digest
            }
        }
    }
}

/// A merge patch: what is absent stays, what is null goes.
#[derive(Serialize)]
pub(super) struct Change<'a> {
    pub(super) metadata: ChangedMeta<'a>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    data: BTreeMap<&'a str, Option<Encoded<'a>>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ChangedMeta<'a> {
    uid: Option<&'a str>,
    resource_version: Option<&'a str>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    labels: BTreeMap<&'a str, Option<String>>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) annotations: BTreeMap<&'a str, Option<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) owner_references: Option<Vec<OwnerReference>>,
}

impl<'a> Change<'a> {
    /// No change yet. It applies only to what was read.
    pub(super) fn of(existing: &'a Existing) -> Self {
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

    /// Sets an annotation that has another value.
    fn set(&mut self, existing: &Existing, key: &'a str, value: &str) {
        if existing.annotation(key).map(String::as_str) != Some(value) {
            let annotations = &mut self.metadata.annotations;
            annotations.insert(key, Some(value.to_owned()));
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
pub(super) struct Holder {
    pub(super) name: String,
    pub(super) uid: String,
}

/// What has to be done.
pub(super) enum Decision<'a> {
    /// Nothing: it is as it should be, or newer by the clocks.
    Nothing,
    /// Nothing: it has other content whose order is higher, or known where the wanted one's is not.
    Overtaken { order: u64 },
    /// Nothing, because it is somebody else's.
    Unmanaged,
    /// Nothing, if that class still makes it.
    OtherClass(Holder),
    /// This change.
    Write(Change<'a>),
    /// A change of the content, for which the values would have to be at hand.
    Content,
    /// A new Secret in its place.
    Replace,
}

/// The decision, by what the Secret says about itself. `released`: the class that it names does
/// not make it any more.
pub(super) fn decide<'a>(
    existing: &'a Existing,
    wanted: &Wanted<'a>,
    released: bool,
) -> Decision<'a> {
    let holder = existing.annotation(CLASS_UID).map(|uid| Holder {
        name: existing.annotation(CLASS).cloned().unwrap_or_default(),
        uid: uid.clone(),
    });
    let may_be_had = existing.annotation(ADOPT).is_some_and(|yes| yes == "true");
    if !existing.is_managed() && !may_be_had {
        return Decision::Unmanaged;
    }
    let equal = existing.type_ == wanted.type_ && existing.has(&wanted.data);
    let mut change = Change::of(existing);
    change.metadata.owner_references = owners(existing, wanted.owners);
    // A class that was made anew under its name is the same class.
    let other = holder.as_ref().is_some_and(|holder| {
        !released && holder.uid != wanted.class.uid && holder.name != wanted.class.name
    });
    if other && !equal {
        return Decision::OtherClass(holder.unwrap_or(Holder {
            name: String::new(),
            uid: String::new(),
        }));
    }
    let mut overtaken = None;
    if !other {
        // Whatever came out of a volume, nothing never takes the place of something.
        let is_empty = matches!(wanted.data, Data::Values(data) if data.is_empty());
        let nothing = is_empty && !existing.data.is_empty();
        let newer_there = !released && is_newer(existing, wanted);
        let replace_content = !equal && !newer_there && !nothing;
        overtaken = order(existing).filter(|_| !equal && newer_there);
        if replace_content && existing.type_ != wanted.type_ {
            return Decision::Replace;
        }
        wanted.change_metadata(existing, &mut change);
        if replace_content {
            match wanted.data {
                Data::Values(data) => change_data(data, existing, &mut change),
                Data::Digest(_) => return Decision::Content,
            }
        }
        let unsigned = existing.annotation(ORDER).is_none() && wanted.order.is_some();
        if replace_content || holder.is_none() || released || equal && unsigned {
            wanted.change_origin(existing, &mut change);
        } else if holder.is_some_and(|holder| holder.uid != wanted.class.uid) {
            change.set(existing, CLASS_UID, &wanted.class.uid);
            change.set(existing, CLASS, &wanted.class.name);
        }
        if existing.annotation(REFUSED_TYPE).is_some_and(|_| equal) {
            change.metadata.annotations.insert(REFUSED_TYPE, None);
        }
    }
    match (change.is_empty(), overtaken) {
        (true, Some(order)) => Decision::Overtaken { order },
        (true, None) => Decision::Nothing,
        (false, _) => Decision::Write(change),
    }
}

/// Whether the content of a Secret is newer than the one that is wanted. See the module above.
fn is_newer(existing: &Existing, wanted: &Wanted<'_>) -> bool {
    if let Some(there) = order(existing) {
        // What has no order yet gets one with the next refresh of its volume.
        return wanted.order.is_none_or(|ours| there > ours);
    }
    let latest = Timestamp::now().saturating_add(CLOCKS_DIFFER.seconds());
    let since = existing.annotation(SINCE);
    let since = since.and_then(|text| text.parse::<Timestamp>().ok());
    since.is_some_and(|since| since > wanted.since && latest.is_ok_and(|latest| since <= latest))
}

/// The order that a Secret says its content has, if it can be believed: the pod status was written
/// before the Secret, so that its resource version is the lower one, unless the Secret was written
/// in another cluster.
fn order(existing: &Existing) -> Option<u64> {
    let order: u64 = existing.annotation(ORDER)?.parse().ok()?;
    let written = existing.metadata.resource_version.as_ref();
    let written = written.and_then(|version| version.parse::<u64>().ok());
    written
        .is_none_or(|written| order < written)
        .then_some(order)
}

impl<'a> Wanted<'a> {
    /// Its namespace and name.
    pub(super) fn key(&self) -> (String, String) {
        (self.namespace.to_owned(), self.name.to_owned())
    }

    /// Where the content comes from. Nothing: an annotation that must not be there.
    fn origin(&self) -> [(&'static str, Option<String>); 4] {
        [
            (CLASS, Some(self.class.name.clone())),
            (CLASS_UID, Some(self.class.uid.clone())),
            (SINCE, Some(self.since.to_string())),
            (ORDER, self.order.map(|order| order.to_string())),
        ]
    }

    fn change_origin(&self, existing: &'a Existing, change: &mut Change<'a>) {
        for (key, value) in self.origin() {
            if existing.annotation(key) != value.as_ref() {
                change.metadata.annotations.insert(key, value);
            }
        }
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

    /// The whole Secret, with what others had put on an earlier one.
    ///
    /// # Errors
    /// When its values are not at hand.
    pub(super) fn object(&self, earlier: Option<&Existing>) -> Result<Object<'a>, Refusal> {
        let Data::Values(data) = self.data else {
            return Err(without_values());
        };
        let mut labels = BTreeMap::new();
        let mut annotations = BTreeMap::new();
        let mut owner_references: Vec<_> = self.owners.iter().map(Owner::reference).collect();
        if let Some(earlier) = earlier {
            let [their_labels, their_annotations] = earlier.foreign();
            let owned = |(key, value): (&String, &String)| (key.clone(), value.clone());
            labels.extend(their_labels.into_iter().map(owned));
            annotations.extend(their_annotations.into_iter().map(owned));
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
        let ours = self.origin().into_iter();
        annotations.extend(ours.filter_map(|(key, value)| Some((key.to_owned(), value?))));
        for (key, map) in [(LABELS, self.labels), (ANNOTATIONS, self.annotations)] {
            annotations.extend(Self::keys(map).map(|keys| (key.to_owned(), keys)));
        }
        Ok(Object {
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
            data: data
                .iter()
                .map(|(key, value)| (key.as_str(), Encoded(value)))
                .collect(),
            immutable: None,
        })
    }
}

fn change_data<'a>(
    data: &'a BTreeMap<String, Secret>,
    existing: &'a Existing,
    change: &mut Change<'a>,
) {
    for key in existing.data.keys() {
        if !data.contains_key(key) {
            change.data.insert(key, None);
        }
    }
    for (key, value) in data {
        if existing.data.get(key).is_none_or(|there| there.0 != *value) {
            change.data.insert(key, Some(Encoded(value)));
        }
    }
}

/// Annotations that are the driver's to set.
fn is_reserved(key: &str) -> bool {
    [
        CLASS,
        CLASS_UID,
        SINCE,
        ORDER,
        REFUSED_TYPE,
        LABELS,
        ANNOTATIONS,
    ]
    .contains(&key)
}

/// A Secret to be created.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Object<'a> {
    api_version: &'static str,
    kind: &'static str,
    metadata: ObjectMeta,
    #[serde(rename = "type")]
    type_: &'a str,
    data: BTreeMap<&'a str, Encoded<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    immutable: Option<bool>,
}
