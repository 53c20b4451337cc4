//! Keeps the SecretProviderClassPodStatus of a volume, with as few requests as can be: one
//! create on a first publish, and one cheap read when nothing changed.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{
    Api,
    api::{DeleteParams, GetParams, PostParams, Preconditions},
    core::ObjectMeta,
};
use sha2::{Digest as _, Sha256};

use super::{
    Cluster, Failure,
    resources::{ObjectVersion, PodStatus, SecretProviderClassPodStatus},
};
use crate::{
    error::{Error, Result},
    record::{Object, Pod},
};

/// The node that an object belongs to. Tools select by it, as upstream does (`InternalNodeLabel` in
/// `apis/v1/secretproviderclasspodstatus_types.go`).
const NODE_LABEL: &str = "internal.secrets-store.csi.k8s.io/node-name";

/// How often the content of the volume has got an order, the first one included. It differs each
/// time, so that the object is written and gets a resource version of its own.
const CONTENT_CHANGES: &str = "secrets-store.csi.k8s.io/content-changes";

/// When the content got its order, by the node's clock. For people; nothing is decided by it.
const CONTENT_CHANGED: &str = "secrets-store.csi.k8s.io/content-changed";

/// Limits of the API: names are DNS subdomains, label values are shorter.
const MAX_NAME: usize = 253;
const MAX_LABEL: usize = 63;

/// How often a write is tried against others who write or delete the same object.
const ATTEMPTS: usize = 5;

/// What a volume's pod status says.
#[derive(Debug, Clone)]
pub struct Mounted<'a> {
    /// The pod, the object's only owner.
    pub pod: &'a Pod,
    /// The SecretProviderClass.
    pub class: &'a str,
    /// Where it is mounted.
    pub target_path: &'a str,
    /// This node.
    pub node: &'a str,
    /// What is mounted, in order of id.
    pub objects: &'a [Object],
    /// When the content became another than the one that the pod status was written for, or was
    /// confirmed although a Secret has other content of a higher order, if it was. The pod status is written then in any case, also when it says the same as before: its
    /// new resource version is the order of the content.
    pub changed: Option<Timestamp>,
}

/// A pod status as the API server has it after it was written, or as it was found when it said
/// all of it already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The object's name.
    pub name: String,
    /// Its resource version; empty when the API server gives none.
    pub resource_version: String,
}

impl Written {
    fn of(name: String, metadata: ObjectMeta) -> Self {
        Self {
            name,
            resource_version: metadata.resource_version.unwrap_or_default(),
        }
    }
}

impl Cluster {
    /// Makes the pod status of a volume say what is mounted, and returns the object's name and
    /// resource version.
    ///
    /// The name is `<pod>-<namespace>-<class>`. When another volume of a living pod holds that
    /// name, this volume's gets a suffix of its own, and keeps it: `before` is the name that it had
    /// when it was written before, if it was. An object that an earlier pod of the same name left
    /// behind, here or on another node, or that somebody emptied by hand, is taken over, once it is
    /// known that this pod is the one that lives. The object of a living pod is never written for one that has gone,
    /// whose kubelet may not know that yet; nothing is written then, and the resource version that
    /// is returned is empty.
    ///
    /// # Errors
    /// When the API server does not take it.
    pub async fn write_pod_status(
        &self,
        mounted: &Mounted<'_>,
        before: Option<&str>,
    ) -> Result<Written> {
        let own = mounted.own_name();
        let name = match before == Some(&own) {
            true => own,
            false => mounted.name(),
        };
        let written = self.put_pod_status(mounted, name, true).await;
        written.map_err(|error| mounted.failed(error))
    }

    /// Looks whether the pod status of a volume is there and whole, at what the API server has at
    /// hand, and writes it again for a living pod when it is not. Returns whether it was written.
    ///
    /// Other versions than those of the volume stay: a refresh that is under way writes them before
    /// the volume has them.
    ///
    /// `name` is its name as it was when it was written.
    ///
    /// # Errors
    /// When the API server does not answer, or does not take it.
    pub async fn keep_pod_status(&self, mounted: &Mounted<'_>, name: &str) -> Result<bool> {
        let kept = async {
            let api = self.pod_statuses(mounted.pod).await?;
            match self.read(api.get_with(name, &GetParams::any())).await {
                Ok(existing) if mounted.is_whole(&existing) => return Ok(false),
                Ok(_) | Err(Failure::Refused { code: 404, .. }) => {}
                Err(failure) => return Err(failure.into_error()),
            }
            if !self.is_alive(mounted.pod).await? {
                return Ok(false);
            }
            let written = self.put_pod_status(mounted, name.to_owned(), false).await?;
            Ok(!written.resource_version.is_empty())
        };
        kept.await.map_err(|error| mounted.failed(error))
    }

    /// Writes a pod status. With `updates`, also over a whole one of this volume that names other
    /// versions.
    async fn put_pod_status(
        &self,
        mounted: &Mounted<'_>,
        mut name: String,
        updates: bool,
    ) -> Result<Written> {
        let api = self.pod_statuses(mounted.pod).await?;
        for _ in 0..ATTEMPTS {
            let wanted = mounted.object(&name);
            match self
                .in_turn(api.create(&PostParams::default(), &wanted))
                .await
            {
                Ok(created) => return Ok(Written::of(name, created.metadata)),
                Err(Failure::Refused { code: 409, .. }) => {}
                Err(failure) => return Err(failure.into_error()),
            }
            let existing = match self.read(api.get(&name)).await {
                Ok(existing) => existing,
                // Collected between the two requests.
                Err(Failure::Refused { code: 404, .. }) => continue,
                Err(failure) => return Err(failure.into_error()),
            };
            if mounted.is_held_by_another_volume(&existing) {
                let own = mounted.own_name();
                if name == own {
                    return Err(Error::internal(format!("{name} belongs to another volume")));
                }
                name = own;
                continue;
            }
            let is_ours = is_owned_by(&existing, &mounted.pod.uid);
            if !is_ours && !self.is_alive(mounted.pod).await? {
                return Ok(Written::of(name, ObjectMeta::default()));
            }
            let found = existing.metadata.clone();
            if !updates && mounted.is_whole(&existing) {
                return Ok(Written::of(name, found));
            }
            let Some(update) = wanted.over(existing) else {
                return Ok(Written::of(name, found));
            };
            match self
                .in_turn(api.replace(&name, &PostParams::default(), &update))
                .await
            {
                Ok(replaced) => return Ok(Written::of(name, replaced.metadata)),
                Err(Failure::Refused {
                    code: 404 | 409, ..
                }) => {}
                Err(failure) => return Err(failure.into_error()),
            }
        }
        Err(Error::unavailable(format!(
            "{name} kept changing; trying again later"
        )))
    }

    async fn pod_statuses(&self, pod: &Pod) -> Result<Api<SecretProviderClassPodStatus>> {
        let client = self.client().await?;
        Ok(Api::namespaced(client, &pod.namespace))
    }

    /// Deletes the pod status of a publish that failed after it was written. Only an object
    /// that belongs to this pod goes; the object is the pod's, so what cannot be deleted now is
    /// collected with the pod.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub async fn delete_pod_status(&self, pod: &Pod, name: &str) -> Result<()> {
        let api = self.pod_statuses(pod).await?;
        let existing = match self.read(api.get(name)).await {
            Err(Failure::Refused { code: 404, .. }) => return Ok(()),
            found => found.map_err(Failure::into_error)?,
        };
        if !is_owned_by(&existing, &pod.uid) {
            return Ok(());
        }
        let only_this = DeleteParams {
            preconditions: Some(Preconditions {
                uid: existing.metadata.uid,
                resource_version: existing.metadata.resource_version,
            }),
            ..DeleteParams::default()
        };
        match self.in_turn(api.delete(name, &only_this)).await {
            Ok(_)
            | Err(Failure::Refused {
                code: 404 | 409, ..
            }) => Ok(()),
            Err(failure) => Err(failure.into_error()),
        }
    }
}

impl Mounted<'_> {
    fn failed(&self, error: Error) -> Error {
        error.context(format_args!(
            "failed to write the SecretProviderClassPodStatus of pod {}",
            self.pod
        ))
    }

    /// The name that other tools expect.
    fn name(&self) -> String {
        shortened(
            &format!("{}-{}-{}", self.pod.name, self.pod.namespace, self.class),
            MAX_NAME,
        )
    }

    /// A name that no other volume of any pod has: for when the expected one is taken.
    fn own_name(&self) -> String {
        let hash = short_hash(&format!("{}\0{}", self.pod.uid, self.target_path));
        let room = MAX_NAME - hash.len() - 1;
        let expected = format!("{}-{}-{}", self.pod.name, self.pod.namespace, self.class);
        format!("{}-{hash}", shortened(&expected, room))
    }

    fn object(&self, name: &str) -> SecretProviderClassPodStatus {
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
                annotations: self.changed.map(|time| {
                    BTreeMap::from([
                        (CONTENT_CHANGES.to_owned(), "1".to_owned()),
                        (CONTENT_CHANGED.to_owned(), time.to_string()),
                    ])
                }),
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

    /// Whether an object of our name is somebody else's: another volume of this pod, or a pod
    /// whose name, namespace and class join to the same text. An earlier pod of the same name
    /// is not somebody else. What somebody removed by hand says nothing against us: whose it was,
    /// the rest says.
    fn is_held_by_another_volume(&self, existing: &SecretProviderClassPodStatus) -> bool {
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

    /// Whether an object says all of this volume, whichever versions it names: it has its owner,
    /// and nobody has emptied it.
    fn is_whole(&self, existing: &SecretProviderClassPodStatus) -> bool {
        let is = &existing.status;
        is_owned_by(existing, &self.pod.uid)
            && is.mounted
            && is.pod_name == self.pod.name
            && is.secret_provider_class_name == self.class
            && is.target_path == self.target_path
            && (!is.objects.is_empty() || self.objects.is_empty())
    }
}

impl SecretProviderClassPodStatus {
    /// Lays this object over an existing one: others' labels and annotations stay, and changes of
    /// the content are counted on. None when the existing one says all of it already.
    fn over(self, existing: Self) -> Option<Self> {
        let mut merged = existing.clone();
        if let Some(changed) = self.metadata.annotations {
            let annotations = merged.metadata.annotations.get_or_insert_default();
            let before = annotations.get(CONTENT_CHANGES);
            let before: u64 = before.and_then(|n| n.parse().ok()).unwrap_or_default();
            annotations.extend(changed);
            let now = before.wrapping_add(1).to_string();
            annotations.insert(CONTENT_CHANGES.to_owned(), now);
        }
        merged
            .metadata
            .labels
            .get_or_insert_default()
            .extend(self.metadata.labels.unwrap_or_default());
        merged.metadata.owner_references = self.metadata.owner_references;
        merged.status = self.status;
        (merged != existing).then_some(merged)
    }
}

fn is_owned_by(object: &SecretProviderClassPodStatus, uid: &str) -> bool {
    object
        .metadata
        .owner_references
        .iter()
        .flatten()
        .any(|owner| owner.uid == uid)
}

/// The text itself when it fits, or else a readable beginning and a hash of the whole. The
/// result still ends like a name may end.
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

/// Ten hexadecimal digits: 40 bits, among the objects of one namespace.
fn short_hash(text: &str) -> String {
    Sha256::digest(text)
        .iter()
        .take(5)
        .map(|byte| format!("{byte:02x}"))
        .collect()
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

    fn mounted<'a>(pod: &'a Pod, class: &'a str, target_path: &'a str) -> Mounted<'a> {
        Mounted {
            pod,
            class,
            target_path,
            node: "node-1",
            objects: &[],
            changed: None,
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
        assert_eq!(mounted(&short, "vault", "/t").name(), "web-shop-vault");
        let long = pod(&"p".repeat(250), "u");
        let mounted = mounted(&long, "vault", "/t");
        assert_eq!(mounted.name().len(), MAX_NAME);
        assert!(mounted.own_name().len() <= MAX_NAME);
        assert_ne!(mounted.name(), mounted.own_name());
    }

    #[rstest]
    #[case::the_same_volume("web", "u1", "c", "/t1", false)]
    #[case::another_volume_of_the_pod("web", "u1", "c", "/t2", true)]
    #[case::an_earlier_pod("web", "u0", "c", "/t0", false)]
    #[case::another_pod_that_joins_alike("web-shop", "u2", "c", "/t3", true)]
    #[case::another_class_that_joins_alike("web", "u2", "x-c", "/t3", true)]
    fn who_holds_a_name(
        #[case] name: &str,
        #[case] uid: &str,
        #[case] class: &str,
        #[case] target: &str,
        #[case] another: bool,
    ) {
        let theirs = pod(name, uid);
        let existing = mounted(&theirs, class, target).object("x");
        let ours = pod("web", "u1");
        assert_eq!(
            mounted(&ours, "c", "/t1").is_held_by_another_volume(&existing),
            another
        );
    }

    #[rstest]
    #[case::never_counted(None, "1")]
    #[case::counted(Some("7"), "8")]
    #[case::no_number(Some("many"), "1")]
    #[case::the_largest(Some("18446744073709551615"), "0")]
    fn each_change_of_the_content_writes_the_object(
        #[case] before: Option<&str>,
        #[case] after: &str,
    ) {
        let pod = pod("web", "u1");
        let at = Timestamp::UNIX_EPOCH;
        let unchanged = mounted(&pod, "c", "/t1");
        let changed = Mounted {
            changed: Some(at),
            ..unchanged.clone()
        };
        let mut existing = changed.object("x");
        let annotations = existing.metadata.annotations.get_or_insert_default();
        annotations.insert("foreign".into(), "1".into());
        match before {
            Some(before) => annotations.insert(CONTENT_CHANGES.into(), before.into()),
            None => annotations.remove(CONTENT_CHANGES),
        };
        // Nothing else differs, not even the time.
        let written = changed.object("x").over(existing.clone()).unwrap();
        let annotations = written.metadata.annotations.unwrap();
        assert_eq!(annotations[CONTENT_CHANGES], after);
        assert_eq!(annotations["foreign"], "1");
        assert_eq!(unchanged.object("x").over(existing), None);
    }

    #[test]
    fn laid_over_keeps_what_is_not_ours_and_sees_when_nothing_changed() {
        let pod = pod("web", "u1");
        let wanted = mounted(&pod, "c", "/t1").object("x");
        let mut existing = wanted.clone();
        existing
            .metadata
            .labels
            .as_mut()
            .unwrap()
            .insert("team".into(), "shop".into());
        assert_eq!(wanted.clone().over(existing.clone()), None);

        existing
            .metadata
            .labels
            .as_mut()
            .unwrap()
            .insert(NODE_LABEL.into(), "node-0".into());
        let merged = wanted.clone().over(existing.clone()).unwrap();
        let labels = merged.metadata.labels.unwrap();
        assert_eq!(
            (labels["team"].as_str(), labels[NODE_LABEL].as_str()),
            ("shop", "node-1")
        );

        existing.metadata.labels = None;
        assert!(
            wanted.over(existing).is_some(),
            "an object without labels is mended"
        );
    }
}
