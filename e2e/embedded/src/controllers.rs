//! A scheduler and controllers for workloads: pods get a node, Deployments become ReplicaSets, and
//! these and DaemonSets become pods.
//!
//! The pods of a ReplicaSet are numbered, so that one is replaced only when the former pod of its
//! name is gone. An old ReplicaSet is scaled to zero at once. The API server's own collector deletes
//! objects whose owners are gone.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use kube::api::{Api, DeleteParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::reflector::{self, Store};
use kube::runtime::watcher::{self, watcher};
use kube::{Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::Notify;

use crate::processes::Container;
use crate::{daemonsets, kubelet};

/// The pause after a failed write.
const RETRY: Duration = Duration::from_millis(200);
const TEMPLATE_HASH: &str = "pod-template-hash";

/// Assigns pods to the nodes that fit them, in turn.
pub(crate) async fn schedule(client: kube::Client, nodes: Vec<String>) {
    let unassigned = watcher::Config::default().fields("spec.nodeName=");
    let mut pods = watcher(Api::<Pod>::all(client.clone()), unassigned)
        .default_backoff()
        .applied_objects()
        .boxed();
    let mut turn = 0;
    while let Some(pod) = pods.next().await {
        let Ok(pod) = pod else { continue };
        if pod.metadata.deletion_timestamp.is_some() {
            continue;
        }
        let selector = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.node_selector.clone())
            .unwrap_or_default();
        let fits = |node: &&String| {
            let labels = kubelet::node_labels(node);
            selector
                .iter()
                .all(|(key, value)| labels.get(key) == Some(value))
        };
        let candidates: Vec<_> = nodes.iter().filter(fits).collect();
        if candidates.is_empty() {
            tracing::warn!(pod = pod.name_any(), "no node fits the pod's node selector");
            continue;
        }
        let node = candidates[turn % candidates.len()];
        turn += 1;
        if let Err(error) = bind(&client, &pod, node).await {
            tracing::warn!(pod = pod.name_any(), node, %error, "not bound");
        }
    }
}

async fn bind(client: &kube::Client, pod: &Pod, node: &str) -> kube::Result<()> {
    let name = pod.name_any();
    let binding = json!({
        "apiVersion": "v1",
        "kind": "Binding",
        "metadata": {"name": name},
        "target": {"apiVersion": "v1", "kind": "Node", "name": node},
    });
    let pods: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
    let _status: Value = pods
        .create_subresource("binding", &name, &PostParams::default(), &binding)
        .await?;
    Ok(())
}

/// Keeps an object for each pod of the DaemonSets, and says in their status that all run. The nodes run
/// their containers without being told by these objects.
pub(crate) async fn reconcile_daemon_sets(
    client: kube::Client,
    nodes: Vec<String>,
    programs: BTreeMap<String, PathBuf>,
) {
    let sets = Api::<DaemonSet>::all(client.clone());
    let mut sets = watcher(sets, watcher::Config::default())
        .default_backoff()
        .applied_objects()
        .boxed();
    while let Some(set) = sets.next().await {
        let Ok(set) = set else { continue };
        while set.metadata.deletion_timestamp.is_none()
            && report(reconcile_daemon_set(&client, &set, &nodes, &programs).await)
        {
            tokio::time::sleep(RETRY).await;
        }
    }
}

async fn reconcile_daemon_set(
    client: &kube::Client,
    set: &DaemonSet,
    nodes: &[String],
    programs: &BTreeMap<String, PathBuf>,
) -> kube::Result<()> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), &set.namespace().unwrap_or_default());
    let template = serde_json::to_vec(&set.spec.template).map_err(kube::Error::SerdeError)?;
    let revision = crate::hex(&Sha256::digest(&template)[..5]);
    let has_it = |node: &&String| !containers_of(set, node, programs).is_empty();
    let nodes: Vec<_> = nodes.iter().filter(has_it).collect();
    for node in &nodes {
        let pod = daemonsets::pod(set, node, &revision);
        let name = pod.name_any();
        if let Some(existing) = pods.get_opt(&name).await? {
            if existing.labels().get(daemonsets::REVISION) == Some(&revision) {
                continue;
            }
            pods.delete(&name, &DeleteParams::default().grace_period(0))
                .await?;
        }
        pods.create(&PostParams::default(), &pod).await?;
    }
    let generation = set.metadata.generation;
    let known = set.status.clone().unwrap_or_default();
    let count = i32::try_from(nodes.len()).unwrap_or(i32::MAX);
    if known.observed_generation == generation && known.number_ready == count {
        return Ok(());
    }
    let status = json!({"status": {
        "observedGeneration": generation,
        "desiredNumberScheduled": count,
        "currentNumberScheduled": count,
        "updatedNumberScheduled": count,
        "numberMisscheduled": 0,
        "numberReady": count,
        "numberAvailable": count,
    }});
    write_status(client, set, status).await
}

/// Reconciles Deployments and ReplicaSets.
pub(crate) async fn reconcile_workloads(client: kube::Client) {
    let changed = Arc::new(Notify::new());
    let (deployments, watch_deployments) = cache::<Deployment>(&client, &changed, "");
    let (sets, watch_sets) = cache::<ReplicaSet>(&client, &changed, "");
    // Only the pods of a ReplicaSet carry the label.
    let (pods, watch_pods) = cache::<Pod>(&client, &changed, TEMPLATE_HASH);
    let reconcile = async {
        loop {
            changed.notified().await;
            let mut retry = false;
            for deployment in deployments.state() {
                retry |= report(reconcile_deployment(&client, &deployment, &sets.state()).await);
            }
            for set in sets.state() {
                retry |= report(reconcile_set(&client, &set, &pods.state()).await);
            }
            if retry {
                tokio::time::sleep(RETRY).await;
                changed.notify_one();
            }
        }
    };
    tokio::join!(watch_deployments, watch_sets, watch_pods, reconcile);
}

/// Returns a cache of a kind's objects, and the task that fills it.
fn cache<K>(
    client: &kube::Client,
    changed: &Arc<Notify>,
    labels: &str,
) -> (Store<K>, impl Future<Output = ()>)
where
    K: Resource<DynamicType = ()>
        + Clone
        + DeserializeOwned
        + std::fmt::Debug
        + Send
        + Sync
        + 'static,
{
    let (store, writer) = reflector::store::<K>();
    let config = watcher::Config::default().labels(labels);
    let stream = watcher(Api::<K>::all(client.clone()), config).default_backoff();
    let changed = Arc::clone(changed);
    let task = reflector::reflector(writer, stream).for_each(move |_| {
        changed.notify_one();
        std::future::ready(())
    });
    (store, task)
}

/// Returns whether to try again. A conflict, or an object that exists already, only means that the
/// cache lags behind, and reconciling starts again when the cache changes.
fn report(outcome: kube::Result<()>) -> bool {
    match outcome {
        Ok(()) => false,
        Err(kube::Error::Api(status)) if status.code == 409 || status.code == 404 => false,
        Err(error) => {
            tracing::warn!(%error, "a workload is not as it should be");
            true
        }
    }
}

async fn reconcile_deployment(
    client: &kube::Client,
    deployment: &Deployment,
    sets: &[Arc<ReplicaSet>],
) -> kube::Result<()> {
    if deployment.metadata.deletion_timestamp.is_some() {
        return Ok(());
    }
    let api: Api<ReplicaSet> =
        Api::namespaced(client.clone(), &deployment.namespace().unwrap_or_default());
    let template =
        serde_json::to_vec(&deployment.spec.template).map_err(kube::Error::SerdeError)?;
    let hash = crate::hex(&Sha256::digest(&template)[..5]);
    let name = format!("{}-{hash}", deployment.name_any());
    let replicas = deployment.spec.replicas.unwrap_or(1);
    let mut ready = 0;
    let mut exists = false;
    for set in sets.iter().filter(|set| owned_by(set.as_ref(), deployment)) {
        let current = set.name_any() == name;
        exists |= current;
        let status = set.status.as_ref();
        ready += status.and_then(|status| status.ready_replicas).unwrap_or(0);
        let desired = if current { replicas } else { 0 };
        if set.spec.replicas != Some(desired) {
            let patch = Patch::Merge(json!({"spec": {"replicas": desired}}));
            api.patch(&set.name_any(), &PatchParams::default(), &patch)
                .await?;
        }
    }
    if !exists {
        let set = set_of(deployment, name, &hash, replicas);
        api.create(&PostParams::default(), &set).await?;
    }
    report_deployment(client, deployment, replicas, ready).await
}

/// Returns the ReplicaSet for the current pod template of a Deployment.
fn set_of(deployment: &Deployment, name: String, hash: &str, replicas: i32) -> ReplicaSet {
    let mut template = deployment.spec.template.clone();
    let metadata = template.metadata.get_or_insert_default();
    let labels = metadata.labels.get_or_insert_default();
    labels.insert(TEMPLATE_HASH.to_owned(), hash.to_owned());
    let labels = labels.clone();
    let mut selector = deployment.spec.selector.clone();
    let match_labels = selector.match_labels.get_or_insert_default();
    match_labels.insert(TEMPLATE_HASH.to_owned(), hash.to_owned());
    ReplicaSet {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: deployment.namespace(),
            labels: Some(labels),
            owner_references: deployment
                .controller_owner_ref(&())
                .map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        spec: ReplicaSetSpec {
            replicas: Some(replicas),
            selector,
            template: Some(template),
            ..ReplicaSetSpec::default()
        },
        ..ReplicaSet::default()
    }
}

/// Writes the status of a Deployment if it differs.
async fn report_deployment(
    client: &kube::Client,
    deployment: &Deployment,
    replicas: i32,
    ready: i32,
) -> kube::Result<()> {
    let known = deployment.status.clone().unwrap_or_default();
    let generation = deployment.metadata.generation;
    if known.ready_replicas.unwrap_or(0) == ready && known.observed_generation == generation {
        return Ok(());
    }
    let status = json!({"status": {
        "observedGeneration": generation,
        "replicas": replicas,
        "updatedReplicas": replicas,
        "readyReplicas": ready,
        "availableReplicas": ready,
    }});
    write_status(client, deployment, status).await
}

/// Merges a status into that of an object.
async fn write_status<K>(client: &kube::Client, object: &K, status: Value) -> kube::Result<()>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + std::fmt::Debug,
{
    let namespace = object.namespace().unwrap_or_default();
    let (name, params) = (object.name_any(), PatchParams::default());
    Api::<K>::namespaced(client.clone(), &namespace)
        .patch_status(&name, &params, &Patch::Merge(status))
        .await
        .map(drop)
}

async fn reconcile_set(
    client: &kube::Client,
    set: &ReplicaSet,
    pods: &[Arc<Pod>],
) -> kube::Result<()> {
    if set.metadata.deletion_timestamp.is_some() {
        return Ok(());
    }
    let namespace = set.namespace().unwrap_or_default();
    let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let replicas = usize::try_from(set.spec.replicas.unwrap_or(1)).unwrap_or(0);
    let owned: BTreeMap<String, &Arc<Pod>> = pods
        .iter()
        .filter(|pod| owned_by(pod.as_ref(), set))
        .map(|pod| (pod.name_any(), pod))
        .collect();
    let desired: Vec<String> = (0..replicas)
        .map(|number| format!("{}-{number}", set.name_any()))
        .collect();
    for name in desired.iter().filter(|name| !owned.contains_key(*name)) {
        if let Some(template) = &set.spec.template {
            api.create(&PostParams::default(), &pod_of(set, name, template))
                .await?;
        }
    }
    for (name, pod) in &owned {
        if !desired.contains(name) && pod.metadata.deletion_timestamp.is_none() {
            api.delete(name, &DeleteParams::default()).await?;
        }
    }
    let ready = owned.values().filter(|pod| is_ready(pod)).count();
    let known = set.status.clone().unwrap_or_default();
    let count = |number: usize| i32::try_from(number).unwrap_or(i32::MAX);
    if known.replicas != count(owned.len()) || known.ready_replicas.unwrap_or(0) != count(ready) {
        let status = json!({"status": {
            "observedGeneration": set.metadata.generation,
            "replicas": owned.len(),
            "fullyLabeledReplicas": owned.len(),
            "readyReplicas": ready,
            "availableReplicas": ready,
        }});
        write_status(client, set, status).await?;
    }
    Ok(())
}

fn pod_of(set: &ReplicaSet, name: &str, template: &PodTemplateSpec) -> Pod {
    let from = template.metadata.clone().unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            namespace: set.namespace(),
            labels: from.labels,
            annotations: from.annotations,
            owner_references: set.controller_owner_ref(&()).map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        spec: template.spec.clone(),
        ..Pod::default()
    }
}

fn owned_by(object: &impl ResourceExt, owner: &impl ResourceExt) -> bool {
    let uid = owner.uid();
    object
        .owner_references()
        .iter()
        .any(|reference| Some(&reference.uid) == uid.as_ref())
}

/// Returns whether a pod's condition `Ready` is true.
pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod
        .status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten());
    conditions
        .into_iter()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Returns the containers that a DaemonSet has on a node.
pub(crate) fn containers_of(
    set: &DaemonSet,
    node: &str,
    programs: &BTreeMap<String, PathBuf>,
) -> Vec<Container> {
    // Every node logs why a set cannot run there.
    let nowhere = Path::new("/");
    daemonsets::containers(set, node, programs, nowhere, nowhere).unwrap_or_default()
}
