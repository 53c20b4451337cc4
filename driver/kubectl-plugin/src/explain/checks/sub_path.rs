//! Checks containers that mount a part of a volume (subPath).

use k8s_openapi::api::core::v1::{Container, VolumeMount};

use super::{Found, volume::started};
use crate::{
    explain::{
        facts::{Facts, VolumeFacts},
        state,
    },
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
    let (container, path) = missing_file(facts, volume)?;
    let files = &facts.record(volume)?.files;
    Some(Found::new(
        format!(
            "container {} mounts {path} of volume {} (subPath), and the volume has no such file; it has {}",
            container.name,
            volume.name,
            match files.is_empty() {
                true => "none".to_owned(),
                false => files.join(", "),
            }
        ),
        facts.describe(),
    ))
}

/// Returns the first container that mounts a file which the volume does not have, and its path.
pub(super) fn missing_file<'a>(
    facts: &'a Facts,
    volume: &'a VolumeFacts,
) -> Option<(&'a Container, &'a str)> {
    let record = facts.record(volume).filter(|record| record.mounted)?;
    if record.file_count? > record.files.len() {
        return None;
    }
    let is_there = |path: &str| {
        let mut files = record.files.iter();
        files.any(|file| {
            let rest = file.strip_prefix(path);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    };
    paths(facts, volume).find(|(_, path)| !is_there(path))
}

/// Returns the files that containers mount which end again and again, where the node's driver cannot be asked for those
/// of the volume, and its pod status names no such object: one of them may be no file of the volume.
pub(in crate::explain) fn unknown_files(facts: &Facts) -> Vec<String> {
    let volumes = facts.volumes.iter();
    let volumes = volumes.filter(|volume| facts.record(volume).is_none());
    let lines = volumes.flat_map(|volume| {
        let status = volume.pod_status.found();
        let objects = status.map_or(&[][..], |status| status.status.objects.as_slice());
        let is_named = |path: &str| {
            let mut ids = objects.iter().map(|object| object.id.as_str());
            ids.any(|id| id == path || id.ends_with(&format!("/{path}")))
        };
        let ids: Vec<_> = objects.iter().map(|object| object.id.as_str()).collect();
        let ids = match ids.as_slice() {
            [] => String::new(),
            ids => format!("; its pod status names the objects {}", ids.join(", ")),
        };
        let down = paths(facts, volume).filter(|(container, _)| is_down(facts, &container.name));
        let open: Vec<_> = down.filter(|(_, path)| !is_named(path)).collect();
        open.into_iter().map(move |(container, path)| {
            format!(
                "whether volume {} has the file {path}, which container {} mounts (subPath){ids}",
                volume.name, container.name
            )
        })
    });
    lines.collect()
}

fn is_down(facts: &Facts, container: &str) -> bool {
    let mut statuses = state::statuses(&facts.pod);
    statuses.any(|(_, status)| status.name == container && state::is_down(status))
}

/// Returns the paths that containers mount of a volume, with the containers.
fn paths<'a>(
    facts: &'a Facts,
    volume: &'a VolumeFacts,
) -> impl Iterator<Item = (&'a Container, &'a str)> {
    let parts = parts(facts, volume);
    let paths =
        parts.filter_map(|(container, mount)| Some((container, mount.sub_path.as_deref()?)));
    paths
        .map(|(container, path)| (container, path.trim_matches('/')))
        .filter(|(_, path)| !path.is_empty())
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
