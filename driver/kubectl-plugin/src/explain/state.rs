//! What a pod does, in the words of `kubectl get pod`.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStateTerminated, ContainerStatus, Pod};
use kube::ResourceExt as _;

use super::facts::Facts;
use crate::time::span;

/// The seconds for which an end of a container says something of the present. kubelet waits five minutes at most
/// until it starts one again.
const LATELY: i64 = 600;

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
    let spec = pod.spec.iter();
    let sidecars: Vec<_> = spec
        .flat_map(|spec| spec.init_containers.iter().flatten())
        .filter(|container| container.restart_policy.as_deref() == Some("Always"))
        .map(|container| container.name.as_str())
        .collect();
    init.iter().enumerate().find_map(|(index, container)| {
        let state = container.state.as_ref();
        let ended = state.and_then(|state| state.terminated.as_ref());
        let has_started =
            container.started == Some(true) && sidecars.contains(&container.name.as_str());
        if has_started || ended.is_some_and(|ended| ended.exit_code == 0) {
            return None;
        }
        Some(match reason(container).as_deref() {
            None | Some("PodInitializing") => format!("Init:{index}/{}", init.len()),
            Some(reason) => format!("Init:{reason}"),
        })
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

/// Returns what to do about the containers that start and end again.
pub(super) fn crashes(facts: &Facts) -> Vec<String> {
    let status = facts.pod.status.iter();
    let containers = status.flat_map(|status| {
        let init = status.init_container_statuses.iter().flatten();
        init.chain(status.container_statuses.iter().flatten())
    });
    containers
        .filter(|container| {
            reason(container).as_deref() == Some("CrashLoopBackOff")
                || ended_lately(container, facts.now).is_some()
        })
        .map(|container| crash(facts, container))
        .collect()
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
        let is_failure =
            ended.exit_code != 0 || !matches!(ended.reason.as_deref(), None | Some("Completed"));
        let time = ended.finished_at.as_ref();
        is_failure && time.is_none_or(|time| now.duration_since(time.0).as_secs() <= LATELY)
    })
}

fn last_end(container: &ContainerStatus) -> Option<&ContainerStateTerminated> {
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

fn crash(facts: &Facts, status: &ContainerStatus) -> String {
    let container = status.name.as_str();
    let ended = last_end(status);
    let ended = ended.map_or_else(String::new, |ended| {
        format!(", the last time with {}", end(ended, facts.now))
    });
    let namespace = facts.pod.namespace().unwrap_or_default();
    let pod = facts.pod.name_any();
    let log = format!("kubectl -n {namespace} logs {pod} -c {container} --previous");
    let mut volumes = facts.volumes.iter();
    let why = if volumes.len() == 0 {
        ""
    } else if volumes.any(|volume| facts.is_mounted_by(volume, container)) {
        " its volumes are mounted, so"
    } else {
        " it mounts no volume of the driver and cannot read their files; if it should, add them to its volumeMounts; else"
    };
    format!("container {container} starts and ends again{ended}:{why} look at its log ({log})")
}
