//! Checks what containers wait for that is not a volume: their image, a field or an object that kubelet refuses, and
//! their own program.

use k8s_openapi::api::core::v1::{
    ContainerStateTerminated, ContainerStateWaiting, ContainerStatus, Event,
};

use super::{
    Found,
    events::{has_name, is_about, text},
    hooks,
    order::Place,
    over, restarts,
    sandbox::sandbox,
    secrets::{could_not, keys_of, not_config_map},
};
use crate::explain::{facts::Facts, state};

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
        "the container has no such program in its PATH: correct command or args",
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

/// Finds what keeps the containers of a pod from running. `is_told` says of a container whether it has been told of a
/// Secret of its environment.
pub(super) fn wrong(
    facts: &Facts,
    is_told: impl Fn(&str) -> bool,
) -> Vec<(Place, &'static str, Found)> {
    let of_pod = |check, found: Option<Found>| {
        let found = found.map(|found| (Place::of_check(check), check, found));
        found.into_iter().collect::<Vec<_>>()
    };
    if facts.is_deleted() {
        return Vec::new();
    }
    if facts.has_ended() {
        return of_pod("pod-failed", failed(facts));
    }
    let sandbox = of_pod("sandbox", sandbox(facts));
    if !sandbox.is_empty() {
        return sandbox;
    }
    let found = state::statuses(&facts.pod).filter_map(|(is_init, status)| {
        let (check, found) = of_container(facts, is_init, status, is_told(&status.name))?;
        let said = found.said.as_deref().unwrap_or_default();
        let place = Place {
            needs_driver: check == "container-config" && may_await_driver(facts, said),
            ..Place::of_container(facts, &status.name)
        };
        Some((place, check, found))
    });
    found.collect()
}

/// Returns whether kubelet speaks of a Secret that a class of the pod makes, or may make.
fn may_await_driver(facts: &Facts, said: &str) -> bool {
    let mut volumes = facts.volumes.iter();
    is_about_secret(said)
        && volumes.any(|volume| {
            let class = volume.class.found();
            class.is_none_or(|class| {
                let mut made = class.spec.secret_objects.iter();
                made.any(|made| has_name(said, &made.secret_name))
            })
        })
}

/// Returns how a container waits, if it does.
pub(super) fn waiting<'a>(facts: &'a Facts, container: &str) -> Option<&'a ContainerStateWaiting> {
    let mut statuses = state::statuses(&facts.pod);
    let (_, status) = statuses.find(|(_, status)| status.name == container)?;
    status.state.as_ref()?.waiting.as_ref()
}

/// Returns the first container that waits for an image that cannot be pulled.
pub(super) fn without_image(facts: &Facts) -> Option<&str> {
    let mut statuses = state::statuses(&facts.pod);
    let found = statuses.find(|(_, status)| {
        let state = status.state.as_ref();
        let waiting = state.and_then(|state| state.waiting.as_ref());
        let reason = waiting.and_then(|waiting| waiting.reason.as_deref());
        reason.is_some_and(|reason| OF_IMAGE.contains(&reason))
    });
    let is_of_now = !facts.is_deleted() && !facts.has_ended();
    found
        .filter(|_| is_of_now)
        .map(|(_, status)| status.name.as_str())
}

fn of_container(
    facts: &Facts,
    is_init: bool,
    status: &ContainerStatus,
    is_told: bool,
) -> Option<(&'static str, Found)> {
    let name = match is_init {
        true => format!("init container {}", status.name),
        false => format!("container {}", status.name),
    };
    if state::is_down(status) || restarts::ends_again(facts, is_init, status) {
        return Some(match restarts::not_of_its_own(facts, &name, status) {
            Some(found) => ("container-config", found),
            None => ("container-crash", crash(facts, is_init, status)),
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
        return Some(("image", image(facts, waits)));
    }
    if reason == OF_HOOK {
        let said = waits.said.clone().unwrap_or_default();
        return Some(match hooks::of_hook(facts, &waits.name, status, &said) {
            Some(found) => ("container-config", found.said(waits.said)),
            None => {
                let found = crash(facts, is_init, status);
                let what = format!("{}{}", found.what, hooks::ENDED_FIRST);
                ("container-crash", Found { what, ..found }.said(waits.said))
            }
        });
    }
    if !OF_CONFIG.contains(&reason) {
        return None;
    }
    let found = config(facts, waits);
    let is_new = !is_told || !found.said.as_deref().is_none_or(is_about_secret);
    is_new.then_some(("container-config", found))
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
    match !facts.volumes.is_empty() && facts.has_volumes() {
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
    let found = not_started(facts, &name, &status.name, reason, Some(words.to_owned()));
    match event {
        Some(event) => found.said_by(Some(event)),
        None => found.said(said),
    }
}

/// Says that kubelet cannot start a container, and what to do about what it says. `name` has its kind, too.
pub(super) fn not_started(
    facts: &Facts,
    name: &str,
    container: &str,
    reason: &str,
    said: Option<String>,
) -> Found {
    let words = said.as_deref().unwrap_or_default();
    let over = over::mount(facts, container, words);
    let over = over.or_else(|| awaited_key(facts, words));
    let is_secret = not_config_map(facts, words);
    let next = match is_secret.is_some() {
        true => facts.edit_workload(),
        false => facts.describe(),
    };
    let known = over.or(is_secret);
    let advice = known.or_else(|| advice(CONFIGS, words).map(str::to_owned));
    let advice = advice.map_or_else(String::new, |advice| format!("; {advice}"));
    let what = format!(
        "{}kubelet cannot start {name} ({reason}){advice}",
        fine(facts)
    );
    Found::new(what, next).said(said)
}

/// Returns advice about a key that kubelet does not find, and that the class writes by now.
fn awaited_key(facts: &Facts, said: &str) -> Option<String> {
    let (_, rest) = said.split_once("find key ")?;
    let (key, rest) = rest.split_once(" in Secret ")?;
    let (_, rest) = rest.split_once('/')?;
    let secret = rest.split_whitespace().next()?;
    let (class, keys) = keys_of(facts, secret)?;
    let mut makers = facts.volumes.iter().filter(|volume| volume.makes(secret));
    if makers.any(|volume| could_not(facts, volume, secret)) {
        return Some(format!(
            "class {class} is to write the keys of Secret {secret}, but could not: see above"
        ));
    }
    keys.contains(&key).then(|| {
        format!(
            "class {class} writes key {key}: if that was corrected just now, wait a minute until the driver has written it and kubelet tries again"
        )
    })
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

/// The pod has failed, and is not started again.
fn failed(facts: &Facts) -> Option<Found> {
    let status = facts.pod.status.as_ref()?;
    if status.phase.as_deref() != Some("Failed") {
        return None;
    }
    let reason = status_reason(facts);
    let reason = reason.map_or_else(String::new, |reason| format!(" ({reason})"));
    let begin = format!("the pod has failed{reason}");
    if let Some((status, ended)) = ends_of(facts).next()
        && ended.started_at.is_some()
        && status_reason(facts).is_none()
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
    // The reason is the pod's own: its containers were ended for it.
    if let Some((status, ended)) = ends_of(facts).find(|(_, ended)| ended.started_at.is_some()) {
        let what = format!(
            "{begin}; container {} ended with {}",
            status.name,
            state::end(ended, facts.now)
        );
        return Some(Found::new(what, facts.describe()).said(status_message(facts)));
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

/// Returns the containers that ended with an error.
fn ends_of(facts: &Facts) -> impl Iterator<Item = (&ContainerStatus, &ContainerStateTerminated)> {
    state::statuses(&facts.pod).filter_map(|(_, status)| {
        let ended = status.state.as_ref()?.terminated.as_ref()?;
        state::is_down(status).then_some((status, ended))
    })
}

/// Returns why the pod as a whole has failed, if that is no end of a container.
fn status_reason(facts: &Facts) -> Option<&str> {
    let reason = facts.pod.status.as_ref()?.reason.as_deref();
    reason.filter(|reason| !reason.is_empty())
}

fn status_message(facts: &Facts) -> Option<String> {
    let message = facts.pod.status.as_ref()?.message.clone();
    message.filter(|message| !message.is_empty())
}
