//! Secrets with the content of volumes: they exist before the containers start, their users own
//! them, and the driver does not take over Secrets of others.

mod healing;
mod inputs;
mod owners;
mod trouble;

use std::{collections::BTreeMap, fmt::Write as _};

use e2e::{cluster::Cluster as _, namespace::Namespace};
use k8s_openapi::{
    api::{
        apps::v1::Deployment,
        core::v1::{Event, Pod, Secret},
    },
    apimachinery::pkg::apis::meta::v1::OwnerReference,
};
use kube::{
    ResourceExt as _,
    api::{Api, DeleteParams, ListParams, Patch, PatchParams},
};
use serde_json::{Value, json};

use crate::{
    harness::{Scenario, scenario, until},
    objects::{Class, MOUNT, SecretObject, class, deployment, job, pod, replica_set, stateful_set},
    settings::{Need, REFRESH_OFTEN},
};

/// A driver that checks Secrets and classes every second.
const OFTEN: Need = Need::Flags(&["--sync-interval=1s", "-v=5"]);

/// Annotations of the driver that differ from run to run.
const SINCE: &str = "secrets-store.csi.k8s.io/content-since";
const ORDER: &str = "secrets-store.csi.k8s.io/content-order";

/// Returns a class with one object, `password`, and the Secrets that are made from it.
fn syncing(name: &str, content: &str, secrets: impl IntoIterator<Item = SecretObject>) -> Class {
    let objects = format!("- {{objectName: password, content: {content}}}");
    class(name, &objects).secret_objects(secrets)
}

/// Returns the entry for a Secret `creds` with the key `pw`.
fn creds() -> SecretObject {
    SecretObject::new("creds", &[("pw", "password")])
        .with("labels", json!({"environment": "test"}))
        .with("annotations", json!({"note": "from the class"}))
}

impl Scenario {
    fn secrets_api(&self) -> Api<Secret> {
        self.namespace.api()
    }

    async fn secret(&self, name: &str) -> Option<Secret> {
        self.secrets_api().get_opt(name).await.unwrap()
    }

    /// Returns the text of a Secret's key, if both exist.
    async fn value(&self, secret: &str, key: &str) -> Option<String> {
        let data = self.secret(secret).await?.data?;
        Some(String::from_utf8(data.get(key)?.0.clone()).unwrap())
    }

    async fn secret_says(&self, secret: &str, key: &str, text: &str) {
        until(&format!("{secret} says {text:?}"), async || {
            self.value(secret, key).await.as_deref() == Some(text)
        })
        .await;
    }

    async fn owners(&self, secret: &str) -> Vec<OwnerReference> {
        let secret = self.secret(secret).await;
        secret.map_or_else(Vec::new, |secret| secret.owner_references().to_vec())
    }

    async fn owned_by(&self, secret: &str, count: usize) {
        until(&format!("{secret} has {count} owners"), async || {
            self.owners(secret).await.len() == count
        })
        .await;
    }

    async fn no_secret(&self, name: &str) {
        until(&format!("{name} is gone"), async || {
            self.secret(name).await.is_none()
        })
        .await;
    }

    async fn patch_secret(&self, name: &str, patch: Value) {
        let patch = Patch::Merge(patch);
        let (api, how) = (self.secrets_api(), PatchParams::default());
        api.patch(name, &how, &patch).await.unwrap();
    }

    async fn delete_deployment(&self, name: &str) {
        let api = self.namespace.api::<Deployment>();
        let background = DeleteParams::background();
        api.delete(name, &background).await.unwrap();
    }

    async fn scale(&self, name: &str, replicas: usize) {
        let api = self.namespace.api::<Deployment>();
        let patch = Patch::Merge(json!({"spec": {"replicas": replicas}}));
        let how = PatchParams::default();
        api.patch(name, &how, &patch).await.unwrap();
    }

    /// Returns the names of a Deployment's pods.
    async fn pods_of(&self, deployment: &str) -> Vec<String> {
        let api = self.namespace.api::<Pod>();
        let of = ListParams::default().labels(&format!("app={deployment}"));
        let pods = api.list(&of).await.unwrap();
        pods.iter().map(|pod| pod.name_any()).collect()
    }

    async fn all_ready(&self, deployment: &str, replicas: usize) -> Vec<String> {
        until(&format!("{deployment} has its pods"), async || {
            self.pods_of(deployment).await.len() == replicas
        })
        .await;
        let pods = self.pods_of(deployment).await;
        for pod in &pods {
            self.ready(pod).await;
        }
        pods
    }

    /// Returns the messages of a pod's events with a reason.
    async fn messages(&self, pod: &str, reason: &str) -> Vec<String> {
        let events = self.namespace.events(pod).await.unwrap();
        let of_reason = |event: &Event| event.reason.as_deref() == Some(reason);
        let events = events.into_iter().filter(of_reason);
        events
            .map(|event| self.redacted(&event.message.unwrap_or_default()))
            .collect()
    }

    /// Waits for the event that a Secret cannot be synced; returns its message.
    async fn failed_sync(&self, pod: &str, says: &str) -> String {
        until(&format!("{pod} hears {says:?}"), async || {
            let told = self.messages(pod, "FailedToCreateSecret").await;
            told.iter().any(|message| message.contains(says))
        })
        .await;
        let mut told = self.messages(pod, "FailedToCreateSecret").await;
        told.retain(|message| message.contains(says));
        told.remove(0)
    }

    /// Waits until the driver has checked everything again.
    async fn checked_again(&self) {
        tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    }

    /// Returns all Secrets of the namespace as text.
    async fn secrets(&self) -> String {
        let list = self.secrets_api().list(&ListParams::default()).await;
        let mut text = "secrets\n".to_owned();
        for secret in list.unwrap() {
            let mut owners: Vec<_> = secret
                .owner_references()
                .iter()
                .map(|o| {
                    let name = match o.kind.as_str() {
                        "ReplicaSet" => match o.name.rsplit_once('-') {
                            Some((deployment, _)) => format!("{deployment}-[hash]"),
                            None => o.name.clone(),
                        },
                        _ => o.name.clone(),
                    };
                    json!({"apiVersion": o.api_version, "kind": o.kind, "name": name, "controller": o.controller, "blockOwnerDeletion": o.block_owner_deletion})
                })
                .collect();
            owners.sort_by_key(ToString::to_string);
            let mut annotations = secret.annotations().clone();
            if let Some(since) = annotations.get_mut(SINCE) {
                since.parse::<jiff::Timestamp>().unwrap();
                *since = "[time]".to_owned();
            }
            if let Some(order) = annotations.get_mut(ORDER) {
                order.parse::<u64>().unwrap();
                *order = "[resource version]".to_owned();
            }
            let data = secret.data.clone().unwrap_or_default();
            let shown: BTreeMap<_, _> = data
                .iter()
                .map(|(key, value)| (key, String::from_utf8_lossy(&value.0)))
                .collect();
            let yaml = serde_saphyr::to_string(&json!({
                "name": secret.name_any(), "type": secret.type_, "labels": secret.labels(),
                "annotations": annotations, "owners": owners, "data": shown,
            }))
            .unwrap();
            for (number, line) in yaml
                .lines()
                .filter(|line| !line.ends_with(": null"))
                .enumerate()
            {
                writeln!(text, "  {} {line}", if number == 0 { "-" } else { " " }).unwrap();
            }
        }
        self.redacted(&text)
    }
}

/// Returns the class of upstream's cases 14 to 19 in `e2e-provider.bats` (`upstream.rs` explains
/// the names). Their Deployments have two pods each, whose environment needs the Secret.
fn foo_class(name: &str, secret: &str) -> Class {
    let secret = SecretObject::new(secret, &[("username", "foo")])
        .with("labels", json!({"environment": "test"}));
    class(name, "- {objectName: foo}\n- {objectName: fookey}").secret_objects([secret])
}

/// A Secret of two Deployments has both as owners, and is deleted with the last one.
#[tokio::test]
async fn ep_14_to_16_two_deployments_and_one_secret() {
    let s = Scenario::start().await;
    s.apply(foo_class("e2e-provider-sync", "foosecret")).await;
    let pod = pod("busybox", &["e2e-provider-sync"]).env("foosecret", "username");
    for name in ["busybox-deployment", "busybox-deployment-two"] {
        s.apply(deployment(name, 2, &pod)).await;
    }
    for name in ["busybox-deployment", "busybox-deployment-two"] {
        for pod in s.all_ready(name, 2).await {
            let tree = s.reads(&pod, MOUNT).await;
            assert_eq!(tree.texts()["foo"], "secret");
            // The Secret existed at the container's first start.
            assert_eq!(s.messages(&pod, "Failed").await, Vec::<String>::new());
        }
    }
    assert_eq!(s.owners("foosecret").await.len(), 2, "without waiting");
    insta::assert_snapshot!(s.secrets().await);
    let uid = s.secret("foosecret").await.unwrap().uid();
    s.delete_deployment("busybox-deployment").await;
    s.owned_by("foosecret", 1).await;
    assert_eq!(s.secret("foosecret").await.unwrap().uid(), uid);
    s.delete_deployment("busybox-deployment-two").await;
    s.no_secret("foosecret").await;
    // It is not created again for pods that end.
    s.nothing_is_left().await;
    assert!(s.secret("foosecret").await.is_none());
}

/// A pod uses the class of its own namespace; no Secret is created in another one.
#[tokio::test]
async fn ep_17_to_19_classes_of_one_name_in_two_namespaces() {
    let s = Scenario::start().await;
    let elsewhere = Namespace::create(&s.cluster).await.unwrap();
    let class = foo_class("e2e-provider-sync", "foosecret");
    let invalid = class.clone().provider("invalidprovider");
    s.apply(invalid.namespace(elsewhere.name())).await;
    s.apply(&class).await;
    let pod = pod("busybox", &["e2e-provider-sync"]).env("foosecret", "username");
    s.apply(deployment("busybox-deployment", 2, &pod)).await;
    s.all_ready("busybox-deployment", 2).await;
    assert_eq!(s.value("foosecret", "username").await.unwrap(), "secret");
    assert_eq!(s.owners("foosecret").await.len(), 1);
    let others = elsewhere.api::<Secret>();
    assert!(others.get_opt("foosecret").await.unwrap().is_none());
    s.delete_deployment("busybox-deployment").await;
    s.no_secret("foosecret").await;
}

/// A bare pod has no controller: its pod statuses own its Secrets. These are the cases 22 and 23 of
/// upstream's `e2e-provider.bats`.
#[tokio::test]
async fn ep_22_and_23_a_bare_pod_with_two_classes() {
    let s = Scenario::start().await;
    for number in [0, 1] {
        let secret = format!("foosecret-{number}");
        let name = format!("e2e-provider-spc-{number}");
        s.apply(foo_class(&name, &secret)).await;
    }
    let pod = pod("multi", &["e2e-provider-spc-0", "e2e-provider-spc-1"]);
    s.apply(&pod).await;
    s.ready("multi").await;
    insta::assert_snapshot!(s.secrets().await);
    s.delete("multi").await;
    s.no_secret("foosecret-0").await;
    s.no_secret("foosecret-1").await;
    s.no_pod_statuses().await;
}
