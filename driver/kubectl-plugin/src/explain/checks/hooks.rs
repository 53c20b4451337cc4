//! Judges a postStart hook that fails: whether it is the cause, or the container ended first and took the hook along.

use k8s_openapi::api::core::v1::ContainerStatus;

use super::{Found, restarts::OF_KUBELET, start::hook_command};
use crate::explain::{facts::Facts, state};

/// Pieces of what kubelet says of a hook whose container has ended, in lower case.
const NOT_RUNNING: [&str; 5] = [
    "stopped state",
    "container not running",
    "is not running",
    "not in running state",
    "container has already exited",
];
/// Pieces of what it says of a hook that was killed, which the end of its container does as well.
const KILLED: [&str; 2] = ["exited with 137", "exit code 137"];

/// What makes a container end whose hook fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// The hook: kubelet ends the container for it.
    Hook,
    /// The container itself, of which the hook is a part.
    Container,
    /// It cannot be told.
    Unknown,
}

/// Returns the cause, by what kubelet says of the hook and how the container ended.
fn cause(status: &ContainerStatus, said: &str) -> Cause {
    let said = said.to_lowercase();
    let has = |pieces: &[&str]| pieces.iter().any(|piece| said.contains(piece));
    let (is_gone, is_killed) = (has(&NOT_RUNNING), has(&KILLED));
    let Some(ended) = state::last_end(status) else {
        return match (is_gone, is_killed) {
            (true, _) => Cause::Container,
            (false, true) => Cause::Unknown,
            (false, false) => Cause::Hook,
        };
    };
    // The hook may have been what took the memory, but then it was killed with the container.
    let is_of_memory = ended.reason.as_deref() == Some("OOMKilled");
    let is_of_signal = ended.exit_code != 0 && OF_KUBELET.contains(&ended.exit_code);
    match (is_of_signal, is_gone || is_killed) {
        _ if is_of_memory => Cause::Container,
        (false, true) => Cause::Container,
        (true, false) => Cause::Hook,
        (true, true) => Cause::Unknown,
        // A program may heed the signal with which kubelet ends it.
        (false, false) if ended.exit_code == 0 => Cause::Hook,
        (false, false) => Cause::Unknown,
    }
}

/// Says that the hook of a container fails; `said` is what kubelet says of it, and `name` has the container's kind, too.
/// Returns `None` if it was the container that ended first.
pub(super) fn of_hook(
    facts: &Facts,
    name: &str,
    status: &ContainerStatus,
    said: &str,
) -> Option<Found> {
    let fine = super::containers::fine(facts);
    let container = status.name.as_str();
    let spec = facts.pod.spec.iter();
    let mut init = spec.flat_map(|spec| spec.init_containers.iter().flatten());
    let is_init = init.any(|init| init.name == container);
    let hook = hook_command(facts, container, is_init);
    match cause(status, said) {
        Cause::Container => None,
        Cause::Hook => {
            let what = format!(
                "{fine}the postStart hook of {name} fails, so kubelet ends the container and starts it again: correct lifecycle.postStart; the log of the container has nothing of the hook"
            );
            Some(Found::new(what, hook))
        }
        Cause::Unknown => {
            let ended = state::last_end(status);
            let ended = ended.map_or_else(String::new, |ended| {
                format!(", the last time with {}", state::end(ended, facts.now))
            });
            let what = format!(
                "{fine}{name} ends{ended}, and its postStart hook fails; which of them is first is not known: look at the log of the container first, which has nothing of the hook, then at lifecycle.postStart"
            );
            let log = state::log(facts, container, previous(status));
            Some(Found::new(what, format!("{log}; {hook}")))
        }
    }
}

/// Returns the words that a container has ended first, which its hook did not survive.
pub(super) const ENDED_FIRST: &str =
    "; its postStart hook failed only because the container had ended";

/// Returns the flag with which the log is that of the last end.
fn previous(status: &ContainerStatus) -> &'static str {
    let state = status.state.as_ref();
    match state.is_some_and(|state| state.terminated.is_some()) {
        true => "",
        false => " --previous",
    }
}
