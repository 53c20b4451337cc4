//! Judges containers that kubelet starts again and again: those that a probe or a hook ends, that never come to run,
//! and that run in between.

use k8s_openapi::api::core::v1::{ContainerStateTerminated, ContainerStatus, Event};

use super::{Found, events::text, hooks};
use crate::{
    explain::{
        facts::{Facts, time_of},
        state::{self, LATELY},
    },
    text::one_line,
    time::span,
};

/// The number of restarts from which on a container ends again and again.
const OFTEN: i32 = 3;
/// The seconds for which a container has to run at least to have got over what ended it.
const STAYS: i64 = 60;
/// The reasons of ends of containers that never ran, and have no log.
const NEVER_RAN: [&str; 2] = ["StartError", "ContainerCannotRun"];
/// The exit codes of a container that kubelet ends: by SIGKILL, by SIGTERM, and if its program heeds the latter.
pub(super) const OF_KUBELET: [i32; 3] = [137, 143, 0];
/// The longest text of an event in a note.
const MAX_NOTE: usize = 300;

/// Returns whether a container that runs, or has ended without an error, is started again and again. One that has got
/// over its beginning is not, nor one that ran for long before it ended.
pub(in crate::explain) fn ends_again(
    facts: &Facts,
    is_init: bool,
    status: &ContainerStatus,
) -> bool {
    if !is_between(facts, is_init, status) || status.restart_count == 0 {
        return false;
    }
    let ended = state::last_end(status);
    let is_of_now = ended.is_none_or(|ended| {
        let time = ended.finished_at.as_ref();
        let is_late = time.is_none_or(|time| facts.now.duration_since(time.0).as_secs() <= LATELY);
        is_late && run_of(ended).is_none_or(|seconds| seconds <= LATELY)
    });
    let is_often = status.restart_count >= OFTEN && ended.is_some();
    let is_again = is_often || probe(facts, status).is_some();
    is_of_now && is_again && !has_recovered(facts, status)
}

/// Returns whether a container runs, or waits for its next start after an end without an error.
fn is_between(facts: &Facts, is_init: bool, status: &ContainerStatus) -> bool {
    let Some(state) = &status.state else {
        return false;
    };
    state.running.is_some()
        || state.terminated.is_some() && restarts_always(facts, is_init, &status.name)
}

/// Returns whether kubelet starts a container again after an end without an error.
pub(super) fn restarts_always(facts: &Facts, is_init: bool, name: &str) -> bool {
    let mut containers = facts.containers();
    let own = containers
        .find(|container| container.name == name)
        .and_then(|container| container.restart_policy.as_deref());
    let spec = facts.pod.spec.as_ref();
    let of_pod = spec.and_then(|spec| spec.restart_policy.as_deref());
    match (own, is_init) {
        (Some(own), _) => own == "Always",
        (None, true) => false,
        (None, false) => of_pod.is_none_or(|policy| policy == "Always"),
    }
}

/// Returns whether a container is ready, and has run for a minute, and twice as long as before its last end.
fn has_recovered(facts: &Facts, status: &ContainerStatus) -> bool {
    let before = state::last_end(status).and_then(run_of);
    let running = status
        .state
        .as_ref()
        .and_then(|state| state.running.as_ref());
    let since = running.and_then(|running| running.started_at.as_ref());
    let (Some(before), Some(since)) = (before, since) else {
        return false;
    };
    status.ready && facts.now.duration_since(since.0).as_secs() > STAYS.max(2 * before)
}

/// Returns for how many seconds a container ran. One that never started has the beginning of 1970.
fn run_of(ended: &ContainerStateTerminated) -> Option<i64> {
    let (started, finished) = (ended.started_at.as_ref()?.0, ended.finished_at.as_ref()?.0);
    (started.as_second() > 0).then(|| finished.duration_since(started).as_secs())
}

/// Returns the last event that a probe fails for which kubelet ends the container: what the probe says, or else that
/// kubelet has ended it.
fn probe<'a>(facts: &'a Facts, status: &ContainerStatus) -> Option<&'a Event> {
    // One that cannot be asked ends nothing: `Liveness probe errored`.
    let fails = |text: &str| {
        text.contains("Liveness probe failed") || text.contains("Startup probe failed")
    };
    let ends = |text: &str| {
        text.contains("failed liveness probe") || text.contains("failed startup probe")
    };
    let name = &status.name;
    let said = facts.recent_of_container(name, &["Unhealthy"], fails);
    said.or_else(|| facts.recent_of_container(name, &["Killing"], ends))
}

/// Returns the last event that the hook of a container fails without which it does not go on, if that was in its last
/// run. kubelet leaves out events of one kind that are frequent, so that it may be of a run before: then it counts
/// where kubelet has ended the last one, too, as it does because of the hook.
fn hook<'a>(facts: &'a Facts, status: &ContainerStatus) -> Option<&'a Event> {
    let event = facts.recent_of_container(&status.name, &["FailedPostStartHook"], |_| true)?;
    let ended = state::last_end(status);
    let started = ended.and_then(|ended| ended.started_at.as_ref());
    let is_of_run = match (time_of(event), started) {
        (Some(time), Some(started)) => time.as_second() >= started.0.as_second(),
        _ => true,
    };
    let is_ended_by_kubelet = ended.is_some_and(|ended| OF_KUBELET.contains(&ended.exit_code));
    (is_of_run || is_ended_by_kubelet).then_some(event)
}

/// Returns why a container does not come to run, if it is no end of its program: its hook, or that it cannot be
/// started.
pub(super) fn not_of_its_own(facts: &Facts, name: &str, status: &ContainerStatus) -> Option<Found> {
    if let Some(event) = hook(facts, status) {
        let found = hooks::of_hook(facts, name, status, text(event))?;
        return Some(found.said_by(Some(event)));
    }
    let ended = never_ran(status)?;
    let reason = ended.reason.as_deref().unwrap_or_default();
    let message = ended.message.clone().filter(|message| !message.is_empty());
    Some(super::containers::not_started(
        facts,
        name,
        &status.name,
        reason,
        message,
    ))
}

/// Returns the end of a container that could not be started.
pub(super) fn never_ran(status: &ContainerStatus) -> Option<&ContainerStateTerminated> {
    state::last_end(status).filter(|ended| {
        let reason = ended.reason.as_deref();
        reason.is_some_and(|reason| NEVER_RAN.contains(&reason))
    })
}

/// Says that a container ends again and again, and that a probe of it fails, if one does.
pub(super) fn crash(facts: &Facts, status: &ContainerStatus) -> Found {
    let (what, log) = state::crash(facts, status);
    let Some(event) = probe(facts, status).filter(|_| status.restart_count > 0) else {
        let ended = state::last_end(status);
        return match ended.is_some_and(|ended| !state::is_failure(ended)) {
            true => Found::new(
                format!(
                    "{what}; its program ends without an error, and kubelet starts it again (restartPolicy)"
                ),
                log,
            ),
            false => Found::new(what, log),
        };
    };
    let probe = match text(event).to_lowercase().contains("startup probe") {
        true => "startup",
        false => "liveness",
    };
    let what = format!(
        "{what}, and at its {probe} probe, which fails: kubelet ends a container whose {probe} probe fails"
    );
    Found::new(what, log).said_by(Some(event))
}

/// Returns what hooks say of containers that run: nothing of it ends them.
pub(in crate::explain) fn notes(facts: &Facts) -> Vec<String> {
    let note = |event: &Event, name: &str| {
        let ago = time_of(event).map_or_else(String::new, |time| {
            format!(" ({} ago)", span(facts.now.duration_since(time)))
        });
        let said = one_line(text(event), MAX_NOTE);
        format!("the preStop hook of container {name} failed: {said}{ago}")
    };
    let statuses = state::statuses(&facts.pod);
    let notes = statuses.filter_map(|(_, status)| {
        let name = &status.name;
        let hook = facts.recent_of_container(name, &["FailedPreStopHook"], |_| true)?;
        Some(note(hook, name))
    });
    notes.collect()
}
