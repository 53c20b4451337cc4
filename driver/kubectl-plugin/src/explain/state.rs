//! What a pod does, in the words of `kubectl get pod`.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStateTerminated, ContainerStatus, Pod, PodCondition};
use kube::ResourceExt as _;

use super::{checks::ends_again, facts::Facts};
use crate::time::span;

/// The seconds for which an end of a container says something of the present. kubelet waits five minutes at most
/// until it starts one again.
pub(super) const LATELY: i64 = 600;

/// The reason of an end because of the memory that a container took.
const OUT_OF_MEMORY: &str = "OOMKilled";

/// Returns what `kubectl get pod` shows as the pod's status.
pub(super) fn of(pod: &Pod) -> String {
    if pod.metadata.deletion_timestamp.is_some() {
        return "Terminating".to_owned();
    }
    let Some(status) = &pod.status else {
        return "Pending".to_owned();
    };
    let init = status
        .init_container_statuses
        .as_deref()
        .unwrap_or_default();
    let all = status.container_statuses.as_deref().unwrap_or_default();
    if let Some(state) = initializing(pod, init) {
        return state;
    }
    let reason = all.iter().find_map(reason);
    let phase = status.reason.as_ref().or(status.phase.as_ref()).cloned();
    let is_up = all.iter().any(|container| {
        let state = container.state.as_ref();
        container.ready && state.is_some_and(|state| state.running.is_some())
    });
    match (reason.as_deref(), phase) {
        // A container that has done its work beside one that still runs.
        (Some("Completed"), Some(phase)) if is_up => phase,
        (Some(reason), _) => reason.to_owned(),
        (None, Some(phase)) => phase,
        (None, None) => "Pending".to_owned(),
    }
}

/// Returns the state of the first init container that has not done its work; a sidecar has, once it has
/// started.
fn initializing(pod: &Pod, init: &[ContainerStatus]) -> Option<String> {
    init.iter().enumerate().find_map(|(index, container)| {
        let state = container.state.as_ref();
        let ended = state.and_then(|state| state.terminated.as_ref());
        let has_started = container.started == Some(true) && is_sidecar(pod, &container.name);
        if has_started || ended.is_some_and(|ended| ended.exit_code == 0) {
            return None;
        }
        Some(match reason(container).as_deref() {
            None | Some("PodInitializing") => format!("Init:{index}/{}", init.len()),
            Some(reason) => format!("Init:{reason}"),
        })
    })
}

/// Returns whether a container is an init container that goes on beside the others.
pub(super) fn is_sidecar(pod: &Pod, name: &str) -> bool {
    let spec = pod.spec.iter();
    let mut init = spec.flat_map(|spec| spec.init_containers.iter().flatten());
    init.any(|init| init.name == name && init.restart_policy.as_deref() == Some("Always"))
}

/// Returns a condition of the pod.
pub(super) fn condition<'a>(pod: &'a Pod, kind: &str) -> Option<&'a PodCondition> {
    let status = pod.status.iter();
    let mut conditions = status.flat_map(|status| status.conditions.iter().flatten());
    conditions.find(|condition| condition.type_ == kind)
}

/// Returns whether all init containers are through. kubelet starts no other container before.
pub(super) fn is_initialized(pod: &Pod) -> bool {
    if let Some(condition) = condition(pod, "Initialized") {
        return condition.status == "True";
    }
    let status = pod.status.iter();
    let mut others = status.flat_map(|status| status.container_statuses.iter().flatten());
    others.any(|status| {
        let state = status.state.as_ref();
        state.is_some_and(|state| state.running.is_some() || state.terminated.is_some())
    })
}

/// Returns the reason why a container does not run.
fn reason(container: &ContainerStatus) -> Option<String> {
    let state = container.state.as_ref()?;
    if let Some(waiting) = &state.waiting {
        return waiting.reason.clone().filter(|reason| !reason.is_empty());
    }
    let ended = state.terminated.as_ref()?;
    let reason = ended.reason.clone().filter(|reason| !reason.is_empty());
    reason.or_else(|| Some(format!("ExitCode:{}", ended.exit_code)))
}

/// Returns the states of the pod's containers, the init containers first, and whether it is one of those.
pub(super) fn statuses(pod: &Pod) -> impl Iterator<Item = (bool, &ContainerStatus)> {
    let status = pod.status.iter();
    status.flat_map(|status| {
        let init = status.init_container_statuses.iter().flatten();
        let others = status.container_statuses.iter().flatten();
        let init = init.map(|status| (true, status));
        init.chain(others.map(|status| (false, status)))
    })
}

/// Returns the condition that the pod has a sandbox, which kubelet makes once all volumes are mounted. kubelet has
/// it since Kubernetes 1.29.
pub(super) fn sandbox(pod: &Pod) -> Option<&PodCondition> {
    condition(pod, "PodReadyToStartContainers").filter(|condition| condition.status == "True")
}

/// Returns whether kubelet has gone on from mounting volumes to starting containers.
pub(super) fn has_begun(pod: &Pod) -> bool {
    sandbox(pod).is_some()
        || statuses(pod).any(|(_, status)| {
            let state = status.state.as_ref();
            let waiting = state.and_then(|state| state.waiting.as_ref());
            let reason = waiting.and_then(|waiting| waiting.reason.as_deref());
            let waits = matches!(reason, None | Some("ContainerCreating" | "PodInitializing"));
            !waits
                || state.is_some_and(|state| state.running.is_some() || state.terminated.is_some())
        })
}

/// Returns when a container was started last.
pub(super) fn started(status: &ContainerStatus) -> Option<Timestamp> {
    let states = status.state.iter().chain(&status.last_state);
    let mut starts = states.filter_map(|state| {
        let running = state.running.as_ref();
        let running = running.and_then(|running| running.started_at.as_ref());
        let ended = state.terminated.as_ref();
        running.or_else(|| ended?.started_at.as_ref())
    });
    starts.next().map(|time| time.0)
}

/// Returns what to do about the containers that run, and have ended lately.
pub(super) fn crashes(facts: &Facts) -> Vec<String> {
    let containers = statuses(&facts.pod);
    // That is told as what is wrong.
    let containers = containers.filter(|(is_init, status)| !ends_again(facts, *is_init, status));
    let containers = containers.map(|(_, status)| status);
    let is_up = |status: &&ContainerStatus| {
        let state = status.state.as_ref();
        state.is_some_and(|state| state.running.is_some())
    };
    containers
        .filter(is_up)
        .filter(|container| ended_lately(container, facts.now).is_some())
        .map(|container| {
            let (what, log) = crash(facts, container);
            format!("{what} ({log})")
        })
        .collect()
}

/// Returns whether a container does not run because it ended with an error, or ends again and again.
pub(super) fn is_down(status: &ContainerStatus) -> bool {
    let state = status.state.as_ref();
    let has_failed = state
        .and_then(|state| state.terminated.as_ref())
        .is_some_and(is_failure);
    has_failed || reason(status).as_deref() == Some("CrashLoopBackOff")
}

pub(super) fn is_failure(ended: &ContainerStateTerminated) -> bool {
    ended.exit_code != 0 || !matches!(ended.reason.as_deref(), None | Some("Completed"))
}

/// Returns the last end of a container that is started again and again, if it was lately. It runs in between, and
/// one without a readiness probe is ready then.
pub(super) fn ended_lately(
    container: &ContainerStatus,
    now: Timestamp,
) -> Option<&ContainerStateTerminated> {
    if container.restart_count == 0 {
        return None;
    }
    last_end(container).filter(|ended| {
        let time = ended.finished_at.as_ref();
        is_failure(ended) && time.is_none_or(|time| now.duration_since(time.0).as_secs() <= LATELY)
    })
}

pub(super) fn last_end(container: &ContainerStatus) -> Option<&ContainerStateTerminated> {
    let mut states = container.state.iter().chain(&container.last_state);
    states.find_map(|state| state.terminated.as_ref())
}

/// Returns how a container ended, and how long ago.
pub(super) fn end(ended: &ContainerStateTerminated, now: Timestamp) -> String {
    let reason = ended.reason.as_deref().unwrap_or("Error");
    let time = ended.finished_at.as_ref();
    let ago = time.map_or_else(String::new, |time| {
        format!(", {} ago", span(now.duration_since(time.0)))
    });
    format!("{reason}, exit code {}{ago}", ended.exit_code)
}

/// Returns that a container ends, and the command that shows its log.
pub(super) fn crash(facts: &Facts, status: &ContainerStatus) -> (String, String) {
    let container = status.name.as_str();
    let ended = last_end(status);
    let has_ended = status
        .state
        .as_ref()
        .and_then(|state| state.terminated.as_ref());
    let mut volumes = facts.volumes.iter();
    let why = if volumes.len() == 0 {
        ""
    } else if volumes.any(|volume| facts.is_mounted_by(volume, container)) {
        " its volumes are mounted, so"
    } else {
        " it mounts no volume of the driver and cannot read their files; if it should, add them to its volumeMounts; else"
    };
    let runs = status
        .state
        .as_ref()
        .is_some_and(|state| state.running.is_some());
    let (verb, last) = match (status.restart_count, has_ended.is_some(), runs) {
        (0, true, _) => ("has ended", " with"),
        (1, _, true) => ("has ended once", ", with"),
        _ => ("starts and ends again", ", the last time with"),
    };
    let ended = ended.map_or_else(String::new, |ended| {
        format!("{last} {}", end(ended, facts.now))
    });
    if last_end(status).is_some_and(|ended| ended.reason.as_deref() == Some(OUT_OF_MEMORY)) {
        let what = format!(
            "container {container} {verb}{ended}: {}",
            memory(facts, container)
        );
        return (what, facts.describe());
    }
    let what = format!("container {container} {verb}{ended}:{why} look at its log");
    // The log of a container that has not been started again yet is the one of its end.
    let previous = match has_ended {
        Some(_) => "",
        None => " --previous",
    };
    (what, log(facts, container, previous))
}

/// Returns what to do about a container that the node has ended because of its memory.
fn memory(facts: &Facts, container: &str) -> String {
    let mut containers = facts.containers();
    let found = containers.find(|found| found.name == container);
    let limits = found.and_then(|found| found.resources.as_ref()?.limits.as_ref());
    match limits.and_then(|limits| limits.get("memory")) {
        Some(limit) => format!(
            "it took more memory than its limit of {}; raise resources.limits.memory, or let its program take less",
            limit.0
        ),
        None => "the node has ended it because of the memory that it took".to_owned(),
    }
}

/// Returns the command that shows the log of a container.
pub(super) fn log(facts: &Facts, container: &str, previous: &str) -> String {
    let namespace = facts.pod.namespace().unwrap_or_default();
    let pod = facts.pod.name_any();
    format!("kubectl -n {namespace} logs {pod} -c {container}{previous}")
}
