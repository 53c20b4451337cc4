//! Judges the events of the pod: of which volume they speak, and whether what they say is over.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Event;

use super::{MAX_SAID, looks};
use crate::{
    explain::{
        facts::{Facts, VolumeFacts, time_of},
        state,
    },
    installation::{DRIVER, is_ready},
    text::one_line,
};

/// The seconds after which an event says nothing of the present. kubelet repeats itself every two minutes at least.
pub(super) const RECENT: i64 = 600;
/// The reasons of events about volumes that cannot be mounted.
const REASONS: [&str; 3] = ["FailedMount", "FailedAttachVolume", "FailedMapVolume"];
/// The reasons of events of a time at which all volumes were mounted: kubelet makes no sandbox, pulls no image and
/// starts no container before.
const AFTERWARDS: [&str; 8] = [
    "FailedCreatePodSandBox",
    "SandboxChanged",
    "Pulling",
    "Pulled",
    "BackOff",
    "Created",
    "Started",
    "Unhealthy",
];
/// Pieces of errors that kubelet gets over by itself: it asked a cache of its own before that was filled.
const PASSING: [&str; 2] = [
    "cache: timed out waiting for the condition",
    "not registered",
];
/// The number of failures up to which kubelet reports each one. Later it waits two minutes, and leaves some out.
const REPORTED: i32 = 8;
/// What a list of the volumes that kubelet still waits for begins with.
const UNMOUNTED: &str = "unmounted volumes=[";

impl Facts {
    /// Returns the last event of the pod of one of these reasons that fits.
    pub(super) fn event(&self, reasons: &[&str], fits: impl Fn(&str) -> bool) -> Option<&Event> {
        self.events.found()?.iter().find(|event| {
            let reason = event.reason.as_deref().unwrap_or_default();
            reasons.contains(&reason) && fits(text(event))
        })
    }

    /// Returns the last event about a container of one of these reasons that fits, if it is of the present.
    pub(super) fn recent_of_container(
        &self,
        container: &str,
        reasons: &[&str],
        fits: impl Fn(&str) -> bool,
    ) -> Option<&Event> {
        self.events.found()?.iter().find(|event| {
            let reason = event.reason.as_deref().unwrap_or_default();
            reasons.contains(&reason)
                && is_about(event, container)
                && fits(text(event))
                && is_recent(self, event)
        })
    }

    /// Returns kubelet's last words about a volume that it cannot mount, and when it said them.
    pub(super) fn failed_mount(&self, volume: &VolumeFacts) -> Option<(String, Option<Timestamp>)> {
        let name = format!("volume \"{}\"", volume.name);
        let mut events = self.events.found()?.iter();
        let event = events.find(|event| {
            let text = text(event);
            let is_of_it =
                text.contains(&name) || text.contains(DRIVER) && !text.contains("for volume \"");
            event.reason.as_deref() == Some("FailedMount")
                && is_of_it
                && !is_over(self, event, Some(&volume.name))
        })?;
        let message = text(event);
        let end = message.split_once("desc = ").map(|(_, text)| text);
        let end = end.or_else(|| {
            message
                .split_once(&format!("{name} : "))
                .map(|(_, text)| text)
        });
        Some((one_line(end.unwrap_or(message), MAX_SAID), time_of(event)))
    }

    /// Returns the last time at which all volumes of the pod are known to have been mounted.
    fn had_volumes_at(&self) -> Option<Timestamp> {
        let sandbox = state::sandbox(&self.pod);
        let of_sandbox = sandbox.and_then(|condition| condition.last_transition_time.as_ref());
        let of_sandbox = of_sandbox.map(|time| time.0);
        let starts = state::statuses(&self.pod).filter_map(|(_, status)| state::started(status));
        let events = self.events.found().into_iter().flatten();
        let afterwards = events.filter(|event| {
            let reason = event.reason.as_deref().unwrap_or_default();
            AFTERWARDS.contains(&reason)
        });
        let of_events = afterwards.filter_map(time_of);
        of_sandbox.into_iter().chain(starts).chain(of_events).max()
    }
}

/// Returns whether kubelet still mounts the volumes of the pod: no container has been started yet.
pub(super) fn waits(facts: &Facts) -> bool {
    if is_ready(&facts.pod) || facts.has_ended() {
        return false;
    }
    !state::has_begun(&facts.pod)
}

/// Returns kubelet's last words about a volume that it cannot mount, if they are of the present.
pub(super) fn latest_failure<'a>(facts: &'a Facts, volume: &str) -> Option<&'a Event> {
    recent_failures(facts).find(|event| volume_of(event) == Some(volume))
}

/// Returns the events about volumes that cannot be mounted, as far as they are of the present.
pub(super) fn recent_failures(facts: &Facts) -> impl Iterator<Item = &Event> {
    let events = facts.events.found().into_iter().flatten();
    events.filter(|event| {
        is_failure(event) && is_recent(facts, event) && !is_over(facts, event, volume_of(event))
    })
}

/// Returns kubelet's last words that it does not know the driver, if they are of the present.
pub(super) fn unregistered(facts: &Facts) -> Option<&Event> {
    let mut events = facts.events.found()?.iter();
    let last = events.find(|event| is_failure(event) && text(event).contains(DRIVER))?;
    let is_it = text(last).contains("not found in the list of registered CSI drivers");
    // What comes later of the containers of a pod that had its volumes before says nothing of the driver.
    let is_later = |mounted: Timestamp| time_of(last).is_some_and(|time| time > mounted);
    let is_open = looks::mounted_by(facts).is_some_and(is_later) || !is_over(facts, last, None);
    (is_it && is_recent(facts, last) && is_open).then_some(last)
}

/// Returns the name of the volume that an event is about. That of a claim is the name of what it is bound to.
pub(super) fn volume_of(event: &Event) -> Option<&str> {
    between(text(event), "for volume \"", "\"")
}

/// Returns the volumes that kubelet still waits for, if an event lists them.
pub(super) fn unmounted(event: &Event) -> Option<Vec<&str>> {
    let names = between(text(event), UNMOUNTED, "]")?;
    let names = names.split([' ', ',']).filter(|name| !name.is_empty());
    Some(names.collect())
}

pub(super) fn is_failure(event: &Event) -> bool {
    let reason = event.reason.as_deref().unwrap_or_default();
    REASONS.contains(&reason)
}

/// Returns whether an event is about an error that kubelet gets over by itself.
pub(super) fn is_passing(event: &Event) -> bool {
    PASSING.iter().any(|piece| text(event).contains(piece))
}

/// Returns whether an event is a warning.
pub(super) fn is_warning(event: &Event) -> bool {
    event.type_.as_deref() == Some("Warning")
}

/// Returns whether an event is kubelet's, as far as it says whose it is. Tools that watch a cluster have events of pods
/// as well.
pub(super) fn is_of_kubelet(event: &Event) -> bool {
    let source = event.source.as_ref();
    let component = source.and_then(|source| source.component.as_deref());
    let components = component
        .into_iter()
        .chain(event.reporting_component.as_deref());
    let mut named = components.filter(|name| !name.is_empty());
    named.all(|name| name == "kubelet")
}

/// Returns the message of an event.
pub(super) fn text(event: &Event) -> &str {
    event.message.as_deref().unwrap_or_default()
}

/// Returns whether an event is about a container.
pub(super) fn is_about(event: &Event, container: &str) -> bool {
    let field = event.involved_object.field_path.as_deref();
    field.is_some_and(|field| field.ends_with(&format!("{{{container}}}")))
}

/// Returns whether a text has the name of an object, and not as a part of another name.
pub(super) fn has_name(text: &str, name: &str) -> bool {
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || "-.".contains(c);
    let mut words = text.split(|c| !is_of_name(c));
    words.any(|word| word.trim_end_matches('.') == name)
}

pub(super) fn is_recent(facts: &Facts, event: &Event) -> bool {
    time_of(event).is_none_or(|time| facts.now.duration_since(time).as_secs() <= RECENT)
}

/// Returns whether a volume that could not be mounted was mounted later, or has been tried again without the same
/// error.
fn is_over(facts: &Facts, event: &Event, volume: Option<&str>) -> bool {
    let Some(time) = time_of(event) else {
        return false;
    };
    let is_later = |other: Timestamp| other.as_second() >= time.as_second();
    facts.had_volumes_at().is_some_and(is_later)
        || volume.is_some_and(|volume| left_the_list(facts, time, volume))
        || was_tried_again(facts, event, time)
}

/// Returns whether kubelet later listed the volumes that it waits for, and this one was not among them.
fn left_the_list(facts: &Facts, time: Timestamp, volume: &str) -> bool {
    let spec = facts.pod.spec.iter();
    let mut volumes = spec.flat_map(|spec| spec.volumes.iter().flatten());
    // The list has the names of the pod, and not those of what claims are bound to.
    let is_named = volumes.any(|named| named.name == volume);
    let mut events = facts.events.found().into_iter().flatten();
    is_named
        && events.any(|event| {
            let is_later = time_of(event).is_some_and(|other| other > time);
            is_later && unmounted(event).is_some_and(|names| !names.contains(&volume))
        })
}

/// Returns whether an error that passes has been followed by another attempt, of which nothing was said. kubelet
/// waits half a second after the first failure, and twice as long after each other.
fn was_tried_again(facts: &Facts, event: &Event, time: Timestamp) -> bool {
    const SLACK: i64 = 10;
    let series = event.series.as_ref().and_then(|series| series.count);
    let count = event.count.or(series).unwrap_or(1).max(1);
    let passed = facts.now.duration_since(time).as_secs();
    is_passing(event) && count <= REPORTED && passed > (1 << count) + SLACK
}

fn between<'a>(text: &'a str, begin: &str, end: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(begin)?;
    Some(rest.split_once(end)?.0)
}
