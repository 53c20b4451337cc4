//! When a Secret was written, and whose it is.

use std::collections::BTreeSet;

use driver::cluster::secrets::{CLASS, CLASS_UID, MANAGED, SINCE};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ManagedFieldsEntry, ObjectMeta};

/// The names by which this driver and the existing one write Secrets.
const MANAGERS: [&str; 2] = ["csi-secrets-store", "secrets-store-csi"];

/// When a Secret was written and whose it is, as its metadata says it.
#[derive(Default)]
pub(in crate::explain) struct Written {
    /// When it was created.
    pub created: Option<Timestamp>,
    /// When the driver changed it last: its content, or its owners.
    pub by_driver: Option<Timestamp>,
    /// Since when a volume has held its content, which the existing driver does not say. A Secret that was made again
    /// may have the content of the former one.
    pub content_since: Option<Timestamp>,
    /// Whether it is the driver's.
    pub is_managed: bool,
    /// Whether the driver made it, or has written it: its labels may have been taken away since.
    pub is_of_driver: bool,
    /// Whether only others have written the content that it has.
    pub is_of_others: bool,
    /// The class that makes it, as the driver noted it.
    pub class: Option<String>,
    /// Whether somebody has deleted it.
    pub is_deleted: bool,
    /// What has to be done before it goes.
    pub finalizers: Vec<String>,
    /// The keys that it has, if its metadata names them.
    pub keys: Option<BTreeSet<String>>,
}

impl Written {
    pub(super) fn of(metadata: &ObjectMeta) -> Self {
        let managed = metadata.managed_fields.iter().flatten();
        let by_driver: Vec<_> = managed.filter(|entry| is_by_driver(entry)).collect();
        let is_managed = is_managed(metadata);
        Self {
            is_of_others: is_of_others(metadata),
            is_of_driver: is_managed || !by_driver.is_empty() || is_owned(metadata),
            class: metadata
                .annotations
                .as_ref()
                .and_then(|all| all.get(CLASS).cloned()),
            created: metadata.creation_timestamp.as_ref().map(|time| time.0),
            by_driver: by_driver
                .into_iter()
                .filter_map(|entry| Some(entry.time.as_ref()?.0))
                .max(),
            content_since: metadata
                .annotations
                .as_ref()
                .and_then(|all| all.get(SINCE)?.parse().ok()),
            is_managed,
            is_deleted: metadata.deletion_timestamp.is_some(),
            finalizers: metadata.finalizers.clone().unwrap_or_default(),
            keys: keys(metadata),
        }
    }
}

/// Returns whether the driver takes a Secret for its own.
fn is_managed(metadata: &ObjectMeta) -> bool {
    let label = metadata.labels.as_ref().and_then(|all| all.get(MANAGED));
    let annotations = metadata.annotations.as_ref();
    label.is_some_and(|value| value == "true")
        || annotations.is_some_and(|all| all.contains_key(CLASS_UID))
}

/// Returns whether an entry is about fields that the driver has written.
fn is_by_driver(entry: &ManagedFieldsEntry) -> bool {
    let manager = entry.manager.as_deref();
    manager.is_some_and(|manager| MANAGERS.contains(&manager))
}

/// Returns whether the content of a Secret is known to be somebody else's.
fn is_of_others(metadata: &ObjectMeta) -> bool {
    let managed = metadata.managed_fields.iter().flatten();
    let of_data = managed.filter(|entry| {
        let fields = entry.fields_v1.as_ref();
        fields.is_some_and(|fields| fields.0.get("f:data").is_some())
    });
    let mut of_data = of_data.peekable();
    of_data.peek().is_some() && of_data.all(|entry| !is_by_driver(entry))
}

/// Returns whether a Secret goes with a volume of the driver.
fn is_owned(metadata: &ObjectMeta) -> bool {
    let mut owners = metadata.owner_references.iter().flatten();
    owners.any(|owner| owner.kind == "SecretProviderClassPodStatus")
}

/// Returns the keys of a Secret, whose names are in the fields of those who have written it.
fn keys(metadata: &ObjectMeta) -> Option<BTreeSet<String>> {
    let managed = metadata.managed_fields.as_ref()?.iter();
    let of_data =
        managed.filter_map(|entry| entry.fields_v1.as_ref()?.0.get("f:data")?.as_object());
    let mut of_data = of_data.peekable();
    of_data.peek()?;
    let names = of_data.flat_map(|fields| fields.keys());
    let names = names.filter_map(|name| Some(name.strip_prefix("f:")?.to_owned()));
    Some(names.collect())
}
