//! Checks containers that mount a part of a volume (subPath).

use k8s_openapi::api::core::v1::{Container, VolumeMount};

use super::{Found, volume::started};
use crate::{
    explain::facts::{Facts, VolumeFacts},
    time::shown,
};

/// A container mounts one file of a volume that is refreshed.
pub(super) fn outdated(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    let record = facts.record(volume)?;
    if !facts.status()?.refreshes || !record.mounted || without_file(facts, volume).is_some() {
        return None;
    }
    // Content that has never changed is not old.
    let (container, mount) = parts(facts, volume).find(|(container, _)| {
        let started = started(facts, &container.name);
        started.is_some_and(|started| record.last_change > started)
    })?;
    Some(Found::new(
        format!(
            "container {} mounts a part of volume {} at {} (subPath) and keeps the content with which it started, although the volume has new content since {}; mount the whole volume, and until then replace the pod",
            container.name,
            volume.name,
            mount.mount_path,
            shown(record.last_change, facts.now)
        ),
        facts.new_pod(),
    ))
}

/// A container mounts a file that the volume does not have, if all of its files are known.
pub(super) fn without_file(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    let record = facts.record(volume).filter(|record| record.mounted)?;
    if record.file_count? > record.files.len() {
        return None;
    }
    let is_there = |path: &str| {
        let path = path.trim_matches('/');
        let mut files = record.files.iter();
        files.any(|file| {
            let rest = file.strip_prefix(path);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    };
    let (container, path) = parts(facts, volume)
        .filter_map(|(container, mount)| Some((container, mount.sub_path.as_deref()?)))
        .find(|(_, path)| !path.is_empty() && !is_there(path))?;
    Some(Found::new(
        format!(
            "container {} mounts {path} of volume {} (subPath), and the volume has no such file; it has {}",
            container.name,
            volume.name,
            match record.files.is_empty() {
                true => "none".to_owned(),
                false => record.files.join(", "),
            }
        ),
        facts.describe(),
    ))
}

/// Returns the mounts of a part of a volume, with their containers.
fn parts<'a>(
    facts: &'a Facts,
    volume: &'a VolumeFacts,
) -> impl Iterator<Item = (&'a Container, &'a VolumeMount)> {
    let containers = facts.containers().flat_map(|container| {
        let mounts = container.volume_mounts.iter().flatten();
        mounts.map(move |mount| (container, mount))
    });
    containers.filter(|(_, mount)| {
        let sub = mount.sub_path.as_ref().or(mount.sub_path_expr.as_ref());
        mount.name == volume.name && sub.is_some_and(|sub| !sub.is_empty())
    })
}
