//! Checks volumes of Secrets: those that a class of the pod makes, or was meant to make.

use kube::ResourceExt as _;

use super::{
    Found,
    events::{latest_failure, waits},
    secrets::{could_not, keys_of, maker_elsewhere, similar},
};
use crate::{
    cluster::Read,
    explain::facts::{Facts, SecretVolume},
};

/// Finds volumes of a Secret that is not there, or of a key that the class does not write, while the pod waits for
/// its volumes. A Secret that has nothing to do with a class is as any other volume.
pub(super) fn wrong(facts: &Facts) -> Vec<(SecretVolume, Found)> {
    if facts.volumes.is_empty() || !waits(facts) {
        return Vec::new();
    }
    let mut all: Vec<(SecretVolume, Found)> = Vec::new();
    for volume in facts.secret_volumes() {
        let is_missing = facts.secrets.get(&volume.secret).map(Read::is_missing);
        let what = match is_missing {
            Some(true) => missing(facts, &volume),
            Some(false) => without_key(facts, &volume),
            None => None,
        };
        let is_known = all.iter().any(|(known, _)| known.name == volume.name);
        if let Some(what) = what.filter(|_| !is_known) {
            let found = Found::new(what, facts.describe());
            let event = latest_failure(facts, &volume.name);
            let found = found.said_by(event);
            all.push((volume, found));
        }
    }
    all
}

fn missing(facts: &Facts, volume: &SecretVolume) -> Option<String> {
    let (name, secret) = (&volume.name, &volume.secret);
    let begin = format!("volume {name} takes Secret {secret}, which does not exist");
    if let Some(maker) = facts.volumes.iter().find(|other| other.makes(secret)) {
        let (class, volume) = (&maker.class_name, &maker.name);
        return Some(match facts.is_used(maker) {
            true if could_not(facts, maker, secret) => {
                format!("{begin}: class {class} makes it, but could not: see above")
            }
            true if facts.is_mounted(maker) == Some(true) => {
                format!("{begin}: class {class} makes it, and the driver has not made it yet")
            }
            true => format!("{begin}: class {class} makes it once volume {volume} is mounted"),
            false => format!(
                "{begin}: class {class} makes it, but no container mounts volume {volume}, and kubelet mounts only what a container mounts; add it to volumeMounts"
            ),
        });
    }
    if let Some(similar) = similar(facts, secret) {
        return Some(format!("{begin}; {similar}"));
    }
    let maker = maker_elsewhere(facts, secret)?;
    Some(format!(
        "{begin}: class {} makes it, but only while a pod mounts that class; add a volume of it to this pod",
        maker.name_any()
    ))
}

fn without_key(facts: &Facts, volume: &SecretVolume) -> Option<String> {
    let (class, keys) = keys_of(facts, &volume.secret)?;
    let mut taken = volume.keys.iter();
    let key = taken.find(|key| !keys.contains(&key.as_str()))?;
    Some(format!(
        "volume {} takes key {key} of Secret {}, and class {class} writes {}",
        volume.name,
        volume.secret,
        keys.join(", ")
    ))
}
