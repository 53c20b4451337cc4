//! The kubelet of a node.
//!
//! It registers drivers, publishes and unpublishes the inline CSI volumes of the pods bound to
//! its node, in kubelet's order, with kubelet's files, deadlines, pauses, judgement of errors
//! and events (`pkg/kubelet/pluginmanager` and `pkg/volume/csi` of kubernetes/kubernetes). After a
//! restart it continues from the directories that it finds, also for pods that were deleted meanwhile.
//!
//! It does not pull images, run the containers of pods (their status says that they run), cache
//! service account tokens, or mount volumes other than inline CSI.

mod authority;
pub(crate) mod backoff;
mod csi;
mod events;
mod pods;
mod registration;
#[cfg(test)]
mod tests;
pub(crate) mod tokens;
mod volumes;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Node as NodeObject, Pod};
use k8s_openapi::api::storage::v1::{CSIDriver, CSINode};
use kube::ResourceExt;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::reflector;
use kube::runtime::watcher::{self, Event, watcher};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;

use pods::{Context, Desired};

/// The settings of a kubelet.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// The node's name.
    pub(crate) node: String,
    /// The root directory: [`KUBELET_ROOT`](crate::KUBELET_ROOT), or another in tests.
    pub(crate) root: PathBuf,
    /// The deadline of every call to a driver: two minutes in kubelet.
    pub(crate) csi_timeout: Duration,
    /// The interval at which volumes are republished for drivers that ask for it; never when absent.
    pub(crate) sync_period: Option<Duration>,
    /// The longest pause between attempts at an operation: [`backoff::LONGEST`] in kubelet.
    pub(crate) longest_pause: Duration,
    /// Whether the path of a registration socket is the authority of the calls to it, as with
    /// kubelet. Servers that check the authority, such as tonic's, refuse it.
    pub(crate) path_authority: bool,
}

/// Returns the labels of a node.
pub(crate) fn node_labels(node: &str) -> BTreeMap<String, String> {
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    [("os", "linux"), ("arch", arch), ("hostname", node)]
        .map(|(key, value)| (format!("kubernetes.io/{key}"), value.to_owned()))
        .into()
}

/// Returns the path at which a driver is told to mount a volume of a pod.
pub(crate) fn target(root: &Path, uid: &str, volume: &str) -> PathBuf {
    volumes::Volume::new(root, uid, volume, "").target()
}

/// Runs a kubelet until the future is dropped.
///
/// # Errors
/// When the node cannot be registered.
pub(crate) async fn run(config: Config, client: kube::Client) -> kube::Result<()> {
    register(&config, &client).await?;
    let (csi_drivers, writer) = reflector::store::<CSIDriver>();
    let drivers = registration::Drivers::default();
    let registrar = registration::Registrar {
        client: client.clone(),
        node: config.node.clone(),
        dir: config.root.join("plugins_registry"),
        drivers: drivers.clone(),
        csi_timeout: config.csi_timeout,
        path_authority: config.path_authority,
    };
    let context = Context {
        events: events::Events::new(client.clone(), config.node.clone()),
        node: volumes::Node {
            client: client.clone(),
            name: config.node.clone(),
            root: config.root.clone(),
            drivers,
            csi_drivers: csi_drivers.clone(),
            csi_timeout: config.csi_timeout,
        },
        sync_period: config.sync_period,
        longest_pause: config.longest_pause,
        last_ip: Arc::new(AtomicU32::new(0)),
    };
    let stream = watcher(
        Api::<CSIDriver>::all(client.clone()),
        watcher::Config::default(),
    );
    let cache = reflector::reflector(writer, stream.default_backoff()).for_each(async |_| {});
    let watch_pods = async {
        // The real kubelet starts no pod before its caches are filled, either.
        if csi_drivers.wait_until_ready().await.is_ok() {
            watch(context, client).await;
        }
    };
    tokio::join!(registrar.run(), cache, watch_pods);
    Ok(())
}

/// Creates or renews the Node and its CSINode, the latter without drivers: they register again.
async fn register(config: &Config, client: &kube::Client) -> kube::Result<()> {
    let name = &config.node;
    let node = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": node_labels(name)},
    });
    let csi_node = json!({
        "apiVersion": "storage.k8s.io/v1",
        "kind": "CSINode",
        "metadata": {"name": name},
        "spec": {"drivers": []},
    });
    let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::now());
    let status = json!({"status": {
        "addresses": [{"type": "Hostname", "address": name}, {"type": "InternalIP", "address": "127.0.0.1"}],
        "capacity": {"pods": "1000"},
        "allocatable": {"pods": "1000"},
        "conditions": [{
            "type": "Ready",
            "status": "True",
            "reason": "KubeletReady",
            "message": "kubelet is posting ready status",
            "lastHeartbeatTime": now,
            "lastTransitionTime": now,
        }],
    }});
    let nodes: Api<NodeObject> = Api::all(client.clone());
    create(&nodes, node).await?;
    nodes
        .patch_status(name, &PatchParams::default(), &Patch::Merge(&status))
        .await?;
    let csi_nodes: Api<CSINode> = Api::all(client.clone());
    create(&csi_nodes, csi_node.clone()).await?;
    csi_nodes
        .patch(name, &PatchParams::default(), &Patch::Merge(csi_node))
        .await?;
    Ok(())
}

/// Creates an object unless it exists.
async fn create<K>(api: &Api<K>, object: Value) -> kube::Result<()>
where
    K: Clone + DeserializeOwned + std::fmt::Debug + Serialize,
{
    let object = serde_json::from_value(object).map_err(kube::Error::SerdeError)?;
    match api.create(&PostParams::default(), &object).await {
        Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(()),
        outcome => outcome.map(drop),
    }
}

/// Runs one task for each pod, from its binding to this node until nothing of it is left.
async fn watch(context: Context, client: kube::Client) {
    let mut tasks = JoinSet::new();
    let mut workers: BTreeMap<String, watch::Sender<Desired>> = BTreeMap::new();
    // Pods that have directories here and are not listed were deleted while this kubelet was away.
    let mut orphans = pods_on_disk(&context.node.root);
    let mut listed: Option<Vec<String>> = None;
    let only_mine =
        watcher::Config::default().fields(&format!("spec.nodeName={}", context.node.name));
    let mut events = watcher(Api::<Pod>::all(client), only_mine)
        .default_backoff()
        .boxed();
    loop {
        tokio::select! {
            event = events.next() => match event {
                None => return,
                Some(Err(error)) => tracing::warn!(%error, "watch of pods interrupted"),
                Some(Ok(Event::Init)) => listed = Some(Vec::new()),
                Some(Ok(Event::InitApply(pod))) => {
                    if let Some(listed) = &mut listed {
                        listed.extend(pod.uid());
                    }
                    update(&context, &mut tasks, &mut workers, pod);
                }
                Some(Ok(Event::InitDone)) => {
                    let listed = listed.take().unwrap_or_default();
                    for uid in orphans.drain(..).filter(|uid| !listed.contains(uid)) {
                        tracing::info!(uid, "cleaning up after a pod that is gone");
                        let (set, desired) = watch::channel(Desired::Gone);
                        tasks.spawn(finished(context.clone(), uid.clone(), desired));
                        workers.insert(uid, set);
                    }
                    for (uid, desired) in &workers {
                        if !listed.contains(uid) {
                            desired.send_replace(Desired::Gone);
                        }
                    }
                }
                Some(Ok(Event::Apply(pod))) => update(&context, &mut tasks, &mut workers, pod),
                Some(Ok(Event::Delete(pod))) => {
                    if let Some(desired) = workers.get(&pod.uid().unwrap_or_default()) {
                        desired.send_replace(Desired::Gone);
                    }
                }
            },
            Some(done) = tasks.join_next() => match done {
                Ok(uid) => {
                    workers.remove(&uid);
                }
                Err(error) => tracing::error!(%error, "a pod's task broke off"),
            },
        }
    }
}

fn update(
    context: &Context,
    tasks: &mut JoinSet<String>,
    workers: &mut BTreeMap<String, watch::Sender<Desired>>,
    pod: Pod,
) {
    let Some(uid) = pod.uid() else { return };
    let desired = Desired::of(pod);
    let time_left = desired.time_left();
    match workers.get(&uid) {
        Some(known) if known.borrow().allows(&desired) => {
            known.send_replace(desired);
        }
        Some(_) => {}
        None => {
            let (set, desired) = watch::channel(desired);
            tasks.spawn(finished(context.clone(), uid.clone(), desired));
            workers.insert(uid.clone(), set);
        }
    }
    if let (Some(time_left), Some(known)) = (time_left, workers.get(&uid).cloned()) {
        tokio::spawn(async move {
            tokio::time::sleep(time_left).await;
            known.send_if_modified(Desired::expire);
        });
    }
}

async fn finished(context: Context, uid: String, desired: watch::Receiver<Desired>) -> String {
    pods::run(context, uid.clone(), desired).await;
    uid
}

fn pods_on_disk(root: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(root.join("pods")) else {
        return Vec::new();
    };
    entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}
