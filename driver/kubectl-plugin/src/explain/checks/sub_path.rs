//! Checks containers that mount a part of a volume (subPath).

use driver::status::Volume;
use k8s_openapi::api::core::v1::{Container, VolumeMount};
use kube::ResourceExt as _;

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
    if !facts.status()?.refreshes || !record.mounted {
        return None;
    }
    // Content that has never changed is not old, and what was never there has no content.
    let part = parts(facts, volume).find(|part| {
        let started = started(facts, &part.container.name);
        let is_changed = started.is_some_and(|started| record.last_change > started);
        is_changed && part.is_there(record) != Some(false)
    })?;
    let (container, at) = (&part.container.name, &part.mount.mount_path);
    let since = shown(record.last_change, facts.now);
    let Some(path) = &part.path else {
        let expression = part.mount.sub_path_expr.as_deref().unwrap_or_default();
        let what = format!(
            "container {container} mounts {expression} of volume {} at {at} (subPathExpr); the value of a variable in it is not known here, and the volume has {}: if it names none of these, correct it, and else the container keeps the content with which it started, although the volume has new content since {since}: mount the whole volume then",
            volume.name,
            files(record)
        );
        return Some(Found::new(what, facts.describe()));
    };
    let field = part.field();
    let part = match path.is_empty() {
        true => "a part",
        false => path,
    };
    Some(Found::new(
        format!(
            "container {container} mounts {part} of volume {} at {at} ({field}) and keeps the content with which it started, although the volume has new content since {since}; mount the whole volume, and until then replace the pod",
            volume.name
        ),
        facts.new_pod(),
    ))
}

/// A container mounts a file that the volume does not have, if all of its files are known.
pub(super) fn without_file(facts: &Facts, volume: &VolumeFacts) -> Option<Found> {
    let part = missing(facts, volume)?;
    let record = facts.record(volume)?;
    let field = part.field();
    let expression = part.mount.sub_path_expr.as_ref();
    let field = expression.map_or_else(
        || field.to_owned(),
        |expression| format!("{field} {expression}"),
    );
    Some(Found::new(
        format!(
            "container {} mounts {} of volume {} ({field}), and the volume has no such file; it has {}",
            part.container.name,
            part.path.as_deref().unwrap_or_default(),
            volume.name,
            files(record)
        ),
        facts.describe(),
    ))
}

/// Returns the first container that mounts a file which the volume does not have.
pub(super) fn missing_file<'a>(facts: &'a Facts, volume: &'a VolumeFacts) -> Option<&'a Container> {
    missing(facts, volume).map(|part| part.container)
}

fn missing<'a>(facts: &'a Facts, volume: &'a VolumeFacts) -> Option<Part<'a>> {
    let record = facts.record(volume).filter(|record| record.mounted)?;
    parts(facts, volume).find(|part| part.is_there(record) == Some(false))
}

/// Returns the files of a volume in words.
fn files(record: &Volume) -> String {
    let names = record.files.join(", ");
    let count = record.file_count.unwrap_or(record.files.len());
    match (record.files.is_empty(), count > record.files.len()) {
        (true, _) => "none".to_owned(),
        (false, true) => format!("{names} and others"),
        (false, false) => names,
    }
}

/// Returns the files that containers mount, where the node's driver cannot be asked for those of the volume, and its pod
/// status names no such object: one of them may be no file of the volume, and nothing else says so.
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
        let open = parts(facts, volume).filter(|part| {
            let path = part.path.as_deref();
            path.is_none_or(|path| !path.is_empty() && !is_named(path))
        });
        let open: Vec<_> = open.collect();
        open.into_iter()
            .filter_map(move |part| part.unknown(facts, volume, &ids))
    });
    lines.collect()
}

/// A mount of a part of a volume.
struct Part<'a> {
    container: &'a Container,
    mount: &'a VolumeMount,
    /// The path in the volume; none if it names a variable whose value is not known.
    path: Option<String>,
}

impl Part<'_> {
    /// Returns whether the volume has the path, if it is known, and all files are.
    fn is_there(&self, record: &Volume) -> Option<bool> {
        let path = self.path.as_deref()?;
        if path.is_empty() {
            return Some(true);
        }
        let mut files = record.files.iter();
        let is_there = files.any(|file| {
            let rest = file.strip_prefix(path);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        });
        let are_all = record.file_count? <= record.files.len();
        (is_there || are_all).then_some(is_there)
    }

    /// Says that it is not known whether the volume has the path, and how somebody may see that who may not ask the
    /// driver. Nothing is mounted yet where the container has not begun.
    fn unknown(&self, facts: &Facts, volume: &VolumeFacts, ids: &str) -> Option<String> {
        let name = &self.container.name;
        let field = self.field();
        let what = match (&self.path, &self.mount.sub_path_expr) {
            (Some(path), None) => {
                format!("the file {path}, which container {name} mounts ({field})")
            }
            (Some(path), Some(expression)) => {
                format!("the file {path}, which container {name} mounts ({field} {expression})")
            }
            (None, expression) => format!(
                "what {} stands for, which container {name} mounts ({field})",
                expression.as_deref().unwrap_or_default()
            ),
        };
        let begin = format!("whether volume {} has {what}{ids}", volume.name);
        if started(facts, name).is_some() {
            let at = &self.mount.mount_path;
            let (kubectl, pod) = (facts.kubectl(), facts.pod.name_any());
            return Some(format!(
                "{begin}: {kubectl} exec {pod} -c {name} -- ls -la {at} shows it; an empty directory there means that there is no such file (sub-path-file)"
            ));
        }
        let mut statuses = state::statuses(&facts.pod);
        let is_down = statuses.any(|(_, status)| status.name == *name && state::is_down(status));
        is_down.then(|| format!("{begin} (sub-path-file)"))
    }

    fn field(&self) -> &'static str {
        match self.mount.sub_path_expr {
            Some(_) => "subPathExpr",
            None => "subPath",
        }
    }
}

/// Returns the mounts of a part of a volume.
fn parts<'a>(facts: &'a Facts, volume: &'a VolumeFacts) -> impl Iterator<Item = Part<'a>> {
    let mounts = facts.containers().flat_map(|container| {
        let mounts = container.volume_mounts.iter().flatten();
        mounts.map(move |mount| (container, mount))
    });
    let mounts = mounts.filter(|(_, mount)| mount.name == volume.name);
    mounts.filter_map(|(container, mount)| {
        let not_empty = |path: &&String| !path.is_empty();
        let plain = mount.sub_path.as_ref().filter(not_empty).cloned();
        let expression = mount.sub_path_expr.as_ref().filter(not_empty);
        let path = match (plain, expression) {
            (Some(plain), _) => Some(plain),
            (None, Some(expression)) => facts.expanded(container, expression),
            (None, None) => return None,
        };
        let path = path.map(|path| path.trim_matches('/').to_owned());
        Some(Part {
            container,
            mount,
            path,
        })
    })
}
