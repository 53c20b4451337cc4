//! Providers with stores, which are told alike whether the providers are real ones or the fake one with
//! their manners.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fmt::{self, Write as _},
    path::PathBuf,
    time::Duration,
};

use e2e::{
    cluster::Cluster as _,
    providers::{self, Object, Provider},
    stores::{Command, Disturbance, HUNG, Service},
    tree::Tree,
};
use k8s_openapi::api::core::v1::Secret;
use serde_json::{Value, json};

use crate::{
    harness::{Scenario, until},
    objects::{Class, MOUNT, Pod, class, pod},
    settings::{Need, REFRESH_OFTEN, TokenPlace},
};

/// The audiences of [`Provider::audience`].
/// The annotations with which a pod status says that refreshes fail.
const TROUBLES: [&str; 2] = [
    "secrets-store.csi.k8s.io/stale-since",
    "secrets-store.csi.k8s.io/stale-reason",
];
const AUDIENCES: &[&str] = &[
    "vault",
    "openbao",
    "sts.amazonaws.com",
    "api://AzureADTokenExchange",
    "shop.svc.id.goog",
];
/// Tokens for all providers, where kubelet has put them in all versions.
pub const TOKENS: Need = Need::Tokens {
    audiences: AUDIENCES,
    place: TokenPlace::Context,
};
/// The same in the place of newer versions.
pub const TOKENS_IN_SECRETS: Need = Need::Tokens {
    audiences: AUDIENCES,
    place: TokenPlace::Secrets,
};

/// The providers of a scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cast {
    /// A real one.
    Real(Provider),
    /// The fake one with the manners of all.
    Manners,
}

impl Cast {
    /// Returns the cast of a name in the table of scenarios.
    pub fn named(name: &str) -> Self {
        let mut all = Provider::ALL.into_iter();
        all.find(|provider| provider.name() == name)
            .map_or(Self::Manners, Self::Real)
    }

    /// Returns the real provider, for scenarios over real ones only.
    pub fn real(self) -> Provider {
        match self {
            Self::Real(provider) => provider,
            Self::Manners => panic!("the scenario is over real providers"),
        }
    }
}

/// An operation that a store refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Secrets are not read.
    Read,
    /// AWS's secrets are read and not described.
    Describe,
    /// Nobody logs in. Only with real providers.
    Login,
}

/// A cluster with providers and their stores. Each provider has a class and a pod of its name.
pub struct Stage {
    pub s: Scenario,
    pub providers: Vec<Provider>,
    /// The directory of the stores; none with the fake provider.
    stores: Option<PathBuf>,
    /// How often each object was stored.
    stored: RefCell<BTreeMap<String, u32>>,
}

impl Stage {
    /// Starts a cluster with providers that get tokens from kubelet.
    pub async fn start(cast: Cast, needs: &[Need]) -> Option<Self> {
        match cast {
            Cast::Real(_) => Self::with(cast, &[&[TOKENS], needs].concat()).await,
            Cast::Manners => Self::with(cast, needs).await,
        }
    }

    /// Starts a cluster with providers, which is as new for them. The driver refreshes at every publish,
    /// and retries within seconds.
    pub async fn with(cast: Cast, needs: &[Need]) -> Option<Self> {
        let often = Need::Flags(&["--rotation-backoff=1s", "--rotation-backoff-max=2s"]);
        let mut all = vec![Need::Kept, Need::Republish, REFRESH_OFTEN, often];
        if let Cast::Real(provider) = cast {
            all.push(Need::RealProvider(provider));
        }
        all.extend(needs);
        let s = Scenario::needing(&all).await?;
        let (stores, providers) = match cast {
            Cast::Manners => (None, Provider::ALL.to_vec()),
            Cast::Real(provider) => {
                wait_for_socket(&s, provider).await;
                let stores = s.cluster.disk(&s.node(), &provider.stores());
                providers::annotate_account(&s.namespace).await.unwrap();
                (stores, vec![provider])
            }
        };
        let stage = Self {
            s,
            providers,
            stores,
            stored: RefCell::default(),
        };
        if let Some(stores) = &stage.stores {
            providers::wait_stores(stores).await.unwrap();
            stage.tell(Command::Clear).await;
            stage.tell(Command::Reset).await;
        } else {
            stage.s.provider_control("/reset").await;
        }
        Some(stage)
    }

    async fn tell(&self, command: Command) -> Vec<e2e::stores::Call> {
        let stores = self.stores.as_ref().unwrap();
        providers::tell(stores, &command).await.unwrap()
    }

    /// Lets the fake provider fail all calls.
    async fn faults(&self, faults: &str) {
        let path = format!("/faults?set={}", encoded(faults));
        self.s.provider_control(&path).await;
    }

    /// Stores a value as the next version of an object.
    pub async fn put(&self, name: &str, value: &str) {
        let number = {
            let mut stored = self.stored.borrow_mut();
            let number = stored.entry(name.to_owned()).or_default();
            *number += 1;
            *number
        };
        match &self.stores {
            Some(stores) => {
                let put = providers::put(stores, self.providers[0], name, value);
                put.await.unwrap();
            }
            None => {
                let value = encoded(value);
                let path = format!("/objects?name={name}&content={value}&version={number}");
                self.s.provider_control(&path).await;
            }
        }
    }

    /// Stores a value in a store that only a real provider has.
    pub async fn put_in(&self, service: Service, name: &str, value: &str) {
        let (name, value) = (name.to_owned(), value.to_owned());
        self.tell(Command::Put {
            service,
            name,
            value,
        })
        .await;
    }

    /// Refuses an operation to everybody, until [`Stage::recover`].
    pub async fn refuse(&self, refused: Refused) {
        if self.stores.is_none() {
            let fault = match refused {
                Refused::Read => "[{status: {code: PERMISSION_DENIED}}]",
                Refused::Describe => "[{describeDenied: true}]",
                Refused::Login => panic!("nobody logs in to the fake provider's store"),
            };
            return self.faults(fault).await;
        }
        let provider = self.providers[0];
        let (service, operation) = match refused {
            Refused::Read => (provider.store(), provider.read()),
            Refused::Describe => (provider.store(), "DescribeSecret"),
            Refused::Login => provider.login(),
        };
        let operation = operation.to_owned();
        self.tell(Command::Deny { service, operation }).await;
    }

    /// Disturbs the store, until [`Stage::recover`].
    pub async fn disturb(&self, disturbance: Disturbance) {
        if self.stores.is_some() {
            let service = self.providers[0].store();
            self.tell(Command::Disturb {
                service,
                disturbance,
            })
            .await;
            return;
        }
        let fault = match disturbance {
            Disturbance::Hang => "[{hang: true}]",
            _ => "[{status: {code: UNAVAILABLE, message: the store does not answer}}]",
        };
        self.faults(fault).await;
    }

    /// Ends all refusals and disturbances.
    pub async fn recover(&self) {
        match self.stores {
            Some(_) => drop(self.tell(Command::Reset).await),
            None => self.faults("[]").await,
        }
    }

    /// Waits until a provider has called a store that hangs. Where all pods have one provider, the driver
    /// may let some of its calls wait for others.
    pub async fn hangs(&self) {
        until("a call hangs", async || match self.stores {
            Some(_) => {
                let calls = self.tell(Command::Calls).await;
                calls.iter().any(|call| call.operation == HUNG)
            }
            None => {
                let counts = self.s.provider_counts().await;
                counts["inFlight"].as_u64() > Some(0)
            }
        })
        .await;
    }

    /// Kills the provider; returns when it is there again. The fake one has lost its objects then.
    pub async fn kill(&self) {
        let name = match self.stores {
            Some(_) => self.providers[0].container(),
            None => "fake-provider".to_owned(),
        };
        let node = self.s.node();
        let provider = self.s.cluster.provider(&node, &name);
        provider.kill().await.unwrap();
        if self.stores.is_none() {
            self.serves().await;
        }
    }

    /// Waits until the fake provider, which was started again, can be told something.
    pub async fn serves(&self) {
        let node = self.s.node();
        let provider = self.s.cluster.provider(&node, "fake-provider");
        until("the provider serves HTTP", async || {
            provider.get(8080, "/calls").await.is_ok()
        })
        .await;
    }

    /// Returns a class of a provider's name that mounts objects.
    pub fn class(&self, provider: Provider, objects: &[Object<'_>]) -> Class {
        if self.stores.is_some() {
            let parameters = provider.parameters(objects, true);
            let spec = json!({"provider": provider.name(), "parameters": parameters});
            return Class::of(provider.name(), spec);
        }
        let entry = |object: &Object<'_>| json!({"objectName": object.name, "path": object.path, "mode": object.mode});
        let mut entries = String::new();
        for object in objects {
            let Value::Object(mut fields) = entry(object) else {
                unreachable!()
            };
            fields.retain(|_, value| !value.is_null());
            writeln!(entries, "- {}", Value::Object(fields)).unwrap();
        }
        class(provider.name(), &entries).parameter("manners", provider.name())
    }

    /// Applies a class for each provider.
    pub async fn classes(&self, objects: &[Object<'_>]) {
        self.classes_with(objects, |_, class| class).await;
    }

    /// Applies a class for each provider, with something added.
    pub async fn classes_with(
        &self,
        objects: &[Object<'_>],
        add: impl Fn(Provider, Class) -> Class,
    ) {
        for provider in &self.providers {
            let class = add(*provider, self.class(*provider, objects));
            self.s.apply(class).await;
        }
    }

    /// Applies a pod for each provider, with something added.
    pub async fn pods(&self, add: impl Fn(Pod) -> Pod) {
        for provider in &self.providers {
            let pod = pod(provider.name(), &[provider.name()]);
            self.s.apply(add(pod)).await;
        }
    }

    /// Waits until all pods run.
    pub async fn ready(&self) {
        for provider in &self.providers {
            self.s.ready(provider.name()).await;
        }
    }

    /// Applies classes that mount objects, and a pod for each; waits until all run.
    pub async fn mounted(&self, objects: &[Object<'_>]) {
        self.classes(objects).await;
        self.pods(|pod| pod).await;
        self.ready().await;
    }

    /// Deletes all pods; waits until nothing is left.
    pub async fn unmounted(&self) {
        for provider in &self.providers {
            let deleted = self.s.namespace.delete_pod(provider.name()).await;
            deleted.unwrap();
        }
        for provider in &self.providers {
            self.s.gone(provider.name()).await;
        }
        self.s.nothing_is_left().await;
    }

    /// Waits until something holds, and makes kubelet publish all volumes meanwhile.
    pub async fn until(&self, what: &str, holds: impl AsyncFn() -> bool) {
        until(what, async || {
            for provider in &self.providers {
                let reconciled = self.s.namespace.reconcile(provider.name()).await;
                reconciled.unwrap();
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
            holds().await
        })
        .await;
    }

    /// Waits until all pods read a text in a file.
    pub async fn all_read(&self, file: &str, text: &str) {
        self.until(&format!("all read {text} in {file}"), async || {
            for provider in &self.providers {
                let tree = self.s.reads(provider.name(), MOUNT).await;
                if tree.texts().get(file) != Some(&text) {
                    return false;
                }
            }
            true
        })
        .await;
    }

    /// Waits until each volume has been refreshed twice again.
    pub async fn refreshed(&self) {
        let before = self.refreshes().await;
        self.until("all volumes are refreshed", async || {
            let now = self.refreshes().await;
            now.iter()
                .zip(&before)
                .all(|(now, before)| now >= &(before + 2.0))
        })
        .await;
    }

    /// Returns how often the volumes of each provider were refreshed, or its calls for each pod.
    async fn refreshes(&self) -> Vec<f64> {
        if self.stores.is_some() {
            return vec![self.s.metric("rotation_reconcile_total", &[]).await];
        }
        let counts = self.s.provider_counts().await;
        let calls = |provider: &Provider| {
            let pod = format!("{}/{}", self.s.namespace, provider.name());
            counts["mountCallsByPod"][pod].as_f64().unwrap_or_default()
        };
        self.providers.iter().map(calls).collect()
    }

    /// Returns the names of the providers whose pods have an event with a reason.
    pub async fn who_hear(&self, reason: &str) -> Vec<&'static str> {
        let mut pods = Vec::new();
        for provider in &self.providers {
            let events = self.s.namespace.events(provider.name()).await.unwrap();
            if events.iter().any(|e| e.reason.as_deref() == Some(reason)) {
                pods.push(provider.name());
            }
        }
        pods
    }

    /// Waits until all pods have an event with a reason.
    pub async fn all_hear(&self, reason: &str) {
        self.until(&format!("all pods hear {reason}"), async || {
            self.who_hear(reason).await.len() == self.providers.len()
        })
        .await;
    }

    /// Waits until the Secret of each provider's name has a text.
    pub async fn all_secrets_say(&self, text: &str) {
        let secrets = self.s.namespace.api::<Secret>();
        self.until(&format!("all Secrets say {text}"), async || {
            for provider in &self.providers {
                let secret = secrets.get_opt(provider.name()).await.unwrap();
                let data = secret.and_then(|secret| secret.data).unwrap_or_default();
                if data.get("pw").map(|value| &value.0[..]) != Some(text.as_bytes()) {
                    return false;
                }
            }
            true
        })
        .await;
    }

    /// Returns what is written when content changes: the volumes on disk, and the pod statuses. An API server
    /// that is slow for a moment leaves a trace on a pod status, which does not count.
    pub async fn written(&self) -> (Vec<Tree>, Vec<Value>) {
        let statuses = self.s.pod_status_objects().await;
        let without_trouble = statuses.into_iter().map(|mut status| {
            let metadata = &mut status.metadata;
            (metadata.resource_version, metadata.managed_fields) = (None, None);
            let annotations = metadata.annotations.get_or_insert_default();
            annotations.retain(|key, _| !TROUBLES.contains(&key.as_str()));
            json!(status)
        });
        (self.disks().await, without_trouble.collect())
    }

    /// Returns what trouble with a refresh leaves as it is: the volumes on disk, and what the pod statuses
    /// say of them. That they are stale stands in annotations.
    pub async fn kept(&self) -> (Vec<Tree>, Vec<Value>) {
        let statuses = self.s.pod_status_objects().await;
        let said = statuses.into_iter().map(|s| s.data["status"].clone());
        (self.disks().await, said.collect())
    }

    async fn disks(&self) -> Vec<Tree> {
        let mut disks = Vec::new();
        for provider in &self.providers {
            disks.push(self.s.settled_disk(provider.name(), MOUNT).await);
        }
        disks
    }

    /// Compares what each pod reads and what its pod status says with the snapshot of its provider.
    pub async fn compare_states(&self, name: &str) {
        let statuses = self.s.pod_status_objects().await;
        for provider in &self.providers {
            let mut text = self.s.listing(provider.name(), MOUNT).await;
            text += "pod status\n";
            let of_pod = |status: &&kube::api::DynamicObject| {
                status.data["status"]["podName"] == provider.name()
            };
            for status in statuses.iter().filter(of_pod) {
                for object in status.data["status"]["objects"].as_array().unwrap() {
                    let [id, version] = ["id", "version"].map(|key| object[key].as_str().unwrap());
                    writeln!(text, "  {id} {version}").unwrap();
                }
            }
            compare(name, *provider, &text);
        }
    }

    /// Compares the event of each pod whose volume cannot be mounted, once it has these words, with the
    /// snapshot of its provider. Pods are named by the provider with something before.
    pub async fn compare_failures(
        &self,
        name: &str,
        pods: &str,
        words: impl Fn(Provider) -> String,
    ) {
        for provider in &self.providers {
            let pod = format!("{pods}{}", provider.name());
            let said = self.s.failed_mount(&pod, &words(*provider)).await;
            compare(name, *provider, &said);
        }
    }
}

/// Waits until a provider serves, or has left a socket when it was killed.
async fn wait_for_socket(s: &Scenario, provider: Provider) {
    let (node, socket) = (s.node(), provider.socket());
    until("the provider has a socket", async || {
        let tree = s.cluster.node_tree(&node, &socket).await;
        tree.unwrap().is_some()
    })
    .await;
}

/// Compares a text with the snapshot of a provider, which is the same for the real one and for the fake
/// one.
pub fn compare(name: &str, provider: Provider, text: &str) {
    let mut text = text.to_owned();
    for called in [provider.name(), "e2e-provider"] {
        let socket = format!("/var/run/secrets-store-csi-providers/{called}.sock");
        let named = format!("provider \"{called}\" at {socket}");
        text = text.replace(&named, "provider [provider]");
    }
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_suffix(provider.name());
    settings.bind(|| insta::assert_snapshot!(name, text));
}

/// Encodes a text for a query.
fn encoded(text: impl fmt::Display) -> String {
    text.to_string()
        .bytes()
        .fold(String::new(), |mut out, byte| {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => out.push(char::from(byte)),
                _ => write!(out, "%{byte:02X}").unwrap(),
            }
            out
        })
}
