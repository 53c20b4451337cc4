//! Checks what every volume of the driver stands on: the API, the node, the driver's pod there.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStateTerminated, ContainerStatus, Pod};
use kube::ResourceExt as _;

use super::{
    Found,
    commands::describe,
    events::{is_recent, is_warning},
};
use crate::{
    cluster::Read,
    explain::{facts::Facts, state},
    installation::{DRIVER, crash},
    time::shown,
};

/// The scheduler of a pod that names none.
const DEFAULT_SCHEDULER: &str = "default-scheduler";
/// The reason of an event that a claim of the pod could not be made.
const NO_CLAIM: &str = "FailedResourceClaimCreation";
/// The seconds in which a driver that has just been started makes itself known to kubelet.
const REGISTERS_WITHIN: i64 = 60;

/// The group of the driver's kinds.
const GROUP: &str = driver::cluster::resources::GROUP;

/// The pod has no node.
pub(super) fn unscheduled(facts: &Facts) -> Option<Found> {
    let has_node = facts
        .pod
        .spec
        .as_ref()
        .is_some_and(|spec| spec.node_name.is_some());
    if has_node || facts.has_ended() {
        return None;
    }
    let condition = state::condition(&facts.pod, "PodScheduled");
    let condition = condition.filter(|condition| condition.status != "True");
    let said = condition.and_then(|condition| condition.message.clone());
    let said = said.filter(|said| !said.is_empty());
    let spec = facts.pod.spec.as_ref();
    let gates = spec.and_then(|spec| spec.scheduling_gates.as_deref());
    let gates: Vec<_> = gates
        .unwrap_or_default()
        .iter()
        .map(|gate| gate.name.as_str())
        .collect();
    let scheduler = spec.and_then(|spec| spec.scheduler_name.as_deref());
    let scheduler = scheduler.filter(|name| *name != DEFAULT_SCHEDULER && condition.is_none());
    // The scheduler does not look at a pod before its claims have been made.
    let of_claims = facts.event(&[NO_CLAIM], |_| true);
    let of_claims = of_claims.filter(|event| is_recent(facts, event));
    let who = match (gates.as_slice(), scheduler) {
        ([], _) if of_claims.is_some() => "one of its resource claims could not be made".to_owned(),
        ([], None) => "this is for the scheduler, and not about the volume".to_owned(),
        ([], Some(name)) => format!(
            "no scheduler has said anything of it, and its schedulerName is {name}: only a scheduler of that name looks at it"
        ),
        (gates, _) => format!(
            "its scheduling gates ({}) keep it from the scheduler until those who set them take them away",
            gates.join(", ")
        ),
    };
    let found = Found::new(
        format!("the pod has no node yet, so nothing is mounted: {who}"),
        facts.describe(),
    );
    Some(match (of_claims, said) {
        (None, Some(said)) => found.said(Some(said)),
        (Some(event), _) => found.said_by(Some(event)),
        (None, None) => {
            let mut events = facts.events.found().into_iter().flatten();
            found.said_by(events.find(|event| is_warning(event)))
        }
    })
}

/// The kinds of the driver are not installed.
pub(super) fn kinds(facts: &Facts) -> Option<Found> {
    let missing =
        facts
            .volumes
            .iter()
            .find_map(|volume| match (&volume.class, &volume.pod_status) {
                (Read::NoKind, _) => Some("secretproviderclasses"),
                (_, Read::NoKind) => Some("secretproviderclasspodstatuses"),
                _ => None,
            })?;
    Some(Found::new(
        format!(
            "the API server does not know {missing}.{GROUP}: the CustomResourceDefinitions of the driver are not installed; apply those of deploy/, or install the chart without --skip-crds"
        ),
        format!(
            "kubectl get crd secretproviderclasses.{GROUP} secretproviderclasspodstatuses.{GROUP}"
        ),
    ))
}

/// The object CSIDriver is missing or wrong.
pub(super) fn csi_driver(facts: &Facts) -> Option<Found> {
    let next = format!("kubectl get csidriver {DRIVER} -o yaml");
    let spec = match &facts.csi_driver {
        Read::Is(driver) => &driver.spec,
        Read::Missing => {
            let what = format!(
                "there is no CSIDriver {DRIVER}; apply deploy/csidriver.yaml, or install the chart again"
            );
            return Some(Found::new(what, next));
        }
        _ => return None,
    };
    let wrong = if spec.pod_info_on_mount != Some(true) {
        "podInfoOnMount: true, without which the driver does not know the pod"
    } else if !spec
        .volume_lifecycle_modes
        .iter()
        .flatten()
        .any(|mode| mode == "Ephemeral")
    {
        "volumeLifecycleModes: [Ephemeral], without which no pod may mount it"
    } else {
        return None;
    };
    let what = format!(
        "the CSIDriver {DRIVER} lacks {wrong}; delete it and apply deploy/csidriver.yaml, because most of its fields cannot be changed"
    );
    Some(Found::new(what, next))
}

/// The node is gone, or not ready.
pub(super) fn node(facts: &Facts) -> Option<Found> {
    let node = facts.node.as_ref()?;
    let object = match &node.node {
        Read::Is(object) => object,
        Read::Missing => return Some(gone(facts, &node.name)),
        _ => return None,
    };
    let conditions = object
        .status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten());
    let not_ready = conditions
        .into_iter()
        .find(|condition| condition.type_ == "Ready" && condition.status != "True")?;
    let since = not_ready.last_transition_time.as_ref();
    let since = since.map_or_else(String::new, |time| {
        format!(" since {}", shown(time.0, facts.now))
    });
    let what = format!(
        "node {} is not ready{since}: kubelet mounts and refreshes nothing until it is",
        node.name
    );
    let found = Found::new(what, format!("kubectl describe node {}", node.name));
    Some(found.said(not_ready.message.clone()))
}

/// Says what to do about a pod whose node does not exist. kubelet gives a pod that it has seen a start.
fn gone(facts: &Facts, node: &str) -> Found {
    let delete = format!(
        "{} delete pod {} --force --grace-period=0",
        facts.kubectl(),
        facts.pod.name_any()
    );
    let status = facts.pod.status.as_ref();
    let was_there = status.is_some_and(|status| status.start_time.is_some());
    match (facts.has_controller(), was_there) {
        (true, true) => Found::new(
            format!("node {node} is gone; delete the pod, so that another node gets one like it"),
            delete,
        ),
        (true, false) => Found::new(
            format!(
                "there is no node {node}; if the template of the workload names it (spec.nodeName), take that away, and else delete the pod, so that another node gets one like it"
            ),
            delete,
        ),
        (false, _) => Found::new(
            format!(
                "there is no node {node}, and nothing makes the pod again once it is deleted; if its manifest names the node (spec.nodeName), change that, and create the pod anew"
            ),
            delete,
        ),
    }
}

/// There is no DaemonSet of the driver.
pub(super) fn installed(facts: &Facts) -> Option<Found> {
    let sets = facts.installed.found()?;
    sets.is_empty().then(|| {
        Found::new(
            "no DaemonSet of the driver is installed in this cluster; install the chart, or apply deploy/",
            "kubectl get daemonsets -A",
        )
    })
}

/// The driver has no pod on the node, or its container does not run.
pub(super) fn driver_pod(facts: &Facts) -> Option<Found> {
    let node = facts.node.as_ref()?;
    let sets = facts.installed.found()?;
    let Read::Is(driver) = &node.driver else {
        return None;
    };
    let Some((installed, pod)) = driver else {
        let set = sets.first()?;
        if is_replaced(facts) {
            return replaced(facts, &node.name);
        }
        return Some(Found::new(
            format!(
                "node {} has no pod of the driver (DaemonSet {}/{}); compare the node's labels and taints with its nodeSelector, affinity and tolerations",
                node.name,
                set.namespace(),
                set.set.name_any()
            ),
            format!(
                "kubectl -n {} describe daemonset {}",
                set.namespace(),
                set.set.name_any()
            ),
        ));
    };
    let status = container_status(pod, &installed.container);
    let is_running = status.is_some_and(|status| {
        status
            .state
            .as_ref()
            .is_some_and(|state| state.running.is_some())
    });
    if is_running {
        return None;
    }
    if is_replaced(facts) {
        return replaced(facts, &node.name);
    }
    let (why, previous) = status.map_or(
        ("it has not been started".to_owned(), false),
        why_not_running,
    );
    Some(Found::new(
        format!(
            "the driver on node {} does not run (pod {}/{}): {why}",
            node.name,
            installed.namespace(),
            pod.name_any()
        ),
        match has_log(pod, &installed.container) {
            true => format!(
                "kubectl -n {} logs {} -c {}{}",
                installed.namespace(),
                pod.name_any(),
                installed.container,
                if previous { " --previous" } else { "" }
            ),
            false => describe(installed, pod),
        },
    ))
}

/// Returns whether the pod of the node's driver is being replaced, or has just been: kubelet does not know the driver
/// for some seconds then.
fn is_replaced(facts: &Facts) -> bool {
    let is_young = |time: Option<Timestamp>| {
        time.is_some_and(|time| facts.now.duration_since(time).as_secs() < REGISTERS_WITHIN)
    };
    let Some((installed, pod)) = facts.driver() else {
        let node = facts.node.as_ref().map(|node| &node.driver);
        let sets = facts.installed.found().into_iter().flatten();
        let mut rolling = sets.filter_map(|set| set.set.status.as_ref());
        return matches!(node, Some(Read::Is(None)))
            && rolling.any(|status| {
                let desired = status.desired_number_scheduled;
                // The API server leaves out a number that is 0.
                let updated = status.updated_number_scheduled.unwrap_or(0);
                updated < desired && status.current_number_scheduled < desired
            });
    };
    let status = container_status(pod, &installed.container);
    let is_ending = pod.metadata.deletion_timestamp.is_some();
    // A driver that crashes is always young.
    if !is_ending && status.is_some_and(|status| crash(status, facts.now).is_some()) {
        return false;
    }
    let waiting = status.and_then(|status| status.state.as_ref()?.waiting.as_ref());
    let reason = waiting.and_then(|waiting| waiting.reason.as_deref());
    let is_new = is_young(pod.creation_timestamp().map(|time| time.0))
        && matches!(reason, None | Some("ContainerCreating" | "PodInitializing"));
    is_ending || is_new || is_young(driver_started(facts))
}

/// Says that the driver is being replaced, to a pod that waits for it.
fn replaced(facts: &Facts, node: &str) -> Option<Found> {
    if facts.has_volumes() {
        return None;
    }
    let what = format!(
        "the driver's pod on node {node} is being replaced, or has just been started: volumes are mounted once kubelet knows it; look again in a minute"
    );
    Some(Found::new(what, facts.driver_pods()))
}

/// Returns when the container of the node's driver was started that runs now.
pub(super) fn driver_started(facts: &Facts) -> Option<Timestamp> {
    let (installed, pod) = facts.driver()?;
    let status = container_status(pod, &installed.container)?;
    let running = status.state.as_ref()?.running.as_ref()?;
    running.started_at.as_ref().map(|time| time.0)
}

/// Returns whether a container has been started, so that it has a log.
pub(super) fn has_log(pod: &Pod, container: &str) -> bool {
    let status = container_status(pod, container);
    status.is_some_and(|status| {
        let state = status.state.as_ref();
        let is_running = state.is_some_and(|state| state.running.is_some());
        is_running || state::last_end(status).is_some() || status.restart_count > 0
    })
}

/// The driver's container runs now, and ends again and again. Where kubelet knows the driver, one end is no reason
/// yet.
pub(super) fn restarts(facts: &Facts) -> Option<Found> {
    let node = facts.node.as_ref()?;
    let (installed, pod) = facts.driver()?;
    let status = container_status(pod, &installed.container)?;
    let ended = crash(status, facts.now)?;
    if status.restart_count < 2 && registration(facts).is_none() {
        return None;
    }
    let often = match status.restart_count {
        0 | 1 => "has ended and was started again",
        _ => "ends again and again",
    };
    Some(Found::new(
        format!(
            "the driver's container on node {} {often} (pod {}/{}): it last ended with {}{}; its log says why",
            node.name,
            installed.namespace(),
            pod.name_any(),
            state::end(ended, facts.now),
            advice(ended)
        ),
        format!(
            "kubectl -n {} logs {} -c {} --previous",
            installed.namespace(),
            pod.name_any(),
            installed.container
        ),
    ))
}

/// Returns what to do about a container that ended, if its end says so.
fn advice(ended: &ContainerStateTerminated) -> &'static str {
    match ended.reason.as_deref() {
        Some("OOMKilled") => "; raise its memory limit (linux.driver.resources.limits.memory)",
        _ => "",
    }
}

fn container_status<'a>(pod: &'a Pod, container: &str) -> Option<&'a ContainerStatus> {
    let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
    statuses.iter().find(|status| status.name == container)
}

/// Returns why a container does not run, and whether it ran before.
fn why_not_running(status: &ContainerStatus) -> (String, bool) {
    let last = status
        .last_state
        .as_ref()
        .and_then(|last| last.terminated.as_ref());
    let now = status.state.as_ref();
    let ended = now.and_then(|state| state.terminated.as_ref()).or(last);
    let waiting = now.and_then(|state| state.waiting.as_ref());
    let mut why = match waiting.and_then(|waiting| waiting.reason.clone()) {
        Some(reason) => reason,
        None => "it has ended".to_owned(),
    };
    if let Some(message) = waiting.and_then(|waiting| waiting.message.as_ref()) {
        why = format!("{why}, {message}");
    }
    if let Some(ended) = ended {
        let reason = ended.reason.as_deref().unwrap_or("Error");
        why = format!(
            "{why}; it last ended with {reason}, exit code {}{}",
            ended.exit_code,
            advice(ended)
        );
    }
    // One that has ended for the first time has no log of a former run.
    let has_ended = now.is_some_and(|state| state.terminated.is_some());
    (
        why,
        ended.is_some() && (!has_ended || status.restart_count > 0),
    )
}

/// kubelet does not know the driver.
pub(super) fn registration(facts: &Facts) -> Option<Found> {
    let node = facts.node.as_ref()?;
    let is_registered = match &node.csi_node {
        Read::Is(csi_node) => csi_node
            .spec
            .drivers
            .iter()
            .any(|driver| driver.name == DRIVER),
        Read::Missing => false,
        _ => return None,
    };
    if is_registered {
        return None;
    }
    let (installed, pod) = facts.driver()?;
    if is_replaced(facts) {
        return replaced(facts, &node.name);
    }
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let registrar = containers
        .map(|container| &container.name)
        .find(|name| name.contains("registrar"))
        .unwrap_or(&installed.container);
    Some(Found::new(
        format!(
            "the driver runs on node {}, but kubelet there does not know it; set linux.kubeletRootDir if kubelet's root directory is not /var/lib/kubelet",
            node.name
        ),
        format!(
            "kubectl -n {} logs {} -c {registrar}",
            installed.namespace(),
            pod.name_any()
        ),
    ))
}

/// The driver runs and accepts no connection.
pub(super) fn socket(facts: &Facts) -> Option<Found> {
    let driver = &facts.status()?.driver;
    if driver.answers || driver.path.is_none() {
        return None;
    }
    let why = driver.error.as_deref().unwrap_or("it does not answer");
    let what = format!("the driver's socket accepts no connection: {why}");
    Some(Found::new(what, facts.driver_log()))
}

/// Mounts of the driver stay in its container.
pub(super) fn propagation(facts: &Facts) -> Option<Found> {
    let point = facts.status()?.unseen_below.as_ref()?.display();
    let (installed, _) = facts.driver()?;
    Some(Found::new(
        format!(
            "what the driver mounts below {point} is not seen outside its container; set mountPropagation: Bidirectional for that volume mount, and make the mount on the node shared"
        ),
        format!(
            "kubectl -n {} get daemonset {} -o yaml | grep -B4 mountPropagation",
            installed.namespace(),
            installed.set.name_any()
        ),
    ))
}
