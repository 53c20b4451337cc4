//! A pod's life on this node: its volumes, its containers (which are only said to run), its end.
//!
//! Every volume has a task of its own, so that one that fails holds up the pod but not the
//! other volumes, and so that there is one operation on a volume at a time: a pod that is
//! deleted while its publish runs waits for that call's answer before the unpublish.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{CSIVolumeSource, Pod, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions};
use kube::runtime::reflector::ObjectRef;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::backoff::Backoff;
use super::events::Events;
use super::volumes::{self, Node, State, Volume};

/// How often a container is tried again that lacks a Secret for its environment.
const CONFIG_RETRY: Duration = Duration::from_millis(300);
/// How often a write to the API is tried again.
const API_RETRY: Duration = Duration::from_millis(500);

/// What the API says should be true of a pod here.
#[derive(Clone)]
pub(crate) enum Desired {
    /// It should run.
    Run(Arc<Pod>),
    /// It should end; the object is still there and waits for that.
    End(Arc<Pod>),
    /// It is not in the API any more.
    Gone,
}

impl Desired {
    pub(crate) fn is_run(&self) -> bool {
        matches!(self, Self::Run(_))
    }
}

/// What all pods of a node share.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) node: Node,
    pub(crate) events: Events,
    /// How often running pods have their volumes republished; never when absent.
    pub(crate) sync_period: Option<Duration>,
    pub(crate) last_ip: Arc<AtomicU32>,
}

/// Runs a pod to its end: returns when nothing of it is left on the node and in the API.
pub(crate) async fn run(context: Context, uid: String, mut desired: watch::Receiver<Desired>) {
    let root = &context.node.root;
    let pod = match &*desired.borrow() {
        Desired::Run(pod) | Desired::End(pod) => Some(Arc::clone(pod)),
        Desired::Gone => None,
    };
    let mut sources = pod.as_deref().map(csi_volumes).unwrap_or_default();
    let mut tasks = JoinSet::new();
    let mut states = Vec::new();
    let (set_running, running) = watch::channel(false);
    // What a former life of the kubelet left comes first: of a pod that is gone from the API
    // there is nothing else.
    let mut known = volumes::on_disk(root, &uid);
    for (name, source) in &sources {
        if known.iter().all(|volume| volume.name != *name) {
            known.push(Volume::new(root, &uid, name, &source.driver));
        }
    }
    for volume in known {
        let (set, state) = watch::channel(volume.state_on_disk());
        let source = sources.remove(&volume.name);
        states.push(state);
        tasks.spawn(run_volume(
            context.clone(),
            volume,
            source,
            desired.clone(),
            running.clone(),
            set,
        ));
    }
    if let Some(pod) = &pod {
        tokio::select! {
            () = start(&context, pod, states) => {
                set_running.send_replace(true);
            }
            _ = desired.wait_for(|desired| !desired.is_run()) => {}
        }
    }
    // Fails when the kubelet itself ends, and then nothing more is to be done.
    if desired.wait_for(|desired| !desired.is_run()).await.is_err() {
        return;
    }
    while tasks.join_next().await.is_some() {}
    volumes::remove_pod_dirs(root, &uid);
    if let Some(pod) = &pod {
        finish(&context, pod, desired).await;
    }
}

/// The pod's inline CSI volumes by name.
fn csi_volumes(pod: &Pod) -> BTreeMap<String, CSIVolumeSource> {
    let volumes = pod
        .spec
        .iter()
        .flat_map(|spec| spec.volumes.iter().flatten());
    volumes
        .filter_map(|volume| Some((volume.name.clone(), volume.csi.clone()?)))
        .collect()
}

/// One volume from its first publish to its last unpublish. Without a source there is only the
/// latter to do.
async fn run_volume(
    context: Context,
    volume: Volume,
    source: Option<CSIVolumeSource>,
    mut desired: watch::Receiver<Desired>,
    mut running: watch::Receiver<bool>,
    state: watch::Sender<State>,
) {
    if let Some(source) = &source {
        publish(&context, &volume, source, &mut desired, &state).await;
        let runs = tokio::select! {
            // Waiting fails when the pod ended before it ran.
            runs = running.wait_for(|running| *running) => runs.is_ok(),
            _ = desired.wait_for(|desired| !desired.is_run()) => false,
        };
        if runs {
            republish(&context, &volume, source, &mut desired).await;
        }
    }
    if desired.wait_for(|desired| !desired.is_run()).await.is_err() {
        return;
    }
    let mut backoff = Backoff::default();
    while *state.borrow() != State::Unmounted {
        match volume.tear_down(&context.node).await {
            Ok(()) => {
                state.send_replace(State::Unmounted);
            }
            // kubelet posts no event for this.
            Err(reason) => {
                tracing::error!(
                    volume = volume.name,
                    reason,
                    "UnmountVolume.TearDown failed"
                );
                tokio::time::sleep(backoff.next_pause()).await;
            }
        }
    }
    if let Err(error) = volume.remove_dirs() {
        tracing::error!(volume = volume.name, %error, "a volume's directory stays");
    }
}

/// Tries until the volume is there or the pod should end.
async fn publish(
    context: &Context,
    volume: &Volume,
    source: &CSIVolumeSource,
    desired: &mut watch::Receiver<Desired>,
    state: &watch::Sender<State>,
) {
    let mut backoff = Backoff::default();
    loop {
        let Desired::Run(pod) = desired.borrow().clone() else {
            return;
        };
        match volume.set_up(&context.node, &pod, source, false).await {
            Ok(()) => {
                state.send_replace(State::Mounted);
                return;
            }
            Err(failure) => {
                if let Some(now) = failure.state {
                    state.send_replace(now);
                }
                context
                    .events
                    .warn(&pod, "FailedMount", &mount_failed(volume, &failure.message))
                    .await;
                tokio::select! {
                    () = tokio::time::sleep(backoff.next_pause()) => {}
                    _ = desired.wait_for(|desired| !desired.is_run()) => return,
                }
            }
        }
    }
}

/// Calls the driver again for a volume of a pod that runs, if the CSIDriver asks for it: once in
/// a sync period, if the node has one, and at once when somebody changed the pod's annotations,
/// labels or spec. A failure changes nothing but the pod's events.
async fn republish(
    context: &Context,
    volume: &Volume,
    source: &CSIVolumeSource,
    desired: &mut watch::Receiver<Desired>,
) {
    let Desired::Run(mut known) = desired.borrow_and_update().clone() else {
        return;
    };
    loop {
        let is_over = || async {
            match context.sync_period {
                Some(period) => tokio::time::sleep(period).await,
                None => std::future::pending().await,
            }
        };
        let news = |now: &Desired| match now {
            Desired::Run(now) => !is_same(&known, now),
            Desired::End(_) | Desired::Gone => true,
        };
        tokio::select! {
            () = is_over() => {}
            changed = desired.wait_for(news) => if changed.is_err() { return },
        }
        let Desired::Run(pod) = desired.borrow().clone() else {
            return;
        };
        known = Arc::clone(&pod);
        let class = context.node.classes.get(&ObjectRef::new(&source.driver));
        if class.and_then(|class| class.spec.requires_republish) != Some(true) {
            continue;
        }
        if let Err(failure) = volume.set_up(&context.node, &pod, source, true).await {
            context
                .events
                .warn(&pod, "FailedMount", &mount_failed(volume, &failure.message))
                .await;
        }
    }
}

/// Whether kubelet takes two versions of a pod for the same: it looks neither at the status nor
/// at the resource version (`podsDifferSemantically`).
fn is_same(before: &Pod, now: &Pod) -> bool {
    before.metadata.annotations == now.metadata.annotations
        && before.metadata.labels == now.metadata.labels
        && before.spec == now.spec
}

fn mount_failed(volume: &Volume, message: &str) -> String {
    format!(
        "MountVolume.SetUp failed for volume {:?} : {message}",
        volume.name
    )
}

/// Waits for the volumes and the environment, and says in the pod's status how far it is.
async fn start(context: &Context, pod: &Pod, states: Vec<watch::Receiver<State>>) {
    let started = Timestamp::now();
    // A pod that ran before this kubelet did goes on running, though it is not ready again yet.
    let phase = match pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref())
    {
        Some("Running") => "Running",
        _ => "Pending",
    };
    let creating = || waiting(pod, "ContainerCreating", None);
    write_status(context, pod, &status(pod, phase, started, None, creating())).await;
    for mut state in states {
        // The task ends before its volume is there only when the pod should end.
        if state
            .wait_for(|state| *state == State::Mounted)
            .await
            .is_err()
        {
            return std::future::pending().await;
        }
    }
    if let Some(refusal) = log_directory_refused(pod) {
        context
            .events
            .warn(pod, "FailedCreatePodSandBox", &refusal)
            .await;
        return std::future::pending().await;
    }
    let mut told = None;
    while let Some(lacking) = missing_secret(context, pod).await {
        if told.as_ref() != Some(&lacking) {
            let containers = waiting(pod, "CreateContainerConfigError", Some(&lacking));
            write_status(context, pod, &status(pod, phase, started, None, containers)).await;
            context
                .events
                .warn(pod, "Failed", &format!("Error: {lacking}"))
                .await;
            told = Some(lacking);
        }
        tokio::time::sleep(CONFIG_RETRY).await;
    }
    let number = context.last_ip.fetch_add(1, Ordering::Relaxed);
    let ip = format!("10.244.{}.{}", number / 250, number % 250 + 2);
    let now = Time(Timestamp::now());
    let containers = containers(pod, |status| {
        status["ready"] = json!(true);
        status["started"] = json!(true);
        status["state"] = json!({"running": {"startedAt": now}});
    });
    write_status(
        context,
        pod,
        &status(pod, "Running", started, Some(&ip), containers),
    )
    .await;
}

/// Why kubelet cannot make the directory of a pod's logs: its name holds three others, and may
/// have 255 bytes like any.
fn log_directory_refused(pod: &Pod) -> Option<String> {
    let (namespace, uid) = (pod.namespace()?, pod.uid()?);
    let name = format!("{namespace}_{}_{uid}", pod.name_any());
    (name.len() > 255).then(|| {
        format!("Failed to create pod sandbox: mkdir /var/log/pods/{name}: file name too long")
    })
}

/// The first Secret that the pod's containers need for their environment and do not find.
async fn missing_secret(context: &Context, pod: &Pod) -> Option<String> {
    let namespace = pod.namespace().unwrap_or_default();
    let secrets: Api<Secret> = Api::namespaced(context.node.client.clone(), &namespace);
    for (name, key) in wanted_secrets(pod) {
        match secrets.get_opt(&name).await {
            Ok(None) => return Some(format!("secret {name:?} not found")),
            Ok(Some(secret)) => {
                if let Some(key) = key
                    && !secret.data.unwrap_or_default().contains_key(&key)
                {
                    return Some(format!(
                        "couldn't find key {key} in Secret {namespace}/{name}"
                    ));
                }
            }
            Err(error) => return Some(error.to_string()),
        }
    }
    None
}

/// Name of each Secret, and the key if one is named.
fn wanted_secrets(pod: &Pod) -> Vec<(String, Option<String>)> {
    let mut wanted = Vec::new();
    for container in pod.spec.iter().flat_map(|spec| &spec.containers) {
        for source in container.env_from.iter().flatten() {
            if let Some(secret) = &source.secret_ref
                && secret.optional != Some(true)
            {
                wanted.push((secret.name.clone(), None));
            }
        }
        for variable in container.env.iter().flatten() {
            if let Some(secret) = variable
                .value_from
                .as_ref()
                .and_then(|from| from.secret_key_ref.as_ref())
                && secret.optional != Some(true)
            {
                wanted.push((secret.name.clone(), Some(secret.key.clone())));
            }
        }
    }
    wanted
}

/// The object of a pod that ended goes, unless it went by itself.
async fn finish(context: &Context, pod: &Pod, mut desired: watch::Receiver<Desired>) {
    let pods: Api<Pod> = Api::namespaced(
        context.node.client.clone(),
        &pod.namespace().unwrap_or_default(),
    );
    let params = DeleteParams {
        grace_period_seconds: Some(0),
        preconditions: Some(Preconditions {
            uid: pod.uid(),
            resource_version: None,
        }),
        ..DeleteParams::default()
    };
    while !matches!(*desired.borrow_and_update(), Desired::Gone) {
        match pods.delete(&pod.name_any(), &params).await {
            Ok(_) => return,
            // Gone, or another pod of that name.
            Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => return,
            Err(error) => {
                tracing::warn!(pod = pod.name_any(), %error, "the pod's object is still there")
            }
        }
        tokio::time::sleep(API_RETRY).await;
    }
}

async fn write_status(context: &Context, pod: &Pod, status: &Value) {
    let pods: Api<Pod> = Api::namespaced(
        context.node.client.clone(),
        &pod.namespace().unwrap_or_default(),
    );
    let patch = Patch::Merge(json!({"metadata": {"uid": pod.metadata.uid}, "status": status}));
    loop {
        match pods
            .patch_status(&pod.name_any(), &PatchParams::default(), &patch)
            .await
        {
            Ok(_) => return,
            Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => return,
            Err(error) => {
                tracing::warn!(pod = pod.name_any(), %error, "the pod's status is not written")
            }
        }
        tokio::time::sleep(API_RETRY).await;
    }
}

/// With an address the pod runs and is ready.
fn status(
    pod: &Pod,
    phase: &str,
    started: Timestamp,
    ip: Option<&str>,
    containers: Vec<Value>,
) -> Value {
    let now = Time(Timestamp::now());
    let truth = |value: bool| if value { "True" } else { "False" };
    let ready = ip.is_some();
    let condition = |name: &str, value: bool| {
        let mut condition =
            json!({"type": name, "status": truth(value), "lastTransitionTime": now});
        if !value {
            let names: Vec<_> = pod
                .spec
                .iter()
                .flat_map(|spec| &spec.containers)
                .map(|c| c.name.as_str())
                .collect();
            condition["reason"] = json!("ContainersNotReady");
            condition["message"] = json!(format!(
                "containers with unready status: [{}]",
                names.join(" ")
            ));
        }
        condition
    };
    let mut status = json!({
        "phase": phase,
        "startTime": Time(started),
        "hostIP": "127.0.0.1",
        "conditions": [
            condition("PodScheduled", true),
            condition("Initialized", true),
            condition("ContainersReady", ready),
            condition("Ready", ready),
        ],
        "containerStatuses": containers,
    });
    if let Some(ip) = ip {
        status["podIP"] = json!(ip);
        status["podIPs"] = json!([{"ip": ip}]);
    }
    status
}

fn waiting(pod: &Pod, reason: &str, message: Option<&str>) -> Vec<Value> {
    containers(pod, |status| {
        status["state"] = json!({"waiting": {"reason": reason}});
        if let Some(message) = message {
            status["state"]["waiting"]["message"] = json!(message);
        }
    })
}

fn containers(pod: &Pod, state: impl Fn(&mut Value)) -> Vec<Value> {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    containers
        .map(|container| {
            let image = container.image.clone().unwrap_or_default();
            let mut status = json!({
                "name": container.name,
                "image": image,
                "imageID": "",
                "ready": false,
                "started": false,
                "restartCount": 0,
            });
            state(&mut status);
            status
        })
        .collect()
}
