//! Finds what the start of a pod waits for, whatever that is: the net below all other checks. kubelet starts a pod in
//! this order: its volumes, its sandbox, its init containers one after another, then the other containers one after
//! another, each with its postStart hook, and waits for their probes and for the readiness gates.

mod container;
mod hook;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Event;

use super::{
    Found,
    events::{is_failure, is_of_kubelet, is_warning, text, unmounted},
    order::Stage,
};
use crate::{
    explain::{
        facts::{Facts, VolumeFacts, time_of},
        state,
    },
    installation::is_ready,
    time::shown,
};

pub(super) use container::hook_command;
pub(super) use hook::running as hook;

/// The reason of an event that the sandbox of a pod cannot be made.
pub(super) const NO_SANDBOX: &str = "FailedCreatePodSandBox";
/// The reasons of events about containers, of a time at which the pod had its sandbox.
const OF_CONTAINERS: [&str; 7] = [
    "Pulling",
    "Pulled",
    "Created",
    "Started",
    "BackOff",
    "Failed",
    "Unhealthy",
];

/// The reasons of warnings for which kubelet does not come to the sandbox, and what the pod waits for then.
const OF_OTHERS: [(&str, &str); 2] = [
    (
        "FailedPrepareDynamicResources",
        "its resource claims, which kubelet could not prepare yet",
    ),
    (
        "NetworkNotReady",
        "the network of the node, without which kubelet does not begin with a pod",
    ),
];
/// The reasons of warnings about what comes before kubelet, or is for the images or for the driver.
const OF_OTHER_TIMES: [&str; 5] = [
    "FailedScheduling",
    "FailedResourceClaimCreation",
    "FailedToRetrieveImagePullSecret",
    "FailedToCreateSecret",
    "MountRotationFailed",
];

/// What the start of a pod waits for.
pub(super) struct Step {
    pub stage: Stage,
    /// The container, if it waits for one.
    pub container: Option<String>,
    pub found: Found,
}

impl Step {
    fn new(stage: Stage, found: Found) -> Self {
        Self {
            stage,
            container: None,
            found,
        }
    }
}

/// Finds what a pod waits for that is not ready and has not ended: one thing, or several containers.
pub(super) fn steps(facts: &Facts) -> Vec<Step> {
    if is_ready(&facts.pod) || facts.has_ended() {
        return Vec::new();
    }
    if facts.is_deleted() {
        return vec![Step::new(Stage::Gates, end(facts))];
    }
    let has_node = facts
        .pod
        .spec
        .as_ref()
        .is_some_and(|spec| spec.node_name.is_some());
    if !has_node {
        let found = super::ground::unscheduled(facts);
        return found
            .map(|found| Step::new(Stage::Scheduling, found))
            .into_iter()
            .collect();
    }
    if !has_begun(facts) {
        return vec![before_containers(facts)];
    }
    if !state::is_initialized(&facts.pod)
        && let Some(step) = container::init(facts)
    {
        return vec![step];
    }
    let steps = container::others(facts);
    if steps.is_empty() && has_done_its_work(facts) {
        return Vec::new();
    }
    match steps.is_empty() {
        true => vec![Step::new(Stage::Gates, gates(facts))],
        false => steps,
    }
}

/// Somebody has deleted the pod.
fn end(facts: &Facts) -> Found {
    let deadline = facts.pod.metadata.deletion_timestamp.as_ref();
    let deadline = deadline.map_or_else(String::new, |time| {
        let have = match time.0 < facts.now {
            true => "had",
            false => "have",
        };
        format!(
            ", and its containers {have} until {}",
            shown(time.0, facts.now)
        )
    });
    Found::new(
        format!("its end: somebody has deleted it{deadline}"),
        facts.describe(),
    )
}

/// Returns whether kubelet has come to the containers. While it works on a pod it does not report its state, so that
/// an event may know it first.
fn has_begun(facts: &Facts) -> bool {
    let before = latest(facts, is_before_containers).and_then(time_of);
    state::has_begun(&facts.pod) || of_containers_since(facts, before)
}

/// Returns whether an event about a container is not older than this.
pub(super) fn of_containers_since(facts: &Facts, time: Option<Timestamp>) -> bool {
    let mut events = facts.events.found().into_iter().flatten();
    events.any(|event| {
        let reason = event.reason.as_deref().unwrap_or_default();
        OF_CONTAINERS.contains(&reason) && time_of(event) >= time
    })
}

/// Returns whether an event says what comes before the containers and fails.
fn is_before_containers(event: &Event) -> bool {
    is_failure(event) || event.reason.as_deref() == Some(NO_SANDBOX)
}

/// kubelet mounts the volumes, or makes the sandbox.
fn before_containers(facts: &Facts) -> Step {
    let status = facts.pod.status.as_ref();
    let taken = status.and_then(|status| status.start_time.as_ref());
    let created = facts.pod.metadata.creation_timestamp.as_ref();
    let Some(since) = taken.map(|time| time.0) else {
        let node = facts.node.as_ref().map_or("", |node| node.name.as_str());
        let since = since(created.map(|time| time.0), facts);
        let what = format!("kubelet of node {node}, which has not taken the pod up yet{since}");
        return Step::new(Stage::Volumes, Found::new(what, facts.describe()));
    };
    let since = shown(since, facts.now);
    let event = latest(facts, is_before_containers).or_else(|| other_warning(facts));
    let reason = event.and_then(|event| event.reason.as_deref());
    let of_others = OF_OTHERS.iter().find(|(of, _)| Some(*of) == reason);
    if let Some((_, what)) = of_others {
        let what = format!("{what}; kubelet has the pod since {since}");
        let found = Found::new(what, facts.describe()).said_by(event);
        return Step::new(Stage::Volumes, found);
    }
    if reason == Some(NO_SANDBOX) {
        let what =
            format!("its sandbox, which kubelet could not make yet; it has the pod since {since}");
        let found = Found::new(what, facts.describe()).said_by(event);
        return Step::new(Stage::Sandbox, found);
    }
    let used = facts.volumes.iter().filter(|volume| facts.is_used(volume));
    let is_mounted = |volume: &&VolumeFacts| facts.is_mounted(volume) == Some(true);
    let waiting: Vec<_> = used.filter(|volume| !is_mounted(volume)).collect();
    let names: Vec<_> = waiting.iter().map(|volume| volume.name.as_str()).collect();
    let listed = event.and_then(unmounted).unwrap_or_default();
    let what = match (names.as_slice(), listed.as_slice()) {
        ([], []) => format!(
            "what comes before its containers: kubelet mounts its other volumes and makes its sandbox; it has the pod since {since}"
        ),
        ([], listed) => format!(
            "its volumes {}; kubelet has the pod since {since}",
            listed.join(", ")
        ),
        (names, _) => format!(
            "its volume {}, which kubelet has not mounted yet; it has the pod since {since}",
            names.join(", ")
        ),
    };
    let what = format!("{what}{}", hook::possible(facts));
    let found = Found::new(what, facts.describe()).said_by(event);
    Step::new(Stage::Volumes, found)
}

/// Returns kubelet's latest warning about the pod since it has it, if that is not about volumes.
pub(super) fn other_warning(facts: &Facts) -> Option<&Event> {
    let status = facts.pod.status.as_ref();
    let taken = status.and_then(|status| status.start_time.as_ref());
    let taken = taken.map(|time| time.0.as_second());
    latest(facts, |event| {
        let reason = event.reason.as_deref().unwrap_or_default();
        let time = time_of(event).map(|time| time.as_second());
        let is_of_now = is_of_kubelet(event) && time >= taken;
        is_of_now && !is_failure(event) && !OF_OTHER_TIMES.contains(&reason)
    })
}

/// Returns whether all containers have done their work, of a pod that kubelet does not report as ended yet.
fn has_done_its_work(facts: &Facts) -> bool {
    let mut others = state::statuses(&facts.pod).filter(|(is_init, _)| !is_init);
    others.all(|(_, status)| {
        let state = status.state.as_ref();
        state.is_some_and(|state| state.terminated.is_some())
    })
}

/// All containers are ready, and the pod is not.
fn gates(facts: &Facts) -> Found {
    let spec = facts.pod.spec.iter();
    let gates = spec.flat_map(|spec| spec.readiness_gates.iter().flatten());
    let open: Vec<_> = gates
        .filter_map(|gate| {
            let found = state::condition(&facts.pod, &gate.condition_type);
            match found {
                Some(found) if found.status == "True" => None,
                Some(found) => Some((gate, found.status.as_str(), found.message.clone())),
                None => Some((gate, "not set", None)),
            }
        })
        .collect();
    if !open.is_empty() {
        let names: Vec<_> = open
            .iter()
            .map(|(gate, status, _)| format!("{} ({status})", gate.condition_type))
            .collect();
        let what = format!(
            "its readiness gates: {}; those who set these conditions know why",
            names.join(", ")
        );
        let said = open.into_iter().find_map(|(_, _, said)| said);
        return Found::new(what, facts.describe()).said(said);
    }
    let done: Vec<_> = state::statuses(&facts.pod)
        .filter(|(is_init, status)| {
            let state = status.state.as_ref();
            !is_init && state.is_some_and(|state| state.terminated.is_some())
        })
        .map(|(_, status)| status.name.as_str())
        .collect();
    let what = match done.as_slice() {
        [] => "kubelet, which has not reported yet that the pod is ready".to_owned(),
        names => format!(
            "nothing more: container {} has done its work, and a pod with such a container is never ready",
            names.join(", ")
        ),
    };
    let said = state::condition(&facts.pod, "Ready").and_then(|ready| ready.message.clone());
    let said = said.filter(|said| !said.is_empty());
    Found::new(what, facts.describe()).said(said)
}

/// Returns the latest warning about the pod, and not about one of its containers, that fits.
fn latest(facts: &Facts, fits: impl Fn(&Event) -> bool) -> Option<&Event> {
    let mut events = facts.events.found()?.iter();
    events.find(|event| {
        let field = event.involved_object.field_path.as_ref();
        is_warning(event) && field.is_none() && fits(event) && !text(event).is_empty()
    })
}

/// Returns since when something is so, if that is known.
fn since(time: Option<Timestamp>, facts: &Facts) -> String {
    time.map_or_else(String::new, |time| {
        format!(" since {}", shown(time, facts.now))
    })
}
