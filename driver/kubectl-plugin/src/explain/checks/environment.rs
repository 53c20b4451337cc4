//! Checks the Secrets and the keys that the environment of containers takes, in the order in which they start, and the
//! Secrets with which their images are pulled.

use std::collections::BTreeSet;

use driver::record::is_object_name;
use k8s_openapi::api::core::v1::Container;
use kube::ResourceExt as _;

use super::{
    Found,
    containers::waiting,
    order::Place,
    secrets::{awaits_driver, could_not, impossible, keys_of, maker_elsewhere, similar},
    volume::started,
};
use crate::{
    cluster::Read,
    explain::{
        facts::{Facts, Take},
        state,
    },
};

/// Finds Secrets and keys that are not there: each Secret at the first container that takes it, and of each container
/// one key.
pub(super) fn wrong(facts: &Facts) -> Vec<(Place, &'static str, Found)> {
    let (mut told, mut wrong_keys) = (BTreeSet::new(), BTreeSet::new());
    let mut all = Vec::new();
    for take in facts.takes() {
        let name = take.container.name.as_str();
        let place = Place::of_container(facts, name);
        if let Some(found) = secret(facts, &take).filter(|_| told.insert(take.secret)) {
            let place = Place {
                // The driver makes none of an impossible name.
                needs_driver: is_object_name(take.secret) && awaits_driver(facts, take.secret),
                ..place
            };
            all.push((place, "env-secret", found));
        } else if let Some(found) = key(facts, &take).filter(|_| wrong_keys.insert(name)) {
            all.push((place, "env-key", found));
        }
    }
    all
}

/// A container's environment takes a Secret that is not there.
fn secret(facts: &Facts, take: &Take<'_>) -> Option<Found> {
    // The Secrets of a class go with the last pod that mounts it.
    let is_over = facts.has_ended() || facts.may_outlive_its_volumes();
    let secret = take.secret;
    if is_over || !facts.secrets.get(secret).is_some_and(Read::is_missing) {
        return None;
    }
    let container = &take.container.name;
    let begin = format!("container {container} takes its environment from Secret");
    if !is_object_name(secret) {
        let makers = facts.volumes.iter().filter(|volume| volume.makes(secret));
        let classes: BTreeSet<_> = makers.map(|volume| volume.class_name.as_str()).collect();
        let classes: Vec<_> = classes.into_iter().collect();
        let where_to = match classes.as_slice() {
            [] => "correct it".to_owned(),
            classes => format!("correct it here and in class {}", classes.join(", ")),
        };
        let what = format!("{begin} {}; {where_to}", impossible(secret));
        return Some(Found::new(what, facts.describe()));
    }
    let begin = format!("{begin} {secret}, which does not exist");
    let mut makers = facts.volumes.iter().filter(|volume| volume.makes(secret));
    let what = if let Some(volume) = makers.next() {
        let class = &volume.class_name;
        match facts.is_used(volume) {
            true if facts.is_mounted(volume) == Some(true) && could_not(facts, volume, secret) => {
                format!("{begin}: class {class} makes it, but could not: see above")
            }
            true if facts.is_mounted(volume) == Some(true) => {
                format!("{begin}: class {class} makes it, and the driver has not made it yet")
            }
            true => format!(
                "{begin}: class {class} makes it once volume {} is mounted",
                volume.name
            ),
            false => format!(
                "{begin}: class {class} makes it, but no container mounts volume {}, and kubelet mounts only what a container mounts; add it to volumeMounts",
                volume.name
            ),
        }
    } else {
        match maker_elsewhere(facts, secret) {
            Some(class) => format!(
                "{begin}: class {} makes it, but only while a pod mounts that class; add a volume of it to this pod",
                class.name_any()
            ),
            None if facts.volumes.is_empty() => return None,
            None => match similar(facts, secret) {
                Some(similar) => format!("{begin}; {similar}"),
                None => format!("{begin}, and no class of this namespace makes it"),
            },
        }
    };
    Some(Found::new(what, facts.describe()))
}

/// A container that waits takes a key that the class does not write, or one that runs cannot be started again. The keys of
/// the Secret itself are not read: only its content has them.
fn key(facts: &Facts, take: &Take<'_>) -> Option<Found> {
    let written = facts.secrets.get(take.secret)?.found()?;
    let key = take.key?;
    let (class, keys) = keys_of(facts, take.secret)?;
    if keys.contains(&key) {
        return None;
    }
    if !waits(facts, take.container) {
        // It had the key: the class has been changed since, and the driver takes a key away that it does not write.
        let is_over = facts.has_ended() || facts.may_outlive_its_volumes();
        let has_begun = started(facts, &take.container.name).is_some();
        return (has_begun && !is_over && written.is_managed).then(|| {
            let what = format!(
                "container {} has been started with key {key} of Secret {}, which class {class} does not write any more: it writes {}, and the container cannot be started again",
                take.container.name,
                take.secret,
                keys.join(", ")
            );
            Found::new(what, facts.edit_workload())
        });
    }
    let what = format!(
        "container {} takes key {key} of Secret {}, and class {class} writes {}",
        take.container.name,
        take.secret,
        keys.join(", ")
    );
    Some(Found::new(what, facts.describe()))
}

/// Returns what containers that have been started do not get of what they take with `optional: true`: nothing fails, and
/// what they do without it may not be what is meant.
pub(in crate::explain) fn unset(facts: &Facts) -> Vec<String> {
    if facts.has_ended() {
        return Vec::new();
    }
    let taken = facts.takes_if_there().into_iter();
    let optional = taken.filter(|take| take.is_optional);
    let notes = optional.filter_map(|take| {
        let container = &take.container.name;
        let mut statuses = state::statuses(&facts.pod);
        let (_, status) = statuses.find(|(_, status)| status.name == *container)?;
        // One that waits gets what there is at its start.
        if !state::is_down(status) && started(facts, container).is_none() {
            return None;
        }
        let why = why_unset(facts, &take)?;
        let lacks = match take.variable {
            Some(variable) => format!("has no variable {variable}"),
            None => "lacks the variables of a Secret".to_owned(),
        };
        let key = take
            .key
            .map_or_else(String::new, |key| format!("key {key} of "));
        Some(format!(
            "container {container} {lacks}: it takes {key}Secret {} with optional: true, {why}",
            take.secret
        ))
    });
    notes.collect()
}

/// Returns why a container did not get what it takes. Who says `optional` may mean a Secret that is not there.
fn why_unset(facts: &Facts, take: &Take<'_>) -> Option<String> {
    if let Some((class, keys)) = keys_of(facts, take.secret)
        && let Some(key) = take.key
        && !keys.contains(&key)
    {
        return Some(format!("and class {class} writes {}", keys.join(", ")));
    }
    let secret = facts.secrets.get(take.secret)?;
    let similar = similar(facts, take.secret).filter(|_| secret.is_missing())?;
    Some(format!("which does not exist; {similar}"))
}

/// Returns whether a container has not been started for now. One that runs has had all keys that it takes.
fn waits(facts: &Facts, container: &Container) -> bool {
    waiting(facts, &container.name).is_some()
}

/// Finds Secrets with which images are to be pulled and that are not there, while a container waits for its image.
pub(super) fn of_images(facts: &Facts) -> Vec<(Place, &'static str, Found)> {
    let Some(container) = super::containers::without_image(facts) else {
        return Vec::new();
    };
    let event = facts.event(&["FailedToRetrieveImagePullSecret"], |_| true);
    let missing = facts.pull_secrets().filter(|secret| {
        let read = facts.secrets.get(*secret);
        read.is_some_and(Read::is_missing)
    });
    let found = missing.map(|secret| {
        let begin = format!(
            "the images of the pod are pulled with Secret {secret} (imagePullSecrets), which does not exist"
        );
        let maker = facts.volumes.iter().find(|volume| volume.makes(secret));
        let what = match (maker, similar(facts, secret)) {
            (Some(volume), _) => format!("{begin}: class {} makes it", volume.class_name),
            (None, Some(similar)) => format!("{begin}; {similar}"),
            (None, None) => begin,
        };
        let place = Place {
            needs_driver: awaits_driver(facts, secret),
            ..Place::of_container(facts, container)
        };
        let found = Found::new(what, facts.describe()).said_by(event);
        (place, "image-pull-secret", found)
    });
    let found: Vec<_> = found.collect();
    match event.filter(|_| found.is_empty() && has_unknown(facts)) {
        Some(event) => {
            let what = "kubelet does not find all Secrets with which the images of the pod are pulled (imagePullSecrets)";
            let found = Found::new(what, facts.describe()).said_by(Some(event));
            let place = Place::of_container(facts, container);
            vec![(place, "image-pull-secret", found)]
        }
        None => found,
    }
}

/// Returns whether it is not known of a Secret for the images whether it exists.
fn has_unknown(facts: &Facts) -> bool {
    let mut names = facts.pull_secrets();
    names.any(|secret| {
        let read = facts.secrets.get(secret);
        read.is_none_or(|read| read.unknown().is_some())
    })
}
