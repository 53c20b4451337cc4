//! Checks the Secrets that classes make and that containers take.

use kube::ResourceExt as _;

use jiff::Timestamp;

use super::{Found, Then, events::has_name, refusal::after_secret, volume::started};
use crate::{
    cluster::Read,
    explain::facts::{Facts, VolumeFacts},
    lint::names::closest,
    time::shown,
};
use driver::cluster::pod_status::{Aspect, CONTENT_CHANGED};

/// The seconds after a mount in which a Secret may still be on its way.
const ON_ITS_WAY: i64 = 15;

/// The pod status says that Secrets are not as the class says.
pub(super) fn out_of_step(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    let (since, reason) = Aspect::Secrets.annotations();
    let annotations = volume.pod_status.found()?.metadata.annotations.as_ref()?;
    let since = annotations.get(since)?;
    let since = match since.parse() {
        Ok(time) => shown(time, facts.now),
        Err(_) => since.clone(),
    };
    let what = format!(
        "Secrets of class {} are not as it says since {since}",
        volume.class_name
    );
    let said = annotations.get(reason);
    let next = after_secret(facts, volume, said.map_or("", String::as_str));
    Some(Found::new(what, next).said(said.cloned()))
}

/// A Secret of the class is not there, although the volume is mounted.
pub(super) fn missing(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    if out_of_step(facts, volume).is_some() || facts.is_mounted(volume) != Some(true) {
        return None;
    }
    let status = volume.pod_status.found()?;
    let mounted = status.metadata.creation_timestamp.as_ref()?.0;
    if facts.now.duration_since(mounted).as_secs() < ON_ITS_WAY {
        return None;
    }
    let made = &volume.class.found()?.spec.secret_objects;
    let is_missing = |name: &String| facts.secrets.get(name).is_some_and(Read::is_missing);
    let names: Vec<_> = made
        .iter()
        .map(|made| &made.secret_name)
        .filter(|name| is_missing(name))
        .collect();
    let first = *names.first()?;
    let event = facts.event(&["FailedToCreateSecret"], |text| has_name(text, first));
    let more = if names.len() > 1 {
        format!(" and {} more", names.len() - 1)
    } else {
        String::new()
    };
    let what = match event {
        Some(_) => format!(
            "Secret {first}{more} of class {} is missing",
            volume.class_name
        ),
        None => format!(
            "Secret {first}{more} of class {} is missing, and no event says why: the driver makes it at its next check, within a minute, if it may write Secrets (syncSecret.enabled)",
            volume.class_name
        ),
    };
    let message = event.and_then(|event| event.message.as_deref());
    let next = match message {
        Some(said) => after_secret(facts, volume, said),
        None => Then::Do(format!(
            "{} get events --field-selector reason=FailedToCreateSecret",
            facts.kubectl()
        )),
    };
    Some(Found::new(what, next).said_by(event))
}

/// A container's environment takes a Secret that is not there.
pub(super) fn env_secret(facts: &Facts, has_reason: bool) -> Option<Found> {
    // The Secrets of a class go with the last pod that mounts it.
    if facts.has_ended() || facts.may_outlive_its_volumes() {
        return None;
    }
    let taken = facts.taken_secrets();
    let (secret, taken) = taken
        .iter()
        .find(|(secret, _)| facts.secrets.get(*secret).is_some_and(Read::is_missing))?;
    let begin = format!(
        "container {} takes its environment from Secret {secret}, which does not exist",
        taken.container
    );
    let classes_of_pod: Vec<_> = facts
        .volumes
        .iter()
        .filter(|volume| volume.makes(secret))
        .collect();
    let what = if let Some(volume) = classes_of_pod.first() {
        match facts.is_used(volume) {
            true if facts.is_mounted(volume) == Some(true) && has_reason => format!(
                "{begin}: class {} makes it, but could not: see above",
                volume.class_name
            ),
            true if facts.is_mounted(volume) == Some(true) => format!(
                "{begin}: class {} makes it, and the driver has not made it yet",
                volume.class_name
            ),
            true => format!(
                "{begin}: class {} makes it once volume {} is mounted",
                volume.class_name, volume.name
            ),
            false => format!(
                "{begin}: class {} makes it, but no container mounts volume {}, and kubelet mounts only what a container mounts; add it to volumeMounts",
                volume.class_name, volume.name
            ),
        }
    } else {
        let classes = facts.classes.as_ref().and_then(Read::found);
        let maker = classes.and_then(|classes| {
            let makes = |name: &String| name == secret;
            classes.iter().find(|class| {
                class
                    .spec
                    .secret_objects
                    .iter()
                    .any(|made| makes(&made.secret_name))
            })
        });
        match maker {
            Some(class) => format!(
                "{begin}: class {} makes it, but only while a pod mounts that class; add a volume of it to this pod",
                class.name_any()
            ),
            None if facts.volumes.is_empty() => return None,
            None => match similar(facts, secret) {
                Some((class, right)) => {
                    format!("{begin}; class {class} makes {right}: is that meant?")
                }
                None => format!("{begin}, and no class of this namespace makes it"),
            },
        }
    };
    Some(Found::new(what, facts.describe()))
}

/// Returns the class of the pod that makes a Secret of a similar name, and that name.
pub(super) fn similar<'a>(facts: &'a Facts, secret: &str) -> Option<(&'a str, &'a str)> {
    facts.volumes.iter().find_map(|volume| {
        let made = &volume.class.found()?.spec.secret_objects;
        let names: Vec<_> = made.iter().map(|made| made.secret_name.as_str()).collect();
        Some((volume.class_name.as_str(), closest(secret, &names)?))
    })
}

/// A container's environment takes a key that the class does not write. The keys of the Secret itself are not
/// read: only its content has them.
pub(super) fn env_key(facts: &Facts) -> Option<Found> {
    let taken = facts.taken_secrets();
    let mut wrong = taken.iter().filter_map(|(secret, taken)| {
        facts.secrets.get(secret)?.found()?;
        let (class, keys) = keys_of(facts, secret)?;
        let key = taken
            .keys
            .iter()
            .find(|key| !keys.contains(&key.as_str()))?;
        let what = format!(
            "container {} takes key {key} of Secret {secret}, and class {class} writes {}",
            taken.container,
            keys.join(", ")
        );
        Some(Found::new(what, facts.describe()))
    });
    let not_started = facts
        .pod
        .status
        .iter()
        .flat_map(|status| status.container_statuses.iter().flatten());
    let waits = not_started.into_iter().any(|status| {
        status
            .state
            .as_ref()
            .is_some_and(|state| state.waiting.is_some())
    });
    wrong.next().filter(|_| waits)
}

/// Returns the class of the pod that makes a Secret, and the keys that it writes, if they are known: not of all
/// objects, or of a type of which the driver chooses the keys.
pub(super) fn keys_of<'a>(facts: &'a Facts, secret: &str) -> Option<(&'a str, Vec<&'a str>)> {
    facts.volumes.iter().find_map(|volume| {
        let made = &volume.class.found()?.spec.secret_objects;
        let made = made.iter().find(|made| made.secret_name == secret)?;
        let is_open = made.data.iter().any(|data| data.object_name == "*")
            || made.type_.starts_with("kubernetes.io/");
        let keys = made.data.iter().map(|data| data.key.as_str());
        (!is_open).then(|| (volume.class_name.as_str(), keys.collect()))
    })
}

/// Returns the containers that started before a Secret of their environment got its present content, with the
/// Secret. The driver changes a Secret for a new owner, too: that counts only if the content of the volume has
/// changed since, as well.
pub(in crate::explain) fn outdated(facts: &Facts) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for (secret, taken) in facts.taken_secrets() {
        let written = facts.secrets.get(&secret).and_then(Read::found);
        let maker = facts.volumes.iter().find(|volume| volume.makes(&secret));
        let (Some(written), Some(volume)) = (written, maker) else {
            continue;
        };
        let changed = changed(facts, volume);
        for container in taken.containers {
            let Some(started) = started(facts, &container) else {
                continue;
            };
            let is_newer = |time: Option<Timestamp>| time.is_some_and(|time| time > started);
            if is_newer(written.created) || is_newer(written.by_driver) && is_newer(changed) {
                all.push((container, secret.clone()));
            }
        }
    }
    all
}

/// Returns when the content of a volume changed last.
fn changed(facts: &Facts, volume: &VolumeFacts) -> Option<Timestamp> {
    if let Some(record) = facts.record(volume) {
        return Some(record.last_change);
    }
    let annotations = volume.pod_status.found()?.annotations();
    annotations.get(CONTENT_CHANGED)?.parse().ok()
}
