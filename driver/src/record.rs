//! Records, on the node's disk and without secrets, which volumes are published and what they hold.
//!
//! A record is the commit marker of a publish: it is written when everything else is done, and
//! a volume without one is unfinished work. It needs no fsync: a volume is a tmpfs, which is lost
//! together with the kernel's page cache.

mod disk;

use std::{borrow::Cow, collections::BTreeMap, path::PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, de::IgnoredAny};

use crate::quoted::quoted;
#[cfg(any(test, fuzzing))]
pub(crate) use disk::fuzz;
pub use disk::{Records, StagedRecord};

/// The annotation of a class with which, if it is `true`, the driver numbers the versions of objects
/// whose content changes while the provider reports the same versions.
pub const NUMBER_VERSIONS: &str = "secrets-store.csi.k8s.io/number-versions";

/// The annotation of a class of which any new value asks for a refresh of each volume of the class.
pub const ASKED: &str = "secrets-store.csi.k8s.io/refresh";

/// A published volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// kubelet's volume handle.
    pub volume_id: String,
    /// The path at which it is mounted.
    pub target_path: PathBuf,
    /// The pod that mounts it.
    pub pod: Pod,
    /// The state of the class at the last success.
    pub class: ClassState,
    /// The provider's name.
    pub provider: String,
    /// The name of the SecretProviderClassPodStatus.
    pub pod_status: String,
    /// The objects and versions that are mounted, in order of id.
    pub objects: Vec<Object>,
    /// How often the content has changed while the provider reported these versions.
    #[serde(default)]
    pub changes_of_versions: u64,
    /// The writer of the files.
    #[serde(rename = "content")]
    pub writer: Writer,
    /// The orders of contents, by the name of the directory that holds each; the name is empty for
    /// files that a provider wrote itself. An order is the resource version of the pod status that
    /// was written with the content, and orders the contents of all volumes of the cluster. A content
    /// whose pod status an earlier driver wrote has none until it is refreshed.
    #[serde(default)]
    pub orders: BTreeMap<String, String>,
    /// The content that a refresh puts in place, from before it does until it has recorded that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coming: Option<Coming>,
    /// The names of the files when the provider answered last, if the class has the annotation
    /// `secrets-store.csi.k8s.io/send-object-versions`. If the volume has other names, its content is
    /// not whole.
    #[serde(
        default,
        deserialize_with = "names",
        skip_serializing_if = "Option::is_none"
    )]
    pub files: Option<Names>,
    /// The last time that the provider answered and the content was made to match.
    pub last_success: Timestamp,
    /// The last time that the provider's answer changed the content.
    #[serde(default)]
    pub last_change: Timestamp,
    /// The time since when refreshes fail, if the last one did.
    pub failing_since: Option<Timestamp>,
}

impl Record {
    /// Returns the objects as the pod status names them: with numbered versions, if the class has the
    /// annotation [`NUMBER_VERSIONS`] and there is something to number. Which object has changed is not
    /// known, because a provider need not call its files and its objects alike, so all get the number.
    pub fn told_objects(&self) -> Cow<'_, [Object]> {
        let numbers = self.class.annotations.get(NUMBER_VERSIONS);
        if self.changes_of_versions == 0 || numbers.is_none_or(|value| value != "true") {
            return Cow::Borrowed(&self.objects);
        }
        let numbered = self.objects.iter().map(|object| Object {
            id: object.id.clone(),
            version: format!("{}+{}", object.version, self.changes_of_versions),
        });
        Cow::Owned(numbered.collect())
    }

    /// Returns the state of the class from which the content in a directory was made.
    pub fn class_of(&self, directory: &str) -> &ClassState {
        match &self.coming {
            Some(coming) if coming.directory == directory => &coming.class,
            _ => &self.class,
        }
    }

    /// Returns whether the last refresh of the volume has succeeded.
    pub fn is_fresh(&self) -> bool {
        self.failing_since.is_none()
    }

    /// Checks that its names can be names of objects in the API.
    ///
    /// # Errors
    /// Names the one that cannot.
    fn check_names(&self) -> Result<(), String> {
        for (what, name) in [
            ("pod", &self.pod.name),
            ("namespace", &self.pod.namespace),
            ("class", &self.class.name),
            ("pod status", &self.pod_status),
        ] {
            if !is_object_name(name) {
                return Err(format!(
                    "its {what} {} cannot be the name of an object",
                    quoted(name, 100)
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
impl Record {
    /// Returns the record of a volume with this handle at this target.
    pub(crate) fn example(volume_id: &str, target: impl Into<PathBuf>) -> Self {
        Self {
            volume_id: volume_id.to_owned(),
            target_path: target.into(),
            pod: Pod {
                name: "web".into(),
                namespace: "default".into(),
                uid: "u".into(),
            },
            class: ClassState {
                name: "c".into(),
                uid: "cu".into(),
                generation: Some(1),
                resource_version: "7".into(),
                annotations: BTreeMap::new(),
            },
            provider: "vault".into(),
            pod_status: "web-default-c".into(),
            objects: vec![Object {
                id: "secret/a".into(),
                version: "v1".into(),
            }],
            changes_of_versions: 0,
            writer: Writer::Driver,
            orders: BTreeMap::from([("..2026".into(), "7".into())]),
            coming: None,
            files: None,
            last_success: Timestamp::now(),
            last_change: Timestamp::UNIX_EPOCH,
            failing_since: None,
        }
    }
}

/// The names of a volume's files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Names {
    /// The number of files.
    pub files: usize,
    /// A digest of all names.
    pub digest: String,
}

/// Reads names, or none from anything else. An earlier version of the driver wrote a number here.
/// A record without names is still a record: the next refresh sends no versions and writes them.
fn names<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Names>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        Names(Names),
        Other(IgnoredAny),
    }
    Ok(match Form::deserialize(from)? {
        Form::Names(names) => Some(names),
        Form::Other(IgnoredAny) => None,
    })
}

/// The pod of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its UID, which tells it from later pods of the same name.
    pub uid: String,
}

impl std::fmt::Display for Pod {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A content that is about to come into a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Coming {
    /// The name of its directory.
    pub directory: String,
    /// The state of the class from which it was made, without annotations.
    pub class: ClassState,
}

/// A state of a SecretProviderClass.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClassState {
    /// Its name, in the pod's namespace.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Its generation, if the API server keeps one.
    pub generation: Option<i64>,
    /// Its resource version.
    pub resource_version: String,
    /// Its annotations that are addressed to this driver.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

/// The age of a state of a class, compared with the newest state that is known. Ordered from the
/// newest to the oldest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Age {
    /// The same state, or a later one.
    Current,
    /// Another object of that name with a lower resource version: its predecessor, or its
    /// successor in a cluster that was restored from a backup.
    Unsure,
    /// An earlier state whose content is the same: only metadata such as annotations is older.
    OlderMetadata,
    /// An earlier state with an earlier content.
    OlderContent,
}

impl ClassState {
    /// Compares this state, as it was read, with the newest one that is known. An API server may
    /// answer from a cache that lags behind, and answers may arrive out of order.
    ///
    /// The generation counts changes of the content. Resource versions of one kind of object can
    /// be compared if both are numbers
    /// (<https://kubernetes.io/docs/reference/using-api/api-concepts/#resource-versions>).
    pub fn age(&self, known: &Self) -> Age {
        let number = |class: &Self| class.resource_version.parse::<u64>().ok();
        let lower =
            matches!((number(self), number(known)), (Some(read), Some(known)) if read < known);
        if self.uid != known.uid {
            return if lower { Age::Unsure } else { Age::Current };
        }
        match (self.generation, known.generation) {
            (Some(read), Some(known)) if read < known => Age::OlderContent,
            (Some(read), Some(known)) if read > known => Age::Current,
            (Some(_), Some(_)) if lower => Age::OlderMetadata,
            (Some(_), Some(_)) => Age::Current,
            _ if lower => Age::OlderContent,
            _ => Age::Current,
        }
    }
}

/// An object of the external store.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Object {
    /// Its id within the volume.
    pub id: String,
    /// The version that is mounted.
    pub version: String,
}

/// The writer of the files of a volume. It decides what "the content is there" means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Writer {
    /// The driver: `..data` leads to a directory.
    Driver,
    /// The provider itself, as old ones do: the volume is not empty.
    Provider,
}

/// Returns whether a text can be the name of an object: a DNS subdomain (RFC 1123). Any other text in
/// the path of a request could lead to another object.
pub fn is_object_name(name: &str) -> bool {
    let is_label = |label: &str| {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(allowed)
    };
    name.len() <= 253 && name.split('.').all(is_label)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn class(uid: &str, generation: Option<i64>, version: &str) -> ClassState {
        ClassState {
            name: "db".into(),
            uid: uid.into(),
            generation,
            resource_version: version.into(),
            annotations: BTreeMap::new(),
        }
    }

    #[rstest]
    #[case::the_same(class("u", Some(2), "20"), Age::Current)]
    #[case::later_content(class("u", Some(3), "30"), Age::Current)]
    #[case::later_metadata(class("u", Some(2), "30"), Age::Current)]
    #[case::earlier_content(class("u", Some(1), "10"), Age::OlderContent)]
    #[case::the_generation_goes_before_the_version(class("u", Some(1), "30"), Age::OlderContent)]
    #[case::later_content_with_a_lower_version(class("u", Some(3), "10"), Age::Current)]
    #[case::earlier_metadata(class("u", Some(2), "9"), Age::OlderMetadata)]
    #[case::without_a_generation(class("u", None, "9"), Age::OlderContent)]
    #[case::later_without_a_generation(class("u", None, "21"), Age::Current)]
    #[case::versions_are_no_numbers(class("u", Some(2), "a9"), Age::Current)]
    #[case::neither_orders(class("u", None, "a9"), Age::Current)]
    #[case::its_successor(class("v", Some(1), "30"), Age::Current)]
    #[case::perhaps_its_predecessor(class("v", Some(9), "10"), Age::Unsure)]
    fn ages(#[case] read: ClassState, #[case] age: Age) {
        assert_eq!(read.age(&class("u", Some(2), "20")), age);
    }
}
