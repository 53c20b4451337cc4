//! Checks the Secrets that classes make and that containers take.

use std::collections::BTreeSet;

use jiff::Timestamp;
use kube::ResourceExt as _;

use super::{Found, Then, events::has_name, refusal::after_secret, volume::started};
use crate::{
    cluster::Read,
    explain::facts::{Facts, VolumeFacts},
    lint::names::closest,
    time::shown,
};
use driver::{
    cluster::{
        pod_status::{Aspect, CONTENT_CHANGED},
        resources::SecretProviderClass,
    },
    record::is_object_name,
};

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
    if !is_object_name(first) {
        let what = format!(
            "class {} is to make {}; correct its secretName",
            volume.class_name,
            impossible(first)
        );
        return Some(Found::new(what, facts.edit_class(volume)));
    }
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

/// Returns whether it is known that the driver could not make the Secrets of a volume.
pub(super) fn could_not(facts: &Facts, volume: &VolumeFacts, secret: &str) -> bool {
    let event = facts.event(&["FailedToCreateSecret"], |text| has_name(text, secret));
    out_of_step(facts, volume).is_some() || event.is_some()
}

/// Returns the class of the namespace that makes a Secret, for a pod that does not mount it.
pub(super) fn maker_elsewhere<'a>(
    facts: &'a Facts,
    secret: &str,
) -> Option<&'a SecretProviderClass> {
    let mut classes = facts.classes.as_ref()?.found()?.iter();
    classes.find(|class| {
        let mut made = class.spec.secret_objects.iter();
        made.any(|made| made.secret_name == secret)
    })
}

/// Returns whether a Secret is not there, as far as is known, and is for the driver to make: a class of the pod makes
/// it, or may do so.
pub(super) fn awaits_driver(facts: &Facts, secret: &str) -> bool {
    let read = facts.secrets.get(secret);
    let mut volumes = facts.volumes.iter();
    read.is_none_or(|read| read.found().is_none())
        && volumes.any(|volume| volume.makes(secret) || volume.class.unknown().is_some())
}

/// Returns words for the Secret of a similar name that a class of the pod makes. One whose name cannot be that of a Secret
/// is never made, and nothing can take it.
pub(super) fn similar(facts: &Facts, secret: &str) -> Option<String> {
    let of_volume = |volume: &VolumeFacts| {
        let made = &volume.class.found()?.spec.secret_objects;
        let names = made.iter().map(|made| made.secret_name.as_str());
        let (possible, others): (Vec<_>, Vec<_>) = names.partition(|name| is_object_name(name));
        let class = &volume.class_name;
        if secret == class && !possible.is_empty() {
            let names = possible.join(", ");
            return Some(format!(
                "{secret} is the name of the class, which makes {names}: is that meant?"
            ));
        }
        if let Some(right) = closest(secret, &possible) {
            return Some(format!("class {class} makes {right}: is that meant?"));
        }
        let wrong = closest(secret, &others)?;
        let what = format!("{}; correct secretName in the class", impossible(wrong));
        Some(format!("class {class} is to make {what}"))
    };
    facts.volumes.iter().find_map(of_volume)
}

/// Says that a name cannot be that of a Secret.
pub(super) fn impossible(name: &str) -> String {
    format!(
        "{name}, which cannot be the name of a Secret: it takes lower-case letters, digits, \"-\" and \".\""
    )
}

/// Returns the class of the pod that makes a Secret, and the keys that it writes, if they are known: not of all
/// objects, or of the type of which the driver chooses the keys.
pub(super) fn keys_of<'a>(facts: &'a Facts, secret: &str) -> Option<(&'a str, Vec<&'a str>)> {
    facts.volumes.iter().find_map(|volume| {
        let made = &volume.class.found()?.spec.secret_objects;
        let made = made.iter().find(|made| made.secret_name == secret)?;
        let is_open = made.data.iter().any(|data| data.object_name == "*")
            || made.type_ == "kubernetes.io/tls";
        let keys = made.data.iter().map(|data| data.key.as_str());
        (!is_open).then(|| (volume.class_name.as_str(), keys.collect()))
    })
}

/// Returns the containers that started before a Secret of their environment got its present content, with the
/// Secret. The driver changes a Secret for a new owner, too: that counts only if the content of the volume has
/// changed since, as well.
pub(in crate::explain) fn outdated(facts: &Facts) -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = Vec::new();
    let takes = facts.takes();
    let pairs: BTreeSet<_> = takes
        .iter()
        .map(|take| (take.secret, take.container.name.as_str()))
        .collect();
    for (secret, container) in pairs {
        let written = facts.secrets.get(secret).and_then(Read::found);
        let maker = facts.volumes.iter().find(|volume| volume.makes(secret));
        let (Some(written), Some(volume)) = (written, maker) else {
            continue;
        };
        let Some(started) = started(facts, container) else {
            continue;
        };
        let is_newer = |time: Option<Timestamp>| time.is_some_and(|time| time > started);
        let changed = changed(facts, volume);
        let is_outdated = match written.content_since {
            Some(since) => since > started,
            None => is_newer(written.created) || is_newer(written.by_driver) && is_newer(changed),
        };
        if is_outdated {
            all.push((container.to_owned(), secret.to_owned()));
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
