//! Defines Secrets as they go over the wire: an existing one, a change of one, and a new one.

use std::collections::BTreeMap;

use base64::{Engine as _, display::Base64Display, engine::general_purpose::STANDARD};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::core::ObjectMeta;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, Visitor},
};

use super::{
    ANNOTATIONS, CLASS, CLASS_UID, Data, Digest, GENERATION, LABELS, MANAGED, ORDER, REFUSED_TYPE,
    SINCE,
};
use crate::secret::Secret;

/// A Secret that the API server has. It has no `Debug`, because it holds secret values.
#[derive(Deserialize)]
pub(super) struct Existing {
    pub(super) metadata: ObjectMeta,
    #[serde(rename = "type", default)]
    pub(super) type_: String,
    #[serde(default)]
    pub(super) data: BTreeMap<String, Decoded>,
    #[serde(default)]
    immutable: Option<bool>,
}

/// A value that arrived as base64.
pub(super) struct Decoded(pub(super) Secret);

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

/// A value that is encoded as base64 while it is written, without a further copy.
pub(super) struct Encoded<'a>(pub(super) &'a Secret);

impl Serialize for Encoded<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&Base64Display::new(self.0.expose(), &STANDARD))
    }
}

impl Existing {
    pub(super) fn annotation(&self, key: &str) -> Option<&String> {
        self.metadata.annotations.as_ref()?.get(key)
    }

    pub(super) fn label(&self, key: &str) -> Option<&String> {
        self.metadata.labels.as_ref()?.get(key)
    }

    pub(super) fn owners(&self) -> &[OwnerReference] {
        self.metadata.owner_references.as_deref().unwrap_or(&[])
    }

    /// Returns whether this is the object of a name.
    pub(super) fn is_named(&self, name: &str) -> bool {
        self.metadata.name.as_deref() == Some(name)
    }

    /// Returns whether a driver, this one or an earlier one, has written it.
    pub(super) fn is_managed(&self) -> bool {
        self.label(MANAGED).is_some_and(|value| value == "true")
            || self.annotation(CLASS_UID).is_some()
    }

    /// Returns whether its data can never be changed.
    pub(super) fn is_immutable(&self) -> bool {
        self.immutable == Some(true)
    }

    /// Returns its values.
    pub(super) fn values(&self) -> impl Iterator<Item = &Secret> {
        self.data.values().map(|value| &value.0)
    }

    /// Returns whether it has exactly this data.
    pub(super) fn has(&self, data: &Data<'_>) -> bool {
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

    /// Returns the labels and annotations that neither the driver nor the class has set.
    pub(super) fn foreign(&self) -> [Vec<(&String, &String)>; 2] {
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

    /// Returns this Secret as it is to be put back, annotated with the type that was refused.
    pub(super) fn to_put_back<'a>(
        &'a self,
        (namespace, name): (&str, &str),
        refused_type: &str,
    ) -> NewSecret<'a> {
        let mut annotations = self.metadata.annotations.clone().unwrap_or_default();
        annotations.insert(REFUSED_TYPE.to_owned(), refused_type.to_owned());
        let data = self.data.iter();
        let metadata = ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(namespace.to_owned()),
            labels: self.metadata.labels.clone(),
            annotations: Some(annotations),
            owner_references: self.metadata.owner_references.clone(),
            ..ObjectMeta::default()
        };
        NewSecret {
            immutable: self.immutable,
            ..NewSecret::new(
                metadata,
                &self.type_,
                data.map(|(key, value)| (key.as_str(), Encoded(&value.0))),
            )
        }
    }
}

/// Returns whether only the driver may set an annotation.
pub(super) fn is_reserved(key: &str) -> bool {
    [
        CLASS,
        CLASS_UID,
        GENERATION,
        SINCE,
        ORDER,
        REFUSED_TYPE,
        LABELS,
        ANNOTATIONS,
    ]
    .contains(&key)
}

/// A merge patch (RFC 7396): absent fields stay, and null removes a field.
#[derive(Serialize)]
pub(super) struct MergePatch<'a> {
    #[serde(skip)]
    existing: &'a Existing,
    pub(super) metadata: PatchedMeta<'a>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) data: BTreeMap<&'a str, Option<Encoded<'a>>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PatchedMeta<'a> {
    uid: Option<&'a str>,
    resource_version: Option<&'a str>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) labels: BTreeMap<&'a str, Option<String>>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) annotations: BTreeMap<&'a str, Option<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) owner_references: Option<Vec<OwnerReference>>,
}

impl<'a> MergePatch<'a> {
    /// Returns an empty change, which applies only to the version that was read.
    pub(super) fn of(existing: &'a Existing) -> Self {
        Self {
            existing,
            metadata: PatchedMeta {
                uid: existing.metadata.uid.as_deref(),
                resource_version: existing.metadata.resource_version.as_deref(),
                labels: BTreeMap::new(),
                annotations: BTreeMap::new(),
                owner_references: None,
            },
            data: BTreeMap::new(),
        }
    }

    /// Sets an annotation, or removes it with `None`, if the existing Secret differs.
    pub(super) fn annotate(&mut self, existing: &Existing, key: &'a str, value: Option<String>) {
        if existing.annotation(key) != value.as_ref() {
            self.metadata.annotations.insert(key, value);
        }
    }

    /// Makes the existing data the desired data.
    pub(super) fn replace_data(
        &mut self,
        existing: &'a Existing,
        desired: &'a BTreeMap<String, Secret>,
    ) {
        for key in existing.data.keys() {
            if !desired.contains_key(key) {
                self.data.insert(key, None);
            }
        }
        for (key, value) in desired {
            if existing.data.get(key).is_none_or(|there| there.0 != *value) {
                self.data.insert(key, Some(Encoded(value)));
            }
        }
    }

    /// Returns the values that it writes, and those that are there.
    pub(super) fn values(&self) -> impl Iterator<Item = &'a Secret> {
        let written = self.data.values().flatten().map(|value| value.0);
        written.chain(self.existing.values())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.metadata.owner_references.is_none() && !self.is_of_class()
    }

    /// Returns whether it changes anything that a class decides: not only owners.
    pub(super) fn is_of_class(&self) -> bool {
        !self.metadata.labels.is_empty()
            || !self.metadata.annotations.is_empty()
            || !self.data.is_empty()
    }
}

/// A Secret that is to be created.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NewSecret<'a> {
    api_version: &'static str,
    kind: &'static str,
    metadata: ObjectMeta,
    #[serde(rename = "type")]
    type_: &'a str,
    data: BTreeMap<&'a str, Encoded<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    immutable: Option<bool>,
}

impl<'a> NewSecret<'a> {
    pub(super) fn new(
        metadata: ObjectMeta,
        type_: &'a str,
        data: impl Iterator<Item = (&'a str, Encoded<'a>)>,
    ) -> Self {
        Self {
            api_version: "v1",
            kind: "Secret",
            metadata,
            type_,
            data: data.collect(),
            immutable: None,
        }
    }

    /// Returns its values.
    pub(super) fn values(&self) -> impl Iterator<Item = &'a Secret> {
        self.data.values().map(|value| value.0)
    }
}
