//! Volumes of providers with the manners of five real ones. Each scenario has a class and a pod for
//! each of the manners, which bear its name.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use e2e::{cluster::Cluster as _, tree::Tree};
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt;
use rstest::rstest;
use serde_json::json;

use crate::{
    harness::{Scenario, scenario, until},
    objects::{Class, MOUNT, Pod, SecretObject, class, pod},
    settings::{Need, REFRESH_OFTEN},
};

const MANNERS: [&str; 5] = ["aws", "azure", "gcp", "openbao", "vault"];

/// A driver that refreshes at every publish, and retries within seconds.
const OFTEN: &[Need] = &[
    Need::Republish,
    REFRESH_OFTEN,
    Need::Flags(&["--rotation-backoff=1s", "--rotation-backoff-max=2s"]),
];

fn class_of(manners: &str, objects: &str) -> Class {
    class(manners, objects).parameter("manners", manners)
}

fn pod_of(manners: &str) -> Pod {
    pod(manners, &[manners])
}

impl Scenario {
    /// Applies a class for each of the manners.
    async fn apply_classes(&self, class: impl Fn(&str) -> Class) {
        for manners in MANNERS {
            self.apply(class(manners)).await;
        }
    }

    /// Applies a pod for each of the manners, and waits until all run.
    async fn start_pods(&self, pod: impl Fn(&str) -> Pod) {
        for manners in MANNERS {
            self.apply(pod(manners)).await;
        }
        for manners in MANNERS {
            self.ready(manners).await;
        }
    }

    /// Returns what each pod reads: modes, owners and contents. Pods that read the same are listed
    /// together.
    async fn all_volumes(&self) -> String {
        let mut volumes: Vec<(Vec<&str>, String)> = Vec::new();
        for manners in MANNERS {
            let volume = self.listing(manners, MOUNT).await;
            match volumes.iter_mut().find(|(_, other)| *other == volume) {
                Some((pods, _)) => pods.push(manners),
                None => volumes.push((vec![manners], volume)),
            }
        }
        let mut text = String::new();
        for (pods, volume) in volumes {
            write!(text, "{}\n{volume}", pods.join(", ")).unwrap();
        }
        text
    }

    /// Returns the ids and versions of the objects in each pod status.
    async fn all_objects(&self) -> String {
        let mut text = String::new();
        for status in self.pod_status_objects().await {
            let status = &status.data["status"];
            writeln!(text, "{}", status["podName"].as_str().unwrap()).unwrap();
            for object in status["objects"].as_array().unwrap() {
                let [id, version] = ["id", "version"].map(|key| object[key].as_str().unwrap());
                writeln!(text, "  {id} {version}").unwrap();
            }
        }
        text
    }

    /// Returns what each pod reads, and what its pod status says of it.
    async fn all_states(&self) -> String {
        self.all_volumes().await + "pod statuses\n" + &self.all_objects().await
    }

    /// Returns whether each pod reads this text in a file.
    async fn all_read(&self, file: &str, text: &str) -> bool {
        for manners in MANNERS {
            let tree = self.reads(manners, MOUNT).await;
            if tree.texts().get(file) != Some(&text) {
                return false;
            }
        }
        true
    }

    /// Makes kubelet reconcile the pods until something holds.
    async fn reconciled_until(&self, what: &str, holds: impl AsyncFn() -> bool) {
        until(what, async || {
            for manners in MANNERS {
                self.namespace.reconcile(manners).await.unwrap();
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
            holds().await
        })
        .await;
    }

    /// Waits until each pod's provider has been called so often again.
    async fn refreshed(&self, times: u64) {
        let mut before = BTreeMap::new();
        for manners in MANNERS {
            before.insert(manners, self.provider_calls(manners).await);
        }
        self.reconciled_until("all volumes are refreshed", async || {
            for (manners, before) in &before {
                if self.provider_calls(manners).await < before + times {
                    return false;
                }
            }
            true
        })
        .await;
    }

    /// Returns the pods that have an event with a reason.
    async fn who_hear(&self, reason: &str) -> Vec<&'static str> {
        let mut pods = Vec::new();
        for manners in MANNERS {
            let events = self.namespace.events(manners).await.unwrap();
            if events.iter().any(|e| e.reason.as_deref() == Some(reason)) {
                pods.push(manners);
            }
        }
        pods
    }

    /// Returns whether each pod has an event with a reason.
    async fn all_hear(&self, reason: &str) -> bool {
        self.who_hear(reason).await == MANNERS
    }

    /// Returns the volumes as they are on disk.
    async fn all_disks(&self) -> Vec<Tree> {
        let mut disks = Vec::new();
        for manners in MANNERS {
            disks.push(self.disk(manners, MOUNT).await);
        }
        disks
    }

    /// Returns the resource versions of the pod statuses, by name.
    async fn status_versions(&self) -> BTreeMap<String, Option<String>> {
        let statuses = self.pod_status_objects().await;
        let version = |status: &kube::api::DynamicObject| {
            (status.name_any(), status.metadata.resource_version.clone())
        };
        statuses.iter().map(version).collect()
    }

    /// Returns whether the Secret of each class has this text.
    async fn all_secrets_say(&self, text: &str) -> bool {
        let secrets = self.namespace.api::<Secret>();
        for manners in MANNERS {
            let secret = secrets.get_opt(manners).await.unwrap();
            let data = secret.and_then(|secret| secret.data).unwrap_or_default();
            if data.get("pw").map(|value| &value.0[..]) != Some(text.as_bytes()) {
                return false;
            }
        }
        true
    }

    /// Sets an object of the provider's store.
    async fn store(&self, object: &str, content: &str, version: u32) {
        let path = format!("/objects?name={object}&content={content}&version={version}");
        self.provider_control(&path).await;
    }
}

const OBJECTS: &str = "
    - {objectName: user, content: alice, version: '7'}
    - {objectName: password, path: db/password, content: hunter2, version: '12'}
    - {objectName: key, content: private, mode: '0400'}
    - {objectName: binary, contentBase64: '/wABAgP+'}
    - {objectName: empty, content: ''}
    - {objectName: large, contentSize: 70000}
    ";

#[tokio::test]
async fn many_objects() {
    let s = Scenario::start().await;
    s.apply_classes(|manners| class_of(manners, OBJECTS)).await;
    s.start_pods(pod_of).await;
    insta::assert_snapshot!(s.all_states().await);
    for manners in MANNERS {
        s.namespace.delete_pod(manners).await.unwrap();
    }
    for manners in MANNERS {
        s.gone(manners).await;
    }
    s.nothing_is_left().await;
}

/// Files have the default mode and the volume's group, also those that the provider writes itself,
/// and also after a refresh. An explicit mode stays.
#[tokio::test]
async fn a_default_mode_and_a_group() {
    let s = scenario!([OFTEN, &[Need::OtherUsers]].concat());
    let objects = |content: &str| {
        format!(
            "
            - {{objectName: user, content: '{content}'}}
            - {{objectName: password, path: db/password, content: '{content}'}}
            - {{objectName: key, content: '{content}', mode: '0400'}}
            "
        )
    };
    let user = |manners: &str| {
        pod_of(manners)
            .with(
                "securityContext",
                json!({"runAsUser": 1004, "runAsGroup": 1004, "fsGroup": 2000}),
            )
            .attribute("secrets-store.csi.k8s.io/default-mode", "0440")
    };
    s.apply_classes(|manners| class_of(manners, &objects("1")))
        .await;
    s.start_pods(user).await;
    let before = s.all_volumes().await;
    insta::assert_snapshot!(before);
    s.apply_classes(|manners| class_of(manners, &objects("2")))
        .await;
    s.reconciled_until("all read the new content", async || {
        s.all_read("user", "2").await
    })
    .await;
    assert_eq!(s.all_volumes().await, before.replace("\"1\"", "\"2\""));
}

/// Files, pod statuses and Secrets follow the store. Nothing is written while it does not change.
#[tokio::test]
async fn the_store_changes() {
    let s = scenario!(OFTEN);
    s.store("manners-pw", "before", 1).await;
    let objects = "- {objectName: manners-pw, path: pw}\n- {objectName: user, content: alice}";
    s.apply_classes(|manners| {
        class_of(manners, objects).secret_objects([SecretObject::new(manners, &[("pw", "pw")])])
    })
    .await;
    s.start_pods(pod_of).await;
    assert!(s.all_secrets_say("before").await);
    let (disks, statuses) = (s.all_disks().await, s.status_versions().await);
    s.refreshed(2).await;
    assert_eq!(s.status_versions().await, statuses);
    assert_eq!(s.all_disks().await, disks);

    s.store("manners-pw", "after", 2).await;
    s.reconciled_until("all read the new content", async || {
        s.all_read("pw", "after").await && s.all_secrets_say("after").await
    })
    .await;
    insta::assert_snapshot!(s.all_states().await);
}

/// An object that the class no longer names leaves volume and pod status, and a new one comes. With
/// the annotation, the driver sends the mounted versions, with which AWS's provider answers, too.
#[rstest]
#[case::without_versions(false)]
#[case::with_versions(true)]
#[tokio::test]
async fn the_class_changes(#[case] sends_versions: bool) {
    let s = scenario!(OFTEN);
    let class = |manners: &str, objects: &str| {
        let class = class_of(manners, objects);
        if sends_versions {
            class.annotation("secrets-store.csi.k8s.io/send-object-versions", "true")
        } else {
            class
        }
    };
    let before = "
        - {objectName: stays, content: a}
        - {objectName: goes, content: b}
        ";
    let after = "
        - {objectName: stays, content: a}
        - {objectName: comes, path: new/file, content: c}
        ";
    s.apply_classes(|manners| class(manners, before)).await;
    s.start_pods(pod_of).await;
    s.refreshed(2).await;
    s.apply_classes(|manners| class(manners, after)).await;
    s.reconciled_until("all read the new object", async || {
        s.all_read("new/file", "c").await
    })
    .await;
    s.refreshed(2).await;
    insta::assert_snapshot!("the_class_changes", s.all_states().await);
}

/// A provider whose identity may get a secret and not describe it fails only calls that bring
/// mounted versions. The driver then asks without them.
#[tokio::test]
async fn versions_that_may_not_be_described() {
    let s = scenario!(OFTEN);
    s.store("manners-described", "before", 1).await;
    s.apply_classes(|manners| {
        class_of(manners, "- {objectName: manners-described, path: pw}")
            .annotation("secrets-store.csi.k8s.io/send-object-versions", "true")
            .faults("- {describeDenied: true}")
    })
    .await;
    s.start_pods(pod_of).await;
    s.store("manners-described", "after", 2).await;
    s.reconciled_until("all read the new content", async || {
        s.all_read("pw", "after").await
    })
    .await;
    assert!(s.who_hear("MountRotationFailed").await.is_empty());
}

/// The pods hear of a provider's failure in its own words, and start once it works.
#[rstest]
#[case::missing("missing", "{code: NOT_FOUND, message: secret/user is not there}")]
#[case::denied("denied", "{code: PERMISSION_DENIED, message: role csi may not read}")]
#[tokio::test]
async fn the_first_mount_fails(#[case] name: &str, #[case] status: &str) {
    let s = Scenario::start().await;
    let objects = "- {objectName: user, content: alice}";
    let fault = format!("- {{status: {status}}}");
    s.apply_classes(|manners| class_of(manners, objects).faults(&fault))
        .await;
    let mut text = String::new();
    for manners in MANNERS {
        s.apply(pod_of(manners)).await;
    }
    for manners in MANNERS {
        let said = s.failed_mount(manners, "rpc error").await;
        text += &format!("{manners}: {said}\n");
    }
    insta::assert_snapshot!(format!("the_first_mount_fails_{name}"), text);
    assert!(s.pod_status_objects().await.is_empty());
    s.apply_classes(|manners| class_of(manners, objects)).await;
    for manners in MANNERS {
        s.ready(manners).await;
    }
    assert!(s.all_read("user", "alice").await);
}

/// While the store is away, volumes, pod statuses and Secrets stay. They follow once it is back.
#[tokio::test]
async fn the_store_is_away() {
    let s = scenario!(OFTEN);
    let class = |manners: &str, content: &str| {
        class_of(
            manners,
            &format!("- {{objectName: pw, content: {content}}}"),
        )
        .secret_objects([SecretObject::new(manners, &[("pw", "pw")])])
    };
    s.apply_classes(|manners| class(manners, "before")).await;
    s.start_pods(pod_of).await;
    let (volumes, statuses) = (s.all_volumes().await, s.status_versions().await);
    let away = "- {status: {code: UNAVAILABLE, message: the store does not answer}}";
    s.apply_classes(|manners| class(manners, "after").faults(away))
        .await;
    s.reconciled_until("all pods hear of it", async || {
        s.all_hear("MountRotationFailed").await
    })
    .await;
    assert_eq!(s.all_volumes().await, volumes);
    assert_eq!(s.status_versions().await, statuses);
    assert!(s.all_secrets_say("before").await);

    s.apply_classes(|manners| class(manners, "after")).await;
    s.reconciled_until("all read the new content", async || {
        s.all_read("pw", "after").await
            && s.all_secrets_say("after").await
            && s.all_hear("MountRotationComplete").await
    })
    .await;
}

/// A provider that is away loses nothing, and its volumes are refreshed when it is back.
#[tokio::test]
async fn the_provider_is_away() {
    let s = scenario!(OFTEN);
    s.apply_classes(|manners| class_of(manners, OBJECTS)).await;
    s.start_pods(pod_of).await;
    let (volumes, statuses) = (s.all_volumes().await, s.status_versions().await);
    let node = s.node();
    let provider = s.cluster.provider(&node, "fake-provider");
    provider.stop().await.unwrap();
    s.reconciled_until("all pods hear of it", async || {
        s.all_hear("MountRotationFailed").await
    })
    .await;
    assert_eq!(s.all_volumes().await, volumes);
    provider.start().await.unwrap();
    s.reconciled_until("all pods hear that it is over", async || {
        s.all_hear("MountRotationComplete").await
    })
    .await;
    s.refreshed(1).await;
    assert_eq!(s.all_volumes().await, volumes);
    assert_eq!(s.status_versions().await, statuses);
}

/// A pod that goes does not wait for a call that hangs.
#[tokio::test]
async fn a_pod_goes_during_a_call_that_hangs() {
    let s = scenario!(
        [
            OFTEN,
            &[Need::Embedded(
                "their kubelet unpublishes a volume when its publish has ended"
            )]
        ]
        .concat()
    );
    let objects = "- {objectName: user, content: alice}";
    s.apply_classes(|manners| class_of(manners, objects)).await;
    s.start_pods(pod_of).await;
    s.apply_classes(|manners| class_of(manners, objects).faults("- {hang: true}"))
        .await;
    s.refreshed(1).await;
    let started = std::time::Instant::now();
    for manners in MANNERS {
        s.namespace.delete_pod(manners).await.unwrap();
    }
    for manners in MANNERS {
        s.gone(manners).await;
    }
    s.nothing_is_left().await;
    let took = started.elapsed();
    assert!(took < Duration::from_secs(30), "{took:?}");
}
