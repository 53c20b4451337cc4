//! Real providers, unmodified, against fakes of their stores.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use e2e::{
    cluster::Cluster as _,
    providers::{self, Object, Provider, Provider::*},
    stores::{Call, Command, Disturbance, HUNG},
};
use rstest::rstest;
use serde_json::json;

use crate::{
    harness::{SOON, Scenario, until},
    objects::{Class, MOUNT, Pod, pod},
    settings::{Need, REFRESH_OFTEN, TokenPlace},
};

/// The audiences of [`Provider::audience`].
const AUDIENCES: &[&str] = &[
    "vault",
    "openbao",
    "sts.amazonaws.com",
    "api://AzureADTokenExchange",
    "shop.svc.id.goog",
];
const DEFAULT_MODE: &str = "secrets-store.csi.k8s.io/default-mode";

/// A cluster with a real provider.
struct Real {
    s: Scenario,
    provider: Provider,
    /// The directory of its stores.
    stores: PathBuf,
}

impl Real {
    /// Starts a cluster with a provider whose store has a password.
    async fn start(provider: Provider, also: &[Need]) -> Option<Self> {
        let needs = [
            Need::RealProvider(provider),
            Need::Tokens {
                audiences: AUDIENCES,
                place: TokenPlace::Context,
            },
            Need::Republish,
            REFRESH_OFTEN,
            Need::Flags(&["--rotation-backoff=1s", "--rotation-backoff-max=2s"]),
            Need::Kept,
        ];
        let s = Scenario::needing(&[&needs, also].concat()).await?;
        let node = s.node();
        let stores = s.cluster.disk(&node, &provider.stores()).unwrap();
        until("the provider has a socket", async || {
            let tree = s.cluster.node_tree(&node, &provider.socket()).await;
            tree.unwrap().is_some()
        })
        .await;
        let real = Self {
            s,
            provider,
            stores,
        };
        providers::wait_stores(&real.stores).await.unwrap();
        real.tell(Command::Reset).await;
        real.tell(Command::Clear).await;
        providers::annotate_account(&real.s.namespace)
            .await
            .unwrap();
        real.put("password", "hunter2").await;
        Some(real)
    }

    async fn put(&self, file: &str, value: &str) {
        let put = providers::put(&self.stores, self.provider, file, value).await;
        put.unwrap();
    }

    async fn tell(&self, command: Command) -> Vec<Call> {
        providers::tell(&self.stores, &command).await.unwrap()
    }

    async fn disturb(&self, disturbance: Disturbance) {
        let service = self.provider.store();
        self.tell(Command::Disturb {
            service,
            disturbance,
        })
        .await;
    }

    /// A class that mounts objects as files.
    fn class(&self, files: &[&str]) -> Class {
        let objects: Vec<_> = files.iter().copied().map(Object::new).collect();
        let spec = json!({
            "provider": self.provider.name(),
            "parameters": self.provider.parameters(&objects, true),
        });
        Class::of("shop", spec)
    }

    /// Mounts the password in a pod.
    async fn mounted(&self, pod: Pod) {
        self.s.apply(self.class(&["password"])).await;
        self.s.apply(pod).await;
        self.s.ready("web").await;
    }

    async fn reads(&self, text: &str) {
        until(&format!("the pod reads {text}"), async || {
            let tree = self.s.reads("web", MOUNT).await;
            tree.texts().get("password") == Some(&text)
        })
        .await;
    }

    /// Returns how often the provider was called for a refresh that succeeded.
    async fn refreshes(&self) -> f64 {
        self.s.metric("rotation_reconcile_total", &[]).await
    }

    /// Compares a text with the snapshot of the provider.
    fn compare(&self, name: &str, text: &str) {
        let mut settings = insta::Settings::clone_current();
        settings.set_snapshot_suffix(self.provider.name());
        settings.bind(|| insta::assert_snapshot!(name, text));
    }
}

macro_rules! real {
    ($provider:expr $(, $need:expr)*) => {
        match Real::start($provider, &[$($need),*]).await {
            Some(real) => real,
            None => return,
        }
    };
}

/// The files, their modes, and the pod status.
#[rstest]
#[tokio::test]
async fn a_first_mount(#[values(Vault, OpenBao, Aws, Azure, Gcp)] provider: Provider) {
    let r = real!(provider);
    r.mounted(pod("web", &["shop"])).await;
    // The AWS provider writes files itself, so that there is no directory of the driver to check.
    let state = match provider {
        Aws => r.s.listing("web", MOUNT).await + &r.s.pod_statuses().await,
        _ => r.s.state("web").await,
    };
    r.compare("first_mount", &state);
    r.s.delete("web").await;
    r.s.nothing_is_left().await;
}

/// The volume's mode replaces the one that all providers copy from the request.
#[rstest]
#[tokio::test]
async fn a_default_mode(#[values(Vault, OpenBao, Aws, Azure, Gcp)] provider: Provider) {
    let r = real!(provider);
    let pod = pod("web", &["shop"]).attribute(DEFAULT_MODE, "0440");
    r.mounted(pod).await;
    let tree = r.s.reads("web", MOUNT).await;
    let file = tree.entries.iter().find(|entry| entry.path == "password");
    assert_eq!(file.unwrap().mode.to_string(), "0440");
}

/// A changed secret reaches the pod; an unchanged one is not written again.
#[rstest]
#[tokio::test]
async fn a_rotation(#[values(Vault, OpenBao, Aws, Azure, Gcp)] provider: Provider) {
    let r = real!(provider);
    r.mounted(pod("web", &["shop"])).await;
    r.put("password", "correct horse").await;
    r.reads("correct horse").await;
    let (before, refreshes) = (r.s.settled_disk("web", MOUNT).await, r.refreshes().await);
    until("it is refreshed again", async || {
        r.refreshes().await > refreshes + 2.0
    })
    .await;
    assert_eq!(r.s.settled_disk("web", MOUNT).await, before);
}

#[rstest]
#[tokio::test]
async fn a_secret_that_does_not_exist(
    #[values(Vault, OpenBao, Aws, Azure, Gcp)] provider: Provider,
) {
    let r = real!(provider);
    r.s.apply(r.class(&["missing"])).await;
    r.s.apply(pod("web", &["shop"])).await;
    r.compare("missing_secret", &r.s.failed_mount("web", "missing").await);
    r.put("missing", "found").await;
    r.s.ready("web").await;
}

/// A refusal does not take the content away from a pod that has it.
#[rstest]
#[tokio::test]
async fn a_denied_secret(#[values(Vault, OpenBao, Aws, Azure, Gcp)] provider: Provider) {
    let r = real!(provider);
    r.mounted(pod("web", &["shop"])).await;
    let operation = match provider {
        Vault | OpenBao => "read",
        Aws => "GetSecretValue",
        Azure => "GetSecret",
        Gcp => "AccessSecretVersion",
    };
    r.tell(Command::Deny {
        service: provider.store(),
        operation: operation.to_owned(),
    })
    .await;
    r.s.apply(pod("late", &["shop"])).await;
    r.compare(
        "denied_secret",
        &r.s.failed_mount("late", "rpc error").await,
    );
    r.reads("hunter2").await;
    r.tell(Command::Reset).await;
    r.s.ready("late").await;
}

#[rstest]
#[tokio::test]
async fn a_store_that_goes_away_and_comes_back(
    #[values(Vault, OpenBao, Aws, Azure, Gcp)] provider: Provider,
) {
    let r = real!(provider);
    r.mounted(pod("web", &["shop"])).await;
    r.disturb(Disturbance::Away).await;
    r.put("password", "correct horse").await;
    until("a refresh fails", async || {
        let events = r.s.namespace.events("web").await.unwrap();
        let mut reasons = events.iter().filter_map(|event| event.reason.as_deref());
        reasons.any(|reason| reason == "MountRotationFailed")
    })
    .await;
    r.reads("hunter2").await;
    r.disturb(Disturbance::None).await;
    r.reads("correct horse").await;
}

#[rstest]
#[tokio::test]
async fn a_provider_that_is_killed(#[values(Vault, OpenBao, Aws, Azure, Gcp)] provider: Provider) {
    let r = real!(provider);
    r.mounted(pod("web", &["shop"])).await;
    let container = provider.container();
    let killed = r.s.cluster.provider(&r.s.node(), &container).kill().await;
    killed.unwrap();
    r.put("password", "correct horse").await;
    r.reads("correct horse").await;
}

/// A pod goes at once although its provider waits for a store that never answers.
#[rstest]
#[tokio::test]
async fn an_unpublish_during_a_hung_call(
    #[values(Vault, OpenBao, Aws, Azure, Gcp)] provider: Provider,
) {
    let waits = "their kubelet unpublishes a volume when its publish has ended";
    let r = real!(provider, Need::Embedded(waits));
    r.disturb(Disturbance::Hang).await;
    r.s.apply(r.class(&["password"])).await;
    r.s.apply(pod("web", &["shop"])).await;
    until("the store does not answer the provider", async || {
        let calls = r.tell(Command::Calls).await;
        calls.iter().any(|call| call.operation == HUNG)
    })
    .await;
    let started = Instant::now();
    r.s.delete("web").await;
    r.s.nothing_is_left().await;
    let took = started.elapsed();
    assert!(took < Duration::from_secs(30).min(SOON), "{took:?}");
}
