//! A pod on this node: its volumes, the status of its containers (which do not run), its end.
//!
//! Every volume has a task of its own, so that one that fails delays the pod but not the other
//! volumes, and so that there is one operation on a volume at a time: the unpublish of a pod that is
//! deleted during a publish waits for the answer to the publish.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
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

/// The interval at which a container is tried again that lacks a Secret for its environment.
const CONFIG_RETRY: Duration = Duration::from_millis(300);
/// The interval at which a write to the API is tried again.
const API_RETRY: Duration = Duration::from_millis(500);

/// The desired state of a pod, from the API.
#[derive(Clone)]
pub(crate) enum Desired {
    /// It should run.
    Run(Arc<Pod>),
    /// Its containers have ended, and do not start again. Its object stays, its volumes do not.
    Done(Arc<Pod>),
    /// It should end; its object is removed after that.
    End(Arc<Pod>),
    /// It is not in the API any more.
    Gone,
}

impl Desired {
    /// Returns the desired state of a pod that the API has.
    pub(crate) fn of(pod: Pod) -> Self {
        let is_deleted = pod.metadata.deletion_timestamp.is_some();
        let phase = pod
            .status
            .as_ref()
            .and_then(|status| status.phase.as_deref());
        let is_done = matches!(phase, Some("Failed" | "Succeeded"));
        let pod = Arc::new(pod);
        match (is_deleted, is_done) {
            (true, _) => Self::End(pod),
            (false, true) => Self::Done(pod),
            (false, false) => Self::Run(pod),
        }
    }

    pub(crate) fn is_run(&self) -> bool {
        matches!(self, Self::Run(_))
    }

    /// Returns whether this may follow: a pod that has ended does not run again.
    pub(crate) fn allows(&self, next: &Self) -> bool {
        match self {
            Self::Run(_) => true,
            Self::Done(_) => matches!(next, Self::End(_)),
            Self::End(_) | Self::Gone => false,
        }
    }

    /// Returns the time until the pod has run as long as it may (`activeDeadlineSeconds`), if it is
    /// limited.
    pub(crate) fn time_left(&self) -> Option<Duration> {
        let Self::Run(pod) = self else { return None };
        let most = pod.spec.as_ref()?.active_deadline_seconds?;
        let started = pod.status.as_ref()?.start_time.as_ref()?.0;
        let end = started + SignedDuration::from_secs(most);
        Some(Duration::try_from(end.duration_since(Timestamp::now())).unwrap_or_default())
    }

    /// Ends a pod that has run as long as it may.
    pub(crate) fn expire(&mut self) -> bool {
        let is_over = self.time_left().is_some_and(|left| left.is_zero());
        if is_over && let Self::Run(pod) = self {
            *self = Self::Done(Arc::clone(pod));
        }
        is_over
    }
}

/// The parts of a node that all pods share.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) node: Node,
    pub(crate) events: Events,
    /// The interval at which volumes of running pods are republished; never when absent.
    pub(crate) sync_period: Option<Duration>,
    /// The longest pause between attempts at an operation.
    pub(crate) longest_pause: Duration,
    pub(crate) last_ip: Arc<AtomicU32>,
}

/// Runs a pod to its end. Returns when nothing of it is left on the node and in the API.
pub(crate) async fn run(context: Context, uid: String, mut desired: watch::Receiver<Desired>) {
    let root = &context.node.root;
    let pod = match &*desired.borrow() {
        Desired::Run(pod) | Desired::Done(pod) | Desired::End(pod) => Some(Arc::clone(pod)),
        Desired::Gone => None,
    };
    let mut sources = pod.as_deref().map(csi_volumes).unwrap_or_default();
    let mut tasks = JoinSet::new();
    let mut states = Vec::new();
    let (set_running, running) = watch::channel(false);
    // Volumes that an earlier run of the kubelet left come first: a pod that is gone from the API has
    // no others.
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
            biased;
            _ = desired.wait_for(|desired| !desired.is_run()) => {}
            () = start(&context, pod, states) => {
                set_running.send_replace(true);
            }
        }
    }
    // An error means that the kubelet itself ends.
    if desired.wait_for(|desired| !desired.is_run()).await.is_err() {
        return;
    }
    let done = match &*desired.borrow() {
        Desired::Done(pod) => Some(Arc::clone(pod)),
        _ => None,
    };
    if let Some(pod) = done {
        write_status(&context, &pod, &ended(&pod)).await;
    }
    while tasks.join_next().await.is_some() {}
    volumes::remove_pod_dirs(root, &uid);
    if let Some(pod) = &pod {
        finish(&context, pod, desired).await;
    }
}

/// Returns the pod's inline CSI volumes by name.
fn csi_volumes(pod: &Pod) -> BTreeMap<String, CSIVolumeSource> {
    let volumes = pod
        .spec
        .iter()
        .flat_map(|spec| spec.volumes.iter().flatten());
    volumes
        .filter_map(|volume| Some((volume.name.clone(), volume.csi.clone()?)))
        .collect()
}

/// Runs one volume from its first publish to its last unpublish. Without a source, only the latter
/// is left to do.
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
            // An error means that the pod ended before it ran.
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
    let mut backoff = Backoff::up_to(context.longest_pause);
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

/// Publishes the volume again and again until it succeeds or the pod should end.
async fn publish(
    context: &Context,
    volume: &Volume,
    source: &CSIVolumeSource,
    desired: &mut watch::Receiver<Desired>,
    state: &watch::Sender<State>,
) {
    let mut backoff = Backoff::up_to(context.longest_pause);
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
                mount_failed(context, &pod, volume, &failure.message).await;
                tokio::select! {
                    () = tokio::time::sleep(backoff.next_pause()) => {}
                    _ = desired.wait_for(|desired| !desired.is_run()) => return,
                }
            }
        }
    }
}

/// Republishes a volume of a pod that runs, if the CSIDriver asks for it: once in a sync period, if
/// the node has one, and at once when the pod's annotations, labels or spec were changed. A failure
/// changes nothing but the pod's events.
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
            Desired::Done(_) | Desired::End(_) | Desired::Gone => true,
        };
        tokio::select! {
            () = is_over() => {}
            changed = desired.wait_for(news) => if changed.is_err() { return },
        }
        let Desired::Run(pod) = desired.borrow().clone() else {
            return;
        };
        known = Arc::clone(&pod);
        let csi_drivers = &context.node.csi_drivers;
        let csi_driver = csi_drivers.get(&ObjectRef::new(&source.driver));
        if csi_driver.and_then(|found| found.spec.requires_republish) != Some(true) {
            continue;
        }
        if let Err(failure) = volume.set_up(&context.node, &pod, source, true).await {
            mount_failed(context, &pod, volume, &failure.message).await;
        }
    }
}

/// Returns whether kubelet considers two versions of a pod the same: it compares neither the status
/// nor the resource version (`podsDifferSemantically`).
fn is_same(before: &Pod, now: &Pod) -> bool {
    before.metadata.annotations == now.metadata.annotations
        && before.metadata.labels == now.metadata.labels
        && before.spec == now.spec
}

async fn mount_failed(context: &Context, pod: &Pod, volume: &Volume, message: &str) {
    let volume = &volume.name;
    let text = format!("MountVolume.SetUp failed for volume {volume:?} : {message}");
    context.events.warn(pod, "FailedMount", &text).await;
}

/// Waits for the volumes and the environment, and writes the pod's status.
async fn start(context: &Context, pod: &Pod, states: Vec<watch::Receiver<State>>) {
    let started = Timestamp::now();
    // A pod that ran before this kubelet started keeps running, though it is not ready again yet.
    let known = pod.status.as_ref();
    let phase = match known.and_then(|status| status.phase.as_deref()) {
        Some("Running") => "Running",
        _ => "Pending",
    };
    let creating = || waiting(pod, "ContainerCreating", None);
    write_status(context, pod, &status(pod, phase, started, None, creating())).await;
    for mut state in states {
        // The task ends before its volume is published only when the pod should end.
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

/// Returns why kubelet cannot create the directory of a pod's logs: its name is made of namespace,
/// name and UID, and is limited to 255 bytes.
fn log_directory_refused(pod: &Pod) -> Option<String> {
    let (namespace, uid) = (pod.namespace()?, pod.uid()?);
    let name = format!("{namespace}_{}_{uid}", pod.name_any());
    (name.len() > 255).then(|| {
        format!("Failed to create pod sandbox: mkdir /var/log/pods/{name}: file name too long")
    })
}

/// Returns the first Secret that the environment of the pod's containers needs and that is missing.
async fn missing_secret(context: &Context, pod: &Pod) -> Option<String> {
    let namespace = pod.namespace().unwrap_or_default();
    let secrets: Api<Secret> = Api::namespaced(context.node.client.clone(), &namespace);
    for (name, key) in required_secrets(pod) {
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

/// Returns the name of each Secret, and the key if one is named.
fn required_secrets(pod: &Pod) -> Vec<(String, Option<String>)> {
    let mut required = Vec::new();
    for container in pod.spec.iter().flat_map(|spec| &spec.containers) {
        for source in container.env_from.iter().flatten() {
            if let Some(secret) = &source.secret_ref
                && secret.optional != Some(true)
            {
                required.push((secret.name.clone(), None));
            }
        }
        for variable in container.env.iter().flatten() {
            if let Some(secret) = variable
                .value_from
                .as_ref()
                .and_then(|from| from.secret_key_ref.as_ref())
                && secret.optional != Some(true)
            {
                required.push((secret.name.clone(), Some(secret.key.clone())));
            }
        }
    }
    required
}

/// Returns the status of a pod that has run as long as it may, or the one that it has if it has ended
/// before.
fn ended(pod: &Pod) -> Value {
    let phase = pod.status.as_ref().and_then(|status| status.phase.clone());
    if let Some("Failed" | "Succeeded") = phase.as_deref() {
        return json!({"phase": phase});
    }
    let now = Time(Timestamp::now());
    let containers = containers(pod, |status| {
        status["state"] =
            json!({"terminated": {"exitCode": 137, "reason": "Error", "finishedAt": now}});
    });
    let mut status = status(pod, "Failed", Timestamp::now(), None, containers);
    if let Some(status) = status.as_object_mut() {
        status.remove("startTime");
    }
    status["reason"] = json!("DeadlineExceeded");
    status
}

/// Deletes the object of a pod that ended, once somebody wants it to be deleted, unless it is gone.
async fn finish(context: &Context, pod: &Pod, mut desired: watch::Receiver<Desired>) {
    let deleted = desired.wait_for(|desired| !matches!(desired, Desired::Done(_)));
    // An error means that the kubelet itself ends.
    if deleted.await.is_err() {
        return;
    }
    let pods = pods_beside(context, pod);
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
            // It is gone, or another pod has its name.
            Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => return,
            Err(error) => {
                tracing::warn!(pod = pod.name_any(), %error, "the pod's object is still there")
            }
        }
        tokio::time::sleep(API_RETRY).await;
    }
}

/// Returns the interface to the pods of a pod's namespace.
fn pods_beside(context: &Context, pod: &Pod) -> Api<Pod> {
    let namespace = pod.namespace().unwrap_or_default();
    Api::namespaced(context.node.client.clone(), &namespace)
}

async fn write_status(context: &Context, pod: &Pod, status: &Value) {
    let pods = pods_beside(context, pod);
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

/// Returns the status of a pod, which runs and is ready if it has an address.
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
