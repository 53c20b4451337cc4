//! Checks what containers wait for that is not a volume: their image, a field or an object that kubelet refuses, their
//! own program, and the sandbox of the pod.

use k8s_openapi::api::core::v1::{ContainerStatus, Event};

use super::{
    Found, Trouble,
    events::{is_about, text, waits},
    restarts,
};
use crate::{
    explain::{
        facts::{Facts, time_of},
        state,
    },
    installation::is_ready,
};

/// The seconds for which an event about the sandbox says something of the present.
const RECENT: i64 = 600;

/// The reasons for which a container waits for its image.
const OF_IMAGE: [&str; 7] = [
    "ImagePullBackOff",
    "ErrImagePull",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
    "SignatureValidationFailed",
];
/// The reasons for which kubelet does not start a container.
const OF_CONFIG: [&str; 5] = [
    "CreateContainerConfigError",
    "CreateContainerError",
    "PreCreateHookError",
    "PreStartHookError",
    "RunContainerError",
];
/// The reason for which a container waits whose hook fails.
const OF_HOOK: &str = "PostStartHookError";

/// Pieces of what a registry or kubelet says about an image, in lower case, and what to do. The first one that fits
/// counts.
const IMAGES: &[(&str, &str)] = &[
    (
        "denied",
        "the registry refuses the node: correct the name, or give the pod an imagePullSecret of this registry",
    ),
    (
        "unauthorized",
        "the registry refuses the node: give the pod an imagePullSecret of this registry",
    ),
    (
        "authorization",
        "the registry refuses the node: correct the name, or give the pod an imagePullSecret of this registry",
    ),
    (
        "invalidimagename",
        "that cannot be the name of an image: correct it",
    ),
    (
        "not found",
        "the registry has no such image or tag: correct it",
    ),
    (
        "manifest unknown",
        "the registry has no such image or tag: correct it",
    ),
    ("i/o timeout", "the node does not reach the registry"),
    ("no such host", "the node does not reach the registry"),
    ("connection refused", "the node does not reach the registry"),
    (
        "never",
        "the node does not have it, and imagePullPolicy is Never",
    ),
];

/// Pieces of what kubelet says about a container that it does not make, in lower case, and what to do.
const CONFIGS: &[(&str, &str)] = &[
    (
        "image will run as root",
        "runAsNonRoot forbids that it runs as root: set runAsUser in securityContext, or take an image with another user",
    ),
    (
        "cannot verify user is non-root",
        "the image has the name of a user, of which runAsNonRoot cannot tell whether it is root: set runAsUser in securityContext to its number",
    ),
    (
        "runasuser breaks non-root policy",
        "runAsUser is 0, and runAsNonRoot forbids that: set another number",
    ),
    (
        "couldn't find key",
        "a variable takes a key that is not there: correct the key, or write it",
    ),
    (
        "subpath",
        "a volume mount has a subPath that cannot be used: correct it",
    ),
    (
        "executable file not found",
        "the image has no such program: correct command or args",
    ),
    (
        "configmap \"",
        "a variable takes a ConfigMap: create it, or correct the name",
    ),
    (
        "secret \"",
        "a variable takes a Secret: create it, or correct the name",
    ),
];

/// Finds what keeps the containers of a pod from running. `is_told` is whether it has been told of a Secret of the
/// environment.
pub(super) fn wrong(facts: &Facts, is_told: bool) -> Vec<Trouble> {
    if facts.is_deleted() {
        return Vec::new();
    }
    if facts.has_ended() {
        let failed = failed(facts).map(|found| facts.trouble("pod-failed", None, found));
        return failed.into_iter().collect();
    }
    if let Some(found) = sandbox(facts) {
        return vec![facts.trouble("sandbox", None, found)];
    }
    let statuses = state::statuses(&facts.pod);
    let found =
        statuses.filter_map(|(is_init, status)| of_container(facts, is_init, status, is_told));
    found.collect()
}

fn of_container(
    facts: &Facts,
    is_init: bool,
    status: &ContainerStatus,
    is_told: bool,
) -> Option<Trouble> {
    let name = match is_init {
        true => format!("init container {}", status.name),
        false => format!("container {}", status.name),
    };
    if state::is_down(status) || restarts::ends_again(facts, is_init, status) {
        return Some(match restarts::not_of_its_own(facts, &name, status) {
            Some(found) => facts.trouble("container-config", None, found),
            None => facts.trouble("container-crash", None, crash(facts, is_init, status)),
        });
    }
    let waiting = status.state.as_ref()?.waiting.as_ref()?;
    let reason = waiting.reason.as_deref()?;
    let waits = Waits {
        name,
        status,
        reason,
        said: waiting.message.clone().filter(|said| !said.is_empty()),
    };
    if OF_IMAGE.contains(&reason) {
        return Some(facts.trouble("image", None, image(facts, waits)));
    }
    if reason == OF_HOOK {
        let found = restarts::of_hook(facts, &waits.name, &status.name).said(waits.said);
        return Some(facts.trouble("container-config", None, found));
    }
    if !OF_CONFIG.contains(&reason) {
        return None;
    }
    let found = config(facts, waits);
    let is_new = !is_told || !found.said.as_deref().is_none_or(is_about_secret);
    is_new.then(|| facts.trouble("container-config", None, found))
}

/// A container that waits.
struct Waits<'a> {
    /// Its kind and its name.
    name: String,
    status: &'a ContainerStatus,
    reason: &'a str,
    said: Option<String>,
}

/// Returns that the volumes are fine, where the pod has some.
pub(super) fn fine(facts: &Facts) -> &'static str {
    let mut volumes = facts.volumes.iter().filter(|volume| facts.is_used(volume));
    let has_some = !facts.volumes.is_empty();
    match has_some && volumes.all(|volume| facts.is_mounted(volume) == Some(true)) {
        true => "the volumes are mounted; ",
        false => "",
    }
}

fn image(facts: &Facts, waits: Waits<'_>) -> Found {
    let Waits {
        name,
        status,
        reason,
        said,
    } = waits;
    let event = failure_of(facts, status, "pull image");
    // What the registry said is in the event; kubelet later says only that it waits.
    let is_short = said.as_ref().is_none_or(|said| !said.contains(": "));
    let event = event.filter(|_| is_short);
    let words = event.map_or_else(
        || said.clone().unwrap_or_default(),
        |event| text(event).to_owned(),
    );
    let advice = advice(IMAGES, &format!("{words} {reason}"));
    let advice = advice.map_or_else(String::new, |advice| format!("; {advice}"));
    let what = format!(
        "{}{name} waits for its image {} ({reason}){advice}",
        fine(facts),
        image_of(facts, status)
    );
    let found = Found::new(what, facts.describe());
    match event {
        Some(event) => found.said_by(Some(event)),
        None => found.said(said),
    }
}

/// Returns the image that the pod asks for. The state has another spelling, or none.
fn image_of<'a>(facts: &'a Facts, status: &'a ContainerStatus) -> &'a str {
    let mut containers = facts.containers();
    let container = containers.find(|container| container.name == status.name);
    let image = container.and_then(|container| container.image.as_deref());
    image.unwrap_or(&status.image)
}

fn config(facts: &Facts, waits: Waits<'_>) -> Found {
    let Waits {
        name,
        status,
        reason,
        said,
    } = waits;
    let event = failure_of(facts, status, "Error: ").filter(|_| said.is_none());
    let words = said
        .as_deref()
        .or_else(|| event.map(text))
        .unwrap_or_default();
    let found = not_started(facts, &name, reason, Some(words.to_owned()));
    match event {
        Some(event) => found.said_by(Some(event)),
        None => found.said(said),
    }
}

/// Says that kubelet cannot start a container, and what to do about what it says.
pub(super) fn not_started(facts: &Facts, name: &str, reason: &str, said: Option<String>) -> Found {
    let advice = advice(CONFIGS, said.as_deref().unwrap_or_default());
    let advice = advice.map_or_else(String::new, |advice| format!("; {advice}"));
    let what = format!(
        "{}kubelet cannot start {name} ({reason}){advice}",
        fine(facts)
    );
    Found::new(what, facts.describe()).said(said)
}

/// Returns whether kubelet speaks of a Secret.
pub(super) fn is_about_secret(said: &str) -> bool {
    let said = said.to_lowercase();
    let mut pieces = ["secret \"", "in secret "].iter();
    pieces.any(|piece| said.contains(piece))
}

fn advice(all: &[(&'static str, &'static str)], words: &str) -> Option<&'static str> {
    let words = words.to_lowercase();
    let mut all = all.iter();
    all.find(|(piece, _)| words.contains(piece))
        .map(|(_, advice)| *advice)
}

/// Returns kubelet's last event about a container that it could not start.
fn failure_of<'a>(facts: &'a Facts, status: &ContainerStatus, piece: &str) -> Option<&'a Event> {
    let mut events = facts.events.found()?.iter();
    events.find(|event| {
        event.reason.as_deref() == Some("Failed")
            && is_about(event, &status.name)
            && text(event).contains(piece)
    })
}

fn crash(facts: &Facts, is_init: bool, status: &ContainerStatus) -> Found {
    let found = restarts::crash(facts, status);
    let what = &found.what;
    // A sidecar may end while the others run.
    let has_begun =
        |(is_init, other): (bool, &ContainerStatus)| !is_init && state::started(other).is_some();
    let what = match (is_init, state::statuses(&facts.pod).any(has_begun)) {
        (true, false) => format!("init {what}; the other containers wait for it"),
        (true, true) => format!("init {what}"),
        (false, _) => return found,
    };
    Found { what, ..found }
}

/// kubelet cannot make the sandbox of the pod, which comes after the volumes.
fn sandbox(facts: &Facts) -> Option<Found> {
    if is_ready(&facts.pod) || !waits(facts) {
        return None;
    }
    let event = facts.event(&["FailedCreatePodSandBox"], |_| true)?;
    let age = time_of(event).map(|time| facts.now.duration_since(time).as_secs());
    if age.is_some_and(|age| age > RECENT) {
        return None;
    }
    let what = format!(
        "{}kubelet cannot make the sandbox of the pod, without which no container starts; this is for the network of the node, and not about the volume",
        fine(facts)
    );
    Some(Found::new(what, facts.describe()).said_by(Some(event)))
}

/// The pod has failed, and is not started again.
fn failed(facts: &Facts) -> Option<Found> {
    let status = facts.pod.status.as_ref()?;
    if status.phase.as_deref() != Some("Failed") {
        return None;
    }
    let reason = status.reason.as_ref();
    let reason = reason.map_or_else(String::new, |reason| format!(" ({reason})"));
    let begin = format!("the pod has failed{reason}");
    let mut ends = state::statuses(&facts.pod).filter_map(|(_, status)| {
        let ended = status.state.as_ref()?.terminated.as_ref()?;
        state::is_down(status).then_some((status, ended))
    });
    if let Some((status, ended)) = ends.next()
        && ended.started_at.is_some()
    {
        if restarts::never_ran(status).is_some() {
            let what = format!(
                "{begin}: container {} could not be started ({})",
                status.name,
                ended.reason.as_deref().unwrap_or_default()
            );
            return Some(Found::new(what, facts.describe()).said(ended.message.clone()));
        }
        let mounted = match facts.volumes.is_empty() {
            true => "",
            false => "its volumes were mounted, so ",
        };
        let what = format!(
            "{begin}: container {} ended with {}; {mounted}look at its log",
            status.name,
            state::end(ended, facts.now)
        );
        let next = state::log(facts, &status.name, "");
        return Some(Found::new(what, next).said(status_message(facts)));
    }
    let has_started =
        state::statuses(&facts.pod).any(|(_, status)| state::started(status).is_some());
    let mut volumes = facts.volumes.iter();
    let words = volumes.find_map(|volume| Some((volume, facts.failed_mount(volume)?)));
    match words.filter(|_| !has_started) {
        Some((volume, (said, at))) => Some(Found {
            at,
            ..Found::new(
                format!(
                    "{begin} before a container was started: volume {} could not be mounted",
                    volume.name
                ),
                facts.describe(),
            )
            .said(Some(said))
        }),
        None => Some(Found::new(begin, facts.describe()).said(status_message(facts))),
    }
}

fn status_message(facts: &Facts) -> Option<String> {
    let message = facts.pod.status.as_ref()?.message.clone();
    message.filter(|message| !message.is_empty())
}
