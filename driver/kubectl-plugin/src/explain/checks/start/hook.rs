//! Finds out whether the postStart hook of a container is running. kubelet waits for it before it goes on, and reports
//! nothing of the pod meanwhile: its events say more than its state.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, ContainerStatus, Event};

use crate::explain::{
    checks::events::is_about,
    facts::{Facts, time_of},
    state,
};

/// The reasons of events after which the hook of a container does not run any more.
const ENDED: [&str; 4] = ["FailedPostStartHook", "Killing", "BackOff", "Failed"];

/// Returns the container whose hook is running, and since when.
pub(in crate::explain::checks) fn running(facts: &Facts) -> Option<(&Container, Timestamp)> {
    let mut containers = facts.containers().filter(|container| has_one(container));
    containers.find_map(|container| {
        let mut statuses = state::statuses(&facts.pod);
        let status = statuses.find(|(_, status)| status.name == container.name);
        let status = status.map(|(_, status)| status);
        Some((container, started(facts, container, status)?))
    })
}

/// Returns words for a hook that may be running, where the events cannot be read.
pub(super) fn possible(facts: &Facts) -> String {
    let mut containers = facts.containers().filter(|container| has_one(container));
    match containers
        .next()
        .filter(|_| facts.events.unknown().is_some())
    {
        Some(container) => format!(
            "; or the postStart hook of container {} is still running",
            container.name
        ),
        None => String::new(),
    }
}

pub(super) fn has_one(container: &Container) -> bool {
    let lifecycle = container.lifecycle.as_ref();
    lifecycle.is_some_and(|lifecycle| lifecycle.post_start.is_some())
}

/// Returns when kubelet started a container, if it has not reported since that it runs.
fn started(
    facts: &Facts,
    container: &Container,
    status: Option<&ContainerStatus>,
) -> Option<Timestamp> {
    let state = status.and_then(|status| status.state.as_ref());
    if state.is_some_and(|state| state.running.is_some()) {
        return None;
    }
    let all = facts.events.found()?.iter();
    let of_it: Vec<_> = all
        .filter(|event| is_about(event, &container.name))
        .collect();
    let last = |reasons: &[&str]| {
        let is_one = |event: &&&Event| {
            let reason = event.reason.as_deref().unwrap_or_default();
            reasons.contains(&reason)
        };
        of_it.iter().find(is_one).and_then(|event| time_of(event))
    };
    let start = last(&["Started"])?;
    // Events and ends of containers have whole seconds.
    let is_over =
        |end: Option<Timestamp>| end.is_some_and(|end| end.as_second() >= start.as_second());
    let ended = status.and_then(state::last_end);
    let ended = ended.and_then(|ended| ended.finished_at.as_ref());
    let ended = ended.map(|time| time.0);
    (!is_over(last(&ENDED)) && !is_over(ended)).then_some(start)
}
