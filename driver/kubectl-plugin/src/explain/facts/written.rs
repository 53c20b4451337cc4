//! When a Secret was written.

use driver::cluster::secrets::SINCE;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

/// The names by which this driver and the existing one write Secrets.
const MANAGERS: [&str; 2] = ["csi-secrets-store", "secrets-store-csi"];

/// When a Secret was written, as its metadata says it.
#[derive(Default)]
pub(in crate::explain) struct Written {
    /// When it was created.
    pub created: Option<Timestamp>,
    /// When the driver changed it last: its content, or its owners.
    pub by_driver: Option<Timestamp>,
    /// Since when a volume has held its content, which the existing driver does not say. A Secret that was made again
    /// may have the content of the former one.
    pub content_since: Option<Timestamp>,
}

impl Written {
    pub(super) fn of(metadata: &ObjectMeta) -> Self {
        let managed = metadata.managed_fields.iter().flatten();
        let by_driver = managed.filter(|entry| {
            let manager = entry.manager.as_deref();
            manager.is_some_and(|manager| MANAGERS.contains(&manager))
        });
        Self {
            created: metadata.creation_timestamp.as_ref().map(|time| time.0),
            by_driver: by_driver
                .filter_map(|entry| Some(entry.time.as_ref()?.0))
                .max(),
            content_since: metadata
                .annotations
                .as_ref()
                .and_then(|all| all.get(SINCE)?.parse().ok()),
        }
    }
}
