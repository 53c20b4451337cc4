//! What a pod does, in the words of `kubectl get pod`.

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use kube::ResourceExt as _;

use super::facts::Facts;

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
        .filter(|container| is_crashing(container))
        .map(|container| crash(facts, &container.name))
        .collect()
}

/// A container that crashes is started again and again, so that it runs in between.
fn is_crashing(container: &ContainerStatus) -> bool {
    if reason(container).as_deref() == Some("CrashLoopBackOff") {
        return true;
    }
    let ended = container.state.iter().chain(&container.last_state);
    let mut ended = ended.filter_map(|state| state.terminated.as_ref());
    !container.ready && container.restart_count > 0 && ended.any(|ended| ended.exit_code != 0)
}

fn crash(facts: &Facts, container: &str) -> String {
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
    format!("container {container} starts and ends again:{why} look at its log ({log})")
}
