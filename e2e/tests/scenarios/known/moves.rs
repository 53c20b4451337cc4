//! The move from the existing driver to this one and back, under running pods of real providers.
//!
//! Programs in the pods read their secrets all the time. No file, mount, pod status or Secret may be lost,
//! and each driver refreshes and unpublishes what the other one has published.
//!
//! Two promises of this driver end with the move back, and are not checked there. The existing driver
//! replaces a Secret as a whole at every refresh, and gives it its owners again only seconds later, so that
//! a Secret may outlive its last pod. And it removes old content at once, so that a program which opens a
//! file in just that moment may not find it: readers pause between their rounds.

use std::time::Duration;

use e2e::{
    cluster::Cluster as _,
    images,
    install::Installation,
    manifest::add_arguments,
    previous,
    providers::{self, Object, Provider},
    reader::Reader,
};
use futures::future::join_all;
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::{ResourceExt, api::ListParams};
use serde_json::json;

use super::stage::TOKENS;
use crate::{
    harness::{Scenario, scenario, until},
    objects::{Class, MOUNT, SecretObject, pod},
    settings::{Need, change_tokens},
};

/// The flags with which each driver refreshes often.
const EXISTING: &[&str] = &[
    "--enable-secret-rotation=true",
    "--rotation-poll-interval=1s",
];
const OURS: &[&str] = &[
    "--enable-secret-rotation=true",
    "--rotation-poll-interval=1s",
    "--min-rotation-poll-interval=1s",
];
/// The time in which kubelet publishes every volume again.
const A_FEW_LOOKS: Duration = Duration::from_secs(3);
/// The time that a move and a rotation may take.
const MOVE: Duration = Duration::from_secs(300);
/// The pause of a reader.
const PAUSE: Duration = Duration::from_millis(5);

/// Everything of the pods that a move must not change.
#[derive(Debug, PartialEq)]
struct State {
    /// What the pods read.
    trees: Vec<e2e::tree::Tree>,
    /// The lines of the mount table, without their options.
    mounts: Vec<String>,
    /// The pod statuses as text, and their UIDs.
    statuses: (String, Vec<String>),
    /// Names, UIDs and values of the Secrets.
    secrets: Vec<(String, String, String)>,
}

/// A cluster with pods of all providers.
struct Pods {
    s: Scenario,
}

impl Pods {
    /// Stores a number for each provider, in the form that readers understand.
    async fn put(&self, number: u64) {
        for provider in Provider::ALL {
            let stores = self
                .s
                .cluster
                .disk(&self.s.node(), &provider.stores())
                .unwrap();
            let value = format!("{number} ").repeat(3);
            let put = providers::put(&stores, provider, "password", value.trim());
            put.await.unwrap();
        }
    }

    /// Applies the classes, and a pod of each provider.
    async fn apply(&self) {
        for provider in Provider::ALL {
            let name = provider.name();
            let parameters = provider.parameters(&[Object::new("password")], true);
            let secret = SecretObject::new(name, &[("password", "password")]);
            let class = Class::of(name, json!({"provider": name, "parameters": parameters}));
            self.s.apply(class.secret_objects([secret])).await;
            self.s.apply(pod(&of(provider), &[name])).await;
        }
        for provider in Provider::ALL {
            self.s.ready(&of(provider)).await;
        }
    }

    /// Runs a pod with a volume of each provider.
    async fn with_all(&self, name: &str) {
        self.s
            .apply(pod(name, &Provider::ALL.map(Provider::name)))
            .await;
        self.s.ready(name).await;
    }

    async fn state(&self) -> State {
        let mut trees = Vec::new();
        for provider in Provider::ALL {
            trees.push(self.s.reads(&of(provider), MOUNT).await);
        }
        let mounts = self.s.mounts().await.into_iter();
        let without_options = |line: String| line.split(" - ").next().unwrap().to_owned();
        let uids = self.s.pod_status_objects().await;
        let mut uids: Vec<_> = uids.iter().filter_map(ResourceExt::uid).collect();
        uids.sort();
        State {
            trees,
            mounts: mounts.map(without_options).collect(),
            statuses: (self.s.pod_statuses().await, uids),
            secrets: self.secrets().await,
        }
    }

    async fn secrets(&self) -> Vec<(String, String, String)> {
        let secrets = self.s.namespace.api::<Secret>();
        let secrets = secrets.list(&ListParams::default()).await.unwrap();
        let of_secret = |secret: Secret| {
            let value = secret.data.as_ref()?.get("password")?.0.clone();
            let value = String::from_utf8(value).unwrap();
            Some((secret.name_any(), secret.uid().unwrap(), value))
        };
        secrets.into_iter().filter_map(of_secret).collect()
    }

    /// Waits until the Secrets of all providers have a number.
    async fn secrets_have(&self, number: u64) {
        until(&format!("the Secrets have {number}"), async || {
            let secrets = self.secrets().await;
            let has = |value: &str| value.starts_with(&number.to_string());
            secrets.len() == Provider::ALL.len() && secrets.iter().all(|(.., value)| has(value))
        })
        .await;
    }

    /// Installs a driver, and rotates every secret after that. Until the pods have read the next
    /// number, they read all the time, without a gap.
    async fn move_to(&self, driver: &Installation, number: u64, taken_over: impl AsyncFn()) {
        let before = self.state().await;
        let reader = Reader {
            files: vec!["password".to_owned()],
            last: number,
            limit: MOVE,
            pause: PAUSE,
        };
        let namespace = self.s.namespace.name();
        let pods = Provider::ALL.map(of);
        let readings = pods
            .iter()
            .map(|pod| self.s.cluster.read(namespace, pod, MOUNT, &reader));
        let moved = async {
            self.s.cluster.install(driver).await;
            taken_over().await;
            tokio::time::sleep(A_FEW_LOOKS).await;
            assert_eq!(self.state().await, before);
            self.put(number).await;
        };
        let (readings, ()) = tokio::join!(join_all(readings), moved);
        for (pod, readings) in pods.iter().zip(readings) {
            let readings = readings.unwrap();
            assert_eq!(readings.gaps, [""; 0], "{pod}: {readings:?}");
            assert_eq!(readings.mixtures, [""; 0], "{pod}: {readings:?}");
            let seen = (readings.numbers, readings.last);
            assert_eq!(seen, (2, number), "{pod}: {readings:?}");
        }
        self.secrets_have(number).await;
        let after = self.state().await;
        assert_eq!(after.mounts, before.mounts);
        assert_eq!(after.statuses.1, before.statuses.1);
        let uids = |state: &State| -> Vec<_> {
            let secrets = state.secrets.iter();
            secrets.map(|(_, uid, _)| uid.clone()).collect()
        };
        assert_eq!(uids(&after), uids(&before));
    }

    /// Deletes a pod; returns when nothing of its volumes is left but records of this driver.
    async fn delete(&self, name: &str) {
        let pods = self.s.namespace.api::<Pod>();
        let uid = pods.get(name).await.unwrap().uid().unwrap();
        self.s.delete(name).await;
        let node = self.s.node();
        until(&format!("nothing of {name} is left"), async || {
            let mounts = self.s.mounts().await;
            let directory = format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~csi");
            let tree = self.s.cluster.node_tree(&node, directory.as_ref());
            let statuses = self.s.pod_status_objects().await;
            !mounts.iter().any(|line| line.contains(&uid))
                && tree.await.unwrap().is_none()
                && !statuses
                    .iter()
                    .any(|status| status.data["status"]["podName"] == name)
        })
        .await;
    }
}

/// Returns the name of a provider's pod.
fn of(provider: Provider) -> String {
    format!("web-{}", provider.name())
}

/// Adds flags of the driver, and the tokens for which providers ask, as an operator does in both charts.
fn configured(mut installation: Installation, flags: &[&str]) -> Installation {
    let manifests = &mut installation.manifests;
    add_arguments(manifests, "secrets-store", flags).unwrap();
    change_tokens(manifests, &[TOKENS]).unwrap();
    installation
}

#[tokio::test]
async fn from_the_existing_driver_and_back() {
    let providers = Provider::ALL.map(Need::RealProvider);
    let others = [
        Need::ExistingDriver,
        Need::Controllers,
        Need::Republish,
        TOKENS,
    ];
    let s = scenario!([&others[..], &providers].concat());
    let images = tokio::task::spawn_blocking(|| images::build(|_| {}));
    let probe = images.await.unwrap().unwrap().probe;
    let existing = previous::upstream(&previous::upstream_driver(), &probe);
    let existing = existing.unwrap_or_else(|error| panic!("{error}"));
    let existing = configured(existing, EXISTING);
    let ours = configured(s.cluster.standard(), OURS);
    let pods = Pods { s };
    let s = &pods.s;

    s.cluster.install(&existing).await;
    for provider in Provider::ALL {
        let stores = s.cluster.disk(&s.node(), &provider.stores()).unwrap();
        providers::wait_stores(&stores).await.unwrap();
    }
    providers::annotate_account(&s.namespace).await.unwrap();
    pods.put(1).await;
    pods.apply().await;
    pods.with_all("early").await;
    pods.secrets_have(1).await;

    let volumes = 2 * Provider::ALL.len();
    pods.move_to(&ours, 2, async || {
        until("this driver has a record of each volume", async || {
            s.records().await.len() == volumes
        })
        .await;
    })
    .await;
    pods.delete("early").await;
    pods.with_all("late").await;
    assert_eq!(s.records().await.len(), volumes);

    pods.move_to(&existing, 3, async || ()).await;
    pods.delete("late").await;
    pods.with_all("last").await;
    pods.delete("last").await;
    for provider in Provider::ALL {
        pods.delete(&of(provider)).await;
    }

    // The records of pods that the existing driver has unpublished contain no secret, and go when this
    // driver starts again.
    s.cluster.install_standard().await;
    until("no record is left", async || s.records().await.is_empty()).await;
    s.nothing_of_the_driver_is_left().await;
}
