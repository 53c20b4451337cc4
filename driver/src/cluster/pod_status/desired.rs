//! Decides what a pod status should say, whether an existing one says it, and to which volume an
//! existing one belongs.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::core::ObjectMeta;
use sha2::{Digest as _, Sha256};

use super::{
    super::resources::{ObjectVersion, PodStatus, SecretProviderClassPodStatus},
    StatusOf,
};
use crate::{
    error::Error,
    hex,
    record::{Object, Pod},
};

/// The label with the node's name. Tools select by it, as upstream does (`InternalNodeLabel` in
/// `apis/v1/secretproviderclasspodstatus_types.go`).
const NODE_LABEL: &str = "internal.secrets-store.csi.k8s.io/node-name";

/// The annotation with the number of contents that a volume has had; the first one counts. It is for people and
/// tools; the driver reads it only to count on.
pub const CONTENT_CHANGES: &str = "secrets-store.csi.k8s.io/content-changes";
/// The annotation with the time of the last change of the content, by the node's clock.
pub const CONTENT_CHANGED: &str = "secrets-store.csi.k8s.io/content-changed";

/// The annotation that counts how often unchanged content got a new order. Each time its value differs,
/// so that the object gets a new resource version.
const CONTENT_CONFIRMATIONS: &str = "secrets-store.csi.k8s.io/content-confirmations";

/// Limits of the API: names are DNS subdomains, label values are shorter.
const MAX_NAME: usize = 253;
const MAX_LABEL: usize = 63;

/// The pod status that a volume should have.
#[derive(Debug, Clone)]
pub struct DesiredPodStatus<'a> {
    /// The volume handle.
    pub volume_id: &'a str,
    /// The pod, the object's only owner.
    pub pod: &'a Pod,
    /// The name of the SecretProviderClass.
    pub class: &'a str,
    /// The target path of the volume.
    pub target_path: &'a str,
    /// The name of this node.
    pub node: &'a str,
    /// The mounted objects, sorted by id.
    pub objects: &'a [Object],
    /// The reason for which the content gets a new order, if it does. The pod status is written then
    /// in any case, also if it says the same as before, because its new resource version is the order of
    /// the content.
    pub new_order: Option<NewOrder>,
}

/// The reason for which content gets a new order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewOrder {
    /// It has changed since the pod status was written, at this time.
    Changed(Timestamp),
    /// A refresh has confirmed it, although a Secret has other content of a higher order.
    Confirmed,
}

impl DesiredPodStatus<'_> {
    /// Returns which volume the pod status of this name belongs to.
    pub(super) fn named<'n>(&'n self, name: &'n str) -> StatusOf<'n> {
        StatusOf {
            volume_id: self.volume_id,
            pod: self.pod,
            name,
        }
    }

    /// Adds to an error which pod status could not be written.
    pub(super) fn failed(&self, error: Error) -> Error {
        error.context(format_args!(
            "failed to write the SecretProviderClassPodStatus of pod {}",
            self.pod
        ))
    }

    /// Returns the name that other tools expect.
    pub(super) fn name(&self) -> String {
        shortened(
            &format!("{}-{}-{}", self.pod.name, self.pod.namespace, self.class),
            MAX_NAME,
        )
    }

    /// Returns a name that no other volume of any pod has, for a volume whose expected name is taken.
    pub(super) fn own_name(&self) -> String {
        let hash = short_hash(&format!("{}\0{}", self.pod.uid, self.target_path));
        let room = MAX_NAME - hash.len() - 1;
        let expected = format!("{}-{}-{}", self.pod.name, self.pod.namespace, self.class);
        format!("{}-{hash}", shortened(&expected, room))
    }

    /// Returns the object as it is to be created.
    pub(super) fn object(&self, name: &str) -> SecretProviderClassPodStatus {
        SecretProviderClassPodStatus {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                namespace: Some(self.pod.namespace.clone()),
                labels: Some(BTreeMap::from([(
                    NODE_LABEL.to_owned(),
                    shortened(self.node, MAX_LABEL),
                )])),
                owner_references: Some(vec![OwnerReference {
                    api_version: "v1".to_owned(),
                    kind: "Pod".to_owned(),
                    name: self.pod.name.clone(),
                    uid: self.pod.uid.clone(),
                    ..OwnerReference::default()
                }]),
                annotations: self.new_order.map(NewOrder::annotations),
                ..ObjectMeta::default()
            },
            status: PodStatus {
                pod_name: self.pod.name.clone(),
                secret_provider_class_name: self.class.to_owned(),
                mounted: true,
                target_path: self.target_path.to_owned(),
                objects: self
                    .objects
                    .iter()
                    .map(|o| ObjectVersion {
                        id: o.id.clone(),
                        version: o.version.clone(),
                    })
                    .collect(),
            },
            ..SecretProviderClassPodStatus::default()
        }
    }

    /// Returns whether an object of our name belongs to another volume: of this pod, or of a pod
    /// whose name, namespace and class join to the same text. An object of an earlier pod of the
    /// same name does not. Fields that somebody emptied by hand decide nothing; the others do.
    pub(super) fn is_of_another_volume(&self, existing: &SecretProviderClassPodStatus) -> bool {
        let theirs = &existing.status;
        let is = |said: &str, ours: &str| said.is_empty() || said == ours;
        if is_owned_by(existing, &self.pod.uid) {
            return !is(&theirs.target_path, self.target_path);
        }
        let mut owners = existing.metadata.owner_references.iter().flatten();
        let is_pods = match theirs.pod_name.as_str() {
            "" => owners.all(|owner| owner.name == self.pod.name),
            name => name == self.pod.name,
        };
        !is_pods || !is(&theirs.secret_provider_class_name, self.class)
    }

    /// Returns whether an object has its owner and all fields of this volume, whichever versions it
    /// names.
    pub(super) fn is_complete(&self, existing: &SecretProviderClassPodStatus) -> bool {
        let is = &existing.status;
        is_owned_by(existing, &self.pod.uid)
            && is.mounted
            && is.pod_name == self.pod.name
            && is.secret_provider_class_name == self.class
            && is.target_path == self.target_path
            && (!is.objects.is_empty() || self.objects.is_empty())
    }
}

impl NewOrder {
    /// Returns the annotations that tell of it, for the first time.
    fn annotations(self) -> BTreeMap<String, String> {
        let text = str::to_owned;
        match self {
            Self::Changed(time) => BTreeMap::from([
                (text(CONTENT_CHANGES), text("1")),
                (text(CONTENT_CHANGED), time.to_string()),
            ]),
            Self::Confirmed => BTreeMap::from([(text(CONTENT_CONFIRMATIONS), text("1"))]),
        }
    }
}

/// Merges a desired object into an existing one: labels and annotations of others stay, and changes
/// of the content are counted on. Returns `None` if the existing one has all of it already.
pub(super) fn merged(
    existing: &SecretProviderClassPodStatus,
    desired: SecretProviderClassPodStatus,
) -> Option<SecretProviderClassPodStatus> {
    let mut merged = existing.clone();
    if let Some(new) = desired.metadata.annotations {
        let annotations = merged.metadata.annotations.get_or_insert_default();
        for (key, value) in new {
            let value = match key.as_str() {
                CONTENT_CHANGES | CONTENT_CONFIRMATIONS => {
                    let before = annotations.get(&key).and_then(|n| n.parse::<u64>().ok());
                    before.unwrap_or_default().wrapping_add(1).to_string()
                }
                _ => value,
            };
            annotations.insert(key, value);
        }
    }
    let labels = merged.metadata.labels.get_or_insert_default();
    labels.extend(desired.metadata.labels.unwrap_or_default());
    merged.metadata.owner_references = desired.metadata.owner_references;
    merged.status = desired.status;
    (merged != *existing).then_some(merged)
}

/// Returns whether an object has an owner of this UID.
pub(super) fn is_owned_by(object: &SecretProviderClassPodStatus, uid: &str) -> bool {
    let mut owners = object.metadata.owner_references.iter().flatten();
    owners.any(|owner| owner.uid == uid)
}

/// Returns the text itself if it fits, or else its beginning and a hash of the whole. The result
/// ends as a name may end.
fn shortened(text: &str, max: usize) -> String {
    if text.len() <= max {
        return text.to_owned();
    }
    let hash = short_hash(text);
    let mut end = max - hash.len() - 1;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let start = text[..end].trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
    format!("{start}-{hash}")
}

/// Returns ten hexadecimal digits: 40 bits, enough for the objects of one namespace.
fn short_hash(text: &str) -> String {
    hex::digits(&Sha256::digest(text)[..5])
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn pod(name: &str, uid: &str) -> Pod {
        Pod {
            name: name.into(),
            namespace: "shop".into(),
            uid: uid.into(),
        }
    }

    fn desired<'a>(pod: &'a Pod, class: &'a str, target_path: &'a str) -> DesiredPodStatus<'a> {
        DesiredPodStatus {
            volume_id: "csi-1",
            pod,
            class,
            target_path,
            node: "node-1",
            objects: &[],
            new_order: None,
        }
    }

    #[rstest]
    #[case::fits("web", "web")]
    #[case::exactly(&"a".repeat(20), &"a".repeat(20))]
    fn a_text_that_fits_stays(#[case] text: &str, #[case] expected: &str) {
        assert_eq!(shortened(text, 20), expected);
    }

    #[test]
    fn a_text_that_does_not_fit_keeps_its_beginning_and_stays_unlike_others() {
        let one = shortened(&format!("{}1", "node.".repeat(20)), 63);
        let two = shortened(&format!("{}2", "node.".repeat(20)), 63);
        assert!(one.starts_with("node.node.") && one.len() <= 63, "{one}");
        assert_ne!(one, two);
        let start = one.rsplit_once('-').unwrap().0;
        assert!(start.ends_with(char::is_alphanumeric), "{one}");
    }

    #[test]
    fn names_are_upstreams_and_fit_the_api() {
        let short = pod("web", "u");
        assert_eq!(desired(&short, "vault", "/t").name(), "web-shop-vault");
        let long = pod(&"p".repeat(250), "u");
        let desired = desired(&long, "vault", "/t");
        assert_eq!(desired.name().len(), MAX_NAME);
        assert!(desired.own_name().len() <= MAX_NAME);
        assert_ne!(desired.name(), desired.own_name());
    }

    #[rstest]
    #[case::the_same_volume("web", "u1", "c", "/t1", false)]
    #[case::another_volume_of_the_pod("web", "u1", "c", "/t2", true)]
    #[case::an_earlier_pod("web", "u0", "c", "/t0", false)]
    #[case::another_pod_that_joins_alike("web-shop", "u2", "c", "/t3", true)]
    #[case::another_class_that_joins_alike("web", "u2", "x-c", "/t3", true)]
    fn which_volume_has_a_name(
        #[case] name: &str,
        #[case] uid: &str,
        #[case] class: &str,
        #[case] target: &str,
        #[case] another: bool,
    ) {
        let theirs = pod(name, uid);
        let existing = desired(&theirs, class, target).object("x");
        let ours = pod("web", "u1");
        assert_eq!(
            desired(&ours, "c", "/t1").is_of_another_volume(&existing),
            another
        );
    }

    #[rstest]
    #[case::never_counted(None, "1")]
    #[case::counted(Some("7"), "8")]
    #[case::no_number(Some("many"), "1")]
    #[case::the_largest(Some("18446744073709551615"), "0")]
    fn each_new_order_writes_the_object(#[case] before: Option<&str>, #[case] after: &str) {
        let pod = pod("web", "u1");
        let unchanged = desired(&pod, "c", "/t1");
        for (new_order, counter, other) in [
            (
                NewOrder::Changed(Timestamp::UNIX_EPOCH),
                CONTENT_CHANGES,
                CONTENT_CONFIRMATIONS,
            ),
            (NewOrder::Confirmed, CONTENT_CONFIRMATIONS, CONTENT_CHANGES),
        ] {
            let ordered = DesiredPodStatus {
                new_order: Some(new_order),
                ..unchanged.clone()
            };
            let mut existing = ordered.object("x");
            let annotations = existing.metadata.annotations.get_or_insert_default();
            annotations.insert("foreign".into(), "1".into());
            annotations.insert(other.into(), "5".into());
            match before {
                Some(before) => annotations.insert(counter.into(), before.into()),
                None => annotations.remove(counter),
            };
            // Nothing else differs, not even the time.
            let written = merged(&existing, ordered.object("x")).unwrap();
            let annotations = written.metadata.annotations.unwrap();
            assert_eq!(annotations[counter], after);
            assert_eq!(annotations[other], "5");
            assert_eq!(annotations["foreign"], "1");
            assert_eq!(merged(&existing, unchanged.object("x")), None);
        }
    }

    #[test]
    fn a_merge_keeps_what_is_not_ours_and_sees_when_nothing_changed() {
        let pod = pod("web", "u1");
        let ours = desired(&pod, "c", "/t1").object("x");
        let mut existing = ours.clone();
        existing
            .metadata
            .labels
            .as_mut()
            .unwrap()
            .insert("team".into(), "shop".into());
        assert_eq!(merged(&existing, ours.clone()), None);

        existing
            .metadata
            .labels
            .as_mut()
            .unwrap()
            .insert(NODE_LABEL.into(), "node-0".into());
        let written = merged(&existing, ours.clone()).unwrap();
        let labels = written.metadata.labels.unwrap();
        assert_eq!(
            (labels["team"].as_str(), labels[NODE_LABEL].as_str()),
            ("shop", "node-1")
        );

        existing.metadata.labels = None;
        assert!(
            merged(&existing, ours).is_some(),
            "an object without labels is mended"
        );
    }
}
